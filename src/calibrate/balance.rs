//! Pipeline page: scales of input channels for a plan, chosen from statistics of the original model, and the plan of
//! the model they are folded into.
//!
//! For every norm the scales of what reads it; for every attention those of its values; for every MLP those of what
//! lies between up and down projection. Weights that stay unquantized are scaled with the others and not priced.
//! Memory: the statistics of the readers of one norm, and [`SAMPLED`] rows of each of them.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use qtool_calib::awq::{self, Reader, Scales};
use qtool_calib::{Evidence, LayerStats};
use qtool_formats::FormatError;
use qtool_formats::artifact::transform::TransformRecord;
use qtool_formats::checkpoint::Checkpoint;
use qtool_kernels::Isa;

use super::coverage::{EvidenceSource, Stored};
use super::measure;
use super::pipeline::{Calibration, open_statistics};
use super::statistics::Statistics;
use crate::plan::{Action, Quantization, QuantizePlan};
use crate::progress::Progress;
use crate::quantize::{self, Options};
use crate::source::Source;
use crate::transform::Transform;
use crate::transform::evidence::TransformedEvidence;
use crate::transform::layout::Layout;
use crate::transform::scales::{ChannelScales, channel_of};
use crate::transform::weights::Weights;
use crate::{Result, interrupt};

/// Rows of a weight that are priced, at most, spread evenly.
pub const SAMPLED: usize = 128;

/// A plan with scales folded in, and how its calibration goes on.
pub struct Balanced {
    /// The plan.
    pub plan: QuantizePlan,
    /// As given; in one pass it goes on with the statistics measured here.
    pub calibration: Calibration,
    /// Keeps those statistics.
    pub scratch: Option<tempfile::TempDir>,
}

/// Chooses scales for `plan` and folds them in.
///
/// Statistics come from the calibration's folder, or are measured on the original model, in one pass also when the
/// codes will be chosen block by block: scales must be known before the first of them.
pub fn run(
    checkpoint: &Arc<Checkpoint>,
    plan: QuantizePlan,
    options: &Options,
    calibration: Calibration,
    min_coverage: u64,
) -> Result<Balanced> {
    let mut scratch = None;
    let (statistics, calibration) = match calibration {
        Calibration::Statistics(folder) => (
            open_statistics(checkpoint, &folder, Evidence::Diagonal, options.threads)?,
            Calibration::Statistics(folder),
        ),
        Calibration::OnePass(corpus) => {
            let (folder, kept) = measured(checkpoint, &corpus, options)?;
            scratch = Some(kept);
            (Statistics::open(&folder)?, Calibration::Statistics(folder))
        }
        Calibration::Sequential(corpus) => {
            let (folder, kept) = measured(checkpoint, &corpus, options)?;
            scratch = Some(kept);
            (Statistics::open(&folder)?, Calibration::Sequential(corpus))
        }
    };
    let stored = Stored::new(statistics, min_coverage);
    let plan = quantize::with_threads(options.threads, || balanced(checkpoint, plan, options, &stored))?;
    Ok(Balanced {
        plan,
        calibration,
        scratch,
    })
}

/// A folder of statistics beside the target.
fn measured(
    checkpoint: &Arc<Checkpoint>,
    corpus: &super::corpus::Corpus,
    options: &Options,
) -> Result<(std::path::PathBuf, tempfile::TempDir)> {
    let beside = options.target.parent().filter(|p| !p.as_os_str().is_empty());
    let beside = beside.unwrap_or(Path::new("."));
    let scratch = tempfile::Builder::new()
        .prefix(".qtool-statistics-")
        .tempdir_in(beside)
        .map_err(FormatError::io(beside, "make a scratch folder in"))?;
    let target = scratch.path().join("statistics");
    let wanted = measure::Options {
        target: target.clone(),
        force: false,
        evidence: Evidence::Full,
        slices: None,
        threads: options.threads,
        device: options.device.clone(),
        show_progress: options.show_progress,
    };
    measure::run(checkpoint, corpus, &wanted)?;
    Ok((target, scratch))
}

fn balanced(
    checkpoint: &Arc<Checkpoint>,
    plan: QuantizePlan,
    options: &Options,
    stored: &dyn EvidenceSource,
) -> Result<QuantizePlan> {
    let source = Source::of_checkpoint(Arc::clone(checkpoint))?;
    let layout = Layout::of(&source)?;
    let before = plan.transform.clone();
    let seen = before.as_deref().map(|t| TransformedEvidence::new(stored, t));
    let evidence: &dyn EvidenceSource = match &seen {
        Some(seen) => seen,
        None => stored,
    };
    let groups = layout.norms.len() + layout.values.len() + layout.mlps.len();
    let progress = Progress::new(options.show_progress, "scaling", groups as u64);
    let mut search = Search {
        plan: &plan,
        evidence,
        weights: Weights::new(checkpoint, before.as_deref()),
    };
    let mut scales = BTreeMap::new();
    let mut note = |key: &str, found: Option<Scales>| {
        progress.add(1);
        if let Some(found) = found.filter(|found| found.alpha > 0.0) {
            scales.insert(key.to_owned(), found.scales);
        }
    };
    for norm in &layout.norms {
        let channels: Vec<usize> = (0..layout.hidden).collect();
        note(&norm.gain, search.group(&norm.readers, &channels, layout.hidden)?);
    }
    for pair in layout.values.iter().chain(&layout.mlps) {
        let readers = std::slice::from_ref(&pair.reader);
        note(
            &pair.reader,
            search.group(readers, &channel_of(pair), pair.rows.len())?,
        );
    }
    progress.clear();
    let rotated = before.as_ref().is_some_and(|t| t.record().rotation.is_some());
    let scales = ChannelScales(scales).fitted(checkpoint, &layout, rotated)?;
    let record = TransformRecord {
        rotation: before.as_ref().and_then(|t| t.record().rotation.clone()),
        scales: Some(ChannelScales::record()),
    };
    let transform = Transform::new(&source, record, Some(scales))?;
    plan.transformed(checkpoint, &options.recipe, Arc::new(transform))
}

struct Search<'a> {
    plan: &'a QuantizePlan,
    evidence: &'a dyn EvidenceSource,
    weights: Weights<'a>,
}

impl Search<'_> {
    /// Scales for the weights of these names, as far as they are quantized and something is known of their input.
    fn group(&mut self, names: &[String], channel_of: &[usize], channels: usize) -> Result<Option<Scales>> {
        interrupt::check()?;
        let mut found: Vec<(&Quantization, Arc<LayerStats>, Vec<f32>, f64)> = Vec::new();
        for name in names {
            let tensor = self.plan.tensors.iter().find(|t| t.name == *name);
            let Some(Action::Quantize(q)) = tensor.map(|t| &t.action) else {
                continue;
            };
            let Some(evidence) = self.evidence.evidence(name)? else {
                continue;
            };
            self.weights
                .turn_to(q.pieces.iter().map(|piece| (name.as_str(), piece)))?;
            let step = q.n.div_ceil(SAMPLED).max(1);
            let (mut rows, mut row) = (Vec::new(), Vec::new());
            for n in (0..q.n).step_by(step) {
                self.weights
                    .rows(Isa::best(), name, &q.pieces, n..n + 1, &mut row)?;
                rows.extend_from_slice(&row);
            }
            let stands_for = q.n as f64 / (rows.len() / q.k.max(1)).max(1) as f64;
            found.push((q.as_ref(), evidence.stats, rows, stands_for));
        }
        if found.is_empty() {
            return Ok(None);
        }
        let readers: Vec<Reader<'_>> = found
            .iter()
            .map(|(q, stats, rows, weight)| Reader {
                quantizer: q.quantizer.as_ref(),
                stats,
                rows,
                weight: *weight,
            })
            .collect();
        let scales = awq::search(Isa::best(), &readers, channel_of, channels).map_err(|source| {
            crate::Error::Tensor {
                path: "calibration".into(),
                tensor: names.first().cloned().unwrap_or_default(),
                source: Box::new(source),
            }
        })?;
        Ok(Some(scales))
    }
}
