//! The affine family: one code per weight, one scale per group, and a zero point that is either
//! fixed at the middle code (symmetric) or stored per group.
//!
//! ```text
//! value(n, k) = (code(n, k) - zero) * scale(n, g)      g = k / group, zero = 2^(bits-1) or zero(n, g)
//! ```
//!
//! The product is one `f32` multiplication, rounded once; the difference is an exact integer.
//!
//! Names: `w{bits}-{sym|zp}-{row|g<len>}-{scale dtype}`, e.g. `w4-sym-g64-bf16`.

use super::{Part, Role};
use crate::dtype::{Dtype, FloatDtype};
use crate::packing::{LSB_ROWS, Packing};
use crate::{FormatError, Result};

/// The meaning of an affine code, as written into the manifest.
pub const FORMULA: &str =
    "value[n][k] = (code[n][k] - zero_point[n][k / group]) * scale[n][k / group], in f32";

/// Group lengths that exist; a multiple of 16 keeps groups on vector boundaries.
const GROUP_LENGTHS: [usize; 6] = [16, 32, 64, 128, 256, 512];

/// Where the zero of the grid lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Grid {
    /// At the middle code 2^(bits-1).
    Symmetric,
    /// At a stored code, one per group.
    ZeroPoint,
}

/// Which weights of a row share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Grouping {
    /// The whole row (per output channel).
    Row,
    /// Runs of this many columns.
    Columns(usize),
}

impl Grouping {
    /// Columns per group in a row of `k`.
    pub fn len(self, k: usize) -> usize {
        match self {
            Self::Row => k,
            Self::Columns(len) => len,
        }
    }
}

impl std::fmt::Display for Grouping {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Row => f.write_str("row"),
            Self::Columns(len) => write!(f, "g{len}"),
        }
    }
}

/// An affine scheme. Fields are private: see [`AffineScheme::new`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct AffineScheme {
    bits: u8,
    grid: Grid,
    grouping: Grouping,
    scale: FloatDtype,
}

impl AffineScheme {
    /// A scheme of 2, 3, 4 or 8 bits. Group lengths are powers of two from 16 to 512.
    pub fn new(bits: u8, grid: Grid, grouping: Grouping, scale: FloatDtype) -> Result<Self> {
        let this = Self {
            bits,
            grid,
            grouping,
            scale,
        };
        let fault = |expected: &str| FormatError::Scheme {
            got: this.to_string(),
            expected: expected.to_owned(),
        };
        if ![2, 3, 4, 8].contains(&bits) {
            return Err(fault("affine codes have 2, 3, 4 or 8 bits"));
        }
        if let Grouping::Columns(len) = grouping
            && !GROUP_LENGTHS.contains(&len)
        {
            return Err(fault("groups have 16, 32, 64, 128, 256 or 512 columns, or row"));
        }
        Ok(this)
    }

    /// Bits of one code.
    pub fn bits(&self) -> u8 {
        self.bits
    }

    /// Where the grid's zero lies.
    pub fn grid(&self) -> Grid {
        self.grid
    }

    /// Which weights share a scale.
    pub fn grouping(&self) -> Grouping {
        self.grouping
    }

    /// Type scales are stored in.
    pub fn scale_dtype(&self) -> FloatDtype {
        self.scale
    }

    /// Smallest and largest code. Symmetric INT8 leaves out code 0 (-128), so that its grid is
    /// even on both sides; all others use every code.
    pub fn code_range(&self) -> (u8, u8) {
        let top = ((1u16 << self.bits) - 1) as u8;
        let bottom = u8::from(self.grid == Grid::Symmetric && self.bits == 8);
        (bottom, top)
    }

    /// The zero point of a symmetric grid, `None` when zero points are stored.
    pub fn fixed_zero(&self) -> Option<u8> {
        (self.grid == Grid::Symmetric).then(|| 1 << (self.bits - 1))
    }

    /// Groups per row of `k` columns. Fails when the weight is empty, when its bits cannot be
    /// counted in a `usize`, or when the group does not divide `k`, naming the group lengths that
    /// do.
    pub fn groups(&self, n: usize, k: usize) -> Result<usize> {
        let refused = |reason: String| FormatError::SchemeShape {
            scheme: self.to_string(),
            n,
            k,
            reason,
        };
        if n == 0 || k == 0 {
            return Err(refused("it is empty; keep it as it is".to_owned()));
        }
        if n.checked_mul(k)
            .and_then(|weights| weights.checked_mul(32))
            .is_none()
        {
            return Err(refused("its size overflows".to_owned()));
        }
        let len = self.grouping.len(k);
        if k.is_multiple_of(len) {
            return Ok(k / len);
        }
        let fitting: Vec<String> = GROUP_LENGTHS
            .iter()
            .filter(|&&g| k.is_multiple_of(g))
            .map(ToString::to_string)
            .collect();
        let fitting = if fitting.is_empty() {
            "none".to_owned()
        } else {
            fitting.join(", ")
        };
        Err(refused(format!(
            "K = {k} is not a multiple of {len}; fitting group sizes: {fitting}, or row"
        )))
    }

    /// The stored tensors of a weight of `n` x `k`.
    pub fn parts(&self, n: usize, k: usize) -> Result<Vec<Part>> {
        let groups = self.groups(n, k)?;
        let packed = |role, per_row| {
            let row_bytes = LSB_ROWS.row_bytes(self.bits, per_row);
            Part {
                role,
                layout: LSB_ROWS.name(),
                bits: self.bits,
                dtype: Dtype::U8,
                shape: [n, row_bytes],
                row_bytes,
            }
        };
        let mut parts = vec![
            packed(Role::Codes, k),
            Part {
                role: Role::Scales,
                layout: "rows",
                bits: 8 * self.scale.bytes() as u8,
                dtype: self.scale.dtype(),
                shape: [n, groups],
                row_bytes: groups * self.scale.bytes(),
            },
        ];
        if self.grid == Grid::ZeroPoint {
            parts.push(packed(Role::ZeroPoints, groups));
        }
        Ok(parts)
    }

    /// The scheme with this name, or `None`.
    pub fn parse(name: &str) -> Option<Self> {
        let mut words = name.split('-');
        let bits = words.next()?.strip_prefix('w')?.parse().ok()?;
        let grid = match words.next()? {
            "sym" => Grid::Symmetric,
            "zp" => Grid::ZeroPoint,
            _ => return None,
        };
        let grouping = match words.next()? {
            "row" => Grouping::Row,
            word => Grouping::Columns(word.strip_prefix('g')?.parse().ok()?),
        };
        let scale = FloatDtype::parse(words.next()?)?;
        if words.next().is_some() {
            return None;
        }
        Self::new(bits, grid, grouping, scale).ok()
    }
}

impl std::fmt::Display for AffineScheme {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let grid = match self.grid {
            Grid::Symmetric => "sym",
            Grid::ZeroPoint => "zp",
        };
        write!(f, "w{}-{grid}-{}-{}", self.bits, self.grouping, self.scale)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Scheme;

    #[test]
    fn names_read_back_and_nonsense_does_not() {
        let mut count = 0;
        for bits in [2, 3, 4, 8] {
            for grid in [Grid::Symmetric, Grid::ZeroPoint] {
                for grouping in [Grouping::Row, Grouping::Columns(64)] {
                    let scheme = AffineScheme::new(bits, grid, grouping, FloatDtype::F16).unwrap();
                    assert_eq!(AffineScheme::parse(&scheme.to_string()), Some(scheme));
                    count += 1;
                }
            }
        }
        assert_eq!(count, 16);
        for name in [
            "",
            "w4",
            "w5-sym-row-f16",
            "w4-sym-g48-f16",
            "w4-sym-row-f16-x",
            "w4-mid-row-f16",
        ] {
            assert!(Scheme::parse(name).is_err(), "{name}");
        }
    }

    #[test]
    fn bits_per_weight_count_everything_stored() {
        let scheme = Scheme::parse("w4-zp-g64-f16").unwrap();
        // 4 bits + 16/64 scale + 4/64 zero point
        assert_eq!(scheme.bits_per_weight(8, 256).unwrap(), 4.0 + 0.25 + 0.0625);
        let int8 = Scheme::parse("w8-sym-row-bf16").unwrap();
        assert_eq!(int8.bits_per_weight(8, 256).unwrap(), 8.0 + 16.0 / 256.0);
    }

    #[test]
    fn a_group_that_does_not_divide_names_those_that_do() {
        let scheme = Scheme::parse("w4-sym-g128-f16").unwrap();
        let message = scheme.parts(256, 704).unwrap_err().to_string();
        assert!(message.contains("16, 32, 64, or row"), "{message}");
        for (n, k) in [(256, 0), (0, 256), (1, usize::MAX / 8), (usize::MAX, 2)] {
            let message = scheme.parts(n, k).unwrap_err().to_string();
            assert!(
                message.contains("empty") || message.contains("overflows"),
                "{message}"
            );
        }
    }
}
