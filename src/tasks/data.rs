//! Files of items: bytes become lines, columns and JSON objects, every fault with its line. Owns what all tasks'
//! files have in common; what columns mean is each task's business.
//!
//! Text is UTF-8; a byte order mark and `\r` before a line's end are taken away, empty lines at the end of a file
//! are not items, and an empty line before it is a fault.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use qtool_formats::FormatError;
use serde_json::{Map, Value};

use crate::report::DataFile;
use crate::{Error, Result};

/// A file that has been read.
#[derive(Debug, Clone)]
pub struct TextFile {
    /// As it was given.
    pub path: PathBuf,
    /// BLAKE3 of its bytes.
    pub digest: String,
    text: String,
}

impl TextFile {
    /// Reads a file. Fails when it cannot be read, is no UTF-8, or holds nothing.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).map_err(FormatError::io(path, "read"))?;
        let digest = format!("blake3:{}", blake3::hash(&bytes).to_hex());
        let text = String::from_utf8(bytes).map_err(|e| {
            let valid = e.utf8_error().valid_up_to();
            let line = 1 + e.as_bytes()[..valid].iter().filter(|b| **b == b'\n').count();
            fault(
                path,
                Some(line),
                format!("expected UTF-8 text, the byte at {valid} is none"),
            )
        })?;
        let text = text.strip_prefix('\u{feff}').map(str::to_owned).unwrap_or(text);
        let this = Self {
            path: path.to_owned(),
            digest,
            text,
        };
        if this.text.trim().is_empty() {
            return Err(this.fault(None, "is empty, expected at least one item"));
        }
        Ok(this)
    }

    /// The whole text.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Its lines with their numbers, counted from one. Fails at an empty line before the end.
    pub fn lines(&self) -> Result<Vec<(usize, &str)>> {
        let mut lines: Vec<(usize, &str)> = self
            .text
            .split('\n')
            .map(|l| l.strip_suffix('\r').unwrap_or(l))
            .enumerate()
            .map(|(i, l)| (i + 1, l))
            .collect();
        while lines.last().is_some_and(|(_, l)| l.trim().is_empty()) {
            lines.pop();
        }
        match lines.iter().find(|(_, l)| l.trim().is_empty()) {
            Some(&(number, _)) => Err(self.fault(Some(number), "is empty, expected an item")),
            None => Ok(lines),
        }
    }

    /// Tab-separated columns of each line, all of one number out of `allowed`; `names` says what they are.
    ///
    /// Fails when a line has another number of columns, or an empty one.
    pub fn columns(&self, allowed: &[usize], names: &str) -> Result<Vec<(usize, Vec<&str>)>> {
        let lines = self.lines()?;
        let mut width = None;
        let mut rows = Vec::with_capacity(lines.len());
        for (number, line) in lines {
            let columns: Vec<&str> = line.split('\t').map(str::trim).collect();
            let expected = *width.get_or_insert(columns.len());
            if !allowed.contains(&columns.len()) || columns.len() != expected {
                let numbers: Vec<String> = match allowed.contains(&expected) {
                    true => vec![expected.to_string()],
                    false => allowed.iter().map(ToString::to_string).collect(),
                };
                let got = columns.len();
                return Err(self.fault(
                    Some(number),
                    format!(
                        "expected {} columns between tabs ({names}), got {got}",
                        numbers.join(" or ")
                    ),
                ));
            }
            if let Some(empty) = columns.iter().position(|c| c.is_empty()) {
                let reason = format!("column {} of {names} is empty", empty + 1);
                return Err(self.fault(Some(number), reason));
            }
            rows.push((number, columns));
        }
        Ok(rows)
    }

    /// JSON objects, one a line. Fails at a line that holds none.
    pub fn objects(&self) -> Result<Vec<(usize, Map<String, Value>)>> {
        let object = |(number, line): (usize, &str)| match serde_json::from_str(line) {
            Ok(Value::Object(object)) => Ok((number, object)),
            Ok(_) => Err(self.fault(Some(number), "expected a JSON object")),
            Err(e) => Err(self.fault(Some(number), format!("no JSON: {e}"))),
        };
        self.lines()?.into_iter().map(object).collect()
    }

    /// A fault of this file.
    pub fn fault(&self, line: Option<usize>, reason: impl Into<String>) -> Error {
        fault(&self.path, line, reason)
    }

    /// Its entry in a report.
    pub fn entry(&self, items: usize) -> DataFile {
        DataFile {
            path: self.path.display().to_string(),
            digest: self.digest.clone(),
            items,
        }
    }
}

/// A fault of a file.
pub fn fault(path: &Path, line: Option<usize>, reason: impl Into<String>) -> Error {
    Error::Corpus {
        path: path.to_owned(),
        line,
        reason: reason.into(),
    }
}

/// A field of an object that is a text with something in it.
pub fn text_field(file: &TextFile, line: usize, object: &Map<String, Value>, name: &str) -> Result<String> {
    match object.get(name) {
        Some(Value::String(text)) if !text.trim().is_empty() => Ok(text.clone()),
        Some(other) => Err(file.fault(Some(line), format!("{name}: expected a text, got {other}"))),
        None => {
            let there: Vec<&str> = object.keys().map(String::as_str).collect();
            let reason = format!("has no {name}; its keys are {}", there.join(", "));
            Err(file.fault(Some(line), reason))
        }
    }
}

/// A list of texts of an object.
pub fn texts_field(
    file: &TextFile,
    line: usize,
    object: &Map<String, Value>,
    name: &str,
    least: usize,
) -> Result<Vec<String>> {
    let texts: Option<Vec<String>> = object.get(name).and_then(Value::as_array).and_then(|list| {
        list.iter()
            .map(|v| v.as_str().filter(|t| !t.trim().is_empty()).map(str::to_owned))
            .collect()
    });
    texts.filter(|t| t.len() >= least).ok_or_else(|| {
        let got = object.get(name).map_or("nothing".to_owned(), Value::to_string);
        file.fault(
            Some(line),
            format!("{name}: expected a list of at least {least} texts, got {got}"),
        )
    })
}

/// SplitMix64 (Steele, Lea, Flood 2014): what a seed draws is part of what it means, for ever.
#[derive(Debug, Clone)]
pub struct Draw(u64);

impl Draw {
    /// From a seed.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number below `bound` (at least 1).
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) % bound.max(1) as u64) as usize
    }

    /// Fisher and Yates.
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

/// Indexes of `limit` of the items, in their own order: from each stratum its share of the whole, the parts left
/// over by rounding down going to the largest remainders (of equal ones, to the first stratum in order).
pub fn stratified<S: Ord + Clone>(strata: &[S], limit: usize, seed: u64) -> Vec<usize> {
    if limit >= strata.len() {
        return (0..strata.len()).collect();
    }
    let mut members: BTreeMap<S, Vec<usize>> = BTreeMap::new();
    for (i, stratum) in strata.iter().enumerate() {
        members.entry(stratum.clone()).or_default().push(i);
    }
    let mut draw = Draw::new(seed);
    let mut shares: Vec<(usize, usize, Vec<usize>)> = members
        .into_values()
        .map(|mut list| {
            draw.shuffle(&mut list);
            let scaled = list.len() * limit;
            (scaled / strata.len(), scaled % strata.len(), list)
        })
        .collect();
    let mut left = limit - shares.iter().map(|s| s.0).sum::<usize>();
    let mut order: Vec<usize> = (0..shares.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(shares[i].1));
    for i in order {
        if left == 0 {
            break;
        }
        shares[i].0 += 1;
        left -= 1;
    }
    let mut chosen: Vec<usize> = shares
        .into_iter()
        .flat_map(|(share, _, list)| list.into_iter().take(share))
        .collect();
    chosen.sort_unstable();
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(content: &[u8]) -> Result<TextFile> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.tsv");
        fs::write(&path, content).unwrap();
        TextFile::read(&path)
    }

    #[test]
    fn lines_and_columns() {
        let read = file("\u{feff}a\tb\t1\r\nc\td\t0\n\n".as_bytes()).unwrap();
        let rows = read.columns(&[3, 4], "a, b, c").unwrap();
        assert_eq!(rows, [(1, vec!["a", "b", "1"]), (2, vec!["c", "d", "0"])]);
    }

    #[test]
    fn faults_say_where() {
        for (content, expected) in [
            (b"".as_slice(), "is empty, expected at least one item"),
            (b"\n\n", "is empty"),
            (b"a\tb\t1\na\tb\n", "line 2: expected 3 columns"),
            (b"a\tb\n", "line 1: expected 3 or 4 columns"),
            (b"a\tb\t1\n\nc\td\t1\n", "line 2: is empty"),
            (b"a\t\t1\n", "line 1: column 2"),
            (b"a\tb\t1\na\xff\tb\t1\n", "line 2: expected UTF-8"),
        ] {
            let outcome = file(content).and_then(|f| f.columns(&[3, 4], "x").map(|_| ()));
            let message = outcome.unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
        let message = file(b"{}\n[1]\n").unwrap().objects().unwrap_err().to_string();
        assert!(message.contains("line 2: expected a JSON object"), "{message}");
    }

    #[test]
    fn a_draw_keeps_the_shares_of_strata() {
        let strata: Vec<usize> = (0..100).map(|i| usize::from(i % 10 == 0)).collect();
        let chosen = stratified(&strata, 20, 7);
        assert_eq!(chosen.len(), 20);
        assert_eq!(chosen.iter().filter(|&&i| strata[i] == 1).count(), 2);
        assert!(chosen.windows(2).all(|w| w[0] < w[1]));
        assert_eq!(chosen, stratified(&strata, 20, 7));
        assert_ne!(chosen, stratified(&strata, 20, 8));
        assert_eq!(stratified(&strata, 500, 7).len(), 100);
        assert_eq!(stratified(&[0, 1, 2], 2, 0).len(), 2);
    }
}
