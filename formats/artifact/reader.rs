//! Opening an artifact and decoding its weights. Hashing every byte is `qtool verify`'s work, done
//! on request through [`Artifact::digest`].

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::path::{Path, PathBuf};

use super::MANIFEST_FILE;
use super::manifest::{Manifest, QuantizedRecord, Stored, TensorRecord};
use crate::checkpoint::Checkpoint;
use crate::dtype::Dtype;
use crate::scheme::Part;
use crate::shard_writer::digest_text;
use crate::tensor::TensorView;
use crate::weight::QuantizedWeight;
use crate::{FormatError, Result};

/// An open artifact: its manifest and its mapped files.
#[derive(Debug)]
pub struct Artifact {
    folder: PathBuf,
    manifest: Manifest,
    files: Checkpoint,
    by_name: HashMap<String, usize>,
}

impl Artifact {
    /// Whether `folder` claims to be an artifact.
    pub fn is_artifact(folder: &Path) -> bool {
        folder.join(MANIFEST_FILE).is_file()
    }

    /// Opens an artifact. Fails when the manifest is missing or contradicts itself, or when the
    /// files hold other tensors, dtypes or shapes than it says.
    pub fn open(folder: &Path) -> Result<Self> {
        let manifest_path = folder.join(MANIFEST_FILE);
        let manifest = Manifest::read(&manifest_path)?;
        let files = Checkpoint::open(folder)?;
        let mut by_name = HashMap::new();
        for (index, tensor) in manifest.tensors.iter().enumerate() {
            if by_name.insert(tensor.name.clone(), index).is_some() {
                return Err(FormatError::Manifest {
                    path: manifest_path,
                    what: format!("tensor {}", tensor.name),
                    expected: "one record".to_owned(),
                    got: "two".to_owned(),
                });
            }
        }
        let this = Self {
            folder: folder.to_owned(),
            manifest,
            files,
            by_name,
        };
        this.check_files()?;
        Ok(this)
    }

    /// Every stored tensor is named by exactly one record and lies as that record says.
    fn check_files(&self) -> Result<()> {
        let mut claimed = HashSet::new();
        for record in &self.manifest.tensors {
            match &record.stored {
                Stored::Kept { file, .. } => {
                    self.expect(&mut claimed, &record.name, file, record.dtype, &record.shape)?;
                }
                Stored::Quantized(quantized) => {
                    for part in &quantized.parts {
                        self.expect(&mut claimed, &part.tensor, &part.file, part.dtype, &part.shape)?;
                    }
                }
            }
        }
        match self.files.names().find(|name| !claimed.contains(name)) {
            Some(extra) => Err(FormatError::Manifest {
                path: self.folder.join(MANIFEST_FILE),
                what: format!("stored tensor {extra}"),
                expected: "a record of it".to_owned(),
                got: "none".to_owned(),
            }),
            None => Ok(()),
        }
    }

    fn expect<'a>(
        &'a self,
        claimed: &mut HashSet<&'a str>,
        name: &'a str,
        file: &str,
        dtype: Dtype,
        shape: &[usize],
    ) -> Result<()> {
        let bad = |expected: String, got: String| FormatError::Manifest {
            path: self.folder.join(MANIFEST_FILE),
            what: format!("stored tensor {name}"),
            expected,
            got,
        };
        let view = self.stored(name)?;
        if !claimed.insert(name) {
            return Err(bad("one record of it".to_owned(), "two".to_owned()));
        }
        if view.dtype() != dtype || view.shape() != shape {
            return Err(bad(
                format!("{dtype} {shape:?}"),
                format!("{} {:?}", view.dtype(), view.shape()),
            ));
        }
        match self.files.file_of(name) {
            Some(got) if got != file => Err(bad(format!("in {file:?}"), format!("in {got:?}"))),
            _ => Ok(()),
        }
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Its manifest.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The safetensors files as they lie, seen as a checkpoint of stored tensors.
    pub fn files(&self) -> &Checkpoint {
        &self.files
    }

    /// The record of a source tensor.
    pub fn record(&self, name: &str) -> Result<&TensorRecord> {
        self.by_name
            .get(name)
            .and_then(|&i| self.manifest.tensors.get(i))
            .ok_or_else(|| FormatError::MissingTensor {
                path: self.folder.clone(),
                tensor: name.to_owned(),
                advice: "`qtool inspect` lists what is there",
            })
    }

    /// A stored tensor as it lies.
    pub fn stored(&self, name: &str) -> Result<TensorView<'_>> {
        self.files.tensor(name)
    }

    /// Rows `from..from + count` of a quantized weight, decoded from the stored bytes. Fails when
    /// codes or scales are not what the scheme allows, or when no row is in range.
    pub fn weight_rows(
        &self,
        record: &QuantizedRecord,
        from: usize,
        count: usize,
    ) -> Result<QuantizedWeight> {
        let from = from.min(record.rows);
        let count = count.min(record.rows - from);
        let family = self.manifest.family;
        // Interleaved rows are decoded together; the surplus is cut off again.
        let multiple = family.row_multiple();
        let first = from / multiple * multiple;
        let hull = first..record.rows.min((from + count).next_multiple_of(multiple));
        let forms = record.scheme.parts_in(family, record.rows, record.columns)?;
        let parts = record
            .parts
            .iter()
            .zip(&forms)
            .map(|(part, form)| Ok(part_rows(self.stored(&part.tensor)?.bytes(), form, hull.clone())))
            .collect::<Result<Vec<Cow<'_, [u8]>>>>()?;
        let parts: Vec<&[u8]> = parts.iter().map(AsRef::as_ref).collect();
        let dims = (hull.len(), record.columns);
        let weight = QuantizedWeight::decode_rows(family, record.scheme, first, dims, &parts)
            .map_err(|error| self.locate(record, error))?;
        if hull.len() == count {
            return Ok(weight);
        }
        weight.rows(from - first..from - first + count)
    }

    /// A fault of a decoded weight, with the file and the tensor it was found in.
    fn locate(&self, record: &QuantizedRecord, error: FormatError) -> FormatError {
        let (file, tensor) = record
            .parts
            .first()
            .map_or(("", ""), |part| (part.file.as_str(), part.tensor.as_str()));
        let tensor = tensor.rsplit_once('.').map_or(tensor, |(weight, _)| weight);
        match error {
            FormatError::Weight { what, expected, got } => FormatError::Manifest {
                path: self.folder.join(file),
                what: format!("tensor {tensor}: {what}"),
                expected,
                got,
            },
            other => other,
        }
    }

    /// Reads every byte stored for a tensor and fails when its digest is not the manifest's.
    pub fn check_digests(&self, record: &TensorRecord) -> Result<()> {
        let stored: Vec<(&str, Option<&str>)> = match &record.stored {
            Stored::Kept { digest, .. } => {
                let digest = digest.as_deref().or(record.source_digest.as_deref());
                vec![(&record.name, digest)]
            }
            Stored::Quantized(quantized) => {
                let parts = quantized.parts.iter();
                parts
                    .map(|p| (p.tensor.as_str(), Some(p.digest.as_str())))
                    .collect()
            }
        };
        for (name, expected) in stored {
            let got = self.digest(name)?;
            if expected.is_some_and(|expected| expected != got) {
                return Err(FormatError::Manifest {
                    path: self.folder.join(self.files.file_of(name).unwrap_or_default()),
                    what: format!(
                        "stored tensor {name} is damaged; copy the folder again (`qtool verify` checks all of it): digest"
                    ),
                    expected: expected.unwrap_or_default().to_owned(),
                    got,
                });
            }
        }
        Ok(())
    }

    /// Digest of a stored tensor's bytes, read anew.
    pub fn digest(&self, name: &str) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.stored(name)?.bytes());
        Ok(digest_text(&hasher))
    }
}

/// The given rows of a stored part, one after the other.
fn part_rows<'a>(bytes: &'a [u8], part: &Part, rows: Range<usize>) -> Cow<'a, [u8]> {
    if !part.by_columns {
        return Cow::Borrowed(part.bytes_of(bytes, rows));
    }
    let cut = |from: usize, to: usize| bytes.get(from..to).unwrap_or_default();
    let width = part.dtype.bitsize() / 8;
    let mut out = vec![0u8; rows.len() * part.row_bytes];
    for column in 0..part.row_bytes / width.max(1) {
        let at = column * part.rows;
        let run = cut((at + rows.start) * width, (at + rows.end) * width);
        let targets = out.chunks_exact_mut(part.row_bytes);
        for (target, value) in targets.zip(run.chunks_exact(width)) {
            if let Some(target) = target.get_mut(column * width..(column + 1) * width) {
                target.copy_from_slice(value);
            }
        }
    }
    Cow::Owned(out)
}
