//! Running a model: the same forward serves calibration and validation. Blocks are read one at a time
//! where memory is short, or kept.
//!
//! | Page | Idea |
//! |---|---|
//! | [`architectures`] | which models can be run, and how their configs are read |
//! | [`decoder`] | what all of them are instances of |
//! | [`attention`], [`mlp`], [`linear`], [`rope`] | the parts of a block |
//! | [`block`] | one block |
//! | [`batch`] | token rows that run together |
//! | [`encoder`] | encoders: texts to labels or vectors |
//! | [`stack`] | either kind, layer by layer, for calibration |
//! | [`shared`] | many sequences behind one prefix; answers behind one prompt |
//! | [`slots`] | several sequences that grow together |

pub mod architectures;
pub mod attention;
pub mod batch;
pub mod block;
pub mod decoder;
pub mod encoder;
pub mod linear;
pub mod mlp;
pub mod rope;
pub mod shared;
pub mod slots;
pub mod stack;

use std::ops::Range;
use std::sync::Arc;

use qtool_calib::Observer;
use qtool_kernels::Backend;
use qtool_kernels::backend::Segment;

use attention::{KeysValues, Memory, Place, Target};
pub use batch::Batch;
pub use block::Block;
use decoder::Decoder;
pub use encoder::Encoder;

use crate::source::WeightSource;
use crate::{Error, Result};

/// Tensor of an output head that is not the embedding.
pub const HEAD: &str = "lm_head.weight";

/// A model on a device: embedding, final norm and head; its blocks when [`load`](Self::load) was called.
pub struct Model<B: Backend> {
    backend: B,
    source: Arc<dyn WeightSource>,
    decoder: Decoder,
    embedding: B::Weight,
    norm: B::Tensor,
    head: Option<B::Weight>,
    blocks: Vec<Block<B>>,
}

/// Keys and values of one sequence.
pub struct Cache<B: Backend> {
    blocks: Vec<KeysValues<B>>,
    filled: usize,
    capacity: usize,
}

impl<B: Backend> Cache<B> {
    /// Tokens in it.
    pub fn len(&self) -> usize {
        self.filled
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.filled == 0
    }

    /// Forgets all but the first `len` tokens.
    pub fn truncate(&mut self, len: usize) {
        self.filled = self.filled.min(len);
    }
}

/// A sequence that sees rows `own` of a memory, and nothing before them.
fn segment(queries: &Range<usize>, own: &Range<usize>) -> Segment {
    Segment {
        queries: queries.clone(),
        prefix: 0..0,
        own: own.clone(),
    }
}

impl<B: Backend> Model<B> {
    /// Reads everything but the blocks. Fails when the architecture cannot be run, or a tensor is missing or of
    /// another shape than the config says.
    pub fn open(backend: B, source: Arc<dyn WeightSource>) -> Result<Self> {
        let decoder = architectures::decoder(source.as_ref())?;
        let (vocabulary, hidden) = (decoder.vocabulary, decoder.hidden);
        let prefix = decoder.names.prefix;
        let embedding = source.matrix(&format!("{prefix}embed_tokens.weight"), vocabulary, hidden)?;
        let norm = source.vector(&format!("{prefix}norm.weight"), hidden)?;
        // A tied model's file may hold a copy of the head; the reference library ignores it, too.
        let head = (!decoder.tied)
            .then(|| source.matrix(HEAD, vocabulary, hidden))
            .transpose()?;
        Ok(Self {
            embedding: backend.weight(&embedding),
            norm: backend.upload(&norm, hidden),
            head: head.map(|head| backend.weight(&head)),
            decoder,
            backend,
            source,
            blocks: Vec::new(),
        })
    }

    /// Reads all blocks and keeps them.
    pub fn load(mut self) -> Result<Self> {
        self.blocks = (0..self.decoder.blocks)
            .map(|i| self.block(i))
            .collect::<Result<_>>()?;
        self.backend.fault()?;
        Ok(self)
    }

    /// What it looks like.
    pub fn decoder(&self) -> &Decoder {
        &self.decoder
    }

    /// The device it is on.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Where its weights come from.
    pub fn source(&self) -> &dyn WeightSource {
        self.source.as_ref()
    }

    /// Reads block `index`.
    pub fn block(&self, index: usize) -> Result<Block<B>> {
        self.block_from(index, self.source.as_ref())
    }

    /// Reads block `index` from another source of the same model.
    pub fn block_from(&self, index: usize, source: &dyn WeightSource) -> Result<Block<B>> {
        Block::read(&self.backend, source, &self.decoder, index)
    }

    /// The embeddings of a batch, (M, hidden). Fails when an id is beyond the vocabulary.
    pub fn embed(&self, batch: &Batch) -> Result<B::Tensor> {
        let vocabulary = self.decoder.vocabulary;
        match batch.ids().iter().find(|&&id| id as usize >= vocabulary) {
            Some(&id) => Err(Error::Vocabulary { id, vocabulary }),
            None => Ok(self.backend.embed(&self.embedding, batch.ids())),
        }
    }

    /// Where a batch lies, for all blocks.
    pub fn place(&self, batch: &Batch) -> Place {
        let least = batch.positions().iter().copied().min().unwrap_or(0);
        let end = batch.positions().iter().map(|p| p + 1).max().unwrap_or(0);
        Place {
            table: self.decoder.rope.table(least, end),
            rows: batch.positions().iter().map(|p| p - least).collect(),
            segments: batch.sequences().iter().map(|rows| segment(rows, rows)).collect(),
            target: Target::From(0),
        }
    }

    /// Runs one block over `x` (M, hidden), in place.
    pub fn run(
        &self,
        block: &Block<B>,
        x: &mut B::Tensor,
        place: &Place,
        observer: Option<&mut (dyn Observer<B> + '_)>,
    ) {
        block.run(&self.backend, &self.decoder, x, place, Memory::Own, observer);
    }

    /// What the head reads of the last block's output `x`: its final norm.
    pub fn normed(&self, x: &B::Tensor) -> B::Tensor {
        self.backend.rms_norm(x, &self.norm, self.decoder.eps)
    }

    /// Logits (rows, V) of these rows of the last block's output, or of all.
    pub fn logits(&self, x: &B::Tensor, rows: Option<&[usize]>) -> B::Tensor {
        let chosen = rows.map(|rows| self.backend.gather(x, rows));
        let x = chosen.as_ref().unwrap_or(x);
        let normed = self.normed(x);
        self.backend
            .matmul(&normed, self.head.as_ref().unwrap_or(&self.embedding))
    }

    /// What the last of the loaded blocks gives for a batch, (M, hidden).
    pub fn hidden(&self, batch: &Batch) -> Result<B::Tensor> {
        let mut x = self.embed(batch)?;
        let place = self.place(batch);
        self.backend.within(|| {
            for block in &self.blocks {
                self.run(block, &mut x, &place, None);
            }
        });
        self.backend.fault()?;
        Ok(x)
    }

    /// Logits of all rows of a batch, (M, V). The model must be loaded.
    pub fn forward(&self, batch: &Batch) -> Result<B::Tensor> {
        let logits = self.logits(&self.hidden(batch)?, None);
        self.backend.fault()?;
        Ok(logits)
    }

    /// Keys and values of `rows` tokens for one block, all zeros.
    fn room(&self, rows: usize) -> KeysValues<B> {
        let width = self.decoder.heads.kv * self.decoder.heads.dim;
        let zeros = || self.backend.zeros(rows, width);
        KeysValues {
            keys: zeros(),
            values: zeros(),
        }
    }

    /// An empty cache with room for `capacity` tokens.
    pub fn cache(&self, capacity: usize) -> Cache<B> {
        Cache {
            blocks: self.blocks.iter().map(|_| self.room(capacity)).collect(),
            filled: 0,
            capacity,
        }
    }

    /// Appends `ids` to the sequence in `cache` and gives the logits (1, V) after the last of them. Fails when
    /// the cache is too small, or an id is beyond the vocabulary.
    pub fn extend(&self, cache: &mut Cache<B>, ids: &[u32]) -> Result<B::Tensor> {
        let x = self.append(cache, ids)?;
        let logits = self.logits(&x, Some(&[ids.len() - 1]));
        self.backend.fault()?;
        Ok(logits)
    }

    /// The same, up to what the last block gives, (M, hidden).
    fn append(&self, cache: &mut Cache<B>, ids: &[u32]) -> Result<B::Tensor> {
        let (filled, end) = (cache.filled, cache.filled + ids.len());
        if end > cache.capacity || ids.is_empty() {
            return Err(Error::CacheFull {
                tokens: end,
                capacity: cache.capacity,
            });
        }
        let batch = Batch::at(ids, filled);
        let mut x = self.embed(&batch)?;
        let place = Place {
            segments: vec![segment(&(0..ids.len()), &(0..end))],
            target: Target::From(filled),
            ..self.place(&batch)
        };
        self.backend.within(|| {
            for (block, cache) in self.blocks.iter().zip(&mut cache.blocks) {
                let memory = Memory::Kept(cache);
                block.run(&self.backend, &self.decoder, &mut x, &place, memory, None);
            }
        });
        self.backend.fault()?;
        cache.filled = end;
        Ok(x)
    }

    /// Continues `prompt` greedily by at most `most` tokens, up to and without a token of `stop`. Of equal
    /// logits the lowest id wins.
    pub fn generate(&self, prompt: &[u32], most: usize, stop: &[u32]) -> Result<Vec<u32>> {
        let mut cache = self.cache(prompt.len() + most);
        let mut logits = self.extend(&mut cache, prompt)?;
        let mut out = Vec::new();
        while out.len() < most {
            let values = self.backend.read(&logits)?;
            let best = values
                .iter()
                .enumerate()
                .fold(
                    (0, f32::NEG_INFINITY),
                    |best, (i, &v)| {
                        if v > best.1 { (i, v) } else { best }
                    },
                );
            let id = best.0 as u32;
            if stop.contains(&id) {
                break;
            }
            out.push(id);
            if out.len() < most {
                logits = self.extend(&mut cache, &[id])?;
            }
        }
        Ok(out)
    }
}
