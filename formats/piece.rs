//! Where the rows of a stored weight come from: pieces of source tensors stacked along N.
//!
//! ```text
//! qkv of a fused checkpoint   [ q, all rows | k, all rows | v, all rows ]      columns: all
//! its second tensor-parallel half  [ q, rows N/2.. | k, rows N/2.. | v, rows N/2.. ]
//! second half of a row-parallel linear   [ o, all rows ]                       columns K/2..
//! ```
//!
//! Rows and columns are those of the (N, K) matrix, however the source stores it.

use std::ops::Range;

use crate::checkpoint::Orientation;
use crate::dtype::FloatDtype;
use crate::tensor::TensorView;

/// A rectangle of one source tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// Name of the source tensor.
    pub tensor: String,
    /// Its element type.
    pub dtype: FloatDtype,
    /// How its (N, K) matrix lies in the source.
    pub orientation: Orientation,
    /// N and K of the whole source tensor.
    pub dims: (usize, usize),
    /// Which of its rows.
    pub rows: Range<usize>,
    /// Which of its columns.
    pub columns: Range<usize>,
}

impl Piece {
    /// The whole of a tensor.
    pub fn whole(tensor: &str, dtype: FloatDtype, orientation: Orientation, dims: (usize, usize)) -> Self {
        Self {
            tensor: tensor.to_owned(),
            dtype,
            orientation,
            dims,
            rows: 0..dims.0,
            columns: 0..dims.1,
        }
    }

    /// The whole of a stored tensor; a vector is a matrix of one row.
    pub fn of(view: &TensorView<'_>, dtype: FloatDtype, orientation: Orientation) -> Self {
        let (rows, columns) = view.matrix_dims();
        let (orientation, dims) = match orientation {
            Orientation::InOut if view.shape().len() == 2 => (orientation, (columns, rows)),
            _ => (Orientation::OutIn, (rows, columns)),
        };
        Self::whole(view.name(), dtype, orientation, dims)
    }

    /// Whether it is the whole tensor.
    pub fn is_whole(&self) -> bool {
        self.rows == (0..self.dims.0) && self.columns == (0..self.dims.1)
    }

    /// Index of the element at `row` and `column` of the piece in the source tensor's own two
    /// dimensions.
    pub fn source_index(&self, row: usize, column: usize) -> [usize; 2] {
        let (row, column) = (self.rows.start + row, self.columns.start + column);
        match self.orientation {
            Orientation::OutIn => [row, column],
            Orientation::InOut => [column, row],
        }
    }
}

/// The pieces that overlap `rows` of the stack: each with the rows of the piece concerned, counted
/// within the piece.
pub fn overlapping(pieces: &[Piece], rows: Range<usize>) -> impl Iterator<Item = (&Piece, Range<usize>)> {
    let mut start = 0;
    pieces.iter().filter_map(move |piece| {
        let (from, to) = (start, start + piece.rows.len());
        start = to;
        let (low, high) = (rows.start.max(from), rows.end.min(to));
        (low < high).then(|| (piece, low - from..high - from))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_a_stack_fall_into_pieces() {
        let piece = |name, n| Piece::whole(name, FloatDtype::Bf16, Orientation::OutIn, (n, 8));
        let mut pieces = [piece("q", 10), piece("k", 4), piece("v", 4)];
        pieces[0].rows = 4..10;
        let found: Vec<(&str, Range<usize>)> = overlapping(&pieces, 5..11)
            .map(|(p, r)| (p.tensor.as_str(), r))
            .collect();
        assert_eq!(found, [("q", 5..6), ("k", 0..4), ("v", 0..1)]);
        assert_eq!(overlapping(&pieces, 14..14).count(), 0);
        assert!(!pieces[0].is_whole() && pieces[1].is_whole());
        assert_eq!(pieces[0].source_index(1, 2), [5, 2]);
        pieces[0].orientation = Orientation::InOut;
        assert_eq!(pieces[0].source_index(1, 2), [2, 5]);
    }
}
