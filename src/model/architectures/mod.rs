//! Every architecture that can be run: the names its config goes by, and how its config is read. One page and
//! one line each.

pub mod ernie45;
pub mod ernie45_moe;
pub mod llama;
pub mod qwen2;
pub mod qwen3;

use serde_json::Value;

use super::decoder::{Decoder, Fields};
use crate::source::WeightSource;
use crate::{Error, Result};

/// An architecture of language models.
pub struct Architecture {
    /// Its `model_type` names.
    pub model_types: &'static [&'static str],
    /// One line for the docs.
    pub summary: &'static str,
    /// Reads its config.
    pub read: fn(&Fields<'_>, &dyn WeightSource) -> Result<Decoder>,
}

/// All of them.
pub const ARCHITECTURES: &[Architecture] = &[
    ernie45::ARCHITECTURE,
    ernie45_moe::ARCHITECTURE,
    llama::ARCHITECTURE,
    qwen2::ARCHITECTURE,
    qwen3::ARCHITECTURE,
];

/// The decoder `source` describes. Fails for an architecture that is not listed, naming those that are.
pub fn decoder(source: &dyn WeightSource) -> Result<Decoder> {
    let model_type = source
        .config()
        .get("model_type")
        .and_then(Value::as_str)
        .unwrap_or("");
    let found = ARCHITECTURES.iter().find(|a| a.model_types.contains(&model_type));
    let architecture = found.ok_or_else(|| Error::Source {
        path: source.path().join("config.json"),
        reason: format!(
            "the model type {model_type:?} cannot be run; those that can are {}",
            ARCHITECTURES
                .iter()
                .flat_map(|a| a.model_types)
                .copied()
                .collect::<Vec<_>>()
                .join(", ")
        ),
    })?;
    (architecture.read)(&Fields::of(source), source)
}
