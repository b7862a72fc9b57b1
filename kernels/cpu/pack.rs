//! Small codes in bytes, first code in the lowest bits. Owns the byte-level inner loop only; which tensor
//! layout uses it is the business of the packings in the formats package.
//!
//! ```text
//! nibbles   byte j = | code 2j+1 | code 2j |                            bits 7..4, 3..0
//! crumbs    byte j = | code 4j+3 | code 4j+2 | code 4j+1 | code 4j |    bits 7..6, 5..4, 3..2, 1..0
//! ```
//!
//! Only the low 4 (or 2) bits of a code are used. Places behind the last code are zero bits.

use super::isa::Isa;
use super::simd::{Kernel, Vector};

/// `out[j] = codes[2j] | codes[2j + 1] << 4`; with an odd count the last high nibble is 0.
///
/// # Panics
///
/// If `out.len() != ceil(codes.len() / 2)`.
pub fn pack_nibbles(isa: Isa, codes: &[u8], out: &mut [u8]) {
    assert_eq!(out.len(), codes.len().div_ceil(2), "two codes per byte");
    isa.run(Pack::<2>(codes, out));
}

/// `codes[k] = packed[k / 2] >> 4 * (k mod 2) & 15`, the inverse of [`pack_nibbles`].
///
/// # Panics
///
/// If `packed.len() != ceil(codes.len() / 2)`.
pub fn unpack_nibbles(isa: Isa, packed: &[u8], codes: &mut [u8]) {
    assert_eq!(packed.len(), codes.len().div_ceil(2), "two codes per byte");
    isa.run(Unpack::<2>(packed, codes));
}

/// `out[j] = codes[4j] | codes[4j + 1] << 2 | codes[4j + 2] << 4 | codes[4j + 3] << 6`; missing codes are 0.
///
/// # Panics
///
/// If `out.len() != ceil(codes.len() / 4)`.
pub fn pack_crumbs(isa: Isa, codes: &[u8], out: &mut [u8]) {
    assert_eq!(out.len(), codes.len().div_ceil(4), "four codes per byte");
    isa.run(Pack::<4>(codes, out));
}

/// `codes[k] = packed[k / 4] >> 2 * (k mod 4) & 3`, the inverse of [`pack_crumbs`].
///
/// # Panics
///
/// If `packed.len() != ceil(codes.len() / 4)`.
pub fn unpack_crumbs(isa: Isa, packed: &[u8], codes: &mut [u8]) {
    assert_eq!(packed.len(), codes.len().div_ceil(4), "four codes per byte");
    isa.run(Unpack::<4>(packed, codes));
}

/// Packs `PER_BYTE` codes of `8 / PER_BYTE` bits into each byte.
struct Pack<'a, const PER_BYTE: usize>(&'a [u8], &'a mut [u8]);

impl<const PER_BYTE: usize> Kernel for Pack<'_, PER_BYTE> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self, _: V) {
        let (codes, tail) = self.0.as_chunks::<PER_BYTE>();
        let (out, out_tail) = self.1.split_at_mut(codes.len());
        for (codes, out) in codes.iter().zip(out) {
            *out = pack_byte::<PER_BYTE>(codes);
        }
        if let [last] = out_tail {
            let mut codes = [0; PER_BYTE];
            codes[..tail.len()].copy_from_slice(tail);
            *last = pack_byte::<PER_BYTE>(&codes);
        }
    }
}

struct Unpack<'a, const PER_BYTE: usize>(&'a [u8], &'a mut [u8]);

impl<const PER_BYTE: usize> Kernel for Unpack<'_, PER_BYTE> {
    type Output = ();

    #[inline(always)]
    fn run<V: Vector>(self, _: V) {
        let (codes, tail) = self.1.as_chunks_mut::<PER_BYTE>();
        let (packed, last) = self.0.split_at(codes.len());
        for (codes, &byte) in codes.iter_mut().zip(packed) {
            *codes = unpack_byte::<PER_BYTE>(byte);
        }
        if let [byte] = last {
            tail.copy_from_slice(&unpack_byte::<PER_BYTE>(*byte)[..tail.len()]);
        }
    }
}

#[inline(always)]
fn pack_byte<const PER_BYTE: usize>(codes: &[u8; PER_BYTE]) -> u8 {
    let bits = 8 / PER_BYTE;
    let mut byte = 0;
    for (i, code) in codes.iter().enumerate() {
        byte |= (code & ((1 << bits) - 1)) << (i * bits);
    }
    byte
}

#[inline(always)]
fn unpack_byte<const PER_BYTE: usize>(byte: u8) -> [u8; PER_BYTE] {
    let bits = 8 / PER_BYTE;
    let mut codes = [0; PER_BYTE];
    for (i, code) in codes.iter_mut().enumerate() {
        *code = (byte >> (i * bits)) & ((1 << bits) - 1);
    }
    codes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_code_is_in_the_lowest_bits() {
        for isa in Isa::available() {
            let mut bytes = [0xff; 2];
            pack_nibbles(isa, &[1, 2, 15], &mut bytes);
            assert_eq!(bytes, [0x21, 0x0f]);
            pack_crumbs(isa, &[1, 2, 3, 0, 3], &mut bytes);
            assert_eq!(bytes, [0b00_11_10_01, 0b00_00_00_11]);
        }
    }
}
