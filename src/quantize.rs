//! Pipeline page: a checkpoint becomes an artifact.
//!
//! ```text
//! plan -> blocks -> batches:  [ quantize blocks in parallel | hash the source ] -> writer thread: hash, write
//! ```
//!
//! While one batch is computed, the one before it is written and the one after it is being read
//! ahead by the system. Memory holds at most three batches of output and one block per thread,
//! whatever the size of the model. Blocks, batches and all sums depend on shapes alone, so the
//! artifact has the same bytes for any number of threads.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use qtool_calib::measure::{BlockFigures, measure};
use qtool_calib::{CalibError, Recipe};
use qtool_formats::TensorView;
use qtool_formats::artifact::{MANIFEST_FILE, Manifest};
use qtool_formats::checkpoint::{Checkpoint, Orientation};
use qtool_formats::replace::{Staging, check_target};
use qtool_formats::shard_writer::{ShardWriter, StoredTensor, WrittenShards};
use qtool_kernels::{Isa, pack_crumbs, pack_nibbles};
use rayon::prelude::*;

use crate::blocks::{Block, batches, cut, read_rows};
use crate::plan::{Action, Quantization, QuantizePlan, TensorPlan};
use crate::progress::Progress;
use crate::scan::{first_bad, tensors_with_non_finite, unravel};
use crate::{Error, Result, interrupt, record};

/// What to do with a source tensor that holds NaN or infinity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NonFinite {
    /// Stop with the tensor's name and the element's index.
    Refuse,
    /// Copy such tensors as they are.
    Keep,
}

/// Everything `quantize` needs to know.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where the artifact goes.
    pub target: PathBuf,
    /// Replace a former artifact.
    pub force: bool,
    /// Which tensors get what.
    pub recipe: Recipe,
    /// See [`NonFinite`].
    pub non_finite: NonFinite,
    /// Most bytes of tensor data in one file.
    pub max_shard_bytes: u64,
    /// Worker threads; 0 means one per core.
    pub threads: usize,
    /// Draw a progress line on a terminal.
    pub show_progress: bool,
}

/// Opens nothing and writes nothing: the plan for a checkpoint. With [`NonFinite::Keep`] it reads
/// every float tensor once to see which must be kept.
pub fn plan(checkpoint: &Checkpoint, options: &Options) -> Result<QuantizePlan> {
    let mut plan = QuantizePlan::new(checkpoint, &options.recipe)?;
    if options.non_finite == NonFinite::Keep {
        let bad: BTreeSet<String> = tensors_with_non_finite(Isa::best(), checkpoint)?;
        for tensor in plan.tensors.iter_mut().filter(|t| bad.contains(&t.name)) {
            tensor.action = Action::Keep {
                reason: "holds NaN or infinity".to_owned(),
            };
        }
    }
    Ok(plan)
}

/// Runs `work` on a pool of its own with `threads` threads (0: one per core).
pub fn with_threads<T: Send>(threads: usize, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    pool.map_err(|e| Error::Threads {
        threads,
        reason: e.to_string(),
    })?
    .install(work)
}

/// Quantizes `checkpoint` by `plan` into `options.target` and returns the manifest written there.
pub fn run(checkpoint: &Checkpoint, plan: &QuantizePlan, options: &Options) -> Result<Manifest> {
    refuse_overlap(checkpoint, options)?;
    let staging = Staging::begin(&options.target, options.force)?;
    let (stored, first_part) = stored_tensors(plan);
    let writer = ShardWriter::create(staging.folder(), stored, options.max_shard_bytes)?;
    let progress = Progress::new(options.show_progress, "quantizing", plan.source_bytes());
    let outcome = with_threads(options.threads, || {
        let job = Job {
            checkpoint,
            plan,
            non_finite: options.non_finite,
            isa: Isa::best(),
        };
        stream(&job, writer, &first_part, &progress)
    });
    progress.clear();
    let (written, results) = outcome?;
    let manifest = record::manifest(
        checkpoint,
        plan,
        options,
        &written,
        &first_part,
        results,
        &staging,
    )?;
    staging.write_file(MANIFEST_FILE, manifest.to_json().as_bytes())?;
    interrupt::check()?;
    staging.commit()?;
    Ok(manifest)
}

/// Fails when writing the target could harm the source.
fn refuse_overlap(checkpoint: &Checkpoint, options: &Options) -> Result<()> {
    check_target(&options.target, options.force)?;
    let (Ok(source), Ok(target)) = (checkpoint.folder().canonicalize(), options.target.canonicalize()) else {
        return Ok(());
    };
    if source.starts_with(&target) {
        let reason = "the output folder is, or holds, the model's own folder; choose another one".to_owned();
        return Err(Error::Source {
            path: options.target.clone(),
            reason,
        });
    }
    Ok(())
}

/// The stored tensors of the artifact, and for each tensor of the plan the index of its first one.
fn stored_tensors(plan: &QuantizePlan) -> (Vec<StoredTensor>, Vec<usize>) {
    let mut stored = Vec::new();
    let mut first = Vec::new();
    for (group, tensor) in plan.tensors.iter().enumerate() {
        first.push(stored.len());
        match &tensor.action {
            Action::Keep { .. } => stored.push(StoredTensor {
                name: tensor.name.clone(),
                dtype: tensor.dtype,
                shape: tensor.shape.clone(),
                bytes: tensor.source_bytes,
                group,
            }),
            Action::Quantize(q) => stored.extend(q.parts.iter().map(|part| StoredTensor {
                name: format!("{}.{}", tensor.name, part.role.suffix()),
                dtype: part.dtype,
                shape: part.shape.to_vec(),
                bytes: part.bytes() as u64,
                group,
            })),
        }
    }
    (stored, first)
}

/// What every block needs.
struct Job<'a> {
    checkpoint: &'a Checkpoint,
    plan: &'a QuantizePlan,
    non_finite: NonFinite,
    isa: Isa,
}

/// A computed block on its way to the writer.
enum Output {
    Kept,
    Parts(Vec<Vec<u8>>),
}

/// What is known of a tensor when all its blocks are done.
#[derive(Default)]
pub(crate) struct TensorResult {
    pub(crate) figures: BlockFigures,
    pub(crate) source: blake3::Hasher,
}

/// A batch of computed blocks, in order.
type Batch = Vec<(Block, Output)>;

fn stream(
    job: &Job<'_>,
    writer: ShardWriter,
    first_part: &[usize],
    progress: &Progress,
) -> Result<(WrittenShards, Vec<TensorResult>)> {
    let blocks = cut(job.plan);
    let batches = batches(&blocks);
    let mut results: Vec<TensorResult> = job.plan.tensors.iter().map(|_| TensorResult::default()).collect();
    std::thread::scope(|scope| {
        let (send, receive) = sync_channel::<Batch>(1);
        let writing = scope.spawn(move || write(job, writer, first_part, &receive));
        let computed = compute(job, &blocks, &batches, &mut results, &send, progress);
        drop(send);
        let written = writing
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        // What stopped the computation left the writer's tensors unfinished: its reason comes first.
        computed?;
        Ok((written?, results))
    })
}

fn compute(
    job: &Job<'_>,
    blocks: &[Block],
    batches: &[std::ops::Range<usize>],
    results: &mut [TensorResult],
    send: &SyncSender<Batch>,
    progress: &Progress,
) -> Result<()> {
    for (i, batch) in batches.iter().enumerate() {
        interrupt::check()?;
        job.checkpoint.check_unchanged()?;
        if let Some(next) = batches.get(i + 1) {
            let mut ahead: Vec<usize> = blocks[next.clone()].iter().map(|b| b.tensor).collect();
            ahead.dedup();
            ahead
                .iter()
                .for_each(|&t| job.checkpoint.will_need(&job.plan.tensors[t].name));
        }
        let batch = &blocks[batch.clone()];
        let (outputs, hashed) = rayon::join(
            || {
                batch
                    .par_iter()
                    .map(|block| job.block(block))
                    .collect::<Result<Vec<_>>>()
            },
            || hash_source(job, batch, results),
        );
        hashed?;
        let mut sent: Batch = Vec::with_capacity(batch.len());
        for (block, (output, figures)) in batch.iter().zip(outputs?) {
            if let Some(figures) = figures {
                results[block.tensor].figures.merge(&figures);
            }
            sent.push((block.clone(), output));
        }
        progress.add(batch.iter().map(|b| b.source_bytes as u64).sum());
        if send.send(sent).is_err() {
            // The writer failed and will say why.
            return Ok(());
        }
    }
    Ok(())
}

/// Feeds the sources of quantized tensors to their hashers, in order. (A kept tensor's digest is
/// the one it is written with.)
fn hash_source(job: &Job<'_>, batch: &[Block], results: &mut [TensorResult]) -> Result<()> {
    for block in batch {
        let tensor = &job.plan.tensors[block.tensor];
        let Action::Quantize(q) = &tensor.action else {
            continue;
        };
        let view = job.checkpoint.tensor(&tensor.name)?;
        let hasher = &mut results[block.tensor].source;
        match q.orientation {
            Orientation::OutIn => drop(hasher.update(view.row_bytes(block.range.clone()))),
            Orientation::InOut if block.range.start == 0 => drop(hasher.update(view.bytes())),
            Orientation::InOut => {}
        }
    }
    Ok(())
}

impl Job<'_> {
    fn block(&self, block: &Block) -> Result<(Output, Option<BlockFigures>)> {
        let tensor = &self.plan.tensors[block.tensor];
        let view = self.checkpoint.tensor(&tensor.name)?;
        match &tensor.action {
            Action::Keep { .. } => {
                if let Some(dtype) = view.float_dtype()
                    && self.non_finite == NonFinite::Refuse
                    && let Some((at, value)) = first_bad(self.isa, dtype, &view.bytes()[block.range.clone()])
                {
                    let at = unravel(&tensor.shape, block.range.start / dtype.bytes() + at);
                    return Err(self.non_finite(tensor, at, value.to_string()));
                }
                Ok((Output::Kept, None))
            }
            Action::Quantize(q) => {
                let (parts, figures) = self.quantize(tensor, q, &view, block)?;
                Ok((Output::Parts(parts), Some(figures)))
            }
        }
    }

    fn quantize(
        &self,
        tensor: &TensorPlan,
        q: &Quantization,
        view: &TensorView<'_>,
        block: &Block,
    ) -> Result<(Vec<Vec<u8>>, BlockFigures)> {
        thread_local!(static ROWS: std::cell::RefCell<Vec<f32>> = const { std::cell::RefCell::new(Vec::new()) });
        ROWS.with_borrow_mut(|rows| {
            read_rows(self.isa, q, view, block.range.clone(), rows);
            let weight = q
                .quantizer
                .quantize(self.isa, rows, block.range.len(), q.k)
                .map_err(|error| match error {
                    CalibError::NonFinite { row, column, value } => {
                        let row = block.range.start + row;
                        let at = match q.orientation {
                            Orientation::OutIn => unravel(&tensor.shape, row * q.k + column),
                            Orientation::InOut => vec![column, row],
                        };
                        self.non_finite(tensor, at, value)
                    }
                    source => {
                        let path = self.checkpoint.root().to_owned();
                        Error::Tensor {
                            path,
                            tensor: tensor.name.clone(),
                            source: Box::new(source),
                        }
                    }
                })?;
            let mut figures = BlockFigures::default();
            measure(self.isa, rows, &weight, &mut figures);
            let parts = weight.encode(&|bits, k, codes, out| pack(self.isa, bits, k, codes, out))?;
            Ok((parts, figures))
        })
    }

    fn non_finite(&self, tensor: &TensorPlan, index: Vec<usize>, value: String) -> Error {
        Error::NonFinite {
            path: self.checkpoint.root().to_owned(),
            tensor: tensor.name.clone(),
            index,
            value,
        }
    }
}

/// `lsb-rows` by the kernels where rows end on whole bytes, else by the layout's own loop.
fn pack(isa: Isa, bits: u8, k: usize, codes: &[u8], out: &mut Vec<u8>) -> qtool_formats::Result<()> {
    use qtool_formats::packing::{LSB_ROWS, Packing};
    let from = out.len();
    match bits {
        4 if k.is_multiple_of(2) => {
            out.resize(from + codes.len() / 2, 0);
            pack_nibbles(isa, codes, &mut out[from..]);
        }
        2 if k.is_multiple_of(4) => {
            out.resize(from + codes.len() / 4, 0);
            pack_crumbs(isa, codes, &mut out[from..]);
        }
        _ => LSB_ROWS.pack(bits, k, codes, out)?,
    }
    Ok(())
}

fn write(
    job: &Job<'_>,
    mut writer: ShardWriter,
    first_part: &[usize],
    receive: &Receiver<Batch>,
) -> Result<WrittenShards> {
    for batch in receive {
        for (block, output) in batch {
            let first = first_part[block.tensor];
            match output {
                Output::Kept => {
                    let view = job.checkpoint.tensor(&job.plan.tensors[block.tensor].name)?;
                    writer.append(first, &view.bytes()[block.range])?;
                }
                Output::Parts(parts) => {
                    for (i, bytes) in parts.iter().enumerate() {
                        writer.append(first + i, bytes)?;
                    }
                }
            }
        }
    }
    interrupt::check()?;
    Ok(writer.finish()?)
}
