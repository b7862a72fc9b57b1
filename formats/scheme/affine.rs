//! The affine family: one code per weight, one scale per group, and a zero point that is either
//! fixed at the middle code (symmetric) or stored per group.
//!
//! ```text
//! value(n, k) = (code(n, k) - zero) * scale(n, g)      g = k / group, zero = 2^(bits-1) or zero(n, g)
//! ```
//!
//! The product is one `f32` multiplication, rounded once; the difference is an exact integer.
//!
//! Names: `w{bits}-{sym|narrow|zp}-{row|g<len>}-{scale dtype}`, e.g. `w4-sym-g64-bf16`.

use super::{Family, Part, Role};
use crate::dtype::{Dtype, FloatDtype};
use crate::packing::{LSB_ROWS, PADDLE_INT4, PADDLE_INT8, Packing};
use crate::{FormatError, Result};

/// The meaning of an affine code, as written into the manifest.
pub const FORMULA: &str =
    "value[n][k] = (code[n][k] - zero_point[n][k / group]) * scale[n][k / group], in f32";

/// Group lengths that exist; a multiple of 16 keeps groups on vector boundaries.
const GROUP_LENGTHS: [usize; 6] = [16, 32, 64, 128, 256, 512];

/// Rows of a tile of FastDeploy's layouts: the shape check of Paddle's `weight_quantize`.
const TILE_ROWS: usize = 16;
/// Columns of such a tile.
const TILE_COLUMNS: usize = 64;

/// Where the zero of the grid lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Grid {
    /// At the middle code 2^(bits-1).
    Symmetric,
    /// At the middle code, with the lowest code left out, so that the grid is even on both sides
    /// (-7..7 at 4 bits). Not at 8 bits, where [`Grid::Symmetric`] is like that already.
    Narrow,
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
        if grid == Grid::Narrow && bits == 8 {
            return Err(fault(
                "at 8 bits the symmetric grid is narrow already: ask for sym",
            ));
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

    /// Smallest and largest code. Narrow grids and symmetric INT8 leave out code 0, so that
    /// the grid is even on both sides; all others use every code.
    pub fn code_range(&self) -> (u8, u8) {
        let top = ((1u16 << self.bits) - 1) as u8;
        let even = self.grid == Grid::Narrow || (self.grid == Grid::Symmetric && self.bits == 8);
        let bottom = u8::from(even);
        (bottom, top)
    }

    /// The zero point of a symmetric grid, `None` when zero points are stored.
    pub fn fixed_zero(&self) -> Option<u8> {
        (self.grid != Grid::ZeroPoint).then(|| 1 << (self.bits - 1))
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

    /// The stored tensors of a weight of `n` x `k` in the forms of `family`.
    pub fn parts_in(&self, family: Family, n: usize, k: usize) -> Result<Vec<Part>> {
        match family {
            Family::Own => self.parts(n, k),
            Family::FastDeploy => self.fastdeploy_parts(n, k),
        }
    }

    /// FastDeploy's INT8 and INT4: per output channel, symmetric, BF16 scales, whole tiles.
    fn fastdeploy_parts(&self, n: usize, k: usize) -> Result<Vec<Part>> {
        let layout: &dyn Packing = match (self.bits, self.grid, self.grouping, self.scale) {
            (8, Grid::Symmetric, Grouping::Row, FloatDtype::Bf16) => &PADDLE_INT8,
            (4, Grid::Narrow, Grouping::Row, FloatDtype::Bf16) => &PADDLE_INT4,
            _ => {
                return Err(FormatError::Scheme {
                    got: format!("{self} in a FastDeploy folder"),
                    expected: "FastDeploy loads w8-sym-row-bf16 and w4-narrow-row-bf16".to_owned(),
                });
            }
        };
        self.groups(n, k)?;
        if !n.is_multiple_of(TILE_ROWS) || !k.is_multiple_of(TILE_COLUMNS) {
            return Err(FormatError::SchemeShape {
                scheme: self.to_string(),
                n,
                k,
                reason: format!(
                    "FastDeploy's layout takes whole tiles, N a multiple of {TILE_ROWS} and K of {TILE_COLUMNS}"
                ),
            });
        }
        let row_bytes = layout.row_bytes(self.bits, k);
        Ok(vec![
            Part {
                role: Role::Codes,
                layout: layout.name(),
                bits: self.bits,
                dtype: Dtype::I8,
                shape: vec![n * usize::from(self.bits) / 8, k],
                rows: n,
                row_bytes,
                by_columns: false,
            },
            Part {
                role: Role::Scales,
                layout: "rows",
                bits: 16,
                dtype: Dtype::BF16,
                shape: vec![n],
                rows: n,
                row_bytes: 2,
                by_columns: false,
            },
        ])
    }

    /// The stored tensors of a weight of `n` x `k` in our own form.
    pub fn parts(&self, n: usize, k: usize) -> Result<Vec<Part>> {
        let groups = self.groups(n, k)?;
        let packed = |role, per_row| {
            let row_bytes = LSB_ROWS.row_bytes(self.bits, per_row);
            Part {
                role,
                layout: LSB_ROWS.name(),
                bits: self.bits,
                dtype: Dtype::U8,
                shape: vec![n, row_bytes],
                rows: n,
                row_bytes,
                by_columns: false,
            }
        };
        let mut parts = vec![
            packed(Role::Codes, k),
            Part {
                role: Role::Scales,
                layout: "rows",
                bits: 8 * self.scale.bytes() as u8,
                dtype: self.scale.dtype(),
                shape: vec![n, groups],
                rows: n,
                row_bytes: groups * self.scale.bytes(),
                by_columns: false,
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
            "narrow" => Grid::Narrow,
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
            Grid::Narrow => "narrow",
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
            for grid in [Grid::Symmetric, Grid::Narrow, Grid::ZeroPoint] {
                if (bits, grid) == (8, Grid::Narrow) {
                    continue;
                }
                for grouping in [Grouping::Row, Grouping::Columns(64)] {
                    let scheme = AffineScheme::new(bits, grid, grouping, FloatDtype::F16).unwrap();
                    assert_eq!(AffineScheme::parse(&scheme.to_string()), Some(scheme));
                    count += 1;
                }
            }
        }
        assert_eq!(count, 22);
        for name in [
            "",
            "w4",
            "w5-sym-row-f16",
            "w4-sym-g48-f16",
            "w4-sym-row-f16-x",
            "w4-mid-row-f16",
            "w8-narrow-row-f16",
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

    #[test]
    fn fastdeploy_takes_whole_tiles_of_two_schemes() {
        let parts = |name, n, k| Scheme::parse(name).unwrap().parts_in(Family::FastDeploy, n, k);
        let int8 = parts("w8-sym-row-bf16", 32, 128).unwrap();
        assert_eq!((&int8[0].shape[..], int8[0].bytes()), (&[32, 128][..], 32 * 128));
        assert_eq!((&int8[1].shape[..], int8[1].bytes()), (&[32][..], 64));
        let int4 = parts("w4-narrow-row-bf16", 32, 128).unwrap();
        assert_eq!((&int4[0].shape[..], int4[0].bytes()), (&[16, 128][..], 16 * 128));
        for (name, n, k, why) in [
            ("w4-sym-row-bf16", 32, 128, "w4-narrow-row-bf16"),
            ("w4-narrow-g64-bf16", 32, 128, "w4-narrow-row-bf16"),
            ("w8-sym-row-f32", 32, 128, "w8-sym-row-bf16"),
            ("w8-sym-row-bf16", 24, 128, "N a multiple of 16"),
            ("w8-sym-row-bf16", 32, 96, "K of 64"),
        ] {
            let message = parts(name, n, k).unwrap_err().to_string();
            assert!(message.contains(why), "{name}: {message}");
        }
    }
}
