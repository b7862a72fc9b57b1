//! Folders in which a quantized linear weight `LINEAR.weight` lies as a few tensors of its own (`LINEAR.qweight`,
//! `LINEAR.scales` ...). Owns what these formats share: the walk that sorts stored tensors into linears and the rest, and
//! access to a linear's parts with a sentence for each that is missing or of another form. What a format adds is a
//! [`LinearReader`].

use std::collections::HashSet;
use std::path::PathBuf;

use super::{Foreign, Place, Reader, Tensor};
use crate::checkpoint::Checkpoint;
use crate::dtype::{Dtype, FloatDtype};
use crate::tensor::TensorView;
use crate::{FormatError, Result};

/// What a format of this kind adds.
pub trait LinearReader: Sync {
    /// Its name.
    fn name(&self) -> &'static str;

    /// One line for `--help`.
    fn summary(&self) -> &'static str;

    /// `quant_method` of its configs.
    fn method(&self) -> &'static str;

    /// The part that every quantized linear has, by what follows the module's name.
    fn marker(&self) -> &'static str;

    /// All parts it may have.
    fn suffixes(&self) -> &'static [&'static str];

    /// Why what the config says is not read, or `None`.
    fn refuses(&self, place: &Place) -> Option<String>;

    /// The weight of a linear. Fails when a part is missing or does not fit.
    fn linear(&self, place: &Place, module: &Module<'_>) -> Result<Tensor>;
}

/// A [`LinearReader`] as a reader.
#[derive(Debug, Clone, Copy)]
pub struct Linears<F>(pub F);

impl<F: LinearReader> Reader for Linears<F> {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn summary(&self) -> &'static str {
        self.0.summary()
    }

    fn claims(&self, place: &Place) -> bool {
        place.method().as_deref() == Some(self.0.method())
    }

    fn open(&self, place: &Place) -> Result<Foreign> {
        let format = &self.0;
        if let Some(reason) = format.refuses(place) {
            return Err(FormatError::Json {
                path: place.said_in(),
                reason,
            });
        }
        let files = Checkpoint::open(&place.path)?;
        let tensors = walk(format, place, &files)?;
        Foreign::new(format.name(), place.config.clone(), files, tensors)
    }
}

/// The tensors of the model, in the order in which the first part of each lies.
fn walk(format: &dyn LinearReader, place: &Place, files: &Checkpoint) -> Result<Vec<Tensor>> {
    let module_of = |name: &str, suffix: &str| -> Option<String> {
        let module = name.strip_suffix(suffix)?.strip_suffix('.')?;
        Some(module.to_owned())
    };
    let linears: HashSet<String> = files
        .names()
        .filter_map(|name| module_of(name, format.marker()))
        .collect();
    let mut done: HashSet<String> = HashSet::new();
    let mut tensors = Vec::new();
    for name in files.names() {
        let suffixes = format.suffixes().iter();
        let modules = suffixes.filter_map(|suffix| Some((*suffix, module_of(name, suffix)?)));
        let found: Vec<(&str, String)> = modules.collect();
        if let Some((_, module)) = found.iter().find(|(_, module)| linears.contains(module)) {
            if done.insert(module.clone()) {
                tensors.push(format.linear(place, &Module { files, name: module })?);
            }
            continue;
        }
        if let Some((suffix, module)) = found.first().filter(|(suffix, _)| *suffix != "weight") {
            let files = Module { files, name: module };
            return Err(files.fault(
                suffix,
                format!(
                    "{}.{} is missing beside it; download the folder again",
                    module,
                    format.marker()
                ),
            ));
        }
        tensors.push(kept(&files.tensor(name)?));
    }
    if linears.is_empty() {
        return Err(FormatError::Json {
            path: place.said_in(),
            reason: format!(
                "it says the model is quantized by {}, and no tensor ends in .{}; take quantization_config out if the weights are floats",
                format.name(),
                format.marker()
            ),
        });
    }
    Ok(tensors)
}

/// A tensor that lies as its elements.
pub(super) fn kept(view: &TensorView<'_>) -> Tensor {
    Tensor {
        name: view.name().to_owned(),
        shape: view.shape().to_vec(),
        stored_as: view.dtype().to_string(),
        parts: vec![view.name().to_owned()],
        coded: None,
    }
}

/// A linear's stored tensors.
#[derive(Debug, Clone, Copy)]
pub struct Module<'a> {
    /// Where they lie.
    pub files: &'a Checkpoint,
    /// The module's name, without `.weight`.
    pub name: &'a str,
}

impl<'a> Module<'a> {
    /// Name of a part.
    pub fn part_name(&self, suffix: &str) -> String {
        format!("{}.{suffix}", self.name)
    }

    /// Names of those of these parts that are there.
    pub fn parts(&self, suffixes: &[&str]) -> Vec<String> {
        let names = suffixes.iter().map(|suffix| self.part_name(suffix));
        names.filter(|name| self.files.file_of(name).is_some()).collect()
    }

    /// The file a part lies in.
    fn path(&self, suffix: &str) -> PathBuf {
        match self.files.file_of(&self.part_name(suffix)) {
            Some(file) => self.files.folder().join(file),
            None => self.files.root().to_owned(),
        }
    }

    /// What is wrong with a part.
    pub fn fault(&self, suffix: &str, reason: String) -> FormatError {
        FormatError::TensorEntry {
            path: self.path(suffix),
            tensor: self.part_name(suffix),
            reason,
        }
    }

    /// A part, if it is there.
    pub fn find(&self, suffix: &str) -> Result<Option<TensorView<'a>>> {
        let name = self.part_name(suffix);
        match self.files.file_of(&name) {
            Some(_) => self.files.tensor(&name).map(Some),
            None => Ok(None),
        }
    }

    /// A part that must be there, of one of these types and with so many dimensions.
    pub fn need(&self, suffix: &str, dtypes: &[Dtype], dims: usize) -> Result<TensorView<'a>> {
        let view = self.find(suffix)?.ok_or_else(|| FormatError::MissingTensor {
            path: self.files.root().to_owned(),
            tensor: self.part_name(suffix),
            advice: "the weight cannot be decoded without it; download the folder again",
        })?;
        if !dtypes.contains(&view.dtype()) || view.shape().len() != dims {
            let expected: Vec<String> = dtypes.iter().map(ToString::to_string).collect();
            return Err(self.fault(
                suffix,
                format!(
                    "expected {} of {dims} dimensions, got {} {:?}",
                    expected.join(" or "),
                    view.dtype(),
                    view.shape()
                ),
            ));
        }
        Ok(view)
    }

    /// A part of floats that must be there.
    pub fn floats(&self, suffix: &str, dims: usize) -> Result<(TensorView<'a>, FloatDtype)> {
        let view = self.need(suffix, &[Dtype::BF16, Dtype::F16, Dtype::F32], dims)?;
        // One of the three above.
        let dtype = view.float_dtype().unwrap_or(FloatDtype::F32);
        Ok((view, dtype))
    }

    /// Fails unless a part has this shape.
    pub fn shaped(&self, suffix: &str, view: &TensorView<'_>, expected: &[usize]) -> Result<()> {
        if view.shape() == expected {
            return Ok(());
        }
        Err(self.fault(
            suffix,
            format!(
                "expected the shape {expected:?} beside the other parts of {}, got {:?}; the parts are of different weights, download the folder again",
                self.name,
                view.shape()
            ),
        ))
    }

    /// An error of decoding, with where it happened.
    pub fn located(&self, suffix: &str, error: FormatError) -> FormatError {
        match error {
            FormatError::Weight { what, expected, got } => {
                self.fault(suffix, format!("{what}: expected {expected}, got {got}"))
            }
            FormatError::SchemeShape { reason, .. } => self.fault(suffix, reason),
            other => other,
        }
    }
}

/// (rows, columns) of a matrix.
pub fn dims(view: &TensorView<'_>) -> (usize, usize) {
    view.matrix_dims()
}

/// Little-endian 32-bit integers.
pub fn integers(view: &TensorView<'_>) -> Vec<u32> {
    let words = view.bytes().as_chunks::<4>().0.iter();
    words.map(|word| u32::from_le_bytes(*word)).collect()
}
