//! Which tensors of a decoder read and write what: the plan of its plumbing, from its description. Owns no
//! arithmetic; every transformation is a walk over this.

use std::collections::HashSet;
use std::ops::Range;

use qtool_kernels::backend::Heads;

use crate::model::architectures;
use crate::model::decoder::Decoder;
use crate::source::{Source, WeightSource};
use crate::{Error, Result};

/// Name of the output head.
pub const HEAD: &str = "lm_head.weight";

/// A norm and what reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Norm {
    /// Tensor of its gain.
    pub gain: String,
    /// Weights whose input is what it gives.
    pub readers: Vec<String>,
}

/// A layer whose outputs another one reads, element by element or head by head.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// The weight whose rows give the values.
    pub writer: String,
    /// Which of its rows.
    pub rows: Range<usize>,
    /// Rows of the writer in all.
    pub writer_rows: usize,
    /// The weight that reads them.
    pub reader: String,
    /// Times each value is read: query heads that share a value head.
    pub repeats: usize,
    /// Width of a head; `None` for an MLP.
    pub head: Option<usize>,
}

/// See the module's text.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    /// Width of the residual stream.
    pub hidden: usize,
    /// The embedding.
    pub embedding: String,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Norms of the blocks.
    pub norms: Vec<Norm>,
    /// The norm before the head.
    pub last_norm: String,
    /// Weights whose output is added to the stream.
    pub writers: Vec<String>,
    /// Values and outputs of the attention.
    pub values: Vec<Pair>,
    /// Up and down projections.
    pub mlps: Vec<Pair>,
    /// Weights of routers, among the readers.
    pub routers: Vec<String>,
    heads: Heads,
}

impl Layout {
    /// That of the model in `source`. Fails when it is no decoder that can be run.
    pub fn of(source: &Source) -> Result<Self> {
        let decoder = architectures::decoder(source as &dyn WeightSource).map_err(|error| match error {
            Error::Source { path, reason } => Error::Source {
                path,
                reason: format!(
                    "rotation and scales are folded into decoders with RMS norms, whose plumbing is known: {reason}"
                ),
            },
            other => other,
        })?;
        Ok(Self::of_decoder(&decoder))
    }

    fn of_decoder(decoder: &Decoder) -> Self {
        let names = &decoder.names;
        let mut this = Self {
            hidden: decoder.hidden,
            embedding: format!("{}embed_tokens.weight", names.prefix),
            tied: decoder.tied,
            norms: Vec::new(),
            last_norm: format!("{}norm.weight", names.prefix),
            writers: Vec::new(),
            values: Vec::new(),
            mlps: Vec::new(),
            routers: Vec::new(),
            heads: decoder.heads,
        };
        for block in 0..decoder.blocks {
            this.attention(decoder, &names.block(block));
            this.feed(decoder, block);
        }
        this
    }

    fn attention(&mut self, decoder: &Decoder, stem: &str) {
        let heads = decoder.heads;
        let (query, kv) = (heads.query * heads.dim, heads.kv * heads.dim);
        let at = |name: &str| format!("{stem}self_attn.{name}.weight");
        let (readers, writer, from) = if decoder.names.fused {
            (vec![at("qkv_proj")], at("qkv_proj"), query + kv)
        } else {
            let names = ["q_proj", "k_proj", "v_proj"];
            (names.map(at).to_vec(), at("v_proj"), 0)
        };
        self.norms.push(Norm {
            gain: format!("{stem}input_layernorm.weight"),
            readers,
        });
        self.values.push(Pair {
            writer,
            rows: from..from + kv,
            writer_rows: from + kv,
            reader: at("o_proj"),
            repeats: heads.query / heads.kv.max(1),
            head: Some(heads.dim),
        });
        self.writers.push(at("o_proj"));
    }

    fn feed(&mut self, decoder: &Decoder, block: usize) {
        let stem = decoder.names.block(block);
        let mut readers = Vec::new();
        let mlp = format!("{stem}mlp.");
        match decoder.moe.as_ref().filter(|moe| moe.is_in(block)) {
            None => self.mlp(decoder, &mlp, decoder.intermediate, &mut readers),
            Some(moe) => {
                let router = format!("{mlp}gate.weight");
                readers.push(router.clone());
                self.routers.push(router);
                for expert in 0..moe.experts {
                    let stem = format!("{mlp}experts.{expert}.");
                    self.mlp(decoder, &stem, moe.intermediate, &mut readers);
                }
                if moe.shared > 0 {
                    self.mlp(
                        decoder,
                        &format!("{mlp}shared_experts."),
                        moe.shared,
                        &mut readers,
                    );
                }
            }
        }
        self.norms.push(Norm {
            gain: format!("{stem}post_attention_layernorm.weight"),
            readers,
        });
    }

    fn mlp(&mut self, decoder: &Decoder, stem: &str, width: usize, readers: &mut Vec<String>) {
        let at = |name: &str| format!("{stem}{name}.weight");
        let (writer, from) = if decoder.names.fused {
            readers.push(at("up_gate_proj"));
            // Gate first, up second.
            (at("up_gate_proj"), width)
        } else {
            readers.extend([at("gate_proj"), at("up_proj")]);
            (at("up_proj"), 0)
        };
        self.mlps.push(Pair {
            writer,
            rows: from..from + width,
            writer_rows: from + width,
            reader: at("down_proj"),
            repeats: 1,
            head: None,
        });
        self.writers.push(at("down_proj"));
    }

    /// Width of a head.
    pub fn head_width(&self) -> usize {
        self.heads.dim
    }

    /// Columns of an output projection.
    pub fn attention_width(&self) -> usize {
        self.heads.query * self.heads.dim
    }

    /// Fails when the model holds a tensor that this layout does not know, such as a block for multi-token
    /// prediction: it may read the residual stream, and would read it wrongly after a rotation.
    pub fn refuse_strangers(&self, source: &Source) -> Result<()> {
        let readers = self.norms.iter().flat_map(|n| n.readers.iter().chain([&n.gain]));
        let weights: HashSet<&str> = readers
            .chain(&self.writers)
            .chain([&self.embedding, &self.last_norm])
            .map(String::as_str)
            .chain([HEAD])
            .collect();
        // What stays as it is, whatever the stream looks like.
        const INDIFFERENT: [&str; 4] = [
            ".self_attn.q_norm.weight",
            ".self_attn.k_norm.weight",
            ".rotary_emb.inv_freq",
            ".e_score_correction_bias",
        ];
        let known = |name: &str| {
            let weight = name
                .strip_suffix(".bias")
                .map_or_else(|| name.to_owned(), |stem| format!("{stem}.weight"));
            weights.contains(weight.as_str()) || INDIFFERENT.iter().any(|end| name.ends_with(end))
        };
        match source.names().into_iter().find(|name| !known(name)) {
            None => Ok(()),
            Some(stranger) => Err(Error::Source {
                path: source.path().to_owned(),
                reason: format!(
                    "cannot be rotated: it is not known what its tensor {stranger} reads or writes; leave --rotate out"
                ),
            }),
        }
    }
}
