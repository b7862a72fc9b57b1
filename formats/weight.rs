//! The neutral value every quantizer produces and every exporter lays out: codes one per byte,
//! scales, zero points. [`QuantizedWeight::dequantize_row`] is the single definition of what the
//! codes mean.

use std::ops::Range;

use crate::scheme::{Family, Scheme};
use crate::{FormatError, Result};

pub mod affine;
pub mod ccq;
pub mod ccq25;
pub mod kquant;
pub mod nested;
pub mod nf4;

pub use affine::AffineWeight;
pub use ccq::CcqWeight;
pub use ccq25::Ccq25Weight;
pub use kquant::KWeight;
pub use nf4::Nf4Weight;

/// A function with the contract of [`Packing::pack`](crate::packing::Packing::pack) of `lsb-rows`, so that a faster twin from the
/// floor above can stand in for it.
pub type PackFn<'a> = &'a dyn Fn(u8, usize, &[u8], &mut Vec<u8>) -> Result<()>;

/// A quantized matrix, or a block of its rows.
#[derive(Debug, Clone, PartialEq)]
pub enum QuantizedWeight {
    /// See [`AffineWeight`].
    Affine(AffineWeight),
    /// See [`CcqWeight`].
    Ccq(CcqWeight),
    /// See [`Ccq25Weight`].
    Ccq25(Ccq25Weight),
    /// See [`Nf4Weight`].
    Nf4(Nf4Weight),
    /// See [`KWeight`].
    K(KWeight),
}

impl QuantizedWeight {
    /// Its scheme.
    pub fn scheme(&self) -> Scheme {
        match self {
            Self::Affine(w) => Scheme::Affine(w.scheme),
            Self::Ccq(_) => Scheme::Ccq,
            Self::Ccq25(_) => Scheme::Ccq25,
            Self::Nf4(w) if w.nested().is_some() => Scheme::Nf4Double,
            Self::Nf4(_) => Scheme::Nf4,
            Self::K(w) => Scheme::K(w.kind()),
        }
    }

    /// (N, K).
    pub fn dims(&self) -> (usize, usize) {
        match self {
            Self::Affine(w) => (w.n, w.k),
            Self::Ccq(w) => (w.n(), w.k()),
            Self::Ccq25(w) => (w.n(), w.k()),
            Self::Nf4(w) => (w.n(), w.k()),
            Self::K(w) => (w.n(), w.k()),
        }
    }

    /// Writes the values of row `n` (K of them) to `out`. Rows out of range and an `out` that is
    /// not K long leave the surplus untouched.
    pub fn dequantize_row(&self, n: usize, out: &mut [f32]) {
        match self {
            Self::Affine(w) => w.dequantize_row(n, out),
            Self::Ccq(w) => w.dequantize_row(n, out),
            Self::Ccq25(w) => w.dequantize_row(n, out),
            Self::Nf4(w) => w.dequantize_row(n, out),
            Self::K(w) => w.dequantize_row(n, out),
        }
    }

    /// Codes, one per byte, (N, codes per row).
    pub fn codes(&self) -> &[u8] {
        match self {
            Self::Affine(w) => w.codes(),
            Self::Ccq(w) => w.codes(),
            Self::Ccq25(w) => w.windows(),
            Self::Nf4(w) => w.codes(),
            Self::K(w) => w.codes(),
        }
    }

    /// The bytes of each stored tensor of our own form, in the order of [`Scheme::parts`].
    pub fn encode(&self, pack: PackFn<'_>) -> Result<Vec<Vec<u8>>> {
        self.encode_in(Family::Own, pack)
    }

    /// The bytes of each stored tensor in the forms of `family`, in the order of
    /// [`Scheme::parts_in`]. `pack` is used for `lsb-rows` only. Parts that lie by columns come row by
    /// row all the same.
    pub fn encode_in(&self, family: Family, pack: PackFn<'_>) -> Result<Vec<Vec<u8>>> {
        match self {
            Self::Affine(w) => w.encode(family, pack),
            Self::Ccq(w) => w.encode(),
            Self::Ccq25(w) => Ok(w.encode()),
            Self::Nf4(w) => w.encode(pack),
            Self::K(w) => w.encode(pack),
        }
    }

    /// Rebuilds a weight from the bytes of its stored tensors, in the order of [`Scheme::parts`].
    pub fn decode(scheme: Scheme, n: usize, k: usize, parts: &[&[u8]]) -> Result<Self> {
        Self::decode_in(Family::Own, scheme, n, k, parts)
    }

    /// The reverse of [`encode_in`](Self::encode_in).
    pub fn decode_in(family: Family, scheme: Scheme, n: usize, k: usize, parts: &[&[u8]]) -> Result<Self> {
        Self::decode_rows(family, scheme, 0, (n, k), parts)
    }

    /// The `n` rows from `first_row` on of a weight with rows of `k`, from their bytes as [`Part::bytes_of`] cuts them.
    ///
    /// [`Part::bytes_of`]: crate::scheme::Part::bytes_of
    pub fn decode_rows(
        family: Family,
        scheme: Scheme,
        first_row: usize,
        (n, k): (usize, usize),
        parts: &[&[u8]],
    ) -> Result<Self> {
        match scheme {
            Scheme::Affine(scheme) => AffineWeight::decode(family, scheme, n, k, parts).map(Self::Affine),
            Scheme::Ccq => CcqWeight::decode(family, n, k, parts).map(Self::Ccq),
            Scheme::Ccq25 => Ccq25Weight::decode(family, n, k, parts).map(Self::Ccq25),
            Scheme::Nf4 => Nf4Weight::decode(family, n, k, parts).map(Self::Nf4),
            Scheme::K(kind) => KWeight::decode(kind, family, n, k, parts).map(Self::K),
            Scheme::Nf4Double => Nf4Weight::decode_double(family, first_row, (n, k), parts).map(Self::Nf4),
        }
    }

    /// The weight made of these of its rows. Fails when some are out of range.
    pub fn rows(&self, rows: Range<usize>) -> Result<Self> {
        match self {
            Self::Affine(w) => w.rows(rows).map(Self::Affine),
            Self::Ccq(w) => w.rows(rows).map(Self::Ccq),
            Self::Ccq25(w) => w.rows(rows).map(Self::Ccq25),
            Self::Nf4(w) => w.rows(rows).map(Self::Nf4),
            Self::K(w) => w.rows(rows).map(Self::K),
        }
    }

    /// One weight of the rows of all of `weights`, in order. `None` when there are none, or when
    /// their schemes or row lengths differ.
    pub fn stack(weights: &[Self]) -> Option<Self> {
        let (first, rest) = weights.split_first()?;
        let mut stacked = first.clone();
        for weight in rest {
            match (&mut stacked, weight) {
                (Self::Affine(a), Self::Affine(b)) if a.scheme == b.scheme && a.k == b.k => a.append(b),
                (Self::Ccq(a), Self::Ccq(b)) if a.k() == b.k() => a.append(b),
                (Self::Ccq25(a), Self::Ccq25(b)) if a.k() == b.k() => a.append(b),
                (Self::Nf4(a), Self::Nf4(b)) if a.takes(b) => a.append(b),
                (Self::K(a), Self::K(b)) if a.kind() == b.kind() && a.k() == b.k() => a.append(b),
                _ => return None,
            }
        }
        Some(stacked)
    }
}

fn check_len(what: &'static str, expected: usize, got: usize) -> Result<()> {
    if expected == got {
        return Ok(());
    }
    Err(FormatError::Weight {
        what,
        expected: format!("{expected} of them"),
        got: got.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packing::{LSB_ROWS, Packing};
    use crate::scheme::AffineScheme;

    fn scheme(name: &str) -> AffineScheme {
        AffineScheme::parse(name).unwrap()
    }

    #[test]
    fn values_by_hand() {
        let codes = [0u8, 8, 15, 9].repeat(8);
        let w = AffineWeight::new(scheme("w4-sym-g16-f32"), 2, 16, codes, vec![0.5, 2.0], vec![]).unwrap();
        let w = QuantizedWeight::Affine(w);
        let mut row = [0.0; 16];
        w.dequantize_row(0, &mut row);
        assert_eq!(row[..4], [-4.0, 0.0, 3.5, 0.5]);
        w.dequantize_row(1, &mut row);
        assert_eq!(row[..4], [-16.0, 0.0, 14.0, 2.0]);
    }

    #[test]
    fn what_is_encoded_decodes_to_the_same() {
        for name in [
            "w4-zp-g32-bf16",
            "w8-sym-row-f16",
            "w2-zp-g16-f32",
            "w3-sym-g32-f16",
        ] {
            let s = scheme(name);
            let (n, k) = (3, 96);
            let groups = s.groups(n, k).unwrap();
            let (low, high) = s.code_range();
            let span = u32::from(high - low) + 1;
            let codes = (0..n * k).map(|i| low + (i as u32 * 7 % span) as u8).collect();
            let scales = (0..n * groups).map(|i| 0.25 + i as f32).collect();
            let zeros = if s.fixed_zero().is_none() {
                vec![low + 1; n * groups]
            } else {
                vec![]
            };
            let w = QuantizedWeight::Affine(AffineWeight::new(s, n, k, codes, scales, zeros).unwrap());
            let parts = w.encode(&|b, k, c, o| LSB_ROWS.pack(b, k, c, o)).unwrap();
            for (part, bytes) in w.scheme().parts(n, k).unwrap().iter().zip(&parts) {
                assert_eq!(part.bytes(), bytes.len(), "{name} {:?}", part.role);
            }
            let slices: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
            assert_eq!(QuantizedWeight::decode(w.scheme(), n, k, &slices).unwrap(), w);
        }
    }

    #[test]
    fn other_families_hold_the_same_codes() {
        for name in ["w8-sym-row-bf16", "w4-narrow-row-bf16"] {
            let s = scheme(name);
            let (n, k, (low, high)) = (32, 128, s.code_range());
            let span = usize::from(high - low) + 1;
            let codes = (0..n * k).map(|i| low + (i * 7 % span) as u8).collect();
            let scales = (0..n).map(|i| 0.25 * (i + 1) as f32).collect();
            let w = QuantizedWeight::Affine(AffineWeight::new(s, n, k, codes, scales, vec![]).unwrap());
            let pack = |b: u8, k: usize, c: &[u8], o: &mut Vec<u8>| LSB_ROWS.pack(b, k, c, o);
            let parts = w.encode_in(Family::FastDeploy, &pack).unwrap();
            let slices: Vec<&[u8]> = parts.iter().map(Vec::as_slice).collect();
            let back = QuantizedWeight::decode_in(Family::FastDeploy, w.scheme(), n, k, &slices).unwrap();
            assert_eq!(back, w);
            assert_ne!(parts[0], w.encode(&pack).unwrap()[0]);
            let halves = [w.rows(0..16).unwrap(), w.rows(16..32).unwrap()];
            assert_eq!(QuantizedWeight::stack(&halves), Some(w.clone()));
            assert!(w.rows(16..33).is_err());
        }
    }

    #[test]
    fn forbidden_values_are_refused() {
        let s = scheme("w8-sym-row-bf16");
        let new = |codes: Vec<u8>, scales: Vec<f32>| AffineWeight::new(s, 1, 2, codes, scales, vec![]);
        assert!(new(vec![1, 255], vec![1.0]).is_ok());
        for bad in [
            new(vec![0, 1], vec![1.0]),
            new(vec![1], vec![1.0]),
            new(vec![1, 1], vec![]),
        ] {
            assert!(bad.is_err());
        }
        for scale in [0.0, -1.0, f32::NAN, f32::INFINITY, 1.000001] {
            assert!(new(vec![1, 1], vec![scale]).is_err(), "{scale}");
        }
    }
}
