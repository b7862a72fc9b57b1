//! 16 lanes of i32 that multiply and add pairs of i16, four times: portable, AVX2, AVX-512 and AVX-512 with
//! VNNI. Owns the [`Dot16`] trait over which the codeword search is written, its tokens and their detection.
//! Integer sums are exact and wrap, so the order of additions does not matter and all four give the same bits.

#[cfg(target_arch = "x86_64")]
use std::arch::x86_64::*;
use std::array::from_fn;

/// Lanes of a vector, on every instruction set.
pub(crate) const LANES: usize = 16;

/// A loop that can be compiled for any of the instruction sets.
pub(crate) trait DotKernel {
    /// Runs the loop. Implementations are `#[inline(always)]`.
    fn run<D: Dot16>(self, d: D);
}

/// The token of an instruction set and what it can do. A token exists only where the instructions do.
pub(crate) trait Dot16: Copy {
    /// 16 lanes of f32.
    type F: Copy;
    /// 16 lanes of i32, or of pairs of i16 (the low half is the first of the pair).
    type I: Copy;

    /// Runs a kernel in a function compiled for this instruction set.
    fn enter<K: DotKernel>(self, kernel: K);
    /// Lane i is `x[i]`.
    fn load(self, x: &[f32; LANES]) -> Self::F;
    /// The same value in all lanes.
    fn splat(self, value: f32) -> Self::F;
    /// `a * b`.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a / b`.
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// The smaller; operands are never NaN.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// The larger; operands are never NaN.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// The nearest integer, ties to even; magnitudes are below 2^22.
    fn round(self, a: Self::F) -> Self::I;
    /// Lane i is the pair (lo\[i\], hi\[i\]), of which only the low 16 bits count.
    fn pair(self, lo: Self::I, hi: Self::I) -> Self::I;
    /// `a * 32`.
    fn times_32(self, a: Self::I) -> Self::I;
    /// The same value in all lanes.
    fn splat_i(self, value: i32) -> Self::I;
    /// `acc + a.first * b.first + a.second * b.second`, exact, wrapping.
    fn dot(self, acc: Self::I, a: Self::I, b: Self::I) -> Self::I;
    /// The larger.
    fn max_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// `floor(a / 256)` as f32; exact because it has at most 24 bits.
    fn high_24(self, a: Self::I) -> Self::F;
    /// `out[i]` is lane i.
    fn store_i(self, a: Self::I, out: &mut [i32; LANES]);
    /// `out[i]` is lane i.
    fn store(self, a: Self::F, out: &mut [f32; LANES]);
}

/// Plain Rust over arrays.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

/// 1.5 * 2^23: adding it to a value below 2^22 rounds the value to an integer in the low mantissa bits.
const ROUNDER: f32 = 12_582_912.0;

fn halves(pair: i32) -> (i32, i32) {
    (i32::from(pair as i16), pair >> 16)
}

impl Dot16 for Portable {
    type F = [f32; LANES];
    type I = [i32; LANES];

    #[inline(always)]
    fn enter<K: DotKernel>(self, kernel: K) {
        kernel.run(self);
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        *x
    }
    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        [value; LANES]
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        from_fn(|i| a[i] * b[i])
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        from_fn(|i| a[i] / b[i])
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        from_fn(|i| if a[i] < b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::I {
        from_fn(|i| (a[i] + ROUNDER).to_bits().wrapping_sub(ROUNDER.to_bits()) as i32)
    }
    #[inline(always)]
    fn pair(self, lo: Self::I, hi: Self::I) -> Self::I {
        from_fn(|i| (lo[i] & 0xFFFF) | (hi[i] << 16))
    }
    #[inline(always)]
    fn times_32(self, a: Self::I) -> Self::I {
        a.map(|a| a << 5)
    }
    #[inline(always)]
    fn splat_i(self, value: i32) -> Self::I {
        [value; LANES]
    }
    #[inline(always)]
    fn dot(self, acc: Self::I, a: Self::I, b: Self::I) -> Self::I {
        from_fn(|i| {
            let ((a0, a1), (b0, b1)) = (halves(a[i]), halves(b[i]));
            acc[i].wrapping_add((a0 * b0).wrapping_add(a1 * b1))
        })
    }
    #[inline(always)]
    fn max_i(self, a: Self::I, b: Self::I) -> Self::I {
        from_fn(|i| if a[i] > b[i] { a[i] } else { b[i] })
    }
    #[inline(always)]
    fn high_24(self, a: Self::I) -> Self::F {
        a.map(|a| (a >> 8) as f32)
    }
    #[inline(always)]
    fn store_i(self, a: Self::I, out: &mut [i32; LANES]) {
        *out = a;
    }
    #[inline(always)]
    fn store(self, a: Self::F, out: &mut [f32; LANES]) {
        *out = a;
    }
}

/// The proof that this machine has AVX2. Made only by [`Avx2::detect`].
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

#[cfg(target_arch = "x86_64")]
impl Avx2 {
    /// The token, if the machine has the instructions.
    pub(crate) fn detect() -> Option<Self> {
        is_x86_feature_detected!("avx2").then_some(Self(()))
    }
}

/// The kernel, compiled with AVX2.
///
/// # Safety
///
/// The machine has the instructions named in the attribute.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
unsafe fn compiled_avx2<K: DotKernel>(token: Avx2, kernel: K) {
    kernel.run(token);
}

/// One instruction on each of two registers of 8 lanes.
#[cfg(target_arch = "x86_64")]
macro_rules! both {
    ($token:ident, $f:ident, $a:ident $(, $b:ident)*) => {{
        let Avx2(()) = $token;
        // SAFETY: the token exists, so the machine has AVX2; the instruction only touches registers.
        unsafe { ($f($a.0 $(, $b.0)*), $f($a.1 $(, $b.1)*)) }
    }};
}

#[cfg(target_arch = "x86_64")]
impl Dot16 for Avx2 {
    type F = (__m256, __m256);
    type I = (__m256i, __m256i);

    #[inline(always)]
    fn enter<K: DotKernel>(self, kernel: K) {
        // SAFETY: the token exists, so the machine has AVX2.
        unsafe { compiled_avx2(self, kernel) }
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        // SAFETY: `x` is 64 readable bytes, the loads need no alignment, the token proves the instruction.
        unsafe { (_mm256_loadu_ps(x.as_ptr()), _mm256_loadu_ps(x.as_ptr().add(8))) }
    }
    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        // SAFETY: the token proves the instruction, which only touches registers.
        let half = unsafe { _mm256_set1_ps(value) };
        (half, half)
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        both!(self, _mm256_mul_ps, a, b)
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        both!(self, _mm256_div_ps, a, b)
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        both!(self, _mm256_min_ps, a, b)
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        both!(self, _mm256_max_ps, a, b)
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::I {
        both!(self, _mm256_cvtps_epi32, a)
    }
    #[inline(always)]
    fn pair(self, lo: Self::I, hi: Self::I) -> Self::I {
        let mask = self.splat_i(0xFFFF);
        let lo = both!(self, _mm256_and_si256, lo, mask);
        // SAFETY: the token proves the instruction, which only touches registers.
        let hi = unsafe { (_mm256_slli_epi32::<16>(hi.0), _mm256_slli_epi32::<16>(hi.1)) };
        both!(self, _mm256_or_si256, lo, hi)
    }
    #[inline(always)]
    fn times_32(self, a: Self::I) -> Self::I {
        // SAFETY: the token proves the instruction, which only touches registers.
        unsafe { (_mm256_slli_epi32::<5>(a.0), _mm256_slli_epi32::<5>(a.1)) }
    }
    #[inline(always)]
    fn splat_i(self, value: i32) -> Self::I {
        // SAFETY: the token proves the instruction, which only touches registers.
        let half = unsafe { _mm256_set1_epi32(value) };
        (half, half)
    }
    #[inline(always)]
    fn dot(self, acc: Self::I, a: Self::I, b: Self::I) -> Self::I {
        let product = both!(self, _mm256_madd_epi16, a, b);
        both!(self, _mm256_add_epi32, acc, product)
    }
    #[inline(always)]
    fn max_i(self, a: Self::I, b: Self::I) -> Self::I {
        both!(self, _mm256_max_epi32, a, b)
    }
    #[inline(always)]
    fn high_24(self, a: Self::I) -> Self::F {
        // SAFETY: the token proves the instruction, which only touches registers.
        let high = unsafe { (_mm256_srai_epi32::<8>(a.0), _mm256_srai_epi32::<8>(a.1)) };
        both!(self, _mm256_cvtepi32_ps, high)
    }
    #[inline(always)]
    fn store_i(self, a: Self::I, out: &mut [i32; LANES]) {
        // SAFETY: `out` is 64 writable bytes, the stores need no alignment, the token proves the instruction.
        unsafe {
            _mm256_storeu_si256(out.as_mut_ptr().cast(), a.0);
            _mm256_storeu_si256(out.as_mut_ptr().add(8).cast(), a.1);
        }
    }
    #[inline(always)]
    fn store(self, a: Self::F, out: &mut [f32; LANES]) {
        // SAFETY: `out` is 64 writable bytes, the stores need no alignment, the token proves the instruction.
        unsafe {
            _mm256_storeu_ps(out.as_mut_ptr(), a.0);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), a.1);
        }
    }
}

/// The proof that this machine has AVX-512 F and BW, and VNNI where the parameter says so. Made only by
/// [`Avx512::detect`].
#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
pub(crate) struct Avx512<const VNNI: bool>(());

#[cfg(target_arch = "x86_64")]
impl<const VNNI: bool> Avx512<VNNI> {
    /// The token, if the machine has the instructions.
    pub(crate) fn detect() -> Option<Self> {
        let found = is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && (!VNNI || is_x86_feature_detected!("avx512vnni"));
        found.then_some(Self(()))
    }
}

/// The kernel, compiled with AVX-512.
///
/// # Safety
///
/// The machine has the instructions named in the attribute.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn compiled_avx512<K: DotKernel, const VNNI: bool>(token: Avx512<VNNI>, kernel: K) {
    kernel.run(token);
}

/// The kernel, compiled with AVX-512 and VNNI.
///
/// # Safety
///
/// The machine has the instructions named in the attribute.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
unsafe fn compiled_avx512_vnni<K: DotKernel, const VNNI: bool>(token: Avx512<VNNI>, kernel: K) {
    kernel.run(token);
}

/// Instructions on registers only: no memory is touched, so the token alone makes them safe.
#[cfg(target_arch = "x86_64")]
macro_rules! registers {
    ($token:ident, $instructions:expr) => {{
        let Avx512::<VNNI>(()) = $token;
        // SAFETY: the token exists, so the machine has the instructions; they only touch registers.
        unsafe { $instructions }
    }};
}

#[cfg(target_arch = "x86_64")]
impl<const VNNI: bool> Dot16 for Avx512<VNNI> {
    type F = __m512;
    type I = __m512i;

    #[inline(always)]
    fn enter<K: DotKernel>(self, kernel: K) {
        if VNNI {
            // SAFETY: the token with VNNI exists, so the machine has all three.
            unsafe { compiled_avx512_vnni(self, kernel) }
        } else {
            // SAFETY: the token exists, so the machine has AVX-512 F and BW.
            unsafe { compiled_avx512(self, kernel) }
        }
    }
    #[inline(always)]
    fn load(self, x: &[f32; LANES]) -> Self::F {
        // SAFETY: `x` is 64 readable bytes, the load needs no alignment, the token proves the instruction.
        unsafe { _mm512_loadu_ps(x.as_ptr()) }
    }
    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        registers!(self, _mm512_set1_ps(value))
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        registers!(self, _mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        registers!(self, _mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        registers!(self, _mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        registers!(self, _mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::I {
        registers!(self, _mm512_cvtps_epi32(a))
    }
    #[inline(always)]
    fn pair(self, lo: Self::I, hi: Self::I) -> Self::I {
        registers!(self, {
            let lo = _mm512_and_si512(lo, _mm512_set1_epi32(0xFFFF));
            _mm512_or_si512(lo, _mm512_slli_epi32::<16>(hi))
        })
    }
    #[inline(always)]
    fn times_32(self, a: Self::I) -> Self::I {
        registers!(self, _mm512_slli_epi32::<5>(a))
    }
    #[inline(always)]
    fn splat_i(self, value: i32) -> Self::I {
        registers!(self, _mm512_set1_epi32(value))
    }
    #[inline(always)]
    fn dot(self, acc: Self::I, a: Self::I, b: Self::I) -> Self::I {
        if VNNI {
            registers!(self, _mm512_dpwssd_epi32(acc, a, b))
        } else {
            registers!(self, _mm512_add_epi32(acc, _mm512_madd_epi16(a, b)))
        }
    }
    #[inline(always)]
    fn max_i(self, a: Self::I, b: Self::I) -> Self::I {
        registers!(self, _mm512_max_epi32(a, b))
    }
    #[inline(always)]
    fn high_24(self, a: Self::I) -> Self::F {
        registers!(self, _mm512_cvtepi32_ps(_mm512_srai_epi32::<8>(a)))
    }
    #[inline(always)]
    fn store_i(self, a: Self::I, out: &mut [i32; LANES]) {
        // SAFETY: `out` is 64 writable bytes, the store needs no alignment, the token proves the instruction.
        unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), a) }
    }
    #[inline(always)]
    fn store(self, a: Self::F, out: &mut [f32; LANES]) {
        // SAFETY: `out` is 64 writable bytes, the store needs no alignment, the token proves the instruction.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), a) }
    }
}
