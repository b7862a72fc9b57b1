//! What a file is written from: an artifact, or a model that others quantized. Owns the difference, so that the plan of the
//! file need not know it.

use std::borrow::Cow;
use std::ops::Range;
use std::path::Path;

use half::f16;
use serde_json::Value as Json;

use crate::artifact::manifest::QuantizedRecord;
use crate::artifact::{Artifact, PartRecord, Stored, TensorRecord};
use crate::checkpoint::Naming;
use crate::checkpoint::shards::read_json;
use crate::dtype::{Dtype, FloatDtype};
use crate::export::foreign::Given;
use crate::export::linears::scales_and_zeros;
use crate::export::refusal;
use crate::import::{Decoded, Tensor};
use crate::packing::ggml::GgmlType;
use crate::packing::{LSB_ROWS, Packing, ROWS};
use crate::scheme::{Role, Scheme};
use crate::weight::QuantizedWeight;
use crate::{FormatError, Result};

/// See the module's text.
#[derive(Debug, Clone, Copy)]
pub(super) enum Origin<'a> {
    Artifact(&'a Artifact),
    Foreign(&'a Given<'a>),
}

/// A tensor of the model.
#[derive(Debug, Clone, Copy)]
pub(super) struct Part<'a> {
    /// Its name in the checkpoint.
    pub(super) name: &'a str,
    /// Its shape there.
    pub(super) shape: &'a [usize],
    /// How it is held.
    pub(super) held: Held,
    at: Place<'a>,
}

/// How a tensor is held.
#[derive(Debug, Clone, Copy)]
pub(super) enum Held {
    /// As its elements.
    Elements(Dtype),
    /// As floats that stand for codes which no block holds.
    Floats,
    /// As codes of rows of so many columns.
    Codes {
        scheme: Scheme,
        rows: usize,
        columns: usize,
    },
}

/// Rows of codes as they are stored.
#[derive(Debug)]
pub(super) struct StoredRows<'a> {
    /// Weights of a group.
    pub(super) group: usize,
    /// Bytes of the rows, `lsb-rows`.
    pub(super) codes: &'a [u8],
    /// A scale a group.
    pub(super) scales: Vec<f16>,
}

#[derive(Debug, Clone, Copy)]
enum Place<'a> {
    Record(&'a TensorRecord),
    Tensor(&'a Tensor),
}

impl<'a> Origin<'a> {
    /// What cannot be written, and why.
    pub(super) fn refusal(&self, reason: String) -> FormatError {
        match self {
            Self::Artifact(artifact) => refusal(artifact, reason),
            Self::Foreign(given) => given.refusal(reason),
        }
    }

    /// The model's config. Fails when names of tensors or files are not Hugging Face's.
    pub(super) fn config(&self) -> Result<Json> {
        match self {
            Self::Artifact(artifact) => {
                let manifest = artifact.manifest();
                if !manifest.family.is_own() || manifest.source.naming != Naming::Hf {
                    return Err(self.refusal(
                        "gguf is written from the tensor names of Hugging Face models, and these are Paddle's; quantize the model's -PT form without --format fastdeploy".to_owned(),
                    ));
                }
                read_json(&artifact.folder().join("config.json"))
            }
            Self::Foreign(given) if given.model.format() == "gguf" => {
                Err(self.refusal("it is a GGUF file already; copy it".to_owned()))
            }
            Self::Foreign(given) => Ok(Json::Object(given.config()?)),
        }
    }

    /// Where its tokenizer lies.
    pub(super) fn folder(&self) -> &'a Path {
        match self {
            Self::Artifact(artifact) => artifact.folder(),
            Self::Foreign(given) => given.model.files().folder(),
        }
    }

    /// Its name.
    pub(super) fn name(&self) -> String {
        match self {
            Self::Artifact(artifact) => artifact.manifest().source.name.clone(),
            Self::Foreign(given) => given.name(),
        }
    }

    /// Its tensors, in storage order.
    pub(super) fn parts(&self) -> Result<Vec<Part<'a>>> {
        match *self {
            Self::Artifact(artifact) => Ok(artifact.manifest().tensors.iter().map(of_record).collect()),
            Self::Foreign(given) => {
                let of = |tensor: &'a Tensor| -> Result<Part<'a>> {
                    let held = match given.kept(tensor)? {
                        Some(dtype) => Held::Elements(dtype),
                        None => match given.model.decode(tensor)? {
                            Some(Decoded::Weight(weight)) => {
                                let (scheme, (rows, columns)) = (weight.scheme(), weight.dims());
                                Held::Codes {
                                    scheme,
                                    rows,
                                    columns,
                                }
                            }
                            _ => Held::Floats,
                        },
                    };
                    Ok(Part {
                        name: &tensor.name,
                        shape: &tensor.shape,
                        held,
                        at: Place::Tensor(tensor),
                    })
                };
                given.model.tensors().iter().map(of).collect()
            }
        }
    }

    /// Whether a part is made whole: others' codes are decoded at once.
    pub(super) fn is_whole(&self, part: &Part<'_>) -> bool {
        matches!((&part.at, part.held), (Place::Tensor(_), Held::Codes { .. }))
    }

    /// Fails when a part is not what was written once.
    pub(super) fn check(&self, part: &Part<'_>) -> Result<()> {
        match (self, part.at) {
            (Self::Artifact(artifact), Place::Record(record)) => artifact.check_digests(record),
            _ => Ok(()),
        }
    }

    /// Bytes of the rows `rows` of `count` of a part that is held as its elements.
    pub(super) fn elements(
        &self,
        part: &Part<'a>,
        rows: Range<usize>,
        count: usize,
    ) -> Result<Cow<'a, [u8]>> {
        let cut = |bytes: &[u8]| {
            let width = bytes.len() / count.max(1);
            rows.start * width..rows.end * width
        };
        Ok(match (*self, part.at) {
            (Self::Foreign(given), Place::Tensor(tensor)) => match given.kept_bytes(tensor)? {
                Cow::Borrowed(bytes) => Cow::Borrowed(bytes.get(cut(bytes)).unwrap_or_default()),
                Cow::Owned(bytes) => Cow::Owned(bytes.get(cut(&bytes)).unwrap_or_default().to_vec()),
            },
            (Self::Artifact(artifact), _) => {
                let bytes = artifact.stored(part.name)?.bytes();
                Cow::Borrowed(bytes.get(cut(bytes)).unwrap_or_default())
            }
            _ => Cow::Borrowed(&[]),
        })
    }

    /// Rows `at..at + count` of a part that is held as codes; of others' models all of them.
    pub(super) fn weight(&self, part: &Part<'a>, at: usize, count: usize) -> Result<QuantizedWeight> {
        match (self, part.at) {
            (Self::Artifact(artifact), Place::Record(record)) => {
                artifact.weight_rows(codes_of(record).ok_or_else(|| self.no_codes(part))?, at, count)
            }
            (Self::Foreign(given), Place::Tensor(tensor)) => match given.model.decode(tensor)? {
                Some(Decoded::Weight(weight)) => Ok(weight),
                _ => Err(self.no_codes(part)),
            },
            _ => Err(self.no_codes(part)),
        }
    }

    /// Codes and scales of rows `rows` of a part as an artifact stores them, where blocks of `kind` follow from these bytes:
    /// rows of `lsb-rows`, every code and scale allowed. Where not, [`weight`](Self::weight) has them or says what is wrong.
    pub(super) fn stored(
        &self,
        part: &Part<'a>,
        kind: GgmlType,
        rows: Range<usize>,
    ) -> Result<Option<StoredRows<'a>>> {
        let (Self::Artifact(artifact), Place::Record(record)) = (*self, part.at) else {
            return Ok(None);
        };
        let Some(codes) = codes_of(record).filter(|_| kind.packs_stored()) else {
            return Ok(None);
        };
        let Scheme::Affine(scheme) = codes.scheme else {
            return Ok(None);
        };
        let part_of = |role| codes.parts.iter().find(|part| part.role == role);
        let (Some(packed), Some(scales)) = (part_of(Role::Codes), part_of(Role::Scales)) else {
            return Ok(None);
        };
        let dtype = FloatDtype::from_dtype(scales.dtype);
        let by_rows = packed.layout == LSB_ROWS.name() && scales.layout == ROWS;
        let Some(dtype) = dtype.filter(|_| by_rows) else {
            return Ok(None);
        };
        let rows_of = |part: &PartRecord| -> Result<&'a [u8]> {
            let bytes = artifact.stored(&part.tensor)?.bytes();
            let cut = rows.start * part.row_bytes..rows.end * part.row_bytes;
            Ok(bytes.get(cut).unwrap_or_default())
        };
        let (bytes, scales) = (rows_of(packed)?, dtype.widen(rows_of(scales)?));
        let (low, _) = scheme.code_range();
        let allowed = low == 0 || (low == 1 && packed.bits == 8 && !bytes.contains(&0));
        let sound = scales.iter().all(|s| *s > 0.0 && s.is_finite());
        Ok((allowed && sound).then(|| StoredRows {
            group: scheme.grouping().len(codes.columns),
            codes: bytes,
            scales: scales.iter().map(|s| f16::from_f32(*s)).collect(),
        }))
    }

    /// Scales and zero points of a part that is held as codes of an affine scheme.
    pub(super) fn numbers(&self, part: &Part<'a>) -> Result<(Vec<f32>, Vec<u8>)> {
        match (self, part.at) {
            (Self::Artifact(artifact), Place::Record(record)) => {
                scales_and_zeros(artifact, codes_of(record).ok_or_else(|| self.no_codes(part))?)
            }
            _ => match self.weight(part, 0, usize::MAX)? {
                QuantizedWeight::Affine(weight) => Ok((weight.scales().to_vec(), weight.zeros().to_vec())),
                _ => Ok((Vec::new(), Vec::new())),
            },
        }
    }

    fn no_codes(&self, part: &Part<'_>) -> FormatError {
        self.refusal(format!("{}: expected codes", part.name))
    }
}

fn codes_of(record: &TensorRecord) -> Option<&QuantizedRecord> {
    match &record.stored {
        Stored::Quantized(quantized) => Some(quantized),
        Stored::Kept { .. } => None,
    }
}

fn of_record(record: &TensorRecord) -> Part<'_> {
    let held = match &record.stored {
        Stored::Kept { .. } => Held::Elements(record.dtype),
        Stored::Quantized(q) => Held::Codes {
            scheme: q.scheme,
            rows: q.rows,
            columns: q.columns,
        },
    };
    Part {
        name: &record.name,
        shape: &record.shape,
        held,
        at: Place::Record(record),
    }
}
