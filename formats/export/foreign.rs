//! Models that others quantized, written in other formats. Codes and scales are laid out anew where the format has a place
//! for them, and decoded where it has floats; nothing is rounded that the format does not round by its nature (`bf16`).
//!
//! Owns what exporters share here: what is given, the `config.json` without the former format's block, the files beside the
//! weights, and the card.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::gguf::model::llama3_factors;
use super::spares::Spares;
use super::{OnBytes, PROVENANCE_FILE, card, copy_side_files, shards};
use crate::checkpoint::file_name;
use crate::dtype::{Dtype, FloatDtype};
use crate::import::{Decoded, Foreign, Tensor};
use crate::replace::Staging;
use crate::shard_writer::StoredTensor;
use crate::tensor::byte_len;
use crate::{FormatError, Result};

/// Configs of a former format that stand beside `config.json`.
const FORMER: [&str; 2] = ["quantize_config.json", "quant_config.json"];

/// What is given.
#[derive(Debug)]
pub struct Given<'a> {
    /// The model.
    pub model: &'a Foreign,
    /// Files that take the place of, or come to, those beside its weights: name and bytes.
    pub files: Vec<(String, Vec<u8>)>,
}

/// An export of such a model that can be written.
pub struct Planned<'a> {
    /// Bytes of tensor data it will write.
    pub tensor_bytes: u64,
    /// Writes it into a folder under construction; see [`Exporter::export`](super::Exporter::export).
    pub write: Write<'a>,
}

/// See [`Planned::write`].
pub type Write<'a> = Box<dyn FnOnce(&Staging, u64, OnBytes<'_>) -> Result<()> + 'a>;

/// The bytes of all tensors that tensor i of the model becomes.
pub(super) type Make<'a> = Box<dyn Fn(usize) -> Result<Vec<Cow<'a, [u8]>>> + Sync + 'a>;

impl<'a> Given<'a> {
    /// What cannot be written, and why.
    pub fn refusal(&self, reason: String) -> FormatError {
        FormatError::Export {
            path: self.model.files().root().to_owned(),
            reason,
        }
    }

    /// Name of the model, for the card.
    pub(super) fn name(&self) -> String {
        let root = self.model.files().root();
        file_name(&root.canonicalize().unwrap_or_else(|_| root.to_owned()))
    }

    /// Type of a tensor that is no codes: kept, or floats in another order of rows.
    pub(super) fn kept(&self, tensor: &Tensor) -> Result<Option<Dtype>> {
        if tensor.coded.is_none() {
            let stored = self.model.files().tensor(self.model.stored_name(tensor))?;
            return Ok(Some(stored.dtype()));
        }
        let floats = [FloatDtype::F32, FloatDtype::F16, FloatDtype::Bf16];
        let is = |dtype: &FloatDtype| dtype.dtype().to_string() == tensor.stored_as;
        Ok(floats.into_iter().find(is).map(FloatDtype::dtype))
    }

    /// Bytes of a tensor that is [kept](Self::kept).
    pub(super) fn kept_bytes(&self, tensor: &Tensor) -> Result<Cow<'a, [u8]>> {
        match self.model.decode(tensor)? {
            Some(Decoded::Floats { bytes, .. }) => Ok(Cow::Owned(bytes)),
            Some(Decoded::Weight(weight)) => Err(self.refusal(format!(
                "{}: expected {}, got {}",
                tensor.name,
                tensor.stored_as,
                weight.scheme()
            ))),
            None => {
                let stored = self.model.files().tensor(self.model.stored_name(tensor))?;
                Ok(Cow::Borrowed(stored.bytes()))
            }
        }
    }

    /// The type the model computes in, by its config; BF16 where that says nothing.
    pub(super) fn dtype(&self) -> Dtype {
        let config = self.model.config();
        let named = ["dtype", "torch_dtype"].iter().find_map(|key| config.get(*key));
        match named.and_then(Value::as_str) {
            Some("float32") => Dtype::F32,
            Some("float16") => Dtype::F16,
            _ => Dtype::BF16,
        }
    }

    /// Its `config.json` without the former format's block. Fails where there is none that a reader would know what to do
    /// with.
    pub(super) fn config(&self) -> Result<serde_json::Map<String, Value>> {
        let config = self.model.config();
        let gguf = self.model.format() == "gguf";
        let Some(object) = config.as_object() else {
            return Err(self.refusal(
                "it has no config.json, which every format needs; copy it into the folder".to_owned(),
            ));
        };
        if gguf && !object.contains_key("hidden_size") {
            let kind = object
                .get("model_type")
                .and_then(Value::as_str)
                .unwrap_or_default();
            return Err(self.refusal(format!(
                "models of the architecture {} can be looked at, but their tensors have no known names in a checkpoint; export the original",
                crate::error::quoted(kind)
            )));
        }
        let unnamed = |tensor: &&Tensor| gguf && tensor.parts.first() == Some(&tensor.name);
        if let Some(tensor) = self.model.tensors().iter().find(unnamed) {
            return Err(self.refusal(format!(
                "{} has no known name in a checkpoint; export the original",
                tensor.name
            )));
        }
        let mut object = object.clone();
        let scaling = object.get("rope_scaling");
        if let Some(scaling) = scaling.filter(|scaling| scaling.get("divisors").is_some()) {
            let named = named_scaling(scaling, config).ok_or_else(|| {
                self.refusal("its rotary frequencies are divided by factors that are not Llama 3's, for which a config.json has no words; export the original".to_owned())
            })?;
            object.insert("rope_scaling".to_owned(), named);
        }
        object.shift_remove("quantization_config");
        object.shift_remove("is_quantized");
        Ok(object)
    }

    /// A folder of safetensors: the tensors that each tensor of the model becomes (in groups of its number), how their bytes
    /// are made, and its config.
    pub(super) fn folder(
        &'a self,
        format: &'static str,
        tensors: Vec<StoredTensor>,
        config: serde_json::Map<String, Value>,
        make: Make<'a>,
    ) -> Planned<'a> {
        let tensor_bytes = tensors.iter().map(|tensor| tensor.bytes).sum();
        let write = move |staging: &Staging, max_shard_bytes: u64, on_bytes: OnBytes<'_>| {
            let count = self.model.tensors().len();
            let make = |i: usize, _: &Spares| make(i);
            shards::write(staging, tensors, max_shard_bytes, (count, |i| i), make, on_bytes)?;
            let text = format!("{:#}\n", Value::Object(config));
            staging.write_file("config.json", text.as_bytes())?;
            copy_side_files(staging, self.model.files(), &FORMER)?;
            self.around(staging, format, tensor_bytes)
        };
        Planned {
            tensor_bytes,
            write: Box::new(write),
        }
    }

    /// Files that come with every export: those given, the card and where it is from.
    pub(super) fn around(&self, staging: &Staging, format: &str, tensor_bytes: u64) -> Result<()> {
        for (name, bytes) in &self.files {
            staging.write_file(name, bytes)?;
        }
        card::write_foreign(staging, self, format, tensor_bytes)?;
        let text = json!({
            "format": format,
            "tool": concat!("qtool ", env!("CARGO_PKG_VERSION")),
            "model": { "name": self.name(), "format": self.model.format() },
        });
        staging.write_file(PROVENANCE_FILE, format!("{text:#}\n").as_bytes())
    }

    /// Name of the model, its format, what its tensors are stored as and how many of each, and its elements: what a card says.
    pub(super) fn about(&self) -> (String, &'static str, BTreeMap<String, usize>, u64) {
        let mut kinds: BTreeMap<String, usize> = BTreeMap::new();
        let mut elements = 0u64;
        for tensor in self.model.tensors() {
            *kinds.entry(tensor.stored_as.clone()).or_default() += 1;
            elements += tensor.shape.iter().product::<usize>() as u64;
        }
        (self.name(), self.model.format(), kinds, elements)
    }
}

/// Divisors of rotary frequencies, as a GGUF file lists them, in the words of a `config.json`: Llama 3.1's or 3.2's scaling, when
/// they are that. The file has them in F32.
fn named_scaling(scaling: &Value, config: &Value) -> Option<Value> {
    let number = |key: &str| config.get(key).and_then(Value::as_f64);
    let (base, width) = (number("rope_theta")?, number("head_dim")? as u32);
    let divisors = scaling.get("divisors")?.as_array()?;
    let near = |factor: &f64| {
        let known = llama3_factors(width, base, *factor, (1.0, 4.0), 8192.0);
        let close = |(known, divisor): (&f32, &Value)| {
            divisor
                .as_f64()
                .is_some_and(|d| (d / f64::from(*known) - 1.0).abs() < 1e-4)
        };
        known.len() == divisors.len() && known.iter().zip(divisors).all(close)
    };
    let factor = [8.0, 32.0].into_iter().find(near)?;
    Some(
        json!({"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}),
    )
}

/// A tensor as it will be stored.
pub(super) fn stored(name: String, dtype: Dtype, shape: Vec<usize>, group: usize) -> StoredTensor {
    let bytes = byte_len(dtype, &shape).unwrap_or(0) as u64;
    StoredTensor {
        name,
        dtype,
        shape,
        bytes,
        group,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama_3_is_recognised_by_its_divisors() {
        let config = json!({"rope_theta": 500000.0, "head_dim": 64});
        let listed = |factors: &[f32]| json!({"rope_type": "divided", "divisors": factors});
        for factor in [8.0, 32.0] {
            let factors = llama3_factors(64, 500_000.0, factor, (1.0, 4.0), 8192.0);
            assert!(factors.contains(&1.0) && factors.contains(&(factor as f32)));
            let named = named_scaling(&listed(&factors), &config).unwrap();
            assert_eq!(
                (&named["rope_type"], &named["factor"]),
                (&json!("llama3"), &json!(factor))
            );
        }
        assert_eq!(named_scaling(&listed(&[1.0; 32]), &config), None);
        assert_eq!(named_scaling(&listed(&[]), &config), None);
    }
}
