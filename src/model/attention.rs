//! Attention of a decoder block: projections, norms of heads where the checkpoint has them, rotary embedding,
//! and the cache of keys and values.

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

/// Where a batch lies: its rotary angles, what its sequences see, and where its keys and values go.
pub struct Place {
    /// Row 0 belongs to the least position of the batch.
    pub table: RopeTable,
    /// Row of the table for each token.
    pub rows: Vec<u32>,
    /// What each sequence sees, in rows of its [`Memory`].
    pub segments: Vec<Segment>,
    /// Where in that memory its own keys and values go.
    pub target: Target,
}

/// Rows of a memory for the keys and values of a batch.
pub enum Target {
    /// As they come, from this row on.
    From(usize),
    /// One row for each, all different, of those that still hold zeros.
    Rows(Vec<usize>),
    /// From this row on these rows of the batch, some of them more than once.
    Copies(usize, Vec<usize>),
}

/// What a batch sees besides, or instead of, itself.
pub enum Memory<'a, B: Backend> {
    /// Its own keys and values and no others; its target is `From(0)`.
    Own,
    /// A cache, which keeps what is written to it.
    Kept(&'a mut KeysValues<B>),
    /// A prefix that other batches see, too, at the beginning of a room used by this batch alone.
    Behind {
        /// Rows 0.. of the room.
        prefix: Option<&'a KeysValues<B>>,
        /// Written anew by each block.
        room: &'a mut KeysValues<B>,
    },
}

impl Target {
    fn write<B: Backend>(&self, backend: &B, into: &mut B::Tensor, x: &B::Tensor) {
        match self {
            Self::From(at) => backend.place(into, *at, x),
            Self::Rows(rows) => backend.scatter_add(into, rows, x, &vec![1.0; rows.len()]),
            Self::Copies(at, rows) => backend.place(into, *at, &backend.gather(x, rows)),
        }
    }
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

    /// x (M, hidden), normed, to (M, hidden).
    pub fn run(
        &self,
        backend: &B,
        decoder: &Decoder,
        x: &B::Tensor,
        place: &Place,
        memory: Memory<'_, B>,
        mut observer: Option<&mut (dyn Observer<B> + '_)>,
    ) -> B::Tensor {
        observe(observer.as_deref_mut(), &[&self.q, &self.k, &self.v], x);
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
            observer.keys_and_values(self.layer, &k, &v);
        }
        let seen = match memory {
            Memory::Own => None,
            Memory::Kept(cache) => Some(cache),
            Memory::Behind { prefix, room } => {
                if let Some(prefix) = prefix {
                    backend.place(&mut room.keys, 0, &prefix.keys);
                    backend.place(&mut room.values, 0, &prefix.values);
                }
                Some(room)
            }
        };
        let y = match seen {
            None => backend.attention(&q, &k, &v, &place.segments, decoder.heads),
            Some(seen) => {
                place.target.write(backend, &mut seen.keys, &k);
                place.target.write(backend, &mut seen.values, &v);
                backend.attention(&q, &seen.keys, &seen.values, &place.segments, decoder.heads)
            }
        };
        observe(observer, &[&self.o], &y);
        self.o.run(backend, &y)
    }
}
