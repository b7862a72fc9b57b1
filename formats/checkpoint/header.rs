//! The safetensors header: eight bytes of length, JSON, then tensor bytes without holes.
//!
//! ```text
//! | 8 bytes: n, u64 little-endian | n bytes: JSON {"name": {"dtype", "shape", "data_offsets"}, ...} | data |
//! ```
//!
//! Specification and reference reader: the `safetensors` crate, whose types and final check are
//! used here. This page adds what that reader does not say: the exact numbers expected and found,
//! duplicate names, and caps from [`crate::limits`].

use std::collections::HashSet;
use std::fmt;
use std::ops::Range;
use std::path::Path;

use safetensors::SafeTensors;
use safetensors::tensor::TensorInfo;
use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};

use crate::dtype::Dtype;
use crate::error::quoted;
use crate::tensor::byte_len;
use crate::{FormatError, Result, limits};

const LENGTH_BYTES: usize = 8;
const METADATA_KEY: &str = "__metadata__";

/// One tensor's place in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Name as stored.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Byte range, counted from the start of the file.
    pub range: Range<usize>,
}

/// Parses and checks the header of a whole file given as bytes. Entries come in offset order.
///
/// Accepts exactly what the `safetensors` crate accepts, less names that are given twice or hold
/// control characters, shapes that overflow even without their zeros, and what exceeds
/// [`crate::limits`].
pub fn parse(path: &Path, file: &[u8]) -> Result<Vec<Entry>> {
    let bad = |reason: String| FormatError::Header {
        path: path.to_owned(),
        reason,
    };
    let Some((length, rest)) = file.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(bad(format!(
            "expected at least {LENGTH_BYTES} bytes, got {}",
            file.len()
        )));
    };
    let length = u64::from_le_bytes(*length);
    if length > limits::MAX_HEADER_BYTES {
        return Err(bad(format!(
            "it claims a header of {length} bytes, the format allows {}; is this a safetensors file?",
            limits::MAX_HEADER_BYTES
        )));
    }
    let Some((json, data)) = usize::try_from(length)
        .ok()
        .and_then(|n| rest.split_at_checked(n))
    else {
        return Err(FormatError::FileSize {
            path: path.to_owned(),
            expected: length.saturating_add(LENGTH_BYTES as u64),
            got: file.len() as u64,
        });
    };
    let listed: Listed = serde_json::from_slice(json).map_err(|e| bad(quoted(&e.to_string())))?;
    if let Some(name) = listed.duplicate {
        return Err(FormatError::TensorEntry {
            path: path.to_owned(),
            tensor: quoted(&name),
            reason: "the header names it twice".to_owned(),
        });
    }
    let mut tensors = listed.tensors;
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    let end = check_tiling(path, &tensors)?;
    if end != data.len() {
        let before = file.len() - data.len();
        return Err(FormatError::FileSize {
            path: path.to_owned(),
            expected: (before as u64).saturating_add(end as u64),
            got: file.len() as u64,
        });
    }
    let base = file.len() - data.len();
    let entries = tensors
        .iter()
        .map(|(name, info)| Entry {
            name: name.clone(),
            dtype: info.dtype,
            shape: info.shape.clone(),
            range: base + info.data_offsets.0..base + info.data_offsets.1,
        })
        .collect();
    // The reference reader has the last word: it also reads what is skipped here.
    SafeTensors::read_metadata(file).map_err(|e| bad(quoted(&e.to_string())))?;
    Ok(entries)
}

/// Offsets must follow each other from 0 without holes or overlaps, and each range must hold
/// exactly the bytes of its shape. Returns the end of the last one.
fn check_tiling(path: &Path, tensors: &[(String, TensorInfo)]) -> Result<usize> {
    let mut expected_start = 0usize;
    for (name, info) in tensors {
        let bad = |reason: String| FormatError::TensorEntry {
            path: path.to_owned(),
            tensor: quoted(name),
            reason,
        };
        let (start, end) = info.data_offsets;
        if let Some(fault) = name_fault(name) {
            return Err(bad(fault));
        }
        if info.shape.len() > limits::MAX_DIMS {
            return Err(bad(format!(
                "{} dimensions; at most {} are accepted",
                info.shape.len(),
                limits::MAX_DIMS
            )));
        }
        if end < start {
            return Err(bad(format!(
                "its data ends at {end}, before it starts at {start}"
            )));
        }
        if start != expected_start {
            return Err(bad(format!(
                "expected its data to start at {expected_start}, got {start}: tensors overlap or leave a hole"
            )));
        }
        let Some(expected) = byte_len(info.dtype, &info.shape) else {
            return Err(bad(format!(
                "the size of {} {:?} overflows or is not whole bytes",
                info.dtype, info.shape
            )));
        };
        if end - start != expected {
            return Err(bad(format!(
                "expected {expected} bytes for {} {:?}, got {}",
                info.dtype,
                info.shape,
                end - start
            )));
        }
        expected_start = end;
    }
    Ok(expected_start)
}

/// Why a tensor of this name is not accepted, or `None`.
pub(crate) fn name_fault(name: &str) -> Option<String> {
    if name.is_empty() || name.len() > limits::MAX_NAME_BYTES {
        return Some(format!(
            "a name of {} bytes; 1 to {} are accepted",
            name.len(),
            limits::MAX_NAME_BYTES
        ));
    }
    name.chars()
        .any(char::is_control)
        .then(|| "a name with control characters; only printable names are accepted".to_owned())
}

/// Header entries in document order, so that a name given twice is seen.
struct Listed {
    tensors: Vec<(String, TensorInfo)>,
    duplicate: Option<String>,
}

impl<'de> Deserialize<'de> for Listed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Names;
        impl<'de> Visitor<'de> for Names {
            type Value = Listed;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object of tensor entries")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Listed, A::Error> {
                let mut seen = HashSet::new();
                let mut listed = Listed {
                    tensors: Vec::new(),
                    duplicate: None,
                };
                while let Some(name) = map.next_key::<String>()? {
                    if !seen.insert(name.clone()) && listed.duplicate.is_none() {
                        listed.duplicate = Some(name.clone());
                    }
                    if name == METADATA_KEY {
                        map.next_value::<Option<std::collections::HashMap<String, String>>>()?;
                    } else {
                        let info = map
                            .next_value::<TensorInfo>()
                            .map_err(|e| de::Error::custom(format_args!("tensor {}: {e}", quoted(&name))))?;
                        listed.tensors.push((name, info));
                    }
                }
                Ok(listed)
            }
        }
        deserializer.deserialize_map(Names)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(json: &str, data: usize) -> Vec<u8> {
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(json.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    fn error(json: &str, data: usize) -> String {
        parse(Path::new("m.safetensors"), &file(json, data))
            .unwrap_err()
            .to_string()
    }

    #[test]
    fn reads_a_small_file_in_offset_order() {
        let json = r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"U8","shape":[3],"data_offsets":[4,7]},"a":{"dtype":"BF16","shape":[2,1],"data_offsets":[0,4]}}"#;
        let entries = parse(Path::new("m"), &file(json, 7)).unwrap();
        assert_eq!(
            entries.iter().map(|e| e.name.as_str()).collect::<Vec<_>>(),
            ["a", "b"]
        );
        assert_eq!(entries[1].range, 8 + json.len() + 4..8 + json.len() + 7);
    }

    #[test]
    fn each_lie_gets_its_sentence() {
        let entry = |shape: &str, a: u64, b: u64| {
            format!(r#"{{"a":{{"dtype":"U8","shape":{shape},"data_offsets":[{a},{b}]}}}}"#)
        };
        for (got, want) in [
            (error(&entry("[3]", 0, 3), 2), "expected"),
            (
                error(&entry("[3]", 0, 4), 4),
                "expected 3 bytes for U8 [3], got 4",
            ),
            (error(&entry("[3]", 1, 4), 4), "start at 0, got 1"),
            (error(&entry("[3]", 4, 1), 4), "before it starts"),
            (error(&entry("[4294967296,4294967296]", 0, 3), 3), "overflows"),
            (
                error(
                    r#"{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#,
                    0,
                ),
                "twice",
            ),
            (
                error(r#"{"a":{"dtype":"Q9","shape":[0],"data_offsets":[0,0]}}"#, 0),
                "Q9",
            ),
            (error(r#"[1]"#, 0), "JSON object"),
        ] {
            assert!(got.contains(want), "{got:?} should contain {want:?}");
        }
    }
}
