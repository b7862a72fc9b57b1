//! Running text cut into windows of tokens, for tasks that score every token.
//!
//! `.jsonl` files hold one document a line (`{"text": ..}` or `{"ids": [..]}`), any other file is one document.
//! Every document is cut by itself. With windows of W tokens that start every S (the stride):
//!
//! ```text
//! S = W  disjoint   each token but the first of its window is scored, from what stands before it in the window
//! S < W  sliding    each token but the document's first is scored once, from at least W - S tokens before it
//!                   (or all there are)
//! ```
//!
//! The last window of a document is as long as what is left, and is left out when nothing in it can be scored.

use serde_json::{Map, Value, json};

use super::data::{TextFile, stratified};
use super::setup::Setup;
use crate::report::DataFile;
use crate::scorer::{Scorer, Window};
use crate::{Error, Result};

/// Windows of a file.
#[derive(Debug, Clone, PartialEq)]
pub struct Windows {
    /// The file.
    pub files: Vec<DataFile>,
    /// The windows.
    pub windows: Vec<Window>,
    /// UTF-8 bytes that the scored tokens of each window stand for: their share of their document's bytes by number
    /// of tokens, which in the sum is off only by the tokens that are not scored. `None` for ids without text.
    pub bytes: Option<Vec<f64>>,
    /// What decided the cut.
    pub settings: std::collections::BTreeMap<String, Value>,
}

/// Tokens and bytes of a document.
type Document = (Vec<u32>, Option<usize>);

impl Windows {
    /// Reads and cuts, with the base's tokenizer.
    ///
    /// Fails when the file holds no text, a window is longer than the context or too short to score anything, or the
    /// stride is not within it.
    pub fn read(task: &str, setup: &Setup, base: &dyn Scorer) -> Result<Self> {
        let stride = setup.stride.unwrap_or(setup.window);
        let fault = |reason: String| Error::Task {
            task: task.to_owned(),
            reason,
        };
        if setup.window < 2 || stride == 0 || stride > setup.window {
            return Err(fault(format!(
                "windows of {} tokens every {stride}: expected at least 2 tokens and a stride of 1 to the window's length",
                setup.window
            )));
        }
        if let Some(context) = base.context().filter(|c| setup.window > *c) {
            return Err(fault(format!(
                "windows of {} tokens do not fit the base's context of {context}; pass a smaller --window",
                setup.window
            )));
        }
        if !base.abilities().windows {
            return Err(fault(
                "the base does not score given tokens; give a causal model's folder".to_owned(),
            ));
        }
        let file = TextFile::read(&setup.data)?;
        let documents = documents(&file, base)?;
        let (mut windows, mut bytes, mut of) = (Vec::new(), Some(Vec::new()), Vec::new());
        for (number, (ids, size)) in documents.iter().enumerate() {
            for window in cut(ids, setup.window, stride) {
                let scored = window.ids.len() - window.context;
                match (&mut bytes, size) {
                    (Some(bytes), Some(size)) => {
                        bytes.push(*size as f64 * scored as f64 / ids.len() as f64);
                    }
                    _ => bytes = None,
                }
                windows.push(window);
                of.push(number);
            }
        }
        if windows.is_empty() {
            return Err(file.fault(
                None,
                "has too little text to score a token, expected at least 2 tokens",
            ));
        }
        let mut settings = std::collections::BTreeMap::from([
            ("window".to_owned(), json!(setup.window)),
            ("stride".to_owned(), json!(stride)),
            ("documents".to_owned(), json!(documents.len())),
        ]);
        if let Some(limit) = setup.limit {
            let chosen = stratified(&of, limit, setup.seed);
            bytes = bytes.map(|b| chosen.iter().map(|&i| b[i]).collect());
            windows = chosen.iter().map(|&i| windows[i].clone()).collect();
            settings.insert("limit".to_owned(), json!(limit));
            settings.insert("seed".to_owned(), json!(setup.seed));
        }
        Ok(Self {
            files: vec![file.entry(windows.len())],
            windows,
            bytes,
            settings,
        })
    }

    /// Scored tokens of a window.
    pub fn scored(&self, window: usize) -> usize {
        self.windows[window].ids.len() - self.windows[window].context
    }

    /// Tokens of all windows.
    pub fn tokens(&self) -> u64 {
        self.windows.iter().map(|w| w.ids.len() as u64).sum()
    }
}

/// A document's windows; every one scores at least a token.
fn cut(ids: &[u32], length: usize, stride: usize) -> Vec<Window> {
    let mut windows = Vec::new();
    let mut start = 0;
    let mut scored = 0;
    while start < ids.len() && scored < ids.len() {
        let end = (start + length).min(ids.len());
        // Disjoint windows score all but their first token; sliding ones what none before them did.
        let context = scored.saturating_sub(start).max(1);
        if start + context < end {
            windows.push(Window {
                ids: ids[start..end].to_vec(),
                context,
            });
        }
        scored = end;
        start += stride;
    }
    windows
}

fn documents(file: &TextFile, base: &dyn Scorer) -> Result<Vec<Document>> {
    if file.path.extension().is_none_or(|e| e != "jsonl") {
        let text = file.text();
        return Ok(vec![(base.tokenize(text)?, Some(text.len()))]);
    }
    let one = |(line, object): (usize, Map<String, Value>)| {
        if let Some(text) = object.get("text").and_then(Value::as_str) {
            return Ok((base.tokenize(text)?, Some(text.len())));
        }
        let id = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
        let ids = object.get("ids").and_then(Value::as_array);
        let ids = ids.and_then(|ids| ids.iter().map(id).collect::<Option<Vec<u32>>>());
        let ids = ids.ok_or_else(|| file.fault(Some(line), "expected {\"text\": ..} or {\"ids\": [..]}"))?;
        Ok((ids, None))
    };
    file.objects()?.into_iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shape(ids: usize, length: usize, stride: usize) -> Vec<(u32, usize, usize)> {
        let ids: Vec<u32> = (0..ids as u32).collect();
        let cut = cut(&ids, length, stride);
        cut.iter().map(|w| (w.ids[0], w.ids.len(), w.context)).collect()
    }

    #[test]
    fn windows_by_hand() {
        assert_eq!(shape(10, 4, 4), [(0, 4, 1), (4, 4, 1), (8, 2, 1)]);
        assert_eq!(
            shape(9, 4, 4),
            [(0, 4, 1), (4, 4, 1)],
            "a lone last token has nothing before it"
        );
        assert_eq!(shape(10, 4, 2), [(0, 4, 1), (2, 4, 2), (4, 4, 2), (6, 4, 2)]);
        assert_eq!(shape(9, 4, 2), [(0, 4, 1), (2, 4, 2), (4, 4, 2), (6, 3, 2)]);
        assert_eq!(shape(3, 8, 8), [(0, 3, 1)]);
        assert_eq!(shape(1, 8, 8), []);
        assert_eq!(shape(0, 8, 8), []);
    }

    #[test]
    fn sliding_windows_score_each_token_but_the_first_once() {
        for (length, stride) in [(7, 3), (8, 8 - 1), (5, 1), (16, 4)] {
            for total in [2, 15, 16, 17, 40] {
                let mut seen = vec![0; total];
                for (start, len, context) in shape(total, length, stride) {
                    (start as usize + context..start as usize + len).for_each(|i| seen[i] += 1);
                    assert!(
                        start == 0 || context >= length - stride,
                        "{length} {stride} {total}"
                    );
                }
                assert_eq!(seen[0], 0);
                assert!(
                    seen[1..].iter().all(|s| *s == 1),
                    "{length} {stride} {total}: {seen:?}"
                );
            }
        }
    }
}
