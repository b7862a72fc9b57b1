//! `bf16`: every quantized weight decoded and rounded once to bfloat16, under its source name,
//! shape and orientation; kept tensors byte for byte. Any library that loads the source loads this.
//!
//! value = bf16(f32 value of [`QuantizedWeight::dequantize_row`]), round to nearest even.
//!
//! [`QuantizedWeight::dequantize_row`]: crate::weight::QuantizedWeight::dequantize_row

use half::bf16;
use half::slice::HalfFloatSliceExt;
use serde_json::Value;

use super::{Exporter, OnBytes, copy_side_files, write_provenance};
use crate::artifact::manifest::QuantizedRecord;
use crate::artifact::{Artifact, Stored, TensorRecord};
use crate::checkpoint::Orientation;
use crate::checkpoint::shards::read_json;
use crate::dtype::Dtype;
use crate::replace::Staging;
use crate::scheme::Scheme;
use crate::shard_writer::{ShardWriter, StoredTensor};
use crate::{FormatError, Result};

/// The exporter's only value.
pub const DENSE_BF16: DenseBf16 = DenseBf16;

/// See the module's text.
#[derive(Debug, Clone, Copy)]
pub struct DenseBf16;

/// Bytes handled between two calls of `on_bytes`.
const BLOCK_BYTES: usize = 4 << 20;

impl Exporter for DenseBf16 {
    fn name(&self) -> &'static str {
        "bf16"
    }

    fn summary(&self) -> &'static str {
        "decoded weights in BF16 under the source's names, for any library that loads the source"
    }

    fn refuses(&self, _scheme: &Scheme) -> Option<String> {
        None
    }

    fn planned_bytes(&self, artifact: &Artifact) -> u64 {
        artifact
            .manifest()
            .tensors
            .iter()
            .map(|t| stored(t, 0).bytes)
            .sum()
    }

    fn export(
        &self,
        artifact: &Artifact,
        staging: &Staging,
        max_shard_bytes: u64,
        on_bytes: OnBytes<'_>,
    ) -> Result<()> {
        let records = &artifact.manifest().tensors;
        let tensors = records
            .iter()
            .enumerate()
            .map(|(i, record)| stored(record, i))
            .collect();
        let mut writer = ShardWriter::create(staging.folder(), tensors, max_shard_bytes)?;
        let mut done = 0u64;
        for (index, record) in records.iter().enumerate() {
            let mut step = |writer: &mut ShardWriter, bytes: &[u8]| {
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
                    for block in artifact.stored(&record.name)?.bytes().chunks(BLOCK_BYTES) {
                        step(&mut writer, block)?;
                    }
                }
                Stored::Quantized(quantized) => match quantized.orientation {
                    Orientation::OutIn => decode_blocks(artifact, quantized, |_, _, values| {
                        step(&mut writer, &to_bytes(values))
                    })?,
                    Orientation::InOut => {
                        let (n, k) = (quantized.rows, quantized.columns);
                        let mut transposed = vec![bf16::ZERO; n * k];
                        decode_blocks(artifact, quantized, |from, count, values| {
                            for (column, row) in transposed.chunks_exact_mut(n).enumerate() {
                                let target = row.iter_mut().skip(from).take(count);
                                let source = values.iter().skip(column).step_by(k);
                                target.zip(source).for_each(|(t, v)| *t = *v);
                            }
                            Ok(())
                        })?;
                        for block in transposed.chunks(BLOCK_BYTES / 2) {
                            step(&mut writer, &to_bytes(block))?;
                        }
                    }
                },
            }
        }
        writer.finish()?;
        write_config(artifact, staging)?;
        copy_side_files(staging, artifact)?;
        write_provenance(staging, artifact, self.name())
    }
}

/// A stop asked for by `on_bytes`, as the error every unfinished write ends in.
fn interrupted(staging: &Staging) -> FormatError {
    FormatError::io(staging.target(), "finish")(std::io::ErrorKind::Interrupted.into())
}

fn stored(record: &TensorRecord, group: usize) -> StoredTensor {
    let dtype = match &record.stored {
        Stored::Kept { .. } => record.dtype,
        Stored::Quantized(_) => Dtype::BF16,
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

/// Decodes blocks of rows and hands each on as (first row, row count, values (count, K)).
fn decode_blocks(
    artifact: &Artifact,
    record: &QuantizedRecord,
    mut take: impl FnMut(usize, usize, &[bf16]) -> Result<()>,
) -> Result<()> {
    let (n, k) = (record.rows, record.columns);
    let block = (BLOCK_BYTES / (2 * k.max(1))).max(1);
    let mut row = vec![0f32; k];
    let mut values = Vec::new();
    for from in (0..n).step_by(block) {
        let count = block.min(n - from);
        let weight = artifact.weight_rows(record, from, count)?;
        values.clear();
        values.resize(count * k, bf16::ZERO);
        for (i, out) in values.chunks_exact_mut(k.max(1)).enumerate() {
            weight.dequantize_row(i, &mut row);
            out.convert_from_f32_slice(&row);
        }
        take(from, count, &values)?;
    }
    Ok(())
}

fn to_bytes(values: &[bf16]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

/// `config.json` without the quantization block.
fn write_config(artifact: &Artifact, staging: &Staging) -> Result<()> {
    let path = artifact.folder().join("config.json");
    if !path.is_file() {
        return Ok(());
    }
    let mut config: Value = read_json(&path)?;
    if let Some(object) = config.as_object_mut() {
        object.shift_remove("quantization_config");
    }
    staging.write_file("config.json", format!("{config:#}\n").as_bytes())
}
