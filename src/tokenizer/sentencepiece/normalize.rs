//! What happens to a text before it is cut into pieces: replacements of the longest matching strings, white
//! space, and the space before the first word. Source: `normalizer.cc` of the SentencePiece project.
//!
//! The replacements are a blob: the size of a double-array trie (u32), the trie, and the replacements as
//! strings that end in zero. A unit of the trie holds, from its lowest bits: a label (8), whether a value hangs
//! on the node (1), and how far its children are (23); or a value (31).

use super::pieces::Pieces;
use super::proto::Model;

/// U+2581, which stands for a space in pieces.
pub const SPACE: &str = "\u{2581}";

/// See the module's text.
#[derive(Debug)]
pub struct Normalizer {
    trie: Vec<u32>,
    replacements: Vec<u8>,
    dummy_prefix: bool,
    squeeze: bool,
    suffix: bool,
    space: &'static str,
}

impl Normalizer {
    /// That of a model. Fails, with the end of a sentence, when its replacements are damaged.
    pub fn new(model: &Model) -> Result<Self, String> {
        let damaged = || "its rules of normalization are damaged".to_owned();
        let (mut trie, mut replacements) = (Vec::new(), Vec::new());
        if !model.charsmap.is_empty() {
            let (size, rest) = model.charsmap.split_first_chunk().ok_or_else(damaged)?;
            let size = u32::from_le_bytes(*size) as usize;
            let (units, strings) = rest.split_at_checked(size).ok_or_else(damaged)?;
            let (units, odd) = units.as_chunks();
            if !odd.is_empty() || units.is_empty() || strings.last().is_some_and(|&b| b != 0) {
                return Err(damaged());
            }
            trie = units.iter().map(|unit| u32::from_le_bytes(*unit)).collect();
            replacements = strings.to_vec();
            std::str::from_utf8(&replacements).map_err(|_| damaged())?;
        }
        Ok(Self {
            trie,
            replacements,
            dummy_prefix: model.dummy_prefix,
            squeeze: model.squeeze,
            suffix: model.suffix,
            space: if model.escape { SPACE } else { " " },
        })
    }

    /// Whether the space before (or after) a text is the model's habit.
    pub fn has_dummy_prefix(&self) -> bool {
        self.dummy_prefix
    }

    /// Whether white space is squeezed.
    pub fn squeezes(&self) -> bool {
        self.squeeze
    }

    /// The text to be cut. `is_first` is false for what stands behind a token that was taken out of the text,
    /// where no space is put before it.
    pub fn run(&self, pieces: &Pieces, text: &str, is_first: bool) -> String {
        let mut rest = text;
        if self.squeeze {
            while let Some((" ", length)) = self.prefix(pieces, rest) {
                rest = &rest[length..];
            }
        }
        let mut out = String::with_capacity(text.len() + text.len() / 4);
        if rest.is_empty() {
            return out;
        }
        let dummy = self.dummy_prefix && is_first;
        if dummy && !self.suffix {
            out.push_str(self.space);
        }
        let mut after_space = self.squeeze;
        while let Some((mut part, length)) = self.prefix(pieces, rest) {
            if after_space {
                part = part.trim_start_matches(' ');
            }
            if !part.is_empty() {
                for c in part.chars() {
                    match c {
                        ' ' => out.push_str(self.space),
                        c => out.push(c),
                    }
                }
                after_space = part.ends_with(' ');
            }
            after_space &= self.squeeze;
            rest = &rest[length..];
        }
        if self.squeeze {
            out.truncate(out.trim_end_matches(self.space).len());
        }
        if dummy && self.suffix {
            out.push_str(self.space);
        }
        out
    }

    /// What the beginning of `text` becomes, and how many bytes that is; `None` at its end.
    fn prefix<'t>(&'t self, pieces: &Pieces, text: &'t str) -> Option<(&'t str, usize)> {
        let first = text.chars().next()?;
        if let Some(length) = pieces.user_defined(text) {
            return Some((&text[..length], length));
        }
        let replaced = self.longest(text.as_bytes()).and_then(|(length, at)| {
            let rest = self.replacements.get(at..)?;
            let end = rest.iter().position(|&b| b == 0)?;
            // The replacement of an odd file might begin within a character, or end within one of the text.
            let replacement = std::str::from_utf8(&rest[..end]).ok()?;
            text.is_char_boundary(length).then_some((replacement, length))
        });
        Some(replaced.unwrap_or((&text[..first.len_utf8()], first.len_utf8())))
    }

    /// Length and value of the longest string of the trie that `text` begins with.
    fn longest(&self, text: &[u8]) -> Option<(usize, usize)> {
        let offset = |unit: u32| (unit >> 10) << ((unit & (1 << 9)) >> 6);
        let mut node = offset(*self.trie.first()?);
        let mut best = None;
        for (i, &byte) in text.iter().enumerate() {
            node ^= u32::from(byte);
            let Some(&unit) = self.trie.get(node as usize) else {
                break;
            };
            if unit & (1 << 31 | 0xff) != u32::from(byte) {
                break;
            }
            node ^= offset(unit);
            if unit & (1 << 8) != 0
                && let Some(&value) = self.trie.get(node as usize)
            {
                best = Some((i + 1, (value & 0x7fff_ffff) as usize));
            }
        }
        best
    }
}
