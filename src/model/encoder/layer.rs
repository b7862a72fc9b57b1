//! One layer of an encoder on a device: attention over the whole sequence, then the MLP, each added to what came
//! in and normed afterwards.

use std::ops::Range;

use qtool_calib::Observer;
use qtool_kernels::Backend;
use qtool_kernels::backend::Segment;

use super::embeddings::Norm;
use super::shape::Shape;
use crate::Result;
use crate::model::linear::{Linear, observe};
use crate::source::WeightSource;

/// See the module's text.
pub struct Layer<B: Backend> {
    query: Linear<B>,
    key: Linear<B>,
    value: Linear<B>,
    dense: Linear<B>,
    attention_norm: Norm<B>,
    intermediate: Linear<B>,
    output: Linear<B>,
    output_norm: Norm<B>,
}

impl<B: Backend> Layer<B> {
    /// Reads layer `number`. Fails when a tensor is missing or of another shape.
    pub fn read(backend: &B, source: &dyn WeightSource, shape: &Shape, number: usize) -> Result<Self> {
        let stem = shape.layer(number);
        let hidden = shape.hidden;
        let linear = |name: &str, n, k| Linear::with_bias(backend, source, &format!("{stem}{name}"), n, k);
        let norm = |name: &str| Norm::read(backend, source, &format!("{stem}{name}"), hidden);
        Ok(Self {
            query: linear("attention.self.query", hidden, hidden)?,
            key: linear("attention.self.key", hidden, hidden)?,
            value: linear("attention.self.value", hidden, hidden)?,
            dense: linear("attention.output.dense", hidden, hidden)?,
            attention_norm: norm("attention.output.LayerNorm")?,
            intermediate: linear("intermediate.dense", shape.intermediate, hidden)?,
            output: linear("output.dense", hidden, shape.intermediate)?,
            output_norm: norm("output.LayerNorm")?,
        })
    }

    /// Tensor names of its linear weights.
    pub fn tensors(&self) -> Vec<&str> {
        [
            &self.query,
            &self.key,
            &self.value,
            &self.dense,
            &self.intermediate,
            &self.output,
        ]
        .map(|l| l.tensor.as_str())
        .into()
    }

    /// x (M, hidden), in place; a token sees all of its own sequence and nothing else.
    pub fn run(
        &self,
        backend: &B,
        shape: &Shape,
        x: &mut B::Tensor,
        sequences: &[Range<usize>],
        mut observer: Option<&mut (dyn Observer<B> + '_)>,
    ) {
        observe(observer.as_deref_mut(), &[&self.query, &self.key, &self.value], x);
        let segments: Vec<Segment> = sequences
            .iter()
            .map(|rows| Segment {
                queries: rows.clone(),
                prefix: 0..0,
                own: rows.clone(),
            })
            .collect();
        let y = backend.attention(
            &self.query.run(backend, x),
            &self.key.run(backend, x),
            &self.value.run(backend, x),
            &segments,
            shape.heads,
        );
        observe(observer.as_deref_mut(), &[&self.dense], &y);
        backend.add(x, &self.dense.run(backend, &y));
        *x = self.attention_norm.run(backend, x, shape.eps);
        observe(observer.as_deref_mut(), &[&self.intermediate], x);
        let mut y = self.intermediate.run(backend, x);
        backend.activate(&mut y, shape.activation);
        observe(observer, &[&self.output], &y);
        backend.add(x, &self.output.run(backend, &y));
        *x = self.output_norm.run(backend, x, shape.eps);
    }
}
