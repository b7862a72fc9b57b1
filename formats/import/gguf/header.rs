//! The head of a GGUF file, versions 2 and 3, little-endian: metadata and where each tensor lies. Layout:
//! [`crate::export::gguf::file`]. Nothing is allocated that the file's own length does not pay for: a count is
//! believed only as far as the bytes that are left can hold it.
//!
//! Source: the specification `docs/gguf.md` of the ggml repository.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::Path;

use super::blocks::Type;
use super::model::ROPE_FACTORS;
use crate::checkpoint::header::name_fault;
use crate::error::quoted;
use crate::{FormatError, Result, limits};

/// A value of the metadata. Numbers are widened.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// A number that is not negative.
    Unsigned(u64),
    /// A number below zero.
    Negative(i64),
    /// A number with a fraction.
    Float(f64),
    /// Yes or no.
    Bool(bool),
    /// A text.
    Text(String),
    /// Texts.
    Texts(Vec<String>),
    /// Whole numbers.
    Integers(Vec<i64>),
    /// Numbers.
    Floats(Vec<f32>),
}

/// The metadata.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Metadata(HashMap<String, Value>);

impl Metadata {
    /// A value.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.get(key)
    }

    /// Everything about the tokenizer as one text, the same for the same keys: what its digest is made of.
    pub fn tokenizer_text(&self) -> String {
        let mut keys: Vec<(&String, &Value)> = self
            .0
            .iter()
            .filter(|(key, _)| key.starts_with("tokenizer."))
            .collect();
        keys.sort_by_key(|(key, _)| *key);
        format!("{keys:?}")
    }

    /// A text.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }

    /// A count.
    pub fn count(&self, key: &str) -> Option<u64> {
        match self.get(key)? {
            Value::Unsigned(count) => Some(*count),
            _ => None,
        }
    }

    /// A count without which no model of the architecture `of` can be run: more than none; or that it is missing.
    pub(super) fn needed(&self, of: &str, name: &str) -> std::result::Result<u64, String> {
        let key = format!("{of}.{name}");
        self.count(&key).filter(|count| *count > 0).ok_or_else(|| {
            format!("it has no count {key}, which a model of its architecture needs; convert the model again")
        })
    }

    /// A number.
    pub fn number(&self, key: &str) -> Option<f64> {
        match self.get(key)? {
            Value::Unsigned(number) => Some(*number as f64),
            Value::Negative(number) => Some(*number as f64),
            Value::Float(number) => Some(*number),
            _ => None,
        }
    }

    /// Yes or no.
    pub fn flag(&self, key: &str) -> Option<bool> {
        match self.get(key)? {
            Value::Bool(flag) => Some(*flag),
            _ => None,
        }
    }

    /// Texts; none when there is no such key.
    pub fn texts(&self, key: &str) -> &[String] {
        match self.get(key) {
            Some(Value::Texts(texts)) => texts,
            _ => &[],
        }
    }

    /// Whole numbers; none when there is no such key.
    pub fn integers(&self, key: &str) -> &[i64] {
        match self.get(key) {
            Some(Value::Integers(numbers)) => numbers,
            _ => &[],
        }
    }

    /// Numbers; none when there is no such key.
    pub fn floats(&self, key: &str) -> &[f32] {
        match self.get(key) {
            Some(Value::Floats(numbers)) => numbers,
            _ => &[],
        }
    }
}

/// A tensor's place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// Its name in the file.
    pub name: String,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Its type.
    pub kind: Type,
    /// Bytes, from the start of the file.
    pub range: Range<usize>,
}

/// A whole head.
#[derive(Debug, Clone, PartialEq)]
pub struct Head {
    /// The metadata.
    pub metadata: Metadata,
    /// Tensors, in the order of their bytes.
    pub tensors: Vec<Info>,
    /// Bytes of the factors of rotary frequencies, where there are some.
    pub factors: Vec<u8>,
}

/// Walks over the bytes.
struct Cursor<'a> {
    path: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn fault(&self, reason: String) -> FormatError {
        FormatError::Gguf {
            path: self.path.to_owned(),
            reason,
        }
    }

    fn left(&self) -> usize {
        self.bytes.len().saturating_sub(self.at)
    }

    fn take(&mut self, count: usize, what: &str) -> Result<&'a [u8]> {
        let end = self.at.checked_add(count);
        match end.and_then(|end| self.bytes.get(self.at..end)) {
            Some(bytes) => {
                self.at += count;
                Ok(bytes)
            }
            None => Err(self.fault(format!(
                "it ends within {what} at byte {}: expected {count} bytes more, got {}; download the file again",
                self.at,
                self.left()
            ))),
        }
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let bytes = self.take(N, what)?;
        Ok(bytes.first_chunk().copied().unwrap_or([0; N]))
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64> {
        self.array(what).map(u64::from_le_bytes)
    }

    /// A count of things of which each takes at least `least` bytes.
    fn count(&mut self, least: usize, what: &str) -> Result<usize> {
        let count = self.u64(what)?;
        let most = (self.left() / least.max(1)) as u64;
        if count > most {
            return Err(self.fault(format!(
                "it claims {count} {what}, and the {} bytes that are left hold at most {most}; the file is damaged or cut off, download it again",
                self.left()
            )));
        }
        Ok(count as usize)
    }

    fn text(&mut self, what: &str) -> Result<String> {
        let length = self.count(1, &format!("bytes of {what}"))?;
        let bytes = self.take(length, what)?;
        // A tokenizer may hold pieces of characters; the format says UTF-8 all the same.
        Ok(String::from_utf8_lossy(bytes).into_owned())
    }

    fn scalar(&mut self, kind: u32, key: &str) -> Result<Value> {
        let signed = |value: i64| match u64::try_from(value) {
            Ok(value) => Value::Unsigned(value),
            Err(_) => Value::Negative(value),
        };
        Ok(match kind {
            0 => Value::Unsigned(u64::from(u8::from_le_bytes(self.array(key)?))),
            1 => signed(i64::from(i8::from_le_bytes(self.array(key)?))),
            2 => Value::Unsigned(u64::from(u16::from_le_bytes(self.array(key)?))),
            3 => signed(i64::from(i16::from_le_bytes(self.array(key)?))),
            4 => Value::Unsigned(u64::from(self.u32(key)?)),
            5 => signed(i64::from(i32::from_le_bytes(self.array(key)?))),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.array(key)?))),
            7 => Value::Bool(self.array::<1>(key)? != [0]),
            8 => Value::Text(self.text(key)?),
            10 => Value::Unsigned(self.u64(key)?),
            11 => signed(i64::from_le_bytes(self.array(key)?)),
            12 => Value::Float(f64::from_le_bytes(self.array(key)?)),
            other => {
                return Err(self.fault(format!(
                    "the key {} has the type {other}, which GGUF does not have; the file is damaged, download it again",
                    quoted(key)
                )));
            }
        })
    }

    fn value(&mut self, key: &str) -> Result<Value> {
        let kind = self.u32(key)?;
        if kind != 9 {
            return self.scalar(kind, key);
        }
        let kind = self.u32(key)?;
        let width = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            8 | 10..=12 => 8,
            other => {
                return Err(self.fault(format!(
                    "the key {} is an array of the type {other}, which is not read; expected numbers or texts",
                    quoted(key)
                )));
            }
        };
        let count = self.count(width, &format!("values of {}", quoted(key)))?;
        let mut texts = Vec::new();
        let (mut integers, mut floats) = (Vec::new(), Vec::new());
        for _ in 0..count {
            match self.scalar(kind, key)? {
                Value::Text(text) => texts.push(text),
                Value::Float(number) => floats.push(number as f32),
                Value::Unsigned(number) => integers.push(i64::try_from(number).unwrap_or(i64::MAX)),
                Value::Negative(number) => integers.push(number),
                Value::Bool(flag) => integers.push(i64::from(flag)),
                _ => {}
            }
        }
        Ok(match kind {
            8 => Value::Texts(texts),
            6 | 12 => Value::Floats(floats),
            _ => Value::Integers(integers),
        })
    }

    /// A tensor's entry; its range still counts from the first tensor.
    fn info(&mut self, alignment: usize) -> Result<Info> {
        let name = self.text("a tensor's name")?;
        let at = |reason: String| FormatError::TensorEntry {
            path: self.path.to_owned(),
            tensor: quoted(&name),
            reason,
        };
        if let Some(fault) = name_fault(&name) {
            return Err(at(fault));
        }
        let dims = self.u32("a tensor's dimensions")?;
        if dims == 0 || dims > limits::MAX_GGUF_DIMS {
            return Err(at(format!(
                "{dims} dimensions; expected 1 to {}",
                limits::MAX_GGUF_DIMS
            )));
        }
        let mut shape = Vec::new();
        for _ in 0..dims {
            shape.push(self.u64("a tensor's dimensions")?);
        }
        let number = self.u32("a tensor's type")?;
        let offset = self.u64("a tensor's offset")?;
        let at = |reason: String| FormatError::TensorEntry {
            path: self.path.to_owned(),
            tensor: quoted(&name),
            reason,
        };
        let kind = Type::of(number).ok_or_else(|| {
            at(format!(
                "it is of GGML's type {number}, which is not read; those read are {}; requantize the model to one of these with llama-quantize",
                Type::names()
            ))
        })?;
        let stated = shape.clone();
        shape.reverse();
        let shape: Option<Vec<usize>> = shape.into_iter().map(|d| usize::try_from(d).ok()).collect();
        let bytes = shape.as_ref().and_then(|shape| kind.bytes(shape));
        let start = usize::try_from(offset).ok();
        let (Some(shape), Some(bytes), Some(start)) = (shape, bytes, start) else {
            return Err(at(format!(
                "{stated:?} is no whole number of {}'s blocks of {} weights, or its size overflows",
                kind.name(),
                kind.block().0
            )));
        };
        if !start.is_multiple_of(alignment) {
            return Err(at(format!(
                "expected its data at a multiple of {alignment}, got offset {start}"
            )));
        }
        let end = start
            .checked_add(bytes)
            .ok_or_else(|| at(format!("the offset {start} overflows")))?;
        Ok(Info {
            name,
            shape,
            kind,
            range: start..end,
        })
    }
}

/// Parses the head of a whole file given as bytes.
pub fn parse(path: &Path, file: &[u8]) -> Result<Head> {
    let mut cursor = Cursor {
        path,
        bytes: file,
        at: 0,
    };
    if cursor.array::<4>("the magic number")? != *b"GGUF" {
        return Err(cursor.fault("it does not begin with GGUF; expected a model of llama.cpp".to_owned()));
    }
    match cursor.u32("the version")? {
        2 | 3 => {}
        other => {
            let swapped = matches!(other.swap_bytes(), 2 | 3);
            return Err(cursor.fault(if swapped {
                "it is big-endian, expected little-endian; convert the model on a little-endian machine"
                    .to_owned()
            } else {
                format!("it is of version {other}, expected 2 or 3; convert the model with a newer llama.cpp")
            }));
        }
    }
    let tensors = cursor.u64("the number of tensors")?;
    let keys = cursor.count(13, "keys")?;
    // A tensor's entry has at least a length, a dimension's count, a dimension, a type and an offset.
    let most = (cursor.left() / 32) as u64;
    if tensors > most {
        return Err(cursor.fault(format!(
            "it claims {tensors} tensors, and the {} bytes that are left hold at most {most}; the file is damaged or cut off, download it again",
            cursor.left()
        )));
    }
    let mut metadata = Metadata::default();
    for _ in 0..keys {
        let key = cursor.text("a key")?;
        let value = cursor.value(&key)?;
        if metadata.0.insert(key.clone(), value).is_some() {
            return Err(cursor.fault(format!("it holds the key {} twice", quoted(&key))));
        }
    }
    let alignment = metadata.count("general.alignment").unwrap_or(32);
    let alignment = usize::try_from(alignment).unwrap_or(0);
    if !alignment.is_power_of_two() || alignment > limits::MAX_GGUF_ALIGNMENT {
        return Err(cursor.fault(format!(
            "general.alignment is {alignment}; expected a power of two of at most {}",
            limits::MAX_GGUF_ALIGNMENT
        )));
    }
    let mut infos = Vec::new();
    for _ in 0..tensors {
        infos.push(cursor.info(alignment)?);
    }
    let data = cursor.at.next_multiple_of(alignment);
    placed(path, file.len(), data, &mut infos)?;
    let factors = infos.iter().find(|info| info.name == ROPE_FACTORS);
    let factors = factors.and_then(|info| file.get(info.range.clone()));
    Ok(Head {
        metadata,
        factors: factors.unwrap_or_default().to_vec(),
        tensors: infos,
    })
}

/// Moves ranges to where they are in the file. Fails when one is outside, or two overlap or have one name.
fn placed(path: &Path, length: usize, data: usize, infos: &mut [Info]) -> Result<()> {
    infos.sort_by_key(|info| (info.range.start, info.range.end));
    let mut names = HashSet::new();
    let mut free = 0;
    for info in infos {
        let at = |reason: String| FormatError::TensorEntry {
            path: path.to_owned(),
            tensor: info.name.clone(),
            reason,
        };
        if !names.insert(info.name.clone()) {
            return Err(at("the file holds it twice".to_owned()));
        }
        if info.range.start < free {
            return Err(at(format!(
                "its data begin at {}, within another tensor's that end at {free}",
                info.range.start
            )));
        }
        free = info.range.end;
        match (
            info.range.start.checked_add(data),
            info.range.end.checked_add(data),
        ) {
            (Some(start), Some(end)) if end <= length => info.range = start..end,
            (_, end) => {
                return Err(at(format!(
                    "its data end at byte {}, and the file has {length}; it is cut off, download it again",
                    end.map_or_else(|| "beyond all".to_owned(), |end| end.to_string())
                )));
            }
        }
    }
    Ok(())
}
