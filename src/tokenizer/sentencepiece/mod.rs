//! `tokenizer.model`: a SentencePiece model, for folders that hold no `tokenizer.json`. Owns what a model's ids
//! are, as the `sentencepiece` package gives them, and the tokens its folder adds to them.
//!
//! | Page | Owns |
//! |---|---|
//! | `proto` | the file |
//! | `pieces` | the vocabulary, to be looked up |
//! | `normalize` | what happens to a text first |
//! | `bpe`, `unigram` | how it is cut |
//!
//! The algorithms are the package's own, kept exactly: a conversion to merge rules or to a general normalizer
//! gives other ids where scores are equal and where characters combine.

mod bpe;
mod normalize;
mod pieces;
pub(super) mod proto;
mod unigram;

use std::path::Path;

use self::normalize::{Normalizer, SPACE};
use self::pieces::Pieces;
use self::proto::{Algorithm, Kind, Model};
use super::Row;
use super::added::{AddedTokens, Part};
use super::config::Config;
use crate::{Error, Result};

/// Classes whose ids are not those of the file: they put tokens of their own before its pieces.
const SHIFTED: [&str; 8] = [
    "XLMRoberta",
    "Camembert",
    "Barthez",
    "MBart",
    "Plbart",
    "PLBart",
    "Nllb",
    "Pegasus",
];

/// See the module's text.
#[derive(Debug)]
pub struct SentencePiece {
    normalizer: Normalizer,
    pieces: Pieces,
    algorithm: Algorithm,
    byte_fallback: bool,
    unknown_surface: String,
    added: AddedTokens,
    vocabulary: usize,
    before: Option<u32>,
    after: Option<u32>,
    /// Every part of a text between added tokens gets the space of a first word.
    every_part_is_first: bool,
}

impl SentencePiece {
    /// Reads the file, and from `config` the tokens that are added to it. Fails when the file is damaged, of a
    /// kind that is not supported, or used by a class that gives its pieces other ids.
    pub fn read(path: &Path, bytes: &[u8], config: &Config) -> Result<Self> {
        let fault = |reason: String| Error::Tokenizer {
            path: path.to_owned(),
            reason: format!("no usable SentencePiece model: {reason}"),
        };
        let class = config.class.as_deref().unwrap_or("");
        if let Some(shifted) = SHIFTED.iter().find(|s| class.starts_with(**s)) {
            return Err(fault(format!(
                "{shifted} tokenizers give its pieces other ids; save a tokenizer.json with transformers beside it"
            )));
        }
        let model = proto::parse(bytes).map_err(fault)?;
        Self::of(path, model, config)
    }

    /// The same of a model that was read already. `path` is for messages.
    pub fn of(path: &Path, model: Model, config: &Config) -> Result<Self> {
        let fault = |reason: String| Error::Tokenizer {
            path: path.to_owned(),
            reason: format!("no usable SentencePiece model: {reason}"),
        };
        let class = config.class.as_deref().unwrap_or("");
        let normalizer = Normalizer::new(&model).map_err(fault)?;
        let pieces = Pieces::new(model.pieces, model.byte_fallback).map_err(fault)?;
        let added = AddedTokens::new(&config.added, pieces.len(), &|text| pieces.id(text));
        let id = |name: &str| {
            let token = config.special(name)?;
            added.id(token).or_else(|| pieces.id(token))
        };
        let begins = |names: &[&str]| names.iter().any(|name| class.starts_with(name));
        let wants = |flag: Option<bool>, default: bool| flag.unwrap_or(default);
        let before = wants(config.add_bos, begins(&["Llama", "CodeLlama", "Gemma"])).then(|| id("bos_token"));
        let after = wants(config.add_eos, begins(&["T5", "MT5"])).then(|| id("eos_token"));
        Ok(Self {
            before: before.flatten(),
            after: after.flatten(),
            vocabulary: pieces.len().max(added.end()),
            every_part_is_first: config.legacy.unwrap_or(true),
            normalizer,
            pieces,
            algorithm: model.algorithm,
            byte_fallback: model.byte_fallback,
            unknown_surface: model.unknown_surface,
            added,
        })
    }

    /// Ids of a text. `special` puts the tokens of a document around them.
    pub fn encode(&self, text: &str, special: bool) -> Vec<u32> {
        let mut ids = Vec::new();
        for (number, part) in self.added.split(text).into_iter().enumerate() {
            match part {
                Part::Token(id) => ids.push(id),
                Part::Text(text) => {
                    self.encode_plain(text, number == 0 || self.every_part_is_first, &mut ids);
                }
            }
        }
        if special { self.around(ids) } else { ids }
    }

    /// Ids of two texts in one row, each with the tokens of a document around it.
    pub fn encode_pair(&self, a: &str, b: &str) -> (Vec<u32>, Vec<u32>) {
        let (mut ids, more) = (self.encode(a, true), self.encode(b, true));
        let types = [vec![0; ids.len()], vec![1; more.len()]].concat();
        ids.extend(more);
        (ids, types)
    }

    /// One or two texts, cut to `most` ids, the longer of the two first. `None` where the special tokens alone
    /// are more.
    pub fn encode_row(&self, a: &str, b: Option<&str>, most: usize) -> Option<Row> {
        let mut texts = vec![self.encode(a, false)];
        texts.extend(b.map(|b| self.encode(b, false)));
        let room = most.checked_sub(texts.len() * self.around(Vec::new()).len())?;
        let total: usize = texts.iter().map(Vec::len).sum();
        let cut = total.saturating_sub(room);
        for _ in 0..cut {
            // Of equal ones the second, as transformers does.
            let longest = (0..texts.len()).max_by_key(|&t| texts[t].len());
            texts[longest.unwrap_or(0)].pop();
        }
        let (mut ids, mut types) = (Vec::new(), Vec::new());
        for (kind, text) in (0..).zip(texts) {
            ids.extend(self.around(text));
            types.resize(ids.len(), kind);
        }
        Some(Row { ids, types, cut })
    }

    fn around(&self, ids: Vec<u32>) -> Vec<u32> {
        self.before.into_iter().chain(ids).chain(self.after).collect()
    }

    fn encode_plain(&self, text: &str, is_first: bool, ids: &mut Vec<u32>) {
        let normalized = self.normalizer.run(&self.pieces, text, is_first);
        let found = match self.algorithm {
            Algorithm::Bpe => bpe::cut(&self.pieces, &normalized),
            Algorithm::Unigram => unigram::cut(&self.pieces, &normalized),
        };
        let unknown = self.pieces.unknown();
        let mut after_unknown = false;
        for (range, id) in found {
            match id == unknown {
                true if self.byte_fallback => {
                    let bytes = normalized[range].bytes();
                    ids.extend(bytes.map(|b| self.pieces.byte(b).unwrap_or(unknown)));
                }
                // A run of unknown characters is one unknown token.
                true if after_unknown => {}
                _ => ids.push(id),
            }
            after_unknown = id == unknown;
        }
    }

    /// Text of ids; `None` when one of them is beyond the vocabulary. `skip_special` leaves special tokens out.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> std::result::Result<String, u32> {
        let (mut out, mut run) = (String::new(), Vec::new());
        for &id in ids {
            if let Some(token) = self.added.token(id) {
                out += &self.decode_plain(&run);
                run.clear();
                if !(skip_special && token.special) {
                    out += &token.content;
                }
            } else if self.pieces.get(id).is_some() {
                run.push(id);
            } else {
                return Err(id);
            }
        }
        Ok(out + &self.decode_plain(&run))
    }

    fn decode_plain(&self, ids: &[u32]) -> String {
        let (mut out, mut bytes) = (String::new(), Vec::new());
        let strips = self.normalizer.has_dummy_prefix() || self.normalizer.squeezes();
        let (mut at_begin, mut stripped) = (true, false);
        for &id in ids {
            let Some(piece) = self.pieces.get(id) else {
                continue;
            };
            if piece.kind == Kind::Byte {
                bytes.extend((0..=u8::MAX).find(|&b| self.pieces.byte(b) == Some(id)));
                continue;
            }
            push_bytes(&mut bytes, &mut out);
            at_begin &= !stripped && out.is_empty();
            stripped = false;
            match piece.kind {
                Kind::Control => {}
                Kind::Unknown => out += &self.unknown_surface,
                _ => {
                    let mut text = piece.text.as_str();
                    if at_begin && strips && text.starts_with(SPACE) {
                        text = &text[SPACE.len()..];
                        stripped = !self.normalizer.squeezes();
                    }
                    out += &text.replace(SPACE, " ");
                }
            }
        }
        push_bytes(&mut bytes, &mut out);
        out
    }

    /// One past the highest id.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// Id of a token.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.added.id(token).or_else(|| self.pieces.id(token))
    }
}

/// Bytes as text; each that belongs to no character becomes U+FFFD.
fn push_bytes(bytes: &mut Vec<u8>, out: &mut String) {
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        let character = (1..=rest.len().min(4)).find_map(|n| std::str::from_utf8(&rest[..n]).ok());
        out.push_str(character.unwrap_or("\u{fffd}"));
        rest = &rest[character.map_or(1, str::len)..];
    }
    bytes.clear();
}
