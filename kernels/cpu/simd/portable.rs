//! 16 lanes in an array, in plain Rust: the instruction set that every machine has. Contains no unsafe code.
//! The loops have constant length so that the compiler turns them into whatever vectors the target has; where
//! a library call would stop that (rounding, conversion), bit arithmetic with the same result is used.

use super::{Kernel, LANES, Vector};
use crate::cpu::isa::IsaKind;
use half::f16;

/// The token of the portable vectors; anyone may make one.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

/// 2^23: from here on every f32 is an integer, and below it adding and subtracting this rounds to one.
const TWO_23: f32 = 8_388_608.0;

/// 3 * 2^22: the sum with a number of magnitude up to 2^22 has unit spacing, so the addition rounds it to an
/// integer, which then stands in the lowest bits in two's complement.
const THREE_TWO_22: f32 = 12_582_912.0;

/// 2^112: moves the exponent of an f16 (bias 15) placed in an f32 (bias 127).
const TWO_112: f32 = f32::from_bits((112 + 127) << 23);

impl Vector for Portable {
    type F = [f32; LANES];

    const KIND: IsaKind = IsaKind::Portable;

    #[inline(always)]
    fn enter<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.run(self)
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        [value; LANES]
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        *x
    }

    #[inline(always)]
    fn store(self, a: Self::F, out: &mut [f32; LANES]) {
        *out = a;
    }

    #[inline(always)]
    fn add(self, mut a: Self::F, b: Self::F) -> Self::F {
        for i in 0..LANES {
            a[i] += b[i];
        }
        a
    }

    #[inline(always)]
    fn sub(self, mut a: Self::F, b: Self::F) -> Self::F {
        for i in 0..LANES {
            a[i] -= b[i];
        }
        a
    }

    #[inline(always)]
    fn mul(self, mut a: Self::F, b: Self::F) -> Self::F {
        for i in 0..LANES {
            a[i] *= b[i];
        }
        a
    }

    #[inline(always)]
    fn div(self, mut a: Self::F, b: Self::F) -> Self::F {
        for i in 0..LANES {
            a[i] /= b[i];
        }
        a
    }

    #[inline(always)]
    fn mul_add(self, mut a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        for i in 0..LANES {
            a[i] = a[i] * b[i] + c[i];
        }
        a
    }

    #[inline(always)]
    fn times_power_of_two(self, mut a: Self::F, n: Self::F) -> Self::F {
        for i in 0..LANES {
            let n = (n[i] + THREE_TWO_22).to_bits() as i32 - THREE_TWO_22.to_bits() as i32;
            let half = n >> 1;
            a[i] = a[i] * power_of_two(half) * power_of_two(n - half);
        }
        a
    }

    #[inline(always)]
    fn min(self, mut a: Self::F, b: Self::F) -> Self::F {
        for i in 0..LANES {
            a[i] = if a[i] < b[i] { a[i] } else { b[i] };
        }
        a
    }

    #[inline(always)]
    fn max(self, mut a: Self::F, b: Self::F) -> Self::F {
        for i in 0..LANES {
            a[i] = if a[i] > b[i] { a[i] } else { b[i] };
        }
        a
    }

    #[inline(always)]
    fn round(self, mut a: Self::F) -> Self::F {
        for lane in &mut a {
            *lane = round_lane(*lane);
        }
        a
    }

    #[inline(always)]
    fn max_magnitude(self, mut acc: Self::F, a: Self::F) -> Self::F {
        for i in 0..LANES {
            let (old, new) = (acc[i].to_bits(), a[i].to_bits() & 0x7fff_ffff);
            acc[i] = f32::from_bits(if new > old { new } else { old });
        }
        acc
    }

    #[inline(always)]
    fn keep_first(self, mut a: Self::F, n: usize) -> Self::F {
        for (i, lane) in a.iter_mut().enumerate() {
            *lane = if i < n { *lane } else { 0.0 };
        }
        a
    }

    #[inline(always)]
    fn load_codes(self, codes: &[u8; LANES]) -> Self::F {
        let mut a = [0.0; LANES];
        for i in 0..LANES {
            a[i] = f32::from(codes[i]);
        }
        a
    }

    #[inline(always)]
    fn store_codes(self, a: Self::F, zero: i32, codes: &mut [u8; LANES]) {
        for i in 0..LANES {
            codes[i] = (a[i] + THREE_TWO_22).to_bits().wrapping_add(zero as u32) as u8;
        }
    }

    #[inline(always)]
    fn load_f32(self, bytes: &[u8; 4 * LANES]) -> Self::F {
        let mut a = [0.0; LANES];
        for (a, bytes) in a.iter_mut().zip(bytes.as_chunks().0) {
            *a = f32::from_bits(u32::from_le_bytes(*bytes));
        }
        a
    }

    #[inline(always)]
    fn load_bf16(self, bytes: &[u8; 2 * LANES]) -> Self::F {
        let mut a = [0.0; LANES];
        for (a, bytes) in a.iter_mut().zip(bytes.as_chunks().0) {
            *a = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
        }
        a
    }

    #[inline(always)]
    fn lookup(self, words: u64, shifts: &[u32; LANES], table: Self::F) -> Self::F {
        let mut a = [0.0; LANES];
        for i in 0..LANES {
            let word = if i < LANES / 2 {
                words as u32
            } else {
                (words >> 32) as u32
            };
            a[i] = table[(word >> (shifts[i] & 31) & 15) as usize];
        }
        a
    }

    #[inline(always)]
    fn windows(self, codes: Self::F, q: usize) -> Self::F {
        let mut a = [0.0; LANES];
        for i in 0..4 {
            let code = codes[(4 * q + i) % LANES] as i32;
            for j in 0..4 {
                a[4 * i + j] = (((code >> (9 - 3 * j)) & 63) - 32) as f32;
            }
        }
        a
    }

    #[inline(always)]
    fn load_f16(self, bytes: &[u8; 2 * LANES]) -> Self::F {
        let mut a = [0.0; LANES];
        for i in 0..LANES {
            a[i] = widen_f16_lane(u16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]));
        }
        a
    }

    #[inline(always)]
    fn store_f16(self, a: Self::F, bytes: &mut [u8; 2 * LANES]) {
        for i in 0..LANES {
            let narrow = f16::from_f32_const(a[i]).to_bits().to_le_bytes();
            bytes[2 * i] = narrow[0];
            bytes[2 * i + 1] = narrow[1];
        }
    }
}

/// `f32::round_ties_even` without a call: the sum with 2^23 has unit spacing, so the addition itself rounds.
#[inline(always)]
fn round_lane(value: f32) -> f32 {
    let magnitude = value.abs();
    let rounded = (magnitude + TWO_23) - TWO_23;
    if magnitude < TWO_23 {
        rounded.copysign(value)
    } else {
        value
    }
}

/// 2^n for n of -126 to 127.
#[inline(always)]
fn power_of_two(n: i32) -> f32 {
    f32::from_bits(((n + 127) as u32) << 23)
}

/// One f16 as f32, exact; a signalling NaN becomes quiet.
#[inline(always)]
fn widen_f16_lane(bits: u16) -> f32 {
    let magnitude = u32::from(bits & 0x7fff) << 13;
    let finite = (f32::from_bits(magnitude) * TWO_112).to_bits();
    let quiet = if magnitude > 0x0f80_0000 { 0x0040_0000 } else { 0 };
    let special = 0x7f80_0000 | magnitude | quiet;
    let sign = u32::from(bits & 0x8000) << 16;
    f32::from_bits(sign | if magnitude < 0x0f80_0000 { finite } else { special })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_is_round_ties_even() {
        let mut checked = 0;
        let mut check = |value: f32| {
            assert_eq!(
                round_lane(value).to_bits(),
                value.round_ties_even().to_bits(),
                "{value}"
            );
            checked += 1;
        };
        for half in -40_000..40_000 {
            let tie = half as f32 / 2.0;
            check(tie);
            check(tie.next_up());
            check(tie.next_down());
        }
        for bits in (0..u32::MAX).step_by(65_521) {
            let value = f32::from_bits(bits);
            if !value.is_nan() {
                check(value);
            }
        }
        assert!(checked > 300_000);
        assert!(round_lane(f32::NAN).is_nan());
    }

    #[test]
    fn widening_f16_is_exact_for_all_values() {
        for bits in 0..=u16::MAX {
            let expected = f16::from_bits(bits).to_f32_const().to_bits();
            assert_eq!(widen_f16_lane(bits).to_bits(), expected, "{bits:#06x}");
        }
    }

    #[test]
    fn codes_survive_the_trip_through_lanes() {
        let mut checked = 0;
        for start in (0..=255u8).step_by(LANES) {
            let codes: [u8; LANES] = std::array::from_fn(|i| start + i as u8);
            let mut back = [0; LANES];
            let shifted = Portable.sub(Portable.load_codes(&codes), Portable.splat(100.25));
            Portable.store_codes(shifted, 100, &mut back);
            assert_eq!(codes, back);
            checked += 1;
        }
        assert_eq!(checked, 16);
    }
}
