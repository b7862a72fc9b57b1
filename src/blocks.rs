//! Work in pieces: every tensor is cut into blocks of whole rows (or bytes, when kept), and blocks
//! into batches. The cut depends on shapes alone, never on the number of threads, so every sum over
//! blocks comes out the same.

use std::ops::Range;

use qtool_formats::checkpoint::{Checkpoint, Orientation};
use qtool_formats::packing::{LSB_ROWS, Packing};
use qtool_formats::piece::{Piece, overlapping};
use qtool_formats::{FloatDtype, TensorView};
use qtool_kernels::{Isa, pack_crumbs, pack_nibbles, widen_bf16, widen_f16, widen_f32};

use crate::Result;
use crate::plan::{Action, QuantizePlan};

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
    let multiple = plan.family.row_multiple();
    for (tensor, entry) in plan.tensors.iter().enumerate() {
        let (total, step, unit) = match &entry.action {
            Action::Keep { .. } => (entry.source_bytes as usize, 1 << 20, 1),
            // Some numbers: a single block.
            Action::Measure(_) => (1, 1, 0),
            Action::Convert(c) => rows_of_block(&c.pieces, c.n, c.k, 1),
            Action::Quantize(q) => rows_of_block(&q.pieces, q.n, q.k, multiple),
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

/// Rows in all, rows of a block, source bytes of a row.
fn rows_of_block(pieces: &[Piece], n: usize, k: usize, multiple: usize) -> (usize, usize, usize) {
    let width = pieces.iter().map(|p| p.dtype.bytes()).max().unwrap_or(0);
    let across = pieces.iter().any(|p| p.orientation == Orientation::InOut);
    let rows = (BLOCK_BYTES / (k * width).max(1)).max(if across { MIN_RUN } else { 1 });
    (n, rows.next_multiple_of(multiple), k * width)
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

/// Groups blocks that follow each other in a tensor until they have `most(tensor)` rows; each of the others is alone.
pub fn bundles(blocks: &[Block], most: impl Fn(usize) -> Option<usize>) -> Vec<Range<usize>> {
    let mut bundles: Vec<Range<usize>> = Vec::new();
    for (i, block) in blocks.iter().enumerate() {
        if let Some(last) = bundles.last_mut()
            && let (first, before) = (&blocks[last.start], &blocks[last.end - 1])
            && (before.tensor, before.range.end) == (block.tensor, block.range.start)
            && most(block.tensor).is_some_and(|most| block.range.end - first.range.start <= most)
        {
            last.end = i + 1;
        } else {
            bundles.push(i..i + 1);
        }
    }
    bundles
}

/// Widens little-endian floats of any alignment.
pub fn widen(isa: Isa, dtype: FloatDtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        FloatDtype::Bf16 => widen_bf16(isa, bytes, out),
        FloatDtype::F16 => widen_f16(isa, bytes, out),
        FloatDtype::F32 => widen_f32(isa, bytes, out),
    }
}

/// Rows `range` of the (N, K) matrix stacked of `pieces` as `f32`, row-major, whatever the
/// orientation of the sources.
pub fn read_rows(
    isa: Isa,
    checkpoint: &Checkpoint,
    pieces: &[Piece],
    range: Range<usize>,
    out: &mut Vec<f32>,
) -> Result<()> {
    let k = pieces.first().map_or(0, |piece| piece.columns.len());
    // Every value is written below; what the buffer held before need not be cleared.
    out.resize(range.len() * k, 0.0);
    let mut rest = out.as_mut_slice();
    for (piece, rows) in overlapping(pieces, range) {
        let view = checkpoint.tensor(&piece.tensor)?;
        let (target, after) = rest.split_at_mut(rows.len() * k);
        read_piece(isa, piece, &view, rows, target);
        rest = after;
    }
    Ok(())
}

/// Rows of one piece, counted within it.
pub(crate) fn read_piece(
    isa: Isa,
    piece: &Piece,
    view: &TensorView<'_>,
    rows: Range<usize>,
    out: &mut [f32],
) {
    let element = piece.dtype.bytes();
    let rows = piece.rows.start + rows.start..piece.rows.start + rows.end;
    let columns = piece.columns.clone();
    match piece.orientation {
        Orientation::OutIn if columns.len() == piece.dims.1 => {
            widen(isa, piece.dtype, view.row_bytes(rows), out);
        }
        Orientation::OutIn => {
            for (row, out) in rows.zip(out.chunks_exact_mut(columns.len())) {
                let line = view.row_bytes(row..row + 1);
                let cut = &line[columns.start * element..columns.end * element];
                widen(isa, piece.dtype, cut, out);
            }
        }
        Orientation::InOut => {
            let mut run = vec![0f32; rows.len()];
            let lines = view.bytes().chunks_exact(piece.dims.0 * element);
            for (column, line) in lines.skip(columns.start).take(columns.len()).enumerate() {
                let cut = &line[rows.start * element..rows.end * element];
                widen(isa, piece.dtype, cut, &mut run);
                for (row, value) in run.iter().enumerate() {
                    out[row * columns.len() + column] = *value;
                }
            }
        }
    }
}

/// `lsb-rows` by the kernels where rows end on whole bytes, else by the layout's own loop.
pub(crate) fn pack(
    isa: Isa,
    bits: u8,
    k: usize,
    codes: &[u8],
    out: &mut Vec<u8>,
) -> qtool_formats::Result<()> {
    let from = out.len();
    match bits {
        4 if k.is_multiple_of(2) => {
            out.resize(from + codes.len() / 2, 0);
            pack_nibbles(isa, codes, &mut out[from..]);
        }
        2 if k.is_multiple_of(4) => {
            out.resize(from + codes.len() / 4, 0);
            pack_crumbs(isa, codes, &mut out[from..]);
        }
        _ => LSB_ROWS.pack(bits, k, codes, out)?,
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_bundled_within_a_tensor_and_a_limit() {
        let block = |tensor, range: Range<usize>| Block {
            tensor,
            source_bytes: range.len(),
            range,
        };
        let blocks = [
            block(0, 0..10),
            block(0, 10..20),
            block(0, 20..30),
            block(0, 30..34),
            block(1, 0..10),
            block(1, 20..30),
            block(2, 0..10),
            block(2, 10..20),
        ];
        let most = |tensor| [Some(24), Some(100), None][tensor];
        let found = bundles(&blocks, most);
        assert_eq!(found, [0..2, 2..4, 4..5, 5..6, 6..7, 7..8]);
        assert_eq!(bundles(&blocks, |_| None).len(), blocks.len());
        assert!(bundles(&[], |_| None).is_empty());
    }
}
