//! What a quantized weight means, apart from how its bytes are laid out.
//!
//! A [`Scheme`] answers four separate questions: how many bits a code has, which grid its codes
//! lie on, how weights are grouped along K, and in which type scales are stored. It can only be
//! built through checked constructors, so impossible combinations do not exist.

pub mod affine;
pub mod ccq;
pub mod ccq25;
pub mod dynamic_map;
pub mod family;
pub mod kquant;
pub mod nf4;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub use affine::{AffineScheme, Grid, Grouping};
pub use family::Family;
pub use kquant::KQuant;

use crate::dtype::Dtype;
use crate::packing;
use crate::{FormatError, Result};

/// The role of one stored tensor of a quantized weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Packed codes.
    Codes,
    /// One scale per group.
    Scales,
    /// Packed zero points, one per group.
    ZeroPoints,
    /// WINT2: packed 4-bit scales, one per group of 64. K types: packed scales of groups.
    LocalScales,
    /// WINT2: scale of each output channel. K types: what scales are multiplied with, one per super-block.
    SuperScales,
    /// WINT2: slope of byte to code, one per output channel.
    CodeScales,
    /// WINT2: offset of byte to code, one per output channel.
    CodeZeroPoints,
    /// Scales of scales: one per block of them, of the weight as a whole.
    NestedScales,
    /// What is added to every scale, one for the weight.
    Offset,
    /// K types: packed minima, one per group.
    LocalMins,
    /// K types: what minima are multiplied with, one per super-block.
    SuperMins,
}

impl Role {
    /// What is appended to the weight's name to name the stored tensor.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Codes => "codes",
            Self::Scales => "scales",
            Self::ZeroPoints => "zero_points",
            Self::LocalScales => "local_scales",
            Self::SuperScales => "super_scales",
            Self::CodeScales => "code_scales",
            Self::CodeZeroPoints => "code_zero_points",
            Self::NestedScales => "nested_scales",
            Self::Offset => "offset",
            Self::LocalMins => "local_mins",
            Self::SuperMins => "super_mins",
        }
    }
}

/// One stored tensor of a quantized weight. Its bytes are N rows of `row_bytes`, so blocks of rows
/// can be written one after the other; in a layout that interleaves rows, blocks of
/// [`Family::row_multiple`] rows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// What it holds.
    pub role: Role,
    /// Layout name, a key of [`crate::packing::PACKINGS`] or `"rows"` for plain elements.
    pub layout: &'static str,
    /// Bits per packed value; the dtype's width for plain elements.
    pub bits: u8,
    /// Element type of the stored tensor.
    pub dtype: Dtype,
    /// Dimensions as tagged in the file; (N, elements per row) unless the family says otherwise.
    pub shape: Vec<usize>,
    /// N; elements of a part that [is whole](Self::is_whole).
    pub rows: usize,
    /// Bytes of one row.
    pub row_bytes: usize,
    /// Whether the file holds the transpose, elements of all rows of one column together. Such a
    /// tensor is written when all its rows are there.
    pub by_columns: bool,
}

impl Part {
    /// A tensor (rows, width) whose rows lie one after the other.
    fn of_rows(
        role: Role,
        layout: &'static str,
        bits: u8,
        dtype: Dtype,
        (rows, width): (usize, usize),
    ) -> Self {
        Self {
            role,
            layout,
            bits,
            dtype,
            shape: vec![rows, width],
            rows,
            row_bytes: width * dtype.bitsize() / 8,
            by_columns: false,
        }
    }

    /// Bytes of the whole stored tensor.
    pub fn bytes(&self) -> usize {
        self.rows * self.row_bytes
    }

    /// Whether it belongs to the weight as a whole, so that its rows are not those of the weight.
    pub fn is_whole(&self) -> bool {
        self.layout == packing::WHOLE
    }

    /// The bytes of these rows of the weight, of which `bytes` are those of the whole stored tensor; of a part that
    /// [is whole](Self::is_whole) all of them. Empty when there are no such rows. Not for parts by columns.
    pub fn bytes_of<'a>(&self, bytes: &'a [u8], rows: std::ops::Range<usize>) -> &'a [u8] {
        if self.is_whole() {
            return bytes;
        }
        let range = rows.start * self.row_bytes..rows.end * self.row_bytes;
        bytes.get(range).unwrap_or_default()
    }

    /// The rows of the whole stored tensor as they lie in the file: turned when it lies by columns.
    pub fn laid_out(&self, rows: Vec<u8>) -> Vec<u8> {
        if !self.by_columns {
            return rows;
        }
        let width = (self.dtype.bitsize() / 8).max(1);
        let mut out = Vec::with_capacity(rows.len());
        for column in 0..self.row_bytes / width {
            let elements = rows.chunks_exact(width).skip(column);
            out.extend(elements.step_by((self.row_bytes / width).max(1)).flatten());
        }
        out
    }
}

/// A quantization scheme. One variant per way of giving codes a meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scheme {
    /// value = (code - zero point) * scale.
    Affine(AffineScheme),
    /// The 2-bit convolutional code, see [`ccq`].
    Ccq,
    /// The 2.5-bit convolutional code, see [`ccq25`].
    Ccq25,
    /// bitsandbytes' 4-bit NormalFloat, see [`nf4`].
    Nf4,
    /// The same with its scales quantized, see [`nf4`].
    Nf4Double,
    /// GGML's K types, see [`kquant`].
    K(KQuant),
}

impl Scheme {
    /// The stored tensors of a weight of `n` x `k` in our own form. Fails when the shape does not fit
    /// the scheme.
    pub fn parts(&self, n: usize, k: usize) -> Result<Vec<Part>> {
        self.parts_in(Family::Own, n, k)
    }

    /// The stored tensors of a weight of `n` x `k` in the forms of `family`. Fails when the family
    /// has no form for this scheme, or the shape does not fit.
    pub fn parts_in(&self, family: Family, n: usize, k: usize) -> Result<Vec<Part>> {
        match self {
            Self::Affine(scheme) => scheme.parts_in(family, n, k),
            Self::Ccq => ccq::parts(family, n, k),
            Self::Ccq25 => ccq25::parts(family, n, k),
            Self::Nf4 => nf4::parts(family, n, k),
            Self::Nf4Double => nf4::double_parts(family, n, k),
            Self::K(kind) => kind.parts(family, n, k),
        }
    }

    /// Bits per weight of a weight of `n` x `k`, with everything stored counted.
    pub fn bits_per_weight(&self, n: usize, k: usize) -> Result<f64> {
        let bytes: usize = self.parts(n, k)?.iter().map(Part::bytes).sum();
        Ok(bytes as f64 * 8.0 / (n as f64 * k as f64).max(1.0))
    }

    /// Bits of one code: of one weight in an affine scheme, in WINT2.5 and in NF4, of four weights in WINT2.
    pub fn bits(&self) -> u8 {
        match self {
            Self::Affine(scheme) => scheme.bits(),
            Self::Ccq => 8,
            Self::Ccq25 => 3,
            Self::Nf4 | Self::Nf4Double => 4,
            Self::K(kind) => kind.bits(),
        }
    }

    /// Smallest and largest code.
    pub fn code_range(&self) -> (u8, u8) {
        match self {
            Self::Affine(scheme) => scheme.code_range(),
            Self::Ccq => (0, u8::MAX),
            Self::Ccq25 => (0, 7),
            Self::Nf4 | Self::Nf4Double => (0, 15),
            Self::K(kind) => (0, (1 << kind.bits()) - 1),
        }
    }

    /// The formula that gives a weight's value, as written into the manifest.
    pub fn formula(&self) -> &'static str {
        match self {
            Self::Affine(_) => affine::FORMULA,
            Self::Ccq => ccq::FORMULA,
            Self::Ccq25 => ccq25::FORMULA,
            Self::Nf4 => nf4::FORMULA,
            Self::Nf4Double => &nf4::DOUBLE_FORMULA,
            Self::K(kind) => kind.formula(),
        }
    }

    /// The scheme with this name, e.g. `w4-sym-g64-bf16`.
    pub fn parse(name: &str) -> Result<Self> {
        let codes = [
            (ccq::NAME, Self::Ccq),
            (ccq25::NAME, Self::Ccq25),
            (nf4::NAME, Self::Nf4),
            (nf4::DOUBLE_NAME, Self::Nf4Double),
            (KQuant::Q2.name(), Self::K(KQuant::Q2)),
            (KQuant::Q4.name(), Self::K(KQuant::Q4)),
        ];
        if let Some((_, scheme)) = codes.into_iter().find(|(known, _)| *known == name) {
            return Ok(scheme);
        }
        AffineScheme::parse(name)
            .map(Self::Affine)
            .ok_or_else(|| FormatError::Scheme {
                got: name.to_owned(),
                expected: "expected a name such as w8-sym-row-bf16, w4-zp-g64-f16, wint2, wint2.5, nf4, nf4-dq, q4-k or q2-k"
                    .to_owned(),
            })
    }
}

/// Fails when rows of `k` columns are not groups of `group`, when there are none, or when sizes overflow.
fn whole_groups(scheme: &str, (n, k): (usize, usize), group: usize) -> Result<()> {
    let fits = n.checked_mul(k).and_then(|weights| weights.checked_mul(32));
    let reason = if n == 0 || k == 0 {
        "the weight is empty; keep it as it is".to_owned()
    } else if fits.is_none() {
        "its size overflows".to_owned()
    } else if !k.is_multiple_of(group) {
        format!("K = {k} is not a multiple of {group}; quantize it to 4 or 8 bits, or keep it")
    } else {
        return Ok(());
    };
    Err(FormatError::SchemeShape {
        scheme: scheme.to_owned(),
        n,
        k,
        reason,
    })
}

impl std::fmt::Display for Scheme {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Affine(scheme) => scheme.fmt(f),
            Self::Ccq => f.write_str(ccq::NAME),
            Self::Ccq25 => f.write_str(ccq25::NAME),
            Self::Nf4 => f.write_str(nf4::NAME),
            Self::Nf4Double => f.write_str(nf4::DOUBLE_NAME),
            Self::K(kind) => f.write_str(kind.name()),
        }
    }
}

impl Serialize for Scheme {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Scheme {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        Self::parse(&name).map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_become_columns() {
        let part = |dtype, shape: &[usize], row_bytes| Part {
            role: Role::Codes,
            layout: "columns",
            bits: 8,
            dtype,
            shape: shape.to_vec(),
            rows: 2,
            row_bytes,
            by_columns: true,
        };
        let bytes = part(Dtype::U8, &[3, 2], 3);
        assert_eq!(bytes.laid_out(vec![1, 2, 3, 4, 5, 6]), [1, 4, 2, 5, 3, 6]);
        let pairs = part(Dtype::BF16, &[2, 2], 4);
        assert_eq!(
            pairs.laid_out(vec![1, 2, 3, 4, 5, 6, 7, 8]),
            [1, 2, 5, 6, 3, 4, 7, 8]
        );
        let by_rows = Part {
            by_columns: false,
            ..bytes
        };
        assert_eq!(by_rows.laid_out(vec![1, 2, 3, 4, 5, 6]), [1, 2, 3, 4, 5, 6]);
    }
}
