//! `--target-bpw` of `qtool quantize`: what was typed, and the plan of bits as printed.

use std::path::Path;
use std::sync::Arc;

use qtool_calib::Evidence;
use qtool_calib::options::{PartialOptions, parse_effort};
use qtool_formats::FormatError;
use qtool_formats::checkpoint::Checkpoint;
use serde_json::{Value, json};

use crate::calibrate::coverage::Stored;
use crate::calibrate::measure;
use crate::calibrate::pipeline::{Calibration, open_statistics};
use crate::calibrate::target::{self, Allocated};
use crate::quantize::Options;
use crate::table::Table;

/// Bits of tensors that nothing else decides on, when `--bits` is not given.
pub const DEFAULT_BITS: u8 = 4;

/// What was typed.
#[derive(Debug, clap::Args)]
pub struct TargetArgs {
    /// Instead of --bits: choose bits for each tensor (2, 3, 4, 8 or kept) by what it loses, so that quantized tensors
    /// take X bits per weight in all, scales included
    #[arg(
        long,
        value_name = "X",
        value_parser = bits_per_weight,
        requires = "calib",
        conflicts_with_all = ["bits", "group_size", "asymmetric", "clip", "method", "scale_dtype", "scale_bits", "w4_until", "tensor_parallel"]
    )]
    target_bpw: Option<f64>,
}

/// A number of bits per weight.
fn bits_per_weight(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x.is_finite() && x > 0.0 => Ok(x),
        _ => Err("expected a number of bits per weight above 0, such as 3 or 2.5".to_owned()),
    }
}

/// What was decided, and the folder that must live until the run is over.
#[derive(Default)]
pub struct Applied {
    /// The plan of bits, when there was a target.
    pub allocated: Option<Allocated>,
    _scratch: Option<tempfile::TempDir>,
}

impl TargetArgs {
    /// Whether there is a target.
    pub fn given(&self) -> bool {
        self.target_bpw.is_some()
    }

    /// With a target, gives `options` the recipe that meets it. Statistics that are still to be measured are measured
    /// for it on the original model; a one-pass `calibration` then goes on with them.
    pub fn apply(
        &self,
        checkpoint: &Arc<Checkpoint>,
        (options, effort): (&mut Options, Option<&str>),
        calibration: &mut Option<Calibration>,
        min_coverage: u64,
    ) -> anyhow::Result<Applied> {
        let (Some(target), Some(known)) = (self.target_bpw, calibration.as_ref()) else {
            return Ok(Applied::default());
        };
        let (folder, scratch) = match known {
            Calibration::Statistics(folder) => (folder.clone(), None),
            Calibration::Sequential(corpus) | Calibration::OnePass(corpus) => {
                let beside = match options.target.parent() {
                    Some(parent) if !parent.as_os_str().is_empty() => parent,
                    _ => Path::new("."),
                };
                let scratch = tempfile::Builder::new()
                    .prefix(".qtool-statistics-")
                    .tempdir_in(beside)
                    .map_err(FormatError::io(beside, "make a scratch folder in"))?;
                let folder = scratch.path().join("statistics");
                let measured = measure::Options {
                    target: folder.clone(),
                    force: false,
                    evidence: Evidence::Full,
                    slices: None,
                    threads: options.threads,
                    device: options.device.clone(),
                    show_progress: options.show_progress,
                };
                measure::run(checkpoint, corpus, &measured)?;
                (folder, Some(scratch))
            }
        };
        let statistics = open_statistics(checkpoint, &folder, Evidence::Full, options.threads)?;
        let effort = effort.map(parse_effort).transpose()?;
        let base = PartialOptions {
            effort,
            ..PartialOptions::default()
        };
        let source = Stored::new(statistics, min_coverage);
        let (recipe, allocated) = target::run(
            checkpoint,
            &options.recipe,
            (target, base),
            &source,
            options.threads,
        )?;
        options.recipe = recipe;
        if matches!(calibration, Some(Calibration::OnePass(_))) {
            *calibration = Some(Calibration::Statistics(folder));
        }
        Ok(Applied {
            allocated: Some(allocated),
            _scratch: scratch,
        })
    }
}

/// What the manifest says of the calibration, with the plan of bits.
pub fn noted(mut calibration: Value, allocated: Option<&Allocated>) -> Value {
    if let Some(allocated) = allocated {
        calibration["allocation"] = json!(allocated);
    }
    calibration
}

/// The plan of bits in words.
pub fn table(allocated: &Allocated) -> String {
    let mut table = Table::new(&["becomes", ">tensors", ">weights"]);
    for share in &allocated.shares {
        table.row([
            share.options.clone(),
            share.tensors.to_string(),
            share.weights.to_string(),
        ]);
    }
    let [least, most] = allocated.reachable;
    format!(
        "{}\n--target-bpw {}: {:.3} bits per weight in quantized tensors, everything stored counted ({least:.2} to {most:.2} in reach);\n\
        estimated loss {:.4e}, no plan of these choices is below {:.4e}\n\n",
        table.render(),
        allocated.target,
        allocated.reached,
        allocated.loss,
        allocated.bound,
    )
}
