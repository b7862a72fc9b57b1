//! ERNIE-4.5 text models as FastDeploy asks for them: from `config.json` alone, every tensor of the
//! model by its Paddle name, with its shape, how it is split between ranks, and which tensors of a
//! checkpoint in the Hugging Face form it is made of. Owns names and shapes, no bytes.
//!
//! | Hugging Face, (N, K) | Paddle, [K, N] where linear | split |
//! |---|---|---|
//! | `model.embed_tokens.weight` (V, H) | `ernie.embed_tokens.weight` [V, H] | rows |
//! | `..self_attn.{q,k,v}_proj.weight` | `..self_attn.qkv_proj.weight`, columns q, k, v | heads |
//! | `..self_attn.o_proj.weight` | the same | K |
//! | `..mlp.{gate,up}_proj.weight` | `..mlp.up_gate_proj.weight`, columns gate, up | each half |
//! | `..mlp.down_proj.weight` | the same | K |
//! | `..mlp.gate.weight` (E, H) | the same, [H, E], F32 | none |
//! | `..mlp.moe_statics.e_score_correction_bias` [1, E] | the same, F32 | none |
//! | norms | the same | none |
//! | `lm_head.weight` (V, H), unless tied | the same, [H, V] | V |
//!
//! `..mlp` is `layers.I.mlp`, `layers.I.mlp.experts.E` or `layers.I.mlp.shared_experts`. Sources: the
//! ERNIE repository's converter `tools/paddle2torch/tran_4_5t.py`, FastDeploy's `ernie4_5_moe.py`,
//! `layers/embeddings.py`, `layers/lm_head.py`.

use std::path::Path;

use serde_json::Value;

use super::refusal;
use crate::Result;
use crate::checkpoint::Orientation;
use crate::error::quoted;

/// Shapes of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ernie {
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of a dense MLP.
    pub intermediate: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocab: usize,
    /// Whether the output head is the embedding.
    pub tied: bool,
    /// The experts, if any.
    pub moe: Option<Moe>,
}

/// Experts of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moe {
    /// Routed experts of a layer.
    pub experts: usize,
    /// Width of a routed expert.
    pub intermediate: usize,
    /// Shared experts of a layer, fused into one MLP of as many times the width.
    pub shared: usize,
    /// First layer with experts.
    pub first: usize,
    /// Last layer with experts.
    pub last: usize,
    /// Every how many layers experts come.
    pub interval: usize,
    /// Whether the router must have its correction bias.
    pub needs_bias: bool,
}

/// What a tensor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Token embedding.
    Embedding,
    /// A norm's weights.
    Norm,
    /// Untied output head.
    Head,
    /// Router weights.
    Router,
    /// Correction bias of a router.
    RouterBias,
    /// A linear weight outside of routed experts.
    Linear,
    /// A linear weight of a routed expert of this layer.
    Expert {
        /// The layer.
        layer: usize,
    },
}

/// How ranks share a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// Every rank has all of it.
    None,
    /// Every rank has a run of rows of each segment.
    Rows,
    /// Every rank has a run of columns.
    Columns,
}

/// A tensor of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Logical {
    /// Paddle name.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// Columns of its matrix. The matrix of a linear weight is (N, K); of any other tensor it is
    /// what FastDeploy stores.
    pub columns: usize,
    /// Hugging Face names of what is stacked in it, with the rows of each.
    pub segments: Vec<(String, usize)>,
    /// How ranks share it.
    pub split: Split,
}

impl Logical {
    /// Rows of the matrix.
    pub fn rows(&self) -> usize {
        self.segments.iter().map(|(_, rows)| rows).sum()
    }

    /// Whether it is quantized.
    pub fn is_linear(&self) -> bool {
        matches!(self.kind, Kind::Linear | Kind::Expert { .. })
    }

    /// How the matrix lies in a checkpoint of the Hugging Face form, and in one of the Paddle form.
    pub fn orientations(&self) -> (Orientation, Orientation) {
        match self.kind {
            Kind::Linear | Kind::Expert { .. } => (Orientation::OutIn, Orientation::InOut),
            Kind::Head | Kind::Router => (Orientation::InOut, Orientation::OutIn),
            Kind::Embedding | Kind::Norm | Kind::RouterBias => (Orientation::OutIn, Orientation::OutIn),
        }
    }
}

/// Architectures FastDeploy's ERNIE-4.5 loader serves: as named by various libraries, and as
/// written into exported configs.
const ARCHITECTURES: [(&str, &str); 4] = [
    ("Ernie4_5_ForCausalLM", "Ernie4_5_ForCausalLM"),
    ("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"),
    ("Ernie4_5_MoeForCausalLM", "Ernie4_5_MoeForCausalLM"),
    ("Ernie4_5_MoEForCausalLM", "Ernie4_5_MoeForCausalLM"),
];

impl Ernie {
    /// The model a `config.json` describes. Fails when it is no ERNIE-4.5 text model, or lacks a
    /// shape; `path` is named in messages.
    pub fn from_config(path: &Path, config: &Value) -> Result<Self> {
        let architecture = architecture(path, config)?;
        if config.get("use_bias").and_then(Value::as_bool) == Some(true) {
            return Err(refusal(
                path,
                "use_bias is true; FastDeploy's offline layout is written for ERNIE-4.5 without biases"
                    .to_owned(),
            ));
        }
        let number = |key: &str| match config.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_u64().and_then(|n| usize::try_from(n).ok()) {
                Some(number) if number <= u32::MAX as usize => Ok(Some(number)),
                _ => {
                    let got = quoted(&value.to_string());
                    Err(refusal(path, format!("{key}: expected a number, got {got}")))
                }
            },
        };
        let need = |key: &str| {
            number(key)?
                .filter(|&n| n > 0)
                .ok_or_else(|| refusal(path, format!("{key} is missing; expected a positive number")))
        };
        let (hidden, heads, layers) = (
            need("hidden_size")?,
            need("num_attention_heads")?,
            need("num_hidden_layers")?,
        );
        let experts = number("moe_num_experts")?.unwrap_or(0);
        if experts == 0 && architecture == "Ernie4_5_MoeForCausalLM" {
            return Err(refusal(
                path,
                "moe_num_experts is missing; expected the number of experts of Ernie4_5_MoeForCausalLM"
                    .to_owned(),
            ));
        }
        let moe = if experts == 0 {
            None
        } else {
            let end = config.get("moe_layer_end_index").and_then(Value::as_i64);
            let last = end
                .and_then(|end| usize::try_from(end).ok())
                .unwrap_or(layers - 1);
            Some(Moe {
                experts,
                intermediate: need("moe_intermediate_size")?,
                shared: number("moe_num_shared_experts")?.unwrap_or(0),
                first: number("moe_layer_start_index")?.unwrap_or(0),
                last: last.min(layers - 1),
                interval: number("moe_layer_interval")?.unwrap_or(1).max(1),
                needs_bias: config.get("moe_use_aux_free").and_then(Value::as_bool) == Some(true),
            })
        };
        Ok(Self {
            hidden,
            intermediate: need("intermediate_size")?,
            layers,
            heads,
            kv_heads: number("num_key_value_heads")?.unwrap_or(heads),
            head_dim: number("head_dim")?.unwrap_or(hidden / heads),
            vocab: need("vocab_size")?,
            tied: config
                .get("tie_word_embeddings")
                .and_then(Value::as_bool)
                .unwrap_or(true),
            moe,
        })
    }

    /// FastDeploy's name of the architecture.
    pub fn architecture(&self) -> &'static str {
        match self.moe {
            Some(_) => "Ernie4_5_MoeForCausalLM",
            None => "Ernie4_5_ForCausalLM",
        }
    }

    /// The experts of a layer, or `None` when its MLP is dense.
    pub fn experts_of(&self, layer: usize) -> Option<&Moe> {
        self.moe
            .as_ref()
            .filter(|moe| (moe.first..=moe.last).contains(&layer) && (layer + 1).is_multiple_of(moe.interval))
    }

    /// Every tensor of the model, layer by layer. The correction bias of routers is among them
    /// whether the checkpoint must have it or not.
    pub fn tensors(&self) -> Vec<Logical> {
        let hidden = self.hidden;
        let mut all = vec![plain("embed_tokens.weight", Kind::Embedding, self.vocab, hidden)];
        for layer in 0..self.layers {
            let at = format!("layers.{layer}");
            let norm = |name: &str| plain(&format!("{at}.{name}.weight"), Kind::Norm, 1, hidden);
            all.push(norm("input_layernorm"));
            let attention = format!("{at}.self_attn");
            let (q, kv) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
            let qkv = [("q_proj", q), ("k_proj", kv), ("v_proj", kv)];
            all.push(linear(
                &attention,
                "qkv_proj",
                &qkv,
                hidden,
                Kind::Linear,
                Split::Rows,
            ));
            let o = [("o_proj", hidden)];
            all.push(linear(&attention, "o_proj", &o, q, Kind::Linear, Split::Columns));
            all.push(norm("post_attention_layernorm"));
            let mlp = |all: &mut Vec<Logical>, at: &str, width: usize, kind: Kind| {
                let halves = [("gate_proj", width), ("up_proj", width)];
                all.push(linear(at, "up_gate_proj", &halves, hidden, kind, Split::Rows));
                let down = [("down_proj", hidden)];
                all.push(linear(at, "down_proj", &down, width, kind, Split::Columns));
            };
            let at = format!("{at}.mlp");
            let Some(moe) = self.experts_of(layer) else {
                mlp(&mut all, &at, self.intermediate, Kind::Linear);
                continue;
            };
            all.push(plain(
                &format!("{at}.gate.weight"),
                Kind::Router,
                hidden,
                moe.experts,
            ));
            let bias = format!("{at}.moe_statics.e_score_correction_bias");
            all.push(plain(&bias, Kind::RouterBias, 1, moe.experts));
            for expert in 0..moe.experts {
                let at = format!("{at}.experts.{expert}");
                mlp(&mut all, &at, moe.intermediate, Kind::Expert { layer });
            }
            if moe.shared > 0 {
                let at = format!("{at}.shared_experts");
                mlp(&mut all, &at, moe.intermediate * moe.shared, Kind::Linear);
            }
        }
        all.push(plain("norm.weight", Kind::Norm, 1, hidden));
        if !self.tied {
            let name = "lm_head.weight".to_owned();
            all.push(Logical {
                segments: vec![(name.clone(), hidden)],
                name,
                kind: Kind::Head,
                columns: self.vocab,
                split: Split::Columns,
            });
        }
        all
    }
}

fn plain(name: &str, kind: Kind, rows: usize, columns: usize) -> Logical {
    let split = if kind == Kind::Embedding {
        Split::Rows
    } else {
        Split::None
    };
    Logical {
        name: format!("ernie.{name}"),
        kind,
        columns,
        segments: vec![(format!("model.{name}"), rows)],
        split,
    }
}

fn linear(at: &str, name: &str, parts: &[(&str, usize)], k: usize, kind: Kind, split: Split) -> Logical {
    let segment = |(part, rows): &(&str, usize)| (format!("model.{at}.{part}.weight"), *rows);
    Logical {
        name: format!("ernie.{at}.{name}.weight"),
        kind,
        columns: k,
        segments: parts.iter().map(segment).collect(),
        split,
    }
}

/// FastDeploy's name of the config's architecture.
fn architecture(path: &Path, config: &Value) -> Result<&'static str> {
    let supported = "--format fastdeploy is for ERNIE-4.5 text models (Ernie4_5_ForCausalLM and Ernie4_5_MoeForCausalLM); leave --format out for qtool's own artifact of any model";
    let named = config
        .get("architectures")
        .and_then(|list| list.get(0))
        .and_then(Value::as_str);
    let from_type = match config.get("model_type").and_then(Value::as_str) {
        Some("ernie4_5") => Some("Ernie4_5_ForCausalLM"),
        Some("ernie4_5_moe") => Some("Ernie4_5_MoeForCausalLM"),
        _ => None,
    };
    let Some(name) = named.or(from_type) else {
        return Err(refusal(path, format!("names no architecture; {supported}")));
    };
    ARCHITECTURES
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, ours)| *ours)
        .ok_or_else(|| refusal(path, format!("the architecture is {}; {supported}", quoted(name))))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn model(config: &Value) -> Result<Ernie> {
        Ernie::from_config(Path::new("config.json"), config)
    }

    /// The published shapes of 0.3B.
    #[test]
    fn dense_by_hand() {
        let config = json!({
            "architectures": ["Ernie4_5ForCausalLM"], "hidden_size": 1024, "intermediate_size": 3072,
            "num_hidden_layers": 18, "num_attention_heads": 16, "num_key_value_heads": 2,
            "head_dim": 128, "vocab_size": 103424, "tie_word_embeddings": true,
        });
        let model = model(&config).unwrap();
        assert_eq!(model.architecture(), "Ernie4_5_ForCausalLM");
        let tensors = model.tensors();
        assert_eq!(tensors.len(), 2 + 18 * 6);
        let qkv = &tensors[2];
        assert_eq!(qkv.name, "ernie.layers.0.self_attn.qkv_proj.weight");
        assert_eq!((qkv.rows(), qkv.columns), (2560, 1024));
        assert_eq!(qkv.segments[1].0, "model.layers.0.self_attn.k_proj.weight");
        let weights: usize = tensors.iter().map(|t| t.rows() * t.columns).sum();
        assert_eq!(weights, 360_748_032);
    }

    #[test]
    fn experts_by_hand() {
        let mut config = json!({
            "architectures": ["Ernie4_5_MoeForCausalLM"], "hidden_size": 2560, "intermediate_size": 12288,
            "num_hidden_layers": 28, "num_attention_heads": 20, "num_key_value_heads": 4,
            "vocab_size": 103424, "tie_word_embeddings": false, "moe_num_experts": 64,
            "moe_intermediate_size": 1536, "moe_num_shared_experts": 2, "moe_layer_start_index": 1,
            "moe_layer_end_index": -1,
        });
        let tensors = model(&config).unwrap().tensors();
        assert_eq!(tensors.len(), 3 + 28 * 4 + 2 + 27 * (2 + 2 * 64 + 2));
        let shared = tensors.iter().find(|t| t.name.contains("shared_experts.down"));
        assert_eq!(shared.map(|t| (t.rows(), t.columns)), Some((2560, 3072)));
        config["moe_num_experts"] = json!([64, 64]);
        assert!(
            model(&config)
                .unwrap_err()
                .to_string()
                .contains("moe_num_experts")
        );
        config["architectures"] = json!(["LlamaForCausalLM"]);
        let message = model(&config).unwrap_err().to_string();
        assert!(
            message.contains("LlamaForCausalLM") && message.contains("Ernie4_5_ForCausalLM"),
            "{message}"
        );
    }
}
