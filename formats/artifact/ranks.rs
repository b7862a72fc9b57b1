//! A model split for tensor parallelism: one complete artifact per rank, each in a folder of its own
//! with config and tokenizer, and beside them a `qtool.json` that only names these folders.
//!
//! ```text
//! OUT/qtool.json        {"format": "qtool-ranks", "version": 1, "tool": ..., "ranks": ["rank0", "rank1"]}
//! OUT/rank0/            an artifact
//! OUT/rank1/            an artifact
//! ```

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::MANIFEST_FILE;
use crate::checkpoint::shards::{is_plain_name, read_json};
use crate::error::quoted;
use crate::{FormatError, Result};

/// Value of the `format` key.
pub const RANKS_FORMAT: &str = "qtool-ranks";
/// Version of the index.
pub const RANKS_VERSION: u32 = 1;

/// The index of a split model.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankIndex {
    /// Always [`RANKS_FORMAT`].
    pub format: String,
    /// [`RANKS_VERSION`] of the writer.
    pub version: u32,
    /// Name and version of the writing program.
    pub tool: String,
    /// Names of the ranks' folders, in order.
    pub ranks: Vec<String>,
}

impl RankIndex {
    /// The index of so many ranks.
    pub fn new(tool: &str, ranks: usize) -> Self {
        Self {
            format: RANKS_FORMAT.to_owned(),
            version: RANKS_VERSION,
            tool: tool.to_owned(),
            ranks: (0..ranks).map(|rank| format!("rank{rank}")).collect(),
        }
    }

    /// The JSON text, ending in a line break.
    pub fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).unwrap_or_default();
        text.push('\n');
        text
    }

    /// The ranks' folders when `folder` holds a split model, `None` when it holds anything else.
    pub fn folders(folder: &Path) -> Result<Option<Vec<PathBuf>>> {
        /// The part that says what it is.
        #[derive(Deserialize)]
        struct Head {
            format: Option<String>,
        }
        let path = folder.join(MANIFEST_FILE);
        if !path.is_file() {
            return Ok(None);
        }
        // What does not parse is no index; whoever opens it as a manifest says why.
        let Ok(head) = read_json::<Head>(&path) else {
            return Ok(None);
        };
        if head.format.as_deref() != Some(RANKS_FORMAT) {
            return Ok(None);
        }
        let index: Self = read_json(&path)?;
        let bad = |what: &str, expected: String, got: String| FormatError::Manifest {
            path: path.clone(),
            what: what.to_owned(),
            expected,
            got,
        };
        if index.version == 0 || index.version > RANKS_VERSION {
            let expected = format!("up to {RANKS_VERSION}; use a newer qtool");
            return Err(bad("version", expected, index.version.to_string()));
        }
        if let Some(name) = index.ranks.iter().find(|name| !is_plain_name(name)) {
            return Err(bad(
                "ranks",
                "names of folders in this one".to_owned(),
                quoted(name),
            ));
        }
        if index.ranks.is_empty() {
            return Err(bad("ranks", "at least one".to_owned(), "none".to_owned()));
        }
        Ok(Some(index.ranks.iter().map(|name| folder.join(name)).collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_its_folders_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(RankIndex::folders(dir.path()).unwrap(), None);
        let path = dir.path().join(MANIFEST_FILE);
        std::fs::write(&path, RankIndex::new("t", 2).to_json()).unwrap();
        let folders = RankIndex::folders(dir.path()).unwrap();
        assert_eq!(
            folders,
            Some(vec![dir.path().join("rank0"), dir.path().join("rank1")])
        );
        for (ranks, version) in [("[]", 1), ("[\"../x\"]", 1), ("[\"rank0\"]", 2)] {
            let text =
                format!(r#"{{"format":"qtool-ranks","version":{version},"tool":"t","ranks":{ranks}}}"#);
            std::fs::write(&path, text).unwrap();
            assert!(RankIndex::folders(dir.path()).is_err(), "{ranks} {version}");
        }
        std::fs::write(&path, r#"{"format":"qtool","version":1}"#).unwrap();
        assert_eq!(RankIndex::folders(dir.path()).unwrap(), None);
    }
}
