//! Values to codes. Owns the one rounding of quantization, for a row with one scale or with one per group;
//! which scale and zero point to use is decided elsewhere.
//!
//! ```text
//! code[k] = clamp(rne(x[k] * inv_scale) + zero, lo, hi)
//! ```
//!
//! The product rounds once in f32, `rne` is to nearest with ties to even, and the clamp happens in f32 before
//! the conversion to a byte, so that values of any size are safe. NaN (also 0 times infinity) gives `lo`.
//!
//! As the zero and the limits are integers, the loop may clamp the product to `lo - zero..=hi - zero` first and
//! round and add the zero in the conversion; the code is the same, exactly.

use super::isa::Isa;
use super::simd::{Kernel, LANES, Vector};

/// Codes of a row under one scale: `codes[k] = clamp(rne(x[k] * inv_scale) + zero, lo, hi)`.
///
/// `zero` is the code of 0.0, of magnitude up to 2^22. Where `lo > hi` the result is `hi`.
///
/// # Panics
///
/// If `codes.len() != x.len()`.
pub fn round_codes(isa: Isa, x: &[f32], inv_scale: f32, zero: i32, lo: u8, hi: u8, codes: &mut [u8]) {
    assert_eq!(codes.len(), x.len(), "one code per value");
    isa.run(RoundCodes {
        x,
        inv_scale,
        zero,
        lo,
        hi,
        codes,
    });
}

/// Codes of a row in groups: value k uses `inv_scales[k / group]` and `zeros[k / group]`.
///
/// `zeros` hold integers of magnitude up to 2^22. The last group may be short.
///
/// # Panics
///
/// If `group` is 0, `codes.len() != x.len()`, or `inv_scales` and `zeros` do not have
/// `ceil(x.len() / group)` entries.
pub fn round_codes_groups(
    isa: Isa,
    x: &[f32],
    group: usize,
    inv_scales: &[f32],
    zeros: &[f32],
    (lo, hi): (u8, u8),
    codes: &mut [u8],
) {
    assert_eq!(codes.len(), x.len(), "one code per value");
    assert_eq!(
        inv_scales.len(),
        x.len().div_ceil(group),
        "one inverse scale per group"
    );
    assert_eq!(zeros.len(), inv_scales.len(), "one zero per group");
    isa.run(RoundGroups {
        x,
        group,
        inv_scales,
        zeros,
        lo,
        hi,
        codes,
    });
}

struct RoundCodes<'a> {
    x: &'a [f32],
    inv_scale: f32,
    zero: i32,
    lo: u8,
    hi: u8,
    codes: &'a mut [u8],
}

impl Kernel for RoundCodes<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self, v: V) {
        round_group(
            v,
            self.x,
            self.inv_scale,
            self.zero,
            (self.lo, self.hi),
            self.codes,
        );
    }
}

struct RoundGroups<'a> {
    x: &'a [f32],
    group: usize,
    inv_scales: &'a [f32],
    zeros: &'a [f32],
    lo: u8,
    hi: u8,
    codes: &'a mut [u8],
}

impl Kernel for RoundGroups<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self, v: V) {
        let groups = self.x.chunks(self.group).zip(self.codes.chunks_mut(self.group));
        for ((x, codes), (&inv_scale, &zero)) in groups.zip(self.inv_scales.iter().zip(self.zeros)) {
            round_group(v, x, inv_scale, zero as i32, (self.lo, self.hi), codes);
        }
    }
}

/// One run of values that share a scale and a zero.
#[inline(always)]
fn round_group<V: Vector>(v: V, x: &[f32], inv_scale: f32, zero: i32, (lo, hi): (u8, u8), codes: &mut [u8]) {
    let inv_scale = v.splat(inv_scale);
    let lo = v.splat((i32::from(lo) - zero) as f32);
    let hi = v.splat((i32::from(hi) - zero) as f32);
    let (blocks, tail) = x.as_chunks::<LANES>();
    let (outs, out_tail) = codes.as_chunks_mut::<LANES>();
    for (block, out) in blocks.iter().zip(outs) {
        let steps = v.min(v.max(v.mul(v.load(block), inv_scale), lo), hi);
        v.store_codes(steps, zero, out);
    }
    if !tail.is_empty() {
        let steps = v.min(v.max(v.mul(v.load_partial(tail, 0.0), inv_scale), lo), hi);
        let mut out = [0; LANES];
        v.store_codes(steps, zero, &mut out);
        out_tail.copy_from_slice(&out[..out_tail.len()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ties_go_to_even_and_extremes_to_the_limits() {
        let x = [0.5, 1.5, -0.5, -1.5, 1e38, -1e38, f32::NAN, f32::INFINITY];
        for isa in Isa::available() {
            let mut codes = [0; 8];
            round_codes(isa, &x, 1.0, 8, 1, 15, &mut codes);
            assert_eq!(codes, [8, 10, 8, 6, 15, 1, 1, 15]);
        }
    }
}
