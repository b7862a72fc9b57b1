//! Scales of a quantized cache of keys and values, as FastDeploy reads them: the names of their tensors, how many
//! numbers there are, and what `config.json` and `kv_cache_scale.json` say. Owns no measurement.
//!
//! | type | stored | numbers of a layer | FastDeploy quantizes by |
//! |---|---|---|---|
//! | `int8` | largest magnitude of each channel | kv heads * head width | 127 / stored |
//! | `float8_e4m3fn` | largest magnitude of each head | kv heads | 448 / stored |
//!
//! Keys are taken after the rotary embedding. Sources: FastDeploy's `layers/quantization/kv_cache.py`,
//! `layers/quantization/mix_quant.py`, `load_weight_utils.py`.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::ernie::Ernie;
use super::refusal;
use crate::Result;

/// Largest finite number of `float8_e4m3fn`.
const FP8_BOUND: f64 = 448.0;

/// Type a cache is stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KvCache {
    /// Codes of -127..127, a scale per channel.
    Int8,
    /// `float8_e4m3fn`, a scale per head.
    Fp8,
}

/// File that FastDeploy's default loader reads FP8 scales from.
pub const SCALE_FILE: &str = "kv_cache_scale.json";

impl KvCache {
    /// FastDeploy's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Int8 => "int8",
            Self::Fp8 => "float8_e4m3fn",
        }
    }

    /// Fails for models whose configuration has no place for a cache type.
    pub fn check(self, model: &Ernie, path: &Path) -> Result<()> {
        if model.moe.is_some() {
            return Err(refusal(
                path,
                "--kv-cache goes with dense models only: FastDeploy loads quantized experts under its wint2 configuration, which has no type for the cache; leave --kv-cache out".to_owned(),
            ));
        }
        Ok(())
    }

    /// Largest magnitudes of channels, (heads * width), as this type's stored numbers.
    pub fn stored(self, channels: &[f32], head_dim: usize) -> Vec<f32> {
        match self {
            Self::Int8 => channels.to_vec(),
            Self::Fp8 => channels
                .chunks(head_dim.max(1))
                .map(|head| head.iter().copied().fold(0.0, f32::max))
                .collect(),
        }
    }

    /// The quantization block of a dense model's `config.json`, with this cache.
    pub fn config(self, bits: u8) -> Value {
        let weights = format!("wint{bits}");
        json!({
            "quantization": "mix_quant",
            "is_quantized": true,
            "dense_quant_type": weights,
            "moe_quant_type": weights,
            "kv_cache_quant_type": self.name(),
            "is_channel_wise": self == Self::Int8,
            "has_zero_point": false,
        })
    }

    /// Content of [`SCALE_FILE`] from stored tensors by name, for the type that has one. The loader multiplies
    /// by 448, so it holds a 448th.
    pub fn scale_file<'a>(self, tensors: impl Iterator<Item = (&'a str, &'a [f32])>) -> Option<Value> {
        if self == Self::Int8 {
            return None;
        }
        let divided =
            |values: &[f32]| -> Value { values.iter().map(|&v| json!(f64::from(v) / FP8_BOUND)).collect() };
        let entries: Map<String, Value> = tensors
            .map(|(name, values)| (name.to_owned(), divided(values)))
            .collect();
        Some(Value::Object(entries))
    }
}

/// Names of a layer's scales, of its keys and of its values.
pub fn scale_names(layer: usize) -> [String; 2] {
    ["k", "v"].map(|which| format!("ernie.layers.{layer}.self_attn.cache{which}_matmul.activation_scale"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_by_hand() {
        let channels = [1.0, 3.0, 0.5, 896.0];
        assert_eq!(KvCache::Int8.stored(&channels, 2), channels);
        assert_eq!(KvCache::Fp8.stored(&channels, 2), [3.0, 896.0]);
        let [key, _] = scale_names(3);
        assert_eq!(key, "ernie.layers.3.self_attn.cachek_matmul.activation_scale");
        let stored = [3.0f32, 896.0];
        let file = |kv: KvCache| kv.scale_file([(key.as_str(), stored.as_slice())].into_iter());
        assert_eq!(file(KvCache::Int8), None);
        assert_eq!(file(KvCache::Fp8), Some(json!({&key: [3.0 / 448.0, 2.0]})));
        assert_eq!(KvCache::Int8.config(4)["dense_quant_type"], json!("wint4"));
    }
}
