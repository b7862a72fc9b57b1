//! WordPiece of a `tokenizer.json` as GGUF keeps it: pieces that begin a word carry llama.cpp's mark of a space, those that go
//! on with one lose their `##`.
//!
//! Source: `conversion/bert.py` and `llm_tokenizer_wpm` of llama.cpp, which lowers all text and strips accents.

use serde_json::Value as Json;

use super::file::Value;
use super::tokens::{CONTROL, NORMAL, Vocabulary};

/// llama.cpp's mark of a space.
const SPACE: char = '\u{2581}';

/// The vocabulary of `size` tokens that `tokenizer.json` holds, or why it cannot be expressed.
pub(super) fn vocabulary(tokenizer: &Json, size: usize) -> Result<Vocabulary, String> {
    let model = tokenizer.get("model").unwrap_or(&Json::Null);
    let vocab = model
        .get("vocab")
        .and_then(Json::as_object)
        .ok_or("tokenizer.json has no vocabulary; copy it again")?;
    let normalizer = tokenizer.get("normalizer").unwrap_or(&Json::Null);
    let says = |key: &str| normalizer.get(key).and_then(Json::as_bool);
    let lowers = says("lowercase") == Some(true) && says("strip_accents") != Some(false);
    let prefix = model.get("continuing_subword_prefix").and_then(Json::as_str);
    if normalizer.get("type").and_then(Json::as_str) != Some("BertNormalizer")
        || !lowers
        || prefix != Some("##")
    {
        return Err(
            "the tokenizer keeps case or accents, or normalizes in a way of its own, and llama.cpp's WordPiece lowers and strips; export --to bf16"
                .to_owned(),
        );
    }
    let mut all = Vocabulary {
        tokens: vec![None; size],
        keys: vec![
            ("tokenizer.ggml.model", Value::Text("bert".to_owned())),
            ("tokenizer.ggml.pre", Value::Text("default".to_owned())),
        ],
        begins: true,
        scored: false,
    };
    let added = tokenizer.get("added_tokens").and_then(Json::as_array);
    let special: Vec<&str> = added
        .into_iter()
        .flatten()
        .filter(|token| token.get("special").and_then(Json::as_bool) == Some(true))
        .filter_map(|token| token.get("content").and_then(Json::as_str))
        .collect();
    for (text, id) in vocab {
        let token = if special.contains(&text.as_str()) {
            (text.clone(), CONTROL, 0.0)
        } else if let Some(rest) = text.strip_prefix("##") {
            (rest.to_owned(), NORMAL, 0.0)
        } else {
            (format!("{SPACE}{text}"), NORMAL, 0.0)
        };
        all.put(id.as_u64(), token)?;
    }
    for (key, name) in [
        ("tokenizer.ggml.bos_token_id", "[CLS]"),
        ("tokenizer.ggml.seperator_token_id", "[SEP]"), // llama.cpp's spelling
        ("tokenizer.ggml.unknown_token_id", "[UNK]"),
        ("tokenizer.ggml.padding_token_id", "[PAD]"),
        ("tokenizer.ggml.mask_token_id", "[MASK]"),
    ] {
        let id = vocab.get(name).and_then(Json::as_u64);
        match id.and_then(|id| u32::try_from(id).ok()) {
            Some(id) => all.keys.push((key, Value::U32(id))),
            None => {
                return Err(format!(
                    "the tokenizer has no token {name}, which llama.cpp puts around texts; copy the tokenizer.json of the model"
                ));
            }
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn tokenizer() -> Json {
        json!({
            "added_tokens": [{"content": "[CLS]", "special": true}, {"content": "[SEP]", "special": true},
                {"content": "[PAD]", "special": true}, {"content": "[UNK]", "special": true}, {"content": "[MASK]", "special": true}],
            "normalizer": {"type": "BertNormalizer", "lowercase": true, "strip_accents": null},
            "model": {"type": "WordPiece", "continuing_subword_prefix": "##",
                "vocab": {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4, "cat": 5, "##s": 6}},
        })
    }

    #[test]
    fn pieces_are_marked() {
        let vocabulary = vocabulary(&tokenizer(), 8).unwrap();
        let texts: Vec<&str> = vocabulary
            .tokens
            .iter()
            .map(|t| t.as_ref().map_or("", |t| t.0.as_str()))
            .collect();
        assert_eq!(texts[2..], ["[CLS]", "[SEP]", "[MASK]", "\u{2581}cat", "s", ""]);
        assert!(
            vocabulary
                .keys
                .contains(&("tokenizer.ggml.seperator_token_id", Value::U32(3)))
        );
    }

    #[test]
    fn foreign_tokenizers_are_refused() {
        let refused = |pointer: &str, value: Json| {
            let mut changed = tokenizer();
            *changed.pointer_mut(pointer).unwrap() = value;
            vocabulary(&changed, 8).map(|_| ()).unwrap_err()
        };
        assert!(refused("/normalizer/lowercase", json!(false)).contains("case"));
        assert!(refused("/normalizer/type", json!("NFKC")).contains("normalizes"));
        assert!(refused("/model/continuing_subword_prefix", json!("@@")).contains("normalizes"));
        assert!(refused("/model/vocab/cat", json!(8)).contains("beyond"));
        assert!(refused("/model/vocab", json!({"cat": 1})).contains("[CLS]"));
    }
}
