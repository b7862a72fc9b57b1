//! Transformed values derived a second time, for `qtool verify`: each matrix of a rotation written out entry by
//! entry from its formula and multiplied with as a dense matrix, everything in f64. Shares with the writer only
//! which steps a tensor goes through.
//!
//! Memory: the dense matrices (8 K^2 bytes for a residual stream of width K) and one tensor that writes to a rotated
//! stream, in f64, for each thread.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use qtool_kernels::Orthogonal;

use super::Transform;
use super::folding::{Folding, Step};

/// Rows derived together where rows do not mix.
const ROWS: usize = 64;

/// A matrix and its entries, row-major.
type Dense = (Arc<Orthogonal>, Arc<Vec<f64>>);

/// See the module's text.
pub struct Second {
    transform: Transform,
    dense: Mutex<Vec<Dense>>,
}

impl Second {
    /// For the values of this transformation.
    pub fn new(transform: Transform) -> Self {
        Self {
            transform,
            dense: Mutex::default(),
        }
    }

    /// What becomes of `source` where it is read as `target`.
    pub fn folding(&self, target: &str, source: &str) -> Option<&Folding> {
        self.transform.folding(target, source)
    }

    /// Transformed values of a block of rows that `row` lies in, of a tensor of `dims` whose original values `read`
    /// gives by row and column; of all rows with `whole`.
    pub fn block(
        &self,
        folding: &Folding,
        dims: (usize, usize),
        row: usize,
        whole: bool,
        read: &dyn Fn(usize, usize) -> f64,
    ) -> (Range<usize>, Vec<f64>) {
        let (n, k) = dims;
        let step = ROWS.next_multiple_of(folding.row_unit());
        let rows = if whole || folding.goes_by_columns() {
            0..n
        } else {
            row / step * step..n.min((row / step + 1) * step)
        };
        let mut values: Vec<f64> = rows
            .clone()
            .flat_map(|n| (0..k).map(move |k| (n, k)))
            .map(|(n, k)| read(n, k))
            .collect();
        for step in &folding.columns {
            match step {
                Step::Scale(by) => each(&mut values, k, |x, _, c| x * by[c]),
                Step::Set(to) => each(&mut values, k, |_, _, c| to[c]),
                Step::Rotate { by, range } => {
                    let q = self.entries(by);
                    for from in range.clone().step_by(by.len()) {
                        turn_columns(&mut values, k, from..from + by.len(), &q);
                    }
                }
            }
        }
        for step in &folding.rows {
            match step {
                Step::Scale(by) => each(&mut values, k, |x, r, _| x * by[rows.start + r]),
                Step::Set(to) => each(&mut values, k, |_, r, _| to[rows.start + r]),
                Step::Rotate { by, range } => {
                    let q = self.entries(by);
                    let blocks = range.clone().step_by(by.len());
                    for from in blocks.filter(|from| rows.contains(from)) {
                        let at = from - rows.start;
                        turn_rows(&mut values[at * k..(at + by.len()) * k], k, &q);
                    }
                }
            }
        }
        (rows, values)
    }

    /// All entries of a matrix, by its formula.
    fn entries(&self, of: &Arc<Orthogonal>) -> Arc<Vec<f64>> {
        let mut dense = self.dense.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, entries)) = dense.iter().find(|(q, _)| Arc::ptr_eq(q, of)) {
            return Arc::clone(entries);
        }
        let len = of.len();
        let entries: Vec<f64> = (0..len * len).map(|at| of.entry(at / len, at % len)).collect();
        let entries = Arc::new(entries);
        dense.push((Arc::clone(of), Arc::clone(&entries)));
        entries
    }
}

fn each(values: &mut [f64], k: usize, change: impl Fn(f64, usize, usize) -> f64) {
    for (at, value) in values.iter_mut().enumerate() {
        *value = change(*value, at / k, at % k);
    }
}

/// values[:, columns] times Q.
fn turn_columns(values: &mut [f64], k: usize, columns: Range<usize>, q: &[f64]) {
    let (rows, len) = (values.len() / k, columns.len());
    let part: Vec<f64> = values
        .chunks_exact(k)
        .flat_map(|row| row[columns.clone()].iter().copied())
        .collect();
    let mut image = vec![0f64; part.len()];
    matmul(
        MatMut::from_row_major_slice_mut(&mut image, rows, len),
        Accum::Replace,
        MatRef::from_row_major_slice(&part, rows, len),
        MatRef::from_row_major_slice(q, len, len),
        1.0,
        Par::Seq,
    );
    for (row, image) in values.chunks_exact_mut(k).zip(image.chunks_exact(len)) {
        row[columns.clone()].copy_from_slice(image);
    }
}

/// Q^T times values, whose rows are as many as Q's.
fn turn_rows(values: &mut [f64], k: usize, q: &[f64]) {
    let len = values.len() / k;
    let part = values.to_vec();
    matmul(
        MatMut::from_row_major_slice_mut(values, len, k),
        Accum::Replace,
        MatRef::from_row_major_slice(q, len, len).transpose(),
        MatRef::from_row_major_slice(&part, len, k),
        1.0,
        Par::Seq,
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use qtool_formats::artifact::transform::TransformRecord;
    use std::collections::HashMap;

    #[test]
    fn agrees_with_the_writers_way() {
        let rotate = |len, seed, range| Step::Rotate {
            by: Arc::new(Orthogonal::seeded(len, seed)),
            range,
        };
        let (n, k) = (96, 48);
        let scale = |len: usize| Step::Scale((0..len).map(|i| 0.5 + i as f64 / len as f64).collect());
        let cases = [
            (vec![scale(k), rotate(k, 1, 0..k)], vec![rotate(8, 2, 32..n)]),
            (vec![rotate(12, 3, 0..k)], vec![rotate(n, 4, 0..n), scale(n)]),
        ];
        let read = |n: usize, k: usize| ((n * 31 + k * 17) % 101) as f64 - 50.0;
        for (columns, rows) in cases {
            let folding = Folding { columns, rows };
            let mut expected: Vec<f64> = (0..n * k).map(|at| read(at / k, at % k)).collect();
            folding.apply(&mut expected, &(0..n), &(0..k));
            let second = Second::new(Transform {
                record: TransformRecord::default(),
                foldings: HashMap::new(),
                made: None,
                scales: None,
            });
            let mut row = 0;
            while row < n {
                let (rows, values) = second.block(&folding, (n, k), row, false, &read);
                assert!(rows.contains(&row));
                for (a, b) in values.iter().zip(&expected[rows.start * k..rows.end * k]) {
                    assert!((a - b).abs() < 1e-11, "{a} {b}");
                }
                row = rows.end;
            }
        }
    }
}
