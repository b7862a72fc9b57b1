//! Scales of FastDeploy's quantized key-value cache in a plan: which tensors hold them, and how the magnitudes
//! that calibration saw become their numbers.

use std::ops::Range;

use qtool_formats::Dtype;
use qtool_formats::export::fastdeploy::Ernie;
use qtool_formats::export::fastdeploy::kv_cache::{KvCache, scale_names};

use crate::calibrate::recorder::KeyValueMagnitudes;
use crate::plan::{Action, QuantizePlan, TensorPlan};
use crate::{Error, Result};

/// A tensor that is measured, not made of the source.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// What it is, for plan and manifest.
    pub reason: String,
    layer: usize,
    is_values: bool,
    /// Channels of the layer's keys that belong to this rank.
    channels: Range<usize>,
    head_dim: usize,
    kv_cache: KvCache,
    /// Its numbers, once they are known.
    pub values: Vec<f32>,
}

impl Measured {
    /// Its numbers as little-endian F32.
    pub fn bytes(&self) -> Vec<u8> {
        self.values.iter().flat_map(|v| v.to_le_bytes()).collect()
    }
}

/// The tensors of rank `rank`: two of each layer, empty as yet. Heads of keys are shared evenly.
pub fn plan(kv_cache: KvCache, model: &Ernie, rank: usize, ranks: usize) -> Vec<TensorPlan> {
    let heads = model.kv_heads / ranks.max(1);
    let channels = rank * heads * model.head_dim..(rank + 1) * heads * model.head_dim;
    let count = match kv_cache {
        KvCache::Int8 => channels.len(),
        KvCache::Fp8 => heads,
    };
    let of = |layer: usize| {
        let channels = channels.clone();
        (0..)
            .zip(scale_names(layer))
            .map(move |(which, name)| TensorPlan {
                name,
                shape: vec![count],
                dtype: Dtype::F32,
                source_bytes: 0,
                action: Action::Measure(Box::new(Measured {
                    reason: format!("largest magnitudes for a {} cache", kv_cache.name()),
                    layer,
                    is_values: which == 1,
                    channels: channels.clone(),
                    head_dim: model.head_dim,
                    kv_cache,
                    values: Vec::new(),
                })),
            })
    };
    (0..model.layers).flat_map(of).collect()
}

/// Puts the magnitudes of each layer into the plans. Fails when a layer was not observed.
pub fn fill(
    plans: &mut [QuantizePlan],
    magnitudes: &dyn Fn(usize) -> Result<Option<KeyValueMagnitudes>>,
) -> Result<()> {
    for tensor in plans.iter_mut().flat_map(|plan| &mut plan.tensors) {
        let Action::Measure(measured) = &mut tensor.action else {
            continue;
        };
        let seen = magnitudes(measured.layer)?;
        let of = |m: KeyValueMagnitudes| if measured.is_values { m.values } else { m.keys };
        let channels = seen.map(of);
        let own = channels.as_ref().and_then(|c| c.get(measured.channels.clone()));
        let own = own.ok_or_else(|| Error::UnseenCache {
            tensor: tensor.name.clone(),
            layer: measured.layer,
        })?;
        measured.values = measured.kv_cache.stored(own, measured.head_dim);
    }
    Ok(())
}
