//! The one place that maps a file. Everything else takes slices.
//!
//! A mapping is sound only while nobody truncates or rewrites the file. That cannot be enforced
//! from here; [`MappedFile::check_unchanged`] narrows the window (the pipelines call it between
//! batches) and turns the common case, a file replaced during a long run, into a sentence.
#![allow(unsafe_code)]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use memmap2::{Advice, Mmap};

use crate::{FormatError, Result};

/// A read-only mapping of a whole file.
#[derive(Debug)]
pub struct MappedFile {
    path: PathBuf,
    file: File,
    modified: Option<SystemTime>,
    map: Mmap,
}

impl MappedFile {
    /// Maps `path`. Fails when it cannot be opened, is not a regular file, or is empty.
    pub fn open(path: &Path) -> Result<Self> {
        // Asked before opening: opening a pipe would wait for its writer.
        if !fs::metadata(path)
            .map_err(FormatError::io(path, "open"))?
            .is_file()
        {
            return Err(FormatError::Header {
                path: path.to_owned(),
                reason: "not a regular file".to_owned(),
            });
        }
        let file = File::open(path).map_err(FormatError::io(path, "open"))?;
        let metadata = file.metadata().map_err(FormatError::io(path, "read the size"))?;
        if metadata.len() == 0 {
            return Err(FormatError::Header {
                path: path.to_owned(),
                reason: "the file is empty".to_owned(),
            });
        }
        // SAFETY: the mapping is read-only and private to this value. Its contract, that the file
        // is not changed while mapped, is the caller's; see the module's text.
        let map = unsafe { Mmap::map(&file) }.map_err(FormatError::io(path, "map"))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            modified: metadata.modified().ok(),
            map,
        })
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads `len` bytes from `offset` into memory and, where the system can, maps them, so that whoever
    /// uses them next neither waits nor faults. Only a hint; failures are ignored.
    pub fn read_ahead(&self, offset: usize, len: usize) {
        let end = offset.saturating_add(len).min(self.map.len());
        if offset < end {
            let _ = self.map.advise_range(Advice::WillNeed, offset, end - offset);
            #[cfg(target_os = "linux")]
            let _ = self.map.advise_range(Advice::PopulateRead, offset, end - offset);
        }
    }

    /// Fails when size or modification time are no longer those seen at opening.
    pub fn check_unchanged(&self) -> Result<()> {
        let metadata = self
            .file
            .metadata()
            .map_err(FormatError::io(&self.path, "read the size"))?;
        let expected = self.map.len() as u64;
        if metadata.len() != expected || metadata.modified().ok() != self.modified {
            return Err(FormatError::SourceChanged {
                path: self.path.clone(),
                expected,
                got: metadata.len(),
            });
        }
        Ok(())
    }
}
