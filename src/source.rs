//! Where a model's weights come from: a checkpoint, an artifact, or another ecosystem's model, seen alike. Owns the bridge from stored
//! tensors to [`HostWeight`]s; nothing is decoded here, and nothing mapped is copied unless it lies transposed.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qtool_formats::artifact::manifest::QuantizedRecord;
use qtool_formats::artifact::{Artifact, Stored};
use qtool_formats::checkpoint::{Checkpoint, Naming, Orientation};
use qtool_formats::import::{self, Foreign};
use qtool_formats::packing::{LSB_ROWS, Packing};
use qtool_formats::scheme::{Family, Role};
use qtool_formats::{FloatDtype, QuantizedWeight, Scheme, TensorView};
use qtool_kernels::backend::{Form, HostWeight, Storage};
use serde_json::Value;

use crate::foreign;
use crate::plan::read_config;
use crate::{Error, Result};

/// A place that holds a model.
pub trait WeightSource: Send + Sync {
    /// Its `config.json`.
    fn config(&self) -> &Value;
    /// Where it lies, for messages.
    fn path(&self) -> &Path;
    /// Whether it holds this tensor.
    fn contains(&self, name: &str) -> bool;
    /// A matrix (N, K), however it is stored. Fails when it is missing, no float or quantized weight, or of
    /// other dimensions.
    fn matrix(&self, name: &str, n: usize, k: usize) -> Result<HostWeight>;
    /// A vector of `len` floats. Fails likewise.
    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>>;
}

/// The mapped files of a source.
#[derive(Clone)]
enum Files {
    Checkpoint(Arc<Checkpoint>),
    Artifact(Arc<Artifact>),
    Foreign(Arc<Foreign>),
}

impl Files {
    fn checkpoint(&self) -> &Checkpoint {
        match self {
            Self::Checkpoint(files) => files,
            Self::Artifact(artifact) => artifact.files(),
            Self::Foreign(foreign) => foreign.files(),
        }
    }
}

/// A stored tensor's bytes, as mapped.
struct Mapped {
    files: Files,
    tensor: String,
}

impl Storage for Mapped {
    fn bytes(&self) -> &[u8] {
        self.files
            .checkpoint()
            .tensor(&self.tensor)
            .map_or(&[], |view| view.bytes())
    }
}

/// A run of other bytes.
struct Cut {
    of: Arc<dyn Storage>,
    range: Range<usize>,
}

impl Storage for Cut {
    fn bytes(&self) -> &[u8] {
        self.of.bytes().get(self.range.clone()).unwrap_or_default()
    }
}

/// Rows `range` of a weight, sharing its bytes.
pub fn rows_of(weight: &HostWeight, range: Range<usize>) -> Result<HostWeight> {
    let cut = |bytes: &Arc<dyn Storage>, row: usize| -> Arc<dyn Storage> {
        Arc::new(Cut {
            of: Arc::clone(bytes),
            range: range.start * row..range.end * row,
        })
    };
    let form = match &weight.form {
        Form::Dense { dtype, bytes } => Form::Dense {
            dtype: *dtype,
            bytes: cut(bytes, weight.k * dtype.bytes()),
        },
        Form::Packed { scheme, parts } => {
            let forms = scheme.parts(weight.n, weight.k)?;
            let parts = parts
                .iter()
                .zip(&forms)
                .map(|(part, form)| cut(part, form.row_bytes));
            Form::Packed {
                scheme: *scheme,
                parts: parts.collect(),
            }
        }
    };
    Ok(HostWeight {
        n: range.len(),
        k: weight.k,
        form,
    })
}

/// A checkpoint, an artifact or another ecosystem's model, by what is in the folder.
pub struct Source {
    path: PathBuf,
    config: Value,
    files: Files,
    naming: Naming,
}

impl Source {
    /// Opens a model folder, an artifact or a GGUF file. Fails when it is none of them, or has no `config.json`.
    pub fn open(path: &Path) -> Result<Self> {
        let files = if Artifact::is_artifact(path) {
            Files::Artifact(Arc::new(Artifact::open(path)?))
        } else if let Some(foreign) = import::open(path)? {
            return Ok(Self::of_foreign(Arc::new(foreign)));
        } else {
            Files::Checkpoint(Arc::new(Checkpoint::open(path)?))
        };
        Self::of(path, files)
    }

    /// A checkpoint that is open already.
    pub fn of_checkpoint(checkpoint: Arc<Checkpoint>) -> Result<Self> {
        let path = checkpoint.root().to_owned();
        Self::of(&path, Files::Checkpoint(checkpoint))
    }

    /// Another ecosystem's model that is open already.
    pub fn of_foreign(foreign: Arc<Foreign>) -> Self {
        Self {
            path: foreign.files().root().to_owned(),
            config: foreign.config().clone(),
            naming: Naming::of(foreign.tensors().iter().map(|t| t.name.as_str())),
            files: Files::Foreign(foreign),
        }
    }

    fn of(path: &Path, files: Files) -> Result<Self> {
        let naming = match &files {
            Files::Artifact(artifact) => {
                Naming::of(artifact.manifest().tensors.iter().map(|t| t.name.as_str()))
            }
            other => other.checkpoint().naming(),
        };
        let config = if path.is_dir() { read_config(path)? } else { None };
        let config = config.ok_or_else(|| Error::Source {
            path: path.to_owned(),
            reason:
                "to run the model its folder must hold a config.json; give the model folder, not a bare file"
                    .to_owned(),
        })?;
        Ok(Self {
            path: path.to_owned(),
            config,
            files,
            naming,
        })
    }

    /// Names of everything stored here.
    pub fn names(&self) -> Vec<String> {
        match &self.files {
            Files::Checkpoint(checkpoint) => checkpoint.names().map(str::to_owned).collect(),
            Files::Artifact(artifact) => artifact
                .manifest()
                .tensors
                .iter()
                .map(|t| t.name.clone())
                .collect(),
            Files::Foreign(foreign) => foreign.tensors().iter().map(|t| t.name.clone()).collect(),
        }
    }

    fn dense(&self, view: &TensorView<'_>, name: &str, n: usize, k: usize) -> Result<HostWeight> {
        let dtype = view
            .float_dtype()
            .ok_or_else(|| self.wrong(name, "a float tensor", view.dtype().to_string()))?;
        let orientation = self.naming.orientation(name);
        let lies = match orientation {
            Orientation::OutIn => [n, k],
            Orientation::InOut => [k, n],
        };
        if view.shape() != lies {
            return Err(self.wrong(name, &format!("{lies:?}"), format!("{:?}", view.shape())));
        }
        let bytes: Arc<dyn Storage> = if orientation == Orientation::OutIn {
            Arc::new(Mapped {
                files: self.files.clone(),
                tensor: view.name().to_owned(),
            })
        } else {
            Arc::new(turned(view.bytes(), dtype.bytes(), k, n))
        };
        Ok(HostWeight {
            n,
            k,
            form: Form::Dense { dtype, bytes },
        })
    }

    fn packed(
        &self,
        artifact: &Artifact,
        name: &str,
        q: &QuantizedRecord,
        n: usize,
        k: usize,
    ) -> Result<HostWeight> {
        if (q.rows, q.columns) != (n, k) {
            let got = format!("[{}, {}]", q.rows, q.columns);
            return Err(self.wrong(name, &format!("[{n}, {k}]"), got));
        }
        // Decoded once, to be refused here rather than when it is multiplied.
        let weight = artifact.weight_rows(q, 0, n)?;
        let mut scheme = q.scheme;
        let parts: Vec<Arc<dyn Storage>> = match artifact.manifest().family {
            // The devices know scales that are numbers: they get the decoded ones, which mean the same.
            _ if q.scheme == Scheme::Nf4Double => {
                let QuantizedWeight::Nf4(nf4) = &weight else {
                    return Err(self.wrong(name, "nf4", q.scheme.to_string()));
                };
                let scales: Vec<u8> = nf4.scales().iter().flat_map(|s| s.to_le_bytes()).collect();
                scheme = Scheme::Nf4;
                let codes = q.parts.iter().find(|part| part.role == Role::Codes);
                let codes = codes.map(|part| -> Arc<dyn Storage> {
                    Arc::new(Mapped {
                        files: self.files.clone(),
                        tensor: part.tensor.clone(),
                    })
                });
                codes
                    .into_iter()
                    .chain([Arc::new(scales) as Arc<dyn Storage>])
                    .collect()
            }
            Family::Own => q
                .parts
                .iter()
                .map(|part| -> Arc<dyn Storage> {
                    Arc::new(Mapped {
                        files: self.files.clone(),
                        tensor: part.tensor.clone(),
                    })
                })
                .collect(),
            // Other families interleave rows: their codes are laid out anew, as small as they were.
            _ => {
                let parts = weight.encode(&|b, k, c, o| LSB_ROWS.pack(b, k, c, o))?;
                parts
                    .into_iter()
                    .map(|p| -> Arc<dyn Storage> { Arc::new(p) })
                    .collect()
            }
        };
        Ok(HostWeight {
            n,
            k,
            form: Form::Packed { scheme, parts },
        })
    }

    fn wrong(&self, name: &str, expected: &str, got: String) -> Error {
        Error::ModelTensor {
            path: self.path.clone(),
            tensor: name.to_owned(),
            expected: expected.to_owned(),
            got,
        }
    }

    /// The stored view of a tensor that is not quantized.
    fn kept(&self, name: &str) -> Result<TensorView<'_>> {
        let stored = match &self.files {
            Files::Foreign(foreign) => foreign.stored_name(foreign.tensor(name)?),
            _ => name,
        };
        Ok(self.files.checkpoint().tensor(stored)?)
    }
}

impl WeightSource for Source {
    fn config(&self) -> &Value {
        &self.config
    }

    fn path(&self) -> &Path {
        &self.path
    }

    fn contains(&self, name: &str) -> bool {
        match &self.files {
            Files::Checkpoint(checkpoint) => checkpoint.file_of(name).is_some(),
            Files::Artifact(artifact) => artifact.record(name).is_ok(),
            Files::Foreign(foreign) => foreign.find(name).is_some(),
        }
    }

    fn matrix(&self, name: &str, n: usize, k: usize) -> Result<HostWeight> {
        if let Files::Artifact(artifact) = &self.files
            && let Stored::Quantized(q) = &artifact.record(name)?.stored
        {
            return self.packed(artifact, name, q, n, k);
        }
        if let Files::Foreign(foreign) = &self.files
            && let Some(weight) = foreign::matrix(foreign, name, n, k)?
        {
            return Ok(weight);
        }
        self.dense(&self.kept(name)?, name, n, k)
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        if let Files::Foreign(foreign) = &self.files
            && let Some(values) = foreign::vector(foreign, name, len)?
        {
            return Ok(values);
        }
        let view = self.kept(name)?;
        let values = view.float_dtype().map(|dtype| dtype.widen(view.bytes()));
        match values {
            Some(values) if values.len() == len => Ok(values),
            _ => Err(self.wrong(
                name,
                &format!("{len} floats"),
                format!("{} {:?}", view.dtype(), view.shape()),
            )),
        }
    }
}

/// The (columns, rows) transpose of a (rows, columns) matrix of elements of `width` bytes.
fn turned(bytes: &[u8], width: usize, rows: usize, columns: usize) -> Vec<u8> {
    let mut out = vec![0; bytes.len()];
    for (r, line) in bytes.chunks_exact((columns * width).max(1)).enumerate() {
        for (c, element) in line.chunks_exact(width).enumerate() {
            out[(c * rows + r) * width..][..width].copy_from_slice(element);
        }
    }
    out
}

/// Another source with some of its matrices replaced: a block that has just been quantized.
pub struct Overlay<'a> {
    base: &'a dyn WeightSource,
    replaced: HashMap<String, HostWeight>,
}

impl<'a> Overlay<'a> {
    /// Replaces nothing yet.
    pub fn new(base: &'a dyn WeightSource) -> Self {
        Self {
            base,
            replaced: HashMap::new(),
        }
    }

    /// Puts `values` (N, K) in the place of a matrix.
    pub fn insert(&mut self, name: &str, k: usize, values: &[f32]) {
        let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let weight = HostWeight {
            n: values.len() / k.max(1),
            k,
            form: Form::Dense {
                dtype: FloatDtype::F32,
                bytes: Arc::new(bytes),
            },
        };
        self.replaced.insert(name.to_owned(), weight);
    }
}

impl WeightSource for Overlay<'_> {
    fn config(&self) -> &Value {
        self.base.config()
    }

    fn path(&self) -> &Path {
        self.base.path()
    }

    fn contains(&self, name: &str) -> bool {
        self.base.contains(name)
    }

    fn matrix(&self, name: &str, n: usize, k: usize) -> Result<HostWeight> {
        match self.replaced.get(name) {
            Some(weight) if (weight.n, weight.k) == (n, k) => Ok(weight.clone()),
            _ => self.base.matrix(name, n, k),
        }
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        self.base.vector(name, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turning_by_hand() {
        assert_eq!(turned(&[1, 2, 3, 4, 5, 6], 1, 2, 3), [1, 4, 2, 5, 3, 6]);
        assert_eq!(
            turned(&[1, 0, 2, 0, 3, 0, 4, 0], 2, 2, 2),
            [1, 0, 3, 0, 2, 0, 4, 0]
        );
    }

    #[test]
    fn rows_of_a_dense_weight_share_its_bytes() {
        let weight = HostWeight {
            n: 3,
            k: 2,
            form: Form::Dense {
                dtype: FloatDtype::Bf16,
                bytes: Arc::new((0..12).collect::<Vec<u8>>()),
            },
        };
        let cut = rows_of(&weight, 1..3).unwrap();
        let Form::Dense { bytes, .. } = &cut.form else {
            panic!("dense")
        };
        assert_eq!(
            (cut.n, bytes.bytes()),
            (2, [4u8, 5, 6, 7, 8, 9, 10, 11].as_slice())
        );
    }
}
