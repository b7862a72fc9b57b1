//! `bf16`, `bf16-gemm` and `f32`: every quantized weight decoded, under its source name, shape and
//! orientation; kept tensors byte for byte. Any library that loads the source loads this.
//!
//! `f32` holds the values of [`QuantizedWeight::dequantize_row`] exactly; `bf16` rounds each once,
//! to nearest even. `bf16-gemm` holds what FastDeploy's expert matrix product multiplies with: for WINT2
//! [`Arithmetic::Gemm`], which rounds twice; every other weight is the same as in `bf16`, because
//! a code of at most 8 bits is exact in bf16 and its product with the scale is rounded once there too.

use half::bf16;
use half::slice::HalfFloatSliceExt;
use serde_json::{Value, json};

use super::{Exporter, OnBytes, card, copy_side_files, interrupted, write_provenance};
use crate::Result;
use crate::artifact::manifest::QuantizedRecord;
use crate::artifact::{Artifact, Stored, TensorRecord};
use crate::checkpoint::Orientation;
use crate::checkpoint::shards::read_json;
use crate::dtype::FloatDtype;
use crate::packing::wint2::Arithmetic;
use crate::replace::Staging;
use crate::scheme::Scheme;
use crate::shard_writer::{ShardWriter, StoredTensor};
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

/// Values handled between two calls of `on_bytes`.
const BLOCK: usize = 1 << 20;

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
        let mut writer = ShardWriter::create(staging.folder(), tensors, max_shard_bytes)?;
        let mut done = 0u64;
        for (index, record) in records.iter().enumerate() {
            let mut append = |bytes: &[u8]| {
                writer.append(index, bytes)?;
                done += bytes.len() as u64;
                if on_bytes(done) {
                    Ok(())
                } else {
                    Err(interrupted(staging))
                }
            };
            match &record.stored {
                Stored::Kept { .. } => {
                    artifact
                        .stored(&record.name)?
                        .bytes()
                        .chunks(BLOCK)
                        .try_for_each(append)?;
                }
                Stored::Quantized(quantized) => match quantized.orientation {
                    Orientation::OutIn => self.decode(artifact, quantized, |_, bytes| append(bytes))?,
                    Orientation::InOut => {
                        let transposed = self.transposed(artifact, quantized)?;
                        transposed.chunks(BLOCK).try_for_each(append)?;
                    }
                },
            }
        }
        writer.finish()?;
        self.write_config(artifact, staging)?;
        copy_side_files(staging, artifact)?;
        card::write(staging, artifact, self.name(), self.planned_bytes(artifact))?;
        write_provenance(staging, artifact, self.name())
    }
}

impl Dense {
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

    /// Decodes blocks of rows and hands each on as (first row, bytes of (count, K) elements).
    fn decode(
        &self,
        artifact: &Artifact,
        record: &QuantizedRecord,
        mut take: impl FnMut(usize, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let (n, k) = (record.rows, record.columns);
        let block = (BLOCK / k.max(1)).max(1);
        let mut row = vec![0f32; k];
        let mut narrow = vec![bf16::ZERO; k];
        let mut bytes = Vec::new();
        for from in (0..n).step_by(block) {
            let count = block.min(n - from);
            let weight = artifact.weight_rows(record, from, count)?;
            bytes.clear();
            for i in 0..count {
                if self.dtype != FloatDtype::Bf16 {
                    weight.dequantize_row(i, &mut row);
                    row.iter().for_each(|&v| self.dtype.push(v, &mut bytes));
                    continue;
                }
                match &weight {
                    QuantizedWeight::Ccq(w) if self.arithmetic == Arithmetic::Gemm => {
                        w.round_row(i, self.arithmetic, &mut narrow)?;
                    }
                    _ => {
                        weight.dequantize_row(i, &mut row);
                        narrow.convert_from_f32_slice(&row);
                    }
                }
                bytes.extend(narrow.iter().flat_map(|v| v.to_le_bytes()));
            }
            take(from, &bytes)?;
        }
        Ok(())
    }

    /// The whole weight as [K, N] bytes.
    fn transposed(&self, artifact: &Artifact, record: &QuantizedRecord) -> Result<Vec<u8>> {
        let (n, k, width) = (record.rows, record.columns, self.dtype.bytes());
        let mut transposed = vec![0u8; n * k * width];
        self.decode(artifact, record, |from, bytes| {
            for (row, values) in bytes.chunks_exact(k * width).enumerate() {
                let column = transposed.chunks_exact_mut(width).skip(from + row).step_by(n);
                column
                    .zip(values.chunks_exact(width))
                    .for_each(|(t, v)| t.copy_from_slice(v));
            }
            Ok(())
        })?;
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
            let name = if self.dtype == FloatDtype::F32 {
                "float32"
            } else {
                "bfloat16"
            };
            for key in ["torch_dtype", "dtype"] {
                if let Some(value) = object.get_mut(key) {
                    *value = json!(name);
                }
            }
        }
        staging.write_file("config.json", format!("{config:#}\n").as_bytes())
    }
}
