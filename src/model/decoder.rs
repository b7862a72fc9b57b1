//! The decoder every supported language model is an instance of: embedding, blocks of attention and MLP (dense,
//! or routed experts) around a residual stream, a norm, a head. Owns the description of such a model and what
//! names its tensors have; what differs between architectures is read from their configs on pages of their own.
//!
//! ```text
//! x += o(attention(rope(q(n1(x))), rope(k(n1(x))), v(n1(x))))        n1, n2: RMS norms
//! x += down(silu(gate(n2(x))) * up(n2(x)))                           or the experts of `moe.rs`
//! ```

use std::path::Path;

use qtool_kernels::backend::{Activation, Heads};
use serde_json::Value;

use super::rope::Rope;
use crate::source::WeightSource;
use crate::{Error, Result};

/// What a decoder looks like.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoder {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Blocks.
    pub blocks: usize,
    /// Heads of the attention.
    pub heads: Heads,
    /// Width of a dense MLP.
    pub intermediate: usize,
    /// Of every norm.
    pub eps: f32,
    /// Rotary angles.
    pub rope: Rope,
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// Positions the model was made for (fewer where it only sees a window).
    pub context: usize,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Function of the gate.
    pub activation: Activation,
    /// Routed experts, if any.
    pub moe: Option<Moe>,
    /// Names of its tensors.
    pub names: Names,
}

impl Decoder {
    /// Bytes of activations that are alive together for each token of a batch, about: the residual stream and its like, the MLP or
    /// the experts a token is sent to, queries and what they find, keys and values of one block.
    pub fn bytes_a_token(&self) -> usize {
        let routed = self.moe.as_ref().map_or(0, |moe| {
            moe.top * (2 * moe.intermediate + self.hidden) + 3 * moe.shared
        });
        let heads = 2 * (self.heads.query + 2 * self.heads.kv) * self.heads.dim;
        4 * (6 * self.hidden + routed.max(3 * self.intermediate) + heads)
    }
}

/// Routed experts of a decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct Moe {
    /// Routed experts of a block.
    pub experts: usize,
    /// Experts a token is sent to.
    pub top: usize,
    /// Width of a routed expert.
    pub intermediate: usize,
    /// Width of the shared expert; 0 for none.
    pub shared: usize,
    /// First and last block with experts, and every how many blocks they come.
    pub blocks: (usize, usize, usize),
    /// Least sum of the chosen experts' probabilities that they are divided by.
    pub least_sum: f32,
}

impl Moe {
    /// Whether block `block` has routed experts.
    pub fn is_in(&self, block: usize) -> bool {
        let (first, last, interval) = self.blocks;
        (first..=last).contains(&block) && (block + 1).is_multiple_of(interval)
    }
}

/// Names of a decoder's tensors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Names {
    /// `model.` or `ernie.`.
    pub prefix: &'static str,
    /// Whether query, key and value lie in one tensor, and gate and up in another.
    pub fused: bool,
}

impl Names {
    /// As the tensors of `source` are called.
    pub fn of(source: &dyn WeightSource) -> Self {
        let paddle = source.contains("ernie.embed_tokens.weight");
        Self {
            prefix: if paddle { "ernie." } else { "model." },
            fused: paddle,
        }
    }

    /// The stem of block `block`, ending in a dot.
    pub fn block(&self, block: usize) -> String {
        format!("{}layers.{block}.", self.prefix)
    }
}

/// Reads numbers of a `config.json`.
pub struct Fields<'a> {
    /// The config.
    pub config: &'a Value,
    /// Where it lies.
    pub path: &'a Path,
}

impl<'a> Fields<'a> {
    /// Those of a source.
    pub fn of(source: &'a dyn WeightSource) -> Self {
        Self {
            config: source.config(),
            path: source.path(),
        }
    }

    /// The fault of this config.
    pub fn fault(&self, reason: impl Into<String>) -> Error {
        Error::Source {
            path: self.path.join("config.json"),
            reason: reason.into(),
        }
    }

    /// A count that must be there.
    pub fn count(&self, key: &str) -> Result<usize> {
        self.maybe(key)?
            .ok_or_else(|| self.fault(format!("expected a number {key:?}, found none")))
    }

    /// A count of 1 to 2^24, if there is one. `null` counts as absent.
    pub fn maybe(&self, key: &str) -> Result<Option<usize>> {
        match self.config.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_u64() {
                Some(n) if (1..=1 << 24).contains(&n) => Ok(Some(n as usize)),
                _ => Err(self.fault(format!(
                    "expected {key:?} to be a count of 1 to 2^24, got {value}"
                ))),
            },
        }
    }

    /// A float, or the default.
    pub fn float(&self, key: &str, default: f64) -> f64 {
        self.config.get(key).and_then(Value::as_f64).unwrap_or(default)
    }

    /// A truth, or the default.
    pub fn flag(&self, key: &str, default: bool) -> bool {
        self.config.get(key).and_then(Value::as_bool).unwrap_or(default)
    }

    /// The function named by `key`.
    pub fn activation(&self, key: &str, default: Activation) -> Result<Activation> {
        match self.config.get(key).and_then(Value::as_str) {
            None => Ok(default),
            Some("silu" | "swish") => Ok(Activation::Silu),
            Some("gelu") => Ok(Activation::Gelu),
            Some("gelu_new" | "gelu_pytorch_tanh" | "gelu_fast") => Ok(Activation::GeluTanh),
            Some("relu") => Ok(Activation::Relu),
            Some("tanh") => Ok(Activation::Tanh),
            Some(other) => Err(self.fault(format!(
                "the activation {other:?} is not supported; supported are silu, gelu, gelu_pytorch_tanh, relu, tanh"
            ))),
        }
    }

    /// What all decoders share: the fields Llama has. `style` is the pairing of the rotary embedding.
    pub fn decoder(
        &self,
        source: &dyn WeightSource,
        style: qtool_kernels::backend::RopeStyle,
        tied: bool,
    ) -> Result<Decoder> {
        let hidden = self.count("hidden_size")?;
        let query = self.count("num_attention_heads")?;
        let kv = self.maybe("num_key_value_heads")?.unwrap_or(query);
        let dim = match self.maybe("head_dim")? {
            Some(dim) => dim,
            None => hidden / query,
        };
        if !query.is_multiple_of(kv) || dim == 0 || !dim.is_multiple_of(2) {
            return Err(self.fault(format!(
                "{query} query heads, {kv} key heads and a head width of {dim} do not go together"
            )));
        }
        let context = self.maybe("max_position_embeddings")?.unwrap_or(2048);
        let window = if self.flag("use_sliding_window", true) {
            self.maybe("sliding_window")?
        } else {
            None
        };
        Ok(Decoder {
            hidden,
            blocks: self.count("num_hidden_layers")?,
            heads: Heads {
                query,
                kv,
                dim,
                scale: (1.0 / (dim as f64).sqrt()) as f32,
                causal: true,
            },
            intermediate: self.count("intermediate_size")?,
            eps: self.float("rms_norm_eps", 1e-6) as f32,
            rope: Rope::new(self.config, style, dim).map_err(|reason| self.fault(reason))?,
            vocabulary: self.count("vocab_size")?,
            context: window.map_or(context, |window| window.min(context)),
            tied: self.flag("tie_word_embeddings", tied),
            activation: self.activation("hidden_act", Activation::Silu)?,
            moe: None,
            names: Names::of(source),
        })
    }
}
