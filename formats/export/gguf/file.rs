//! The GGUF container, version 3, little-endian: metadata, then where each tensor lies, then the tensors, each
//! at a multiple of 32 bytes.
//!
//! ```text
//! "GGUF" | 3 u32 | tensors u64 | keys u64
//! key:    name | type u32 | value           a text: length u64 | UTF-8;  an array: type u32 | length u64 | values
//! tensor: name | dimensions u32 | each u64, innermost first | type u32 | offset u64 from the first tensor
//! ```
//!
//! Source: the specification `docs/gguf.md` of the ggml repository.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use crate::export::syncing::SYNC_BYTES;
use crate::{FormatError, Result, room};

/// Every tensor begins at a multiple of this.
const ALIGNMENT: u64 = 32;

/// A value of a key.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// An unsigned number.
    U32(u32),
    /// A number.
    F32(f32),
    /// Yes or no.
    Bool(bool),
    /// A text.
    Text(String),
    /// Texts.
    Texts(Vec<String>),
    /// Whole numbers.
    I32s(Vec<i32>),
    /// Numbers.
    F32s(Vec<f32>),
}

/// A tensor of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Dimensions as in the checkpoint, outermost first.
    pub shape: Vec<usize>,
    /// Number of its GGML type.
    pub kind: u32,
    /// Bytes.
    pub bytes: u64,
}

/// A file being written; tensors come whole and in order, in pieces of any size.
pub struct Writer {
    path: PathBuf,
    file: BufWriter<File>,
    entries: Vec<Entry>,
    current: usize,
    written: u64,
    unsynced: u64,
}

impl Writer {
    /// Writes everything before the first tensor.
    pub fn create(path: &Path, keys: &[(String, Value)], entries: Vec<Entry>) -> Result<Self> {
        let head = head(keys, &entries);
        let file = File::create(path).map_err(FormatError::io(path, "create"))?;
        let data: u64 = entries.iter().map(|e| e.bytes.next_multiple_of(ALIGNMENT)).sum();
        room::take(&file, path, head.len() as u64 + data)?;
        let mut this = Self {
            path: path.to_owned(),
            file: BufWriter::with_capacity(1 << 20, file),
            entries,
            current: 0,
            written: 0,
            unsynced: 0,
        };
        this.write(&head)?;
        this.skip_empty();
        Ok(this)
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.file
            .write_all(bytes)
            .map_err(FormatError::io(&self.path, "write"))
    }

    fn skip_empty(&mut self) {
        while self.entries.get(self.current).is_some_and(|e| e.bytes == 0) {
            self.current += 1;
        }
    }

    /// Appends bytes of the current tensor. Fails when it would grow beyond its size.
    pub fn append(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let (name, expected) = self
            .entries
            .get(self.current)
            .map_or((String::new(), 0), |e| (e.name.clone(), e.bytes));
        let after = self.written + bytes.len() as u64;
        if after > expected {
            return Err(FormatError::TensorSize {
                path: self.path.clone(),
                tensor: name,
                expected: format!("{expected} bytes"),
                got: after,
            });
        }
        self.write(bytes)?;
        self.written = after;
        self.unsynced += bytes.len() as u64;
        if after == expected {
            self.write(&vec![
                0;
                (expected.next_multiple_of(ALIGNMENT) - expected) as usize
            ])?;
            (self.current, self.written) = (self.current + 1, 0);
            self.skip_empty();
        }
        Ok(())
    }

    /// When much was written since the last call that gave one: a handle of the file, to be synced by another thread.
    pub(crate) fn due_for_sync(&mut self) -> Result<Option<File>> {
        if self.unsynced < SYNC_BYTES {
            return Ok(None);
        }
        self.unsynced = 0;
        let file = self.file.get_ref().try_clone();
        file.map(Some).map_err(FormatError::io(&self.path, "sync"))
    }

    /// Checks that every tensor is whole and makes the file durable.
    pub fn finish(mut self) -> Result<()> {
        if let Some(missing) = self.entries.get(self.current) {
            return Err(FormatError::TensorSize {
                path: self.path.clone(),
                tensor: missing.name.clone(),
                expected: format!("{} bytes", missing.bytes),
                got: self.written,
            });
        }
        self.file.flush().map_err(FormatError::io(&self.path, "write"))?;
        self.file
            .get_ref()
            .sync_all()
            .map_err(FormatError::io(&self.path, "sync"))
    }
}

fn head(keys: &[(String, Value)], entries: &[Entry]) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(3u32.to_le_bytes());
    out.extend((entries.len() as u64).to_le_bytes());
    out.extend((keys.len() as u64).to_le_bytes());
    for (key, value) in keys {
        text(key, &mut out);
        let (kind, array): (u32, Option<u32>) = match value {
            Value::U32(_) => (4, None),
            Value::F32(_) => (6, None),
            Value::Bool(_) => (7, None),
            Value::Text(_) => (8, None),
            Value::Texts(_) => (9, Some(8)),
            Value::I32s(_) => (9, Some(5)),
            Value::F32s(_) => (9, Some(6)),
        };
        out.extend(kind.to_le_bytes());
        out.extend(array.iter().flat_map(|kind| kind.to_le_bytes()));
        match value {
            Value::U32(v) => out.extend(v.to_le_bytes()),
            Value::F32(v) => out.extend(v.to_le_bytes()),
            Value::Bool(v) => out.push(u8::from(*v)),
            Value::Text(v) => text(v, &mut out),
            Value::Texts(all) => {
                out.extend((all.len() as u64).to_le_bytes());
                all.iter().for_each(|v| text(v, &mut out));
            }
            Value::I32s(all) => {
                out.extend((all.len() as u64).to_le_bytes());
                out.extend(all.iter().flat_map(|v| v.to_le_bytes()));
            }
            Value::F32s(all) => {
                out.extend((all.len() as u64).to_le_bytes());
                out.extend(all.iter().flat_map(|v| v.to_le_bytes()));
            }
        }
    }
    let mut offset = 0u64;
    for entry in entries {
        text(&entry.name, &mut out);
        out.extend((entry.shape.len() as u32).to_le_bytes());
        out.extend(entry.shape.iter().rev().flat_map(|&d| (d as u64).to_le_bytes()));
        out.extend(entry.kind.to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset += entry.bytes.next_multiple_of(ALIGNMENT);
    }
    out.resize(out.len().next_multiple_of(ALIGNMENT as usize), 0);
    out
}

fn text(value: &str, out: &mut Vec<u8>) {
    out.extend((value.len() as u64).to_le_bytes());
    out.extend_from_slice(value.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_by_hand() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.gguf");
        let entry = |name: &str, shape: &[usize], bytes| Entry {
            name: name.to_owned(),
            shape: shape.to_vec(),
            kind: 0,
            bytes,
        };
        let keys = [("k".to_owned(), Value::Texts(vec!["ab".to_owned()]))];
        let entries = vec![entry("x", &[2, 3], 24), entry("y", &[1], 4)];
        let mut writer = Writer::create(&path, &keys, entries.clone()).unwrap();
        writer.append(&[1; 20]).unwrap();
        writer.append(&[1; 4]).unwrap();
        assert!(writer.append(&[2; 5]).is_err(), "more than declared");
        writer.append(&[2; 4]).unwrap();
        writer.finish().unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert_eq!(bytes[..4], *b"GGUF");
        assert_eq!(bytes[24..33], [1, 0, 0, 0, 0, 0, 0, 0, b'k']);
        assert_eq!(bytes[33..41], [9, 0, 0, 0, 8, 0, 0, 0]);
        assert_eq!(bytes.len() % 32, 0);
        let data = bytes.len() - 64;
        assert_eq!(bytes[data..data + 25], [[1; 24].as_slice(), &[0]].concat());
        assert_eq!(bytes[data + 32..data + 37], [2, 2, 2, 2, 0]);

        let writer = Writer::create(&path, &keys, entries).unwrap();
        assert!(writer.finish().is_err(), "tensors are missing");
    }
}
