//! A BERT encoder in GGUF: its config and the names of its tensors in a checkpoint. The reverse of
//! [`crate::export::gguf`]'s page of the same name.
//!
//! A file with a classification head (`cls.output`) becomes what transformers calls `BertForSequenceClassification`, whose names
//! begin with `bert.`; one without becomes a bare `BertModel`. A file does not say which GELU the model was trained with: the exact
//! one is taken, as BERT's own is; llama.cpp computes the approximation by tanh for all.
//!
//! Source: `conversion/bert.py`, `gguf/constants.py` and `src/models/bert.cpp` of llama.cpp.

use serde_json::{Map, Value as Json, json};

use super::header::{Head, Info};

/// GGUF's name of the architecture.
pub(super) const ARCHITECTURE: &str = "bert";

/// Last layer of a classification head.
const LABELS: &str = "cls.output.weight";

/// Whether the file has a classification head.
pub(super) fn is_headed(head: &Head) -> bool {
    head.tensors.iter().any(|info| info.name == LABELS)
}

/// The config of a file, or what is missing of it.
pub(super) fn config(head: &Head) -> Result<Json, String> {
    let about = &head.metadata;
    let key = |name: &str| format!("{ARCHITECTURE}.{name}");
    let need = |name: &str| about.needed(ARCHITECTURE, name);
    let rows = |name: &str| {
        let found: Option<&Info> = head.tensors.iter().find(|info| info.name == name);
        found
            .and_then(|info| info.shape.first().copied())
            .ok_or_else(|| format!("{name} is missing; expected a model"))
    };
    if about.flag(&key("attention.causal")) == Some(true) {
        return Err(format!(
            "{} is set; only the encoder form of this model can be run",
            key("attention.causal")
        ));
    }
    let headed = is_headed(head);
    let class = if headed {
        "BertForSequenceClassification"
    } else {
        "BertModel"
    };
    let epsilon = about.number(&key("attention.layer_norm_epsilon"));
    let mut config = json!({
        "architectures": [class],
        "model_type": "bert",
        "hidden_size": need("embedding_length")?,
        "intermediate_size": need("feed_forward_length")?,
        "num_hidden_layers": need("block_count")?,
        "num_attention_heads": need("attention.head_count")?,
        "max_position_embeddings": need("context_length")?,
        "position_embedding_type": "absolute",
        "type_vocab_size": rows("token_types.weight")?,
        "vocab_size": rows("token_embd.weight")?,
        "layer_norm_eps": epsilon.unwrap_or(1e-12),
        "hidden_act": "gelu",
    });
    if let Some(object) = config.as_object_mut() {
        if let Some(pad) = about.count("tokenizer.ggml.padding_token_id") {
            object.insert("pad_token_id".to_owned(), json!(pad));
        }
        if headed {
            labels(
                about.texts(&key("classifier.output_labels")),
                rows(LABELS)?,
                object,
            )?;
        }
    }
    Ok(config)
}

/// Puts the labels of a head of `rows` rows into a config, or says that they are of another number.
fn labels(names: &[String], rows: usize, config: &mut Map<String, Json>) -> Result<(), String> {
    if names.is_empty() {
        config.insert("num_labels".to_owned(), json!(rows));
        return Ok(());
    }
    if names.len() != rows {
        return Err(format!(
            "expected a label for each of the {rows} rows of {LABELS}, got {}",
            names.len()
        ));
    }
    let by_id: Map<String, Json> = names
        .iter()
        .enumerate()
        .map(|(id, name)| (id.to_string(), json!(name)))
        .collect();
    let by_name: Map<String, Json> = names
        .iter()
        .enumerate()
        .map(|(id, name)| (name.clone(), json!(id)))
        .collect();
    config.insert("id2label".to_owned(), Json::Object(by_id));
    config.insert("label2id".to_owned(), Json::Object(by_name));
    Ok(())
}

/// Name in a checkpoint of a tensor of a file; `headed` says whether that has a classification head.
pub(super) fn checkpoint_name(name: &str, headed: bool) -> Option<String> {
    let (block, ending) = name.rsplit_once('.')?;
    if !["weight", "bias"].contains(&ending) {
        return None;
    }
    let prefix = if headed { "bert." } else { "" };
    let module = match block {
        "cls.output" => return Some(format!("classifier.{ending}")),
        "token_embd" => "embeddings.word_embeddings",
        "position_embd" => "embeddings.position_embeddings",
        "token_types" => "embeddings.token_type_embeddings",
        "token_embd_norm" => "embeddings.LayerNorm",
        "cls" => "pooler.dense",
        _ => {
            let (layer, rest) = block.strip_prefix("blk.")?.split_once('.')?;
            let layer: u32 = layer.parse().ok()?;
            let module = match rest {
                "attn_q" => "attention.self.query",
                "attn_k" => "attention.self.key",
                "attn_v" => "attention.self.value",
                "attn_output" => "attention.output.dense",
                "attn_output_norm" => "attention.output.LayerNorm",
                "ffn_up" => "intermediate.dense",
                "ffn_down" => "output.dense",
                "layer_output_norm" => "output.LayerNorm",
                _ => return None,
            };
            return Some(format!("{prefix}encoder.layer.{layer}.{module}.{ending}"));
        }
    };
    Some(format!("{prefix}{module}.{ending}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::gguf::model::Model;

    #[test]
    fn names_are_those_of_the_checkpoint_again() {
        let config = json!({"model_type": "bert", "num_attention_heads": 4, "hidden_size": 64, "vocab_size": 96,
            "num_hidden_layers": 2, "max_position_embeddings": 64, "intermediate_size": 128});
        let model = Model::of(&config, true).unwrap();
        let mut checked = 0;
        for module in [
            "embeddings.word_embeddings",
            "embeddings.position_embeddings",
            "embeddings.token_type_embeddings",
            "embeddings.LayerNorm",
            "pooler.dense",
            "encoder.layer.1.attention.self.query",
            "encoder.layer.1.attention.self.key",
            "encoder.layer.1.attention.self.value",
            "encoder.layer.1.attention.output.dense",
            "encoder.layer.1.attention.output.LayerNorm",
            "encoder.layer.1.intermediate.dense",
            "encoder.layer.1.output.dense",
            "encoder.layer.1.output.LayerNorm",
        ] {
            for (headed, prefix) in [(true, "bert."), (false, "")] {
                for ending in ["weight", "bias"] {
                    let name = format!("{prefix}{module}.{ending}");
                    let theirs = model.name_of(&name).unwrap();
                    assert_eq!(checkpoint_name(&theirs, headed), Some(name));
                    checked += 1;
                }
            }
        }
        assert_eq!(checked, 13 * 4);
        let head = model.name_of("classifier.bias").unwrap();
        assert_eq!(checkpoint_name(&head, true).unwrap(), "classifier.bias");
        for name in ["blk.0.attn_qkv.weight", "blk.x.attn_q.weight", "token_embd.scale"] {
            assert_eq!(checkpoint_name(name, false), None, "{name}");
        }
    }

    #[test]
    fn labels_are_as_many_as_rows() {
        let names = ["a".to_owned(), "b".to_owned()];
        let mut config = Map::new();
        labels(&names, 2, &mut config).unwrap();
        assert_eq!(config["id2label"], json!({"0": "a", "1": "b"}));
        labels(&[], 3, &mut config).unwrap();
        assert_eq!(config["num_labels"], json!(3));
        let message = labels(&names, 3, &mut config).unwrap_err();
        assert!(
            message.contains("3 rows of cls.output.weight, got 2"),
            "{message}"
        );
    }
}
