//! What becomes of one tensor: steps along its columns and steps along its rows, in f64, rounded once at the end.
//! A vector of length L is a matrix of one row of L columns.

use std::ops::Range;
use std::sync::Arc;

use qtool_kernels::Orthogonal;

/// One change along an axis.
#[derive(Debug, Clone)]
pub enum Step {
    /// The element at i times `0[i]`; as long as the axis.
    Scale(Arc<[f64]>),
    /// The element at i becomes `0[i]`: a norm's gain that others absorbed.
    Set(Arc<[f64]>),
    /// Vectors x along the axis become x Q, in consecutive blocks of the matrix's size that fill `range`.
    Rotate {
        /// Q.
        by: Arc<Orthogonal>,
        /// Places of the axis that take part.
        range: Range<usize>,
    },
}

impl Step {
    fn unit(&self) -> usize {
        match self {
            Self::Scale(_) | Self::Set(_) => 1,
            Self::Rotate { by, .. } => by.len(),
        }
    }
}

/// See the module's text.
#[derive(Debug, Clone, Default)]
pub struct Folding {
    /// Along each row.
    pub columns: Vec<Step>,
    /// Along each column.
    pub rows: Vec<Step>,
}

impl Folding {
    /// Rows that mix with each other come in blocks of this many.
    pub fn row_unit(&self) -> usize {
        self.rows.iter().map(Step::unit).max().unwrap_or(1)
    }

    /// Columns that mix with each other come in blocks of this many.
    pub fn column_unit(&self) -> usize {
        self.columns.iter().map(Step::unit).max().unwrap_or(1)
    }

    /// Whether it is cheaper to go by blocks of columns than by blocks of rows.
    pub fn goes_by_columns(&self) -> bool {
        self.row_unit() > self.column_unit()
    }

    /// Applies all steps to a tile, the elements of `rows` and `columns` of the tensor, row-major. Blocks that mix
    /// must lie inside it as a whole.
    pub fn apply(&self, tile: &mut [f64], rows: &Range<usize>, columns: &Range<usize>) {
        let width = columns.len();
        debug_assert_eq!(tile.len(), rows.len() * width);
        if tile.is_empty() {
            return;
        }
        for step in &self.columns {
            match step {
                Step::Scale(by) => {
                    for row in tile.chunks_exact_mut(width) {
                        row.iter_mut()
                            .zip(&by[columns.clone()])
                            .for_each(|(x, s)| *x *= s);
                    }
                }
                Step::Set(to) => tile
                    .chunks_exact_mut(width)
                    .for_each(|row| row.copy_from_slice(&to[columns.clone()])),
                Step::Rotate { by, range } => {
                    let part = overlap(range, columns);
                    if part.len() == width {
                        by.rotate(tile, 1);
                    } else if !part.is_empty() {
                        tile.chunks_exact_mut(width)
                            .for_each(|row| by.rotate(&mut row[part.clone()], 1));
                    }
                }
            }
        }
        for step in &self.rows {
            match step {
                Step::Scale(by) => tile
                    .chunks_exact_mut(width)
                    .zip(&by[rows.clone()])
                    .for_each(|(row, s)| row.iter_mut().for_each(|x| *x *= s)),
                Step::Set(to) => tile
                    .chunks_exact_mut(width)
                    .zip(&to[rows.clone()])
                    .for_each(|(row, s)| row.fill(*s)),
                Step::Rotate { by, range } => {
                    let part = overlap(range, rows);
                    if !part.is_empty() {
                        by.rotate(&mut tile[part.start * width..part.end * width], width);
                    }
                }
            }
        }
    }
}

/// Places of `tile` that lie in `range`, counted within the tile.
fn overlap(range: &Range<usize>, tile: &Range<usize>) -> Range<usize> {
    let (from, to) = (range.start.max(tile.start), range.end.min(tile.end));
    from - tile.start..to.max(from) - tile.start
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tile_is_a_part_of_the_whole() {
        let head = Arc::new(Orthogonal::seeded(4, 1));
        let folding = Folding {
            columns: vec![
                Step::Scale((1..=6).map(f64::from).collect()),
                Step::Rotate {
                    by: Arc::new(Orthogonal::seeded(2, 2)),
                    range: 2..6,
                },
            ],
            rows: vec![
                Step::Rotate {
                    by: Arc::clone(&head),
                    range: 4..12,
                },
                Step::Scale((0..12).map(|i| 1.0 / f64::from(i + 1)).collect()),
            ],
        };
        assert_eq!((folding.row_unit(), folding.column_unit()), (4, 2));
        assert!(folding.goes_by_columns());
        let value = |n: usize, k: usize| (n * 7 + k * 3) as f64 % 5.0 - 2.0;
        let mut whole: Vec<f64> = (0..72).map(|at| value(at / 6, at % 6)).collect();
        folding.apply(&mut whole, &(0..12), &(0..6));
        // By hand: row 5, column 3 of the result.
        let small = Orthogonal::seeded(2, 2);
        let mixed = |n: usize| {
            (0..2)
                .map(|i| value(n, 2 + i) * (3 + i) as f64 * small.entry(i, 1))
                .sum::<f64>()
        };
        let expected = (0..4).map(|i| mixed(4 + i) * head.entry(i, 1)).sum::<f64>() / 6.0;
        assert!((whole[5 * 6 + 3] - expected).abs() < 1e-14);
        let mut tile: Vec<f64> = (8..12).flat_map(|n| (2..4).map(move |k| value(n, k))).collect();
        folding.apply(&mut tile, &(8..12), &(2..4));
        for (n, row) in tile.chunks_exact(2).enumerate() {
            assert_eq!(row, &whole[(8 + n) * 6 + 2..(8 + n) * 6 + 4]);
        }
    }
}
