//! Pipeline page: quantization with evidence. Owns which of the three ways is gone: block by block, in one pass,
//! or with statistics measured before.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use qtool_calib::Evidence;
use qtool_formats::artifact::Manifest;
use qtool_formats::checkpoint::Checkpoint;
use serde_json::{Value, json};

use super::corpus::Corpus;
use super::coverage::Stored;
use super::decisions::Decisions;
use super::statistics::Statistics;
use super::{measure, sequential};
use crate::informed::Codes;
use crate::kv_scales;
use crate::plan::QuantizePlan;
use crate::quantize::{self, Options};
use crate::transform::evidence::TransformedEvidence;
use crate::{Error, Result};

/// Where evidence comes from.
pub enum Calibration {
    /// The model runs over these rows; each block sees what the quantized blocks before it give.
    Sequential(Corpus),
    /// The original model runs over these rows once.
    OnePass(Corpus),
    /// A folder made by `qtool calibrate`.
    Statistics(PathBuf),
}

impl Calibration {
    /// What the manifest says of it.
    pub fn describe(&self, min_coverage: u64) -> Result<Value> {
        Ok(match self {
            Self::Sequential(corpus) => {
                json!({"mode": "sequential", "corpus": corpus.description(), "min_coverage": min_coverage})
            }
            Self::OnePass(corpus) => {
                json!({"mode": "one-pass", "corpus": corpus.description(), "min_coverage": min_coverage})
            }
            Self::Statistics(folder) => {
                let statistics = Statistics::open(folder)?;
                let corpus = &statistics.index().corpus;
                json!({"mode": "one-pass", "corpus": corpus, "min_coverage": min_coverage})
            }
        })
    }
}

/// The most that the quantizers of these plans have use for.
pub fn evidence(plans: &[QuantizePlan]) -> Evidence {
    let all = plans.iter().flat_map(QuantizePlan::quantized);
    all.map(|(_, q)| q.quantizer.evidence())
        .max()
        .unwrap_or(Evidence::None)
}

/// Quantizes `checkpoint` by its plans (one per rank) with evidence.
///
/// Fails when statistics are of another model, besides everything [`quantize::write_folders`] fails with.
pub fn run(
    checkpoint: &Arc<Checkpoint>,
    plans: &mut [QuantizePlan],
    options: &Options,
    calibration: &Calibration,
    min_coverage: u64,
) -> Result<Vec<Manifest>> {
    let staging = quantize::begin(checkpoint, options)?;
    let transform = plans.first().and_then(|plan| plan.transform.clone());
    let transform = transform.as_deref();
    let rotated = transform.is_some_and(|t| t.record().rotation.is_some());
    let evidence = match evidence(plans) {
        Evidence::Diagonal if rotated => Evidence::Full,
        wanted => wanted,
    };
    let informed = |plans: &[QuantizePlan], stored: &Stored, staging| {
        let seen = transform.map(|transform| TransformedEvidence::new(stored, transform));
        let codes = match &seen {
            Some(seen) => Codes::Informed(seen),
            None => Codes::Informed(stored),
        };
        quantize::write_folders(checkpoint, plans, options, codes, staging)
    };
    match calibration {
        Calibration::Sequential(corpus) => {
            let wanted = sequential::Options {
                quantize: options,
                evidence,
                min_coverage,
            };
            let folder = Decisions::folder_of(&options.target);
            let kept = |error| match error {
                Error::Interrupted if folder.is_dir() => Error::Paused {
                    folder: folder.clone(),
                },
                Error::Device(fault) if folder.is_dir() => Error::DevicePaused {
                    fault,
                    folder: folder.clone(),
                },
                other => other,
            };
            let decisions = sequential::run(checkpoint, plans, corpus, &wanted).map_err(kept)?;
            kv_scales::fill(plans, &|layer| decisions.magnitudes(layer))?;
            let codes = Codes::Decided(&decisions);
            let manifests =
                quantize::write_folders(checkpoint, plans, options, codes, staging).map_err(kept)?;
            decisions.discard();
            Ok(manifests)
        }
        Calibration::OnePass(corpus) => {
            let scratch = tempfile::Builder::new()
                .prefix(".qtool-statistics-")
                .tempdir_in(staging.folder().parent().unwrap_or(Path::new(".")))
                .map_err(qtool_formats::FormatError::io(
                    staging.folder(),
                    "make a scratch folder beside",
                ))?;
            let target = scratch.path().join("statistics");
            let measured = measure::Options {
                target: target.clone(),
                force: false,
                evidence: evidence.max(if rotated {
                    Evidence::Full
                } else {
                    Evidence::Diagonal
                }),
                slices: None,
                threads: options.threads,
                device: options.device.clone(),
                show_progress: options.show_progress,
            };
            measure::run(checkpoint, corpus, &measured)?;
            let stored = Stored::new(Statistics::open(&target)?, min_coverage);
            kv_scales::fill(plans, &|layer| stored.statistics.magnitudes(layer))?;
            informed(plans, &stored, staging)
        }
        Calibration::Statistics(folder) => {
            // Of diagonals every method makes what it can and says so; but a diagonal cannot be rotated.
            let needed = if rotated {
                Evidence::Full
            } else {
                evidence.min(Evidence::Diagonal)
            };
            let statistics = open_statistics(checkpoint, folder, needed, options.threads)?;
            kv_scales::fill(plans, &|layer| statistics.magnitudes(layer))?;
            informed(plans, &Stored::new(statistics, min_coverage), staging)
        }
    }
}

/// Opens a folder of statistics that is to serve `checkpoint`.
///
/// Fails when it is a part, damaged, of another model, or holds less than `evidence`.
pub fn open_statistics(
    checkpoint: &Checkpoint,
    folder: &Path,
    evidence: Evidence,
    threads: usize,
) -> Result<Statistics> {
    let statistics = Statistics::open(folder)?;
    let bad = |reason: String| {
        Err(Error::Statistics {
            path: folder.to_owned(),
            reason,
        })
    };
    if statistics.index().part {
        return bad("is a part; merge all parts with `qtool merge-stats` first".to_owned());
    }
    statistics.verify()?;
    if statistics.index().model_digest != quantize::with_threads(threads, || measure::digest(checkpoint))? {
        return bad(format!(
            "was measured on another model ({}); measure this one with `qtool calibrate`",
            statistics.index().model
        ));
    }
    if evidence == Evidence::Full && !statistics.index().full {
        return bad(
            "holds diagonals only, and whole second moments are needed here; measure without --diagonal"
                .to_owned(),
        );
    }
    Ok(statistics)
}
