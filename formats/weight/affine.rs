//! Codes of an affine scheme with their scales and zero points, and what they mean.

use std::ops::Range;

use super::{PackFn, check_len};
use crate::packing::{self, LSB_ROWS, Packing};
use crate::scheme::{AffineScheme, Family, Part, Role};
use crate::{FormatError, Result};

/// Codes of an affine scheme with their scales and, where the grid asks for them, zero points.
#[derive(Debug, Clone, PartialEq)]
pub struct AffineWeight {
    pub(super) scheme: AffineScheme,
    pub(super) n: usize,
    pub(super) k: usize,
    codes: Vec<u8>,
    scales: Vec<f32>,
    zeros: Vec<u8>,
}

impl AffineWeight {
    /// Joins codes (N, K), scales (N, G) and zero points (N, G; empty for a symmetric grid).
    ///
    /// Fails when a length is wrong, a code or zero point is outside the scheme's range, or a
    /// scale is not a positive finite value of the scheme's scale dtype.
    pub fn new(
        scheme: AffineScheme,
        n: usize,
        k: usize,
        codes: Vec<u8>,
        scales: Vec<f32>,
        zeros: Vec<u8>,
    ) -> Result<Self> {
        let this = Self::checked(scheme, n, k, (codes, scales, zeros), scheme.code_range())?;
        let dtype = scheme.scale_dtype();
        if let Some(scale) = this
            .scales
            .iter()
            .find(|&&s| !(s > 0.0 && s.is_finite() && dtype.round(s) == s))
        {
            return Err(FormatError::Weight {
                what: "scale",
                expected: format!("a positive finite {dtype} value"),
                got: scale.to_string(),
            });
        }
        Ok(this)
    }

    /// The same as others write it: codes may be all that the bits hold (code 0 of symmetric INT8), and scales may be
    /// negative or zero, as those of GGML's blocks are.
    ///
    /// Fails when a length is wrong, a code or zero point does not fit the bits, or a scale is not finite or no
    /// value of the scheme's scale dtype.
    pub fn foreign(
        scheme: AffineScheme,
        n: usize,
        k: usize,
        codes: Vec<u8>,
        scales: Vec<f32>,
        zeros: Vec<u8>,
    ) -> Result<Self> {
        let all = (0, ((1u16 << scheme.bits()) - 1) as u8);
        let this = Self::checked(scheme, n, k, (codes, scales, zeros), all)?;
        let dtype = scheme.scale_dtype();
        match this
            .scales
            .iter()
            .find(|&&s| !s.is_finite() || dtype.round(s) != s)
        {
            Some(scale) => Err(FormatError::Weight {
                what: "scale",
                expected: format!("a finite {dtype} value"),
                got: scale.to_string(),
            }),
            None => Ok(this),
        }
    }

    /// Lengths and ranges.
    fn checked(
        scheme: AffineScheme,
        n: usize,
        k: usize,
        (codes, scales, zeros): (Vec<u8>, Vec<f32>, Vec<u8>),
        (low, high): (u8, u8),
    ) -> Result<Self> {
        let groups = scheme.groups(n, k)?;
        let stored_zeros = if scheme.fixed_zero().is_none() {
            n * groups
        } else {
            0
        };
        check_len("codes", n * k, codes.len())?;
        check_len("scales", n * groups, scales.len())?;
        check_len("zero points", stored_zeros, zeros.len())?;
        for (what, values) in [("code", &codes), ("zero point", &zeros)] {
            let (min, max) = values
                .iter()
                .fold((high, low), |(min, max), &v| (min.min(v), max.max(v)));
            if min < low || max > high {
                let got = if min < low { min } else { max };
                return Err(FormatError::Weight {
                    what,
                    expected: format!("{low} to {high}"),
                    got: got.to_string(),
                });
            }
        }
        Ok(Self {
            scheme,
            n,
            k,
            codes,
            scales,
            zeros,
        })
    }

    /// (N, K).
    pub fn dims(&self) -> (usize, usize) {
        (self.n, self.k)
    }

    /// Its scheme.
    pub fn scheme(&self) -> AffineScheme {
        self.scheme
    }

    /// Scales, (N, G).
    pub fn scales(&self) -> &[f32] {
        &self.scales
    }

    /// Stored zero points, (N, G); empty for a symmetric grid.
    pub fn zeros(&self) -> &[u8] {
        &self.zeros
    }

    /// Codes, (N, K).
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    pub(super) fn dequantize_row(&self, n: usize, out: &mut [f32]) {
        let len = self.scheme.grouping().len(self.k).max(1);
        let groups = self.k / len;
        let codes = self.codes.get(n * self.k..(n + 1) * self.k).unwrap_or_default();
        let middle = i32::from(self.scheme.fixed_zero().unwrap_or(0));
        for (g, (codes, out)) in codes.chunks(len).zip(out.chunks_mut(len)).enumerate() {
            let at = n * groups + g;
            let scale = self.scales.get(at).copied().unwrap_or(0.0);
            let zero = self.zeros.get(at).map_or(middle, |&z| i32::from(z));
            for (out, code) in out.iter_mut().zip(codes) {
                *out = (i32::from(*code) - zero) as f32 * scale;
            }
        }
    }

    pub(super) fn rows(&self, rows: Range<usize>) -> Result<Self> {
        let groups = self.scales.len() / self.n.max(1);
        let zeros = self.zeros.len() / self.n.max(1);
        let cut = |row: usize| rows.start * row..rows.end * row;
        let (codes, scales, zeros) = (
            self.codes.get(cut(self.k)),
            self.scales.get(cut(groups)),
            self.zeros.get(cut(zeros)),
        );
        let (Some(codes), Some(scales), Some(zeros)) = (codes, scales, zeros) else {
            return Err(FormatError::Weight {
                what: "rows",
                expected: format!("rows of 0..{}", self.n),
                got: format!("{rows:?}"),
            });
        };
        Ok(Self {
            scheme: self.scheme,
            n: rows.len(),
            k: self.k,
            codes: codes.to_vec(),
            scales: scales.to_vec(),
            zeros: zeros.to_vec(),
        })
    }

    pub(super) fn encode(&self, family: Family, pack: PackFn<'_>) -> Result<Vec<Vec<u8>>> {
        let bits = self.scheme.bits();
        let encode = |part: &Part| {
            let mut bytes = Vec::with_capacity(part.bytes());
            match (part.role, packing::find(part.layout)) {
                (Role::Codes, Some(layout)) if layout.name() != LSB_ROWS.name() => {
                    layout.pack(bits, self.k, &self.codes, &mut bytes)?;
                }
                (Role::Codes, _) => pack(bits, self.k, &self.codes, &mut bytes)?,
                (Role::Scales, _) => {
                    let dtype = self.scheme.scale_dtype();
                    self.scales.iter().for_each(|&s| dtype.push(s, &mut bytes));
                }
                (_, _) => {
                    let groups = self.scheme.groups(self.n, self.k)?;
                    LSB_ROWS.pack(bits, groups, &self.zeros, &mut bytes)?;
                }
            }
            Ok(bytes)
        };
        let parts = self.scheme.parts_in(family, self.n, self.k)?;
        parts.iter().map(encode).collect()
    }

    pub(super) fn decode(
        family: Family,
        scheme: AffineScheme,
        n: usize,
        k: usize,
        bytes: &[&[u8]],
    ) -> Result<Self> {
        let parts = scheme.parts_in(family, n, k)?;
        check_len("stored tensors", parts.len(), bytes.len())?;
        let groups = scheme.groups(n, k)?;
        let (mut codes, mut scales, mut zeros) = (Vec::new(), Vec::new(), Vec::new());
        for (part, bytes) in parts.iter().zip(bytes) {
            check_len("bytes of a stored tensor", Part::bytes(part), bytes.len())?;
            match part.role {
                Role::Codes => {
                    let layout = packing::find(part.layout).unwrap_or(&LSB_ROWS);
                    layout.unpack(scheme.bits(), k, bytes, &mut codes)?;
                }
                Role::Scales => scales = scheme.scale_dtype().widen(bytes),
                _ => LSB_ROWS.unpack(scheme.bits(), groups, bytes, &mut zeros)?,
            }
        }
        Self::new(scheme, n, k, codes, scales, zeros)
    }

    /// Appends the rows of `other`, which has the same scheme and row length.
    pub(super) fn append(&mut self, other: &Self) {
        self.n += other.n;
        self.codes.extend_from_slice(&other.codes);
        self.scales.extend_from_slice(&other.scales);
        self.zeros.extend_from_slice(&other.zeros);
    }
}
