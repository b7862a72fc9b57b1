//! The tokenizer's keys of a GGUF file, from `tokenizer.json` and the configs beside it: byte-level BPE, which
//! Llama 3, Qwen, SmolLM and this project's sample models have.
//!
//! llama.cpp splits text by a regular expression of its own for each family, which a file names under
//! `tokenizer.ggml.pre`; it is found here by the pre-tokenizer that `tokenizer.json` describes.
//!
//! Source: `convert_hf_to_gguf.py` and `gguf/vocab.py` of llama.cpp.

use std::path::Path;

use serde_json::Value as Json;

use super::file::Value;
use crate::Result;
use crate::checkpoint::shards::read_json;

/// Types of tokens.
const NORMAL: i32 = 1;
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// Part of the regular expression of a split, and llama.cpp's name for the family.
const SPLITS: [(&str, &str); 2] = [
    (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|", "llama-bpe"),
    (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|", "qwen2"),
];

/// Keys for a vocabulary of `vocabulary` tokens; or why the folder's tokenizer cannot be expressed.
pub fn keys(
    folder: &Path,
    config: &Json,
    vocabulary: usize,
) -> Result<std::result::Result<Vec<(String, Value)>, String>> {
    let path = folder.join("tokenizer.json");
    if !path.is_file() {
        return Ok(Err(
            "gguf holds the tokenizer too, read from tokenizer.json, which is not there; copy it into the artifact's folder".to_owned(),
        ));
    }
    let tokenizer: Json = read_json(&path)?;
    let about = folder.join("tokenizer_config.json");
    let about: Json = if about.is_file() {
        read_json(&about)?
    } else {
        Json::Null
    };
    let template = folder.join("chat_template.jinja");
    let template = match about.get("chat_template").and_then(Json::as_str) {
        Some(text) => Some(text.to_owned()),
        None => std::fs::read_to_string(template).ok(),
    };
    Ok(of(&tokenizer, &about, config, template, vocabulary))
}

fn of(
    tokenizer: &Json,
    about: &Json,
    config: &Json,
    template: Option<String>,
    vocabulary: usize,
) -> std::result::Result<Vec<(String, Value)>, String> {
    let model = tokenizer.get("model").unwrap_or(&Json::Null);
    let pre = pre_tokenizer(tokenizer.get("pre_tokenizer").unwrap_or(&Json::Null))?;
    let vocab = model
        .get("vocab")
        .and_then(Json::as_object)
        .filter(|_| model.get("type").and_then(Json::as_str) == Some("BPE"))
        .ok_or("the tokenizer is no byte-level BPE, the kind that is written to gguf")?;
    let mut tokens: Vec<Option<(String, i32)>> = vec![None; vocabulary];
    let mut put = |text: &str, id: Option<u64>, kind: i32| {
        let slot = id
            .and_then(|id| usize::try_from(id).ok())
            .and_then(|id| tokens.get_mut(id));
        match slot {
            Some(slot) => {
                *slot = Some((text.to_owned(), kind));
                Ok(())
            }
            None => Err(format!(
                "tokenizer.json has the token {} beyond the model's vocabulary of {vocabulary}",
                crate::error::quoted(text)
            )),
        }
    };
    for (text, id) in vocab {
        put(text, id.as_u64(), NORMAL)?;
    }
    let added = tokenizer.get("added_tokens").and_then(Json::as_array);
    for token in added.into_iter().flatten() {
        let text = token.get("content").and_then(Json::as_str).unwrap_or_default();
        let special = token.get("special").and_then(Json::as_bool) == Some(true);
        let kind = if special { CONTROL } else { USER_DEFINED };
        put(text, token.get("id").and_then(Json::as_u64), kind)?;
    }
    let merges: Vec<String> = model
        .get("merges")
        .and_then(Json::as_array)
        .into_iter()
        .flatten()
        .map(|merge| match merge {
            Json::String(text) => text.clone(),
            pair => {
                let parts = pair.as_array().into_iter().flatten().filter_map(Json::as_str);
                parts.collect::<Vec<_>>().join(" ")
            }
        })
        .collect();
    let id_of = |text: &str| {
        tokens
            .iter()
            .position(|t| t.as_ref().is_some_and(|(known, _)| known == text))
    };
    let mut keys = vec![
        ("tokenizer.ggml.model", Value::Text("gpt2".to_owned())),
        ("tokenizer.ggml.pre", Value::Text(pre.to_owned())),
    ];
    for (key, role) in [
        ("bos", "bos_token"),
        ("eos", "eos_token"),
        ("unknown", "unk_token"),
        ("padding", "pad_token"),
    ] {
        let named = about.get(role).map(|t| t.get("content").unwrap_or(t));
        let by_name = named.and_then(Json::as_str).and_then(id_of);
        let by_config = config.get(format!("{role}_id")).and_then(Json::as_u64);
        let id = by_name.or_else(|| by_config.and_then(|id| usize::try_from(id).ok()));
        let Some(id) = id.filter(|id| *id < vocabulary) else {
            continue;
        };
        let key = match key {
            "bos" => "tokenizer.ggml.bos_token_id",
            "eos" => "tokenizer.ggml.eos_token_id",
            "unknown" => "tokenizer.ggml.unknown_token_id",
            _ => "tokenizer.ggml.padding_token_id",
        };
        keys.push((key, Value::U32(id as u32)));
    }
    let begins = begins_with_special(tokenizer.get("post_processor").unwrap_or(&Json::Null))
        || about.get("add_bos_token").and_then(Json::as_bool) == Some(true);
    keys.push(("tokenizer.ggml.add_bos_token", Value::Bool(begins)));
    if let Some(add) = about.get("add_eos_token").and_then(Json::as_bool) {
        keys.push(("tokenizer.ggml.add_eos_token", Value::Bool(add)));
    }
    let kinds = tokens
        .iter()
        .map(|t| t.as_ref().map_or(UNUSED, |(_, kind)| *kind))
        .collect();
    let texts = tokens
        .into_iter()
        .enumerate()
        .map(|(id, token)| token.map_or_else(|| format!("[PAD{id}]"), |(text, _)| text))
        .collect();
    keys.push(("tokenizer.ggml.tokens", Value::Texts(texts)));
    keys.push(("tokenizer.ggml.token_type", Value::I32s(kinds)));
    keys.push(("tokenizer.ggml.merges", Value::Texts(merges)));
    keys.extend(template.map(|text| ("tokenizer.chat_template", Value::Text(text))));
    Ok(keys
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value))
        .collect())
}

/// llama.cpp's name of a pre-tokenizer.
fn pre_tokenizer(about: &Json) -> std::result::Result<&'static str, String> {
    let steps: Vec<&Json> = match about.get("pretokenizers").and_then(Json::as_array) {
        Some(steps) => steps.iter().collect(),
        None => vec![about],
    };
    let kind = |step: &Json| {
        step.get("type")
            .and_then(Json::as_str)
            .unwrap_or("none")
            .to_owned()
    };
    let kinds: Vec<String> = steps.iter().map(|step| kind(step)).collect();
    let kinds: Vec<&str> = kinds.iter().map(String::as_str).collect();
    let flag = |key: &str| {
        steps
            .iter()
            .any(|s| s.get(key).and_then(Json::as_bool) == Some(true))
    };
    match kinds[..] {
        ["ByteLevel"] if flag("use_regex") && !flag("add_prefix_space") => return Ok("gpt-2"),
        ["Digits", "ByteLevel"] if flag("individual_digits") && flag("use_regex") => return Ok("smollm"),
        ["Split", "ByteLevel"] => {
            let pattern = steps
                .iter()
                .find_map(|s| s.pointer("/pattern/Regex").and_then(Json::as_str))
                .unwrap_or_default();
            if let Some((_, name)) = SPLITS.iter().find(|(part, _)| pattern.contains(part)) {
                return Ok(name);
            }
        }
        _ => {}
    }
    Err(format!(
        "the tokenizer splits text by {}, which llama.cpp has no name for that is known here; expected the byte-level splits of GPT-2, SmolLM, Llama 3 or Qwen",
        kinds.join(" and ")
    ))
}

/// Whether the tokenizer puts a special token before a text.
fn begins_with_special(processor: &Json) -> bool {
    let inner = processor.get("processors").and_then(Json::as_array);
    if let Some(inner) = inner {
        return inner.iter().any(begins_with_special);
    }
    let first = processor.get("single").and_then(|s| s.get(0));
    first.is_some_and(|first| first.get("SpecialToken").is_some())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn tokenizer() -> Json {
        json!({
            "added_tokens": [{"id": 0, "content": "<s>", "special": true}, {"id": 3, "content": "<x>", "special": false}],
            "pre_tokenizer": {"type": "ByteLevel", "use_regex": true, "add_prefix_space": false},
            "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}]},
            "model": {"type": "BPE", "vocab": {"a": 1, "ab": 2}, "merges": [["a", "b"], "a c"]},
        })
    }

    #[test]
    fn a_small_tokenizer() {
        let keys = of(
            &tokenizer(),
            &json!({"bos_token": "<s>"}),
            &json!({"eos_token_id": 2}),
            None,
            5,
        )
        .unwrap();
        let get = |name: &str| {
            &keys
                .iter()
                .find(|(key, _)| key == &format!("tokenizer.ggml.{name}"))
                .unwrap()
                .1
        };
        let texts = |all: &[&str]| Value::Texts(all.iter().map(ToString::to_string).collect());
        assert_eq!(get("tokens"), &texts(&["<s>", "a", "ab", "<x>", "[PAD4]"]));
        assert_eq!(get("token_type"), &Value::I32s(vec![3, 1, 1, 4, 5]));
        assert_eq!(get("merges"), &texts(&["a b", "a c"]));
        assert_eq!(get("pre"), &Value::Text("gpt-2".to_owned()));
        assert_eq!(
            (get("bos_token_id"), get("eos_token_id")),
            (&Value::U32(0), &Value::U32(2))
        );
        assert_eq!(get("add_bos_token"), &Value::Bool(true));
    }

    #[test]
    fn foreign_tokenizers_are_refused() {
        let refused = |change: &dyn Fn(&mut Json)| {
            let mut changed = tokenizer();
            change(&mut changed);
            of(&changed, &Json::Null, &Json::Null, None, 5).unwrap_err()
        };
        assert!(refused(&|t| t["model"]["type"] = json!("Unigram")).contains("BPE"));
        assert!(refused(&|t| t["pre_tokenizer"]["type"] = json!("Metaspace")).contains("Metaspace"));
        assert!(refused(&|t| t["model"]["vocab"]["z"] = json!(5)).contains("beyond"));
    }
}
