//! A WINT2.5 weight: ten words a group of 64 columns and a super scale an output channel.
//!
//! ```text
//! value(n, k) = (window(n, k) - 4) * (local(n, k/64) * super_scale(n))
//! ```
//!
//! in `f32`, where every product is exact (3, 13 and 8 significant bits); see [`crate::packing::wint25`].

use std::ops::Range;

use half::bf16;

use super::check_len;
use crate::packing::wint25::{self, CODE_WORDS, GROUP, MAX_LOCAL, WORDS, ZERO_POINT};
use crate::scheme::{Family, ccq25};
use crate::{FormatError, Result};

/// See the module's text.
#[derive(Debug, Clone, PartialEq)]
pub struct Ccq25Weight {
    k: usize,
    /// (N, K/64 * 10)
    words: Vec<u16>,
    /// (N, K), what the words say: 0 to 7
    windows: Vec<u8>,
    /// (N)
    super_scales: Vec<bf16>,
}

impl Ccq25Weight {
    /// Joins words (N, K/64 * 10) and super scales (N). Fails when K is no positive multiple of 64, a length is
    /// wrong, or a super scale is not positive and finite. Every word has a meaning.
    pub fn new(k: usize, words: Vec<u16>, super_scales: Vec<bf16>) -> Result<Self> {
        let fault = |what, expected: String, got: String| Err(FormatError::Weight { what, expected, got });
        if k == 0 || !k.is_multiple_of(GROUP) {
            let expected = format!("a positive multiple of {GROUP}");
            return fault("input columns of WINT2.5", expected, k.to_string());
        }
        check_len("words", super_scales.len() * (k / GROUP) * WORDS, words.len())?;
        let unfit = |s: &&bf16| !(s.to_f32() > 0.0 && s.to_f32().is_finite());
        if let Some(scale) = super_scales.iter().find(unfit) {
            let expected = "a positive finite bf16 value".to_owned();
            return fault("super scale", expected, scale.to_string());
        }
        let groups = words.as_chunks::<WORDS>().0;
        let window = |w: i8| (w + ZERO_POINT) as u8;
        let windows = groups
            .iter()
            .flat_map(|group| wint25::weights(group).map(window))
            .collect();
        Ok(Self {
            k,
            words,
            windows,
            super_scales,
        })
    }

    /// N.
    pub fn n(&self) -> usize {
        self.super_scales.len()
    }

    /// K.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Integer weights plus 4, (N, K), each 0 to 7.
    pub fn windows(&self) -> &[u8] {
        &self.windows
    }

    /// The scales of row `n`, one per group of 64: local * super, exact. None for a row that is not there.
    pub fn group_scales(&self, n: usize) -> Vec<f32> {
        let width = self.k / GROUP * WORDS;
        let row = self.words.get(n * width..(n + 1) * width);
        let (Some(row), Some(scale)) = (row, self.super_scales.get(n)) else {
            return Vec::new();
        };
        row.iter()
            .skip(CODE_WORDS)
            .step_by(WORDS)
            .map(|word| f32::from(word & MAX_LOCAL) * scale.to_f32())
            .collect()
    }

    pub(super) fn dequantize_row(&self, n: usize, out: &mut [f32]) {
        let Some(windows) = self.windows.get(n * self.k..(n + 1) * self.k) else {
            return;
        };
        let scales = self.group_scales(n);
        let groups = out.chunks_mut(GROUP).zip(windows.chunks(GROUP)).zip(&scales);
        for ((out, windows), scale) in groups {
            for (out, w) in out.iter_mut().zip(windows) {
                *out = (f32::from(*w) - f32::from(ZERO_POINT)) * scale;
            }
        }
    }

    pub(super) fn rows(&self, rows: Range<usize>) -> Result<Self> {
        let width = self.k / GROUP * WORDS;
        let words = self.words.get(rows.start * width..rows.end * width);
        match (words, self.super_scales.get(rows.clone())) {
            (Some(words), Some(scales)) => Self::new(self.k, words.to_vec(), scales.to_vec()),
            _ => Err(FormatError::Weight {
                what: "rows",
                expected: format!("rows of 0..{}", self.n()),
                got: format!("{rows:?}"),
            }),
        }
    }

    /// Appends the rows of `other`, which has the same row length.
    pub(super) fn append(&mut self, other: &Self) {
        self.words.extend_from_slice(&other.words);
        self.windows.extend_from_slice(&other.windows);
        self.super_scales.extend_from_slice(&other.super_scales);
    }

    pub(super) fn encode(&self) -> Vec<Vec<u8>> {
        let words = self.words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let scales = self.super_scales.iter().flat_map(|s| s.to_le_bytes()).collect();
        vec![words, scales]
    }

    pub(super) fn decode(family: Family, n: usize, k: usize, bytes: &[&[u8]]) -> Result<Self> {
        let parts = ccq25::parts(family, n, k)?;
        check_len("stored tensors", parts.len(), bytes.len())?;
        for (part, bytes) in parts.iter().zip(bytes) {
            check_len("bytes of a stored tensor", part.bytes(), bytes.len())?;
        }
        let numbers = |bytes: Option<&&[u8]>| -> Vec<u16> {
            let pairs = bytes.map_or(&[][..], |bytes| bytes.as_chunks().0);
            pairs.iter().map(|pair| u16::from_le_bytes(*pair)).collect()
        };
        let scales = numbers(bytes.get(1));
        Self::new(
            k,
            numbers(bytes.first()),
            scales.into_iter().map(bf16::from_bits).collect(),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{QuantizedWeight, Scheme};

    fn weight() -> Ccq25Weight {
        let words = (0..3u32 * 20).map(|i| (i * 40503 + 977) as u16).collect();
        let scales = (0..3).map(|n| bf16::from_bits(0x3B00 + 16 * n)).collect();
        Ccq25Weight::new(128, words, scales).unwrap()
    }

    #[test]
    fn rounding_once_gives_the_unzip_operator() {
        let w = weight();
        let (mut values, mut unzipped) = (vec![0f32; 128], vec![bf16::ZERO; 128]);
        for n in 0..3 {
            w.dequantize_row(n, &mut values);
            wint25::decode_row(&w.words[n * 20..(n + 1) * 20], w.super_scales[n], &mut unzipped).unwrap();
            let rounded: Vec<bf16> = values.iter().map(|&v| bf16::from_f32(v)).collect();
            assert_eq!(rounded, unzipped);
            assert!(values.iter().any(|&v| v != 0.0));
        }
    }

    #[test]
    fn what_is_encoded_decodes_to_the_same_and_rows_stack() {
        let w = QuantizedWeight::Ccq25(weight());
        let parts = w.encode(&|_, _, _, _| Ok(())).unwrap();
        let forms = Scheme::Ccq25.parts(3, 128).unwrap();
        assert_eq!(forms.len(), parts.len());
        for (part, bytes) in forms.iter().zip(&parts) {
            assert_eq!(part.bytes(), bytes.len(), "{:?}", part.role);
        }
        let slices: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
        assert_eq!(
            QuantizedWeight::decode(Scheme::Ccq25, 3, 128, &slices).unwrap(),
            w
        );
        let halves = [w.rows(0..1).unwrap(), w.rows(1..3).unwrap()];
        assert_eq!(QuantizedWeight::stack(&halves), Some(w.clone()));
        assert!(w.rows(2..4).is_err());
        assert!(QuantizedWeight::decode(Scheme::Ccq25, 3, 192, &slices).is_err());
    }

    #[test]
    fn forbidden_numbers_are_refused() {
        for scale in [bf16::ZERO, bf16::NAN, bf16::INFINITY, bf16::from_f32(-1.0)] {
            let error = Ccq25Weight::new(64, vec![0; 10], vec![scale]).unwrap_err();
            assert!(error.to_string().contains("super scale"), "{error}");
        }
        assert!(Ccq25Weight::new(64, vec![0; 9], vec![bf16::ONE]).is_err());
        assert!(Ccq25Weight::new(96, vec![0; 15], vec![bf16::ONE]).is_err());
    }
}
