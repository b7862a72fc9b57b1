//! Vectors of exactly 16 f32 lanes, three times: [`portable`], `avx2`, `avx512`. Owns the [`Vector`] trait
//! over which all loops are written, and is the only place in the package with unsafe code.
//!
//! A value of a type that implements [`Vector`] is a token: it can be made only where the machine was seen to
//! have the instructions, so calling its methods is safe. A loop is a [`Kernel`]; [`Vector::enter`] calls it
//! inside a function compiled with the instruction set enabled, and everything below it is inlined there.
//! For that reason each function between `enter` and an instruction is `#[inline(always)]`, and vectors are
//! never captured by closures.

#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub(crate) mod dot16;
pub(crate) mod portable;
pub(crate) mod tile;
pub(crate) mod view;

use super::isa::IsaKind;

/// Lanes of a vector, on every instruction set.
pub(crate) const LANES: usize = 16;

/// A loop that can be compiled for any instruction set.
pub(crate) trait Kernel {
    /// What the loop returns.
    type Output;

    /// Runs the loop. Implementations are `#[inline(always)]`.
    fn run<V: Vector>(self, v: V) -> Self::Output;
}

/// The token of an instruction set and what it can do with 16 lanes.
///
/// Each operation rounds by itself, to nearest, ties to even, and gives the same bits on every instruction set;
/// the one exception is [`mul_add`](Vector::mul_add), which only the forward pass of models uses. Lanes do not
/// influence each other except in sums, [`lookup`](Vector::lookup), [`windows`](Vector::windows) and
/// [`transpose`](Vector::transpose).
pub(crate) trait Vector: Copy {
    /// 16 lanes of f32.
    type F: Copy;

    /// Which instruction set this is.
    const KIND: IsaKind;

    /// Runs a kernel in a function compiled for this instruction set.
    fn enter<K: Kernel>(self, kernel: K) -> K::Output;

    /// The same value in all lanes.
    fn splat(self, value: f32) -> Self::F;

    /// Lane i is `x[i]`; no alignment is needed.
    fn load(self, x: &[f32; LANES]) -> Self::F;

    /// `out[i]` is lane i.
    fn store(self, a: Self::F, out: &mut [f32; LANES]);

    /// `a + b`.
    fn add(self, a: Self::F, b: Self::F) -> Self::F;

    /// `a - b`.
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;

    /// `a * b`.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;

    /// `a / b`.
    fn div(self, a: Self::F, b: Self::F) -> Self::F;

    /// `a * b + c`: rounded once on AVX2 and AVX-512, twice on the portable vectors.
    fn mul_add(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;

    /// `a * 2^n` for whole n of -252 to 254, rounded once: overflow gives infinity, underflow a subnormal number
    /// or zero. `a` is 0, NaN, or has a magnitude of 1/2 to 2.
    fn times_power_of_two(self, a: Self::F, n: Self::F) -> Self::F;

    /// `if a < b { a } else { b }`: b when either is NaN or both are zeros.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;

    /// `if a > b { a } else { b }`: b when either is NaN or both are zeros.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;

    /// The nearest integer, ties to even; infinities and NaN stay.
    fn round(self, a: Self::F) -> Self::F;

    /// The larger of `acc` and the magnitude of `a`, compared as bit patterns, so that NaN > infinity > all
    /// finite. `acc` has no sign bits.
    fn max_magnitude(self, acc: Self::F, a: Self::F) -> Self::F;

    /// Lanes below `n` stay, the others become +0.
    fn keep_first(self, a: Self::F, n: usize) -> Self::F;

    /// Lane i is the integer `codes[i]`.
    fn load_codes(self, codes: &[u8; LANES]) -> Self::F;

    /// `codes[i]` is lane i rounded to the nearest integer, ties to even, plus `zero`. Lanes have a magnitude
    /// up to 2^22 and the sum is in 0..=255; any other value gives an unspecified byte.
    fn store_codes(self, a: Self::F, zero: i32, codes: &mut [u8; LANES]);

    /// 16 little-endian f32 numbers, bit for bit.
    fn load_f32(self, bytes: &[u8; 4 * LANES]) -> Self::F;

    /// 16 little-endian BF16 numbers, exact.
    fn load_bf16(self, bytes: &[u8; 2 * LANES]) -> Self::F;

    /// Lane i is lane `(word >> shifts[i]) mod 16` of the table; the word is the lower half of `words` for the first
    /// eight lanes and the upper half for the others. Shifts are below 32.
    fn lookup(self, words: u64, shifts: &[u32; LANES], table: Self::F) -> Self::F;

    /// Of the whole parts of lanes 4q to 4q + 3, 15 bits each, the four windows of WINT2 minus 32: lane 4i + j
    /// is `((code[4q + i] >> (9 - 3j)) & 63) - 32`. Lanes are in 0..2^15, q is below 4.
    fn windows(self, codes: Self::F, q: usize) -> Self::F;

    /// Lane j of vector i becomes lane i of vector j.
    #[inline(always)]
    fn transpose(self, a: &[Self::F; LANES]) -> [Self::F; LANES] {
        let mut rows = [[0.0; LANES]; LANES];
        for (row, &lanes) in rows.iter_mut().zip(a) {
            self.store(lanes, row);
        }
        let mut out = *a;
        for (j, out) in out.iter_mut().enumerate() {
            let mut column = [0.0; LANES];
            for (lane, row) in column.iter_mut().zip(&rows) {
                *lane = row[j];
            }
            *out = self.load(&column);
        }
        out
    }

    /// 16 little-endian f16 numbers; a signalling NaN becomes quiet.
    fn load_f16(self, bytes: &[u8; 2 * LANES]) -> Self::F;

    /// 16 little-endian f16 numbers, nearest, ties to even, overflow to infinity; NaN becomes a quiet NaN.
    fn store_f16(self, a: Self::F, bytes: &mut [u8; 2 * LANES]);

    /// The sum of the lanes in the fixed tree: i + (i + 8), then i + (i + 4), i + (i + 2), i + (i + 1).
    #[inline(always)]
    fn sum(self, a: Self::F) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(a, &mut lanes);
        sum_tree(&mut lanes)
    }

    /// Lane i of the result is [`sum`](Vector::sum) of `a[i]`, bit for bit.
    #[inline(always)]
    fn sum_each(self, a: &[Self::F; LANES]) -> Self::F {
        let mut sums = [0.0; LANES];
        for (sum, &lanes) in sums.iter_mut().zip(a) {
            *sum = self.sum(lanes);
        }
        self.load(&sums)
    }

    /// The largest magnitude over all lanes of a vector made by [`max_magnitude`](Vector::max_magnitude).
    #[inline(always)]
    fn largest_magnitude(self, a: Self::F) -> f32 {
        let mut lanes = [0.0; LANES];
        self.store(a, &mut lanes);
        let mut largest = 0;
        for lane in lanes {
            largest = lane.to_bits().max(largest);
        }
        f32::from_bits(largest)
    }

    /// Fewer than 16 values: lane i is `x[i]`, the lanes behind them are `fill`.
    #[inline(always)]
    fn load_partial(self, x: &[f32], fill: f32) -> Self::F {
        let mut lanes = [fill; LANES];
        lanes[..x.len()].copy_from_slice(x);
        self.load(&lanes)
    }
}

/// The fixed tree over 16 lanes; leaves partial sums behind.
#[inline(always)]
fn sum_tree(lanes: &mut [f32; LANES]) -> f32 {
    for i in 0..8 {
        lanes[i] += lanes[i + 8];
    }
    for i in 0..4 {
        lanes[i] += lanes[i + 4];
    }
    for i in 0..2 {
        lanes[i] += lanes[i + 2];
    }
    lanes[0] + lanes[1]
}
