//! Running an encoder: texts, or pairs of them, to the labels of a classification head or to one vector each.
//! Owns the way of a batch through it; the parts have pages of their own.
//!
//! | Page | Idea |
//! |---|---|
//! | [`shape`] | what every encoder is an instance of |
//! | [`embeddings`] | the sum of tables a token starts from |
//! | [`layer`] | attention and MLP, each followed by its norm |
//! | [`head`] | one vector a sequence to its labels |
//!
//! Sequences lie one after the other without padding ([`Batch`]), so no mask is needed, and a sequence gets the
//! same answer in any company, within rounding.

pub mod embeddings;
pub mod head;
pub mod layer;
pub mod shape;

use std::sync::Arc;

use qtool_calib::Observer;
use qtool_kernels::Backend;

use self::embeddings::Embeddings;
use self::head::Head;
use self::layer::Layer;
use self::shape::Shape;
use super::Batch;
use super::architectures;
use crate::source::WeightSource;
use crate::{Error, Result};

/// An encoder on a device. Its layers are there when [`load`](Self::load) was called.
pub struct Encoder<B: Backend> {
    backend: B,
    source: Arc<dyn WeightSource>,
    shape: Shape,
    embeddings: Embeddings<B>,
    head: Option<Head<B>>,
    layers: Vec<Layer<B>>,
}

impl<B: Backend> Encoder<B> {
    /// Reads everything but the layers. Fails when the architecture is no encoder that can be run, or a tensor
    /// is missing or of another shape than the config says.
    pub fn open(backend: B, source: Arc<dyn WeightSource>) -> Result<Self> {
        let shape = architectures::encoder(source.as_ref())?;
        Ok(Self {
            embeddings: Embeddings::read(&backend, source.as_ref(), &shape)?,
            head: Head::read(&backend, source.as_ref(), &shape)?,
            layers: Vec::new(),
            backend,
            source,
            shape,
        })
    }

    /// Reads all layers and keeps them.
    pub fn load(mut self) -> Result<Self> {
        self.layers = (0..self.shape.layers)
            .map(|i| self.layer_from(i, self.source.as_ref()))
            .collect::<Result<_>>()?;
        self.backend.fault()?;
        Ok(self)
    }

    /// What it looks like.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The device it is on.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Where its weights come from.
    pub fn source(&self) -> &dyn WeightSource {
        self.source.as_ref()
    }

    /// Labels of its classification head; 0 when it has none.
    pub fn labels(&self) -> usize {
        self.head.as_ref().map_or(0, Head::labels)
    }

    /// Reads layer `index` from a source of this model.
    pub fn layer_from(&self, index: usize, source: &dyn WeightSource) -> Result<Layer<B>> {
        Layer::read(&self.backend, source, &self.shape, index)
    }

    /// What enters the first layer, (M, hidden). Fails when an id, type or task has no embedding, or a sequence
    /// is empty or longer than the model has positions.
    pub fn begin(&self, batch: &Batch) -> Result<B::Tensor> {
        self.embeddings.run(&self.backend, &self.shape, batch)
    }

    /// Runs one layer over `x` (M, hidden), in place.
    pub fn run(
        &self,
        layer: &Layer<B>,
        x: &mut B::Tensor,
        batch: &Batch,
        observer: Option<&mut (dyn Observer<B> + '_)>,
    ) {
        layer.run(&self.backend, &self.shape, x, batch.sequences(), observer);
    }

    /// What the last of the loaded layers gives for a batch, (M, hidden). Fails as [`begin`](Self::begin) does.
    pub fn hidden(&self, batch: &Batch) -> Result<B::Tensor> {
        let mut x = self.begin(batch)?;
        for layer in &self.layers {
            self.run(layer, &mut x, batch, None);
        }
        self.backend.fault()?;
        Ok(x)
    }

    /// Logits of the classification head, (sequences, labels). Fails when there is no such head, or as
    /// [`begin`](Self::begin) does.
    pub fn classify(&self, batch: &Batch) -> Result<B::Tensor> {
        let head = self.head.as_ref().ok_or_else(|| Error::Source {
            path: self.source.path().to_owned(),
            reason: format!(
                "the model has no sequence-classification head (found no tensor {}); give one that was trained to classify, or ask for embeddings",
                self.shape.head.last_tensor()
            ),
        })?;
        let x = self.hidden(batch)?;
        let firsts: Vec<usize> = batch.sequences().iter().map(|rows| rows.start).collect();
        let logits = head.run(&self.backend, &self.backend.gather(&x, &firsts));
        self.backend.fault()?;
        Ok(logits)
    }

    /// Mean of the last hidden states over each sequence's tokens, special ones included, (sequences, hidden),
    /// as the mean pooling of sentence-transformers; not normalised. Fails as [`begin`](Self::begin) does.
    pub fn embed(&self, batch: &Batch) -> Result<B::Tensor> {
        let x = self.hidden(batch)?;
        let (hidden, sequences) = (self.shape.hidden, batch.sequences());
        let mut means = self.backend.zeros(sequences.len(), hidden);
        let mut rows = Vec::with_capacity(batch.ids().len());
        let mut weights = Vec::with_capacity(batch.ids().len());
        for (number, tokens) in sequences.iter().enumerate() {
            rows.extend(tokens.clone().map(|_| number));
            weights.extend(tokens.clone().map(|_| 1.0 / tokens.len() as f32));
        }
        self.backend.scatter_add(&mut means, &rows, &x, &weights);
        self.backend.fault()?;
        Ok(means)
    }
}
