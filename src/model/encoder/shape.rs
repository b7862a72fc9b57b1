//! The encoder every supported one is an instance of: a sum of embeddings, layers of attention and MLP with the
//! norm after each, and perhaps a classification head. Owns the description of such a model and how the fields
//! that BERT's descendants share are read from a config.
//!
//! ```text
//! x  = norm(word + type + position (+ task))
//! x  = norm(x + dense(attention(query(x), key(x), value(x))))
//! x  = norm(x + output(f(intermediate(x))))
//! ```

use qtool_kernels::backend::{Activation, Heads};
use serde_json::Value;

use crate::Result;
use crate::model::decoder::Fields;
use crate::source::WeightSource;

/// What an encoder looks like.
#[derive(Debug, Clone, PartialEq)]
pub struct Shape {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Layers.
    pub layers: usize,
    /// Heads of the attention.
    pub heads: Heads,
    /// Width of the MLP.
    pub intermediate: usize,
    /// Of every norm.
    pub eps: f32,
    /// Rows of the word embedding.
    pub vocabulary: usize,
    /// Most tokens of a sequence, special ones included.
    pub context: usize,
    /// Row of the position table for a sequence's first token.
    pub first_position: usize,
    /// Rows of the token-type table.
    pub token_types: usize,
    /// Rows of the task-type table; 0 for a model without.
    pub tasks: usize,
    /// Function of the MLP.
    pub activation: Activation,
    /// Labels of the classification head, if the model has one.
    pub labels: usize,
    /// What that head is made of.
    pub head: HeadForm,
    /// What the names of all tensors but the head's begin with: `bert.`, or nothing.
    pub prefix: &'static str,
}

/// The two classification heads in use. Both see a sequence's first token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadForm {
    /// `pooler.dense`, tanh, `classifier`, as BERT.
    Pooler,
    /// `classifier.dense`, tanh, `classifier.out_proj`, as RoBERTa.
    Own,
}

impl HeadForm {
    /// Stem of its last layer.
    pub fn last(self) -> &'static str {
        match self {
            Self::Pooler => "classifier",
            Self::Own => "classifier.out_proj",
        }
    }

    /// Name of the tensor that says whether a model has this head.
    pub fn last_tensor(self) -> String {
        format!("{}.weight", self.last())
    }
}

impl Shape {
    /// Bytes of activations that are alive together for each token of a batch, about.
    pub fn bytes_a_token(&self) -> usize {
        let heads = (2 * self.heads.query + 2 * self.heads.kv) * self.heads.dim;
        4 * (6 * self.hidden + 2 * self.intermediate + heads)
    }

    /// The stem of layer `layer`, ending in a dot.
    pub fn layer(&self, layer: usize) -> String {
        format!("{}encoder.layer.{layer}.", self.prefix)
    }
}

impl Fields<'_> {
    /// What all descendants of BERT share. Their tensors may begin with `prefix`, as in a model with a head, or
    /// with nothing, as in a bare one. Fails when a field is missing or asks for something that is not done.
    pub fn encoder(&self, source: &dyn WeightSource, prefix: &'static str, head: HeadForm) -> Result<Shape> {
        let hidden = self.count("hidden_size")?;
        let heads = self.count("num_attention_heads")?;
        if !hidden.is_multiple_of(heads) {
            return Err(self.fault(format!(
                "{heads} attention heads do not divide a hidden size of {hidden}"
            )));
        }
        let positions = self.config.get("position_embedding_type").and_then(Value::as_str);
        if let Some(other) = positions.filter(|&p| p != "absolute") {
            return Err(self.fault(format!(
                "position embeddings of type {other:?} are not supported; supported are \"absolute\""
            )));
        }
        if self.flag("is_decoder", false) {
            return Err(self.fault("\"is_decoder\" is set; only the encoder form of this model can be run"));
        }
        let dim = hidden / heads;
        let named = format!("{prefix}embeddings.word_embeddings.weight");
        Ok(Shape {
            hidden,
            layers: self.count("num_hidden_layers")?,
            heads: Heads {
                query: heads,
                kv: heads,
                dim,
                scale: (1.0 / (dim as f64).sqrt()) as f32,
                causal: false,
            },
            intermediate: self.count("intermediate_size")?,
            eps: self.float("layer_norm_eps", 1e-12) as f32,
            vocabulary: self.count("vocab_size")?,
            context: self.count("max_position_embeddings")?,
            first_position: 0,
            token_types: self.maybe("type_vocab_size")?.unwrap_or(2),
            tasks: 0,
            activation: self.activation("hidden_act", Activation::Gelu)?,
            labels: if source.contains(&head.last_tensor()) {
                self.labels()?
            } else {
                0
            },
            head,
            prefix: if source.contains(&named) { prefix } else { "" },
        })
    }

    /// Labels a config names; 2 where it names none, which is how configs of two labels are written.
    fn labels(&self) -> Result<usize> {
        match self.config.get("id2label").and_then(Value::as_object) {
            Some(names) if !names.is_empty() => Ok(names.len()),
            _ => Ok(self.maybe("num_labels")?.unwrap_or(2)),
        }
    }
}
