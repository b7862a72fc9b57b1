//! `tokenizer.json`. The format is the `tokenizers` crate's own, so the crate runs it; this page keeps its
//! surprises (row padding, panics on damaged files) from the rest of the house.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use tokenizers::utils::truncation::{TruncationParams, truncate_encodings};
use tokenizers::{EncodeInput, Encoding, PostProcessor, Tokenizer};

use super::Row;
use crate::{Error, Result};

/// A tokenizer that the crate runs.
#[derive(Debug)]
pub struct Library {
    path: PathBuf,
    inner: Tokenizer,
    vocabulary: usize,
}

impl Library {
    /// Parses the file.
    pub fn read(path: &Path, bytes: &[u8]) -> Result<Self> {
        let fault = |reason: String| Error::Tokenizer {
            path: path.to_owned(),
            reason: format!("no usable tokenizer.json: {reason}"),
        };
        let mut inner = guarded(|| Tokenizer::from_bytes(bytes)).map_err(fault)?;
        // Cutting and padding of rows is the corpus's business; a file may carry the settings of a training run.
        inner.with_padding(None);
        guarded(|| inner.with_truncation(None).map(|_| ())).map_err(fault)?;
        let vocabulary = inner
            .get_vocab(true)
            .into_values()
            .max()
            .map_or(0, |id| id as usize + 1);
        if vocabulary == 0 {
            return Err(fault("its vocabulary is empty".to_owned()));
        }
        Ok(Self {
            path: path.to_owned(),
            inner,
            vocabulary,
        })
    }

    fn run<'s>(&self, input: impl Into<EncodeInput<'s>>, special: bool) -> Result<Encoding> {
        guarded(|| self.inner.encode(input.into(), special)).map_err(|e| self.fault("encode a text", &e))
    }

    /// Ids of a text.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        Ok(self.run(text, special)?.get_ids().to_vec())
    }

    /// Ids of two texts, and which of them each belongs to.
    pub fn encode_pair(&self, a: &str, b: &str) -> Result<(Vec<u32>, Vec<u32>)> {
        let encoding = self.run((a, b), true)?;
        Ok((encoding.get_ids().to_vec(), encoding.get_type_ids().to_vec()))
    }

    /// One or two texts with special tokens, cut to `most` ids as transformers does with `truncation=True`.
    /// `None` where the special tokens alone are more.
    pub fn encode_row(&self, a: &str, b: Option<&str>, most: usize) -> Result<Option<Row>> {
        let added = self
            .inner
            .get_post_processor()
            .map_or(0, |p| p.added_tokens(b.is_some()));
        let Some(room) = most.checked_sub(added) else {
            return Ok(None);
        };
        let a = self.run(a, false)?;
        let b = b.map(|b| self.run(b, false)).transpose()?.map(|mut b| {
            b.set_type_ids(vec![1; b.len()]);
            b
        });
        let whole = a.len() + b.as_ref().map_or(0, Encoding::len);
        let encoding = guarded(|| {
            let params = TruncationParams {
                max_length: room,
                ..TruncationParams::default()
            };
            let (a, b) = truncate_encodings(a, b, &params)?;
            self.inner.post_process(a, b, true)
        })
        .map_err(|e| self.fault("cut a text", &e))?;
        Ok(Some(Row {
            ids: encoding.get_ids().to_vec(),
            types: encoding.get_type_ids().to_vec(),
            cut: whole.saturating_sub(room),
        }))
    }

    /// Text of ids.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        if let Some(&id) = ids.iter().find(|&&id| id as usize >= self.vocabulary) {
            let vocabulary = self.vocabulary;
            return Err(Error::Vocabulary { id, vocabulary });
        }
        guarded(|| self.inner.decode(ids, skip_special)).map_err(|e| self.fault("decode ids", &e))
    }

    /// One past the highest id.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// Id of a token.
    pub fn id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    fn fault(&self, task: &str, reason: &str) -> Error {
        Error::Tokenizer {
            path: self.path.clone(),
            reason: format!("cannot {task}: {reason}"),
        }
    }
}

/// The crate's failures as sentences. It trusts its files in a few places, where a damaged one makes it panic;
/// nothing of what it was working on is used after that.
fn guarded<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> std::result::Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => done.map_err(|e| e.to_string()),
        Err(payload) => {
            let text = payload.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| payload.downcast_ref::<&str>().copied());
            Err(format!(
                "the tokenizers crate gave up on it ({})",
                text.unwrap_or("no reason given")
            ))
        }
    }
}
