//! Other people's quantized models, read: a folder of GPTQ, AWQ, compressed-tensors or bitsandbytes, or a GGUF file, seen as
//! the tensors of the model it was made from. Opening reads headers and a few small tensors; codes are decoded one weight
//! at a time, when asked for.
//!
//! What a weight decodes to is a [`QuantizedWeight`] where its meaning is one of our families', so that it stays packed in
//! memory, and floats otherwise ([`Decoded`]).
//!
//! Adding a format is one file here, one line in [`READERS`], and its paragraph in `docs/formats/reading.md`.

pub mod affine;
pub mod awq;
pub mod bnb;
pub mod compressed_tensors;
pub mod gguf;
pub mod gptq;
pub mod linears;
pub mod place;

use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use serde_json::Value;

use crate::checkpoint::Checkpoint;
use crate::dtype::FloatDtype;
use crate::weight::QuantizedWeight;
use crate::{FormatError, Result};

pub use place::Place;

/// A weight as it was found.
#[derive(Debug, Clone, PartialEq)]
pub enum Decoded {
    /// It has a meaning in one of our families.
    Weight(QuantizedWeight),
    /// It has none: row-major floats of the tensor's shape, little-endian.
    Floats {
        /// Their type.
        dtype: FloatDtype,
        /// Their bytes.
        bytes: Vec<u8>,
    },
}

/// What is odd about the stored numbers of a weight, beyond what stops it from being decoded.
pub type Faults = Vec<String>;

/// How a tensor that does not lie as plain elements is read.
pub trait Coded: Send + Sync + fmt::Debug {
    /// Decodes the whole tensor. Fails when stored numbers are outside what the format allows.
    fn decode(&self, files: &Checkpoint) -> Result<Decoded>;

    /// Its codes as they lie, where its columns come in another order than their groups; `None` where they do not.
    fn listed(&self, _files: &Checkpoint) -> Result<Option<affine::AffineCodes>> {
        Ok(None)
    }

    /// What is odd about its scales and zero points; each a sentence without a subject.
    fn faults(&self, _files: &Checkpoint) -> Result<Faults> {
        Ok(Vec::new())
    }
}

/// A tensor of the model, by the name it has in the model's own checkpoint.
#[derive(Debug)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// What it is stored as, in the format's own words where it has some: `w4-zp-g128-f16`, `Q4_K`, `BF16`.
    pub stored_as: String,
    /// Names of the stored tensors it is made of.
    pub parts: Vec<String>,
    /// `None` when its only part holds its elements as they are.
    pub coded: Option<Box<dyn Coded>>,
}

/// An open model of another ecosystem.
#[derive(Debug)]
pub struct Foreign {
    format: &'static str,
    config: Value,
    files: Checkpoint,
    tensors: Vec<Tensor>,
    by_name: HashMap<String, usize>,
}

/// One format that is read.
pub trait Reader: Sync {
    /// Its name.
    fn name(&self) -> &'static str;

    /// One line for `--help`.
    fn summary(&self) -> &'static str;

    /// Whether a place says that it is of this format.
    fn claims(&self, place: &Place) -> bool;

    /// Opens a place it claims.
    fn open(&self, place: &Place) -> Result<Foreign>;
}

/// Every format that is read.
pub const READERS: &[&dyn Reader] = &[
    &compressed_tensors::COMPRESSED_TENSORS,
    &gptq::GPTQ,
    &awq::AWQ,
    &bnb::BNB,
    &gguf::GGUF,
];

/// Opens what another ecosystem made. `None` where nothing says so: an artifact, or a plain checkpoint.
///
/// Fails when it says so and cannot be read: a method that is not listed, parts that are missing or do not fit.
pub fn open(path: &Path) -> Result<Option<Foreign>> {
    let place = Place::of(path)?;
    if let Some(reader) = READERS.iter().find(|reader| reader.claims(&place)) {
        return reader.open(&place).map(Some);
    }
    match place.method() {
        None => Ok(None),
        Some(method) => {
            let known: Vec<&str> = READERS.iter().map(|reader| reader.name()).collect();
            Err(FormatError::Json {
                path: place.path.join("config.json"),
                reason: format!(
                    "the model is quantized by {}, which is not read; those read are {}; validate it behind a server with --endpoint, or give a folder in one of these",
                    crate::error::quoted(&method),
                    known.join(", ")
                ),
            })
        }
    }
}

/// Whether some reader claims `path`.
pub fn is_foreign(path: &Path) -> Result<bool> {
    let place = Place::of(path)?;
    Ok(READERS.iter().any(|reader| reader.claims(&place)))
}

impl Foreign {
    /// Joins what a reader found. Fails when two tensors have one name.
    pub(crate) fn new(
        format: &'static str,
        config: Value,
        files: Checkpoint,
        tensors: Vec<Tensor>,
    ) -> Result<Self> {
        let mut by_name = HashMap::new();
        for (index, tensor) in tensors.iter().enumerate() {
            if by_name.insert(tensor.name.clone(), index).is_some() {
                return Err(FormatError::TensorEntry {
                    path: files.root().to_owned(),
                    tensor: tensor.name.clone(),
                    reason: "two stored tensors stand for it".to_owned(),
                });
            }
        }
        Ok(Self {
            format,
            config,
            files,
            tensors,
            by_name,
        })
    }

    /// Name of its format.
    pub fn format(&self) -> &'static str {
        self.format
    }

    /// The model's config, in the form of a Hugging Face `config.json`.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// The files as they lie.
    pub fn files(&self) -> &Checkpoint {
        &self.files
    }

    /// The model's tensors, in storage order.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Result<&Tensor> {
        self.find(name).ok_or_else(|| FormatError::MissingTensor {
            path: self.files.root().to_owned(),
            tensor: name.to_owned(),
            advice: "`qtool inspect` lists what is there",
        })
    }

    /// The tensor of this name, if there is one.
    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.by_name.get(name).and_then(|&index| self.tensors.get(index))
    }

    /// Name of the stored tensor of one that lies as plain elements.
    pub fn stored_name<'a>(&self, tensor: &'a Tensor) -> &'a str {
        tensor.parts.first().map_or(tensor.name.as_str(), String::as_str)
    }

    /// Bytes a tensor is stored in.
    pub fn stored_bytes(&self, tensor: &Tensor) -> Result<u64> {
        let bytes = |part: &String| Ok(self.files.tensor(part)?.bytes().len() as u64);
        tensor.parts.iter().map(bytes).sum()
    }

    /// Decodes a tensor that is [`Coded`]; `None` when it lies as plain elements in its only part.
    pub fn decode(&self, tensor: &Tensor) -> Result<Option<Decoded>> {
        let coded = tensor.coded.as_ref();
        coded.map(|coded| coded.decode(&self.files)).transpose()
    }

    /// All values of a tensor, row-major. Fails when it holds no numbers that are weights.
    pub fn values(&self, tensor: &Tensor) -> Result<Vec<f32>> {
        match self.decode(tensor)? {
            Some(Decoded::Floats { dtype, bytes }) => Ok(dtype.widen(&bytes)),
            Some(Decoded::Weight(weight)) => {
                let (n, k) = weight.dims();
                let mut values = vec![0f32; n * k];
                for (row, out) in values.chunks_exact_mut(k.max(1)).enumerate() {
                    weight.dequantize_row(row, out);
                }
                Ok(values)
            }
            None => {
                let view = self.files.tensor(self.stored_name(tensor))?;
                let dtype = view.float_dtype().ok_or_else(|| FormatError::TensorEntry {
                    path: self.files.root().to_owned(),
                    tensor: tensor.name.clone(),
                    reason: format!("expected BF16, F16 or F32, got {}", view.dtype()),
                })?;
                Ok(dtype.widen(view.bytes()))
            }
        }
    }
}
