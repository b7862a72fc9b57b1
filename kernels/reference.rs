//! Every operation, naive: the truth that the fast loops are compared with. Owns no cleverness: one element at
//! a time, sums in f64, conversions by the `half` crate. Never optimised, never used outside tests.
//!
//! Where an operation's definition names f32 roundings (the product before `rne`, the decoded weight, the
//! error of one element) they are made here too; only the sums over elements are in f64.

pub mod forward;

use crate::{Candidate, ErrorSums};
use half::{bf16, f16};

/// Little-endian BF16 to f32.
pub fn widen_bf16(src: &[u8]) -> Vec<f32> {
    src.chunks(2)
        .map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32())
        .collect()
}

/// Little-endian F16 to f32.
pub fn widen_f16(src: &[u8]) -> Vec<f32> {
    src.chunks(2)
        .map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32())
        .collect()
}

/// Little-endian F32 to f32.
pub fn widen_f32(src: &[u8]) -> Vec<f32> {
    src.chunks(4)
        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
        .collect()
}

/// f32 to little-endian BF16, nearest, ties to even.
pub fn narrow_bf16(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect()
}

/// f32 to little-endian F16, nearest, ties to even.
pub fn narrow_f16(x: &[f32]) -> Vec<u8> {
    x.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect()
}

/// The largest magnitude as a bit pattern.
pub fn absmax(x: &[f32]) -> f32 {
    f32::from_bits(x.iter().map(|x| x.abs().to_bits()).max().unwrap_or(0))
}

/// Smallest and largest value; NaN is passed over.
pub fn minmax(x: &[f32]) -> (f32, f32) {
    x.iter()
        .fold((f32::INFINITY, f32::NEG_INFINITY), |(min, max), &x| {
            (min.min(x), max.max(x))
        })
}

/// One code: `clamp(rne(x * inv_scale) + zero, lo, hi)`, `lo` for NaN.
pub fn round_code(x: f32, inv_scale: f32, zero: i32, lo: u8, hi: u8) -> u8 {
    let steps = f64::from((x * inv_scale).round_ties_even());
    if steps.is_nan() {
        return lo;
    }
    (steps + f64::from(zero)).clamp(f64::from(lo), f64::from(hi)) as u8
}

/// Codes of a row under one scale.
pub fn round_codes(x: &[f32], inv_scale: f32, zero: i32, lo: u8, hi: u8) -> Vec<u8> {
    x.iter()
        .map(|&x| round_code(x, inv_scale, zero, lo, hi))
        .collect()
}

/// Codes of `8 / per_byte` bits, first code in the lowest bits.
pub fn pack(codes: &[u8], per_byte: usize) -> Vec<u8> {
    let bits = 8 / per_byte;
    let mut out = vec![0; codes.len().div_ceil(per_byte)];
    for (k, code) in codes.iter().enumerate() {
        out[k / per_byte] |= (code & ((1 << bits) - 1)) << (k % per_byte * bits);
    }
    out
}

/// The first `n` codes of `8 / per_byte` bits.
pub fn unpack(packed: &[u8], per_byte: usize, n: usize) -> Vec<u8> {
    let bits = 8 / per_byte;
    (0..n)
        .map(|k| (packed[k / per_byte] >> (k % per_byte * bits)) & ((1 << bits) - 1))
        .collect()
}

/// The squared error of a group under one candidate, weighted if there are weights.
pub fn clip_error(x: &[f32], weights: Option<&[f32]>, c: &Candidate) -> f64 {
    let mut sum = 0.0;
    for (k, &x) in x.iter().enumerate() {
        let steps = f64::from((x * c.inv_scale).round_ties_even());
        let code = (steps + f64::from(c.zero))
            .max(f64::from(c.lo))
            .min(f64::from(c.hi));
        let decoded = (code - f64::from(c.zero)) as f32 * c.scale;
        let error = f64::from(x - decoded);
        sum += error * error * weights.map_or(1.0, |weights| f64::from(weights[k]));
    }
    sum
}

/// The error sums of one row.
pub fn row_error(x: &[f32], codes: &[u8], group: usize, scales: &[f32], zeros: &[f32]) -> ErrorSums {
    let mut sums = ErrorSums::default();
    for (k, (&x, &code)) in x.iter().zip(codes).enumerate() {
        let decoded = (f32::from(code) - zeros[k / group]) * scales[k / group];
        let error = x - decoded;
        sums.n += 1;
        sums.sum_x2 += f64::from(x) * f64::from(x);
        sums.sum_e2 += f64::from(error) * f64::from(error);
        sums.sum_xe += f64::from(x) * f64::from(error);
        sums.max_abs_e = sums.max_abs_e.max(error.abs());
    }
    sums
}

/// How often each code occurs.
pub fn code_histogram(codes: &[u8]) -> [u64; 256] {
    let mut counts = [0; 256];
    for &code in codes {
        counts[usize::from(code)] += 1;
    }
    counts
}

/// The byte of the codeword c with the least (t - c) B (t - c)^T, and that value; the lowest byte on ties.
pub fn nearest_in_metric(book: &[[i8; 4]; 256], t: [f32; 4], b: [[f32; 4]; 4]) -> (u8, f64) {
    let mut best = (0, f64::INFINITY);
    for (byte, word) in (0..=u8::MAX).zip(book) {
        let e: Vec<f64> = t
            .iter()
            .zip(word)
            .map(|(t, c)| f64::from(*t) - f64::from(*c))
            .collect();
        let mut cost = 0.0;
        for i in 0..4 {
            for j in 0..4 {
                cost += e[i] * f64::from(b[i][j]) * e[j];
            }
        }
        if cost < best.1 {
            best = (byte, cost);
        }
    }
    best
}
