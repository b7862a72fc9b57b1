//! 16 lanes in two 256-bit registers, lanes 0 to 7 and 8 to 15. Owns the token [`Avx2`] and the only function
//! compiled with AVX2. The lanes' meaning and the rounding of each operation are stated in [`Vector`]; this
//! page only names the instructions.

use super::{Kernel, LANES, Vector};
use crate::cpu::isa::IsaKind;
use std::arch::x86_64::*;

/// The proof that this machine has AVX2, FMA and F16C. Made only by [`Avx2::detect`].
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

/// Lanes 0 to 7 and lanes 8 to 15.
type Pair = (__m256, __m256);

impl Avx2 {
    /// The token, if the machine has the instructions.
    pub(crate) fn detect() -> Option<Avx2> {
        let found = is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c");
        found.then_some(Avx2(()))
    }
}

/// The kernel, compiled with AVX2.
///
/// # Safety
///
/// The machine has the instructions named in the attribute.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn compiled<K: Kernel>(token: Avx2, kernel: K) -> K::Output {
    kernel.run(token)
}

/// Instructions on registers only: no memory is touched, so the token alone makes them safe.
macro_rules! registers {
    ($token:ident, $instructions:expr) => {{
        let Avx2(()) = $token;
        // SAFETY: the token exists, so the machine has the instructions; they only read and write registers.
        unsafe { $instructions }
    }};
}

impl Vector for Avx2 {
    type F = Pair;

    const KIND: IsaKind = IsaKind::Avx2;

    #[inline]
    fn enter<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: the token exists, so the machine has every instruction set that `compiled` enables.
        unsafe { compiled(self, kernel) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Pair {
        let half = registers!(self, _mm256_set1_ps(value));
        (half, half)
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Pair {
        // SAFETY: `x` is 64 readable bytes, the loads need no alignment, the token proves the instruction.
        unsafe { (_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))) }
    }

    #[inline(always)]
    fn store(self, a: Pair, out: &mut [f32; LANES]) {
        // SAFETY: `out` is 64 writable bytes, the stores need no alignment, the token proves the instruction.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), a.0);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), a.1);
        }
    }

    #[inline(always)]
    fn add(self, a: Pair, b: Pair) -> Pair {
        registers!(self, (_mm256_add_ps(a.0, b.0), _mm256_add_ps(a.1, b.1)))
    }

    #[inline(always)]
    fn sub(self, a: Pair, b: Pair) -> Pair {
        registers!(self, (_mm256_sub_ps(a.0, b.0), _mm256_sub_ps(a.1, b.1)))
    }

    #[inline(always)]
    fn mul(self, a: Pair, b: Pair) -> Pair {
        registers!(self, (_mm256_mul_ps(a.0, b.0), _mm256_mul_ps(a.1, b.1)))
    }

    #[inline(always)]
    fn div(self, a: Pair, b: Pair) -> Pair {
        registers!(self, (_mm256_div_ps(a.0, b.0), _mm256_div_ps(a.1, b.1)))
    }

    #[inline(always)]
    fn mul_add(self, a: Pair, b: Pair, c: Pair) -> Pair {
        registers!(
            self,
            (_mm256_fmadd_ps(a.0, b.0, c.0), _mm256_fmadd_ps(a.1, b.1, c.1))
        )
    }

    #[inline(always)]
    fn times_power_of_two(self, a: Pair, n: Pair) -> Pair {
        (scale_half(self, a.0, n.0), scale_half(self, a.1, n.1))
    }

    #[inline(always)]
    fn min(self, a: Pair, b: Pair) -> Pair {
        registers!(self, (_mm256_min_ps(a.0, b.0), _mm256_min_ps(a.1, b.1)))
    }

    #[inline(always)]
    fn max(self, a: Pair, b: Pair) -> Pair {
        registers!(self, (_mm256_max_ps(a.0, b.0), _mm256_max_ps(a.1, b.1)))
    }

    #[inline(always)]
    fn round(self, a: Pair) -> Pair {
        registers!(
            self,
            (
                _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a.0),
                _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a.1),
            )
        )
    }

    #[inline(always)]
    fn max_magnitude(self, acc: Pair, a: Pair) -> Pair {
        registers!(self, {
            let mask = _mm256_set1_epi32(0x7fff_ffff);
            let low = _mm256_and_si256(_mm256_castps_si256(a.0), mask);
            let high = _mm256_and_si256(_mm256_castps_si256(a.1), mask);
            (
                _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(acc.0), low)),
                _mm256_castsi256_ps(_mm256_max_epu32(_mm256_castps_si256(acc.1), high)),
            )
        })
    }

    #[inline(always)]
    fn keep_first(self, a: Pair, n: usize) -> Pair {
        registers!(self, {
            let n = _mm256_set1_epi32(n.min(LANES) as i32);
            let low = _mm256_cmpgt_epi32(n, _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
            let high = _mm256_cmpgt_epi32(n, _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15));
            (
                _mm256_and_ps(a.0, _mm256_castsi256_ps(low)),
                _mm256_and_ps(a.1, _mm256_castsi256_ps(high)),
            )
        })
    }

    #[inline(always)]
    fn load_codes(self, codes: &[u8; LANES]) -> Pair {
        // SAFETY: `codes` is 16 readable bytes, the load needs no alignment, the token proves the instructions.
        unsafe {
            let bytes = _mm_loadu_si128(codes.as_ptr().cast());
            let high = _mm_unpackhi_epi64(bytes, bytes);
            (
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)),
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(high)),
            )
        }
    }

    #[inline(always)]
    fn store_codes(self, a: Pair, zero: i32, codes: &mut [u8; LANES]) {
        // SAFETY: `codes` is 16 writable bytes, the store needs no alignment, the token proves the instructions.
        unsafe {
            let zero = _mm256_set1_epi32(zero);
            let low = _mm256_add_epi32(_mm256_cvtps_epi32(a.0), zero);
            let high = _mm256_add_epi32(_mm256_cvtps_epi32(a.1), zero);
            let words = _mm256_packs_epi32(low, high);
            let bytes = _mm256_packus_epi16(words, words);
            let order = _mm256_setr_epi32(0, 4, 1, 5, 0, 4, 1, 5);
            let bytes = _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(bytes, order));
            _mm_storeu_si128(codes.as_mut_ptr().cast(), bytes);
        }
    }

    #[inline(always)]
    fn load_f32(self, bytes: &[u8; 4 * LANES]) -> Pair {
        // SAFETY: `bytes` is 64 readable bytes, the loads need no alignment, the token proves the instruction.
        unsafe {
            let at = bytes.as_ptr();
            (_mm256_loadu_ps(at.cast()), _mm256_loadu_ps(at.add(32).cast()))
        }
    }

    #[inline(always)]
    fn load_bf16(self, bytes: &[u8; 2 * LANES]) -> Pair {
        // SAFETY: `bytes` is 32 readable bytes, the loads need no alignment, the token proves the instructions.
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(bytes.as_ptr().cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(bytes.as_ptr().add(16).cast()));
            (
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            )
        }
    }

    #[inline(always)]
    fn lookup(self, words: u64, shifts: &[u32; LANES], table: Pair) -> Pair {
        let (first, second) = (&shifts[..8], &shifts[8..]);
        (
            lookup_half(self, words as u32, first, table),
            lookup_half(self, (words >> 32) as u32, second, table),
        )
    }

    #[inline(always)]
    fn windows(self, codes: Pair, q: usize) -> Pair {
        registers!(self, {
            let codes = _mm256_cvttps_epi32(if q < 2 { codes.0 } else { codes.1 });
            let from = _mm256_set1_epi32(4 * (q as i32 & 1));
            let low = _mm256_add_epi32(from, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
            let high = _mm256_add_epi32(from, _mm256_setr_epi32(2, 2, 2, 2, 3, 3, 3, 3));
            let shifts = _mm256_setr_epi32(9, 6, 3, 0, 9, 6, 3, 0);
            let mask = _mm256_set1_epi32(63);
            let low = _mm256_srlv_epi32(_mm256_permutevar8x32_epi32(codes, low), shifts);
            let high = _mm256_srlv_epi32(_mm256_permutevar8x32_epi32(codes, high), shifts);
            let middle = _mm256_set1_ps(32.0);
            (
                _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_and_si256(low, mask)), middle),
                _mm256_sub_ps(_mm256_cvtepi32_ps(_mm256_and_si256(high, mask)), middle),
            )
        })
    }

    #[inline(always)]
    fn transpose(self, a: &[Pair; LANES]) -> [Pair; LANES] {
        let mut out = *a;
        let top_left = eight_by_eight(self, std::array::from_fn(|i| a[i].0));
        let top_right = eight_by_eight(self, std::array::from_fn(|i| a[i].1));
        let bottom_left = eight_by_eight(self, std::array::from_fn(|i| a[i + 8].0));
        let bottom_right = eight_by_eight(self, std::array::from_fn(|i| a[i + 8].1));
        for i in 0..8 {
            out[i] = (top_left[i], bottom_left[i]);
            out[i + 8] = (top_right[i], bottom_right[i]);
        }
        out
    }

    #[inline(always)]
    fn load_f16(self, bytes: &[u8; 2 * LANES]) -> Pair {
        // SAFETY: `bytes` is 32 readable bytes, the loads need no alignment, the token proves the instructions.
        unsafe {
            let low = _mm_loadu_si128(bytes.as_ptr().cast());
            let high = _mm_loadu_si128(bytes.as_ptr().add(16).cast());
            (_mm256_cvtph_ps(low), _mm256_cvtph_ps(high))
        }
    }

    #[inline(always)]
    fn store_f16(self, a: Pair, bytes: &mut [u8; 2 * LANES]) {
        // SAFETY: `bytes` is 32 writable bytes, the stores need no alignment, the token proves the instructions.
        unsafe {
            let low = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a.0);
            let high = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(a.1);
            _mm_storeu_si128(bytes.as_mut_ptr().cast(), low);
            _mm_storeu_si128(bytes.as_mut_ptr().add(16).cast(), high);
        }
    }

    #[inline(always)]
    fn sum_each(self, a: &[Pair; LANES]) -> Pair {
        (eight_sums(self, a, 0), eight_sums(self, a, 8))
    }
}

/// Eight lanes times two powers of two whose exponents add up to n.
#[inline(always)]
fn scale_half(token: Avx2, a: __m256, n: __m256) -> __m256 {
    registers!(token, {
        let n = _mm256_cvtps_epi32(n);
        let half = _mm256_srai_epi32::<1>(n);
        let bias = _mm256_set1_epi32(127);
        let first = _mm256_slli_epi32::<23>(_mm256_add_epi32(half, bias));
        let second = _mm256_slli_epi32::<23>(_mm256_add_epi32(_mm256_sub_epi32(n, half), bias));
        let a = _mm256_mul_ps(a, _mm256_castsi256_ps(first));
        _mm256_mul_ps(a, _mm256_castsi256_ps(second))
    })
}

/// Eight lanes of a table of sixteen, chosen by four bits of `word` at each shift.
#[inline(always)]
fn lookup_half(token: Avx2, word: u32, shifts: &[u32], table: Pair) -> __m256 {
    let shifts: &[u32; 8] = shifts.first_chunk().expect("eight shifts");
    let Avx2(()) = token;
    // SAFETY: `shifts` is 32 readable bytes, the load needs no alignment, the token proves the instructions.
    unsafe {
        let shifts = _mm256_loadu_si256(shifts.as_ptr().cast());
        let index = _mm256_srlv_epi32(_mm256_set1_epi32(word as i32), shifts);
        let low = _mm256_permutevar8x32_ps(table.0, index);
        let high = _mm256_permutevar8x32_ps(table.1, index);
        // Bit 3 of the index becomes the sign that the blend looks at.
        _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32::<28>(index)))
    }
}

/// The transpose of eight rows of eight.
#[inline(always)]
fn eight_by_eight(token: Avx2, a: [__m256; 8]) -> [__m256; 8] {
    registers!(token, {
        let mut pairs = a;
        for i in 0..4 {
            pairs[2 * i] = _mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]);
            pairs[2 * i + 1] = _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]);
        }
        let mut fours = a;
        for i in 0..2 {
            fours[4 * i] = _mm256_shuffle_ps::<0x44>(pairs[4 * i], pairs[4 * i + 2]);
            fours[4 * i + 1] = _mm256_shuffle_ps::<0xee>(pairs[4 * i], pairs[4 * i + 2]);
            fours[4 * i + 2] = _mm256_shuffle_ps::<0x44>(pairs[4 * i + 1], pairs[4 * i + 3]);
            fours[4 * i + 3] = _mm256_shuffle_ps::<0xee>(pairs[4 * i + 1], pairs[4 * i + 3]);
        }
        let mut out = a;
        for i in 0..4 {
            out[i] = _mm256_permute2f128_ps::<0x20>(fours[i], fours[i + 4]);
            out[i + 4] = _mm256_permute2f128_ps::<0x31>(fours[i], fours[i + 4]);
        }
        out
    })
}

/// The sums of the eight vectors from `a[first]` on.
#[inline(always)]
fn eight_sums(token: Avx2, a: &[Pair; LANES], first: usize) -> __m256 {
    let left = two_then_two(
        token,
        two_blocks(token, a[first], a[first + 4]),
        two_blocks(token, a[first + 1], a[first + 5]),
    );
    let right = two_then_two(
        token,
        two_blocks(token, a[first + 2], a[first + 6]),
        two_blocks(token, a[first + 3], a[first + 7]),
    );
    registers!(
        token,
        _mm256_add_ps(
            _mm256_shuffle_ps::<0x88>(left, right),
            _mm256_shuffle_ps::<0xdd>(left, right)
        )
    )
}

/// The first two levels of the tree for two vectors: the lower four lanes belong to `a`, the others to `b`.
#[inline(always)]
fn two_blocks(token: Avx2, a: Pair, b: Pair) -> __m256 {
    registers!(token, {
        let a = _mm256_add_ps(a.0, a.1);
        let b = _mm256_add_ps(b.0, b.1);
        _mm256_add_ps(
            _mm256_permute2f128_ps::<0x20>(a, b),
            _mm256_permute2f128_ps::<0x31>(a, b),
        )
    })
}

/// In each block of four lanes, lane i plus lane i + 2: of `a` in the first two lanes, of `b` in the others.
#[inline(always)]
fn two_then_two(token: Avx2, a: __m256, b: __m256) -> __m256 {
    registers!(
        token,
        _mm256_add_ps(_mm256_shuffle_ps::<0x44>(a, b), _mm256_shuffle_ps::<0xee>(a, b))
    )
}
