//! Options that say how a model is rewritten before it is quantized, and what the plan says of it.

use std::sync::Arc;

use qtool_formats::artifact::transform::TransformRecord;
use qtool_formats::checkpoint::Checkpoint;

use super::size;
use crate::plan::QuantizePlan;
use crate::quantize::{self, NonFinite, Options};
use crate::source::Source;
use crate::transform::{Transform, rotation};

/// What was typed.
#[derive(Debug, Clone, clap::Args)]
pub struct TransformArgs {
    /// Rotate the residual stream and the values of each head first, by matrices of this seed; the model computes the same [default seed: 0]
    #[arg(long, value_name = "SEED", num_args = 0..=1, require_equals = true, default_missing_value = "0")]
    pub rotate: Option<u64>,
}

impl TransformArgs {
    /// An option of these that was typed.
    pub fn typed(&self) -> Option<&'static str> {
        self.rotate.map(|_| "--rotate")
    }

    /// The plan of our own artifact, for the model as it is or transformed.
    pub fn plan(&self, checkpoint: &Arc<Checkpoint>, options: &Options) -> anyhow::Result<QuantizePlan> {
        let plan = quantize::with_threads(options.threads, || quantize::plan(checkpoint, options))?;
        let Some(seed) = self.rotate else {
            return Ok(plan);
        };
        if options.non_finite == NonFinite::Keep {
            anyhow::bail!(
                "--non-finite keep does not go with --rotate: a tensor that is left as it is would not fit the rotated ones"
            );
        }
        let source = Source::of_checkpoint(Arc::clone(checkpoint))?;
        let record = TransformRecord {
            rotation: Some(rotation::record(&source, seed)?),
            scales: None,
        };
        let transform = Arc::new(Transform::new(&source, record)?);
        Ok(plan.transformed(checkpoint, &options.recipe, transform)?)
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
