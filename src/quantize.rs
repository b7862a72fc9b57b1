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

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use qtool_calib::Recipe;
use qtool_calib::measure::BlockFigures;
use qtool_formats::artifact::{MANIFEST_FILE, Manifest, RankIndex};
use qtool_formats::checkpoint::{Checkpoint, Orientation};
use qtool_formats::piece::overlapping;
use qtool_formats::replace::{Staging, check_target, write_file};
use qtool_formats::shard_writer::{ShardWriter, WrittenShards};
use qtool_kernels::Isa;
use rayon::prelude::*;

use crate::block_work::Job;
use crate::blocks::{Block, batches, bundles, cut};
use crate::device::Device;
use crate::informed::{Calibrated, Codes, Workshop};
use crate::plan::{Action, QuantizePlan};
use crate::progress::Progress;
use crate::scan::tensors_with_non_finite;
use crate::survey::survey;
use crate::transform::weights::Weights;
use crate::writing::{Batch, stored_tensors, write};
use crate::{Error, Result, TOOL, interrupt, record};

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
    /// Where the model runs when it is calibrated.
    pub device: Device,
    /// Draw a progress line on a terminal.
    pub show_progress: bool,
    /// What the manifest says of the calibration, if there is one.
    pub calibration: Option<serde_json::Value>,
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
                source: tensor.name.clone(),
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

/// Claims the target. Fails when it exists, is being written, or could harm the source.
pub fn begin(checkpoint: &Checkpoint, options: &Options) -> Result<Staging> {
    refuse_overlap(checkpoint, options)?;
    Ok(Staging::begin(&options.target, options.force)?)
}

/// Quantizes `checkpoint` by `plan` into `options.target`, from the weights alone, and returns the manifest
/// written there.
pub fn run(checkpoint: &Checkpoint, plan: &QuantizePlan, options: &Options) -> Result<Manifest> {
    let mut manifests = run_ranks(checkpoint, std::slice::from_ref(plan), options)?;
    Ok(manifests.swap_remove(0))
}

/// As [`run`] for the plan of each rank, see [`write_folders`].
pub fn run_ranks(
    checkpoint: &Checkpoint,
    plans: &[QuantizePlan],
    options: &Options,
) -> Result<Vec<Manifest>> {
    let staging = begin(checkpoint, options)?;
    write_folders(checkpoint, plans, options, Codes::Plain, staging)
}

/// Quantizes by one plan into the target that [`begin`] claimed; by several, every rank's share into a folder
/// of its own there, with an index of them beside. The manifests are those of the ranks.
pub fn write_folders(
    checkpoint: &Checkpoint,
    plans: &[QuantizePlan],
    options: &Options,
    codes: Codes<'_>,
    staging: Staging,
) -> Result<Vec<Manifest>> {
    let bytes = plans.iter().map(QuantizePlan::source_bytes).sum();
    let progress = Progress::new(options.show_progress, "quantizing", bytes);
    let manifests = match plans {
        [plan] => fill(checkpoint, plan, options, (codes, 0), staging.folder(), &progress).map(|m| vec![m]),
        plans => fill_ranks(checkpoint, plans, options, codes, &staging, &progress),
    };
    progress.clear();
    let manifests = manifests?;
    interrupt::check()?;
    staging.commit()?;
    Ok(manifests)
}

fn fill_ranks(
    checkpoint: &Checkpoint,
    plans: &[QuantizePlan],
    options: &Options,
    codes: Codes<'_>,
    staging: &Staging,
    progress: &Progress,
) -> Result<Vec<Manifest>> {
    let index = RankIndex::new(TOOL, plans.len());
    let fill_rank = |(rank, (name, plan)): (usize, (&String, &QuantizePlan))| {
        let folder = staging.subfolder(name)?;
        fill(checkpoint, plan, options, (codes, rank), &folder, progress)
    };
    let ranks = index.ranks.iter().zip(plans).enumerate();
    let manifests = ranks.map(fill_rank).collect::<Result<Vec<_>>>()?;
    staging.write_file(MANIFEST_FILE, index.to_json().as_bytes())?;
    Ok(manifests)
}

/// Writes a whole artifact into an empty folder.
fn fill(
    checkpoint: &Checkpoint,
    plan: &QuantizePlan,
    options: &Options,
    codes: (Codes<'_>, usize),
    folder: &Path,
    progress: &Progress,
) -> Result<Manifest> {
    let (stored, first_part) = stored_tensors(plan);
    let writer = ShardWriter::create(folder, stored, options.max_shard_bytes)?;
    let outcome = with_threads(options.threads, || {
        let job = Job {
            checkpoint,
            plan,
            non_finite: options.non_finite,
            isa: Isa::best(),
        };
        stream(&job, codes, writer, &first_part, progress)
    });
    let (written, results) = outcome?;
    let manifest = record::manifest(checkpoint, plan, options, &written, &first_part, &results, folder)?;
    write_file(folder, MANIFEST_FILE, manifest.to_json().as_bytes())?;
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

/// What is known when all blocks are done.
#[derive(Default)]
pub(crate) struct Results {
    /// Sums of each tensor of the plan.
    pub(crate) figures: Vec<BlockFigures>,
    /// What calibration adds to each.
    pub(crate) calibrated: Vec<Calibrated>,
    /// Digests of the source tensors that were not copied, by name.
    pub(crate) sources: HashMap<String, blake3::Hasher>,
}

/// Computed batches that may wait for the writer: kept tensors are written more slowly than they are read, and the
/// processors have the next tensors to work at meanwhile.
const AHEAD: usize = 6;

fn stream(
    job: &Job<'_>,
    codes: (Codes<'_>, usize),
    writer: ShardWriter,
    first_part: &[usize],
    progress: &Progress,
) -> Result<(WrittenShards, Results)> {
    let blocks = cut(job.plan);
    let batches = batches(&blocks);
    let mut results = Results::default();
    results
        .figures
        .resize_with(job.plan.tensors.len(), BlockFigures::default);
    results
        .calibrated
        .resize_with(job.plan.tensors.len(), Calibrated::default);
    std::thread::scope(|scope| {
        let (send, receive) = sync_channel::<Batch>(AHEAD);
        let writing = scope.spawn(move || write(job.checkpoint, job.plan, writer, first_part, &receive));
        let (ready, read) = sync_channel::<()>(1);
        scope.spawn({
            let (blocks, batches) = (&blocks, &batches);
            move || read_ahead(job, blocks, batches, &ready)
        });
        let computed = compute(
            job,
            codes,
            &blocks,
            &batches,
            &mut results,
            &read,
            &send,
            progress,
        );
        drop((send, read));
        let written = writing
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        // What stopped the computation left the writer's tensors unfinished: its reason comes first.
        computed?;
        Ok((written?, results))
    })
}

/// Brings batch after batch into memory, at most two ahead of the computation.
fn read_ahead(job: &Job<'_>, blocks: &[Block], batches: &[std::ops::Range<usize>], ready: &SyncSender<()>) {
    for batch in batches {
        let mut wanted: Vec<(&str, std::ops::Range<usize>)> = Vec::new();
        for block in &blocks[batch.clone()] {
            for (name, bytes) in job.plan.tensors[block.tensor].source_bytes_of(&block.range) {
                match wanted.last_mut() {
                    Some((last, range)) if *last == name && range.end >= bytes.start => {
                        range.end = range.end.max(bytes.end);
                    }
                    _ => wanted.push((name, bytes)),
                }
            }
        }
        wanted
            .into_iter()
            .for_each(|(name, bytes)| job.checkpoint.read_ahead(name, bytes));
        if ready.send(()).is_err() {
            return;
        }
    }
}

#[expect(
    clippy::too_many_arguments,
    reason = "one caller; a struct of them would be made to be taken apart"
)]
fn compute(
    job: &Job<'_>,
    codes: (Codes<'_>, usize),
    blocks: &[Block],
    batches: &[std::ops::Range<usize>],
    results: &mut Results,
    read: &Receiver<()>,
    send: &SyncSender<Batch>,
    progress: &Progress,
) -> Result<()> {
    let mut workshop = Workshop::new(codes.0, codes.1);
    let mut weights = Weights::new(job.checkpoint, job.plan.transform.as_deref());
    for batch in batches {
        interrupt::check()?;
        job.checkpoint.check_unchanged()?;
        // The batch is in memory, or the reader gave up and the pages come when they are touched.
        let _ = read.recv();
        let batch = &blocks[batch.clone()];
        weights.turn_to(batch.iter().flat_map(|b| job.plan.tensors[b.tensor].made_of()))?;
        let ready = workshop.turn_to(job.plan, batch.iter().map(|b| b.tensor), &|tensor, q| {
            survey(job.isa, &weights, tensor, q, |error| {
                job.fault(tensor, q, 0, error)
            })
        })?;
        let (outputs, hashed) = rayon::join(
            || {
                let ready = |tensor: &usize| ready.get(tensor).map(AsRef::as_ref);
                let together = bundles(batch, |tensor| job.rows_together(tensor, ready(&tensor)));
                let done = together.into_par_iter().map(|bundle| {
                    let blocks = &batch[bundle];
                    job.blocks(blocks, &weights, ready(&blocks[0].tensor))
                });
                done.collect::<Result<Vec<_>>>()
            },
            || hash_sources(job, batch, &mut results.sources),
        );
        hashed?;
        let mut sent: Batch = Vec::with_capacity(batch.len());
        for (block, (output, figures)) in batch.iter().zip(outputs?.into_iter().flatten()) {
            if let Some((figures, proxy)) = figures {
                results.figures[block.tensor].merge(&figures);
                if let Some(ready) = ready.get(&block.tensor) {
                    results.calibrated[block.tensor].note(ready, proxy);
                }
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

/// Feeds source tensors to their hashers: rows as they are used where whole tensors are read row by
/// row, all at once where they are not. (A copied tensor's digest is the one it is written with.)
fn hash_sources(job: &Job<'_>, batch: &[Block], sources: &mut HashMap<String, blake3::Hasher>) -> Result<()> {
    let made = job.plan.transform.as_ref().and_then(|t| t.made());
    for block in batch {
        // A head that was the embedding: the embedding's own rows are hashed already.
        if made.is_some_and(|made| made.name == job.plan.tensors[block.tensor].name) {
            continue;
        }
        let pieces = match &job.plan.tensors[block.tensor].action {
            Action::Keep { .. } | Action::Measure(_) => continue,
            Action::Convert(c) => &c.pieces,
            Action::Quantize(q) => &q.pieces,
        };
        for (piece, rows) in overlapping(pieces, block.range.clone()) {
            let view = job.checkpoint.tensor(&piece.tensor)?;
            let hasher = sources.entry(piece.tensor.clone()).or_default();
            if piece.is_whole() && piece.orientation == Orientation::OutIn {
                hasher.update(view.row_bytes(rows));
            } else if hasher.count() == 0 {
                hasher.update(view.bytes());
            }
        }
    }
    Ok(())
}
