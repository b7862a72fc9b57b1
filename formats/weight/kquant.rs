//! A weight of GGML's K types: codes, a scale and a minimum of few bits for each group, two F16 numbers for each 256 columns;
//! see [`crate::scheme::kquant`].
//!
//! `value(n, k) = (d * s) * code - dmin * m` in `f32`, every product and the difference rounded.

use std::ops::Range;

use half::f16;

use super::{PackFn, check_len};
use crate::dtype::FloatDtype;
use crate::packing::{LSB_ROWS, Packing};
use crate::scheme::kquant::{KQuant, SUPER_BLOCK};
use crate::scheme::{Family, Part};
use crate::{FormatError, Result};

/// Numbers of a weight besides its codes; G groups and S super-blocks to a row.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct KScales {
    /// (N, G), of 6 or 4 bits.
    pub scales: Vec<u8>,
    /// (N, G), likewise.
    pub mins: Vec<u8>,
    /// (N, S): what scales are multiplied with.
    pub super_scales: Vec<f16>,
    /// (N, S): what minima are multiplied with.
    pub super_mins: Vec<f16>,
}

/// See the module's text.
#[derive(Debug, Clone, PartialEq)]
pub struct KWeight {
    kind: KQuant,
    n: usize,
    k: usize,
    /// (N, K)
    codes: Vec<u8>,
    numbers: KScales,
}

impl KWeight {
    /// Joins codes (N, K) and scales. Fails when the shape does not fit the scheme, a length is wrong, a number is beyond
    /// its bits, or an F16 number is not finite. They may be negative.
    pub fn new(kind: KQuant, n: usize, k: usize, codes: Vec<u8>, numbers: KScales) -> Result<Self> {
        kind.parts(Family::Own, n, k)?;
        let (groups, blocks) = (n * (k / kind.group()), n * (k / SUPER_BLOCK));
        check_len("codes", n * k, codes.len())?;
        check_len("scales of groups", groups, numbers.scales.len())?;
        check_len("minima of groups", groups, numbers.mins.len())?;
        check_len("super scales", blocks, numbers.super_scales.len())?;
        check_len("super minima", blocks, numbers.super_mins.len())?;
        for (what, values, bits) in [
            ("code", &codes, kind.bits()),
            ("scale of a group", &numbers.scales, kind.scale_bits()),
            ("minimum of a group", &numbers.mins, kind.scale_bits()),
        ] {
            if let Some(value) = values.iter().find(|v| **v >> bits != 0) {
                return Err(FormatError::Weight {
                    what,
                    expected: format!("0 to {}", (1u16 << bits) - 1),
                    got: value.to_string(),
                });
            }
        }
        let mut halves = numbers.super_scales.iter().chain(&numbers.super_mins);
        if let Some(value) = halves.find(|v| !v.is_finite()) {
            return Err(FormatError::Weight {
                what: "super scale",
                expected: "a finite value".to_owned(),
                got: value.to_string(),
            });
        }
        Ok(Self {
            kind,
            n,
            k,
            codes,
            numbers,
        })
    }

    /// Which of the types.
    pub fn kind(&self) -> KQuant {
        self.kind
    }

    /// N.
    pub fn n(&self) -> usize {
        self.n
    }

    /// K.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Codes, (N, K).
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// Everything else.
    pub fn numbers(&self) -> &KScales {
        &self.numbers
    }

    /// What the codes of group `index` (of all rows' groups) are multiplied with, and what is taken off.
    pub fn group(&self, index: usize) -> (f32, f32) {
        let block = index / (SUPER_BLOCK / self.kind.group());
        let half = |values: &[f16]| values.get(block).map_or(0.0, |v| v.to_f32());
        let local = |values: &[u8]| values.get(index).map_or(0.0, |v| f32::from(*v));
        (
            half(&self.numbers.super_scales) * local(&self.numbers.scales),
            half(&self.numbers.super_mins) * local(&self.numbers.mins),
        )
    }

    pub(super) fn dequantize_row(&self, n: usize, out: &mut [f32]) {
        let codes = self.codes.get(n * self.k..(n + 1) * self.k).unwrap_or_default();
        let group = self.kind.group();
        let first = n * (self.k / group);
        for (g, (codes, out)) in codes.chunks(group).zip(out.chunks_mut(group)).enumerate() {
            let (scale, min) = self.group(first + g);
            for (out, code) in out.iter_mut().zip(codes) {
                *out = scale * f32::from(*code) - min;
            }
        }
    }

    pub(super) fn rows(&self, rows: Range<usize>) -> Result<Self> {
        if rows.end > self.n || rows.start > rows.end {
            return Err(FormatError::Weight {
                what: "rows",
                expected: format!("rows of 0..{}", self.n),
                got: format!("{rows:?}"),
            });
        }
        fn cut<T: Copy>(values: &[T], rows: &Range<usize>, width: usize) -> Vec<T> {
            let range = rows.start * width..rows.end * width;
            values.get(range).unwrap_or_default().to_vec()
        }
        let (groups, blocks) = (self.k / self.kind.group(), self.k / SUPER_BLOCK);
        let numbers = KScales {
            scales: cut(&self.numbers.scales, &rows, groups),
            mins: cut(&self.numbers.mins, &rows, groups),
            super_scales: cut(&self.numbers.super_scales, &rows, blocks),
            super_mins: cut(&self.numbers.super_mins, &rows, blocks),
        };
        let codes = cut(&self.codes, &rows, self.k);
        Self::new(self.kind, rows.len(), self.k, codes, numbers)
    }

    /// Appends the rows of `other`, which has the same kind and row length.
    pub(super) fn append(&mut self, other: &Self) {
        self.n += other.n;
        self.codes.extend_from_slice(&other.codes);
        let (to, from) = (&mut self.numbers, &other.numbers);
        to.scales.extend_from_slice(&from.scales);
        to.mins.extend_from_slice(&from.mins);
        to.super_scales.extend_from_slice(&from.super_scales);
        to.super_mins.extend_from_slice(&from.super_mins);
    }

    pub(super) fn encode(&self, pack: PackFn<'_>) -> Result<Vec<Vec<u8>>> {
        let packed = |bits, count, values: &[u8]| -> Result<Vec<u8>> {
            let mut out = Vec::new();
            pack(bits, count, values, &mut out)?;
            Ok(out)
        };
        let halves = |values: &[f16]| values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let (groups, bits) = (self.k / self.kind.group(), self.kind.scale_bits());
        Ok(vec![
            packed(self.kind.bits(), self.k, &self.codes)?,
            packed(bits, groups, &self.numbers.scales)?,
            packed(bits, groups, &self.numbers.mins)?,
            halves(&self.numbers.super_scales),
            halves(&self.numbers.super_mins),
        ])
    }

    pub(super) fn decode(kind: KQuant, family: Family, n: usize, k: usize, bytes: &[&[u8]]) -> Result<Self> {
        let forms = kind.parts(family, n, k)?;
        check_len("stored tensors", forms.len(), bytes.len())?;
        for (form, bytes) in forms.iter().zip(bytes) {
            check_len("bytes of a stored tensor", Part::bytes(form), bytes.len())?;
        }
        let of = |index: usize| bytes.get(index).copied().unwrap_or_default();
        let unpacked = |bits, count, index| -> Result<Vec<u8>> {
            let mut out = Vec::with_capacity(n * count);
            LSB_ROWS.unpack(bits, count, of(index), &mut out)?;
            Ok(out)
        };
        let halves = |index| FloatDtype::F16.widen(of(index)).into_iter().map(f16::from_f32);
        let (groups, bits) = (k / kind.group(), kind.scale_bits());
        let numbers = KScales {
            scales: unpacked(bits, groups, 1)?,
            mins: unpacked(bits, groups, 2)?,
            super_scales: halves(3).collect(),
            super_mins: halves(4).collect(),
        };
        Self::new(kind, n, k, unpacked(kind.bits(), k, 0)?, numbers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{QuantizedWeight, Scheme};

    fn weight(kind: KQuant, n: usize, k: usize) -> KWeight {
        let many = |count: usize, step: usize, bits: u8| -> Vec<u8> {
            (0..count).map(|i| (i * step % (1 << bits)) as u8).collect()
        };
        let (groups, blocks) = (n * k / kind.group(), n * k / SUPER_BLOCK);
        let numbers = KScales {
            scales: many(groups, 7, kind.scale_bits()),
            mins: many(groups, 5, kind.scale_bits()),
            super_scales: (0..blocks)
                .map(|i| f16::from_f32(0.25 * (i + 1) as f32))
                .collect(),
            super_mins: (0..blocks).map(|i| f16::from_f32(0.5 * i as f32)).collect(),
        };
        KWeight::new(kind, n, k, many(n * k, 3, kind.bits()), numbers).unwrap()
    }

    #[test]
    fn values_by_hand() {
        let w = weight(KQuant::Q4, 2, 256);
        let mut row = [f32::NAN; 256];
        w.dequantize_row(1, &mut row);
        // Group 8 has scale 56, minimum 40 and codes 0, 3, 6 ..; the second super-block 0.5 for both.
        assert_eq!(row[..3], [-20.0, 64.0, 148.0]);
        let w = weight(KQuant::Q2, 1, 256);
        w.dequantize_row(0, &mut row);
        // Group 1 has scale 7, the super-block 0.25 and no minima; codes are 0, 3, 2, 1 and again.
        assert_eq!(row[16..20], [0.0, 5.25, 3.5, 1.75]);
    }

    #[test]
    fn what_is_encoded_decodes_to_the_same_and_rows_stack() {
        for kind in KQuant::ALL {
            let w = QuantizedWeight::K(weight(kind, 3, 512));
            let parts = w.encode(&|b, k, c, o| LSB_ROWS.pack(b, k, c, o)).unwrap();
            let slices: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
            assert_eq!(
                QuantizedWeight::decode(Scheme::K(kind), 3, 512, &slices).unwrap(),
                w
            );
            let halves = [w.rows(0..1).unwrap(), w.rows(1..3).unwrap()];
            assert_eq!(QuantizedWeight::stack(&halves), Some(w.clone()));
            assert!(w.rows(2..4).is_err());
        }
    }

    #[test]
    fn forbidden_numbers_are_refused() {
        let good = weight(KQuant::Q2, 1, 256);
        let with = |change: &dyn Fn(&mut KScales)| {
            let mut numbers = good.numbers.clone();
            change(&mut numbers);
            KWeight::new(KQuant::Q2, 1, 256, good.codes.clone(), numbers)
        };
        assert!(with(&|_| {}).is_ok());
        assert!(with(&|n| n.scales[0] = 16).is_err());
        assert!(with(&|n| n.mins[15] = 255).is_err());
        assert!(with(&|n| n.super_mins[0] = f16::INFINITY).is_err());
        assert!(with(&|n| n.super_scales.clear()).is_err());
        assert!(KWeight::new(KQuant::Q2, 1, 256, vec![4; 256], good.numbers.clone()).is_err());
    }
}
