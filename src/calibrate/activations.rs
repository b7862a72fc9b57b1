//! The activations between two blocks, for all calibration rows. Owns where they lie: in memory, or, above a
//! bound, in a scratch file without a name that the system removes when the run ends, however it ends.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use qtool_formats::FormatError;

use crate::Result;

/// Bytes of activations kept in memory; more go to the scratch file.
pub const MEMORY_BYTES: u64 = 256 << 20;

/// (tokens, columns) of f32.
pub struct Activations {
    columns: usize,
    place: Place,
}

enum Place {
    Memory(Vec<f32>),
    File { file: File, folder: PathBuf },
}

impl Activations {
    /// Room for `tokens` rows. Fails when the scratch file cannot be made in `folder` or the disk is too full
    /// for it.
    pub fn new(folder: &Path, tokens: usize, columns: usize) -> Result<Self> {
        let bytes = (tokens * columns * 4) as u64;
        let place = if bytes <= MEMORY_BYTES {
            Place::Memory(vec![0.0; tokens * columns])
        } else {
            let file =
                tempfile::tempfile_in(folder).map_err(FormatError::io(folder, "make a scratch file in"))?;
            file.set_len(bytes)
                .map_err(FormatError::io(folder, "reserve activations in"))?;
            Place::File {
                file,
                folder: folder.to_owned(),
            }
        };
        Ok(Self { columns, place })
    }

    /// Columns of a row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Rows `from..` into `out`, as many as fit.
    pub fn read(&self, from: usize, out: &mut [f32]) -> Result<()> {
        let at = from * self.columns;
        match &self.place {
            Place::Memory(values) => out.copy_from_slice(&values[at..at + out.len()]),
            Place::File { file, folder } => {
                let mut bytes = vec![0; out.len() * 4];
                file.read_exact_at(&mut bytes, (at * 4) as u64)
                    .map_err(FormatError::io(folder, "read activations in"))?;
                for (value, bytes) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *value = f32::from_le_bytes(*bytes);
                }
            }
        }
        Ok(())
    }

    /// `values` to rows `from..`.
    pub fn write(&mut self, from: usize, values: &[f32]) -> Result<()> {
        let at = from * self.columns;
        match &mut self.place {
            Place::Memory(all) => all[at..at + values.len()].copy_from_slice(values),
            Place::File { file, folder } => {
                let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
                file.write_all_at(&bytes, (at * 4) as u64)
                    .map_err(FormatError::io(folder, "write activations in"))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_and_file_hold_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let mut memory = Activations::new(folder.path(), 6, 3).unwrap();
        let mut file = Activations {
            columns: 3,
            place: Place::File {
                file: tempfile::tempfile_in(folder.path()).unwrap(),
                folder: folder.path().to_owned(),
            },
        };
        for part in [&mut memory, &mut file] {
            part.write(0, &[0.0; 18]).unwrap();
            part.write(2, &[1.5, -2.0, 3.25, 4.0, 5.0, f32::MIN_POSITIVE])
                .unwrap();
            let mut out = [0.0; 6];
            part.read(1, &mut out).unwrap();
            assert_eq!(out, [0.0, 0.0, 0.0, 1.5, -2.0, 3.25]);
            let mut out = [0.0; 3];
            part.read(3, &mut out).unwrap();
            assert_eq!(out, [4.0, 5.0, f32::MIN_POSITIVE]);
        }
    }
}
