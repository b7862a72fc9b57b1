//! A weight as the processor multiplies it: the bytes as they lie in the file, and beside them the scales and
//! zero points as f32. Owns the decoding of 64 columns of a row into four vectors, straight from packed codes;
//! every value is bit for bit that of `QuantizedWeight::dequantize_row`.
//!
//! ```text
//! bf16, f16, f32      widened
//! affine, 8 bits      (code - zero) * scale
//! affine, 2 to 4 bits table[code], a vector of 16 entries made once per group: (code - zero) * scale
//! nf4                 table[code], made once per group of 64
//! q4-k, q2-k          table[code], made once per group of 32 or 16: scale * code - minimum
//! wint2               one vector of 16 code bytes gives the 15-bit codes of a group of 64, and those the windows
//! ```

use std::sync::Arc;

use qtool_formats::packing::wint2;
use qtool_formats::scheme::{Grouping, KQuant};
use qtool_formats::{FloatDtype, QuantizedWeight, Scheme};

use super::isa::Isa;
use super::kquant::{K, KRows};
use super::nf4::{Nf4, Nf4Rows};
use super::simd::{LANES, Vector};
use super::widen::{widen_bf16, widen_f16, widen_f32};
use super::wint25::{Ccq25, Ccq25Rows};
use crate::backend::{Form, HostWeight, Storage};

/// Columns that are decoded together.
pub(crate) const QUAD: usize = 4 * LANES;

/// A matrix (N, K) ready to be multiplied.
pub struct CpuWeight {
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) numbers: Numbers,
}

/// Where its numbers come from.
pub(crate) enum Numbers {
    /// N rows of K little-endian floats.
    Dense(FloatDtype, Arc<dyn Storage>),
    /// Codes of 2, 3, 4 or 8 bits.
    Affine(Affine),
    /// WINT2.
    Ccq(Ccq),
    /// WINT2.5.
    Ccq25(Ccq25),
    /// NF4.
    Nf4(Nf4),
    /// GGML's K types.
    K(K),
}

pub(crate) struct Affine {
    pub(crate) bits: u8,
    row_bytes: usize,
    codes: Arc<dyn Storage>,
    /// G.
    groups: usize,
    /// Column k is in group `k >> shift`.
    shift: u32,
    /// (N, G)
    scales: Vec<f32>,
    /// (N, G), or one for all.
    zeros: Vec<f32>,
}

pub(crate) struct Ccq {
    codes: Arc<dyn Storage>,
    local_bytes: usize,
    locals: Arc<dyn Storage>,
    /// (N): super scale, code scale, code zero point.
    channels: Vec<[f32; 3]>,
}

impl CpuWeight {
    /// Takes over the bytes of `weight`.
    ///
    /// # Panics
    ///
    /// If its parts do not fit its scheme.
    pub(crate) fn new(isa: Isa, weight: &HostWeight) -> Self {
        let (n, k) = (weight.n, weight.k);
        let numbers = match &weight.form {
            Form::Dense { dtype, bytes } => {
                assert_eq!(
                    bytes.bytes().len(),
                    n * k * dtype.bytes(),
                    "bytes of a dense weight"
                );
                Numbers::Dense(*dtype, Arc::clone(bytes))
            }
            Form::Packed { scheme, parts } => {
                let forms = scheme.parts(n, k).expect("a weight that fits its scheme");
                assert_eq!(forms.len(), parts.len(), "parts of a packed weight");
                for (form, part) in forms.iter().zip(parts) {
                    assert_eq!(form.bytes(), part.bytes().len(), "bytes of a packed weight");
                }
                let codes = Arc::clone(&parts[0]);
                match scheme {
                    Scheme::Affine(scheme) => {
                        let len = scheme.grouping().len(k);
                        let bits = scheme.bits();
                        let zeros = match scheme.fixed_zero() {
                            Some(zero) => vec![f32::from(zero)],
                            None => zero_points(bits, k / len, forms[2].row_bytes, parts[2].bytes()),
                        };
                        Numbers::Affine(Affine {
                            bits,
                            row_bytes: forms[0].row_bytes,
                            codes,
                            groups: k / len,
                            shift: match scheme.grouping() {
                                Grouping::Row => usize::BITS - 1,
                                Grouping::Columns(len) => len.ilog2(),
                            },
                            scales: widen(isa, scheme.scale_dtype(), parts[1].bytes()),
                            zeros,
                        })
                    }
                    Scheme::Ccq => {
                        let supers = widen(isa, FloatDtype::Bf16, parts[2].bytes());
                        let slopes = widen(isa, FloatDtype::F32, parts[3].bytes());
                        let offsets = widen(isa, FloatDtype::F32, parts[4].bytes());
                        Numbers::Ccq(Ccq {
                            codes,
                            local_bytes: forms[1].row_bytes,
                            locals: Arc::clone(&parts[1]),
                            channels: (0..n).map(|n| [supers[n], slopes[n], offsets[n]]).collect(),
                        })
                    }
                    Scheme::Nf4Double => Numbers::Nf4(Nf4 {
                        codes,
                        scales: double_scales(n, k, parts),
                    }),
                    Scheme::Nf4 => Numbers::Nf4(Nf4 {
                        codes,
                        scales: widen(isa, FloatDtype::F32, parts[1].bytes()),
                    }),
                    Scheme::K(kind) => Numbers::K(K::new(*kind, k, parts)),
                    Scheme::Ccq25 => Numbers::Ccq25(Ccq25 {
                        words: codes,
                        super_scales: widen(isa, FloatDtype::Bf16, parts[1].bytes()),
                    }),
                }
            }
        };
        Self { n, k, numbers }
    }
}

/// Scales of NF4 that are quantized themselves, as they are decoded.
fn double_scales(n: usize, k: usize, parts: &[Arc<dyn Storage>]) -> Vec<f32> {
    let slices: Vec<&[u8]> = parts.iter().map(|part| part.bytes()).collect();
    match QuantizedWeight::decode(Scheme::Nf4Double, n, k, &slices) {
        Ok(QuantizedWeight::Nf4(weight)) => weight.scales().to_vec(),
        other => panic!("a weight that fits its scheme: {other:?}"),
    }
}

fn widen(isa: Isa, dtype: FloatDtype, bytes: &[u8]) -> Vec<f32> {
    let mut out = vec![0.0; bytes.len() / dtype.bytes()];
    match dtype {
        FloatDtype::Bf16 => widen_bf16(isa, bytes, &mut out),
        FloatDtype::F16 => widen_f16(isa, bytes, &mut out),
        FloatDtype::F32 => widen_f32(isa, bytes, &mut out),
    }
    out
}

/// Codes of `bits` bits, lowest bits first, `groups` to a row of `row_bytes`.
fn zero_points(bits: u8, groups: usize, row_bytes: usize, bytes: &[u8]) -> Vec<f32> {
    let (bits, mask) = (usize::from(bits), (1u16 << bits) - 1);
    let rows = bytes.chunks_exact(row_bytes);
    let of_row = |row: &[u8]| -> Vec<f32> {
        let zero = |g: usize| {
            let at = g * bits;
            let high = row.get(at / 8 + 1).copied().unwrap_or(0);
            f32::from((u16::from_le_bytes([row[at / 8], high]) >> (at % 8)) & mask)
        };
        (0..groups).map(zero).collect()
    };
    rows.flat_map(of_row).collect()
}

/// A loop over rows of a weight, whatever its form.
pub(crate) trait ForRows {
    /// What the loop returns.
    type Output;

    /// Runs it over rows of this kind.
    fn run<R: Rows>(self, rows: R) -> Self::Output;
}

impl CpuWeight {
    /// Runs a loop over its rows.
    pub(crate) fn with_rows<L: ForRows>(&self, l: L) -> L::Output {
        match &self.numbers {
            Numbers::Dense(dtype, bytes) => {
                let (bytes, k) = (bytes.bytes(), self.k);
                match dtype {
                    FloatDtype::Bf16 => l.run(Dense::<2, false>(bytes, k)),
                    FloatDtype::F16 => l.run(Dense::<2, true>(bytes, k)),
                    FloatDtype::F32 => l.run(Dense::<4, false>(bytes, k)),
                }
            }
            Numbers::Affine(affine) => {
                let codes = affine.codes.bytes();
                match affine.bits {
                    8 => l.run(Codes::<8>(affine, codes)),
                    4 => l.run(Codes::<4>(affine, codes)),
                    3 => l.run(Codes::<3>(affine, codes)),
                    2 => l.run(Codes::<2>(affine, codes)),
                    bits => unreachable!("a scheme of {bits} bits"),
                }
            }
            Numbers::Ccq(ccq) => l.run(CcqRows {
                ccq,
                codes: ccq.codes.bytes(),
                locals: ccq.locals.bytes(),
                k: self.k,
            }),
            Numbers::Nf4(nf4) => l.run(Nf4Rows(nf4, nf4.codes.bytes(), self.k)),
            Numbers::K(weight) => match weight.kind {
                KQuant::Q4 => l.run(KRows::<4>(weight, weight.codes(), self.k)),
                KQuant::Q2 => l.run(KRows::<2>(weight, weight.codes(), self.k)),
            },
            Numbers::Ccq25(ccq) => l.run(Ccq25Rows(ccq, ccq.words.bytes(), self.k)),
        }
    }
}

/// Rows of a matrix that can be decoded.
pub(crate) trait Rows: Copy + Sync {
    /// One of them.
    type Row: Row;

    /// Row `n`.
    fn row(&self, n: usize) -> Self::Row;
}

/// A row that can be decoded.
pub(crate) trait Row {
    /// Columns 64 q to 64 q + 63, in order. FULL says that all of them exist; otherwise those behind the last are
    /// finite, and nothing else.
    fn quad<V: Vector, const FULL: bool>(&self, v: V, q: usize) -> [V::F; 4];
}

/// The `SIZE` bytes from `at` on; zeros behind the last, unless FULL.
#[inline(always)]
fn bytes_at<const SIZE: usize, const FULL: bool>(row: &[u8], at: usize) -> [u8; SIZE] {
    if FULL {
        return *row[at..].first_chunk().expect("a whole quad");
    }
    let mut bytes = [0; SIZE];
    let rest = row.get(at..).unwrap_or_default();
    for (to, from) in bytes.iter_mut().zip(rest) {
        *to = *from;
    }
    bytes
}

/// Floats of WIDTH bytes; those of two are F16 or BF16.
#[derive(Clone, Copy)]
pub(crate) struct Dense<'a, const WIDTH: usize, const HALF: bool>(&'a [u8], usize);

pub(crate) struct DenseRow<'a, const WIDTH: usize, const HALF: bool>(&'a [u8]);

impl<'a, const WIDTH: usize, const HALF: bool> Rows for Dense<'a, WIDTH, HALF> {
    type Row = DenseRow<'a, WIDTH, HALF>;

    #[inline(always)]
    fn row(&self, n: usize) -> Self::Row {
        DenseRow(&self.0[n * self.1 * WIDTH..][..self.1 * WIDTH])
    }
}

impl<const WIDTH: usize, const HALF: bool> Row for DenseRow<'_, WIDTH, HALF> {
    #[inline(always)]
    fn quad<V: Vector, const FULL: bool>(&self, v: V, q: usize) -> [V::F; 4] {
        let mut out = [v.splat(0.0); 4];
        for (b, out) in out.iter_mut().enumerate() {
            let at = (4 * q + b) * LANES * WIDTH;
            *out = match (WIDTH, HALF) {
                (2, true) => v.load_f16(&bytes_at::<32, FULL>(self.0, at)),
                (2, false) => v.load_bf16(&bytes_at::<32, FULL>(self.0, at)),
                _ => v.load_f32(&bytes_at::<64, FULL>(self.0, at)),
            };
        }
        out
    }
}

/// Affine codes of BITS bits.
#[derive(Clone, Copy)]
pub(crate) struct Codes<'a, const BITS: usize>(&'a Affine, &'a [u8]);

pub(crate) struct CodesRow<'a, const BITS: usize> {
    codes: &'a [u8],
    scales: &'a [f32],
    zeros: &'a [f32],
    shift: u32,
}

impl<'a, const BITS: usize> Rows for Codes<'a, BITS> {
    type Row = CodesRow<'a, BITS>;

    #[inline(always)]
    fn row(&self, n: usize) -> Self::Row {
        let Codes(affine, codes) = *self;
        let of_row = n * affine.groups..(n + 1) * affine.groups;
        CodesRow {
            codes: &codes[n * affine.row_bytes..][..affine.row_bytes],
            scales: &affine.scales[of_row.clone()],
            zeros: affine.zeros.get(of_row).unwrap_or(&affine.zeros[..1]),
            shift: affine.shift,
        }
    }
}

impl<const BITS: usize> CodesRow<'_, BITS> {
    /// Scale and zero point of the group of block `b` of 16 columns.
    #[inline(always)]
    fn group(&self, b: usize) -> (f32, f32) {
        let g = ((b * LANES) >> self.shift).min(self.scales.len() - 1);
        (self.scales[g], self.zeros[g.min(self.zeros.len() - 1)])
    }
}

/// 0 to 15.
pub(super) const STEPS: [f32; LANES] = [
    0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0,
];

impl<const BITS: usize> Row for CodesRow<'_, BITS> {
    #[inline(always)]
    fn quad<V: Vector, const FULL: bool>(&self, v: V, q: usize) -> [V::F; 4] {
        let mut out = [v.splat(0.0); 4];
        let mut group = self.group(4 * q);
        let many = self.shift < QUAD.ilog2();
        if BITS == 8 {
            for (b, out) in out.iter_mut().enumerate() {
                if many {
                    group = self.group(4 * q + b);
                }
                let codes = v.load_codes(&bytes_at::<16, FULL>(self.codes, (4 * q + b) * LANES));
                *out = v.mul(v.sub(codes, v.splat(group.1)), v.splat(group.0));
            }
            return out;
        }
        // A lookup sees four bits; where codes have fewer, the table repeats so that the others do not matter.
        let period = (1 << BITS) as f32;
        let steps: [f32; LANES] = std::array::from_fn(|i| STEPS[i] % period);
        let table = |group: (f32, f32)| v.mul(v.sub(v.load(&steps), v.splat(group.1)), v.splat(group.0));
        let mut values = table(group);
        for (b, out) in out.iter_mut().enumerate() {
            if many {
                group = self.group(4 * q + b);
                values = table(group);
            }
            let at = (4 * q + b) * 2 * BITS;
            let (words, shifts) = words::<BITS, FULL>(self.codes, at);
            *out = v.lookup(words, &shifts, values);
        }
        out
    }
}

/// Where the codes of 16 columns lie, of which byte `at` is the first: a word for the first eight in the lower half,
/// a word for the others in the upper half, and how far each code is shifted in its word.
#[inline(always)]
pub(crate) fn words<const BITS: usize, const FULL: bool>(codes: &[u8], at: usize) -> (u64, [u32; LANES]) {
    let shift = |i: usize, from: usize| (i * BITS - if i < 8 { 0 } else { from }) as u32;
    match BITS {
        4 => {
            let words = u64::from_le_bytes(bytes_at::<8, FULL>(codes, at));
            (words, std::array::from_fn(|i| shift(i, 32)))
        }
        3 => {
            // 48 bits; the second word begins at the 16th, so that the codes of columns 8 to 15 lie whole in it.
            let [a, b, c, d, e, f] = bytes_at::<6, FULL>(codes, at);
            let words = u64::from_le_bytes([a, b, c, d, c, d, e, f]);
            (words, std::array::from_fn(|i| shift(i, 16)))
        }
        _ => {
            let word = u64::from(u32::from_le_bytes(bytes_at::<4, FULL>(codes, at)));
            (word | word << 32, std::array::from_fn(|i| shift(i, 0)))
        }
    }
}

#[derive(Clone, Copy)]
pub(crate) struct CcqRows<'a> {
    ccq: &'a Ccq,
    codes: &'a [u8],
    locals: &'a [u8],
    k: usize,
}

pub(crate) struct CcqRow<'a> {
    codes: &'a [u8],
    locals: &'a [u8],
    channel: [f32; 3],
}

impl<'a> Rows for CcqRows<'a> {
    type Row = CcqRow<'a>;

    #[inline(always)]
    fn row(&self, n: usize) -> Self::Row {
        let bytes = self.k / wint2::VECTOR;
        CcqRow {
            codes: &self.codes[n * bytes..][..bytes],
            locals: &self.locals[n * self.ccq.local_bytes..][..self.ccq.local_bytes],
            channel: self.ccq.channels[n],
        }
    }
}

impl Row for CcqRow<'_> {
    #[inline(always)]
    fn quad<V: Vector, const FULL: bool>(&self, v: V, q: usize) -> [V::F; 4] {
        const { assert!(QUAD == wint2::GROUP) };
        let [super_scale, slope, offset] = self.channel;
        let shift = if q.is_multiple_of(2) {
            wint2::EVEN_GROUP_SHIFT
        } else {
            0
        };
        let local = (self.locals[q / 2] >> shift) & wint2::MAX_LOCAL;
        let scale = v.splat(f32::from(local) * super_scale);
        let bytes = v.load_codes(&bytes_at::<16, true>(self.codes, q * LANES));
        // Each step rounds by itself, as in the definition; codes are not negative, so whole parts are floors.
        let codes = v.add(v.mul(bytes, v.splat(slope)), v.splat(offset));
        let codes = v.add(codes, v.splat(0.5));
        let mut out = [scale; 4];
        for (b, out) in out.iter_mut().enumerate() {
            *out = v.mul(v.windows(codes, b), scale);
        }
        out
    }
}

/// Rows of f32 that lie every `stride` numbers.
#[derive(Clone, Copy)]
pub(crate) struct Strided<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) stride: usize,
    pub(crate) columns: usize,
}

impl<'a> Rows for Strided<'a> {
    type Row = &'a [f32];

    #[inline(always)]
    fn row(&self, n: usize) -> &'a [f32] {
        &self.data[n * self.stride..][..self.columns]
    }
}

impl Row for &[f32] {
    #[inline(always)]
    fn quad<V: Vector, const FULL: bool>(&self, v: V, q: usize) -> [V::F; 4] {
        let mut out = [v.splat(0.0); 4];
        for (b, out) in out.iter_mut().enumerate() {
            let at = (4 * q + b) * LANES;
            *out = if FULL {
                v.load(self[at..].first_chunk().expect("a whole quad"))
            } else {
                let rest = self.get(at..).unwrap_or_default();
                v.load_partial(&rest[..rest.len().min(LANES)], 0.0)
            };
        }
        out
    }
}
