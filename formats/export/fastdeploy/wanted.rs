//! What a FastDeploy folder holds in which form, and the `config.json` that says so. One width is
//! asked for; the loader decides what goes with it: FastDeploy has no INT8 experts offline, experts
//! of 4 bits exist only inside its 2-bit mixture, and nothing dense has 2 bits.

use std::path::Path;

use serde_json::{Value, json};

use super::ernie::{Ernie, Kind};
use super::refusal;
use crate::Result;

/// How a linear weight is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Store {
    /// Per channel, codes of -127..127.
    Int8,
    /// Per channel, codes of -7..7.
    Int4,
    /// The 2-bit code of experts.
    Wint2,
}

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted {
    /// 8, 4 or 2.
    pub bits: u8,
    /// With 2 bits: experts up to this layer get INT4.
    pub w4_until: Option<usize>,
}

/// Sentence for a dense model and 2 bits.
const NO_DENSE_2_BIT: &str = "FastDeploy has 2-bit weights for routed experts only, and this model has none; three ways out: --bits 8 or --bits 4, which FastDeploy loads; `qtool export --to bf16` of a 2-bit artifact, which FastDeploy serves in BF16; or leave --format out for qtool's own artifact, which FastDeploy does not load";

impl Wanted {
    /// Fails when FastDeploy's loader has nothing of the kind for this model.
    pub fn check(&self, model: &Ernie, path: &Path) -> Result<()> {
        let refuse = |reason: &str| Err(refusal(path, reason.to_owned()));
        match (self.bits, &model.moe) {
            (2, None) => refuse(NO_DENSE_2_BIT),
            (8, Some(_)) => refuse(
                "FastDeploy's loader takes no INT8 experts from a file; pass --bits 4 (INT4 experts) or --bits 2 (2-bit experts); all other linear weights are INT8 in both",
            ),
            (2 | 4 | 8, _) if self.bits != 2 && self.w4_until.is_some() => {
                refuse("--w4-until belongs to --bits 2, the mixture of INT4 and 2-bit experts")
            }
            (2 | 4 | 8, _) => match self.w4_until {
                Some(layer) if layer >= model.layers => Err(refusal(
                    path,
                    format!(
                        "--w4-until {layer}: the last layer is {}; pass --bits 4 for INT4 experts throughout",
                        model.layers - 1
                    ),
                )),
                _ => Ok(()),
            },
            _ => refuse("FastDeploy loads 8, 4 and 2 bits; pass --bits 8, 4 or 2"),
        }
    }

    /// How a tensor is stored, or `None` when it is not quantized.
    pub fn store(&self, model: &Ernie, kind: Kind) -> Option<Store> {
        match kind {
            Kind::Linear if model.moe.is_none() && self.bits == 4 => Some(Store::Int4),
            Kind::Linear => Some(Store::Int8),
            Kind::Expert { layer } if self.bits == 2 && self.w4_until.is_none_or(|last| layer > last) => {
                Some(Store::Wint2)
            }
            Kind::Expert { .. } => Some(Store::Int4),
            _ => None,
        }
    }

    /// Last layer whose experts are INT4, as FastDeploy counts: -1 for none.
    fn w4_end(&self, model: &Ernie) -> i64 {
        match self.bits {
            2 => self.w4_until.map_or(-1, |layer| layer as i64),
            _ => model.layers as i64 - 1,
        }
    }

    fn quantization_config(&self, model: &Ernie) -> Value {
        if model.moe.is_none() {
            return json!({"quantization": format!("wint{}", self.bits), "is_quantized": true});
        }
        let end = self.w4_end(model);
        json!({
            "quantization": "wint2",
            "is_quantized": true,
            // Older FastDeploy reads the second key, newer the first.
            "dense_quant_type": "wint8",
            "dense_quant_config": "wint8",
            "moe_quant_type": "w4w2",
            "moe_quant_config": {
                "quant_type": "w4w2",
                "moe_w4_quant_config": {
                    "quant_type": "wint4", "quant_granularity": "per_channel",
                    "quant_start_layer": 0, "quant_end_layer": end,
                },
                "moe_w2_quant_config": {
                    "quant_type": "wint2", "quant_granularity": "pp_acc", "quant_group_size": 64,
                    "quant_start_layer": end + 1, "quant_end_layer": model.layers as i64 - 1,
                },
            },
        })
    }

    /// The model's `config.json` as FastDeploy asks for it: `dtype` instead of `torch_dtype` marks
    /// Paddle's form, `is_quantized` the path that loads codes. The multi-token prediction block is
    /// not written, so its count goes, too.
    pub fn config(&self, model: &Ernie, mut config: Value, has_router_bias: bool) -> Value {
        if let Some(object) = config.as_object_mut() {
            for gone in ["torch_dtype", "num_nextn_predict_layers", "auto_map"] {
                object.shift_remove(gone);
            }
            object.insert("architectures".to_owned(), json!([model.architecture()]));
            object.insert("dtype".to_owned(), json!("bfloat16"));
            object.insert("head_dim".to_owned(), json!(model.head_dim));
            object.insert("tie_word_embeddings".to_owned(), json!(model.tied));
            if has_router_bias {
                object.insert("moe_use_aux_free".to_owned(), json!(true));
            }
            object.insert("is_quantized".to_owned(), json!(true));
            object.insert("quantization_config".to_owned(), self.quantization_config(model));
        }
        config
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(experts: usize) -> Ernie {
        let config = json!({
            "model_type": if experts > 0 { "ernie4_5_moe" } else { "ernie4_5" },
            "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4,
            "num_attention_heads": 2, "vocab_size": 32, "moe_num_experts": experts,
            "moe_intermediate_size": 128, "moe_layer_start_index": 1,
        });
        Ernie::from_config(Path::new("config.json"), &config).unwrap()
    }

    #[test]
    fn stores_follow_the_layer() {
        let wanted = |bits, w4_until| Wanted { bits, w4_until };
        let expert = |layer| Kind::Expert { layer };
        let (dense, moe) = (model(0), model(4));
        assert_eq!(wanted(4, None).store(&dense, Kind::Linear), Some(Store::Int4));
        assert_eq!(wanted(4, None).store(&moe, Kind::Linear), Some(Store::Int8));
        assert_eq!(wanted(4, None).store(&moe, expert(3)), Some(Store::Int4));
        let mixed = wanted(2, Some(2));
        assert_eq!(mixed.store(&moe, expert(2)), Some(Store::Int4));
        assert_eq!(mixed.store(&moe, expert(3)), Some(Store::Wint2));
        assert_eq!(mixed.store(&moe, Kind::Router), None);
        assert_eq!(wanted(2, None).store(&moe, expert(1)), Some(Store::Wint2));
    }

    #[test]
    fn configs_by_hand() {
        let (dense, moe) = (model(0), model(4));
        let source = json!({"torch_dtype": "bfloat16", "num_nextn_predict_layers": 1});
        let eight = Wanted {
            bits: 8,
            w4_until: None,
        }
        .config(&dense, source.clone(), false);
        assert_eq!(
            eight,
            json!({
                "architectures": ["Ernie4_5_ForCausalLM"], "dtype": "bfloat16", "head_dim": 64,
                "tie_word_embeddings": true, "is_quantized": true,
                "quantization_config": {"quantization": "wint8", "is_quantized": true},
            })
        );
        let end = |bits, w4_until| {
            let config = Wanted { bits, w4_until }.config(&moe, source.clone(), true);
            assert_eq!(config["moe_use_aux_free"], json!(true));
            config["quantization_config"]["moe_quant_config"]["moe_w4_quant_config"]["quant_end_layer"]
                .clone()
        };
        assert_eq!(
            [end(2, None), end(2, Some(2)), end(4, None)],
            [json!(-1), json!(2), json!(3)]
        );
    }

    #[test]
    fn what_the_loader_lacks_is_refused_with_a_way_out() {
        for (experts, bits, w4_until, words) in [
            (0, 2, None, ["three ways out", "--bits 4"]),
            (4, 8, None, ["--bits 4", "--bits 2"]),
            (4, 4, Some(2), ["--w4-until", "--bits 2"]),
            (4, 2, Some(4), ["last layer is 3", "--bits 4"]),
            (0, 3, None, ["8, 4 and 2", "--bits"]),
        ] {
            let wanted = Wanted { bits, w4_until };
            let message = wanted
                .check(&model(experts), Path::new("m"))
                .unwrap_err()
                .to_string();
            assert!(words.iter().all(|w| message.contains(w)), "{message}");
        }
    }
}
