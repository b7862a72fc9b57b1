//! `bf16`, `bf16-gemm` and `f32`: every quantized weight decoded, under its source name, shape and
//! orientation; kept tensors byte for byte. Any library that loads the source loads this.
//!
//! `f32` holds the values of [`QuantizedWeight::dequantize_row`] exactly; `bf16` rounds each once,
//! to nearest even. `bf16-gemm` holds what FastDeploy's expert matrix product multiplies with: for WINT2
//! [`Arithmetic::Gemm`], which rounds twice; every other weight is the same as in `bf16`, because
//! a code of at most 8 bits is exact in bf16 and its product with the scale is rounded once there too.

use std::borrow::Cow;
use std::ops::Range;

use half::bf16;
use half::slice::HalfFloatSliceExt;
use serde_json::{Value, json};

use super::foreign::{Given, Planned, stored};
use super::spares::Spares;
use super::{Exporter, OnBytes, card, checking, copy_side_files, shards, write_provenance};
use crate::Result;
use crate::artifact::manifest::QuantizedRecord;
use crate::artifact::{Artifact, Stored, TensorRecord};
use crate::checkpoint::Orientation;
use crate::checkpoint::shards::read_json;
use crate::dtype::FloatDtype;
use crate::import::Decoded;
use crate::packing::wint2::Arithmetic;
use crate::replace::Staging;
use crate::scheme::Scheme;
use crate::shard_writer::StoredTensor;
use crate::weight::QuantizedWeight;

/// Decoded weights in BF16.
pub const DENSE_BF16: Dense = Dense {
    dtype: FloatDtype::Bf16,
    arithmetic: Arithmetic::Unzip,
};
/// Decoded weights in BF16, as FastDeploy's expert matrix product rounds them.
pub const DENSE_BF16_GEMM: Dense = Dense {
    dtype: FloatDtype::Bf16,
    arithmetic: Arithmetic::Gemm,
};
/// Decoded weights in F32.
pub const DENSE_F32: Dense = Dense {
    dtype: FloatDtype::F32,
    arithmetic: Arithmetic::Unzip,
};

/// See the module's text.
#[derive(Debug, Clone, Copy)]
pub struct Dense {
    dtype: FloatDtype,
    /// How WINT2 is rounded to bf16; F32 holds it unrounded.
    arithmetic: Arithmetic,
}

/// Values of a piece, about: what stays in a processor's cache from its making to its writing.
const BLOCK: usize = 1 << 17;

impl Exporter for Dense {
    fn name(&self) -> &'static str {
        match self.arithmetic {
            Arithmetic::Unzip => self.dtype.name(),
            Arithmetic::Gemm => "bf16-gemm",
        }
    }

    fn summary(&self) -> &'static str {
        match (self.dtype, self.arithmetic) {
            (FloatDtype::F32, _) => "decoded weights in F32, exactly as the codes mean them",
            (_, Arithmetic::Gemm) => {
                "the same, but 2-bit weights rounded as FastDeploy's expert GEMM does: what serving multiplies with"
            }
            _ => "decoded weights in BF16 under the source's names, for any library that loads the source",
        }
    }

    fn refuses(&self, _scheme: &Scheme) -> Option<String> {
        None
    }

    fn planned_bytes(&self, artifact: &Artifact) -> u64 {
        artifact
            .manifest()
            .tensors
            .iter()
            .filter(|t| !t.is_measured())
            .map(|t| self.stored(t, 0).bytes)
            .sum()
    }

    fn export(
        &self,
        artifact: &Artifact,
        staging: &Staging,
        max_shard_bytes: u64,
        on_bytes: OnBytes<'_>,
    ) -> Result<()> {
        let all = artifact.manifest().tensors.iter();
        let records: Vec<&TensorRecord> = all.filter(|t| !t.is_measured()).collect();
        let tensors = records
            .iter()
            .enumerate()
            .map(|(i, record)| self.stored(record, i))
            .collect();
        let pieces = pieces(&records);
        let check = |record: &TensorRecord| artifact.check_digests(record);
        let make = |i: usize, spares: &Spares| match pieces.get(i) {
            // What cannot be decoded may be damaged, which is the better thing to say.
            Some(piece) => match self.make(artifact, piece, spares) {
                Ok(bytes) => Ok(vec![bytes]),
                Err(error) => check(piece.record).and(Err(error)),
            },
            None => Ok(Vec::new()),
        };
        let group_of = |i: usize| pieces.get(i).map_or(0, |piece| piece.index);
        let pieces = (pieces.len(), group_of);
        checking::beside(records.iter().copied(), check, on_bytes, |on_bytes| {
            shards::write(staging, tensors, max_shard_bytes, pieces, make, on_bytes)
        })?;
        self.write_config(artifact, staging)?;
        copy_side_files(staging, artifact.files(), &[])?;
        card::write(staging, artifact, self.name(), self.planned_bytes(artifact))?;
        write_provenance(staging, artifact, self.name())
    }

    fn plan_foreign<'a>(&'a self, given: &'a Given<'a>) -> Result<Planned<'a>> {
        let model = given.model;
        let mut config = given.config()?;
        self.name_dtype(&mut config);
        if !config.contains_key("dtype") {
            config.insert("torch_dtype".to_owned(), json!(self.dtype_name()));
        }
        let mut tensors = Vec::new();
        for (group, tensor) in model.tensors().iter().enumerate() {
            let dtype = given.kept(tensor)?.unwrap_or(self.dtype.dtype());
            tensors.push(stored(tensor.name.clone(), dtype, tensor.shape.clone(), group));
        }
        let make = move |i: usize| -> Result<Vec<Cow<'a, [u8]>>> {
            let Some(tensor) = model.tensors().get(i) else {
                return Ok(Vec::new());
            };
            if given.kept(tensor)?.is_some() {
                return Ok(vec![given.kept_bytes(tensor)?]);
            }
            let bytes = match model.decode(tensor)? {
                Some(Decoded::Weight(weight)) => self.whole(&weight)?,
                Some(Decoded::Floats { dtype, bytes }) if dtype == self.dtype => bytes,
                Some(Decoded::Floats { dtype, bytes }) => self.floats(dtype, &bytes),
                None => return Ok(vec![given.kept_bytes(tensor)?]),
            };
            Ok(vec![Cow::Owned(bytes)])
        };
        Ok(given.folder(self.name(), tensors, config, Box::new(make)))
    }
}

/// Work of a size: a kept tensor, some rows of a quantized one, or all of one that lies transposed.
struct Piece<'a> {
    index: usize,
    record: &'a TensorRecord,
    work: Work<'a>,
}

enum Work<'a> {
    Copy,
    Rows(&'a QuantizedRecord, usize),
    Transpose(&'a QuantizedRecord),
}

fn pieces<'a>(records: &[&'a TensorRecord]) -> Vec<Piece<'a>> {
    let mut pieces = Vec::new();
    for (index, record) in records.iter().copied().enumerate() {
        let mut add = |work| {
            pieces.push(Piece { index, record, work });
        };
        match &record.stored {
            Stored::Kept { .. } => add(Work::Copy),
            Stored::Quantized(q) if q.orientation == Orientation::InOut => add(Work::Transpose(q)),
            Stored::Quantized(q) => (0..q.rows)
                .step_by(block_rows(q))
                .for_each(|at| add(Work::Rows(q, at))),
        }
    }
    pieces
}

/// Rows decoded at a time.
fn block_rows(record: &QuantizedRecord) -> usize {
    (BLOCK / record.columns.max(1)).max(1)
}

impl Dense {
    fn make<'a>(&self, artifact: &'a Artifact, piece: &Piece<'_>, spares: &Spares) -> Result<Cow<'a, [u8]>> {
        Ok(match piece.work {
            Work::Copy => Cow::Borrowed(artifact.stored(&piece.record.name)?.bytes()),
            Work::Rows(q, at) => {
                let mut out = spares.take();
                self.decode(artifact, q, at..q.rows.min(at + block_rows(q)), &mut out)?;
                Cow::Owned(out)
            }
            Work::Transpose(q) => Cow::Owned(self.transposed(artifact, q)?),
        })
    }

    fn stored(&self, record: &TensorRecord, group: usize) -> StoredTensor {
        let dtype = match &record.stored {
            Stored::Kept { .. } => record.dtype,
            Stored::Quantized(_) => self.dtype.dtype(),
        };
        let bytes = crate::tensor::byte_len(dtype, &record.shape).unwrap_or(0) as u64;
        StoredTensor {
            name: record.name.clone(),
            dtype,
            shape: record.shape.clone(),
            bytes,
            group,
        }
    }

    /// Decodes these rows and appends their (count, K) elements.
    fn decode(
        &self,
        artifact: &Artifact,
        record: &QuantizedRecord,
        rows: Range<usize>,
        bytes: &mut Vec<u8>,
    ) -> Result<()> {
        let k = record.columns;
        let mut row = vec![0f32; k];
        let mut narrow = vec![bf16::ZERO; k];
        let weight = artifact.weight_rows(record, rows.start, rows.len())?;
        for i in 0..rows.len() {
            match &weight {
                QuantizedWeight::Ccq(w)
                    if self.arithmetic == Arithmetic::Gemm && self.dtype == FloatDtype::Bf16 =>
                {
                    w.round_row(i, self.arithmetic, &mut narrow)?;
                    push_narrow(&narrow, bytes);
                }
                _ => {
                    weight.dequantize_row(i, &mut row);
                    self.push_row(&row, &mut narrow, bytes);
                }
            }
        }
        Ok(())
    }

    /// Appends a row of values in the format's type; `narrow` is as long.
    fn push_row(&self, row: &[f32], narrow: &mut [bf16], bytes: &mut Vec<u8>) {
        if self.dtype == FloatDtype::Bf16 {
            narrow.convert_from_f32_slice(row);
            push_narrow(narrow, bytes);
        } else {
            let at = bytes.len();
            bytes.resize(at + 4 * row.len(), 0);
            let fresh = bytes.get_mut(at..).unwrap_or_default();
            for (to, value) in fresh.as_chunks_mut::<4>().0.iter_mut().zip(row) {
                *to = value.to_le_bytes();
            }
        }
    }

    /// All of a weight of others, whose codes FastDeploy's matrix product does not know.
    fn whole(&self, weight: &QuantizedWeight) -> Result<Vec<u8>> {
        let (n, k) = weight.dims();
        let (mut row, mut narrow) = (vec![0f32; k], vec![bf16::ZERO; k]);
        let mut bytes = Vec::with_capacity(n * k * self.dtype.bytes());
        for i in 0..n {
            weight.dequantize_row(i, &mut row);
            self.push_row(&row, &mut narrow, &mut bytes);
        }
        Ok(bytes)
    }

    /// Floats of another type in the format's.
    fn floats(&self, dtype: FloatDtype, bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::with_capacity(bytes.len() / dtype.bytes() * self.dtype.bytes());
        for chunk in bytes.chunks(BLOCK) {
            let row = dtype.widen(chunk);
            self.push_row(&row, &mut vec![bf16::ZERO; row.len()], &mut out);
        }
        out
    }

    /// The whole weight as [K, N] bytes.
    fn transposed(&self, artifact: &Artifact, record: &QuantizedRecord) -> Result<Vec<u8>> {
        let (n, k, width) = (record.rows, record.columns, self.dtype.bytes());
        let mut transposed = vec![0u8; n * k * width];
        let mut block = Vec::new();
        let step = block_rows(record);
        for from in (0..n).step_by(step) {
            block.clear();
            self.decode(artifact, record, from..n.min(from + step), &mut block)?;
            for (row, values) in block.chunks_exact(k * width).enumerate() {
                let column = transposed.chunks_exact_mut(width).skip(from + row).step_by(n);
                column
                    .zip(values.chunks_exact(width))
                    .for_each(|(t, v)| t.copy_from_slice(v));
            }
        }
        Ok(transposed)
    }

    /// `config.json` without the quantization block, naming the dtype the weights now have.
    fn write_config(&self, artifact: &Artifact, staging: &Staging) -> Result<()> {
        let path = artifact.folder().join("config.json");
        if !path.is_file() {
            return Ok(());
        }
        let mut config: Value = read_json(&path)?;
        if let Some(object) = config.as_object_mut() {
            object.shift_remove("quantization_config");
            object.shift_remove("is_quantized");
            self.name_dtype(object);
        }
        staging.write_file("config.json", format!("{config:#}\n").as_bytes())
    }

    /// The format's type as a config names it.
    fn dtype_name(&self) -> &'static str {
        if self.dtype == FloatDtype::F32 {
            "float32"
        } else {
            "bfloat16"
        }
    }

    /// Names the type that weights now have where a config names one.
    fn name_dtype(&self, config: &mut serde_json::Map<String, Value>) {
        for key in ["torch_dtype", "dtype"] {
            if let Some(value) = config.get_mut(key) {
                *value = json!(self.dtype_name());
            }
        }
    }
}

fn push_narrow(row: &[bf16], bytes: &mut Vec<u8>) {
    let at = bytes.len();
    bytes.resize(at + 2 * row.len(), 0);
    let fresh = bytes.get_mut(at..).unwrap_or_default();
    for (to, value) in fresh.as_chunks_mut::<2>().0.iter_mut().zip(row) {
        *to = value.to_le_bytes();
    }
}
