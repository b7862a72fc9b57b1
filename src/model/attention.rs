//! Attention of a decoder block: projections, norms of heads where the checkpoint has them, rotary embedding,
//! and the cache of keys and values.

use std::ops::Range;

use qtool_calib::Observer;
use qtool_kernels::Backend;
use qtool_kernels::backend::{RopeTable, Segment};

use super::decoder::Decoder;
use super::linear::{Linear, observe};
use crate::Result;
use crate::source::WeightSource;

/// See the module's text.
pub struct Attention<B: Backend> {
    layer: usize,
    q: Linear<B>,
    k: Linear<B>,
    v: Linear<B>,
    o: Linear<B>,
    q_norm: Option<B::Tensor>,
    k_norm: Option<B::Tensor>,
}

/// Keys and values of one block, for the rows of a cache.
pub struct KeysValues<B: Backend> {
    pub(super) keys: B::Tensor,
    pub(super) values: B::Tensor,
}

/// Where a batch lies: its rotary angles, its sequences, and where they go in a cache.
pub struct Place {
    /// Row 0 belongs to the least position of the batch.
    pub table: RopeTable,
    /// Row of the table for each token.
    pub rows: Vec<u32>,
    /// Rows of each sequence.
    pub sequences: Vec<Range<usize>>,
    /// Rows of the cache that are filled already, when there is one.
    pub cached: usize,
}

impl<B: Backend> Attention<B> {
    /// Reads that of block `layer`.
    pub fn read(backend: &B, source: &dyn WeightSource, decoder: &Decoder, layer: usize) -> Result<Self> {
        let stem = decoder.names.block(layer);
        let (heads, hidden) = (decoder.heads, decoder.hidden);
        let (query, kv) = (heads.query * heads.dim, heads.kv * heads.dim);
        let at = |name: &str| format!("{stem}self_attn.{name}");
        let mut parts = if decoder.names.fused {
            Linear::read_fused(backend, source, &at("qkv_proj"), &[query, kv, kv], hidden)?
        } else {
            let read = |name, n| Linear::read(backend, source, &at(name), n, hidden);
            vec![read("q_proj", query)?, read("k_proj", kv)?, read("v_proj", kv)?]
        };
        let norm = |name: &str| -> Result<Option<B::Tensor>> {
            let name = at(name);
            if !source.contains(&name) {
                return Ok(None);
            }
            let gain = source.vector(&name, heads.dim)?;
            Ok(Some(backend.upload(&gain, heads.dim)))
        };
        let (v, k, q) = (parts.pop(), parts.pop(), parts.pop());
        let (Some(q), Some(k), Some(v)) = (q, k, v) else {
            unreachable!("three parts were asked for")
        };
        Ok(Self {
            layer,
            q,
            k,
            v,
            o: Linear::read(backend, source, &at("o_proj"), hidden, query)?,
            q_norm: norm("q_norm.weight")?,
            k_norm: norm("k_norm.weight")?,
        })
    }

    /// Names of its linear weights.
    pub fn tensors(&self) -> Vec<&str> {
        let mut names: Vec<&str> = [&self.q, &self.k, &self.v, &self.o]
            .map(|l| l.tensor.as_str())
            .into();
        names.dedup();
        names
    }

    /// x (M, hidden), normed, to (M, hidden). With a cache, its rows up to `place.cached` are seen, and the
    /// batch, which is one sequence then, is appended to it.
    pub fn run(
        &self,
        backend: &B,
        decoder: &Decoder,
        x: &B::Tensor,
        place: &Place,
        cache: Option<&mut KeysValues<B>>,
        mut observer: Option<&mut (dyn Observer + '_)>,
    ) -> B::Tensor {
        observe(backend, observer.as_deref_mut(), &[&self.q, &self.k, &self.v], x);
        let project = |linear: &Linear<B>, norm: &Option<B::Tensor>| {
            let y = linear.run(backend, x);
            match norm {
                Some(gain) => backend.rms_norm(&y, gain, decoder.eps),
                None => y,
            }
        };
        let (mut q, mut k) = (project(&self.q, &self.q_norm), project(&self.k, &self.k_norm));
        let v = self.v.run(backend, x);
        backend.rope(&mut q, &place.rows, &place.table);
        backend.rope(&mut k, &place.rows, &place.table);
        if let Some(observer) = observer.as_deref_mut() {
            let columns = backend.dims(&k).1;
            observer.keys_and_values(self.layer, &backend.download(&k), &backend.download(&v), columns);
        }
        let segment = |rows: &Range<usize>, own: Range<usize>| Segment {
            queries: rows.clone(),
            prefix: 0..0,
            own,
        };
        let y = match cache {
            None => {
                let segments: Vec<Segment> = place.sequences.iter().map(|r| segment(r, r.clone())).collect();
                backend.attention(&q, &k, &v, &segments, decoder.heads)
            }
            Some(cache) => {
                backend.place(&mut cache.keys, place.cached, &k);
                backend.place(&mut cache.values, place.cached, &v);
                let rows = 0..backend.dims(&q).0;
                let segments = [segment(&rows, 0..place.cached + rows.len())];
                backend.attention(&q, &cache.keys, &cache.values, &segments, decoder.heads)
            }
        };
        observe(backend, observer, &[&self.o], &y);
        self.o.run(backend, &y)
    }
}
