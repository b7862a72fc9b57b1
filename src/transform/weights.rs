//! Rows of a checkpoint's weights as `f32`, transformed where a transformation says so. Owns which parts of a
//! tensor are read to make a row:
//!
//! - a tensor whose columns mix, or whose rows mix in small blocks, is made from the blocks its rows lie in;
//! - a tensor whose rows all mix (it writes to a rotated stream) is made as a whole by [`Weights::turn_to`], in
//!   blocks of columns, and kept while it is at work.
//!
//! Values are widened to f64, go through all steps, and are rounded to f32 once. Which thread makes what changes
//! nothing.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use qtool_formats::checkpoint::Checkpoint;
use qtool_formats::piece::{Piece, overlapping};
use qtool_kernels::{Isa, first_non_finite};
use rayon::prelude::*;

use super::Transform;
use super::folding::Folding;
use crate::blocks::{read_piece, read_rows};
use crate::{Error, Result};

/// Columns of a block, at least, when a tensor is made by blocks of columns.
const BLOCK_COLUMNS: usize = 128;
/// Elements of a block of rows made together.
const BLOCK_ELEMENTS: usize = 64 << 10;

/// See the module's text.
pub struct Weights<'a> {
    checkpoint: &'a Checkpoint,
    transform: Option<&'a Transform>,
    /// Tensors made as a whole, (N, K).
    whole: HashMap<String, Arc<Vec<f32>>>,
}

impl<'a> Weights<'a> {
    /// Those of `checkpoint`, through `transform`.
    pub fn new(checkpoint: &'a Checkpoint, transform: Option<&'a Transform>) -> Self {
        Self {
            checkpoint,
            transform,
            whole: HashMap::new(),
        }
    }

    /// Makes those tensors of the pieces ready that are made as a whole, and forgets all others.
    pub fn turn_to<'p>(&mut self, pieces: impl Iterator<Item = &'p Piece>) -> Result<()> {
        let Some(transform) = self.transform else {
            return Ok(());
        };
        let mut next = HashMap::new();
        for piece in pieces {
            let folding = transform.folding(&piece.tensor, &piece.tensor);
            let Some(folding) = folding.filter(|f| f.goes_by_columns()) else {
                continue;
            };
            if !next.contains_key(&piece.tensor) {
                let values = match self.whole.remove(&piece.tensor) {
                    Some(values) => values,
                    None => Arc::new(self.make(piece, folding)?),
                };
                next.insert(piece.tensor.clone(), values);
            }
        }
        self.whole = next;
        Ok(())
    }

    /// Rows `range` of the (N, K) matrix stacked of `pieces`, which make up the tensor `target`.
    ///
    /// Fails when a value that goes into a transformed row is not finite.
    pub fn rows(
        &self,
        isa: Isa,
        target: &str,
        pieces: &[Piece],
        range: Range<usize>,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let touched = self.transform.filter(|t| {
            pieces
                .iter()
                .any(|piece| t.folding(target, &piece.tensor).is_some())
        });
        let Some(transform) = touched else {
            return read_rows(isa, self.checkpoint, pieces, range, out);
        };
        let k = pieces.first().map_or(0, |piece| piece.columns.len());
        out.clear();
        out.resize(range.len() * k, 0.0);
        let mut rest = out.as_mut_slice();
        for (piece, rows) in overlapping(pieces, range) {
            let (to, after) = rest.split_at_mut(rows.len() * k);
            rest = after;
            match transform.folding(target, &piece.tensor) {
                None => {
                    let view = self.checkpoint.tensor(&piece.tensor)?;
                    read_piece(isa, piece, &view, rows, to);
                }
                Some(folding) => {
                    let rows = piece.rows.start + rows.start..piece.rows.start + rows.end;
                    self.fold(isa, piece, folding, rows, to)?;
                }
            }
        }
        Ok(())
    }

    /// Rows of the whole tensor of a piece, its columns alone.
    fn fold(
        &self,
        isa: Isa,
        piece: &Piece,
        folding: &Folding,
        rows: Range<usize>,
        out: &mut [f32],
    ) -> Result<()> {
        let (n, k) = piece.dims;
        let mut place = |from: &dyn Fn(usize, usize) -> f32| {
            for (row, out) in rows.clone().zip(out.chunks_exact_mut(piece.columns.len().max(1))) {
                out.iter_mut()
                    .zip(piece.columns.clone())
                    .for_each(|(out, column)| *out = from(row, column));
            }
        };
        if folding.goes_by_columns() {
            let values = match self.whole.get(&piece.tensor) {
                Some(values) => Arc::clone(values),
                None => Arc::new(self.make(piece, folding)?),
            };
            place(&|row, column| values[row * k + column]);
            return Ok(());
        }
        let unit = folding.row_unit();
        let block = rows.start / unit * unit..rows.end.next_multiple_of(unit).min(n);
        let mut tile = self.tile(isa, piece, block.clone(), 0..k)?;
        folding.apply(&mut tile, &block, &(0..k));
        place(&|row, column| tile[(row - block.start) * k + column] as f32);
        Ok(())
    }

    /// The whole tensor of a piece, made by blocks of columns or of rows.
    pub(super) fn make(&self, piece: &Piece, folding: &Folding) -> Result<Vec<f32>> {
        let (isa, (n, k)) = (Isa::best(), piece.dims);
        if !folding.goes_by_columns() {
            let step = (BLOCK_ELEMENTS / k.max(1))
                .max(1)
                .next_multiple_of(folding.row_unit());
            let mut out = vec![0f32; n * k];
            let whole = Piece::whole(&piece.tensor, piece.dtype, piece.orientation, piece.dims);
            out.par_chunks_mut((step * k).max(1))
                .enumerate()
                .try_for_each(|(i, out)| {
                    self.fold(isa, &whole, folding, i * step..n.min((i + 1) * step), out)
                })?;
            return Ok(out);
        }
        let step = BLOCK_COLUMNS.next_multiple_of(folding.column_unit());
        let starts: Vec<usize> = (0..k).step_by(step).collect();
        let blocks = starts
            .par_iter()
            .map(|&from| {
                let columns = from..k.min(from + step);
                let mut tile = self.tile(isa, piece, 0..n, columns.clone())?;
                folding.apply(&mut tile, &(0..n), &columns);
                Ok(tile.into_iter().map(|v| v as f32).collect::<Vec<f32>>())
            })
            .collect::<Result<Vec<_>>>()?;
        let mut out = vec![0f32; n * k];
        for (from, block) in starts.into_iter().zip(blocks) {
            let width = step.min(k - from);
            for (line, row) in block.chunks_exact(width).zip(out.chunks_exact_mut(k)) {
                row[from..from + width].copy_from_slice(line);
            }
        }
        Ok(out)
    }

    /// The elements of these rows and columns of the whole tensor of a piece, before the transformation.
    fn tile(&self, isa: Isa, piece: &Piece, rows: Range<usize>, columns: Range<usize>) -> Result<Vec<f64>> {
        let view = self.checkpoint.tensor(&piece.tensor)?;
        let (count, width) = (rows.len(), columns.len());
        let cut = Piece {
            rows,
            columns,
            ..piece.clone()
        };
        let mut values = vec![0f32; count * width];
        read_piece(isa, &cut, &view, 0..count, &mut values);
        if let Some(at) = first_non_finite(&values) {
            let index = cut.source_index(at / width, at % width);
            let index = if view.shape().len() == 1 {
                vec![index[1]]
            } else {
                index.to_vec()
            };
            return Err(Error::NonFinite {
                path: self.checkpoint.root().to_owned(),
                tensor: piece.tensor.clone(),
                index,
                value: values[at].to_string(),
            });
        }
        Ok(values.into_iter().map(f64::from).collect())
    }
}
