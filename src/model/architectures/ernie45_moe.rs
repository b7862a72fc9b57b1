//! ERNIE-4.5 with routed experts (21B-A3B, 300B-A47B, text).
//!
//! The router is f32; a correction bias is added to its probabilities for the choice of experts only; the chosen
//! probabilities are divided by their sum. Shared experts lie fused in one MLP of as many times the width.
//! Source: `modeling_ernie4_5_moe.py` in Hugging Face transformers.

use qtool_kernels::backend::RopeStyle;

use super::Architecture;
use crate::Result;
use crate::model::decoder::{Decoder, Fields, Moe};
use crate::source::WeightSource;

/// The registry entry.
pub const ARCHITECTURE: Architecture = Architecture {
    model_types: &["ernie4_5_moe"],
    summary: "ERNIE-4.5 with routed experts (21B-A3B, 300B-A47B), in Hugging Face and in Paddle form",
    read,
};

fn read(fields: &Fields<'_>, source: &dyn WeightSource) -> Result<Decoder> {
    let mut decoder = fields.decoder(source, RopeStyle::Pairs, true)?;
    let intermediate = fields.count("moe_intermediate_size")?;
    // 0 is a meaningful value for these three, which `maybe` does not take.
    let number = |key: &str| fields.config.get(key).and_then(serde_json::Value::as_i64);
    let first = number("moe_layer_start_index").unwrap_or(1).max(0) as usize;
    let last = number("moe_layer_end_index").unwrap_or(-1);
    let shared = number("moe_num_shared_experts").unwrap_or(0).max(0) as usize;
    let experts = fields.count("moe_num_experts")?;
    let top = fields.maybe("moe_k")?.unwrap_or(2);
    if top > experts {
        return Err(fields.fault(format!("a token cannot go to {top} (moe_k) of {experts} experts")));
    }
    decoder.moe = Some(Moe {
        experts,
        top,
        intermediate,
        shared: shared * intermediate,
        blocks: (
            first,
            if last < 0 {
                decoder.blocks - 1
            } else {
                last as usize
            },
            fields.maybe("moe_layer_interval")?.unwrap_or(1),
        ),
        least_sum: fields.float("moe_norm_min", 1e-12) as f32,
    });
    Ok(decoder)
}
