//! 16 lanes in one 512-bit register. Owns the token [`Avx512`] and the only function compiled with AVX-512.
//! The lanes' meaning and the rounding of each operation are stated in [`Vector`]; this page only names the
//! instructions.

use super::{Kernel, LANES, Vector};
use crate::cpu::isa::IsaKind;
use std::arch::x86_64::*;

/// The proof that this machine has AVX-512 F, BW, DQ, VL, AVX2 and FMA. Made only by [`Avx512::detect`].
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    /// The token, if the machine has the instructions.
    pub(crate) fn detect() -> Option<Avx512> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma");
        found.then_some(Avx512(()))
    }
}

/// The kernel, compiled with AVX-512.
///
/// # Safety
///
/// The machine has the instructions named in the attribute.
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
unsafe fn compiled<K: Kernel>(token: Avx512, kernel: K) -> K::Output {
    kernel.run(token)
}

/// Instructions on registers only: no memory is touched, so the token alone makes them safe.
macro_rules! registers {
    ($token:ident, $instructions:expr) => {{
        let Avx512(()) = $token;
        // SAFETY: the token exists, so the machine has the instructions; they only read and write registers.
        unsafe { $instructions }
    }};
}

impl Vector for Avx512 {
    type F = __m512;

    const KIND: IsaKind = IsaKind::Avx512;

    #[inline]
    fn enter<K: Kernel>(self, kernel: K) -> K::Output {
        // SAFETY: the token exists, so the machine has every instruction set that `compiled` enables.
        unsafe { compiled(self, kernel) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        registers!(self, _mm512_set1_ps(value))
    }

    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> __m512 {
        // SAFETY: `x` is 64 readable bytes, the load needs no alignment, the token proves the instruction.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }

    #[inline(always)]
    fn store(self, a: __m512, out: &mut [f32; LANES]) {
        // SAFETY: `out` is 64 writable bytes, the store needs no alignment, the token proves the instruction.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), a) }
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        registers!(self, _mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        registers!(self, _mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        registers!(self, _mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        registers!(self, _mm512_div_ps(a, b))
    }

    #[inline(always)]
    fn mul_add(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        registers!(self, _mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn times_power_of_two(self, a: __m512, n: __m512) -> __m512 {
        registers!(self, _mm512_scalef_ps(a, n))
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        registers!(self, _mm512_min_ps(a, b))
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        registers!(self, _mm512_max_ps(a, b))
    }

    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        registers!(
            self,
            _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a)
        )
    }

    #[inline(always)]
    fn max_magnitude(self, acc: __m512, a: __m512) -> __m512 {
        registers!(
            self,
            _mm512_castsi512_ps(_mm512_max_epu32(
                _mm512_castps_si512(acc),
                _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fff_ffff)),
            ))
        )
    }

    #[inline(always)]
    fn keep_first(self, a: __m512, n: usize) -> __m512 {
        let mask = ((1u32 << n.min(LANES)) - 1) as u16;
        registers!(self, _mm512_maskz_mov_ps(mask, a))
    }

    #[inline(always)]
    fn load_codes(self, codes: &[u8; LANES]) -> __m512 {
        // SAFETY: `codes` is 16 readable bytes, the load needs no alignment, the token proves the instructions.
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(codes.as_ptr().cast()))) }
    }

    #[inline(always)]
    fn store_codes(self, a: __m512, zero: i32, codes: &mut [u8; LANES]) {
        // SAFETY: `codes` is 16 writable bytes, the store needs no alignment, the token proves the instructions.
        unsafe {
            let steps = _mm512_add_epi32(_mm512_cvtps_epi32(a), _mm512_set1_epi32(zero));
            _mm_storeu_si128(codes.as_mut_ptr().cast(), _mm512_cvtepi32_epi8(steps));
        }
    }

    #[inline(always)]
    fn load_f32(self, bytes: &[u8; 4 * LANES]) -> __m512 {
        // SAFETY: `bytes` is 64 readable bytes, the load needs no alignment, the token proves the instruction.
        unsafe { _mm512_loadu_ps(bytes.as_ptr().cast()) }
    }

    #[inline(always)]
    fn load_bf16(self, bytes: &[u8; 2 * LANES]) -> __m512 {
        // SAFETY: `bytes` is 32 readable bytes, the load needs no alignment, the token proves the instructions.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(bytes.as_ptr().cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }

    #[inline(always)]
    fn lookup(self, words: u64, shifts: &[u32; LANES], table: __m512) -> __m512 {
        // SAFETY: `shifts` is 64 readable bytes, the load needs no alignment, the token proves the instructions.
        unsafe {
            let halves = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
            let words = _mm512_castsi128_si512(_mm_cvtsi64_si128(words as i64));
            let words = _mm512_permutexvar_epi32(halves, words);
            let index = _mm512_srlv_epi32(words, _mm512_loadu_si512(shifts.as_ptr().cast()));
            _mm512_permutexvar_ps(index, table)
        }
    }

    #[inline(always)]
    fn windows(self, codes: __m512, q: usize) -> __m512 {
        registers!(self, {
            let from = _mm512_set1_epi32(4 * q as i32);
            let lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
            let shifts = _mm512_setr_epi32(9, 6, 3, 0, 9, 6, 3, 0, 9, 6, 3, 0, 9, 6, 3, 0);
            let codes = _mm512_permutexvar_epi32(_mm512_add_epi32(from, lanes), _mm512_cvttps_epi32(codes));
            let windows = _mm512_and_si512(_mm512_srlv_epi32(codes, shifts), _mm512_set1_epi32(63));
            _mm512_sub_ps(_mm512_cvtepi32_ps(windows), _mm512_set1_ps(32.0))
        })
    }

    #[inline(always)]
    fn transpose(self, a: &[__m512; LANES]) -> [__m512; LANES] {
        registers!(self, {
            let mut pairs = *a;
            for i in 0..8 {
                pairs[2 * i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]);
                pairs[2 * i + 1] = _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
            }
            // Block b of vector 4i + c is column 4b + c of rows 4i to 4i + 3.
            let mut fours = *a;
            for i in 0..4 {
                fours[4 * i] = _mm512_shuffle_ps::<0x44>(pairs[4 * i], pairs[4 * i + 2]);
                fours[4 * i + 1] = _mm512_shuffle_ps::<0xee>(pairs[4 * i], pairs[4 * i + 2]);
                fours[4 * i + 2] = _mm512_shuffle_ps::<0x44>(pairs[4 * i + 1], pairs[4 * i + 3]);
                fours[4 * i + 3] = _mm512_shuffle_ps::<0xee>(pairs[4 * i + 1], pairs[4 * i + 3]);
            }
            let mut out = *a;
            for c in 0..4 {
                let top_even = _mm512_shuffle_f32x4::<0x88>(fours[c], fours[4 + c]);
                let top_odd = _mm512_shuffle_f32x4::<0xdd>(fours[c], fours[4 + c]);
                let bottom_even = _mm512_shuffle_f32x4::<0x88>(fours[8 + c], fours[12 + c]);
                let bottom_odd = _mm512_shuffle_f32x4::<0xdd>(fours[8 + c], fours[12 + c]);
                out[c] = _mm512_shuffle_f32x4::<0x88>(top_even, bottom_even);
                out[4 + c] = _mm512_shuffle_f32x4::<0x88>(top_odd, bottom_odd);
                out[8 + c] = _mm512_shuffle_f32x4::<0xdd>(top_even, bottom_even);
                out[12 + c] = _mm512_shuffle_f32x4::<0xdd>(top_odd, bottom_odd);
            }
            out
        })
    }

    #[inline(always)]
    fn load_f16(self, bytes: &[u8; 2 * LANES]) -> __m512 {
        // SAFETY: `bytes` is 32 readable bytes, the load needs no alignment, the token proves the instructions.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(bytes.as_ptr().cast())) }
    }

    #[inline(always)]
    fn store_f16(self, a: __m512, bytes: &mut [u8; 2 * LANES]) {
        // SAFETY: `bytes` is 32 writable bytes, the store needs no alignment, the token proves the instructions.
        unsafe {
            let narrow = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
            _mm256_storeu_si256(bytes.as_mut_ptr().cast(), narrow);
        }
    }

    #[inline(always)]
    fn sum_each(self, a: &[__m512; LANES]) -> __m512 {
        let columns = [
            four_blocks(self, a[0], a[4], a[8], a[12]),
            four_blocks(self, a[1], a[5], a[9], a[13]),
            four_blocks(self, a[2], a[6], a[10], a[14]),
            four_blocks(self, a[3], a[7], a[11], a[15]),
        ];
        let left = two_then_two(self, columns[0], columns[1]);
        let right = two_then_two(self, columns[2], columns[3]);
        registers!(
            self,
            _mm512_add_ps(
                _mm512_shuffle_ps::<0x88>(left, right),
                _mm512_shuffle_ps::<0xdd>(left, right)
            )
        )
    }
}

/// The first two levels of the tree for four vectors: block b (4 lanes) of the result belongs to the b-th.
#[inline(always)]
fn four_blocks(token: Avx512, a: __m512, b: __m512, c: __m512, d: __m512) -> __m512 {
    let ab = halves(token, a, b);
    let cd = halves(token, c, d);
    registers!(
        token,
        _mm512_add_ps(
            _mm512_shuffle_f32x4::<0x88>(ab, cd),
            _mm512_shuffle_f32x4::<0xdd>(ab, cd)
        )
    )
}

/// Lane i plus lane i + 8: of `a` in the lower 8 lanes, of `b` in the upper 8.
#[inline(always)]
fn halves(token: Avx512, a: __m512, b: __m512) -> __m512 {
    registers!(
        token,
        _mm512_add_ps(
            _mm512_shuffle_f32x4::<0x44>(a, b),
            _mm512_shuffle_f32x4::<0xee>(a, b)
        )
    )
}

/// In each block of four lanes, lane i plus lane i + 2: of `a` in the first two lanes, of `b` in the others.
#[inline(always)]
fn two_then_two(token: Avx512, a: __m512, b: __m512) -> __m512 {
    registers!(
        token,
        _mm512_add_ps(_mm512_shuffle_ps::<0x44>(a, b), _mm512_shuffle_ps::<0xee>(a, b))
    )
}
