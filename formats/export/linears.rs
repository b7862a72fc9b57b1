//! Folders in which every quantized linear weight `LINEAR.weight` becomes a few tensors of its own
//! (`LINEAR.qweight`, `LINEAR.scales` ...), and everything else stays as it is. Owns what these formats
//! share: which artifacts they can hold, the walk over the tensors, and the files around them. What a
//! format adds is a [`LinearFormat`].
//!
//! Memory holds five weights as they are laid out, their scales as f32, and two blocks of rows. Digests of what is read are
//! checked on the way.

mod foreign;
mod values;
mod whole;

use std::borrow::Cow;

use serde_json::Value;

use super::foreign::{Given, Planned};
use super::spares::Spares;
use super::{Exporter, OnBytes, card, checking, copy_side_files, refusal, shards, write_provenance};
use crate::artifact::manifest::QuantizedRecord;
use crate::artifact::{Artifact, Stored, TensorRecord};
use crate::checkpoint::shards::read_json;
use crate::checkpoint::{Naming, Orientation};
use crate::dtype::{Dtype, FloatDtype};
use crate::import::affine::AffineCodes;
use crate::packing::words::{WORD, awq_of_rows, turn};
use crate::packing::{LSB_ROWS, Packing};
use crate::replace::Staging;
use crate::scheme::{AffineScheme, Role, Scheme};
use crate::shard_writer::StoredTensor;
use crate::tensor::byte_len;
use crate::weight::QuantizedWeight;
use crate::weight::nested::NestedScales;
use crate::{FormatError, Result};

pub(crate) use values::{
    affine, has_halves, nested_scales, not_half, scale_bytes, scales_and_zeros, turned_zeros,
};
pub use whole::lay_out;

/// One tensor a linear weight becomes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Form {
    /// What takes the place of `weight` in its name.
    pub suffix: &'static str,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions.
    pub shape: Vec<usize>,
}

/// What is laid out: a weight of `n` x `k`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Subject {
    /// What its codes mean.
    pub scheme: Scheme,
    /// Rows.
    pub n: usize,
    /// Columns.
    pub k: usize,
    /// Element type of the source.
    pub dtype: Dtype,
    /// What is added to every quantized scale; zero where scales are not quantized.
    pub offset: f32,
}

impl Subject {
    /// Its scheme as an affine one. Fails when it is another.
    pub(super) fn affine(&self) -> Result<AffineScheme> {
        match self.scheme {
            Scheme::Affine(scheme) => Ok(scheme),
            other => Err(FormatError::Scheme {
                got: other.to_string(),
                expected: "expected an affine one".to_owned(),
            }),
        }
    }

    /// G.
    pub(super) fn groups(&self) -> Result<usize> {
        self.affine()?.groups(self.n, self.k)
    }
}

/// A linear weight that is quantized, by its module's name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Linear {
    /// Name without `.weight`.
    pub module: String,
    /// Its scheme.
    pub scheme: Scheme,
}

/// The linear weights of an artifact.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Linears {
    /// Those with codes.
    pub quantized: Vec<Linear>,
    /// Modules of the other matrices, embeddings left out.
    pub kept: Vec<String>,
    /// Whether columns of some come in another order than their groups.
    pub listed: bool,
}

/// What a format of this kind adds. `K` is columns, `N` rows, `G` groups per row.
pub trait LinearFormat: Sync {
    /// Name on the command line.
    fn name(&self) -> &'static str;

    /// One line for `--help`.
    fn summary(&self) -> &'static str;

    /// `None` when the format can hold this scheme, or the reason in words.
    fn refuses(&self, scheme: &Scheme) -> Option<String>;

    /// The tensors a weight becomes, its codes first; or why this shape does not fit.
    fn forms(&self, weight: &Subject) -> std::result::Result<Vec<Form>, String>;

    /// Whether it keeps scales as F16, so that others have no place.
    fn keeps_halves(&self) -> bool {
        false
    }

    /// Writes rows `at..` into `out`, the zeroed bytes of the first form of a weight of `n` rows.
    /// Blocks begin at multiples of [`BLOCK_ROWS`].
    fn codes(&self, rows: &QuantizedWeight, at: usize, n: usize, out: &mut [u8]) -> Result<()>;

    /// How the first form follows from codes that lie in `lsb-rows`, where it does, so that they need not be unpacked.
    fn stream(&self, _weight: &Subject) -> Option<Stream> {
        None
    }

    /// Bytes of the other forms, in order, from scales and zero points (both (N, G), the latter empty when the grid has
    /// none) of the whole weight.
    fn rest(&self, weight: &Subject, scales: &[f32], zeros: &[u8]) -> Result<Vec<Vec<u8>>>;

    /// The same of quantized scales. Fails in formats that have none.
    fn rest_nested(&self, weight: &Subject, _scales: &NestedScales) -> Result<Vec<Vec<u8>>> {
        Err(FormatError::Scheme {
            got: weight.scheme.to_string(),
            expected: format!("{} has no quantized scales", self.name()),
        })
    }

    /// `quantization_config` of `config.json`, or why these weights cannot stand together in one folder.
    fn config(&self, linears: &Linears) -> std::result::Result<Value, String>;

    /// Every tensor of a weight whose columns come in another order than their groups, in the order of the forms; or why
    /// they have no place.
    fn listed(&self, _weight: &AffineCodes) -> std::result::Result<Vec<(Form, Vec<u8>)>, String> {
        Err(format!(
            "its columns come in another order than their groups (g_idx), for which {} has no place; export --to gptq, gptq-v2, bf16 or f32",
            self.name()
        ))
    }

    /// Whether an output head may be quantized.
    fn takes_heads(&self) -> bool {
        false
    }
}

/// Codes that stay in the stream of bits in which an artifact keeps them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// The same bytes.
    Rows,
    /// Their 32-bit words (N, W) turned to (W, N).
    Turned,
    /// Of 4 bits, the halves of each byte swapped.
    Swapped,
    /// Of 4 bits, in AWQ's words.
    Awq,
}

/// Rows of a block begin at a multiple of this; a multiple of every layout's interleave.
pub const BLOCK_ROWS: usize = 64;
/// Codes of a block, about.
const BLOCK: usize = 1 << 18;

/// A [`LinearFormat`] as an exporter.
#[derive(Debug, Clone, Copy)]
pub struct Relaid<F>(pub F);

impl<F: LinearFormat> Exporter for Relaid<F> {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn summary(&self) -> &'static str {
        self.0.summary()
    }

    fn refuses(&self, scheme: &Scheme) -> Option<String> {
        self.0.refuses(scheme)
    }

    fn check(&self, artifact: &Artifact) -> Result<()> {
        let linears = linears(artifact, &self.0)?;
        self.0
            .config(&linears)
            .map_err(|reason| refusal(artifact, reason))?;
        for (record, quantized) in quantized(artifact) {
            let named = |reason: String| refusal(artifact, format!("{}: {reason}", record.name));
            let weight = subject(artifact, record, quantized)?;
            self.0.forms(&weight).map_err(named)?;
            if self.0.keeps_halves() && !has_halves(weight.scheme) {
                let (scales, _) = scales_and_zeros(artifact, quantized)?;
                not_half(weight.scheme, &scales).map_or(Ok(()), |reason| Err(named(reason)))?;
            }
        }
        Ok(())
    }

    fn planned_bytes(&self, artifact: &Artifact) -> u64 {
        let bytes = |tensors: Vec<StoredTensor>| tensors.iter().map(|t| t.bytes).sum();
        stored_tensors(artifact, &self.0).map_or(0, bytes)
    }

    fn export(
        &self,
        artifact: &Artifact,
        staging: &Staging,
        max_shard_bytes: u64,
        on_bytes: OnBytes<'_>,
    ) -> Result<()> {
        let format = &self.0;
        let config = format
            .config(&linears(artifact, format)?)
            .map_err(|reason| refusal(artifact, reason))?;
        let tensors = stored_tensors(artifact, format)?;
        let bytes: u64 = tensors.iter().map(|t| t.bytes).sum();
        let records = &artifact.manifest().tensors;
        let check = |record: &TensorRecord| artifact.check_digests(record);
        let make = |i: usize, spares: &Spares| match records.get(i) {
            // What cannot be laid out may be damaged, which is the better thing to say.
            Some(record) => {
                laid_out(artifact, format, record, spares).or_else(|error| check(record).and(Err(error)))
            }
            None => Ok(Vec::new()),
        };
        let pieces = (records.len(), |i| i);
        checking::beside(records.iter(), check, on_bytes, |on_bytes| {
            shards::write(staging, tensors, max_shard_bytes, pieces, make, on_bytes)
        })?;
        write_config(artifact, staging, config)?;
        copy_side_files(staging, artifact.files(), &[])?;
        card::write(staging, artifact, self.name(), bytes)?;
        write_provenance(staging, artifact, self.name())
    }

    fn plan_foreign<'a>(&'a self, given: &'a Given<'a>) -> Result<Planned<'a>> {
        foreign::plan(&self.0, given)
    }
}

/// The bytes of every tensor that a tensor of the artifact becomes.
fn laid_out<'a>(
    artifact: &'a Artifact,
    format: &dyn LinearFormat,
    record: &TensorRecord,
    spares: &Spares,
) -> Result<Vec<Cow<'a, [u8]>>> {
    let quantized = match &record.stored {
        Stored::Kept { .. } => return Ok(vec![Cow::Borrowed(artifact.stored(&record.name)?.bytes())]),
        Stored::Quantized(quantized) => quantized,
    };
    let weight = subject(artifact, record, quantized)?;
    let (scales, zeros) = scales_and_zeros(artifact, quantized)?;
    let codes = packed_codes(artifact, format, quantized, (&weight, &scales), spares)?;
    let rests = match nested_scales(artifact, quantized)? {
        Some(nested) => format.rest_nested(&weight, &nested)?,
        None => format.rest(&weight, &scales, &zeros)?,
    };
    Ok(std::iter::once(codes)
        .chain(rests.into_iter().map(Cow::Owned))
        .collect())
}

/// Stored codes that need not be unpacked: in `lsb-rows`, of whole words, every one of them and of `scales` allowed.
fn streamed<'a>(
    artifact: &'a Artifact,
    record: &QuantizedRecord,
    scales: &[f32],
) -> Result<Option<&'a [u8]>> {
    let Some(part) = record.parts.iter().find(|part| part.role == Role::Codes) else {
        return Ok(None);
    };
    let bytes = artifact.stored(&part.tensor)?.bytes();
    let (low, high) = record.scheme.code_range();
    let top = ((1u16 << part.bits) - 1) as u8;
    let allowed = high == top && (low == 0 || (low == 1 && part.bits == 8 && !bytes.contains(&0)));
    let whole = part.layout == LSB_ROWS.name() && part.row_bytes.is_multiple_of(WORD);
    // What the decoder would refuse is left to it.
    let sound = scales.iter().all(|s| *s > 0.0 && s.is_finite());
    Ok((allowed && whole && sound).then_some(bytes))
}

/// The bytes of the first form of a weight.
fn packed_codes<'a>(
    artifact: &'a Artifact,
    format: &dyn LinearFormat,
    record: &QuantizedRecord,
    (weight, scales): (&Subject, &[f32]),
    spares: &Spares,
) -> Result<Cow<'a, [u8]>> {
    let (n, k) = (record.rows, record.columns);
    if let Some(stream) = format.stream(weight)
        && let Some(bytes) = streamed(artifact, record, scales)?
    {
        let mut out = match stream {
            Stream::Rows => return Ok(Cow::Borrowed(bytes)),
            Stream::Turned | Stream::Awq => spares.zeros(bytes.len()),
            Stream::Swapped => spares.take(),
        };
        match stream {
            Stream::Swapped => out.extend(bytes.iter().map(|byte| byte.rotate_left(4))),
            Stream::Awq => awq_of_rows(k, n, bytes, &mut out),
            _ => turn(WORD, bytes.len() / (n * WORD).max(1), bytes, n, 0, &mut out),
        }
        return Ok(Cow::Owned(out));
    }
    let forms = format.forms(weight).map_err(|reason| refusal(artifact, reason))?;
    let size = forms.first().and_then(|form| byte_len(form.dtype, &form.shape));
    let mut out = spares.zeros(size.unwrap_or(0));
    let block = (BLOCK / k.max(1)).next_multiple_of(BLOCK_ROWS);
    for at in (0..n).step_by(block) {
        format.codes(&artifact.weight_rows(record, at, block)?, at, n, &mut out)?;
    }
    Ok(Cow::Owned(out))
}

/// Every tensor that will be written, in the order of the records.
fn stored_tensors(artifact: &Artifact, format: &dyn LinearFormat) -> Result<Vec<StoredTensor>> {
    let mut tensors = Vec::new();
    for (group, record) in artifact.manifest().tensors.iter().enumerate() {
        let mut add = |name: String, dtype: Dtype, shape: Vec<usize>| {
            let bytes = byte_len(dtype, &shape).unwrap_or(0) as u64;
            tensors.push(StoredTensor {
                name,
                dtype,
                shape,
                bytes,
                group,
            });
        };
        match &record.stored {
            Stored::Kept { .. } => add(record.name.clone(), record.dtype, record.shape.clone()),
            Stored::Quantized(quantized) => {
                let forms = format
                    .forms(&subject(artifact, record, quantized)?)
                    .map_err(|reason| refusal(artifact, format!("{}: {reason}", record.name)))?;
                for form in forms {
                    add(
                        format!("{}.{}", module(&record.name), form.suffix),
                        form.dtype,
                        form.shape,
                    );
                }
            }
        }
    }
    Ok(tensors)
}

fn module(name: &str) -> &str {
    name.strip_suffix(".weight").unwrap_or(name)
}

fn quantized(artifact: &Artifact) -> impl Iterator<Item = (&TensorRecord, &QuantizedRecord)> {
    artifact
        .manifest()
        .tensors
        .iter()
        .filter_map(|record| match &record.stored {
            Stored::Quantized(quantized) => Some((record, quantized)),
            Stored::Kept { .. } => None,
        })
}

fn subject(artifact: &Artifact, record: &TensorRecord, quantized: &QuantizedRecord) -> Result<Subject> {
    let offset = quantized.parts.iter().find(|part| part.role == Role::Offset);
    let offset = offset.map(|part| Ok(FloatDtype::F32.widen(artifact.stored(&part.tensor)?.bytes())));
    let offset: Option<Vec<f32>> = offset.transpose()?;
    Ok(Subject {
        scheme: quantized.scheme,
        n: quantized.rows,
        k: quantized.columns,
        dtype: record.dtype,
        offset: offset.and_then(|all| all.first().copied()).unwrap_or(0.0),
    })
}

/// What a tensor is to a model, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Linear,
    Head,
    /// Embeddings, vectors and whatever has another name than `LINEAR.weight`.
    Other,
}

fn place(name: &str, shape: &[usize]) -> Place {
    let last = name.rsplit('.').nth(1).unwrap_or_default();
    let embedding = last.contains("embed") || ["wte", "wpe", "shared"].contains(&last);
    match last {
        _ if embedding || shape.len() != 2 || !name.ends_with(".weight") => Place::Other,
        "lm_head" => Place::Head,
        _ => Place::Linear,
    }
}

/// Whether codes of such a tensor have a place.
fn takes(format: &dyn LinearFormat, place: Place) -> bool {
    place == Place::Linear || (place == Place::Head && format.takes_heads())
}

/// The linear weights of an artifact, or why it cannot become a folder of this kind.
fn linears(artifact: &Artifact, format: &dyn LinearFormat) -> Result<Linears> {
    let manifest = artifact.manifest();
    if !manifest.family.is_own() || manifest.source.naming != Naming::Hf {
        return Err(refusal(
            artifact,
            format!(
                "{} takes the tensor names of Hugging Face models, and these are Paddle's; quantize the model's -PT form without --format fastdeploy",
                format.name()
            ),
        ));
    }
    let mut linears = Linears::default();
    for record in &manifest.tensors {
        let place = place(&record.name, &record.shape);
        match &record.stored {
            Stored::Kept { .. } if place == Place::Linear || place == Place::Head => {
                linears.kept.push(module(&record.name).to_owned());
            }
            Stored::Kept { .. } => {}
            Stored::Quantized(q) if takes(format, place) && q.orientation == Orientation::OutIn => {
                linears.quantized.push(Linear {
                    module: module(&record.name).to_owned(),
                    scheme: q.scheme,
                });
            }
            Stored::Quantized(_) => {
                return Err(refusal(
                    artifact,
                    format!(
                        "{}: {} holds codes for linear weights named LINEAR.weight of two dimensions{}; keep this tensor: qtool quantize MODEL --skip '{}'",
                        record.name,
                        format.name(),
                        if format.takes_heads() {
                            ""
                        } else {
                            ", output heads left out"
                        },
                        record.name.replace('.', "\\.")
                    ),
                ));
            }
        }
    }
    Ok(linears)
}

/// `config.json` of the model with the format's block.
pub(super) fn write_config(artifact: &Artifact, staging: &Staging, block: Value) -> Result<()> {
    let path = artifact.folder().join("config.json");
    let mut config: Value = read_json(&path)?;
    let Some(object) = config.as_object_mut() else {
        return Err(FormatError::Json {
            path,
            reason: "expected an object, as every model's config.json holds".to_owned(),
        });
    };
    object.shift_remove("is_quantized");
    object.insert("quantization_config".to_owned(), block);
    staging.write_file("config.json", format!("{config:#}\n").as_bytes())
}
