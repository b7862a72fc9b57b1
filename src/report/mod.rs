//! What a validation found, as plain data: every renderer (`text`, `json`, `markdown`, `html`) reads this and computes
//! nothing; every number here was computed by a task or by `src/statistics`.
//!
//! Models are always in one order, the base first; vectors "one a model" follow it.

#[cfg(test)]
mod example;
pub mod html;
pub mod json;
pub mod markdown;
pub mod text;
pub mod words;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Version of this layout, for programs that read `--json`.
pub const REPORT_VERSION: u32 = 1;

/// See the module's text.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// [`REPORT_VERSION`].
    pub report_version: u32,
    /// Name and version of the program.
    pub tool: String,
    /// The base, then the candidates.
    pub models: Vec<ModelEntry>,
    /// One for each task that was run.
    pub tasks: Vec<TaskReport>,
    /// Limits and whether they hold; none when no limit was given.
    pub verdict: Option<Verdict>,
    /// Where and how it was run.
    pub run: Run,
}

/// One of the models.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelEntry {
    /// Heading of its column: `BASE`, `INT8`, `INT4`, `INT2`, or the folder's name where two would be equal.
    pub label: String,
    /// Folder or address.
    pub path: String,
    /// What it is: `checkpoint BF16`, `artifact int4-g64-sym-bf16`, `served ernie` ...
    pub kind: String,
    /// Bytes of its tensors, where known.
    pub bytes: Option<u64>,
    /// Bits per weight over all tensors, where known.
    pub bits_per_weight: Option<f64>,
    /// Digest of its manifest (artifacts) or of its files' headers and sizes (checkpoints).
    pub digest: Option<String>,
    /// Digest of its tokenizer.
    pub tokenizer_digest: Option<String>,
    /// Quality figures of its quantized tensors, in model order.
    pub tensors: Vec<TensorFigure>,
}

/// How well one quantized tensor was kept.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TensorFigure {
    /// Its name.
    pub name: String,
    /// Its scheme.
    pub scheme: String,
    /// Signal to quantization noise, in dB.
    pub sqnr_db: Option<f64>,
    /// Bits per weight, everything counted.
    pub bits_per_weight: f64,
}

/// What one task found.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct TaskReport {
    /// Its name in the registry.
    pub task: String,
    /// Version of its arithmetic: raised when the same answers would give another score.
    pub version: u32,
    /// Files of the data: path, digest, items.
    pub data: Vec<DataFile>,
    /// How the model was asked: prompt digest, shots, `--ask`, normalisation, seed ...
    pub settings: BTreeMap<String, Value>,
    /// Rows of the table, the most important first.
    pub metrics: Vec<Metric>,
    /// Tables beside it, one a model: confusion matrices, per-class figures.
    pub tables: Vec<DetailTable>,
    /// Curves, one a model where it makes sense: the distribution of KL over tokens ...
    pub histograms: Vec<Histogram>,
    /// Items without an answer, truncated texts, unparsable replies ...: what, and how many for each model.
    pub counts: BTreeMap<String, Vec<u64>>,
    /// Sentences a reader must see.
    pub warnings: Vec<String>,
    /// One a model.
    pub speed: Vec<Speed>,
    /// Predictions of every item, when asked for: one object an item.
    pub items: Option<Vec<Value>>,
}

/// A file of data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DataFile {
    /// As it was given.
    pub path: String,
    /// BLAKE3 of its bytes.
    pub digest: String,
    /// Items read from it.
    pub items: usize,
}

/// What a number is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    /// A share of 0 to 1, shown in percent; its differences in percentage points.
    Share,
    /// Nats a token.
    NatsPerToken,
    /// Bits a byte of text.
    BitsPerByte,
    /// exp of nats a token; its differences are ratios, candidate over base, 1 where they are equal.
    Perplexity,
    /// A plain number.
    Number,
}

/// One row of a table: a number for each model, with its uncertainty.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Metric {
    /// `macro average`, a kind such as `OPPO`, a class, or `all`.
    pub group: String,
    /// `accuracy`, `F1`, `KL to base` ...
    pub name: String,
    /// What the values are.
    pub unit: Unit,
    /// Whether more is better; `None` when neither is.
    pub higher_is_better: Option<bool>,
    /// Items it is computed from.
    pub items: usize,
    /// What an answer without looking gives: (`majority`, 0.53), (`coin flip`, 0.5).
    pub baselines: Vec<(String, f64)>,
    /// Smallest true difference that this many items find in 8 of 10 runs at the 5 % level (a ratio for
    /// [`Unit::Perplexity`]).
    pub detectable: Option<f64>,
    /// One a model; `None` where a model has no such value.
    pub values: Vec<Option<Interval>>,
    /// One a model: candidate minus base, or over it for [`Unit::Perplexity`]; `None` for the base and where there
    /// is none.
    pub deltas: Vec<Option<Delta>>,
    /// Index of the best model, only where it is significantly better than every other.
    pub best: Option<usize>,
    /// One a model: items without an answer, which its value and every pair with it leave out.
    #[serde(default)]
    pub missing: Vec<u64>,
}

/// A value and where the true one lies with 95 % confidence.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// The estimate.
    pub value: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// A difference of two models on the same items.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Delta {
    /// Candidate minus base (over base for [`Unit::Perplexity`]), with its 95 % interval from the paired items.
    pub interval: Interval,
    /// p of no difference, where there is a test: exact McNemar where items are right or wrong, sign flips else.
    pub p: Option<f64>,
    /// The same after Holm's correction over the rows it was tested together with.
    pub p_holm: Option<f64>,
    /// Whether it cannot be told from noise: the corrected p is above 0.05, or the interval holds 0.
    pub noise: bool,
}

/// A table of numbers with names on both sides.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DetailTable {
    /// `confusion`, `per class` ...
    pub name: String,
    /// Index of the model.
    pub model: usize,
    /// Names of the columns.
    pub columns: Vec<String>,
    /// Name and numbers of each row; NaN-free: what is undefined is `None`.
    pub rows: Vec<(String, Vec<Option<f64>>)>,
}

/// Counts over bins.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    /// What is counted.
    pub name: String,
    /// Index of the model.
    pub model: usize,
    /// Edges of the bins, one more than counts; rising.
    pub edges: Vec<f64>,
    /// Items in each bin.
    pub counts: Vec<u64>,
}

/// How fast a model went through a task.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    /// Items answered in this run (items of an earlier, resumed run left out).
    pub items: u64,
    /// Tokens run through the model.
    pub tokens: u64,
    /// Seconds of the clock.
    pub seconds: f64,
}

/// Whether the candidates may be deployed.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    /// The worst of the checks.
    pub outcome: Outcome,
    /// One for each limit and candidate.
    pub checks: Vec<Check>,
}

/// Whether a limit holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It holds, the whole interval within it.
    Passed,
    /// The interval straddles it.
    Inconclusive,
    /// It does not hold, the whole interval beyond it.
    Failed,
}

/// One limit and one candidate.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Check {
    /// As it was given: `max-drop question-matching=1`.
    pub limit: String,
    /// Index of the candidate.
    pub model: usize,
    /// What was found.
    pub outcome: Outcome,
    /// What was measured, in the limit's own unit; `None` where nothing could be.
    pub measured: Option<Interval>,
    /// The limit's number, in the same unit.
    pub bound: f64,
    /// How many more items would decide, where it is inconclusive and can be told.
    pub more_items: Option<u64>,
    /// The sentence a person reads.
    pub reason: String,
}

/// Where and how it was run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Run {
    /// `cpu` with its instruction set, or the name of the accelerator.
    pub device: String,
    /// Why this one, where another was asked for or looked for.
    pub device_reason: Option<String>,
    /// Worker threads.
    pub threads: usize,
    /// Seed of everything drawn.
    pub seed: u64,
    /// Seconds of the clock, in all.
    pub seconds: f64,
    /// When it began, RFC 3339 in UTC.
    pub started: String,
    /// Whether it went on from an earlier, interrupted run.
    pub resumed: bool,
    /// Samples of what the machine did, in order of time.
    pub resources: Vec<ResourceSample>,
}

/// What the machine did at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ResourceSample {
    /// Seconds since the start.
    pub at: f64,
    /// Processor time of this process a second, in percent of one core.
    pub cpu_percent: f64,
    /// Resident memory of this process.
    pub memory_bytes: u64,
    /// Load of the accelerator, where there is one.
    pub gpu_percent: Option<f64>,
    /// Its memory in use.
    pub gpu_memory_bytes: Option<u64>,
}
