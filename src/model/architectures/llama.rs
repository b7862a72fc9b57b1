//! Llama and Mistral: the plain decoder. Mistral's sliding window is honoured as a bound of the context: within
//! it both see everything that came before.

use qtool_kernels::backend::RopeStyle;

use super::Architecture;

/// The registry entry.
pub const ARCHITECTURE: Architecture = Architecture {
    model_types: &["llama", "mistral"],
    summary: "Llama, Mistral and models of their form, such as SmolLM2",
    read: |fields, source| fields.decoder(source, RopeStyle::Halves, false),
};
