//! Blocks of GGML, decoded. Each block gives codes, and for every run of `group` of them a scale and an offset:
//!
//! ```text
//! type   block     group  code                                      value
//! Q4_0   32 in 18     32  4 bits                                    d * (q - 8)
//! Q4_1   32 in 20     32  4 bits                                    d * q + m
//! Q5_0   32 in 22     32  4 bits, the fifth in a word               d * (q - 16)
//! Q5_1   32 in 24     32  likewise                                  d * q + m
//! Q8_0   32 in 34     32  8 bits, signed                            d * q
//! Q2_K   256 in 84    16  2 bits                                    (d * s) * q - dmin * m
//! Q3_K   256 in 110   16  2 bits, the third in a mask               (d * (s - 32)) * (q - 4)
//! Q4_K   256 in 144   32  4 bits                                    (d * s) * q - dmin * m
//! Q5_K   256 in 176   32  4 bits, the fifth in a mask               (d * s) * q - dmin * m
//! Q6_K   256 in 210   16  4 bits, two more in pairs                 (d * s) * (q - 32)
//! IQ4_NL 32 in 18     32  4 bits, the name of a level               d * LEVELS[q]
//! ```
//!
//! Everything in f32, each product and each sum rounded by itself, in the order written. Types whose offset is a whole
//! number of steps are [`AffineWeight`](crate::weight::AffineWeight)s and stay packed: Q5_0 and Q6_K with codes of 8 bits, and Q4_1
//! where every m is minus d times a zero point of 0 to 15, as we write it. So do Q4_K and Q2_K, whose schemes are our own
//! ([`crate::scheme::kquant`]). The others become f32 values.
//!
//! Source: the structures of `ggml-common.h` and gguf-py's `quants.py`.

use half::f16;

use super::kquant;
use crate::dtype::FloatDtype;
use crate::import::Decoded;
use crate::import::affine::{AffineCodes, Groups};
use crate::scheme::KQuant;
use crate::tensor::byte_len;
use crate::{FormatError, Result};

/// Values of IQ4_NL's codes.
const LEVELS: [f32; 16] = [
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
];

/// A type of GGML that is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    /// Plain floats.
    Float(FloatDtype),
    /// Blocks; see the module's text.
    Blocks(Kind),
}

/// A type of blocks, by its row in the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the table above is their documentation")]
pub enum Kind {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
    Iq4Nl,
}

/// Number in files, name, weights and bytes of a block.
const KINDS: [(u32, &str, Kind, usize, usize); 11] = [
    (2, "Q4_0", Kind::Q4_0, 32, 18),
    (3, "Q4_1", Kind::Q4_1, 32, 20),
    (6, "Q5_0", Kind::Q5_0, 32, 22),
    (7, "Q5_1", Kind::Q5_1, 32, 24),
    (8, "Q8_0", Kind::Q8_0, 32, 34),
    (10, "Q2_K", Kind::Q2K, 256, 84),
    (11, "Q3_K", Kind::Q3K, 256, 110),
    (12, "Q4_K", Kind::Q4K, 256, 144),
    (13, "Q5_K", Kind::Q5K, 256, 176),
    (14, "Q6_K", Kind::Q6K, 256, 210),
    (20, "IQ4_NL", Kind::Iq4Nl, 32, 18),
];

impl Type {
    /// The type of this number.
    pub fn of(number: u32) -> Option<Self> {
        match number {
            0 => Some(Self::Float(FloatDtype::F32)),
            1 => Some(Self::Float(FloatDtype::F16)),
            30 => Some(Self::Float(FloatDtype::Bf16)),
            _ => {
                let known = KINDS.iter().find(|(known, ..)| *known == number)?;
                Some(Self::Blocks(known.2))
            }
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Float(FloatDtype::F32) => "F32",
            Self::Float(FloatDtype::F16) => "F16",
            Self::Float(FloatDtype::Bf16) => "BF16",
            Self::Blocks(kind) => kind.row().map_or("", |row| row.1),
        }
    }

    /// Names of all.
    pub fn names() -> String {
        let blocks = KINDS.iter().map(|(_, name, ..)| *name);
        ["F32", "F16", "BF16"]
            .into_iter()
            .chain(blocks)
            .collect::<Vec<_>>()
            .join(", ")
    }

    /// Weights and bytes of a block.
    pub fn block(self) -> (usize, usize) {
        match self {
            Self::Float(dtype) => (1, dtype.bytes()),
            Self::Blocks(kind) => kind.row().map_or((1, 1), |row| (row.3, row.4)),
        }
    }

    /// Bytes of a row of `k` weights, if it is whole blocks.
    pub fn row_bytes(self, k: usize) -> Option<usize> {
        let (weights, bytes) = self.block();
        (k.is_multiple_of(weights)).then_some(())?;
        (k / weights).checked_mul(bytes)
    }

    /// Bytes of a tensor, if its rows are whole blocks, it is not empty, and the values would fit into memory as f32.
    pub fn bytes(self, shape: &[usize]) -> Option<usize> {
        let (k, rows) = shape.split_last()?;
        byte_len(crate::dtype::Dtype::F32, shape).filter(|bytes| *bytes > 0)?;
        rows.iter()
            .try_fold(self.row_bytes(*k)?, |all, &d| all.checked_mul(d))
    }
}

impl Kind {
    fn row(self) -> Option<&'static (u32, &'static str, Kind, usize, usize)> {
        KINDS.iter().find(|row| row.2 == self)
    }

    /// Length of a run with one scale.
    fn group(self) -> usize {
        match self {
            Self::Q2K | Self::Q3K | Self::Q6K => 16,
            _ => 32,
        }
    }

    /// Of symmetric types: bits codes are kept in, what is added to them for that, and the type of their scales.
    fn affine(self) -> Option<(u8, u8, FloatDtype)> {
        match self {
            Self::Q4_0 => Some((4, 0, FloatDtype::F16)),
            Self::Q5_0 => Some((8, 128 - 16, FloatDtype::F16)),
            Self::Q8_0 => Some((8, 128, FloatDtype::F16)),
            Self::Q3K => Some((3, 0, FloatDtype::F32)),
            Self::Q6K => Some((8, 128 - 32, FloatDtype::F32)),
            _ => None,
        }
    }

    /// Decodes `n` rows of `k` weights. Fails when a scale is not finite; `bytes` are as many as they should be.
    pub fn decode(self, n: usize, k: usize, bytes: &[u8]) -> Result<Decoded> {
        match self {
            Self::Q4K => return kquant::decode(KQuant::Q4, n, k, bytes),
            Self::Q2K => return kquant::decode(KQuant::Q2, n, k, bytes),
            _ => {}
        }
        let mut all = Runs::with_capacity(n * k, n * k / self.group());
        let (_, length) = Type::Blocks(self).block();
        for block in bytes.chunks_exact(length.max(1)) {
            all.block(self, block);
        }
        if let Some(bad) = all.scales.iter().chain(&all.offsets).find(|v| !v.is_finite()) {
            return Err(FormatError::Weight {
                what: "scale of a block",
                expected: "a finite number".to_owned(),
                got: bad.to_string(),
            });
        }
        if self == Self::Q4_1
            && let Some(zeros) = all.zero_points()
        {
            let codes = AffineCodes {
                n,
                k,
                bits: 4,
                codes: all.codes,
                scales: all.scales,
                scale_dtype: FloatDtype::F16,
                zeros: Some(zeros),
                groups: Groups::Every(self.group()),
            };
            return codes.decoded();
        }
        if let Some((bits, more, scale_dtype)) = self.affine() {
            all.codes
                .iter_mut()
                .for_each(|code| *code = code.wrapping_add(more));
            let codes = AffineCodes {
                n,
                k,
                bits,
                codes: all.codes,
                scales: all.scales,
                scale_dtype,
                zeros: None,
                groups: Groups::Every(self.group()),
            };
            return codes.decoded();
        }
        let mut values = Vec::with_capacity(n * k * 4);
        for (run, codes) in all.codes.chunks(self.group()).enumerate() {
            let scale = all.scales.get(run).copied().unwrap_or(0.0);
            let offset = all.offsets.get(run).copied();
            for &code in codes {
                let value = match offset {
                    Some(offset) => scale * f32::from(code) + offset,
                    None => scale * LEVELS.get(usize::from(code)).copied().unwrap_or(0.0),
                };
                values.extend_from_slice(&value.to_le_bytes());
            }
        }
        Ok(Decoded::Floats {
            dtype: FloatDtype::F32,
            bytes: values,
        })
    }
}

/// What blocks hold, one after the other.
pub(super) struct Runs {
    pub(super) codes: Vec<u8>,
    /// One for each run of codes.
    scales: Vec<f32>,
    /// Likewise, of types that have them.
    offsets: Vec<f32>,
}

/// The F16 at byte `at`.
fn half_at(bytes: &[u8], at: usize) -> f32 {
    let two = bytes.get(at..).and_then(|rest| rest.first_chunk());
    two.map_or(f32::NAN, |two| f16::from_le_bytes(*two).to_f32())
}

pub(super) fn run(bytes: &[u8], from: usize, length: usize) -> &[u8] {
    bytes.get(from..from + length).unwrap_or_default()
}

/// Six-bit scale and minimum `j` (0 to 7) of the 12 bytes of Q4_K and Q5_K: the first four lie in the low six bits of
/// bytes j and j + 4, the others in nibbles of byte j + 4 with their high bits above the first four.
pub(super) fn scale_and_minimum(packed: &[u8], j: usize) -> (u8, u8) {
    let byte = |at: usize| packed.get(at).copied().unwrap_or(0);
    if j < 4 {
        (byte(j) & 63, byte(j + 4) & 63)
    } else {
        let (low, scale_high, minimum_high) = (byte(j + 4), byte(j - 4), byte(j));
        (
            (low & 15) | ((scale_high >> 6) << 4),
            (low >> 4) | ((minimum_high >> 6) << 4),
        )
    }
}

/// Six-bit scale `j` (0 to 15) of the 12 bytes of Q3_K: four low bits in nibbles of the first eight bytes, two high
/// bits in pairs of the last four.
fn six_bits(packed: &[u8], j: usize) -> u8 {
    let byte = |at: usize| packed.get(at).copied().unwrap_or(0);
    let low = (byte(j % 8) >> (4 * (j / 8))) & 15;
    let high = (byte(8 + j % 4) >> (2 * (j / 4))) & 3;
    low | high << 4
}

impl Runs {
    pub(super) fn with_capacity(codes: usize, scales: usize) -> Self {
        Self {
            codes: Vec::with_capacity(codes),
            scales: Vec::with_capacity(scales),
            offsets: Vec::new(),
        }
    }

    /// The zero points of four bits that offsets stand for; none when one stands for no such.
    fn zero_points(&self) -> Option<Vec<u16>> {
        let zero = |(scale, offset): (&f32, &f32)| {
            let zero = (-offset / scale).round();
            let whole = (0.0..=15.0).contains(&zero) && -(scale * zero) == *offset;
            whole.then_some(zero as u16)
        };
        self.scales.iter().zip(&self.offsets).map(zero).collect()
    }

    fn block(&mut self, kind: Kind, block: &[u8]) {
        match kind {
            Kind::Q4_0 | Kind::Iq4Nl => {
                self.scales.push(half_at(block, 0));
                self.nibbles(run(block, 2, 16));
            }
            Kind::Q4_1 => {
                self.scales.push(half_at(block, 0));
                self.offsets.push(half_at(block, 2));
                self.nibbles(run(block, 4, 16));
            }
            Kind::Q5_0 => {
                self.scales.push(half_at(block, 0));
                self.fifths(run(block, 2, 4), run(block, 6, 16));
            }
            Kind::Q5_1 => {
                self.scales.push(half_at(block, 0));
                self.offsets.push(half_at(block, 2));
                self.fifths(run(block, 4, 4), run(block, 8, 16));
            }
            Kind::Q8_0 => {
                self.scales.push(half_at(block, 0));
                self.codes.extend_from_slice(run(block, 2, 32));
            }
            // Whole weights of these are made in `kquant`.
            Kind::Q2K | Kind::Q4K => {}
            Kind::Q3K => {
                let (d, packed) = (half_at(block, 108), run(block, 96, 12));
                let scale = |j| d * f32::from(i16::from(six_bits(packed, j)) - 32);
                self.scales.extend((0..16).map(scale));
                let from = self.codes.len();
                self.pairs(run(block, 32, 64));
                let mask = run(block, 0, 32);
                self.add_bits(from, mask, 2);
            }
            Kind::Q5K => {
                let (d, least) = (half_at(block, 0), half_at(block, 2));
                for j in 0..8 {
                    let (scale, minimum) = scale_and_minimum(run(block, 4, 12), j);
                    self.scales.push(d * f32::from(scale));
                    self.offsets.push(-(least * f32::from(minimum)));
                }
                let from = self.codes.len();
                let low = run(block, 48, 128).chunks_exact(32);
                low.for_each(|bytes| self.nibbles(bytes));
                self.add_bits(from, run(block, 16, 32), 4);
            }
            Kind::Q6K => {
                let d = half_at(block, 208);
                let scales = run(block, 192, 16).iter();
                self.scales
                    .extend(scales.map(|s| d * f32::from(i8::from_le_bytes([*s]))));
                let from = self.codes.len();
                run(block, 0, 128)
                    .chunks_exact(64)
                    .for_each(|bytes| self.nibbles(bytes));
                let high = run(block, 128, 64).chunks_exact(32);
                let high = high.flat_map(|bytes| {
                    (0..4).flat_map(move |i| bytes.iter().map(move |b| (b >> (2 * i)) & 3))
                });
                for (code, high) in self.codes.iter_mut().skip(from).zip(high) {
                    *code |= high << 4;
                }
            }
        }
    }

    /// Low nibbles of all bytes, then high ones.
    pub(super) fn nibbles(&mut self, bytes: &[u8]) {
        self.codes.extend(bytes.iter().map(|byte| byte & 15));
        self.codes.extend(bytes.iter().map(|byte| byte >> 4));
    }

    /// Nibbles of 16 bytes, the fifth bit of code i in bit i of a word.
    fn fifths(&mut self, word: &[u8], bytes: &[u8]) {
        let from = self.codes.len();
        self.nibbles(bytes);
        let word = word.first_chunk().map_or(0, |word| u32::from_le_bytes(*word));
        for (i, code) in self.codes.iter_mut().skip(from).enumerate() {
            *code |= (((word >> i) & 1) as u8) << 4;
        }
    }

    /// Of every 32 bytes the lowest two bits of all, then the next.
    pub(super) fn pairs(&mut self, bytes: &[u8]) {
        for bytes in bytes.chunks_exact(32) {
            for shift in [0, 2, 4, 6] {
                self.codes.extend(bytes.iter().map(|byte| (byte >> shift) & 3));
            }
        }
    }

    /// Bit `i / 32` of byte `i % 32` of the mask as bit `place` of code i.
    fn add_bits(&mut self, from: usize, mask: &[u8], place: u8) {
        for (i, code) in self.codes.iter_mut().skip(from).enumerate() {
            let byte = mask.get(i % 32).copied().unwrap_or(0);
            *code |= ((byte >> (i / 32)) & 1) << place;
        }
    }
}
