//! How far values reach. Owns the largest magnitude, the smallest and largest value, per row or per group of
//! a row, and the search for values that are not finite. Turning an extent into a scale is not done here.
//!
//! Groups run along the row; there are `ceil(K / group)` of them and the last may be short.

use super::isa::Isa;
use super::simd::{Kernel, LANES, Vector};

/// The largest magnitude in `x`, 0 for an empty row.
///
/// Magnitudes are compared as bit patterns, where NaN > infinity > every finite number. So the result is
/// exact, and it is not finite exactly when some value is not finite: one test of the result replaces a
/// test of every value. A NaN result carries the largest NaN payload of the row, with the sign cleared.
pub fn absmax(isa: Isa, x: &[f32]) -> f32 {
    isa.run(AbsMax(x))
}

/// [`absmax`] of each group: `out[g]` covers `x[g * group..(g + 1) * group]`.
///
/// # Panics
///
/// If `group` is 0 or `out.len() != ceil(x.len() / group)`.
pub fn absmax_groups(isa: Isa, x: &[f32], group: usize, out: &mut [f32]) {
    assert_eq!(out.len(), x.len().div_ceil(group), "one result per group");
    isa.run(AbsMaxGroups(x, group, out));
}

/// The smallest and the largest value of `x`, exact. For finite rows: a NaN is passed over.
///
/// An empty row gives `(+infinity, -infinity)`, which leaves the other side of a merge unchanged. Where the
/// extreme is a zero and both zeros occur, its sign is unspecified but the same on every instruction set.
pub fn minmax(isa: Isa, x: &[f32]) -> (f32, f32) {
    isa.run(MinMax(x))
}

/// [`minmax`] of each group: `mins[g]` and `maxs[g]` cover `x[g * group..(g + 1) * group]`.
///
/// # Panics
///
/// If `group` is 0 or the lengths of `mins` and `maxs` are not `ceil(x.len() / group)`.
pub fn minmax_groups(isa: Isa, x: &[f32], group: usize, mins: &mut [f32], maxs: &mut [f32]) {
    assert_eq!(mins.len(), x.len().div_ceil(group), "one minimum per group");
    assert_eq!(maxs.len(), mins.len(), "one maximum per group");
    isa.run(MinMaxGroups(x, group, mins, maxs));
}

/// The index of the first NaN or infinity in `x`. Meant for the error message after [`absmax`] has told that
/// there is one; not vectorised.
pub fn first_non_finite(x: &[f32]) -> Option<usize> {
    x.iter().position(|value| !value.is_finite())
}

struct AbsMax<'a>(&'a [f32]);

impl Kernel for AbsMax<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<V: Vector>(self, v: V) -> f32 {
        absmax_of(v, self.0)
    }
}

struct AbsMaxGroups<'a>(&'a [f32], usize, &'a mut [f32]);

impl Kernel for AbsMaxGroups<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self, v: V) {
        for (group, out) in self.0.chunks(self.1).zip(self.2) {
            *out = absmax_of(v, group);
        }
    }
}

/// Four accumulators, so that four blocks are in flight; the order does not matter to a maximum.
#[inline(always)]
fn absmax_of<V: Vector>(v: V, x: &[f32]) -> f32 {
    let zero = v.splat(0.0);
    let mut acc = [zero; 4];
    let (blocks, tail) = x.as_chunks::<LANES>();
    let (fours, rest) = blocks.as_chunks::<4>();
    for four in fours {
        acc[0] = v.max_magnitude(acc[0], v.load(&four[0]));
        acc[1] = v.max_magnitude(acc[1], v.load(&four[1]));
        acc[2] = v.max_magnitude(acc[2], v.load(&four[2]));
        acc[3] = v.max_magnitude(acc[3], v.load(&four[3]));
    }
    for block in rest {
        acc[0] = v.max_magnitude(acc[0], v.load(block));
    }
    if !tail.is_empty() {
        acc[1] = v.max_magnitude(acc[1], v.load_partial(tail, 0.0));
    }
    let low = v.max_magnitude(acc[0], acc[1]);
    let high = v.max_magnitude(acc[2], acc[3]);
    v.largest_magnitude(v.max_magnitude(low, high))
}

struct MinMax<'a>(&'a [f32]);

impl Kernel for MinMax<'_> {
    type Output = (f32, f32);

    #[inline(always)]
    fn run<V: Vector>(self, v: V) -> (f32, f32) {
        minmax_of(v, self.0)
    }
}

struct MinMaxGroups<'a>(&'a [f32], usize, &'a mut [f32], &'a mut [f32]);

impl Kernel for MinMaxGroups<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self, v: V) {
        for ((group, min), max) in self.0.chunks(self.1).zip(self.2).zip(self.3) {
            (*min, *max) = minmax_of(v, group);
        }
    }
}

/// The accumulator is the second operand, which both instructions return when the first is NaN.
#[inline(always)]
fn minmax_of<V: Vector>(v: V, x: &[f32]) -> (f32, f32) {
    let mut min = [v.splat(f32::INFINITY); 2];
    let mut max = [v.splat(f32::NEG_INFINITY); 2];
    let (blocks, tail) = x.as_chunks::<LANES>();
    let (pairs, rest) = blocks.as_chunks::<2>();
    for pair in pairs {
        for i in 0..2 {
            let lanes = v.load(&pair[i]);
            min[i] = v.min(lanes, min[i]);
            max[i] = v.max(lanes, max[i]);
        }
    }
    for block in rest {
        let lanes = v.load(block);
        min[0] = v.min(lanes, min[0]);
        max[0] = v.max(lanes, max[0]);
    }
    if !tail.is_empty() {
        let lanes = v.load_partial(tail, f32::NAN);
        min[1] = v.min(lanes, min[1]);
        max[1] = v.max(lanes, max[1]);
    }
    let (mut mins, mut maxs) = ([0.0; LANES], [0.0; LANES]);
    v.store(v.min(min[0], min[1]), &mut mins);
    v.store(v.max(max[0], max[1]), &mut maxs);
    for width in [8, 4, 2, 1] {
        for i in 0..width {
            mins[i] = if mins[i] < mins[i + width] {
                mins[i]
            } else {
                mins[i + width]
            };
            maxs[i] = if maxs[i] > maxs[i + width] {
                maxs[i]
            } else {
                maxs[i + width]
            };
        }
    }
    (mins[0], maxs[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_values() {
        for isa in Isa::available() {
            assert_eq!(absmax(isa, &[1.0, -3.0, 2.0]), 3.0);
            assert_eq!(minmax(isa, &[1.0, -3.0, 2.0]), (-3.0, 2.0));
            assert_eq!(absmax(isa, &[]), 0.0);
            assert_eq!(minmax(isa, &[]), (f32::INFINITY, f32::NEG_INFINITY));
        }
        assert_eq!(first_non_finite(&[1.0, f32::INFINITY, f32::NAN]), Some(1));
        assert_eq!(first_non_finite(&[1.0]), None);
    }
}
