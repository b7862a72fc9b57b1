//! The tokenizer inside a GGUF file. Owns how llama.cpp's keys become what the other pages run: byte-level BPE becomes a
//! `tokenizer.json` for the `tokenizers` crate, pieces with scores become a SentencePiece model; `wordpiece` has BERT's.
//!
//! How a text is split before BPE is named in the file (`tokenizer.ggml.pre`), not described; the names known here are
//! those of the families of models that run here. Source: `llama-vocab.cpp` of llama.cpp.

use std::path::Path;

use qtool_formats::import::gguf::header::Metadata;
use serde_json::{Value, json};

use super::Vocabulary;
use super::config::{AddedToken, Config, TemplateSource};
use super::library::Library;
use super::sentencepiece::SentencePiece;
use super::sentencepiece::proto::{Algorithm, Kind, Model, Piece};
use super::wordpiece;
use crate::{Error, Result};

/// Types of tokens.
const NORMAL: i64 = 1;
const UNKNOWN: i64 = 2;
const CONTROL: i64 = 3;
const USER_DEFINED: i64 = 4;
const UNUSED: i64 = 5;
const BYTE: i64 = 6;

/// Special tokens by name, and the key of their id.
const SPECIALS: [(&str, &str); 4] = [
    ("bos_token", "bos"),
    ("eos_token", "eos"),
    ("unk_token", "unknown"),
    ("pad_token", "padding"),
];

/// The vocabulary, in the words of the file that a folder would have.
pub(super) enum Described {
    /// A `tokenizer.json`.
    Json(Value),
    /// A SentencePiece model.
    Pieces(Model),
}

/// Reads the tokenizer's keys. Fails when they are missing, or of a kind that is not known.
pub(super) fn read(path: &Path, about: &Metadata) -> Result<(Vocabulary, Config)> {
    let (described, config) = describe(path, about)?;
    let vocabulary = match described {
        Described::Json(json) => {
            Vocabulary::Library(Box::new(Library::read(path, json.to_string().as_bytes())?))
        }
        Described::Pieces(model) => {
            Vocabulary::SentencePiece(Box::new(SentencePiece::of(path, model, &config)?))
        }
    };
    Ok((vocabulary, config))
}

/// The same, not yet run. Fails likewise.
pub(super) fn describe(path: &Path, about: &Metadata) -> Result<(Described, Config)> {
    let fault = |reason: String| Error::Tokenizer {
        path: path.to_owned(),
        reason,
    };
    let tokens = about.texts("tokenizer.ggml.tokens");
    if tokens.is_empty() {
        return Err(fault(
            "the file holds no tokenizer (tokenizer.ggml.tokens); convert the model again, or give a folder with a tokenizer.json".to_owned(),
        ));
    }
    let kinds = about.integers("tokenizer.ggml.token_type");
    if !kinds.is_empty() && kinds.len() != tokens.len() {
        return Err(fault(format!(
            "expected a type for each of {} tokens, got {}",
            tokens.len(),
            kinds.len()
        )));
    }
    let kind = |id: usize| kinds.get(id).copied().unwrap_or(NORMAL);
    let mut config = Config::default();
    for (name, key) in SPECIALS {
        let id = about.count(&format!("tokenizer.ggml.{key}_token_id"));
        let token = id.and_then(|id| tokens.get(usize::try_from(id).ok()?));
        if let Some(token) = token {
            config.specials.insert(name.to_owned(), token.clone());
        }
    }
    for (id, token) in tokens.iter().enumerate() {
        if matches!(kind(id), CONTROL | USER_DEFINED) && !token.is_empty() {
            config.added.push(AddedToken {
                content: token.clone(),
                id: u32::try_from(id).ok(),
                special: kind(id) == CONTROL,
                lstrip: false,
                rstrip: false,
            });
        }
    }
    config.template = about.text("tokenizer.chat_template").map(|text| TemplateSource {
        path: path.to_owned(),
        text: text.to_owned(),
    });
    config.add_eos = about.flag("tokenizer.ggml.add_eos_token");
    let begins = about.flag("tokenizer.ggml.add_bos_token");
    match about.text("tokenizer.ggml.model") {
        Some("gpt2") => {
            let pre = about.text("tokenizer.ggml.pre").unwrap_or("default");
            config.add_bos = Some(begins.unwrap_or(pre == "llama-bpe"));
            let described = byte_level(about, pre, tokens, &config).map_err(fault)?;
            Ok((Described::Json(described), config))
        }
        Some("llama") => {
            config.add_bos = Some(begins.unwrap_or(true));
            config.class = Some("LlamaTokenizer".to_owned());
            let model = pieces(about, tokens, &kind).map_err(fault)?;
            Ok((Described::Pieces(model), config))
        }
        Some("bert") => {
            config.class = Some("BertTokenizer".to_owned());
            let described = wordpiece::described(about, tokens, &mut config).map_err(fault)?;
            Ok((Described::Json(described), config))
        }
        other => Err(fault(format!(
            "the tokenizer is of the kind {:?}, expected gpt2 (byte-level BPE), llama (SentencePiece's BPE) or bert (WordPiece)",
            other.unwrap_or("none")
        ))),
    }
}

/// What comes before a family's BPE: the normalizer and the pre-tokenizer.
fn before(pre: &str) -> std::result::Result<(Value, Value), String> {
    let words = |numbers: &str| {
        format!(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{numbers}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
    };
    let level = |regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex});
    let split = |numbers: &str| {
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": words(numbers)}, "behavior": "Isolated", "invert": false},
            level(false),
        ]})
    };
    match pre {
        "gpt-2" => Ok((Value::Null, level(true))),
        "smollm" => Ok((
            Value::Null,
            json!({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, level(true)]}),
        )),
        "llama-bpe" | "llama3" | "llama-v3" => Ok((Value::Null, split("{1,3}"))),
        "qwen2" => Ok((json!({"type": "NFC"}), split(""))),
        other => Err(format!(
            "the tokenizer splits texts as {other:?} does, which is not known here; known are gpt-2, smollm, llama-bpe and qwen2; give a folder with the model's tokenizer.json"
        )),
    }
}

/// The file's vocabulary as a `tokenizer.json`.
fn byte_level(
    about: &Metadata,
    pre: &str,
    tokens: &[String],
    config: &Config,
) -> std::result::Result<Value, String> {
    let (normalizer, pre_tokenizer) = before(pre)?;
    let mut vocabulary = serde_json::Map::new();
    for (id, token) in tokens.iter().enumerate() {
        if vocabulary.insert(token.clone(), json!(id)).is_some() {
            return Err(format!("the token {token:?} is there twice"));
        }
    }
    let mut merges = Vec::new();
    for merge in about.texts("tokenizer.ggml.merges") {
        // A token of byte-level BPE holds no space of its own.
        let Some((a, b)) = merge.split_once(' ') else {
            return Err(format!("the merge {merge:?} is not of two tokens"));
        };
        merges.push(json!([a, b]));
    }
    let added: Vec<Value> = config
        .added
        .iter()
        .map(|token| {
            json!({"id": token.id, "content": token.content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": token.special})
        })
        .collect();
    let special = |name: &str, wanted: Option<bool>| {
        let token = config.special(name).filter(|_| wanted == Some(true))?;
        let id = tokens.iter().position(|known| known == token)?;
        Some((token.to_owned(), id))
    };
    let (bos, eos) = (
        special("bos_token", config.add_bos),
        special("eos_token", config.add_eos),
    );
    let around = |sequence: &str, kind: u8| {
        let token = |(token, _): &(String, usize)| json!({"SpecialToken": {"id": token, "type_id": kind}});
        let text = json!({"Sequence": {"id": sequence, "type_id": kind}});
        let all = bos.iter().map(token).chain([text]).chain(eos.iter().map(token));
        all.collect::<Vec<Value>>()
    };
    let processor = if bos.is_none() && eos.is_none() {
        Value::Null
    } else {
        let ids: serde_json::Map<String, Value> = bos
            .iter()
            .chain(&eos)
            .map(|(token, id)| {
                (
                    token.clone(),
                    json!({"id": token, "ids": [id], "tokens": [token]}),
                )
            })
            .collect();
        let pair = [around("A", 0), around("B", 1)].concat();
        json!({"type": "TemplateProcessing", "single": around("A", 0), "pair": pair, "special_tokens": ids})
    };
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": processor,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": pre.starts_with("llama"),
            "vocab": vocabulary, "merges": merges},
    }))
}

/// The file's vocabulary as a SentencePiece model.
fn pieces(
    about: &Metadata,
    tokens: &[String],
    kind: &dyn Fn(usize) -> i64,
) -> std::result::Result<Model, String> {
    let scores = about.floats("tokenizer.ggml.scores");
    if scores.len() != tokens.len() {
        return Err(format!(
            "expected a score for each of {} tokens, got {}",
            tokens.len(),
            scores.len()
        ));
    }
    let piece = |(id, (text, &score)): (usize, (&String, &f32))| -> std::result::Result<Piece, String> {
        if text.is_empty() || !score.is_finite() {
            return Err(format!("the token {id} is empty, or its score is no number"));
        }
        Ok(Piece {
            text: text.clone(),
            score,
            kind: match kind(id) {
                UNKNOWN => Kind::Unknown,
                CONTROL => Kind::Control,
                USER_DEFINED => Kind::UserDefined,
                UNUSED => Kind::Unused,
                BYTE => Kind::Byte,
                _ => Kind::Normal,
            },
        })
    };
    let pieces = tokens.iter().zip(scores).enumerate().map(piece);
    let pieces: Vec<Piece> = pieces.collect::<std::result::Result<_, _>>()?;
    Ok(Model {
        byte_fallback: pieces.iter().any(|piece| piece.kind == Kind::Byte),
        pieces,
        algorithm: Algorithm::Bpe,
        unknown_surface: " \u{2047} ".to_owned(),
        charsmap: Vec::new(),
        dummy_prefix: about.flag("tokenizer.ggml.add_space_prefix").unwrap_or(true),
        squeeze: about
            .flag("tokenizer.ggml.remove_extra_whitespaces")
            .unwrap_or(false),
        escape: true,
        suffix: false,
    })
}
