//! Blocks of GGML, the types of GGUF files, for codes whose scales need no second rounding.
//!
//! ```text
//! Q8_0   32 weights   d f16 | 32 x i8                                        d * q
//! Q4_0   32           d f16 | 16 bytes, byte j = q[j] | q[j + 16] << 4       d * (q - 8)
//! Q4_1   32           d f16 | m f16 | 16 bytes, as in Q4_0                   d * q + m
//! Q4_K   256          d f16 | dmin f16 | 12 bytes of 6-bit s and m | 128     d * s * q - dmin * m
//! Q3_K   256          32 high bits | 64 low bits | 12 bytes of 6-bit s | d   d * (s - 32) * (q - 4)
//! Q2_K   256          16 x (s | m << 4) | 64 bytes | d f16 | dmin f16        d * s * q - dmin * m
//! ```
//!
//! Q4_K keeps two runs of 32 weights in 32 bytes: byte `32*(i/64) + i%32`, shift `4 * (i/32 % 2)`. Q2_K and the
//! low bits of Q3_K keep four: byte `32*(i/128) + i%32`, shift `2 * (i/32 % 4)`; the high bit of Q3_K is bit `i/32` of byte
//! `i%32`. The second floor of scales of the 256-weight types (s and m) is for groups that differ within a
//! block. Affine ones do not: with s = 1 (33 in Q3_K), m the zero point and d = dmin the scale, a group of 256 is exact.
//! The schemes `q4-k` and `q2-k` have these numbers themselves. In Q4_K, s and m of groups 0 to 3 are the low six bits of
//! bytes 0 to 3 and 4 to 7 of the twelve; of groups 4 to 7 the low four bits are the halves of bytes 8 to 11, the high two
//! the high two of bytes 0 to 7.
//!
//! Source: the structures of `ggml-common.h`, as gguf-py's `quants.py` reads them.

mod stored;

use half::f16;

use crate::scheme::kquant::SUPER_BLOCK;
use crate::scheme::{AffineScheme, Grid, KQuant};
use crate::weight::{AffineWeight, KWeight};

/// A type of GGML that codes can be laid out in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GgmlType {
    /// 4 bits, symmetric.
    Q4_0,
    /// 4 bits with an offset.
    Q4_1,
    /// 8 bits, symmetric.
    Q8_0,
    /// 2 bits with a zero point.
    Q2K,
    /// 3 bits, symmetric.
    Q3K,
    /// 4 bits with a zero point.
    Q4K,
}

impl GgmlType {
    /// The type that holds this scheme when its group is a multiple of the block, if there is one.
    pub fn of(scheme: AffineScheme, k: usize) -> Option<Self> {
        let whole = |block: usize| scheme.grouping().len(k).is_multiple_of(block) && k.is_multiple_of(block);
        match (scheme.bits(), scheme.grid()) {
            (8, Grid::Symmetric) if whole(32) => Some(Self::Q8_0),
            (4, Grid::Symmetric | Grid::Narrow) if whole(32) => Some(Self::Q4_0),
            (4, Grid::ZeroPoint) if whole(256) => Some(Self::Q4K),
            (4, Grid::ZeroPoint) if whole(32) => Some(Self::Q4_1),
            (3, Grid::Symmetric | Grid::Narrow) if whole(256) => Some(Self::Q3K),
            (2, _) if whole(256) => Some(Self::Q2K),
            _ => None,
        }
    }

    /// Its number in GGUF files.
    pub fn id(self) -> u32 {
        match self {
            Self::Q4_0 => 2,
            Self::Q4_1 => 3,
            Self::Q8_0 => 8,
            Self::Q2K => 10,
            Self::Q3K => 11,
            Self::Q4K => 12,
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Q4_0 => "Q4_0",
            Self::Q4_1 => "Q4_1",
            Self::Q8_0 => "Q8_0",
            Self::Q2K => "Q2_K",
            Self::Q3K => "Q3_K",
            Self::Q4K => "Q4_K",
        }
    }

    /// Weights and bytes of a block.
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::Q4_0 => (32, 18),
            Self::Q4_1 => (32, 20),
            Self::Q8_0 => (32, 34),
            Self::Q2K => (256, 84),
            Self::Q3K => (256, 110),
            Self::Q4K => (256, 144),
        }
    }

    /// Bytes of a row of `k` weights.
    pub fn row_bytes(self, k: usize) -> usize {
        let (weights, bytes) = self.block();
        k / weights * bytes
    }

    /// Appends the blocks of all rows. Scales are taken as F16 values, which the caller has checked.
    pub fn pack(self, weight: &AffineWeight, out: &mut Vec<u8>) {
        match self {
            // Codes of eight bits are stored as they are.
            Self::Q8_0 => {
                let halves: Vec<f16> = weight.scales().iter().map(|s| f16::from_f32(*s)).collect();
                let group = weight.scheme().grouping().len(weight.dims().1);
                self.pack_stored(group, weight.codes(), &halves, out);
            }
            Self::Q4_0 => pack_blocks::<32, 18>(weight, out, |codes, d, _, block| {
                let (head, quants) = block.split_at_mut(2);
                head.copy_from_slice(&d.to_le_bytes());
                planes(codes, 16, 4, quants);
            }),
            Self::Q4_1 => pack_blocks::<32, 20>(weight, out, |codes, d, zero, block| {
                let (head, quants) = block.split_at_mut(4);
                two_halves(d, f16::from_f32(offset(d.to_f32(), zero)), head);
                planes(codes, 16, 4, quants);
            }),
            Self::Q4K => pack_blocks::<256, 144>(weight, out, |codes, d, zero, block| {
                let (head, quants) = block.split_at_mut(16);
                let (halves, small) = head.split_at_mut(4);
                two_halves(d, d, halves);
                let numbers = [1, zero, 1 | zero << 4];
                small
                    .chunks_exact_mut(4)
                    .zip(numbers)
                    .for_each(|(four, number)| four.fill(number));
                each_run(codes, 64, quants, |run, quants| planes(run, 32, 4, quants));
            }),
            Self::Q2K => pack_blocks::<256, 84>(weight, out, |codes, d, zero, block| {
                let (small, rest) = block.split_at_mut(16);
                let (quants, halves) = rest.split_at_mut(64);
                small.fill(1 | zero << 4);
                each_run(codes, 128, quants, |run, quants| planes(run, 32, 2, quants));
                two_halves(d, d, halves);
            }),
            Self::Q3K => pack_blocks::<256, 110>(weight, out, |codes, d, _, block| {
                let (high, rest) = block.split_at_mut(32);
                let (low, rest) = rest.split_at_mut(64);
                let (small, half) = rest.split_at_mut(12);
                planes(&codes.map(|code| code >> 2), 32, 1, high);
                each_run(&codes.map(|code| code & 3), 128, low, |run, low| {
                    planes(run, 32, 2, low);
                });
                small.fill(0x11);
                small.iter_mut().skip(8).for_each(|top| *top = 0xaa);
                half.copy_from_slice(&d.to_le_bytes());
            }),
        }
    }
}

/// Appends a block of `BYTES` for every `CODES` codes: `fill` gets them, their scale and zero point, and a block of zeros.
fn pack_blocks<const CODES: usize, const BYTES: usize>(
    weight: &AffineWeight,
    out: &mut Vec<u8>,
    fill: impl Fn(&[u8; CODES], f16, u8, &mut [u8; BYTES]),
) {
    let ((_, k), scheme) = (weight.dims(), weight.scheme());
    let fixed = scheme.fixed_zero().unwrap_or(0);
    let zero = |at: usize| weight.zeros().get(at).copied().unwrap_or(fixed);
    let scales = weight.scales().iter().map(|scale| f16::from_f32(*scale));
    let per_group = scheme.grouping().len(k) / CODES;
    in_groups(per_group, weight.codes(), scales, out, |at, codes, d, block| {
        fill(codes, d, zero(at), block);
    });
}

/// Appends a block of `BYTES` for every `CODES` bytes of codes, `per_group` of them with the same scale: `fill` gets the
/// group's number, the codes, the scale and a block of zeros.
fn in_groups<const CODES: usize, const BYTES: usize>(
    per_group: usize,
    codes: &[u8],
    scales: impl Iterator<Item = f16>,
    out: &mut Vec<u8>,
    fill: impl Fn(usize, &[u8; CODES], f16, &mut [u8; BYTES]),
) {
    let (codes, _) = codes.as_chunks::<CODES>();
    let from = out.len();
    out.resize(from + codes.len() * BYTES, 0);
    let (blocks, _) = out.get_mut(from..).unwrap_or_default().as_chunks_mut::<BYTES>();
    let groups = codes
        .chunks(per_group.max(1))
        .zip(blocks.chunks_mut(per_group.max(1)));
    for (at, ((codes, blocks), d)) in groups.zip(scales).enumerate() {
        for (codes, block) in codes.iter().zip(blocks) {
            fill(at, codes, d, block);
        }
    }
}

/// Two numbers as the four bytes of `out`.
fn two_halves(first: f16, second: f16, out: &mut [u8]) {
    for (place, half) in out.as_chunks_mut::<2>().0.iter_mut().zip([first, second]) {
        *place = half.to_le_bytes();
    }
}

/// Appends the blocks of all rows of a weight of the K types, whose numbers are GGML's own.
pub fn pack_k(weight: &KWeight, out: &mut Vec<u8>) {
    let numbers = weight.numbers();
    let per_block = SUPER_BLOCK / weight.kind().group();
    let small = numbers
        .scales
        .chunks_exact(per_block)
        .zip(numbers.mins.chunks_exact(per_block));
    let halves = numbers.super_scales.iter().zip(&numbers.super_mins);
    for ((codes, (scales, mins)), (d, dmin)) in
        weight.codes().chunks_exact(SUPER_BLOCK).zip(small).zip(halves)
    {
        let halves = [d.to_le_bytes(), dmin.to_le_bytes()].concat();
        match weight.kind() {
            KQuant::Q4 => {
                out.extend_from_slice(&halves);
                let ((first, last), (first_min, last_min)) = (scales.split_at(4), mins.split_at(4));
                let with_top = |(low, high): (&u8, &u8)| low | (high >> 4) << 6;
                out.extend(first.iter().zip(last).map(with_top));
                out.extend(first_min.iter().zip(last_min).map(with_top));
                out.extend(last.iter().zip(last_min).map(|(s, m)| (s & 15) | (m & 15) << 4));
                let from = out.len();
                out.resize(from + SUPER_BLOCK / 2, 0);
                let quants = out.get_mut(from..).unwrap_or_default();
                each_run(codes, 64, quants, |run, quants| planes(run, 32, 4, quants));
            }
            KQuant::Q2 => {
                out.extend(scales.iter().zip(mins).map(|(s, m)| s | m << 4));
                let from = out.len();
                out.resize(from + SUPER_BLOCK / 4, 0);
                let quants = out.get_mut(from..).unwrap_or_default();
                each_run(codes, 128, quants, |run, quants| planes(run, 32, 2, quants));
                out.extend_from_slice(&halves);
            }
        }
    }
}

/// Q4_1's offset of a zero point.
pub fn offset(scale: f32, zero: u8) -> f32 {
    -(scale * f32::from(zero))
}

/// Calls `fill` with each `run` codes and the 32 bytes they become.
fn each_run(codes: &[u8], run: usize, quants: &mut [u8], fill: impl Fn(&[u8], &mut [u8])) {
    let runs = codes.chunks_exact(run).zip(quants.chunks_exact_mut(32));
    runs.for_each(|(run, quants)| fill(run, quants));
}

/// Bytes, zeros until now, whose `bits` from the lowest up become codes `j`, `j + run`, `j + 2 * run` ...
#[inline(always)]
fn planes(codes: &[u8], run: usize, bits: u8, quants: &mut [u8]) {
    for (plane, codes) in codes.chunks_exact(run).enumerate() {
        for (byte, code) in quants.iter_mut().zip(codes) {
            *byte |= code << (plane as u8 * bits);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn packed(scheme: &str, k: usize, zeros: Vec<u8>) -> (Vec<u8>, Vec<u8>, GgmlType) {
        let scheme = AffineScheme::parse(scheme).unwrap();
        let (low, high) = scheme.code_range();
        let span = usize::from(high - low) + 1;
        let codes: Vec<u8> = (0..k).map(|i| low + (i * 7 % span) as u8).collect();
        let groups = scheme.groups(1, k).unwrap();
        let weight = AffineWeight::new(scheme, 1, k, codes.clone(), vec![0.5; groups], zeros).unwrap();
        let kind = GgmlType::of(scheme, k).unwrap();
        let mut out = Vec::new();
        kind.pack(&weight, &mut out);
        assert_eq!(out.len(), kind.row_bytes(k));
        (codes, out, kind)
    }

    /// The index formulas of the module's text, executed.
    #[test]
    fn codes_lie_where_the_formulas_say() {
        let half = 0.5f32;
        let (codes, out, kind) = packed("w8-sym-g64-f16", 64, vec![]);
        assert_eq!(kind, GgmlType::Q8_0);
        for (i, code) in codes.iter().enumerate() {
            assert_eq!(
                out[i / 32 * 34 + 2 + i % 32] as i8,
                (i32::from(*code) - 128) as i8
            );
        }
        let (codes, out, _) = packed("w4-narrow-g32-bf16", 64, vec![]);
        for (i, code) in codes.iter().enumerate() {
            let byte = out[i / 32 * 18 + 2 + i % 16];
            assert_eq!((byte >> (4 * (i / 16 % 2))) & 15, *code);
        }
        let (codes, out, kind) = packed("w4-zp-g32-f16", 32, vec![9]);
        assert_eq!(kind, GgmlType::Q4_1);
        assert_eq!(f16::from_le_bytes([out[2], out[3]]).to_f32(), -9.0 * half);
        assert_eq!((out[4] & 15, out[4] >> 4), (codes[0], codes[16]));
        let (codes, out, _) = packed("w4-zp-g256-f16", 256, vec![9]);
        for (i, code) in codes.iter().enumerate() {
            let byte = out[16 + 32 * (i / 64) + i % 32];
            assert_eq!((byte >> (4 * (i / 32 % 2))) & 15, *code);
        }
        let (codes, out, _) = packed("w2-zp-g512-f16", 512, vec![3]);
        for (i, code) in codes.iter().enumerate() {
            let (block, i) = (&out[i / 256 * 84..], i % 256);
            assert_eq!((block[i / 16] & 15, block[i / 16] >> 4), (1, 3));
            assert_eq!(
                (block[16 + 32 * (i / 128) + i % 32] >> (2 * (i / 32 % 4))) & 3,
                *code
            );
        }
        let (codes, out, _) = packed("w3-sym-row-f16", 256, vec![]);
        for (i, code) in codes.iter().enumerate() {
            let low = (out[32 + 32 * (i / 128) + i % 32] >> (2 * (i / 32 % 4))) & 3;
            assert_eq!(low | ((out[i % 32] >> (i / 32)) & 1) << 2, *code);
        }
    }

    #[test]
    fn only_whole_blocks_have_a_type() {
        let of = |name: &str, k| GgmlType::of(AffineScheme::parse(name).unwrap(), k);
        assert_eq!(of("w4-sym-g16-f16", 256), None);
        assert_eq!(of("w4-sym-row-f16", 48), None);
        assert_eq!(of("w8-zp-g32-f16", 256), None);
        assert_eq!(of("w2-sym-g128-f16", 256), None);
        assert_eq!(of("w4-zp-row-f16", 512), Some(GgmlType::Q4K));
        assert_eq!(of("w4-zp-row-f16", 320), Some(GgmlType::Q4_1));
    }
}
