//! WordPiece as GGUF keeps it, as a `tokenizer.json` again: pieces that begin a word carry llama.cpp's mark of a space there,
//! those that go on with one have no mark, and special tokens stand as they are.
//!
//! llama.cpp lowers all text and strips accents, cuts at white space, punctuation and Chinese characters, and puts `[CLS]` and
//! `[SEP]` around a text: BERT's own normalizer and template. Source: `conversion/bert.py` and `llm_tokenizer_wpm` of llama.cpp.

use std::collections::HashSet;

use qtool_formats::import::gguf::header::Metadata;
use serde_json::{Value, json};

use super::config::Config;

/// llama.cpp's mark of a space.
const SPACE: char = '\u{2581}';

/// Names of the special tokens in transformers, and the keys of their ids; the separator's in llama.cpp's spelling.
const SPECIALS: [(&str, &str); 5] = [
    ("cls_token", "bos"),
    ("sep_token", "seperator"),
    ("unk_token", "unknown"),
    ("pad_token", "padding"),
    ("mask_token", "mask"),
];

/// A token as BERT's vocabulary spells it. Special ones of a `vocab.txt` stand in brackets.
fn spelled(token: &str, special: bool) -> String {
    if let Some(word) = token.strip_prefix(SPACE) {
        return word.to_owned();
    }
    if special || (token.len() > 2 && token.starts_with('[') && token.ends_with(']')) {
        return token.to_owned();
    }
    format!("##{token}")
}

/// The file's vocabulary; the names of its special tokens are put into `config`. Fails when one that stands around texts, or
/// for unknown words, is not there.
pub(super) fn described(about: &Metadata, tokens: &[String], config: &mut Config) -> Result<Value, String> {
    config.specials.clear();
    let mut ids = serde_json::Map::new();
    for (name, key) in SPECIALS {
        let key = format!("tokenizer.ggml.{key}_token_id");
        let id = about.count(&key);
        match id.and_then(|id| tokens.get(usize::try_from(id).ok()?)) {
            Some(token) => {
                config.specials.insert(name.to_owned(), token.clone());
                ids.insert(
                    token.clone(),
                    json!({"id": token, "ids": [id], "tokens": [token]}),
                );
            }
            None if ["pad_token", "mask_token"].contains(&name) => {}
            None => {
                return Err(format!(
                    "expected the id of one of its {} tokens as {key}, got {}; convert the model again",
                    tokens.len(),
                    id.map_or_else(|| "none".to_owned(), |id| id.to_string())
                ));
            }
        }
    }
    let special = |name: &str| config.special(name).unwrap_or_default();
    let (cls, sep, unknown) = (special("cls_token"), special("sep_token"), special("unk_token"));
    let listed: HashSet<&str> = config.added.iter().map(|known| known.content.as_str()).collect();
    let mut vocabulary = serde_json::Map::new();
    let mut added = Vec::new();
    for (id, token) in tokens.iter().enumerate() {
        let is_special = ids.contains_key(token) || listed.contains(token.as_str());
        if vocabulary.insert(spelled(token, is_special), json!(id)).is_some() {
            return Err(format!("the token {token:?} is there twice"));
        }
        if is_special {
            added.push(
                json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true}),
            );
        }
    }
    let token = |token: &str, kind: u8| json!({"SpecialToken": {"id": token, "type_id": kind}});
    let text = |name: &str, kind: u8| json!({"Sequence": {"id": name, "type_id": kind}});
    let single = [token(cls, 0), text("A", 0), token(sep, 0)];
    let pair = [&single[..], &[text("B", 1), token(sep, 1)]].concat();
    ids.retain(|known, _| [cls, sep].contains(&known.as_str()));
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
            "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": ids},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": unknown, "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocabulary},
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spelling_by_hand() {
        for (token, special, word) in [
            ("\u{2581}cat", false, "cat"),
            ("s", false, "##s"),
            ("[CLS]", true, "[CLS]"),
            ("[unused7]", false, "[unused7]"),
            ("\u{2581}[", false, "["),
            ("]", false, "##]"),
            ("<mine>", true, "<mine>"),
        ] {
            assert_eq!(spelled(token, special), word);
        }
    }
}
