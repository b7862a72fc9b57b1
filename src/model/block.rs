//! One block of a decoder on a device.

use qtool_calib::Observer;
use qtool_kernels::Backend;

use super::attention::{Attention, Memory, Place};
use super::decoder::Decoder;
use super::mlp::Feed;
use crate::Result;
use crate::source::WeightSource;

/// See the module's text.
pub struct Block<B: Backend> {
    attention_norm: B::Tensor,
    attention: Attention<B>,
    feed_norm: B::Tensor,
    feed: Feed<B>,
}

impl<B: Backend> Block<B> {
    /// Reads block `number`.
    pub fn read(backend: &B, source: &dyn WeightSource, decoder: &Decoder, number: usize) -> Result<Self> {
        let stem = decoder.names.block(number);
        let norm = |name: &str| -> Result<B::Tensor> {
            let gain = source.vector(&format!("{stem}{name}.weight"), decoder.hidden)?;
            Ok(backend.upload(&gain, decoder.hidden))
        };
        Ok(Self {
            attention_norm: norm("input_layernorm")?,
            attention: Attention::read(backend, source, decoder, number)?,
            feed_norm: norm("post_attention_layernorm")?,
            feed: Feed::read(backend, source, decoder, number)?,
        })
    }

    /// Tensor names of its linear weights, routers left out.
    pub fn tensors(&self) -> Vec<&str> {
        let mut names = self.attention.tensors();
        names.extend(self.feed.tensors());
        names.dedup();
        names
    }

    /// x (M, hidden), in place.
    pub fn run(
        &self,
        backend: &B,
        decoder: &Decoder,
        x: &mut B::Tensor,
        place: &Place,
        memory: Memory<'_, B>,
        mut observer: Option<&mut (dyn Observer<B> + '_)>,
    ) {
        let normed = backend.rms_norm(x, &self.attention_norm, decoder.eps);
        let y = self
            .attention
            .run(backend, decoder, &normed, place, memory, observer.as_deref_mut());
        backend.add(x, &y);
        let normed = backend.rms_norm(x, &self.feed_norm, decoder.eps);
        backend.add(x, &self.feed.run(backend, &normed, observer));
    }
}
