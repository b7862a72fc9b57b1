//! Options that say how a model is rewritten before it is quantized, and what the plan says of it.

use std::sync::Arc;

use qtool_formats::artifact::transform::TransformRecord;
use qtool_formats::checkpoint::Checkpoint;

use super::size;
use crate::calibrate::balance;
use crate::calibrate::pipeline::Calibration;
use crate::fastdeploy::{self, Request};
use crate::plan::QuantizePlan;
use crate::quantize::{self, Options};
use crate::source::Source;
use crate::transform::{Transform, rotation};

/// What was typed.
#[derive(Debug, Clone, clap::Args)]
pub struct TransformArgs {
    /// Rotate the residual stream and the values of each head first, by matrices of this seed; the model computes the same [default seed: 0]
    #[arg(long, value_name = "SEED", num_args = 0..=1, require_equals = true, default_missing_value = "0")]
    pub rotate: Option<u64>,
    /// With --calib: fold scales of input channels into the weights first, chosen so that rounding costs the outputs least; the model computes the same
    #[arg(long, requires = "calib")]
    pub awq: bool,
}

impl TransformArgs {
    /// An option of these that was typed.
    pub fn typed(&self) -> Option<&'static str> {
        let rotate = self.rotate.map(|_| "--rotate");
        rotate.or_else(|| self.awq.then_some("--awq"))
    }

    /// Refuses what these options do not go with, before anything is read.
    pub fn check(&self, fastdeploy: bool, target: bool, keep_non_finite: bool) -> anyhow::Result<()> {
        let Some(option) = self.typed() else {
            return Ok(());
        };
        if keep_non_finite {
            anyhow::bail!(
                "--non-finite keep does not go with {option}: a tensor that is left as it is would not fit the others"
            );
        }
        if target {
            anyhow::bail!(
                "--target-bpw does not go with {option}: it measures the model as it is; give --bits and --rule instead"
            );
        }
        if fastdeploy && self.awq {
            anyhow::bail!(
                "--awq does not go with --format fastdeploy: its fused weights are not priced yet; leave --awq out, or leave --format out for qtool's own artifact"
            );
        }
        Ok(())
    }

    /// The plan of our own artifact, for the model as it is or transformed.
    pub fn plan(&self, checkpoint: &Arc<Checkpoint>, options: &Options) -> anyhow::Result<QuantizePlan> {
        let plan = quantize::with_threads(options.threads, || quantize::plan(checkpoint, options))?;
        Ok(match self.rotation(checkpoint)? {
            None => plan,
            Some(rotation) => plan.transformed(checkpoint, &options.recipe, rotation)?,
        })
    }

    /// The plans of folders that FastDeploy loads, likewise.
    pub fn fastdeploy_plans(
        &self,
        checkpoint: &Arc<Checkpoint>,
        request: &Request,
    ) -> anyhow::Result<Vec<QuantizePlan>> {
        let rotation = self.rotation(checkpoint)?;
        Ok(fastdeploy::transformed_plans(
            checkpoint,
            request,
            rotation.as_ref(),
        )?)
    }

    /// The rotation that was asked for.
    fn rotation(&self, checkpoint: &Arc<Checkpoint>) -> anyhow::Result<Option<Arc<Transform>>> {
        let Some(seed) = self.rotate else {
            return Ok(None);
        };
        let source = Source::of_checkpoint(Arc::clone(checkpoint))?;
        let record = TransformRecord {
            rotation: Some(rotation::record(&source, seed)?),
            scales: None,
        };
        Ok(Some(Arc::new(Transform::new(&source, record, None)?)))
    }
}

impl TransformArgs {
    /// The plans with scales folded in, where that was asked for.
    pub fn balanced(
        &self,
        checkpoint: &Arc<Checkpoint>,
        mut plans: Vec<QuantizePlan>,
        options: &Options,
        calibration: Calibration,
        min_coverage: u64,
    ) -> anyhow::Result<(Vec<QuantizePlan>, Calibration, Option<tempfile::TempDir>)> {
        if !self.awq || plans.len() != 1 {
            return Ok((plans, calibration, None));
        }
        let plan = plans.swap_remove(0);
        let done = balance::run(checkpoint, plan, options, calibration, min_coverage)?;
        Ok((vec![done.plan], done.calibration, done.scratch))
    }
}

/// A line about what an untied head costs; empty when there is none.
pub fn untied_line(plan: &QuantizePlan) -> String {
    match plan.untied_bytes() {
        0 => String::new(),
        more => format!(
            "The head is the embedding now and becomes a tensor of its own, {} more: the last norm goes into it.\n",
            size::bytes(more)
        ),
    }
}
