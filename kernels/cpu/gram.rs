//! The second moment of activations, for calibration. Owns the order of its sums: products of a block of rows in
//! f32 by a matrix product, blocks in f64.

use faer::linalg::matmul::matmul;
use faer::{Accum, MatMut, MatRef, Par};
use rayon::prelude::*;

/// Rows of the moment that one task computes.
const TILE: usize = 64;
/// Rows of activations whose products are summed in f32.
const ROWS: usize = 512;

/// `moment` (K, K) += x^T x for x (M, K).
pub(super) fn gram(x: &[f32], k: usize, moment: &mut [f64]) {
    for block in x.chunks(ROWS * k) {
        let x = MatRef::from_row_major_slice(block, block.len() / k, k);
        moment
            .par_chunks_mut(TILE * k)
            .enumerate()
            .for_each(|(tile, moment)| {
                let (rows, from) = (moment.len() / k, tile * TILE);
                let width = k - from;
                let mut out = vec![0.0; rows * width];
                let target = MatMut::from_row_major_slice_mut(&mut out, rows, width);
                let left = x.subcols(from, rows).transpose();
                let right = x.subcols(from, width);
                matmul(target, Accum::Replace, left, right, 1.0f32, Par::Seq);
                for (moment, out) in moment.chunks_exact_mut(k).zip(out.chunks_exact(width)) {
                    moment[from..]
                        .iter_mut()
                        .zip(out)
                        .for_each(|(m, o)| *m += f64::from(*o));
                }
            });
    }
    for i in 0..k {
        for j in 0..i {
            moment[i * k + j] = moment[j * k + i];
        }
    }
}
