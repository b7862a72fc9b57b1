//! Every architecture that can be run: the names its config goes by, and how its config is read. One page and
//! one line each. Language models and encoders have a list of their own.

pub mod bert;
pub mod ernie;
pub mod ernie45;
pub mod ernie45_moe;
pub mod llama;
pub mod qwen2;
pub mod qwen3;
pub mod roberta;

use serde_json::Value;

use super::decoder::{Decoder, Fields};
use super::encoder::shape::Shape;
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

/// An architecture of encoders.
pub struct EncoderArchitecture {
    /// Its `model_type` names.
    pub model_types: &'static [&'static str],
    /// One line for the docs.
    pub summary: &'static str,
    /// Reads its config.
    pub read: fn(&Fields<'_>, &dyn WeightSource) -> Result<Shape>,
}

/// All encoders.
pub const ENCODERS: &[EncoderArchitecture] =
    &[bert::ARCHITECTURE, ernie::ARCHITECTURE, roberta::ARCHITECTURE];

/// Whether the config of `source` is that of an encoder.
pub fn is_encoder(source: &dyn WeightSource) -> bool {
    ENCODERS
        .iter()
        .any(|a| a.model_types.contains(&model_type(source)))
}

/// The decoder `source` describes. Fails for an architecture that is not listed, naming those that are, and for
/// an encoder, which neither continues text nor has likelihoods.
pub fn decoder(source: &dyn WeightSource) -> Result<Decoder> {
    if is_encoder(source) {
        return Err(Error::Source {
            path: source.path().join("config.json"),
            reason: format!(
                "the encoder {:?} cannot be run as a language model: it does not continue text; ask it to classify or embed",
                model_type(source)
            ),
        });
    }
    let found = ARCHITECTURES
        .iter()
        .find(|a| a.model_types.contains(&model_type(source)));
    let listed: Vec<&str> = ARCHITECTURES
        .iter()
        .flat_map(|a| a.model_types)
        .copied()
        .collect();
    let architecture = found.ok_or_else(|| not_listed(source, "a language model", &listed))?;
    (architecture.read)(&Fields::of(source), source)
}

/// The encoder `source` describes. Fails for an architecture that is not listed, naming those that are.
pub fn encoder(source: &dyn WeightSource) -> Result<Shape> {
    let found = ENCODERS
        .iter()
        .find(|a| a.model_types.contains(&model_type(source)));
    let listed: Vec<&str> = ENCODERS.iter().flat_map(|a| a.model_types).copied().collect();
    let architecture = found.ok_or_else(|| not_listed(source, "an encoder", &listed))?;
    (architecture.read)(&Fields::of(source), source)
}

/// Most tokens of a sequence and rows of the vocabulary, of either kind of model.
pub fn bounds(source: &dyn WeightSource) -> Result<(usize, usize)> {
    if is_encoder(source) {
        let shape = encoder(source)?;
        return Ok((shape.context, shape.vocabulary));
    }
    let decoder = decoder(source)?;
    Ok((decoder.context, decoder.vocabulary))
}

fn model_type(source: &dyn WeightSource) -> &str {
    let name = source.config().get("model_type");
    name.and_then(Value::as_str).unwrap_or("")
}

fn not_listed(source: &dyn WeightSource, role: &str, listed: &[&str]) -> Error {
    Error::Source {
        path: source.path().join("config.json"),
        reason: format!(
            "the model type {:?} cannot be run as {role}; those that can are {}",
            model_type(source),
            listed.join(", ")
        ),
    }
}
