//! What a token of an encoder starts from: the rows of its word, its type, its position and its task, added and
//! normed. Owns every refusal of a batch that does not fit the tables.

use qtool_kernels::Backend;

use super::shape::Shape;
use crate::model::batch::Batch;
use crate::source::WeightSource;
use crate::{Error, Result};

/// Gain and bias of a LayerNorm.
pub struct Norm<B: Backend> {
    gain: B::Tensor,
    bias: B::Tensor,
}

impl<B: Backend> Norm<B> {
    /// Reads `stem.weight` and `stem.bias`, or what checkpoints converted from TensorFlow call `stem.gamma` and
    /// `stem.beta`.
    pub fn read(backend: &B, source: &dyn WeightSource, stem: &str, width: usize) -> Result<Self> {
        let old = !source.contains(&format!("{stem}.weight")) && source.contains(&format!("{stem}.gamma"));
        let (gain, bias) = if old {
            ("gamma", "beta")
        } else {
            ("weight", "bias")
        };
        let read = |name: &str| -> Result<B::Tensor> {
            let values = source.vector(&format!("{stem}.{name}"), width)?;
            Ok(backend.upload(&values, width))
        };
        Ok(Self {
            gain: read(gain)?,
            bias: read(bias)?,
        })
    }

    /// x (M, width), normed.
    pub fn run(&self, backend: &B, x: &B::Tensor, eps: f32) -> B::Tensor {
        backend.layer_norm(x, &self.gain, &self.bias, eps)
    }
}

/// See the module's text.
pub struct Embeddings<B: Backend> {
    words: B::Weight,
    types: B::Weight,
    positions: B::Weight,
    tasks: Option<B::Weight>,
    norm: Norm<B>,
}

impl<B: Backend> Embeddings<B> {
    /// Reads the tables. Fails when one is missing or of another shape.
    pub fn read(backend: &B, source: &dyn WeightSource, shape: &Shape) -> Result<Self> {
        let stem = format!("{}embeddings.", shape.prefix);
        let table = |name: &str, rows: usize| -> Result<B::Weight> {
            let name = format!("{stem}{name}_embeddings.weight");
            Ok(backend.weight(&source.matrix(&name, rows, shape.hidden)?))
        };
        Ok(Self {
            words: table("word", shape.vocabulary)?,
            types: table("token_type", shape.token_types)?,
            positions: table("position", shape.first_position + shape.context)?,
            tasks: (shape.tasks > 0)
                .then(|| table("task_type", shape.tasks))
                .transpose()?,
            norm: Norm::read(backend, source, &format!("{stem}LayerNorm"), shape.hidden)?,
        })
    }

    /// Batch to (M, hidden).
    pub fn run(&self, backend: &B, shape: &Shape, batch: &Batch) -> Result<B::Tensor> {
        check(shape, batch)?;
        let mut x = backend.embed(&self.words, batch.ids());
        let first = shape.first_position as u32;
        let positions: Vec<u32> = batch.positions().iter().map(|p| p + first).collect();
        backend.add(&mut x, &looked_up(backend, &self.types, batch.types()));
        backend.add(&mut x, &backend.embed(&self.positions, &positions));
        if let Some(tasks) = &self.tasks {
            backend.add(&mut x, &looked_up(backend, tasks, batch.tasks()));
        }
        Ok(self.norm.run(backend, &x, shape.eps))
    }
}

/// Rows `ids` of a table; none given means row 0 for every token.
fn looked_up<B: Backend>(backend: &B, table: &B::Weight, ids: &[u32]) -> B::Tensor {
    backend.embed(table, if ids.is_empty() { &[0] } else { ids })
}

fn check(shape: &Shape, batch: &Batch) -> Result<()> {
    let beyond = |ids: &[u32], rows: usize| ids.iter().copied().find(|&id| id as usize >= rows);
    if let Some(id) = beyond(batch.ids(), shape.vocabulary) {
        let vocabulary = shape.vocabulary;
        return Err(Error::Vocabulary { id, vocabulary });
    }
    let ends = batch.sequences().iter().map(|rows| {
        let last = rows.end.checked_sub(1).filter(|_| !rows.is_empty());
        last.map_or(0, |last| batch.positions()[last] as usize + 1)
    });
    if let Some(tokens) = ends
        .into_iter()
        .find(|&tokens| tokens == 0 || tokens > shape.context)
    {
        let context = shape.context;
        return Err(Error::SequenceLength { tokens, context });
    }
    // A model without tasks ignores them, as the reference library does.
    let tasks = if shape.tasks == 0 { &[] } else { batch.tasks() };
    for (what, ids, rows) in [
        ("token type", batch.types(), shape.token_types),
        ("task type", tasks, shape.tasks),
    ] {
        if let Some(id) = beyond(ids, rows) {
            return Err(Error::TokenType { what, id, rows });
        }
        if !ids.is_empty() && ids.len() != batch.ids().len() {
            let (got, expected) = (ids.len(), batch.ids().len());
            return Err(Error::TokenTypes { what, got, expected });
        }
    }
    Ok(())
}
