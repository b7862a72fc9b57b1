//! Rows of a checkpoint's weights as `f32`, transformed where a transformation says so. Owns which parts of a
//! tensor are read to make a row:
//!
//! - a tensor whose columns mix, or whose rows mix in small blocks, is made from the blocks its rows lie in;
//! - a tensor whose rows all mix (it writes to a rotated stream) is made as a whole by [`Weights::turn_to`], in
//!   blocks of columns, and kept while it is at work.
//!
//! - a kept matrix that is stored turned, (K, N), is made as a whole, too, and turned.
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
    /// Tensors made as a whole, (N, K), by what they are made for and of.
    whole: HashMap<(String, String), Arc<Vec<f32>>>,
}

/// A piece that is transformed.
struct Folded<'p> {
    target: &'p str,
    piece: &'p Piece,
    /// The piece's tensor as the (N, K) matrix of the layer, as which it is folded.
    layer: Piece,
    /// Whether the piece's rows are the layer's columns.
    turned: bool,
    folding: &'p Folding,
}

impl Folded<'_> {
    /// Whether its rows cannot be made without the others.
    fn is_made_whole(&self) -> bool {
        self.turned || self.folding.goes_by_columns()
    }
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

    /// Makes those tensors ready that are made as a whole, of pieces by the tensors they are for; forgets all others.
    pub fn turn_to<'p>(&mut self, pieces: impl Iterator<Item = (&'p str, &'p Piece)>) -> Result<()> {
        if self.transform.is_none() {
            return Ok(());
        }
        let mut before = std::mem::take(&mut self.whole);
        let mut next = HashMap::new();
        for (target, piece) in pieces {
            let key = (target.to_owned(), piece.tensor.clone());
            if next.contains_key(&key) {
                continue;
            }
            let Some(folded) = self.folded(target, piece)?.filter(Folded::is_made_whole) else {
                continue;
            };
            let values = match before.remove(&key) {
                Some(values) => values,
                None => Arc::new(self.make(&folded.layer, folded.folding)?),
            };
            next.insert(key, values);
        }
        self.whole = next;
        Ok(())
    }

    /// What is to be folded of a piece, if anything is.
    fn folded<'p>(&'p self, target: &'p str, piece: &'p Piece) -> Result<Option<Folded<'p>>> {
        let folding = self.transform.and_then(|t| t.folding(target, &piece.tensor));
        let Some(folding) = folding else {
            return Ok(None);
        };
        let view = self.checkpoint.tensor(&piece.tensor)?;
        let layer = Piece::of(
            &view,
            piece.dtype,
            self.checkpoint.naming().orientation(&piece.tensor),
        );
        Ok(Some(Folded {
            target,
            piece,
            turned: layer.orientation != piece.orientation,
            layer,
            folding,
        }))
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
        if self.transform.is_none() {
            return read_rows(isa, self.checkpoint, pieces, range, out);
        }
        let k = pieces.first().map_or(0, |piece| piece.columns.len());
        out.clear();
        out.resize(range.len() * k, 0.0);
        let mut rest = out.as_mut_slice();
        for (piece, rows) in overlapping(pieces, range) {
            let (to, after) = rest.split_at_mut(rows.len() * k);
            rest = after;
            match self.folded(target, piece)? {
                None => {
                    let view = self.checkpoint.tensor(&piece.tensor)?;
                    read_piece(isa, piece, &view, rows, to);
                }
                Some(folded) => {
                    let rows = piece.rows.start + rows.start..piece.rows.start + rows.end;
                    self.fold(isa, &folded, rows, to)?;
                }
            }
        }
        Ok(())
    }

    /// Rows of the whole tensor of a piece, its columns alone.
    fn fold(&self, isa: Isa, folded: &Folded<'_>, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let columns = &folded.piece.columns;
        let mut place = |from: &dyn Fn(usize, usize) -> f32| {
            for (row, out) in rows.clone().zip(out.chunks_exact_mut(columns.len().max(1))) {
                out.iter_mut()
                    .zip(columns.clone())
                    .for_each(|(out, column)| *out = from(row, column));
            }
        };
        let (n, k) = folded.layer.dims;
        if folded.is_made_whole() {
            let key = (folded.target.to_owned(), folded.piece.tensor.clone());
            let values = match self.whole.get(&key) {
                Some(values) => Arc::clone(values),
                None => Arc::new(self.make(&folded.layer, folded.folding)?),
            };
            match folded.turned {
                true => place(&|row, column| values[column * k + row]),
                false => place(&|row, column| values[row * k + column]),
            }
            return Ok(());
        }
        let unit = folded.folding.row_unit();
        let block = rows.start / unit * unit..rows.end.next_multiple_of(unit).min(n);
        let mut tile = self.tile(isa, &folded.layer, block.clone(), 0..k)?;
        folded.folding.apply(&mut tile, &block, &(0..k));
        place(&|row, column| tile[(row - block.start) * k + column] as f32);
        Ok(())
    }

    /// The whole tensor of a layer, made by blocks of columns or of rows.
    pub(super) fn make(&self, piece: &Piece, folding: &Folding) -> Result<Vec<f32>> {
        let (isa, (n, k)) = (Isa::best(), piece.dims);
        if !folding.goes_by_columns() {
            let step = (BLOCK_ELEMENTS / k.max(1))
                .max(1)
                .next_multiple_of(folding.row_unit());
            let mut out = vec![0f32; n * k];
            out.par_chunks_mut((step * k).max(1))
                .enumerate()
                .try_for_each(|(i, out)| {
                    let rows = i * step..n.min((i + 1) * step);
                    let mut tile = self.tile(isa, piece, rows.clone(), 0..k)?;
                    folding.apply(&mut tile, &rows, &(0..k));
                    out.iter_mut().zip(tile).for_each(|(out, v)| *out = v as f32);
                    Ok::<(), Error>(())
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
