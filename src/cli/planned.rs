//! A plan of `qtool quantize` as `--dry-run` prints it: classes of tensors and totals.

use std::time::Duration;

use serde_json::{Value, json};

use super::size;
use crate::classes::group;
use crate::estimate::{self, Estimate};
use crate::plan::{QuantizePlan, TensorPlan};

/// Says that figures are those of one rank.
pub fn of_ranks(ranks: usize) -> String {
    if ranks == 1 {
        String::new()
    } else {
        format!(" (rank 0 of {ranks}, all alike)")
    }
}

/// Tensors of one class with the same fate.
pub struct PlanClass {
    /// Which tensors.
    pub class: String,
    /// What becomes of them.
    pub outcome: String,
    /// How many.
    pub tensors: usize,
    /// Bytes now.
    pub before: u64,
    /// Bytes then.
    pub after: u64,
}

impl PlanClass {
    /// As `--json` prints it.
    pub fn json(&self) -> Value {
        json!({
            "class": self.class, "tensors": self.tensors, "becomes": self.outcome,
            "source_bytes": self.before, "stored_bytes": self.after,
        })
    }
}

/// The tensors of a plan by class and fate.
pub fn plan_classes(plan: &QuantizePlan) -> Vec<PlanClass> {
    let groups = group(&plan.tensors, |t| (t.class(), t.outcome()));
    groups
        .into_iter()
        .map(|(class, outcome, members)| PlanClass {
            class,
            outcome,
            tensors: members.len(),
            before: members.iter().map(|t| t.source_bytes).sum(),
            after: members.iter().map(|t| TensorPlan::stored_bytes(t)).sum(),
        })
        .collect()
}

/// Sizes and time of a plan in a line.
pub fn totals_line(plan: &QuantizePlan, estimate: &Estimate) -> String {
    let weights: u64 = plan
        .tensors
        .iter()
        .map(|t| t.shape.iter().product::<usize>() as u64)
        .sum();
    format!(
        "{} -> {} ({:.2} bits per weight), about {}: {} to choose codes (timed on a sample), {} to read and {} to write at an assumed {}/s and {}/s\n",
        size::bytes(plan.source_bytes()),
        size::bytes(plan.stored_bytes()),
        plan.stored_bytes() as f64 * 8.0 / weights.max(1) as f64,
        size::seconds(Duration::from_secs_f64(estimate.total_seconds())),
        size::seconds(Duration::from_secs_f64(estimate.compute_seconds)),
        size::seconds(Duration::from_secs_f64(estimate.read_seconds)),
        size::seconds(Duration::from_secs_f64(estimate.write_seconds)),
        size::bytes(estimate::READ_RATE as u64),
        size::bytes(estimate::WRITE_RATE as u64),
    )
}
