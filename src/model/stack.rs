//! A model as a stack of layers, each of which runs on what the one before gave: what calibration needs of it,
//! the same for language models and encoders.

use std::sync::Arc;

use qtool_calib::Observer;
use qtool_kernels::Backend;

use super::architectures::is_encoder;
use super::encoder::layer::Layer;
use super::{Batch, Block, Encoder, HEAD, Model};
use crate::Result;
use crate::source::WeightSource;

/// Either kind of model, its layers not read.
pub enum Stack<B: Backend> {
    /// A language model.
    Decoder(Box<Model<B>>),
    /// An encoder.
    Encoder(Box<Encoder<B>>),
}

/// A layer of one of them.
pub enum StackLayer<B: Backend> {
    /// A block of a decoder.
    Block(Box<Block<B>>),
    /// A layer of an encoder.
    Layer(Box<Layer<B>>),
}

impl<B: Backend> StackLayer<B> {
    /// Names of its linear weights, routers left out.
    pub fn tensors(&self) -> Vec<&str> {
        match self {
            Self::Block(block) => block.tensors(),
            Self::Layer(layer) => layer.tensors(),
        }
    }
}

impl<B: Backend> Stack<B> {
    /// Opens the model of a source, whichever kind its config names.
    pub fn open(backend: B, source: Arc<dyn WeightSource>) -> Result<Self> {
        Ok(if is_encoder(source.as_ref()) {
            Self::Encoder(Box::new(Encoder::open(backend, source)?))
        } else {
            Self::Decoder(Box::new(Model::open(backend, source)?))
        })
    }

    /// The device it is on.
    pub fn backend(&self) -> &B {
        match self {
            Self::Decoder(model) => model.backend(),
            Self::Encoder(model) => model.backend(),
        }
    }

    /// Where its weights come from.
    pub fn source(&self) -> &dyn WeightSource {
        match self {
            Self::Decoder(model) => model.source(),
            Self::Encoder(model) => model.source(),
        }
    }

    /// Width of what goes from layer to layer.
    pub fn hidden(&self) -> usize {
        match self {
            Self::Decoder(model) => model.decoder().hidden,
            Self::Encoder(model) => model.shape().hidden,
        }
    }

    /// How many layers.
    pub fn layers(&self) -> usize {
        match self {
            Self::Decoder(model) => model.decoder().blocks,
            Self::Encoder(model) => model.shape().layers,
        }
    }

    /// How many of them have routed experts.
    pub fn routed(&self) -> usize {
        let Self::Decoder(model) = self else { return 0 };
        let moe = model.decoder().moe.as_ref();
        (0..self.layers())
            .filter(|&b| moe.is_some_and(|moe| moe.is_in(b)))
            .count()
    }

    /// Reads layer `index` from a source of this model.
    pub fn layer(&self, index: usize, source: &dyn WeightSource) -> Result<StackLayer<B>> {
        Ok(match self {
            Self::Decoder(model) => StackLayer::Block(Box::new(model.block_from(index, source)?)),
            Self::Encoder(model) => StackLayer::Layer(Box::new(model.layer_from(index, source)?)),
        })
    }

    /// What enters the first layer, (M, hidden). Fails when the batch does not fit the model's tables.
    pub fn begin(&self, batch: &Batch) -> Result<B::Tensor> {
        match self {
            Self::Decoder(model) => model.embed(batch),
            Self::Encoder(model) => model.begin(batch),
        }
    }

    /// Runs a layer of this model over `x` (M, hidden), in place.
    pub fn run(
        &self,
        layer: &StackLayer<B>,
        x: &mut B::Tensor,
        batch: &Batch,
        observer: Option<&mut (dyn Observer<B> + '_)>,
    ) {
        match (self, layer) {
            (Self::Decoder(model), StackLayer::Block(block)) => {
                model.run(block, x, &model.place(batch), observer);
            }
            (Self::Encoder(model), StackLayer::Layer(layer)) => model.run(layer, x, batch, observer),
            _ => unreachable!("a layer of another kind of model"),
        }
    }

    /// The tensor of an output head of its own, if there is one that reads every token.
    pub fn head(&self) -> Option<&'static str> {
        match self {
            Self::Decoder(model) => (!model.decoder().tied).then_some(HEAD),
            // A classifier reads one token a text: too few to calibrate on.
            Self::Encoder(_) => None,
        }
    }

    /// What that head reads of the last layer's output; `None` without one.
    pub fn head_input(&self, x: &B::Tensor) -> Option<B::Tensor> {
        match self {
            Self::Decoder(model) if !model.decoder().tied => Some(model.normed(x)),
            _ => None,
        }
    }
}
