//! Pipeline page: a model and a text become a folder of statistics, in one pass over the original model.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use qtool_calib::Evidence;
use qtool_formats::checkpoint::Checkpoint;
use qtool_kernels::Backend;
use rayon::prelude::*;

use super::corpus::{Corpus, SLICES};
use super::statistics::{FORMAT, Index, StatisticsWriter, VERSION};
use super::walk::{Seen, Walk};
use crate::device::Device;
use crate::model::stack::Stack;
use crate::progress::Progress;
use crate::source::Source;
use crate::{Error, Result, TOOL, quantize};

/// What is to be measured.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where the statistics go.
    pub target: PathBuf,
    /// Replace a former folder.
    pub force: bool,
    /// Whole second moments, or diagonals.
    pub evidence: Evidence,
    /// Slices of the corpus, for a part; `None` for all.
    pub slices: Option<std::ops::Range<usize>>,
    /// Worker threads; 0 means one per core.
    pub threads: usize,
    /// Where the model runs.
    pub device: Device,
    /// Draw a progress line on a terminal.
    pub show_progress: bool,
}

/// Digest of a checkpoint's tensors: names, types, shapes and bytes, in the order of their names.
pub fn digest(checkpoint: &Checkpoint) -> Result<String> {
    let mut names: Vec<&str> = checkpoint.names().collect();
    names.sort_unstable();
    let each = names.par_iter().map(|name| {
        let view = checkpoint.tensor(name)?;
        let mut hasher = blake3::Hasher::new();
        hasher.update(format!("{name}\0{}\0{:?}\0", view.dtype(), view.shape()).as_bytes());
        hasher.update(view.bytes());
        Ok(hasher.finalize())
    });
    let each = each.collect::<Result<Vec<_>>>()?;
    let mut all = blake3::Hasher::new();
    each.iter().for_each(|hash| {
        all.update(hash.as_bytes());
    });
    Ok(format!("blake3:{}", all.finalize().to_hex()))
}

/// Name of a model's folder.
pub fn model_name(path: &Path) -> String {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    path.file_name()
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// Measures `corpus` on the model of `checkpoint`.
pub fn run(checkpoint: &Arc<Checkpoint>, corpus: &Corpus, options: &Options) -> Result<Index> {
    match &options.device {
        Device::Cpu(backend) => run_on(*backend, checkpoint, corpus, options),
        Device::Cuda(backend) => run_on(backend.clone(), checkpoint, corpus, options),
    }
}

fn run_on<B: Backend>(
    backend: B,
    checkpoint: &Arc<Checkpoint>,
    corpus: &Corpus,
    options: &Options,
) -> Result<Index> {
    quantize::with_threads(options.threads, || {
        let source = Arc::new(Source::of_checkpoint(Arc::clone(checkpoint))?);
        let model = Stack::open(backend, source)?;
        let slices = options.slices.clone().unwrap_or(0..SLICES);
        let part = options.slices.is_some();
        if part && corpus.rows().len() < SLICES {
            return Err(Error::Statistics {
                path: options.target.clone(),
                reason: format!(
                    "a part needs at least {SLICES} rows in all, the text gives {}; give more text, a smaller --length, or leave --shard out",
                    corpus.rows().len()
                ),
            });
        }
        let index = Index {
            format: FORMAT.to_owned(),
            version: VERSION,
            tool: TOOL.to_owned(),
            model: model_name(checkpoint.root()),
            model_digest: digest(checkpoint)?,
            device: Some(options.device.identity()),
            corpus: corpus.description().clone(),
            full: options.evidence == Evidence::Full,
            slices: [slices.start, slices.end],
            part,
            blocks: Vec::new(),
        };
        let mut writer = StatisticsWriter::begin(&options.target, options.force, index)?;
        let blocks = model.layers();
        let tokens = corpus.tokens() * slices.len() / SLICES * blocks;
        let progress = Progress::tokens(options.show_progress, "calibrating", tokens as u64);
        let mut walk = Walk::begin(&model, corpus, slices, writer.scratch(), &progress)?;
        for number in 0..blocks {
            let block = model.layer(number, model.source())?;
            let mut seen = Seen::nothing(part);
            walk.block(&block, Some((options.evidence, &mut seen)), true)?;
            writer.block(&seen.into_parts())?;
        }
        if model.head().is_some() {
            let mut seen = Seen::nothing(part);
            walk.head(options.evidence, &mut seen)?;
            writer.block(&seen.into_parts())?;
        }
        progress.clear();
        writer.finish()
    })
}
