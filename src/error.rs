//! Why a command could not be done, as the sentence a person reads.

use std::path::PathBuf;

use qtool_calib::CalibError;
use qtool_formats::FormatError;
use thiserror::Error as ThisError;

/// Everything a pipeline can fail with. The program exits with status 2 on any of them, except for
/// [`Error::Interrupted`], which is 130 as for any program stopped by ctrl-C.
#[derive(Debug, ThisError)]
#[non_exhaustive]
pub enum Error {
    /// A file, folder or manifest.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// An option.
    #[error(transparent)]
    Option(CalibError),
    /// A tensor whose values cannot be quantized.
    #[error("{}: tensor {tensor}: {source}", path.display())]
    Tensor {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Why.
        source: Box<CalibError>,
    },
    /// NaN or infinity in a source tensor.
    #[error("{}: tensor {tensor}: the element at {index:?} is {value}, expected finite weights; repair the checkpoint, or pass --non-finite keep to leave such tensors unquantized", path.display())]
    NonFinite {
        /// The checkpoint.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Index in the tensor's own shape.
        index: Vec<usize>,
        /// The value as text.
        value: String,
    },
    /// Tensors that do not fit what was asked for, all of them.
    #[error("{}: these tensors cannot be done as asked, nothing was written; leave them out with --skip or give them options of their own with --rule:\n{}", path.display(), list(refusals))]
    Refused {
        /// The checkpoint.
        path: PathBuf,
        /// One line each.
        refusals: Vec<String>,
    },
    /// A source that is no BF16/F16/F32 checkpoint.
    #[error("{}: {reason}", path.display())]
    Source {
        /// The checkpoint.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// A tensor of a model that is not what its config says.
    #[error("{}: tensor {tensor}: expected {expected} by config.json, got {got}", path.display())]
    ModelTensor {
        /// The model.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// Shape or type.
        expected: String,
        /// What is there.
        got: String,
    },
    /// A device that stopped computing.
    #[error("{0}; nothing was written")]
    Device(#[from] qtool_kernels::backend::Fault),
    /// A device that stopped computing while answers are kept.
    #[error("{fault}; {answers} answers are kept in {}, the same command with --resume goes on after them", folder.display())]
    DeviceStopped {
        /// What happened.
        fault: qtool_kernels::backend::Fault,
        /// Answers in the folder.
        answers: usize,
        /// The folder.
        folder: PathBuf,
    },
    /// A device that stopped computing in a sequential run.
    #[error("{fault}; finished blocks are kept in {}, the same command goes on after them (remove the folder to start anew)", folder.display())]
    DevicePaused {
        /// What happened.
        fault: qtool_kernels::backend::Fault,
        /// The folder with the blocks.
        folder: PathBuf,
    },
    /// A GPU that was asked for and cannot be used.
    #[error("--device {wanted}: {reason}; pass --device cpu, or leave --device out, to run on the processor")]
    NoGpu {
        /// As asked.
        wanted: String,
        /// Why.
        reason: qtool_kernels::cuda::Unavailable,
    },
    /// More tokens than a cache has room for.
    #[error("{tokens} tokens do not fit a cache of {capacity}")]
    CacheFull {
        /// Tokens there would be.
        tokens: usize,
        /// Room.
        capacity: usize,
    },
    /// A calibration or evaluation file that cannot be used.
    #[error("{}: {reason}", crate::calibrate::corpus::place(path, *line))]
    Corpus {
        /// The file.
        path: PathBuf,
        /// Line, counted from one.
        line: Option<usize>,
        /// What is wrong and what is expected.
        reason: String,
    },
    /// Calibration text too short for a single row.
    #[error(
        "the calibration text has {tokens} tokens, expected at least {length} (one row); give more text or a smaller --length"
    )]
    ShortCorpus {
        /// Tokens there are.
        tokens: usize,
        /// Tokens of a row.
        length: usize,
    },
    /// A token the model has no embedding for.
    #[error(
        "token id {id} is beyond the model's vocabulary of {vocabulary}; this tokenizer or file of ids belongs to another model"
    )]
    Vocabulary {
        /// The id.
        id: u32,
        /// Rows of the embedding.
        vocabulary: usize,
    },
    /// A sequence an encoder has no positions for.
    #[error("a text of {tokens} tokens cannot be encoded, expected 1 to {context}; cut it")]
    SequenceLength {
        /// Its tokens.
        tokens: usize,
        /// Most there may be.
        context: usize,
    },
    /// A token or task type an encoder has no embedding for.
    #[error("{what} {id} is beyond the model's {rows}")]
    TokenType {
        /// Which kind of type.
        what: &'static str,
        /// The type.
        id: u32,
        /// Rows of the table.
        rows: usize,
    },
    /// Types that are not one for each token.
    #[error("{got} {what}s were given for {expected} tokens; give one for each, or none")]
    TokenTypes {
        /// Which kind of type.
        what: &'static str,
        /// How many were given.
        got: usize,
        /// Tokens.
        expected: usize,
    },
    /// A folder without a tokenizer.
    #[error("{}: has no tokenizer, looked for {looked_for}; copy the tokenizer's files from where the model came from", folder.display())]
    NoTokenizer {
        /// The folder.
        folder: PathBuf,
        /// Names of files, in order.
        looked_for: String,
    },
    /// A tokenizer's file that cannot be used.
    #[error("{}: {reason}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A chat template that is missing, damaged, or does not take the conversation.
    #[error("{}: {reason}", path.display())]
    Template {
        /// The file it stands in.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// NaN or infinity on the way through a model.
    #[error("{}: the input of {layer} is not finite during calibration; repair the checkpoint, or leave the layer out with --skip", path.display())]
    NonFiniteActivation {
        /// The model.
        path: PathBuf,
        /// Name of the first weight it enters.
        layer: String,
    },
    /// Statistics that are missing, damaged, or of another model.
    #[error("{}: {reason}", path.display())]
    Statistics {
        /// The folder.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// Statistics of another width than the tensor they are for.
    #[error(
        "the statistics for tensor {tensor} are of {got} columns, expected {expected}; they were measured on another model"
    )]
    Evidence {
        /// The tensor.
        tensor: String,
        /// Its K.
        expected: usize,
        /// Theirs.
        got: usize,
    },
    /// A number of bits per weight that no plan has.
    #[error(
        "--target-bpw {target} is out of reach: the tensors to be quantized can take from {:.2} to below {:.2} bits per weight, everything stored counted", reachable[0], reachable[1]
    )]
    Target {
        /// As asked.
        target: f64,
        /// Fewest, and what keeping everything takes.
        reachable: [f64; 2],
    },
    /// Blocks of an interrupted run with other inputs.
    #[error("{}: holds the finished blocks of an interrupted run whose {changed} differ; repeat that run as it was, or remove the folder to start anew", folder.display())]
    Resume {
        /// The folder with the blocks.
        folder: PathBuf,
        /// What differs.
        changed: String,
    },
    /// A limit of a validation that cannot be read, or is about something that is not measured.
    #[error("{origin}: {reason}")]
    Limit {
        /// The flag, or file and line.
        origin: String,
        /// What is wrong and what is expected.
        reason: String,
    },
    /// A question that this kind of model cannot be asked.
    #[error("{model}: cannot {what}")]
    Unable {
        /// The model.
        model: String,
        /// What was asked, and why it cannot be done.
        what: String,
    },
    /// A server that cannot be asked.
    #[error("{url}: {reason}")]
    Endpoint {
        /// As given.
        url: String,
        /// What is wrong and what to do.
        reason: String,
    },
    /// A question that does not fit the model.
    #[error("{reason}")]
    Question {
        /// Why.
        reason: String,
    },
    /// A cache scale without the magnitudes it is made of.
    #[error(
        "{tensor}: the keys and values of layer {layer} were not observed during calibration, or have another width; measure again with `qtool calibrate`"
    )]
    UnseenCache {
        /// The scale.
        tensor: String,
        /// The layer.
        layer: usize,
    },
    /// The worker threads could not be started.
    #[error("cannot start {threads} threads: {reason}")]
    Threads {
        /// As asked.
        threads: usize,
        /// The system's reason.
        reason: String,
    },
    /// Stopped by ctrl-C in a sequential run.
    #[error("interrupted; finished blocks are kept in {}, the same command goes on after them (remove the folder to start anew)", folder.display())]
    Paused {
        /// The folder with the blocks.
        folder: PathBuf,
    },
    /// A task that does not exist, or is asked for in a way it does not have.
    #[error("task {task}: {reason}")]
    Task {
        /// Its name, as given.
        task: String,
        /// What is wrong and what there is.
        reason: String,
    },
    /// A prompt template that cannot be used.
    #[error("prompt {name}: {reason}")]
    Prompt {
        /// Its file, or the name of a built-in one.
        name: String,
        /// What is wrong.
        reason: String,
    },
    /// A model that cannot be asked what a task asks.
    #[error("{model}: {reason}")]
    Unsuited {
        /// Folder or address.
        model: String,
        /// What it lacks and what to do.
        reason: String,
    },
    /// Models whose numbers cannot stand beside each other.
    #[error("{candidate} cannot be compared with {base}: {reason}")]
    Incomparable {
        /// The base.
        base: String,
        /// The other.
        candidate: String,
        /// Expected and got.
        reason: String,
    },
    /// An artifact that is not what its manifest says.
    #[error("{}: does not verify: {first}{}; make it anew, see `qtool verify` for all, or pass --unverified", path.display(), more(*findings))]
    Unsound {
        /// The artifact.
        path: PathBuf,
        /// The first finding.
        first: String,
        /// How many there are.
        findings: usize,
    },
    /// A folder of answers that cannot be gone on with.
    #[error("{}: {reason}", folder.display())]
    WorkFolder {
        /// The folder or a file in it.
        folder: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// Stopped by ctrl-C with answers kept.
    #[error("interrupted; {answers} answers are kept in {}, the same command with --resume goes on after them", folder.display())]
    Stopped {
        /// Answers in it.
        answers: usize,
        /// The folder.
        folder: PathBuf,
    },
    /// Stopped by ctrl-C.
    #[error("interrupted; nothing was written")]
    Interrupted,
}

impl Error {
    /// What a method says of a tensor; a device that failed is no fault of the tensor's.
    pub fn of_tensor(path: &std::path::Path, tensor: &str, source: CalibError) -> Self {
        match source {
            CalibError::Device(fault) => Self::Device(fault),
            source => Self::Tensor {
                path: path.to_owned(),
                tensor: tensor.to_owned(),
                source: Box::new(source),
            },
        }
    }
}

fn more(findings: usize) -> String {
    match findings {
        0 | 1 => String::new(),
        _ => format!(" (and {} more findings)", findings - 1),
    }
}

/// Most refusals shown; the rest is counted.
const SHOWN: usize = 20;

fn list(refusals: &[String]) -> String {
    let mut lines: Vec<String> = refusals.iter().take(SHOWN).map(|r| format!("  {r}")).collect();
    if refusals.len() > SHOWN {
        lines.push(format!("  ... and {} more", refusals.len() - SHOWN));
    }
    lines.join("\n")
}
