//! Stored numbers to f32 and back. Owns the conversion of rows between little-endian bytes (BF16, F16, F32)
//! and f32; bytes may lie at any address, since tensors in mapped files are not always aligned.
//!
//! Widening is exact. Narrowing rounds to nearest, ties to even, overflows to infinity, and keeps a NaN a NaN
//! (made quiet, leading payload bits kept). Empty rows are allowed everywhere.

use super::isa::Isa;
use super::simd::{Kernel, LANES, Vector};

/// `out[k]` = the BF16 number in bytes 2k and 2k + 1 of `src`, exact, NaN payloads included.
///
/// # Panics
///
/// If `src.len() != 2 * out.len()`.
pub fn widen_bf16(isa: Isa, src: &[u8], out: &mut [f32]) {
    assert_eq!(src.len(), 2 * out.len(), "two bytes per number");
    isa.run(WidenBf16(src, out));
}

/// `out[k]` = the F16 number in bytes 2k and 2k + 1 of `src`, exact; a signalling NaN becomes quiet.
///
/// # Panics
///
/// If `src.len() != 2 * out.len()`.
pub fn widen_f16(isa: Isa, src: &[u8], out: &mut [f32]) {
    assert_eq!(src.len(), 2 * out.len(), "two bytes per number");
    isa.run(WidenF16(src, out));
}

/// `out[k]` = the F32 number in bytes 4k to 4k + 3 of `src`, bit for bit.
///
/// # Panics
///
/// If `src.len() != 4 * out.len()`.
pub fn widen_f32(isa: Isa, src: &[u8], out: &mut [f32]) {
    assert_eq!(src.len(), 4 * out.len(), "four bytes per number");
    isa.run(WidenF32(src, out));
}

/// Bytes 2k and 2k + 1 of `out` = `x[k]` as BF16, nearest, ties to even; NaN becomes a quiet NaN.
///
/// # Panics
///
/// If `out.len() != 2 * x.len()`.
pub fn narrow_bf16(isa: Isa, x: &[f32], out: &mut [u8]) {
    assert_eq!(out.len(), 2 * x.len(), "two bytes per number");
    isa.run(NarrowBf16(x, out));
}

/// Bytes 2k and 2k + 1 of `out` = `x[k]` as F16, nearest, ties to even, subnormal results included; beyond
/// 65519.996 the result is infinite; NaN becomes a quiet NaN.
///
/// # Panics
///
/// If `out.len() != 2 * x.len()`.
pub fn narrow_f16(isa: Isa, x: &[f32], out: &mut [u8]) {
    assert_eq!(out.len(), 2 * x.len(), "two bytes per number");
    isa.run(NarrowF16(x, out));
}

struct WidenBf16<'a>(&'a [u8], &'a mut [f32]);

impl Kernel for WidenBf16<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self, _: V) {
        for (out, bytes) in self.1.iter_mut().zip(self.0.as_chunks::<2>().0) {
            *out = f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
        }
    }
}

struct WidenF16<'a>(&'a [u8], &'a mut [f32]);

impl Kernel for WidenF16<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self, v: V) {
        let (blocks, tail) = self.0.as_chunks::<{ 2 * LANES }>();
        let (outs, out_tail) = self.1.as_chunks_mut::<LANES>();
        for (block, out) in blocks.iter().zip(outs) {
            v.store(v.load_f16(block), out);
        }
        if !tail.is_empty() {
            let mut block = [0; 2 * LANES];
            block[..tail.len()].copy_from_slice(tail);
            let mut lanes = [0.0; LANES];
            v.store(v.load_f16(&block), &mut lanes);
            out_tail.copy_from_slice(&lanes[..out_tail.len()]);
        }
    }
}

struct WidenF32<'a>(&'a [u8], &'a mut [f32]);

impl Kernel for WidenF32<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self, _: V) {
        for (out, bytes) in self.1.iter_mut().zip(self.0.as_chunks::<4>().0) {
            *out = f32::from_bits(u32::from_le_bytes(*bytes));
        }
    }
}

struct NarrowBf16<'a>(&'a [f32], &'a mut [u8]);

impl Kernel for NarrowBf16<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self, _: V) {
        for (x, out) in self.0.iter().zip(self.1.as_chunks_mut::<2>().0) {
            *out = narrow_bf16_one(*x).to_le_bytes();
        }
    }
}

/// Adds just under half a unit of the kept part, or exactly half where that part is odd; then truncates.
#[inline(always)]
fn narrow_bf16_one(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet_nan = (bits >> 16) | 0x0040;
    (if x.is_nan() { quiet_nan } else { rounded }) as u16
}

struct NarrowF16<'a>(&'a [f32], &'a mut [u8]);

impl Kernel for NarrowF16<'_> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self, v: V) {
        let (blocks, tail) = self.0.as_chunks::<LANES>();
        let (outs, out_tail) = self.1.as_chunks_mut::<{ 2 * LANES }>();
        for (block, out) in blocks.iter().zip(outs) {
            v.store_f16(v.load(block), out);
        }
        if !tail.is_empty() {
            let mut bytes = [0; 2 * LANES];
            v.store_f16(v.load_partial(tail, 0.0), &mut bytes);
            out_tail.copy_from_slice(&bytes[..out_tail.len()]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_3f80_and_3c00() {
        for isa in Isa::available() {
            let mut bytes = [0; 2];
            narrow_bf16(isa, &[1.0], &mut bytes);
            assert_eq!(bytes, [0x80, 0x3f]);
            narrow_f16(isa, &[1.0], &mut bytes);
            assert_eq!(bytes, [0x00, 0x3c]);
            let mut back = [0.0];
            widen_f16(isa, &bytes, &mut back);
            assert_eq!(back, [1.0]);
        }
    }
}
