//! Qwen3, dense: as Qwen2, with a norm on each query and key head (found by its tensor) and no biases.

use super::{Architecture, qwen2};

/// The registry entry.
pub const ARCHITECTURE: Architecture = Architecture {
    model_types: &["qwen3"],
    summary: "Qwen3, dense",
    read: qwen2::read,
};
