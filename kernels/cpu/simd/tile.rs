//! The innermost loop of matrix products: a small tile of the result held in registers while rows of activations
//! meet a panel of weights. Owns the tile and its sizes per instruction set.
//!
//! ```text
//!                 W panel    k = 0 .. K
//!                 [ 16 NV columns ]
//! x   MR rows     [ MR x 16 NV: one accumulator per element ]      out[r][c] += x[r][k] * w[k][c], k rising
//! ```
//!
//! Each element is one chain of [`Vector::mul_add`] over k, whatever the sizes of tiles, panels and blocks of k:
//! the result depends neither on how the work is cut nor on the other rows. AVX2 and AVX-512 give the same bits.

use super::view::{View, ViewMut};
use super::{LANES, Vector};
use crate::cpu::isa::IsaKind;

/// Columns of a panel on an instruction set: as many as leave registers for the rows of a tile.
pub(crate) fn panel_columns(isa: IsaKind) -> usize {
    match isa {
        IsaKind::Avx512 => 2 * LANES,
        IsaKind::Avx2 | IsaKind::Portable => LANES,
    }
}

/// Whether a product goes on from what stands in the result.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    /// From zero.
    Zero,
    /// From the result so far.
    Sum,
}

/// `out` (M, C) = or += x (M, K) times the panel `w` (K, C). C is at most [`panel_columns`].
///
/// # Panics
///
/// If the sizes disagree.
#[inline(always)]
pub(crate) fn multiply<V: Vector>(v: V, x: View<'_>, w: View<'_>, out: &mut ViewMut<'_>, start: Start) {
    assert_eq!((x.rows(), x.columns()), (out.rows(), w.rows()), "M and K");
    assert!(
        w.columns() == out.columns() && w.columns() <= panel_columns(V::KIND),
        "C"
    );
    match V::KIND {
        IsaKind::Avx512 if w.columns() > LANES => rows::<V, 12, 2>(v, x, w, out, start),
        IsaKind::Avx512 => rows::<V, 12, 1>(v, x, w, out, start),
        IsaKind::Avx2 => rows::<V, 6, 1>(v, x, w, out, start),
        IsaKind::Portable => rows::<V, 2, 1>(v, x, w, out, start),
    }
}

#[inline(always)]
fn rows<V: Vector, const MR: usize, const NV: usize>(
    v: V,
    x: View<'_>,
    w: View<'_>,
    out: &mut ViewMut<'_>,
    start: Start,
) {
    let mut top = 0;
    while top < x.rows() {
        let left = x.rows() - top;
        if w.columns() < NV * LANES {
            tile::<V, MR, NV, false>(v, x, w, out, start, top);
            top += MR;
        } else if left >= MR || left > MR / 2 {
            tile::<V, MR, NV, true>(v, x, w, out, start, top);
            top += MR;
        } else {
            // A few rows at the end: four at a time wastes less than a whole tile.
            tile::<V, 4, NV, true>(v, x, w, out, start, top);
            top += 4;
        }
    }
}

/// Rows `top..top + MR`; those beyond the last are computed from the last and thrown away. When not FULL, the
/// panel has fewer columns than the vectors, and they are read and written one by one.
#[inline(always)]
fn tile<V: Vector, const MR: usize, const NV: usize, const FULL: bool>(
    v: V,
    x: View<'_>,
    w: View<'_>,
    out: &mut ViewMut<'_>,
    start: Start,
    top: usize,
) {
    let count = MR.min(x.rows() - top);
    let mut sums = [[v.splat(0.0); NV]; MR];
    if start == Start::Sum {
        for (r, sums) in sums.iter_mut().enumerate().take(count) {
            let row = out.row(top + r);
            for (j, sum) in sums.iter_mut().enumerate() {
                // SAFETY: `rows` says FULL only for as many columns as NV vectors have lanes, and j is below NV.
                *sum = unsafe { read::<V, FULL>(v, row, j) };
            }
        }
    }
    let xs: [&[f32]; MR] = std::array::from_fn(|r| x.row(top + r.min(count - 1)));
    for k in 0..w.rows() {
        // SAFETY: k is below the rows of w.
        let row = unsafe { w.row_unchecked(k) };
        let mut columns = [v.splat(0.0); NV];
        for (j, column) in columns.iter_mut().enumerate() {
            // SAFETY: as above.
            *column = unsafe { read::<V, FULL>(v, row, j) };
        }
        for (x, sums) in xs.iter().zip(&mut sums) {
            // SAFETY: k is below K, which is the length of each row of x: `multiply` compared them.
            let x = v.splat(unsafe { *x.get_unchecked(k) });
            for (sum, column) in sums.iter_mut().zip(&columns) {
                *sum = v.mul_add(x, *column, *sum);
            }
        }
    }
    for (r, sums) in sums.iter().enumerate().take(count) {
        let row = out.row(top + r);
        for (j, &sum) in sums.iter().enumerate() {
            // SAFETY: as above.
            unsafe { write::<V, FULL>(v, row, j, sum) };
        }
    }
}

/// Vector j of a row.
///
/// # Safety
///
/// When FULL, the row has 16 numbers from 16 j on.
#[inline(always)]
unsafe fn read<V: Vector, const FULL: bool>(v: V, row: &[f32], j: usize) -> V::F {
    if FULL {
        // SAFETY: the caller has seen that 16 numbers from 16 j on exist.
        let lanes = unsafe { &*row.as_ptr().add(j * LANES).cast::<[f32; LANES]>() };
        return v.load(lanes);
    }
    let from = row.len().min(j * LANES);
    let part = &row[from..];
    v.load_partial(&part[..part.len().min(LANES)], 0.0)
}

/// The reverse of [`read`].
///
/// # Safety
///
/// As for [`read`].
#[inline(always)]
unsafe fn write<V: Vector, const FULL: bool>(v: V, row: &mut [f32], j: usize, a: V::F) {
    if FULL {
        // SAFETY: the caller has seen that 16 numbers from 16 j on exist.
        let lanes = unsafe { &mut *row.as_mut_ptr().add(j * LANES).cast::<[f32; LANES]>() };
        return v.store(a, lanes);
    }
    let from = row.len().min(j * LANES);
    let mut lanes = [0.0; LANES];
    v.store(a, &mut lanes);
    for (to, lane) in row[from..].iter_mut().zip(lanes) {
        *to = lane;
    }
}
