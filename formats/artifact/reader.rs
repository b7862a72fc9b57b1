//! Opening an artifact and decoding its weights. Hashing every byte is `qtool verify`'s work, done
//! on request through [`Artifact::digest`].

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::MANIFEST_FILE;
use super::manifest::{Manifest, QuantizedRecord, Stored, TensorRecord};
use crate::checkpoint::Checkpoint;
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

    fn check_files(&self) -> Result<()> {
        let mut stored = 0usize;
        for record in &self.manifest.tensors {
            match &record.stored {
                Stored::Kept { .. } => {
                    stored += 1;
                    self.expect(&record.name, record.dtype, &record.shape)?;
                }
                Stored::Quantized(quantized) => {
                    for part in &quantized.parts {
                        stored += 1;
                        self.expect(&part.tensor, part.dtype, &part.shape)?;
                    }
                }
            }
        }
        if stored != self.files.names().len() {
            return Err(FormatError::Manifest {
                path: self.folder.join(MANIFEST_FILE),
                what: "stored tensors".to_owned(),
                expected: stored.to_string(),
                got: format!("{} in the files", self.files.names().len()),
            });
        }
        Ok(())
    }

    fn expect(&self, name: &str, dtype: crate::Dtype, shape: &[usize]) -> Result<()> {
        let view = self.stored(name)?;
        if view.dtype() == dtype && view.shape() == shape {
            return Ok(());
        }
        Err(FormatError::Manifest {
            path: self.folder.clone(),
            what: format!("stored tensor {name}"),
            expected: format!("{dtype} {shape:?}"),
            got: format!("{} {:?}", view.dtype(), view.shape()),
        })
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
    /// codes or scales are not what the scheme allows.
    pub fn weight_rows(
        &self,
        record: &QuantizedRecord,
        from: usize,
        count: usize,
    ) -> Result<QuantizedWeight> {
        let count = count.min(record.rows.saturating_sub(from));
        let parts = record
            .parts
            .iter()
            .map(|part| {
                let bytes = self.stored(&part.tensor)?.bytes();
                Ok(bytes
                    .get(from * part.row_bytes..(from + count) * part.row_bytes)
                    .unwrap_or_default())
            })
            .collect::<Result<Vec<&[u8]>>>()?;
        QuantizedWeight::decode(record.scheme, count, record.columns, &parts)
    }

    /// Digest of a stored tensor's bytes, read anew.
    pub fn digest(&self, name: &str) -> Result<String> {
        let mut hasher = blake3::Hasher::new();
        hasher.update(self.stored(name)?.bytes());
        Ok(digest_text(&hasher))
    }
}
