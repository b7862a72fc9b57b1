//! Which files a checkpoint consists of: a bare file, one `model.safetensors`, or the shards that
//! `model.safetensors.index.json` names. Reads the index; opens no shard.
//!
//! The index (Hugging Face habit) is `{"metadata": {"total_size": bytes}, "weight_map": {tensor:
//! file name}}`. Known oddity: `total_size` counts tensor bytes only, not headers; many writers
//! leave it wrong, so it is not checked.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use crate::error::quoted;
use crate::{FormatError, Result, limits};

/// File name of a single-file checkpoint.
pub const SINGLE_FILE: &str = "model.safetensors";
/// File name of the index of a sharded checkpoint.
pub const INDEX_FILE: &str = "model.safetensors.index.json";

/// The files of a checkpoint, in reading order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShardList {
    /// The folder that holds them and the side files.
    pub folder: PathBuf,
    /// Weight files.
    pub files: Vec<PathBuf>,
    /// Tensor name to file, where an index says so.
    pub index: Option<BTreeMap<String, String>>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl ShardList {
    /// Finds the weight files of a folder or takes a `.safetensors` file as it is.
    pub fn find(path: &Path) -> Result<Self> {
        let metadata = fs::metadata(path).map_err(FormatError::io(path, "open"))?;
        if metadata.is_file() {
            let folder = path
                .parent()
                .filter(|p| !p.as_os_str().is_empty())
                .unwrap_or(Path::new("."));
            return Ok(Self {
                folder: folder.to_owned(),
                files: vec![path.to_owned()],
                index: None,
            });
        }
        let index = path.join(INDEX_FILE);
        if index.is_file() {
            return Self::from_index(path, &index);
        }
        let single = path.join(SINGLE_FILE);
        if single.is_file() {
            return Ok(Self {
                folder: path.to_owned(),
                files: vec![single],
                index: None,
            });
        }
        Err(FormatError::NoWeights {
            path: path.to_owned(),
        })
    }

    fn from_index(folder: &Path, index: &Path) -> Result<Self> {
        let bad = |reason: String| FormatError::Index {
            path: index.to_owned(),
            reason,
        };
        let parsed: Index = read_json(index)?;
        if parsed.weight_map.is_empty() {
            return Err(bad(
                "weight_map is empty; expected tensor names and their files".to_owned()
            ));
        }
        let mut names: Vec<&str> = parsed.weight_map.values().map(String::as_str).collect();
        names.sort_unstable();
        names.dedup();
        if names.len() > limits::MAX_SHARDS {
            return Err(bad(format!(
                "names {} files; at most {} are accepted",
                names.len(),
                limits::MAX_SHARDS
            )));
        }
        for name in &names {
            if !is_plain_name(name) {
                return Err(bad(format!(
                    "names the file {}; expected a plain file name in the same folder",
                    quoted(&format!("{name:?}"))
                )));
            }
        }
        let files = names.iter().map(|name| folder.join(name)).collect();
        Ok(Self {
            folder: folder.to_owned(),
            files,
            index: Some(parsed.weight_map),
        })
    }
}

/// Whether `name` names a file of the same folder: one component, no way up or out, printable.
pub(crate) fn is_plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name)
        && !name.chars().any(char::is_control)
}

/// Reads and parses a JSON file of bounded size.
pub fn read_json<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<T> {
    let bytes = read_bounded(path)?;
    serde_json::from_slice(&bytes).map_err(|e| FormatError::Json {
        path: path.to_owned(),
        reason: format!("not the expected JSON: {}", quoted(&e.to_string())),
    })
}

/// Reads a JSON file whole. Fails when it is larger than [`limits::MAX_JSON_BYTES`] or no regular
/// file: a pipe or a device might never end.
pub(crate) fn read_bounded(path: &Path) -> Result<Vec<u8>> {
    let metadata = fs::metadata(path).map_err(FormatError::io(path, "open"))?;
    let bad = |reason: String| FormatError::Json {
        path: path.to_owned(),
        reason,
    };
    if !metadata.is_file() {
        return Err(bad("not a regular file".to_owned()));
    }
    if metadata.len() > limits::MAX_JSON_BYTES {
        return Err(bad(format!(
            "{} bytes; at most {} are accepted",
            metadata.len(),
            limits::MAX_JSON_BYTES
        )));
    }
    fs::read(path).map_err(FormatError::io(path, "read"))
}
