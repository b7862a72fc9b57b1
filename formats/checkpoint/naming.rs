//! The two name families ERNIE-4.5 checkpoints come in, and what they say about orientation.
//!
//! | family | first names | linear weights lie as |
//! |---|---|---|
//! | HF (`-PT`), and every other Hugging Face model | `model.` ... | (N, K): output rows |
//! | Paddle (`-Paddle`) | `ernie.layers.` ... | [K, N]: input rows |
//!
//! Source: the name table in the ERNIE repository's converter (`tools/paddle2torch/tran_4_5t.py`).
//! Embeddings lie as (V, H) in both families.

use serde::{Deserialize, Serialize};

/// Name family of a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Naming {
    /// Hugging Face names, linear weights (N, K).
    Hf,
    /// Paddle names, linear weights [K, N].
    Paddle,
}

/// How a linear weight lies in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Orientation {
    /// (N, K): one output row after the other.
    OutIn,
    /// [K, N]: one input row after the other; a matrix of codes is its transpose.
    InOut,
}

impl Naming {
    /// The family these tensor names belong to: Paddle when any is one of a Paddle decoder's. ERNIE 3.0 in the
    /// Hugging Face form begins with `ernie.`, too, but goes on with `embeddings`, `encoder` or `pooler`.
    pub fn of<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        const FIRST: [&str; 3] = ["ernie.layers.", "ernie.embed_tokens.", "ernie.norm."];
        let is_paddle = |name: &str| FIRST.iter().any(|first| name.starts_with(first));
        if names.into_iter().any(is_paddle) {
            Self::Paddle
        } else {
            Self::Hf
        }
    }

    /// How the linear weight `name` lies in a file of this family.
    pub fn orientation(self, name: &str) -> Orientation {
        match self {
            Self::Paddle if !name.ends_with("embed_tokens.weight") => Orientation::InOut,
            _ => Orientation::OutIn,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn family_and_orientation() {
        assert_eq!(Naming::of(["model.norm.weight"]), Naming::Hf);
        let older = ["ernie.encoder.layer.0.output.dense.weight", "classifier.weight"];
        assert_eq!(Naming::of(older), Naming::Hf, "ERNIE 3.0");
        let paddle = Naming::of(["lm_head.weight", "ernie.norm.weight"]);
        assert_eq!(paddle, Naming::Paddle);
        assert_eq!(
            paddle.orientation("ernie.layers.0.mlp.down_proj.weight"),
            Orientation::InOut
        );
        assert_eq!(
            paddle.orientation("ernie.embed_tokens.weight"),
            Orientation::OutIn
        );
        assert_eq!(
            Naming::Hf.orientation("model.layers.0.mlp.down_proj.weight"),
            Orientation::OutIn
        );
    }
}
