//! The sequence-classification head: a sequence's first token through a layer and tanh, then to its labels.

use qtool_kernels::Backend;
use qtool_kernels::backend::Activation;

use super::shape::{HeadForm, Shape};
use crate::Result;
use crate::model::linear::Linear;
use crate::source::WeightSource;

/// See the module's text.
pub struct Head<B: Backend> {
    dense: Linear<B>,
    labels: Linear<B>,
    count: usize,
}

impl<B: Backend> Head<B> {
    /// Reads it; nothing when the model has none.
    pub fn read(backend: &B, source: &dyn WeightSource, shape: &Shape) -> Result<Option<Self>> {
        if shape.labels == 0 {
            return Ok(None);
        }
        let dense = match shape.head {
            HeadForm::Pooler => format!("{}pooler.dense", shape.prefix),
            HeadForm::Own => "classifier.dense".to_owned(),
        };
        let (count, hidden) = (shape.labels, shape.hidden);
        Ok(Some(Self {
            dense: Linear::with_bias(backend, source, &dense, hidden, hidden)?,
            labels: Linear::with_bias(backend, source, shape.head.last(), count, hidden)?,
            count,
        }))
    }

    /// How many labels.
    pub fn labels(&self) -> usize {
        self.count
    }

    /// First tokens (sequences, hidden) to logits (sequences, labels).
    pub fn run(&self, backend: &B, firsts: &B::Tensor) -> B::Tensor {
        let mut pooled = self.dense.run(backend, firsts);
        backend.activate(&mut pooled, Activation::Tanh);
        self.labels.run(backend, &pooled)
    }
}
