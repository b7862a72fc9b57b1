//! An NF4 weight: a code for each column and a scale for each 64; see [`crate::scheme::nf4`].
//!
//! `value(n, k) = LEVELS[code(n, k)] * scale(n, k/64)` in `f32`, rounded once. Scales are numbers of their own, or decoded
//! from [`NestedScales`].

use std::ops::Range;
use std::sync::Arc;

use super::nested::{Nested, NestedScales};
use super::{PackFn, check_len};
use crate::dtype::FloatDtype;
use crate::packing::{LSB_ROWS, Packing};
use crate::scheme::nf4::{GROUP, LEVELS, double_parts, parts};
use crate::scheme::{Family, Part};
use crate::{FormatError, Result};

/// See the module's text.
#[derive(Debug, Clone, PartialEq)]
pub struct Nf4Weight {
    n: usize,
    k: usize,
    /// (N, K), 0 to 15
    codes: Vec<u8>,
    /// (N, K/64)
    scales: Vec<f32>,
    /// What the scales are decoded from, under double quantization.
    nested: Option<NestedScales>,
}

impl Nf4Weight {
    /// Joins codes (N, K) and scales (N, K/64). Fails when the shape does not fit the scheme, a length is wrong, a code
    /// is beyond 15, or a scale is negative or not finite. A scale of zero is that of 64 zeros.
    pub fn new(n: usize, k: usize, codes: Vec<u8>, scales: Vec<f32>) -> Result<Self> {
        if let Some(scale) = scales.iter().find(|s| !(**s >= 0.0 && s.is_finite())) {
            return Err(FormatError::Weight {
                what: "scale",
                expected: "a finite value not below zero".to_owned(),
                got: scale.to_string(),
            });
        }
        Self::with_scales(n, k, codes, scales, None)
    }

    /// The same with quantized scales, N * K/64 of them. A decoded scale may be below zero.
    pub fn double(n: usize, k: usize, codes: Vec<u8>, scales: NestedScales) -> Result<Self> {
        Self::with_scales(n, k, codes, scales.values()?, Some(scales))
    }

    fn with_scales(
        n: usize,
        k: usize,
        codes: Vec<u8>,
        scales: Vec<f32>,
        nested: Option<NestedScales>,
    ) -> Result<Self> {
        parts(Family::Own, n, k)?;
        check_len("codes", n * k, codes.len())?;
        check_len("scales", n * (k / GROUP), scales.len())?;
        if let Some(code) = codes.iter().find(|code| **code > 15) {
            return Err(FormatError::Weight {
                what: "code",
                expected: "0 to 15".to_owned(),
                got: code.to_string(),
            });
        }
        Ok(Self {
            n,
            k,
            codes,
            scales,
            nested,
        })
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

    /// Scales, (N, K/64).
    pub fn scales(&self) -> &[f32] {
        &self.scales
    }

    /// What the scales are decoded from; `None` when they are numbers of their own.
    pub fn nested(&self) -> Option<&NestedScales> {
        self.nested.as_ref()
    }

    pub(super) fn dequantize_row(&self, n: usize, out: &mut [f32]) {
        let codes = self.codes.get(n * self.k..(n + 1) * self.k).unwrap_or_default();
        let groups = self.k / GROUP;
        let scales = self.scales.get(n * groups..(n + 1) * groups).unwrap_or_default();
        let runs = codes.chunks(GROUP).zip(out.chunks_mut(GROUP)).zip(scales);
        for ((codes, out), scale) in runs {
            for (out, code) in out.iter_mut().zip(codes) {
                *out = LEVELS.get(usize::from(*code)).copied().unwrap_or(0.0) * scale;
            }
        }
    }

    pub(super) fn rows(&self, rows: Range<usize>) -> Result<Self> {
        let groups = self.k / GROUP;
        let codes = self.codes.get(rows.start * self.k..rows.end * self.k);
        let scales = self.scales.get(rows.start * groups..rows.end * groups);
        match (codes, scales) {
            (Some(codes), Some(scales)) => Self::with_scales(
                rows.len(),
                self.k,
                codes.to_vec(),
                scales.to_vec(),
                self.nested
                    .as_ref()
                    .map(|nested| nested.cut(rows.start * groups..rows.end * groups)),
            ),
            _ => Err(FormatError::Weight {
                what: "rows",
                expected: format!("rows of 0..{}", self.n),
                got: format!("{rows:?}"),
            }),
        }
    }

    /// Whether the rows of `other` can be appended: of the same length, and with scales that go on where these end.
    pub(super) fn takes(&self, other: &Self) -> bool {
        self.k == other.k
            && match (&self.nested, &other.nested) {
                (None, None) => true,
                (Some(this), Some(next)) => this.is_followed_by(next),
                _ => false,
            }
    }

    /// Appends the rows of `other`, which [it takes](Self::takes).
    pub(super) fn append(&mut self, other: &Self) {
        if let (Some(this), Some(next)) = (&mut self.nested, &other.nested) {
            this.append(next);
        }
        self.n += other.n;
        self.codes.extend_from_slice(&other.codes);
        self.scales.extend_from_slice(&other.scales);
    }

    pub(super) fn encode(&self, pack: PackFn<'_>) -> Result<Vec<Vec<u8>>> {
        let mut codes = Vec::with_capacity(self.codes.len() / 2);
        pack(4, self.k, &self.codes, &mut codes)?;
        if let Some(nested) = &self.nested {
            return Ok(std::iter::once(codes).chain(nested.encode()).collect());
        }
        let scales = self.scales.iter().flat_map(|s| s.to_le_bytes()).collect();
        Ok(vec![codes, scales])
    }

    pub(super) fn decode(family: Family, n: usize, k: usize, bytes: &[&[u8]]) -> Result<Self> {
        let (codes, scales) = split(&parts(family, n, k)?, n, k, bytes)?;
        Self::new(n, k, codes, FloatDtype::F32.widen(scales))
    }

    /// Rows `first_row..first_row + n` of a weight: their codes and codes of scales, and what belongs to all of it.
    pub(super) fn decode_double(
        family: Family,
        first_row: usize,
        (n, k): (usize, usize),
        bytes: &[&[u8]],
    ) -> Result<Self> {
        let forms = double_parts(family, n, k)?;
        let (codes, scales) = split(&forms, n, k, bytes)?;
        let of = |index: usize| FloatDtype::F32.widen(bytes.get(index).copied().unwrap_or_default());
        let (nested, offset) = (of(2), of(3));
        check_len("offsets", 1, offset.len())?;
        let nested = Nested::new(nested, offset.first().copied().unwrap_or(0.0))?;
        let scales = NestedScales::new(first_row * (k / GROUP), scales.to_vec(), Arc::new(nested))?;
        Self::double(n, k, codes, scales)
    }
}

/// Codes, and the bytes of the scales, of the stored tensors `bytes` of `n` rows.
fn split<'a>(forms: &[Part], n: usize, k: usize, bytes: &[&'a [u8]]) -> Result<(Vec<u8>, &'a [u8])> {
    check_len("stored tensors", forms.len(), bytes.len())?;
    for (form, bytes) in forms.iter().zip(bytes).filter(|(form, _)| !form.is_whole()) {
        check_len("bytes of a stored tensor", form.bytes(), bytes.len())?;
    }
    let of = |index: usize| bytes.get(index).copied().unwrap_or_default();
    let mut codes = Vec::with_capacity(n * k);
    LSB_ROWS.unpack(4, k, of(0), &mut codes)?;
    Ok((codes, of(1)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{QuantizedWeight, Scheme};

    fn weight() -> Nf4Weight {
        let codes = (0..3 * 128).map(|i| (i * 7 % 16) as u8).collect();
        Nf4Weight::new(3, 128, codes, vec![0.5, 1.0, 2.0, 0.0, 0.25, 8.0]).unwrap()
    }

    #[test]
    fn values_by_hand() {
        let mut row = [f32::NAN; 128];
        weight().dequantize_row(1, &mut row);
        // Row 1 begins with code 128 * 7 % 16 = 0, then 7, then 14.
        assert_eq!(row[..3], [-2.0, 0.0, 2.0 * LEVELS[14]]);
        assert_eq!(row[64..], [0.0; 64], "a scale of zero");
    }

    #[test]
    fn what_is_encoded_decodes_to_the_same_and_rows_stack() {
        let w = QuantizedWeight::Nf4(weight());
        let parts = w.encode(&|b, k, c, o| LSB_ROWS.pack(b, k, c, o)).unwrap();
        let slices: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
        assert_eq!(QuantizedWeight::decode(Scheme::Nf4, 3, 128, &slices).unwrap(), w);
        let halves = [w.rows(0..1).unwrap(), w.rows(1..3).unwrap()];
        assert_eq!(QuantizedWeight::stack(&halves), Some(w.clone()));
        assert!(w.rows(2..4).is_err());
    }

    #[test]
    fn double_quantized_rows_decode_where_they_lie() {
        let (n, k) = (300, 64);
        let codes = (0..n * k).map(|i| (i * 7 % 16) as u8).collect();
        let nested = Arc::new(Nested::new(vec![0.25, 1.0], 2.0).unwrap());
        let scales = (0..n).map(|i| (i * 11 % 256) as u8).collect();
        let scales = NestedScales::new(0, scales, nested).unwrap();
        let w = QuantizedWeight::Nf4(Nf4Weight::double(n, k, codes, scales).unwrap());
        assert_eq!(w.scheme(), Scheme::Nf4Double);
        let parts = w.encode(&|b, k, c, o| LSB_ROWS.pack(b, k, c, o)).unwrap();
        let forms = w.scheme().parts(n, k).unwrap();
        for (form, bytes) in forms.iter().zip(&parts) {
            assert_eq!(form.bytes(), bytes.len(), "{:?}", form.role);
        }
        let slices = |rows: Range<usize>| -> Vec<&[u8]> {
            let all = forms.iter().zip(&parts);
            all.map(|(form, bytes)| form.bytes_of(bytes, rows.clone()))
                .collect()
        };
        assert_eq!(
            QuantizedWeight::decode(w.scheme(), n, k, &slices(0..n)).unwrap(),
            w
        );
        let some =
            QuantizedWeight::decode_rows(Family::Own, w.scheme(), 250, (20, k), &slices(250..270)).unwrap();
        assert_eq!(some, w.rows(250..270).unwrap());
        let halves = [w.rows(0..255).unwrap(), w.rows(255..n).unwrap()];
        assert_eq!(QuantizedWeight::stack(&halves), Some(w.clone()));
        assert_eq!(
            QuantizedWeight::stack(&[halves[1].clone(), halves[0].clone()]),
            None
        );
    }

    #[test]
    fn forbidden_numbers_are_refused() {
        let new = |code: u8, scale: f32| Nf4Weight::new(1, 64, vec![code; 64], vec![scale]);
        assert!(new(15, 1.0).is_ok());
        for (code, scale) in [(16, 1.0), (0, -1.0), (0, f32::NAN), (0, f32::INFINITY)] {
            assert!(new(code, scale).is_err(), "{code} {scale}");
        }
    }
}
