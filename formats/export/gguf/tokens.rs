//! The tokenizer's keys of a GGUF file. A folder with a SentencePiece `tokenizer.model` (Llama 2, ERNIE-4.5) gives pieces and
//! scores; one with a byte-level BPE in `tokenizer.json` (Llama 3, Qwen, SmolLM) gives tokens and merges, see `bpe`.
//!
//! Source: `convert_hf_to_gguf.py` and `gguf/vocab.py` of llama.cpp.

use std::path::Path;

use serde_json::Value as Json;

use super::bpe;
use super::file::Value;
use super::sentencepiece::SentencePiece;
use super::wordpiece;
use crate::Result;
use crate::checkpoint::shards::{read_bounded, read_json};

/// Types of tokens.
pub(super) const NORMAL: i32 = 1;
pub(super) const CONTROL: i32 = 3;
pub(super) const USER_DEFINED: i32 = 4;
const UNUSED: i32 = 5;

/// A token: its text, type and score.
pub(super) type Token = (String, i32, f32);

/// Tokens by id, none where an embedding has no token.
#[derive(Debug, Default)]
pub(super) struct Vocabulary {
    pub(super) tokens: Vec<Option<Token>>,
    /// Keys of this kind of tokenizer alone.
    pub(super) keys: Vec<(&'static str, Value)>,
    /// Whether it puts a special token before a text, where its own file says so.
    pub(super) begins: bool,
    /// Whether scores count.
    pub(super) scored: bool,
}

impl Vocabulary {
    /// Puts a token in its place. Fails beyond the model's embeddings.
    pub(super) fn put(&mut self, id: Option<u64>, token: Token) -> std::result::Result<(), String> {
        let size = self.tokens.len();
        let slot = id
            .and_then(|id| usize::try_from(id).ok())
            .and_then(|id| self.tokens.get_mut(id));
        match slot {
            Some(slot) => {
                *slot = Some(token);
                Ok(())
            }
            None => Err(format!(
                "the tokenizer has the token {} beyond the model's vocabulary of {size}",
                crate::error::quoted(&token.0)
            )),
        }
    }
}

/// Keys for a vocabulary of `size` tokens; or why the folder's tokenizer cannot be expressed.
pub fn keys(
    folder: &Path,
    config: &Json,
    size: usize,
) -> Result<std::result::Result<Vec<(String, Value)>, String>> {
    let (pieces, json) = (folder.join("tokenizer.model"), folder.join("tokenizer.json"));
    let optional = |name: &str| -> Result<Json> {
        let path = folder.join(name);
        if path.is_file() {
            read_json(&path)
        } else {
            Ok(Json::Null)
        }
    };
    let about = optional("tokenizer_config.json")?;
    let vocabulary = if pieces.is_file() {
        of_pieces(&read_bounded(&pieces)?, &about, size)
    } else if json.is_file() {
        let tokenizer: Json = read_json(&json)?;
        match tokenizer.pointer("/model/type").and_then(Json::as_str) {
            Some("WordPiece") => wordpiece::vocabulary(&tokenizer, size),
            _ => bpe::vocabulary(&tokenizer, size),
        }
    } else {
        Err("gguf holds the tokenizer too, read from tokenizer.model or tokenizer.json, which are not there; copy one into the artifact's folder".to_owned())
    };
    let template = folder.join("chat_template.jinja");
    let template = match about.get("chat_template").and_then(Json::as_str) {
        Some(text) => Some(text.to_owned()),
        None if template.is_file() => String::from_utf8(read_bounded(&template)?).ok(),
        None => None,
    };
    Ok(vocabulary.map(|vocabulary| all_keys(vocabulary, &about, config, template)))
}

/// Pieces of a `tokenizer.model`, and tokens that `tokenizer_config.json` adds.
fn of_pieces(bytes: &[u8], about: &Json, size: usize) -> std::result::Result<Vocabulary, String> {
    let model =
        SentencePiece::parse(bytes).ok_or("tokenizer.model is no SentencePiece model; copy it again")?;
    if model.kind != 2 {
        return Err(
            "tokenizer.model is of SentencePiece's unigram kind, and llama.cpp runs its BPE kind".to_owned(),
        );
    }
    let mut vocabulary = Vocabulary {
        tokens: vec![None; size],
        keys: vec![
            ("tokenizer.ggml.model", Value::Text("llama".to_owned())),
            ("tokenizer.ggml.pre", Value::Text("default".to_owned())),
            ("tokenizer.ggml.add_space_prefix", Value::Bool(model.space_prefix)),
        ],
        begins: false,
        scored: true,
    };
    for (id, (text, score, kind)) in model.pieces.into_iter().enumerate() {
        vocabulary.put(Some(id as u64), (text, kind, score))?;
    }
    let added = about.get("added_tokens_decoder").and_then(Json::as_object);
    for (id, token) in added.into_iter().flatten() {
        let text = token.get("content").and_then(Json::as_str).unwrap_or_default();
        let special = token.get("special").and_then(Json::as_bool) == Some(true);
        let id: Option<u64> = id.parse().ok();
        let known = id
            .and_then(|id| vocabulary.tokens.get(usize::try_from(id).ok()?))
            .is_some_and(Option::is_some);
        if !known {
            let kind = if special { CONTROL } else { USER_DEFINED };
            vocabulary.put(id, (text.to_owned(), kind, -1000.0))?;
        }
    }
    Ok(vocabulary)
}

/// Keys every tokenizer has, besides its own.
fn all_keys(
    vocabulary: Vocabulary,
    about: &Json,
    config: &Json,
    template: Option<String>,
) -> Vec<(String, Value)> {
    let Vocabulary {
        tokens,
        mut keys,
        begins,
        scored,
    } = vocabulary;
    let id_of = |text: &str| {
        tokens
            .iter()
            .position(|t| t.as_ref().is_some_and(|(known, ..)| known == text))
    };
    for (key, role) in [
        ("tokenizer.ggml.bos_token_id", "bos_token"),
        ("tokenizer.ggml.eos_token_id", "eos_token"),
        ("tokenizer.ggml.unknown_token_id", "unk_token"),
        ("tokenizer.ggml.padding_token_id", "pad_token"),
    ] {
        let named = about.get(role).map(|t| t.get("content").unwrap_or(t));
        let by_name = named.and_then(Json::as_str).and_then(id_of);
        let by_config = config.get(format!("{role}_id")).and_then(Json::as_u64);
        let id = by_name.or_else(|| by_config.and_then(|id| usize::try_from(id).ok()));
        if keys.iter().any(|(known, _)| *known == key) {
            continue; // the vocabulary says it itself
        }
        if let Some(id) = id.filter(|id| *id < tokens.len()) {
            keys.push((key, Value::U32(id as u32)));
        }
    }
    let flag = |key: &str| about.get(key).and_then(Json::as_bool);
    keys.push((
        "tokenizer.ggml.add_bos_token",
        Value::Bool(begins || flag("add_bos_token") == Some(true)),
    ));
    if let Some(add) = flag("add_eos_token") {
        keys.push(("tokenizer.ggml.add_eos_token", Value::Bool(add)));
    }
    let (mut texts, mut kinds, mut scores) = (Vec::new(), Vec::new(), Vec::new());
    for (id, token) in tokens.into_iter().enumerate() {
        let (text, kind, score) = token.unwrap_or_else(|| (format!("[PAD{id}]"), UNUSED, -10_000.0));
        texts.push(text);
        kinds.push(kind);
        scores.push(score);
    }
    keys.push(("tokenizer.ggml.tokens", Value::Texts(texts)));
    keys.push(("tokenizer.ggml.token_type", Value::I32s(kinds)));
    if scored {
        keys.push(("tokenizer.ggml.scores", Value::F32s(scores)));
    }
    keys.extend(template.map(|text| ("tokenizer.chat_template", Value::Text(text))));
    keys.into_iter()
        .map(|(key, value)| (key.to_owned(), value))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn get<'a>(keys: &'a [(String, Value)], name: &str) -> &'a Value {
        let name = format!("tokenizer.ggml.{name}");
        &keys.iter().find(|(key, _)| *key == name).unwrap().1
    }

    fn texts(all: &[&str]) -> Value {
        Value::Texts(all.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn byte_level_bpe() {
        let dir = tempfile::tempdir().unwrap();
        let tokenizer = json!({
            "added_tokens": [{"id": 0, "content": "<s>", "special": true}, {"id": 3, "content": "<x>", "special": false}],
            "pre_tokenizer": {"type": "ByteLevel", "use_regex": true, "add_prefix_space": false},
            "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}]},
            "model": {"type": "BPE", "vocab": {"a": 1, "ab": 2}, "merges": [["a", "b"], "a c"]},
        });
        std::fs::write(dir.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
        std::fs::write(
            dir.path().join("tokenizer_config.json"),
            "{\"bos_token\": \"<s>\"}",
        )
        .unwrap();
        let keys = keys(dir.path(), &json!({"eos_token_id": 2}), 5).unwrap().unwrap();
        assert_eq!(get(&keys, "tokens"), &texts(&["<s>", "a", "ab", "<x>", "[PAD4]"]));
        assert_eq!(get(&keys, "token_type"), &Value::I32s(vec![3, 1, 1, 4, 5]));
        assert_eq!(get(&keys, "merges"), &texts(&["a b", "a c"]));
        assert_eq!(get(&keys, "pre"), &Value::Text("gpt-2".to_owned()));
        assert_eq!(get(&keys, "bos_token_id"), &Value::U32(0));
        assert_eq!(get(&keys, "eos_token_id"), &Value::U32(2));
        assert_eq!(get(&keys, "add_bos_token"), &Value::Bool(true));
    }

    #[test]
    fn pieces_come_before_json() {
        let dir = tempfile::tempdir().unwrap();
        // One piece "a", of a BPE model.
        let bytes = [0x0a, 3, 0x0a, 1, b'a', 0x12, 2, 0x18, 2];
        std::fs::write(dir.path().join("tokenizer.model"), bytes).unwrap();
        std::fs::write(dir.path().join("tokenizer.json"), "{}").unwrap();
        let about = json!({"added_tokens_decoder": {"1": {"content": "<x>", "special": true}, "0": {"content": "z"}}});
        std::fs::write(dir.path().join("tokenizer_config.json"), about.to_string()).unwrap();
        let made = keys(dir.path(), &Json::Null, 3).unwrap().unwrap();
        assert_eq!(get(&made, "tokens"), &texts(&["a", "<x>", "[PAD2]"]));
        assert_eq!(get(&made, "token_type"), &Value::I32s(vec![1, 3, 5]));
        assert_eq!(get(&made, "scores"), &Value::F32s(vec![0.0, -1000.0, -10_000.0]));
        assert!(
            keys(dir.path(), &Json::Null, 1)
                .unwrap()
                .unwrap_err()
                .contains("beyond")
        );
        let unigram = [0x0a, 3, 0x0a, 1, b'a'];
        std::fs::write(dir.path().join("tokenizer.model"), unigram).unwrap();
        assert!(
            keys(dir.path(), &Json::Null, 3)
                .unwrap()
                .unwrap_err()
                .contains("unigram")
        );
    }
}
