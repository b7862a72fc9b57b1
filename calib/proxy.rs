//! The proxy error of a quantized weight: which share of its layer's output is error, on the calibration data.
//!
//! ```text
//! tr(E H E^T) / tr(W H W^T)      E = W - decoded, H the second moment of the inputs, undamped
//! ```
//!
//! With only a diagonal known, H is that diagonal. Sums over blocks of rows add up in f64.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use qtool_formats::QuantizedWeight;

use crate::stats::LayerStats;

/// A second moment, ready to price errors.
#[derive(Debug, Clone)]
pub struct Proxy {
    k: usize,
    moment: Moment,
}

#[derive(Debug, Clone)]
enum Moment {
    Diagonal(Vec<f32>),
    Full(Vec<f32>),
}

impl Proxy {
    /// From statistics.
    pub fn new(stats: &LayerStats) -> Self {
        let moment = match stats.hessian() {
            Some(h) => Moment::Full(h.iter().map(|&h| h as f32).collect()),
            None => Moment::Diagonal(stats.importance()),
        };
        Self {
            k: stats.columns(),
            moment,
        }
    }

    /// (tr(E H E^T), tr(W H W^T)) of `rows` (n, K) and their codes.
    ///
    /// # Panics
    ///
    /// When the weight is of another shape.
    pub fn sums(&self, rows: &[f32], weight: &QuantizedWeight) -> (f64, f64) {
        (self.energy(&self.errors(rows, weight)), self.energy(rows))
    }

    /// e H e^T of every row and its codes, (n).
    ///
    /// # Panics
    ///
    /// When the weight is of another shape.
    pub fn row_errors(&self, rows: &[f32], weight: &QuantizedWeight) -> Vec<f64> {
        self.energies(&self.errors(rows, weight))
    }

    /// (e H e^T, w H w^T) of each of `rows` (n, K) and its codes.
    ///
    /// # Panics
    ///
    /// When the weight is of another shape.
    pub fn row_sums(&self, rows: &[f32], weight: &QuantizedWeight) -> Vec<(f64, f64)> {
        let of_errors = self.row_errors(rows, weight);
        of_errors.into_iter().zip(self.energies(rows)).collect()
    }

    /// Rows less their decoded codes.
    fn errors(&self, rows: &[f32], weight: &QuantizedWeight) -> Vec<f32> {
        assert_eq!(weight.dims(), (rows.len() / self.k, self.k), "dimensions");
        let mut errors = rows.to_vec();
        let mut decoded = vec![0f32; self.k];
        for (n, row) in errors.chunks_exact_mut(self.k).enumerate() {
            weight.dequantize_row(n, &mut decoded);
            row.iter_mut().zip(&decoded).for_each(|(e, d)| *e -= d);
        }
        errors
    }

    /// tr(X H X^T).
    fn energy(&self, x: &[f32]) -> f64 {
        self.energies(x).iter().sum()
    }

    /// x H x^T of each row of x (n, K): the mean square, over the calibration rows, of what it gives.
    pub fn energies(&self, x: &[f32]) -> Vec<f64> {
        let (k, n) = (self.k, x.len() / self.k);
        let dot = |x: &[f32], y: &[f32]| {
            let products = x.iter().zip(y).map(|(x, y)| f64::from(*x) * f64::from(*y));
            products.sum::<f64>()
        };
        match &self.moment {
            Moment::Diagonal(d) => {
                let square = |x: &[f32]| {
                    let terms = x.iter().zip(d).map(|(x, d)| f64::from(x * x) * f64::from(*d));
                    terms.sum::<f64>()
                };
                x.chunks_exact(k).map(square).collect()
            }
            Moment::Full(h) => {
                let mut image = vec![0f32; x.len()];
                let target = MatMut::from_row_major_slice_mut(&mut image, n, k);
                let (left, right) = (
                    MatRef::from_row_major_slice(x, n, k),
                    MatRef::from_row_major_slice(h, k, k),
                );
                matmul(target, Accum::Replace, left, right, 1.0, Par::Seq);
                let pairs = x.chunks_exact(k).zip(image.chunks_exact(k));
                pairs.map(|(x, y)| dot(x, y)).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hessian::tests::of_rows;
    use qtool_formats::scheme::AffineScheme;
    use qtool_formats::weight::AffineWeight;

    #[test]
    fn sums_by_hand() {
        let scheme = AffineScheme::parse("w8-sym-row-f32").unwrap();
        let weight = AffineWeight::new(scheme, 1, 2, vec![129, 130], vec![1.0], vec![]).unwrap();
        let stats = of_rows(&[1.0, 1.0, 1.0, -3.0], 2);
        // H = [[1, -1], [-1, 5]]; W = (1.5, 2), decoded (1, 2), E = (0.5, 0).
        let (error, energy) = Proxy::new(&stats).sums(&[1.5, 2.0], &QuantizedWeight::Affine(weight));
        assert_eq!((error, energy), (0.25, 2.25 - 6.0 + 20.0));
    }
}
