//! Calibration rows: text, JSON lines or token ids become rows of ids, chosen and ordered by a seed. Owns the
//! reading, the cut and the choice; how text becomes ids is the tokenizer's business.
//!
//! ```text
//! *.jsonl    one JSON value a line: {"text": ".."}, {"messages": [..]} (through the model's chat template),
//!            {"ids": [..]} or a bare array of token ids
//! other      UTF-8 text, one document a file
//! ```
//!
//! Documents are joined in order (each begins with the special tokens its tokenizer adds) and cut into rows of
//! equal length; what is left over at the end is not used. Of those rows, `rows` are drawn without replacement.

use std::fs;
use std::path::{Path, PathBuf};

use qtool_formats::FormatError;
use serde_json::{Value, json};

use crate::{Error, Result};

/// What turns text into ids.
pub trait Encode {
    /// Ids of a document, special tokens included.
    fn text(&self, text: &str) -> Result<Vec<u32>>;
    /// Ids of a conversation.
    fn messages(&self, messages: &Value) -> Result<Vec<u32>>;
}

/// What is asked of the corpus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CorpusOptions {
    /// Files, in order.
    pub files: Vec<PathBuf>,
    /// Most rows.
    pub rows: usize,
    /// Tokens of a row.
    pub length: usize,
    /// Which rows, and in which order.
    pub seed: u64,
}

/// Rows of ids, all of one length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Corpus {
    rows: Vec<Vec<u32>>,
    /// Every option and digest, for manifests.
    description: Value,
}

impl Corpus {
    /// Reads, cuts and draws. `vocabulary` bounds the ids.
    ///
    /// Fails when a file cannot be read or is no UTF-8, a line is no such JSON, an id is beyond the
    /// vocabulary, or the text does not fill a single row.
    pub fn read(options: &CorpusOptions, encode: &dyn Encode, vocabulary: usize) -> Result<Self> {
        let mut stream: Vec<u32> = Vec::new();
        let mut files = Vec::new();
        for path in &options.files {
            let bytes = fs::read(path).map_err(FormatError::io(path, "read"))?;
            let fault = |line: Option<usize>, reason: String| Error::Corpus {
                path: path.clone(),
                line,
                reason,
            };
            let text = std::str::from_utf8(&bytes).map_err(|e| {
                fault(
                    None,
                    format!("expected UTF-8 text, the byte at {} is none", e.valid_up_to()),
                )
            })?;
            let before = stream.len();
            if path.extension().is_some_and(|e| e == "jsonl") {
                for (number, line) in text.lines().enumerate().filter(|(_, l)| !l.trim().is_empty()) {
                    let ids = line_ids(line, encode, vocabulary)
                        .map_err(|reason| fault(Some(number + 1), reason))?;
                    stream.extend(ids);
                }
            } else {
                stream.extend(encode.text(text)?);
            }
            files.push(json!({
                "name": path.file_name().map(|n| n.to_string_lossy().into_owned()),
                "digest": format!("blake3:{}", blake3::hash(&bytes).to_hex()),
                "tokens": stream.len() - before,
            }));
        }
        if let Some(id) = stream.iter().find(|&&id| id as usize >= vocabulary) {
            return Err(Error::Vocabulary { id: *id, vocabulary });
        }
        let cut: Vec<&[u32]> = stream.chunks_exact(options.length).collect();
        if cut.is_empty() {
            return Err(Error::ShortCorpus {
                tokens: stream.len(),
                length: options.length,
            });
        }
        let drawn = draw(cut.len(), options.rows, options.seed);
        let rows: Vec<Vec<u32>> = drawn.iter().map(|&i| cut[i].to_vec()).collect();
        let mut hasher = blake3::Hasher::new();
        rows.iter().flatten().for_each(|id| {
            hasher.update(&id.to_le_bytes());
        });
        let description = json!({
            "files": files,
            "rows": rows.len(),
            "length": options.length,
            "seed": options.seed,
            "digest": format!("blake3:{}", hasher.finalize().to_hex()),
        });
        Ok(Self { rows, description })
    }

    /// The rows.
    pub fn rows(&self) -> &[Vec<u32>] {
        &self.rows
    }

    /// Tokens in all.
    pub fn tokens(&self) -> usize {
        self.rows.iter().map(Vec::len).sum()
    }

    /// Files, options and digests.
    pub fn description(&self) -> &Value {
        &self.description
    }
}

fn line_ids(line: &str, encode: &dyn Encode, vocabulary: usize) -> Result<Vec<u32>, String> {
    let value: Value = serde_json::from_str(line).map_err(|e| format!("no JSON: {e}"))?;
    if let Some(ids) = value.as_array().or_else(|| value.get("ids")?.as_array()) {
        let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
        let wrong = |v: &Value| format!("expected token ids of 0..{vocabulary}, got {v}");
        return ids.iter().map(|v| id(v).ok_or_else(|| wrong(v))).collect();
    }
    if let Some(text) = value.get("text").and_then(Value::as_str) {
        return encode.text(text).map_err(|e| e.to_string());
    }
    if let Some(messages) = value.get("messages").filter(|m| m.is_array()) {
        return encode.messages(messages).map_err(|e| e.to_string());
    }
    Err("expected an object with text, messages or ids, or an array of token ids".to_owned())
}

/// `wanted` of the numbers below `total`, in an order that only `seed` decides: the head of a Fisher-Yates
/// shuffle driven by SplitMix64 (Steele, Lea, Flood 2014). Kept here because its output is part of what a
/// seed means, for ever.
fn draw(total: usize, wanted: usize, seed: u64) -> Vec<usize> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    };
    let mut all: Vec<usize> = (0..total).collect();
    let wanted = wanted.min(total);
    for i in 0..wanted {
        let left = (total - i) as u64;
        all.swap(i, i + (next() % left) as usize);
    }
    all.truncate(wanted);
    all
}

/// The corpus's rows in parts of fixed bounds, so that parts made apart add up to the same sums.
pub const SLICES: usize = 8;

/// Rows of slice `slice` of [`SLICES`].
pub fn slice_rows(rows: usize, slice: usize) -> std::ops::Range<usize> {
    rows * slice / SLICES..rows * (slice + 1) / SLICES
}

/// `path` as it appears in messages about a corpus line.
pub fn place(path: &Path, line: Option<usize>) -> String {
    line.map_or_else(
        || path.display().to_string(),
        |line| format!("{}, line {line}", path.display()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A letter is its number in the alphabet.
    struct Letters;

    impl Encode for Letters {
        fn text(&self, text: &str) -> Result<Vec<u32>> {
            let letters = text.bytes().filter(u8::is_ascii_lowercase);
            Ok(letters.map(|b| u32::from(b - b'a')).collect())
        }
        fn messages(&self, messages: &Value) -> Result<Vec<u32>> {
            self.text(&messages.to_string())
        }
    }

    fn read(name: &str, content: &str, rows: usize, length: usize, seed: u64) -> Result<Corpus> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(name);
        fs::write(&path, content).unwrap();
        let options = CorpusOptions {
            files: vec![path],
            rows,
            length,
            seed,
        };
        Corpus::read(&options, &Letters, 26)
    }

    #[test]
    fn documents_are_joined_and_cut() {
        let corpus = read("a.txt", "abc def ghi j", 10, 3, 0).unwrap();
        let mut rows = corpus.rows().to_vec();
        rows.sort();
        assert_eq!(rows, [[0, 1, 2], [3, 4, 5], [6, 7, 8]], "j is left over");
        let lines = "{\"text\": \"ab\"}\n\n[2, 3]\n{\"ids\": [4]}\n{\"messages\": []}\n";
        assert_eq!(read("a.jsonl", lines, 1, 5, 0).unwrap().rows(), [[0, 1, 2, 3, 4]]);
    }

    #[test]
    fn a_seed_draws_the_same_rows_for_ever() {
        assert_eq!(draw(10, 4, 0), draw(10, 9, 0)[..4]);
        assert_ne!(draw(100, 10, 0), draw(100, 10, 1));
        let mut all = draw(50, 50, 7);
        all.sort_unstable();
        assert_eq!(all, (0..50).collect::<Vec<_>>());
        assert_eq!(draw(8, 8, 1), [1, 0, 2, 3, 5, 7, 4, 6]);
    }

    #[test]
    fn slices_cover_all_rows_once() {
        for rows in [1, 7, 8, 128, 129] {
            let all: Vec<usize> = (0..SLICES).flat_map(|s| slice_rows(rows, s)).collect();
            assert_eq!(all, (0..rows).collect::<Vec<_>>());
        }
    }

    #[test]
    fn bad_corpora_say_where() {
        for (name, content, expected) in [
            ("a.txt", "ab", "2 tokens"),
            ("a.jsonl", "{\"text\": \"abc\"}\nnonsense", "line 2"),
            ("a.jsonl", "{\"txt\": \"abc\"}", "text, messages or ids"),
            ("a.jsonl", "[1, 2, -3]", "got -3"),
            ("a.jsonl", "[1, 2, 26]", "26"),
        ] {
            let message = read(name, content, 1, 3, 0).unwrap_err().to_string();
            assert!(message.contains(expected), "{content}: {message}");
        }
    }
}
