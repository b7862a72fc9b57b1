//! What llama.cpp must know of a BERT encoder: its dimensions and the names of its tensors. llama.cpp runs it for embeddings,
//! and with a classification head for its labels; all tokens have type 0 there.
//!
//! Source: `conversion/bert.py`, `gguf/constants.py` and `src/models/bert.cpp` of llama.cpp.

use serde_json::Value as Json;

use super::file::Value;
use super::model::Model;

/// GGUF's number of the pooling that ends in labels.
const POOL_RANK: u32 = 4;

/// Reads a config, or says why it cannot be expressed. `headed` says whether the checkpoint has a classification head.
pub(super) fn model(config: &Json, headed: bool) -> Result<Model, String> {
    let number = |key: &str| {
        config
            .get(key)
            .and_then(Json::as_u64)
            .and_then(|v| u32::try_from(v).ok())
            .filter(|v| *v > 0)
    };
    let need = |key: &str| number(key).ok_or_else(|| format!("config.json: expected a number {key}"));
    let text = |key: &str, default: &'static str| {
        config
            .get(key)
            .and_then(Json::as_str)
            .unwrap_or(default)
            .to_owned()
    };
    // llama.cpp has the approximation by tanh for all of these.
    let activation = text("hidden_act", "gelu");
    if !["gelu", "gelu_new", "gelu_pytorch_tanh"].contains(&activation.as_str()) {
        return Err(format!(
            "the config's hidden_act is {activation:?}, and llama.cpp's bert has GELU; export --to bf16"
        ));
    }
    let positions = text("position_embedding_type", "absolute");
    if positions != "absolute" {
        return Err(format!(
            "the config's position_embedding_type is {positions:?}, and llama.cpp's bert has absolute ones; export --to bf16"
        ));
    }
    let (heads, hidden) = (need("num_attention_heads")?, need("hidden_size")?);
    let vocabulary = need("vocab_size")?;
    let epsilon = config.get("layer_norm_eps").and_then(Json::as_f64);
    let key = |name: &str, value| (format!("bert.{name}"), value);
    let mut keys = vec![
        key("block_count", Value::U32(need("num_hidden_layers")?)),
        key("context_length", Value::U32(need("max_position_embeddings")?)),
        key("embedding_length", Value::U32(hidden)),
        key("feed_forward_length", Value::U32(need("intermediate_size")?)),
        key("attention.head_count", Value::U32(heads)),
        key(
            "attention.layer_norm_epsilon",
            Value::F32(epsilon.unwrap_or(1e-12) as f32),
        ),
        key("attention.causal", Value::Bool(false)),
        (
            "tokenizer.ggml.token_type_count".to_owned(),
            Value::U32(number("type_vocab_size").unwrap_or(2)),
        ),
    ];
    if headed {
        keys.push(key("pooling_type", Value::U32(POOL_RANK)));
        keys.push(key("classifier.output_labels", Value::Texts(labels(config))));
    }
    Ok(Model {
        architecture: "bert",
        head_dim: (hidden / heads) as usize,
        keys,
        rope_factors: Vec::new(),
        experts: 0,
        vocabulary: vocabulary as usize,
    })
}

/// Names of the labels by number; transformers has two where the config has none.
fn labels(config: &Json) -> Vec<String> {
    let named = config.get("id2label").and_then(Json::as_object);
    let mut labels: Vec<(u64, String)> = named
        .into_iter()
        .flatten()
        .filter_map(|(id, name)| Some((id.parse().ok()?, name.as_str()?.to_owned())))
        .collect();
    labels.sort();
    if labels.is_empty() {
        return vec!["LABEL_0".to_owned(), "LABEL_1".to_owned()];
    }
    labels.into_iter().map(|(_, name)| name).collect()
}

/// A tensor's name without the prefix that models with a head have.
pub(super) fn bare(name: &str) -> &str {
    name.strip_prefix("bert.").unwrap_or(name)
}

/// Whether a tensor belongs to a classification head.
pub(super) fn is_head(name: &str) -> bool {
    name.starts_with("classifier.")
}

/// Name in GGUF of a tensor of a checkpoint.
pub(super) fn tensor_name(name: &str) -> Option<String> {
    let (module, ending) = bare(name).rsplit_once('.')?;
    let ending = match ending {
        "weight" | "gamma" => "weight",
        "bias" | "beta" => "bias",
        _ => return None,
    };
    let whole = match module {
        "embeddings.word_embeddings" => "token_embd",
        "embeddings.position_embeddings" => "position_embd",
        "embeddings.token_type_embeddings" => "token_types",
        "embeddings.LayerNorm" => "token_embd_norm",
        "pooler.dense" => "cls",
        "classifier" => "cls.output",
        _ => "",
    };
    if !whole.is_empty() {
        return Some(format!("{whole}.{ending}"));
    }
    let (layer, rest) = module.strip_prefix("encoder.layer.")?.split_once('.')?;
    let layer: u32 = layer.parse().ok()?;
    let block = match rest {
        "attention.self.query" => "attn_q",
        "attention.self.key" => "attn_k",
        "attention.self.value" => "attn_v",
        "attention.output.dense" => "attn_output",
        "attention.output.LayerNorm" => "attn_output_norm",
        "intermediate.dense" => "ffn_up",
        "output.dense" => "ffn_down",
        "output.LayerNorm" => "layer_output_norm",
        _ => return None,
    };
    Some(format!("blk.{layer}.{block}.{ending}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn names_and_dimensions() {
        let name = |name: &str| tensor_name(name).unwrap_or_default();
        assert_eq!(
            name("bert.encoder.layer.3.attention.self.key.bias"),
            "blk.3.attn_k.bias"
        );
        assert_eq!(
            name("encoder.layer.0.output.LayerNorm.gamma"),
            "blk.0.layer_output_norm.weight"
        );
        assert_eq!(
            name("embeddings.token_type_embeddings.weight"),
            "token_types.weight"
        );
        assert_eq!(name("cls.predictions.bias"), "");
        let config = json!({"num_attention_heads": 4, "hidden_size": 64, "vocab_size": 96, "num_hidden_layers": 2,
            "max_position_embeddings": 64, "intermediate_size": 128, "id2label": {"1": "b", "0": "a"}});
        let plain = model(&config, false).unwrap();
        assert_eq!((plain.head_dim, plain.vocabulary), (16, 96));
        assert!(
            !plain
                .keys
                .iter()
                .any(|(key, _)| key.contains("pooling") || key.contains("labels"))
        );
        let headed = model(&config, true).unwrap();
        let labels = Value::Texts(vec!["a".to_owned(), "b".to_owned()]);
        assert!(
            headed
                .keys
                .contains(&("bert.classifier.output_labels".to_owned(), labels))
        );
        for (key, value, word) in [
            ("hidden_act", json!("silu"), "silu"),
            ("position_embedding_type", json!("relative_key"), "relative_key"),
            ("hidden_size", json!(-1), "hidden_size"),
        ] {
            let mut damaged = config.clone();
            damaged[key] = value;
            assert!(model(&damaged, false).unwrap_err().contains(word));
        }
    }
}
