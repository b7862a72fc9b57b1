//! Work in pieces: every tensor is cut into blocks of whole rows (or bytes, when kept), and blocks
//! into batches. The cut depends on shapes alone, never on the number of threads, so every sum over
//! blocks comes out the same.

use std::ops::Range;

use qtool_formats::checkpoint::Orientation;
use qtool_formats::{FloatDtype, TensorView};
use qtool_kernels::{Isa, widen_bf16, widen_f16, widen_f32};

use crate::plan::{Action, Quantization, QuantizePlan};

/// Source bytes of a block: its rows as `f32`, their codes and the packed bytes fit a core's
/// second-level cache.
const BLOCK_BYTES: usize = 256 << 10;
/// Fewest columns of an (in, out) source a block reads: shorter runs would waste cache lines.
const MIN_RUN: usize = 64;
/// Source bytes of a batch. Two batches at most are in flight.
pub const BATCH_BYTES: usize = 32 << 20;

/// A piece of one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Block {
    /// Index into the plan.
    pub tensor: usize,
    /// Rows of the (N, K) matrix, or bytes of a kept tensor.
    pub range: Range<usize>,
    /// Bytes of the source it covers.
    pub source_bytes: usize,
}

/// All blocks of a plan, tensor by tensor. An empty tensor has one empty block.
pub fn cut(plan: &QuantizePlan) -> Vec<Block> {
    let mut blocks = Vec::new();
    for (tensor, entry) in plan.tensors.iter().enumerate() {
        let (total, step, unit) = match &entry.action {
            Action::Keep { .. } => (entry.source_bytes as usize, 1 << 20, 1),
            Action::Quantize(q) => {
                let row = q.k * q.dtype.bytes();
                let floor = if q.orientation == Orientation::InOut {
                    MIN_RUN
                } else {
                    1
                };
                (q.n, (BLOCK_BYTES / row.max(1)).max(floor), row)
            }
        };
        let starts = (0..total.max(1)).step_by(step);
        blocks.extend(starts.map(|from| {
            let range = from..total.min(from + step);
            Block {
                tensor,
                source_bytes: range.len() * unit,
                range,
            }
        }));
    }
    blocks
}

/// Groups consecutive blocks into batches of about [`BATCH_BYTES`].
pub fn batches(blocks: &[Block]) -> Vec<Range<usize>> {
    let mut batches = Vec::new();
    let (mut from, mut filled) = (0, 0);
    for (i, block) in blocks.iter().enumerate() {
        filled += block.source_bytes;
        if filled >= BATCH_BYTES || i + 1 == blocks.len() {
            batches.push(from..i + 1);
            (from, filled) = (i + 1, 0);
        }
    }
    batches
}

/// Widens little-endian floats of any alignment.
pub fn widen(isa: Isa, dtype: FloatDtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        FloatDtype::Bf16 => widen_bf16(isa, bytes, out),
        FloatDtype::F16 => widen_f16(isa, bytes, out),
        FloatDtype::F32 => widen_f32(isa, bytes, out),
    }
}

/// Rows `range` of the (N, K) matrix as `f32`, row-major, whatever the source's orientation.
pub fn read_rows(
    isa: Isa,
    q: &Quantization,
    tensor: &TensorView<'_>,
    range: Range<usize>,
    out: &mut Vec<f32>,
) {
    out.clear();
    out.resize(range.len() * q.k, 0.0);
    match q.orientation {
        Orientation::OutIn => widen(isa, q.dtype, tensor.row_bytes(range), out),
        Orientation::InOut => {
            let (element, width) = (q.dtype.bytes(), range.len());
            let mut run = vec![0f32; width];
            for (column, line) in tensor.bytes().chunks_exact(q.n * element).enumerate() {
                widen(
                    isa,
                    q.dtype,
                    &line[range.start * element..range.end * element],
                    &mut run,
                );
                for (row, value) in run.iter().enumerate() {
                    out[row * q.k + column] = *value;
                }
            }
        }
    }
}
