//! Listens to a model while one block of it runs, and keeps what calibration wants to know of it. Owns the
//! sums of the block at hand; what becomes of them is [`super::statistics`].

use std::collections::HashMap;

use qtool_calib::stats::{LayerStats, Moment};
use qtool_calib::{Evidence, Observer};
use qtool_kernels::{Backend, first_non_finite};

use crate::Result;

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
    /// What was seen.
    pub block: BlockStatistics,
    by_name: HashMap<String, usize>,
    /// First input that was not finite.
    pub fault: Option<String>,
}

impl<'a, B: Backend> Recorder<'a, B> {
    /// Sums as much as `evidence` asks for, on `backend`.
    pub fn new(backend: &'a B, evidence: Evidence) -> Self {
        Self {
            backend,
            evidence,
            block: BlockStatistics::default(),
            by_name: HashMap::new(),
            fault: None,
        }
    }
}

impl<B: Backend> Observer for Recorder<'_, B> {
    fn linear_input(&mut self, weights: &[&str], x: &[f32], columns: usize) {
        let Some(&name) = weights.first() else { return };
        if self.fault.is_none() && first_non_finite(x).is_some() {
            self.fault = Some(name.to_owned());
        }
        let index = *self.by_name.entry(name.to_owned()).or_insert_with(|| {
            self.block.inputs.push(Input {
                tensors: weights.iter().map(|&w| w.to_owned()).collect(),
                stats: LayerStats::empty(columns, self.evidence == Evidence::Full),
            });
            self.block.inputs.len() - 1
        });
        let stats = &mut self.block.inputs[index].stats;
        stats.count(x);
        match stats.moment_mut() {
            Moment::Full(moment) if !x.is_empty() => {
                self.backend.gram(&self.backend.upload(x, columns), moment);
            }
            Moment::Full(_) => {}
            Moment::Diagonal(sums) => {
                for row in x.chunks_exact(columns) {
                    sums.iter_mut()
                        .zip(row)
                        .for_each(|(sum, x)| *sum += f64::from(*x) * f64::from(*x));
                }
            }
        }
    }

    fn keys_and_values(&mut self, _layer: usize, keys: &[f32], values: &[f32], columns: usize) {
        let tops = self.block.magnitudes.get_or_insert_with(|| KeyValueMagnitudes {
            keys: vec![0.0; columns],
            values: vec![0.0; columns],
        });
        for (tops, x) in [(&mut tops.keys, keys), (&mut tops.values, values)] {
            x.chunks_exact(columns)
                .for_each(|row| raise(tops, row.iter().copied()));
        }
    }
}
