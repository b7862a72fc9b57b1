//! ERNIE-4.5, dense: rotary embedding on neighbouring columns, tied embeddings, a head width of its own.

use qtool_kernels::backend::RopeStyle;

use super::Architecture;

/// The registry entry.
pub const ARCHITECTURE: Architecture = Architecture {
    model_types: &["ernie4_5"],
    summary: "ERNIE-4.5, dense (0.3B), in Hugging Face and in Paddle form",
    read: |fields, source| fields.decoder(source, RopeStyle::Pairs, true),
};
