//! What can be wrong with files, sorted by whose fault it is. Every message is one sentence that
//! names the file, the tensor where there is one, what was expected, what was found, and what to
//! do where that is known.

use std::io;
use std::path::{Path, PathBuf};

use thiserror::Error;

/// Everything this package can fail with.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The operating system refused.
    #[error("{}: cannot {action}: {source}{}", path.display(), io_advice(source))]
    Io {
        /// File or folder.
        path: PathBuf,
        /// What was attempted, as a verb.
        action: &'static str,
        /// The system's reason.
        source: io::Error,
    },
    /// A folder without weights.
    #[error("{}: holds neither model.safetensors nor model.safetensors.index.json; give a model folder or a .safetensors file", path.display())]
    NoWeights {
        /// The folder.
        path: PathBuf,
    },
    /// The file is shorter or longer than its header says.
    #[error("{}: expected {expected} bytes by its header, got {got}; download or copy the file again", path.display())]
    FileSize {
        /// The file.
        path: PathBuf,
        /// Bytes by header.
        expected: u64,
        /// Bytes on disk.
        got: u64,
    },
    /// The safetensors header cannot be used.
    #[error("{}: not a usable safetensors header: {reason}", path.display())]
    Header {
        /// The file.
        path: PathBuf,
        /// What is wrong, in words.
        reason: String,
    },
    /// A GGUF file cannot be used.
    #[error("{}: not a usable GGUF file: {reason}", path.display())]
    Gguf {
        /// The file.
        path: PathBuf,
        /// What is wrong, in words.
        reason: String,
    },
    /// One tensor's entry contradicts itself or its neighbours.
    #[error("{}: tensor {tensor}: {reason}", path.display())]
    TensorEntry {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What is wrong, in words.
        reason: String,
    },
    /// A tensor's bytes do not fit its shape.
    #[error("{}: tensor {tensor}: expected {expected}, got {got} bytes", path.display())]
    TensorSize {
        /// The file.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What shape and dtype ask for.
        expected: String,
        /// Bytes found.
        got: u64,
    },
    /// A tensor that should be there is not.
    #[error("{}: tensor {tensor} is missing; {advice}", path.display())]
    MissingTensor {
        /// File or folder searched.
        path: PathBuf,
        /// The tensor.
        tensor: String,
        /// What to do.
        advice: &'static str,
    },
    /// The index file and the shards disagree.
    #[error("{}: {reason}", path.display())]
    Index {
        /// The index file.
        path: PathBuf,
        /// What is wrong, in words.
        reason: String,
    },
    /// A JSON side file does not parse or does not mean anything.
    #[error("{}: {reason}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What is wrong, in words.
        reason: String,
    },
    /// The manifest contradicts itself or the files.
    #[error("{}: {what}: expected {expected}, got {got}", path.display())]
    Manifest {
        /// The manifest or the file it speaks of.
        path: PathBuf,
        /// Which entry.
        what: String,
        /// By the manifest.
        expected: String,
        /// Found.
        got: String,
    },
    /// A combination of bits, grid, groups and scale dtype that does not exist.
    #[error("no such scheme: {got}; {expected}")]
    Scheme {
        /// What was asked for.
        got: String,
        /// What exists.
        expected: String,
    },
    /// A scheme that does not fit a weight's shape.
    #[error("a weight of {n} x {k} cannot be stored as {scheme}: {reason}")]
    SchemeShape {
        /// The scheme.
        scheme: String,
        /// Rows.
        n: usize,
        /// Columns.
        k: usize,
        /// Why, and what would fit.
        reason: String,
    },
    /// Codes, scales or zero points that the scheme forbids.
    #[error("{what}: expected {expected}, got {got}")]
    Weight {
        /// Which part.
        what: &'static str,
        /// What the scheme asks for.
        expected: String,
        /// What was given.
        got: String,
    },
    /// A model that FastDeploy's layout cannot hold.
    #[error("{}: {reason}", path.display())]
    FastDeploy {
        /// The model, its `config.json`, or the artifact.
        path: PathBuf,
        /// Why, and what to do.
        reason: String,
    },
    /// An artifact that an export format cannot hold.
    #[error("{}: {reason}", path.display())]
    Export {
        /// The artifact.
        path: PathBuf,
        /// Which tensor, why, and what to do.
        reason: String,
    },
    /// The target is there already.
    #[error("{}: exists already; pass --force to replace it, or choose another folder", path.display())]
    TargetExists {
        /// The target.
        path: PathBuf,
    },
    /// `--force` on something that qtool did not write.
    #[error("{}: --force replaces only folders that qtool wrote (with qtool.json, qtool-export.json or stats.json in them); remove this one by hand if it may go", path.display())]
    TargetForeign {
        /// The target.
        path: PathBuf,
    },
    /// Another run holds the lock of this target.
    #[error("{}: another qtool run is writing this folder; wait for it or choose another folder", path.display())]
    TargetBusy {
        /// The target.
        path: PathBuf,
    },
    /// The source changed under a running command.
    #[error("{}: the file changed while it was being read (expected {expected} bytes, got {got}); nothing was written", path.display())]
    SourceChanged {
        /// The file.
        path: PathBuf,
        /// Bytes when opened.
        expected: u64,
        /// Bytes now.
        got: u64,
    },
}

impl FormatError {
    /// Wraps an I/O error with the path and the attempted action ("open", "write" ...).
    pub fn io(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            path: path.to_owned(),
            action,
            source,
        }
    }
}

/// Longest text of a foreign file that a message repeats, in bytes.
const MAX_QUOTE_BYTES: usize = 400;

/// Text of a foreign file as a message may repeat it: control characters escaped, so that it
/// cannot write to the terminal by itself, and cut where it is too long to read.
pub(crate) fn quoted(text: &str) -> String {
    let mut out = String::new();
    for c in text.chars() {
        if out.len() >= MAX_QUOTE_BYTES {
            out.push_str(" ...");
            break;
        }
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

fn io_advice(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull => "; free some space or choose a folder on another disk",
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "; check the permissions or choose another folder"
        }
        io::ErrorKind::NotFound => "; check the path",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_text_stays_on_its_line() {
        assert_eq!(quoted("层 a/b"), "层 a/b");
        assert_eq!(quoted("a\n\u{1b}[2J\u{9b}"), "a\\n\\u{1b}[2J\\u{9b}");
        assert!(quoted(&"\u{1}".repeat(10_000)).len() < MAX_QUOTE_BYTES + 20);
    }
}
