//! A WINT2 (CCQ) weight: code bytes, local scales, and the three numbers of each output channel.
//!
//! ```text
//! value(n, k) = window(code(byte(n, k/4)), k mod 4) * (local(n, k/64) * super_scale(n))
//! ```
//!
//! in `f32`, where every product is exact (6, 4 and 8 significant bits). Rounded once to BF16 it is
//! what FastDeploy's `winx_unzip` gives, see [`crate::packing::wint2`].

use std::ops::Range;

use half::bf16;

use super::check_len;
use crate::dtype::FloatDtype;
use crate::packing::wint2::{self, Arithmetic, Channel, GROUP, VECTOR};
use crate::scheme::{Family, Role, ccq};
use crate::{FormatError, Result};

/// See the module's text.
#[derive(Debug, Clone, PartialEq)]
pub struct CcqWeight {
    k: usize,
    /// (N, K/4)
    codes: Vec<u8>,
    /// (N, K/64), one per byte
    locals: Vec<u8>,
    /// (N)
    channels: Vec<Channel>,
}

impl CcqWeight {
    /// Joins code bytes (N, K/4), local scales (N, K/64, one per byte) and channels (N).
    ///
    /// Fails when K is no positive multiple of 64, a length is wrong, a local scale is above 15, a
    /// super scale is not positive and finite, or a channel's codes leave 15 bits.
    pub fn new(k: usize, codes: Vec<u8>, locals: Vec<u8>, channels: Vec<Channel>) -> Result<Self> {
        let (n, groups) = (channels.len(), wint2::groups(k)?);
        check_len("code bytes", n * (k / VECTOR), codes.len())?;
        check_len("local scales", n * groups, locals.len())?;
        let fault = |what, expected: String, got: String| Err(FormatError::Weight { what, expected, got });
        if let Some(local) = locals.iter().find(|&&local| local > wint2::MAX_LOCAL) {
            return fault(
                "local scale",
                format!("0 to {}", wint2::MAX_LOCAL),
                local.to_string(),
            );
        }
        for channel in &channels {
            let super_scale = channel.super_scale.to_f32();
            if !(super_scale > 0.0 && super_scale.is_finite()) {
                return fault(
                    "super scale",
                    "a positive finite bf16 value".to_owned(),
                    super_scale.to_string(),
                );
            }
            let ends = [0, u8::MAX].map(|b| Arithmetic::Unzip.code(b, channel.code_scale, channel.code_zp));
            let inside = |code: &i32| (0..=wint2::MAX_CODE).contains(code);
            let finite = channel.code_scale.is_finite() && channel.code_zp.is_finite();
            if !finite || !ends.iter().all(inside) {
                let got = format!("scale {} and zero point {}", channel.code_scale, channel.code_zp);
                return fault("code", format!("0 to {} for every byte", wint2::MAX_CODE), got);
            }
        }
        Ok(Self {
            k,
            codes,
            locals,
            channels,
        })
    }

    /// N.
    pub fn n(&self) -> usize {
        self.channels.len()
    }

    /// K.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Code bytes, (N, K/4).
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// Local scales, (N, K/64), one per byte.
    pub fn locals(&self) -> &[u8] {
        &self.locals
    }

    /// The numbers of each output channel, (N).
    pub fn channels(&self) -> &[Channel] {
        &self.channels
    }

    fn row(&self, n: usize) -> Option<(&[u8], &[u8], &Channel)> {
        let (bytes, groups) = (self.k / VECTOR, self.k / GROUP);
        let codes = self.codes.get(n * bytes..(n + 1) * bytes)?;
        let locals = self.locals.get(n * groups..(n + 1) * groups)?;
        Some((codes, locals, self.channels.get(n)?))
    }

    /// The scales of row `n`, one per group of 64: local * super, exact.
    pub fn group_scales(&self, n: usize) -> Vec<f32> {
        let row = self
            .row(n)
            .map(|(_, locals, channel)| (locals, channel.super_scale));
        let scales = row.map(|(locals, scale)| {
            locals
                .iter()
                .map(|&local| Arithmetic::Unzip.group_scale(local, scale))
                .collect()
        });
        scales.unwrap_or_default()
    }

    /// The integer weights of row `n` plus 32: 0 to 63, one per weight. Missing rows leave `out` as
    /// it is.
    pub fn windows(&self, n: usize, out: &mut [u8]) {
        let Some((codes, _, channel)) = self.row(n) else {
            return;
        };
        let book = wint2::codebook(channel.code_scale, channel.code_zp, Arithmetic::Unzip);
        for (code, out) in codes.iter().zip(out.chunks_mut(VECTOR)) {
            let word = book.get(usize::from(*code)).copied().unwrap_or_default();
            for (out, w) in out.iter_mut().zip(word) {
                *out = (i32::from(w) + wint2::ZERO_POINT) as u8;
            }
        }
    }

    /// Row `n` in bf16, every value as FastDeploy computes it by `arithmetic`, into `out` (K). Fails when
    /// there is no such row or `out` has another length.
    pub fn round_row(&self, n: usize, arithmetic: Arithmetic, out: &mut [bf16]) -> Result<()> {
        let Some((codes, locals, channel)) = self.row(n) else {
            return Err(FormatError::Weight {
                what: "row",
                expected: format!("one of 0..{}", self.n()),
                got: n.to_string(),
            });
        };
        wint2::decode_row(codes, &wint2::pack_locals(locals)?, *channel, arithmetic, out)
    }

    pub(super) fn dequantize_row(&self, n: usize, out: &mut [f32]) {
        let mut windows = vec![0u8; self.k];
        self.windows(n, &mut windows);
        let scales = self.group_scales(n);
        let groups = out.chunks_mut(GROUP).zip(windows.chunks(GROUP)).zip(&scales);
        for ((out, windows), scale) in groups {
            for (out, w) in out.iter_mut().zip(windows) {
                *out = (i32::from(*w) - wint2::ZERO_POINT) as f32 * scale;
            }
        }
    }

    pub(super) fn rows(&self, rows: Range<usize>) -> Result<Self> {
        let cut = |per_row: usize| rows.start * per_row..rows.end * per_row;
        let (codes, locals) = (
            self.codes.get(cut(self.k / VECTOR)),
            self.locals.get(cut(self.k / GROUP)),
        );
        match (codes, locals, self.channels.get(rows.clone())) {
            (Some(codes), Some(locals), Some(channels)) => Ok(Self {
                k: self.k,
                codes: codes.to_vec(),
                locals: locals.to_vec(),
                channels: channels.to_vec(),
            }),
            _ => Err(FormatError::Weight {
                what: "rows",
                expected: format!("rows of 0..{}", self.n()),
                got: format!("{rows:?}"),
            }),
        }
    }

    /// Appends the rows of `other`, which has the same row length.
    pub(super) fn append(&mut self, other: &Self) {
        self.codes.extend_from_slice(&other.codes);
        self.locals.extend_from_slice(&other.locals);
        self.channels.extend_from_slice(&other.channels);
    }

    /// Rows of every part, in the order of [`ccq::parts`]; the same for every family, because parts
    /// that lie by columns come row by row all the same.
    pub(super) fn encode(&self) -> Result<Vec<Vec<u8>>> {
        let groups = self.k / GROUP;
        let mut locals = Vec::with_capacity(self.n() * wint2::local_bytes(groups));
        for row in self.locals.chunks_exact(groups.max(1)) {
            locals.extend(wint2::pack_locals(row)?);
        }
        let f32s = |number: fn(&Channel) -> f32| {
            self.channels
                .iter()
                .flat_map(|c| number(c).to_le_bytes())
                .collect::<Vec<u8>>()
        };
        Ok(vec![
            self.codes.clone(),
            locals,
            self.channels
                .iter()
                .flat_map(|c| c.super_scale.to_le_bytes())
                .collect(),
            f32s(|c| c.code_scale),
            f32s(|c| c.code_zp),
        ])
    }

    pub(super) fn decode(family: Family, n: usize, k: usize, bytes: &[&[u8]]) -> Result<Self> {
        let parts = ccq::rows_of_parts(family, n, k)?;
        check_len("stored tensors", parts.len(), bytes.len())?;
        let groups = wint2::groups(k)?;
        let (mut codes, mut locals) = (Vec::new(), Vec::new());
        let (mut supers, mut slopes, mut offsets) = (Vec::new(), Vec::new(), Vec::new());
        for (part, bytes) in parts.iter().zip(bytes) {
            check_len("bytes of a stored tensor", part.bytes(), bytes.len())?;
            match part.role {
                Role::Codes => codes = bytes.to_vec(),
                Role::LocalScales => {
                    for row in bytes.chunks_exact(part.row_bytes.max(1)) {
                        locals.extend(wint2::unpack_locals(row, groups)?);
                    }
                }
                Role::SuperScales => {
                    supers = bytes
                        .as_chunks()
                        .0
                        .iter()
                        .map(|b| bf16::from_le_bytes(*b))
                        .collect();
                }
                Role::CodeScales => slopes = FloatDtype::F32.widen(bytes),
                _ => offsets = FloatDtype::F32.widen(bytes),
            }
        }
        let channels = supers.into_iter().zip(slopes).zip(offsets);
        let channel = |((super_scale, code_scale), code_zp)| Channel {
            super_scale,
            code_scale,
            code_zp,
        };
        Self::new(k, codes, locals, channels.map(channel).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{QuantizedWeight, Scheme};

    /// Three channels of 192 columns: an odd number of groups.
    fn weight() -> CcqWeight {
        let codes = (0..3 * 48).map(|i| (i * 37 + 11) as u8).collect();
        let locals = (0..9).map(|i| (i * 5 % 16) as u8).collect();
        let channel = |n: u16| Channel {
            super_scale: bf16::from_bits(0x3B00 + 16 * n),
            code_scale: 120.0,
            code_zp: 604.0 + f32::from(n),
        };
        CcqWeight::new(192, codes, locals, (0..3).map(channel).collect()).unwrap()
    }

    #[test]
    fn rounding_once_gives_the_unzip_operator() {
        let w = weight();
        let mut values = vec![0f32; 192];
        let mut unzipped = vec![bf16::ZERO; 192];
        let mut again = vec![bf16::ZERO; 192];
        for n in 0..3 {
            w.dequantize_row(n, &mut values);
            let locals = wint2::pack_locals(&w.locals[n * 3..n * 3 + 3]).unwrap();
            let codes = &w.codes[n * 48..(n + 1) * 48];
            wint2::decode_row(codes, &locals, w.channels[n], Arithmetic::Unzip, &mut unzipped).unwrap();
            let rounded: Vec<bf16> = values.iter().map(|&v| bf16::from_f32(v)).collect();
            assert_eq!(rounded, unzipped);
            w.round_row(n, Arithmetic::Unzip, &mut again).unwrap();
            assert_eq!(again, unzipped);
            assert!(values.iter().any(|&v| v != 0.0));
        }
        assert!(w.round_row(3, Arithmetic::Gemm, &mut again).is_err());
        assert!(w.round_row(0, Arithmetic::Gemm, &mut again[1..]).is_err());
    }

    #[test]
    fn what_is_encoded_decodes_to_the_same_and_rows_stack() {
        let w = QuantizedWeight::Ccq(weight());
        let parts = w.encode(&|_, _, _, _| Ok(())).unwrap();
        for (part, bytes) in Scheme::Ccq.parts(3, 192).unwrap().iter().zip(&parts) {
            assert_eq!(part.bytes(), bytes.len(), "{:?}", part.role);
        }
        let slices: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
        assert_eq!(QuantizedWeight::decode(Scheme::Ccq, 3, 192, &slices).unwrap(), w);
        let (top, rest) = (w.rows(0..1).unwrap(), w.rows(1..3).unwrap());
        assert_eq!(QuantizedWeight::stack(&[top, rest]), Some(w.clone()));
        assert!(w.rows(2..4).is_err());
    }

    #[test]
    fn forbidden_numbers_are_refused() {
        let w = weight();
        let with = |change: &dyn Fn(&mut CcqWeight)| {
            let mut w = w.clone();
            change(&mut w);
            CcqWeight::new(w.k, w.codes, w.locals, w.channels)
                .unwrap_err()
                .to_string()
        };
        assert!(with(&|w| w.locals[4] = 16).contains("0 to 15"));
        assert!(with(&|w| w.channels[1].super_scale = bf16::ZERO).contains("super scale"));
        assert!(with(&|w| w.channels[1].code_scale = 129.0).contains("0 to 32767"));
        assert!(with(&|w| w.channels[1].code_zp = f32::NAN).contains("0 to 32767"));
        assert!(with(&|w| w.codes.truncate(7)).contains("code bytes"));
        assert!(with(&|w| w.k = 100).contains("multiple of 64"));
    }
}
