//! `qtool.json`: what is in the folder, where it came from, how to decode it, and how good it is.
//!
//! Plain data with its JSON form. Key order and number formatting are fixed, so equal content
//! gives equal bytes. Nothing here depends on time, host or thread count.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize};

use super::transform::TransformRecord;
use super::{FORMAT, FORMAT_VERSION, Figures, PieceRecord};
use crate::checkpoint::shards::{is_plain_name, read_bounded};
use crate::checkpoint::{Naming, Orientation};
use crate::dtype::Dtype;
use crate::error::quoted;
use crate::packing::{self, wint2};
use crate::scheme::{Family, Part, Role, Scheme, nf4};
use crate::{FormatError, Result, limits};

/// The manifest as a whole.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// Always [`FORMAT`].
    pub format: String,
    /// [`FORMAT_VERSION`] of the writer.
    pub version: u32,
    /// Name and version of the writing program.
    #[serde(deserialize_with = "printable")]
    pub tool: String,
    /// The checkpoint it was made from.
    pub source: SourceRecord,
    /// Every option that had an effect, defaults included.
    pub options: serde_json::Value,
    /// How the model was rewritten before it was quantized; absent when it was not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transform: Option<TransformRecord>,
    /// Stored forms of its weights; absent for our own.
    #[serde(default, skip_serializing_if = "Family::is_own")]
    pub family: Family,
    /// Index formula of each layout used.
    pub layouts: BTreeMap<String, String>,
    /// Meaning of each scheme used.
    pub schemes: BTreeMap<String, SchemeRecord>,
    /// Sums over all tensors.
    pub totals: Totals,
    /// One record per tensor of the source, in storage order.
    pub tensors: Vec<TensorRecord>,
    /// Every file of the folder but this one.
    pub files: Vec<FileRecord>,
}

/// Where an artifact came from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SourceRecord {
    /// Last component of the path it was opened with.
    #[serde(deserialize_with = "printable")]
    pub name: String,
    /// Name family of its tensors.
    pub naming: Naming,
    /// Bytes of all its tensors.
    pub tensor_bytes: u64,
    /// Its weight files.
    pub files: Vec<FileRecord>,
    /// Tensors that were left out on purpose; absent when there are none.
    #[serde(
        default,
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "all_printable"
    )]
    pub dropped: Vec<String>,
}

/// A file of a folder.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// File name.
    pub name: String,
    /// Size in bytes.
    pub bytes: u64,
    /// Digest of the whole file; absent for weight files, whose tensors carry digests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
}

/// A scheme spelled out for readers that do not parse its name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SchemeRecord {
    /// Bits of a code.
    pub bits: u8,
    /// Columns that share a scale; 0 means the whole row.
    pub group: usize,
    /// The fixed zero point, or absent when zero points are stored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zero_point: Option<u8>,
    /// Smallest and largest code.
    pub code_range: (u8, u8),
    /// Type of the stored scales.
    pub scale_dtype: Dtype,
    /// How a value follows from a code.
    pub value: String,
}

impl SchemeRecord {
    /// The record of a scheme.
    pub fn new(scheme: &Scheme) -> Self {
        match scheme {
            Scheme::Affine(affine) => Self {
                bits: affine.bits(),
                group: affine.grouping().len(0),
                zero_point: affine.fixed_zero(),
                code_range: affine.code_range(),
                scale_dtype: affine.scale_dtype().dtype(),
                value: scheme.formula().to_owned(),
            },
            Scheme::Nf4 | Scheme::Nf4Double => Self {
                bits: scheme.bits(),
                group: nf4::GROUP,
                zero_point: None,
                code_range: scheme.code_range(),
                scale_dtype: match scheme {
                    Scheme::Nf4 => Dtype::F32,
                    _ => Dtype::U8,
                },
                value: scheme.formula().to_owned(),
            },
            Scheme::K(kind) => Self {
                bits: scheme.bits(),
                group: kind.group(),
                zero_point: None,
                code_range: scheme.code_range(),
                scale_dtype: Dtype::F16,
                value: scheme.formula().to_owned(),
            },
            Scheme::Ccq | Scheme::Ccq25 => Self {
                bits: scheme.bits(),
                group: wint2::GROUP,
                zero_point: None,
                code_range: scheme.code_range(),
                scale_dtype: Dtype::BF16,
                value: scheme.formula().to_owned(),
            },
        }
    }
}

/// Sums over all tensors.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Totals {
    /// Weights in quantized tensors.
    pub quantized_weights: u64,
    /// Bytes they are stored in.
    pub quantized_bytes: u64,
    /// `quantized_bytes * 8 / quantized_weights`.
    pub quantized_bits_per_weight: f64,
    /// Elements of kept tensors.
    pub kept_weights: u64,
    /// Bytes they are stored in.
    pub kept_bytes: u64,
    /// Bits per weight over everything.
    pub bits_per_weight: f64,
}

/// One tensor of the source and what became of it; or, when it has `sources`, a tensor assembled
/// from several, from a part of one, or from one under another name, in another orientation or type.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TensorRecord {
    /// Name in the source; of an assembled tensor its own.
    pub name: String,
    /// Shape in the source; of an assembled tensor its own.
    pub shape: Vec<usize>,
    /// Element type in the source; of an assembled kept tensor its own.
    pub dtype: Dtype,
    /// Digest of its bytes in the source; absent when it has `sources`.
    #[serde(
        default,
        skip_serializing_if = "Option::is_none",
        deserialize_with = "maybe_printable"
    )]
    pub source_digest: Option<String>,
    /// What it was assembled from, stacked along N in this order; absent when it is a tensor of the
    /// source as a whole, under its own name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sources: Vec<PieceRecord>,
    /// How it is stored here.
    #[serde(flatten)]
    pub stored: Stored,
}

/// How a tensor is stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "stored", rename_all = "lowercase")]
pub enum Stored {
    /// Under its own name; byte for byte as in the source unless it has `sources`.
    Kept {
        /// Why.
        #[serde(deserialize_with = "printable")]
        reason: String,
        /// File it lies in.
        file: String,
        /// Digest of its stored bytes; absent when the source's is the same.
        #[serde(
            default,
            skip_serializing_if = "Option::is_none",
            deserialize_with = "maybe_printable"
        )]
        digest: Option<String>,
    },
    /// As codes.
    Quantized(QuantizedRecord),
}

/// Everything about a quantized tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct QuantizedRecord {
    /// Name of the scheme, a key of [`Manifest::schemes`].
    pub scheme: Scheme,
    /// Which quantizer chose the codes, with its options.
    #[serde(deserialize_with = "printable")]
    pub method: String,
    /// N: output rows of the decoded matrix.
    pub rows: usize,
    /// K: input columns of the decoded matrix.
    pub columns: usize,
    /// Whether the decoded (N, K) matrix is the source (`out_in`) or its transpose (`in_out`).
    pub orientation: Orientation,
    /// The stored tensors.
    pub parts: Vec<PartRecord>,
    /// How much of the layer's output is error, on the calibration data: tr(E H E^T) / tr(W H W^T) with H the
    /// second moment of the inputs. Absent without calibration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proxy_error: Option<f64>,
    /// How good it is.
    pub figures: Figures,
    /// What is suspicious about it; empty when nothing is.
    #[serde(
        default,
        skip_serializing_if = "Vec::is_empty",
        deserialize_with = "all_printable"
    )]
    pub faults: Vec<String>,
}

/// One stored tensor of a quantized weight.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PartRecord {
    /// What it holds.
    pub role: Role,
    /// Its name in the file.
    pub tensor: String,
    /// File it lies in.
    pub file: String,
    /// Layout, a key of [`Manifest::layouts`].
    pub layout: String,
    /// Bits per packed value.
    pub bits: u8,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions as tagged in the file; (N, elements per row) unless the layout says otherwise.
    pub shape: Vec<usize>,
    /// Bytes of one row; all parts have N rows but those of the layout `whole`, of elements this long.
    pub row_bytes: usize,
    /// Digest of its bytes.
    #[serde(deserialize_with = "printable")]
    pub digest: String,
}

impl PartRecord {
    /// The record of `part` of the weight `name`.
    pub fn new(family: Family, name: &str, part: &Part, file: String, digest: String) -> Self {
        Self {
            role: part.role,
            tensor: family.tensor_name(name, part.role),
            file,
            layout: part.layout.to_owned(),
            bits: part.bits,
            dtype: part.dtype,
            shape: part.shape.clone(),
            row_bytes: part.row_bytes,
            digest,
        }
    }
}

/// Free text of a manifest, fit for a screen: control characters are escaped as it is read, so that
/// a foreign artifact cannot write to the terminal of whoever inspects it.
pub(super) fn printable<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<String, D::Error> {
    Ok(escaped(String::deserialize(deserializer)?))
}

pub(super) fn maybe_printable<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> std::result::Result<Option<String>, D::Error> {
    Ok(Option::deserialize(deserializer)?.map(escaped))
}

fn all_printable<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Vec<String>, D::Error> {
    Ok(Vec::deserialize(deserializer)?.into_iter().map(escaped).collect())
}

fn escaped(text: String) -> String {
    if text.chars().any(char::is_control) {
        text.escape_debug().to_string()
    } else {
        text
    }
}

impl Manifest {
    /// Reads a manifest file and checks it as [`parse`](Self::parse) does.
    pub fn read(path: &Path) -> Result<Self> {
        Self::parse(path, &read_bounded(path)?)
    }

    /// Parses and checks the bytes of a manifest: format, version, that every file is one of the
    /// folder, that every quantized tensor refers to a layout and a scheme the manifest describes,
    /// and that its parts are those its scheme asks for. `path` is only named in messages.
    pub fn parse(path: &Path, json: &[u8]) -> Result<Self> {
        /// The part that says whether the rest can be understood.
        #[derive(Deserialize)]
        struct Head {
            format: String,
            version: u32,
        }
        let bad = |reason: String| FormatError::Json {
            path: path.to_owned(),
            reason,
        };
        let unusable = |e: serde_json::Error| bad(format!("not a manifest: {}", quoted(&e.to_string())));
        let head: Head = serde_json::from_slice(json).map_err(unusable)?;
        if head.format != FORMAT || head.version == 0 || head.version > FORMAT_VERSION {
            return Err(bad(format!(
                "format {} version {}; this qtool reads format {FORMAT} up to version {FORMAT_VERSION}: use a newer qtool",
                quoted(&head.format),
                head.version
            )));
        }
        let this: Self = serde_json::from_slice(json).map_err(unusable)?;
        this.check(path)?;
        Ok(this)
    }

    fn check(&self, path: &Path) -> Result<()> {
        let bad = |what: String, expected: &str, got: String| FormatError::Manifest {
            path: path.to_owned(),
            what,
            expected: expected.to_owned(),
            got,
        };
        for tensor in &self.tensors {
            if tensor.name.chars().any(char::is_control) || tensor.name.len() > limits::MAX_NAME_BYTES {
                return Err(bad("tensors".to_owned(), "printable names", quoted(&tensor.name)));
            }
        }
        let files = self.files.iter().map(|file| &file.name);
        if let Some(name) = files.chain(self.stored_in()).find(|name| !is_plain_name(name)) {
            let got = quoted(&format!("{name:?}"));
            return Err(bad("files".to_owned(), "names of files of this folder", got));
        }
        if let Some(transform) = &self.transform {
            transform.check(path, &self.files)?;
        }
        for tensor in &self.tensors {
            tensor.check_sources(path)?;
            let Stored::Quantized(record) = &tensor.stored else {
                continue;
            };
            let what = || format!("tensor {}", tensor.name);
            let scheme = self.schemes.get(&record.scheme.to_string());
            if scheme != Some(&SchemeRecord::new(&record.scheme)) {
                return Err(bad(
                    what(),
                    "its scheme described under \"schemes\"",
                    record.scheme.to_string(),
                ));
            }
            // The last dimension is K where rows of the source are rows of the matrix, else N.
            let last = match record.orientation {
                Orientation::OutIn => record.columns,
                Orientation::InOut => record.rows,
            };
            let elements = tensor.shape.iter().try_fold(1usize, |p, &d| p.checked_mul(d));
            if elements.is_none()
                || elements != record.rows.checked_mul(record.columns)
                || tensor.shape.last() != Some(&last)
            {
                let got = format!(
                    "{} x {} for shape {:?}",
                    record.rows, record.columns, tensor.shape
                );
                return Err(bad(what(), "rows x columns of its shape", got));
            }
            let parts = record
                .scheme
                .parts_in(self.family, record.rows, record.columns)
                .map_err(|e| bad(what(), "a shape its scheme can hold", e.to_string()))?;
            if parts.len() != record.parts.len() {
                return Err(bad(
                    what(),
                    &format!("{} parts", parts.len()),
                    record.parts.len().to_string(),
                ));
            }
            for (part, stored) in parts.iter().zip(&record.parts) {
                let (file, digest) = (stored.file.clone(), stored.digest.clone());
                let expected = PartRecord::new(self.family, &tensor.name, part, file, digest);
                if &expected != stored {
                    let got = quoted(&format!("{stored:?}"));
                    return Err(bad(what(), &quoted(&format!("{expected:?}")), got));
                }
                let known = self.layouts.get(&stored.layout).map(String::as_str);
                if known.is_none() || known != packing::formula(&stored.layout) {
                    return Err(bad(
                        what(),
                        "its layout described under \"layouts\"",
                        stored.layout.clone(),
                    ));
                }
            }
        }
        Ok(())
    }

    /// Every mention of a file that holds a stored tensor.
    fn stored_in(&self) -> impl Iterator<Item = &String> {
        self.tensors.iter().flat_map(|tensor| match &tensor.stored {
            Stored::Kept { file, .. } => vec![file],
            Stored::Quantized(record) => record.parts.iter().map(|part| &part.file).collect(),
        })
    }

    /// The JSON text, ending in a line break.
    pub fn to_json(&self) -> String {
        let mut text = serde_json::to_string_pretty(self).unwrap_or_default();
        text.push('\n');
        text
    }

    /// Layout and scheme tables and totals, from the tensors.
    pub fn describe(&mut self, stored_bytes: impl Fn(&TensorRecord) -> u64) {
        let mut totals = Totals::default();
        for tensor in &self.tensors {
            let weights = tensor.shape.iter().product::<usize>() as u64;
            match &tensor.stored {
                Stored::Kept { .. } => {
                    totals.kept_weights += weights;
                    totals.kept_bytes += stored_bytes(tensor);
                }
                Stored::Quantized(record) => {
                    totals.quantized_weights += weights;
                    totals.quantized_bytes += stored_bytes(tensor);
                    self.schemes
                        .entry(record.scheme.to_string())
                        .or_insert_with(|| SchemeRecord::new(&record.scheme));
                    for part in &record.parts {
                        let formula = packing::formula(&part.layout).unwrap_or_default();
                        self.layouts
                            .entry(part.layout.clone())
                            .or_insert_with(|| formula.to_owned());
                    }
                }
            }
        }
        let per_weight = |bytes: u64, weights: u64| bytes as f64 * 8.0 / weights.max(1) as f64;
        totals.quantized_bits_per_weight = per_weight(totals.quantized_bytes, totals.quantized_weights);
        totals.bits_per_weight = per_weight(
            totals.quantized_bytes + totals.kept_bytes,
            totals.quantized_weights + totals.kept_weights,
        );
        self.totals = totals;
    }
}
