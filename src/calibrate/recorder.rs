//! Listens to a model while one block of it runs, and keeps what calibration wants to know of it. Owns the
//! sums of the block at hand; what becomes of them is [`super::statistics`].

use std::collections::HashMap;
use std::path::Path;

use qtool_calib::stats::{LayerStats, Moment};
use qtool_calib::{Evidence, Observer};
use qtool_kernels::Backend;

use crate::{Error, Result};

/// One input of a block, shared by one or more linear layers.
#[derive(Debug, Clone, PartialEq)]
pub struct Input {
    /// Tensor names of the layers it enters; the first names the input.
    pub tensors: Vec<String>,
    /// Its statistics.
    pub stats: LayerStats,
}

/// Largest magnitudes of a block's keys and values, (kv heads * D) each.
#[derive(Debug, Clone, PartialEq)]
pub struct KeyValueMagnitudes {
    /// After the rotary embedding.
    pub keys: Vec<f32>,
    /// As cached.
    pub values: Vec<f32>,
}

/// What is known of one block.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct BlockStatistics {
    /// Its inputs, in the order the model uses them.
    pub inputs: Vec<Input>,
    /// Keys and values, for blocks with attention.
    pub magnitudes: Option<KeyValueMagnitudes>,
}

impl BlockStatistics {
    /// Adds what was seen later. Inputs must come in the same order.
    pub fn merge(&mut self, later: &Self) -> Result<(), qtool_calib::CalibError> {
        if self.inputs.is_empty() && self.magnitudes.is_none() {
            *self = later.clone();
            return Ok(());
        }
        let same = |(a, b): (&Input, &Input)| a.tensors == b.tensors;
        if self.inputs.len() != later.inputs.len() || !self.inputs.iter().zip(&later.inputs).all(same) {
            return Err(qtool_calib::CalibError::Statistics {
                reason: "the parts describe different layers".to_owned(),
            });
        }
        for (input, more) in self.inputs.iter_mut().zip(&later.inputs) {
            input.stats.merge(&more.stats)?;
        }
        if let (Some(tops), Some(more)) = (&mut self.magnitudes, &later.magnitudes) {
            raise(&mut tops.keys, more.keys.iter().copied());
            raise(&mut tops.values, more.values.iter().copied());
        }
        Ok(())
    }
}

/// tops = max(tops, |values|), element by element.
fn raise(tops: &mut [f32], values: impl Iterator<Item = f32>) {
    tops.iter_mut()
        .zip(values)
        .for_each(|(top, value)| *top = top.max(value.abs()));
}

/// See the module's text.
pub struct Recorder<'a, B: Backend> {
    backend: &'a B,
    evidence: Evidence,
    /// Layers that share an input, and what it adds up to, in the order in which the model uses them.
    inputs: Vec<(Vec<String>, B::Sums)>,
    by_name: HashMap<String, usize>,
    keys_and_values: Option<[B::Sums; 2]>,
}

impl<'a, B: Backend> Recorder<'a, B> {
    /// Sums as much as `evidence` asks for, on `backend`.
    pub fn new(backend: &'a B, evidence: Evidence) -> Self {
        Self {
            backend,
            evidence,
            inputs: Vec::new(),
            by_name: HashMap::new(),
            keys_and_values: None,
        }
    }

    /// What was seen. Fails when the device did, or when an input was not finite, of a layer of the model at `model`.
    pub fn finish(self, model: &Path) -> Result<BlockStatistics> {
        let mut block = BlockStatistics::default();
        for (tensors, sums) in self.inputs {
            let sums = self.backend.summed(sums)?;
            if !sums.finite {
                return Err(Error::NonFiniteActivation {
                    path: model.to_owned(),
                    layer: tensors.into_iter().next().unwrap_or_default(),
                });
            }
            let moment = match self.evidence {
                Evidence::Full => Moment::Full(sums.moment),
                _ => Moment::Diagonal(sums.moment),
            };
            let stats = LayerStats::new(sums.tops.len(), sums.rows, moment, sums.tops);
            block.inputs.push(Input {
                tensors,
                stats: stats.map_err(Error::Option)?,
            });
        }
        if let Some([keys, values]) = self.keys_and_values {
            block.magnitudes = Some(KeyValueMagnitudes {
                keys: self.backend.summed(keys)?.tops,
                values: self.backend.summed(values)?.tops,
            });
        }
        Ok(block)
    }
}

impl<B: Backend> Observer<B> for Recorder<'_, B> {
    fn linear_input(&mut self, weights: &[&str], x: &B::Tensor) {
        let Some(&name) = weights.first() else { return };
        let (_, columns) = self.backend.dims(x);
        let index = *self.by_name.entry(name.to_owned()).or_insert_with(|| {
            let tensors = weights.iter().map(|&w| w.to_owned()).collect();
            let full = self.evidence == Evidence::Full;
            self.inputs.push((tensors, self.backend.sums(columns, full)));
            self.inputs.len() - 1
        });
        self.backend.watch(x, &mut self.inputs[index].1);
    }

    fn keys_and_values(&mut self, _layer: usize, keys: &B::Tensor, values: &B::Tensor) {
        let (_, columns) = self.backend.dims(keys);
        let tops = || self.backend.sums(columns, false);
        let sums = self.keys_and_values.get_or_insert_with(|| [tops(), tops()]);
        for (sums, x) in sums.iter_mut().zip([keys, values]) {
            self.backend.watch(x, sums);
        }
    }
}
