//! Qwen2 and Qwen2.5: the plain decoder with biases on query, key and value (found by their tensors).

use qtool_kernels::backend::RopeStyle;

use super::Architecture;
use crate::Result;
use crate::model::decoder::{Decoder, Fields};
use crate::source::WeightSource;

/// The registry entry.
pub const ARCHITECTURE: Architecture = Architecture {
    model_types: &["qwen2"],
    summary: "Qwen2 and Qwen2.5, dense",
    read,
};

/// Reads a config of this family.
pub(super) fn read(fields: &Fields<'_>, source: &dyn WeightSource) -> Result<Decoder> {
    let mut decoder = fields.decoder(source, RopeStyle::Halves, false)?;
    // Its configs name a window that is not in use unless they say so.
    if !fields.flag("use_sliding_window", false) {
        decoder.context = fields
            .maybe("max_position_embeddings")?
            .unwrap_or(decoder.context);
    }
    Ok(decoder)
}
