//! What the inputs of a layer add up to, for calibration. Owns magnitudes and the diagonal; whole second moments are
//! [`super::gram`]'s.

use super::extent::first_non_finite;
use super::gram::gram;
use crate::backend::InputSums;

/// Sums that are being added up.
#[derive(Debug, Clone)]
pub struct CpuSums {
    sums: InputSums,
    full: bool,
}

impl CpuSums {
    /// Of no rows of `columns`.
    pub(super) fn new(columns: usize, full: bool) -> Self {
        let sums = InputSums {
            rows: 0,
            tops: vec![0.0; columns],
            moment: vec![0.0; if full { columns * columns } else { columns }],
            finite: true,
        };
        Self { sums, full }
    }

    /// Adds the rows of x (M, K), row after row.
    pub(super) fn add(&mut self, x: &[f32]) {
        let sums = &mut self.sums;
        let columns = sums.tops.len().max(1);
        sums.rows += (x.len() / columns) as u64;
        sums.finite &= first_non_finite(x).is_none();
        for row in x.chunks_exact(columns) {
            let tops = sums.tops.iter_mut().zip(row);
            tops.for_each(|(top, x)| *top = top.max(x.abs()));
        }
        if self.full {
            if !x.is_empty() {
                gram(x, columns, &mut sums.moment);
            }
            return;
        }
        for row in x.chunks_exact(columns) {
            let squares = sums.moment.iter_mut().zip(row);
            squares.for_each(|(sum, x)| *sum += f64::from(*x) * f64::from(*x));
        }
    }

    /// What was added up.
    pub(super) fn take(self) -> InputSums {
        self.sums
    }
}
