//! A few rows of activations times a weight: what a model does for each new token. Owns the loop that decodes a
//! row of the weight once, in registers, and multiplies it with up to four rows of activations: each packed byte
//! is read from memory once, and no decoded weight is written back.
//!
//! Element 64 q + 16 b + i of a row is in lane i of accumulator b; the four accumulators are added in pairs, the
//! lanes in the fixed tree. AVX2 and AVX-512 give the same bits; the result of a row does not depend on the others.

use rayon::prelude::*;

use super::isa::{Isa, IsaKind};
use super::scratch;
use super::simd::view::{View, ViewMut};
use super::simd::{Kernel, LANES, Vector};
use super::weight::{CpuWeight, ForRows, QUAD, Row, Rows};

/// Rows of activations up to which a weight is multiplied here.
pub(super) const FEW: usize = 8;
/// Weights of a task, about.
const TASK: usize = 64 << 10;

/// out (M, N) = x (M, K) w (N, K)^T, M small.
pub(super) fn gemv(isa: Isa, x: View<'_>, w: &CpuWeight, out: ViewMut<'_>) {
    let rows = (TASK / w.k.max(1)).next_multiple_of(LANES);
    let padded = w.k.next_multiple_of(QUAD);
    scratch::with([x.rows() * padded], |[copy]| {
        pad(x, copy, padded);
        let copy = &*copy;
        out.column_tiles(rows)
            .into_par_iter()
            .enumerate()
            .for_each(|(task, mut out)| {
                w.with_rows(Dot {
                    isa,
                    x: copy,
                    k: w.k,
                    from: task * rows,
                    out: &mut out,
                });
            });
    });
}

/// Rows of x with zeros behind them, so that whatever stands behind a row of a weight counts nothing.
pub(super) fn pad(x: View<'_>, out: &mut [f32], padded: usize) {
    for (r, out) in out.chunks_exact_mut(padded.max(1)).enumerate() {
        let row = x.row(r);
        out[..row.len()].copy_from_slice(row);
        out[row.len()..].fill(0.0);
    }
}

struct Dot<'a, 'b> {
    isa: Isa,
    /// (M, K padded)
    x: &'a [f32],
    k: usize,
    from: usize,
    out: &'a mut ViewMut<'b>,
}

impl ForRows for Dot<'_, '_> {
    type Output = ();

    fn run<R: Rows>(self, rows: R) {
        self.isa.run(DotRows(self, rows));
    }
}

struct DotRows<'a, 'b, R>(Dot<'a, 'b>, R);

impl<R: Rows> Kernel for DotRows<'_, '_, R> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self, v: V) {
        let DotRows(d, rows) = self;
        dot_rows(v, d.x, d.k, rows, d.from, d.out);
    }
}

/// `out[m][n] = x[m] . row(from + n)` for all columns n of `out`. x is (M, K padded to quads).
#[inline(always)]
pub(super) fn dot_rows<V: Vector, R: Rows>(
    v: V,
    x: &[f32],
    k: usize,
    rows: R,
    from: usize,
    out: &mut ViewMut<'_>,
) {
    // As many rows of x as leave their accumulators in registers.
    let together = match V::KIND {
        IsaKind::Avx512 => 4,
        IsaKind::Avx2 => 2,
        IsaKind::Portable => 1,
    };
    let mut top = 0;
    while top < out.rows() {
        let left = (out.rows() - top).min(together);
        match left {
            4 => few::<V, R, 4>(v, x, k, rows, from, out, top),
            2 | 3 => few::<V, R, 2>(v, x, k, rows, from, out, top),
            _ => few::<V, R, 1>(v, x, k, rows, from, out, top),
        }
        top += if left == 3 { 2 } else { left };
    }
}

#[inline(always)]
fn few<V: Vector, R: Rows, const M: usize>(
    v: V,
    x: &[f32],
    k: usize,
    rows: R,
    from: usize,
    out: &mut ViewMut<'_>,
    top: usize,
) {
    let padded = k.next_multiple_of(QUAD);
    let xs: [&[[f32; QUAD]]; M] =
        std::array::from_fn(|m| x[(top + m) * padded..][..padded].as_chunks::<QUAD>().0);
    let full = k / QUAD;
    for n in (0..out.columns()).step_by(LANES) {
        let here = LANES.min(out.columns() - n);
        let mut sums = [[v.splat(0.0); LANES]; M];
        for r in 0..here {
            let row = rows.row(from + n + r);
            let mut acc = [[v.splat(0.0); 4]; M];
            for q in 0..full {
                step(v, row.quad::<V, true>(v, q), &xs, q, &mut acc);
            }
            if full * QUAD < k {
                step(v, row.quad::<V, false>(v, full), &xs, full, &mut acc);
            }
            for (sums, acc) in sums.iter_mut().zip(&acc) {
                sums[r] = v.add(v.add(acc[0], acc[1]), v.add(acc[2], acc[3]));
            }
        }
        for (m, sums) in sums.iter().enumerate() {
            let mut lanes = [0.0; LANES];
            v.store(v.sum_each(sums), &mut lanes);
            out.row(top + m)[n..n + here].copy_from_slice(&lanes[..here]);
        }
    }
}

#[inline(always)]
fn step<V: Vector, const M: usize>(
    v: V,
    w: [V::F; 4],
    xs: &[&[[f32; QUAD]]; M],
    q: usize,
    acc: &mut [[V::F; 4]; M],
) {
    for (x, acc) in xs.iter().zip(acc) {
        let (blocks, _) = x[q].as_chunks::<LANES>();
        for ((acc, w), x) in acc.iter_mut().zip(&w).zip(blocks) {
            *acc = v.mul_add(*w, v.load(x), *acc);
        }
    }
}
