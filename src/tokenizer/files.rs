//! The tokenizer inside a GGUF file as the files that a folder of Hugging Face has: what an export of such a file writes
//! beside the weights.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::config::Config;
use super::gguf::{Described, describe};
use super::sentencepiece::proto;
use crate::Result;

/// Name and bytes of each file. Fails when the file holds no tokenizer, or one of a kind that is not known.
pub fn files_of_gguf(file: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let about = qtool_formats::import::gguf::metadata(file)?;
    let (described, config) = describe(file, &about)?;
    let vocabulary = match &described {
        Described::Json(json) => ("tokenizer.json", text(json)),
        Described::Pieces(model) => ("tokenizer.model", proto::write(model)),
    };
    let mut files = vec![
        vocabulary,
        ("tokenizer_config.json", text(&about_tokens(&config))),
    ];
    if let Some(template) = &config.template {
        files.push(("chat_template.jinja", template.text.clone().into_bytes()));
    }
    Ok(files
        .into_iter()
        .map(|(name, bytes)| (name.to_owned(), bytes))
        .collect())
}

fn text(json: &Value) -> Vec<u8> {
    format!("{json:#}\n").into_bytes()
}

/// `tokenizer_config.json`.
fn about_tokens(config: &Config) -> Value {
    let mut about = Map::new();
    let class = config.class.as_deref().unwrap_or("PreTrainedTokenizerFast");
    about.insert("tokenizer_class".to_owned(), json!(class));
    for (key, flag) in [
        ("add_bos_token", config.add_bos),
        ("add_eos_token", config.add_eos),
    ] {
        if let Some(flag) = flag {
            about.insert(key.to_owned(), json!(flag));
        }
    }
    for (name, token) in &config.specials {
        about.insert(name.clone(), json!(token));
    }
    let added: Map<String, Value> = config
        .added
        .iter()
        .filter_map(|token| {
            let about = json!({"content": token.content, "special": token.special, "lstrip": token.lstrip,
                "rstrip": token.rstrip, "single_word": false, "normalized": false});
            Some((token.id?.to_string(), about))
        })
        .collect();
    about.insert("added_tokens_decoder".to_owned(), Value::Object(added));
    Value::Object(about)
}
