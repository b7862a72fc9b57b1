//! What can be asked of one tensor: bits, groups, grid, clip method, scale dtype. Owns defaults and
//! the `key:value` form in which rules spell them.

use std::fmt;

use qtool_formats::FloatDtype;
use qtool_formats::scheme::{AffineScheme, Grid, Grouping};

use crate::{CalibError, METHODS, Result};

/// Code widths that `--bits` and rules accept.
pub const BITS: [u8; 2] = [4, 8];

/// Options of one tensor, all filled in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorOptions {
    /// Bits of a code.
    pub bits: u8,
    /// Which weights of a row share a scale.
    pub grouping: Grouping,
    /// Where the grid's zero lies.
    pub grid: Grid,
    /// Name of the method that chooses scales, one of [`METHODS`].
    pub clip: &'static str,
    /// Type scales are stored in.
    pub scale: FloatDtype,
}

/// Options as typed: what is absent takes the default of the code width.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PartialOptions {
    /// See [`TensorOptions::bits`].
    pub bits: Option<u8>,
    /// See [`TensorOptions::grouping`].
    pub grouping: Option<Grouping>,
    /// See [`TensorOptions::grid`].
    pub grid: Option<Grid>,
    /// See [`TensorOptions::clip`].
    pub clip: Option<&'static str>,
    /// See [`TensorOptions::scale`].
    pub scale: Option<FloatDtype>,
}

impl PartialOptions {
    /// Fills in defaults: 8 bits are per output channel and unclipped; 4 bits are in groups of 64
    /// with clip search. Both are symmetric, with BF16 scales.
    ///
    /// Fails when the combination is no scheme.
    pub fn complete(self, bits: u8) -> Result<TensorOptions> {
        let bits = self.bits.unwrap_or(bits);
        let eight = bits == 8;
        let options = TensorOptions {
            bits,
            grouping: self.grouping.unwrap_or(if eight {
                Grouping::Row
            } else {
                Grouping::Columns(64)
            }),
            grid: self.grid.unwrap_or(Grid::Symmetric),
            clip: self.clip.unwrap_or(if eight { "none" } else { "mse" }),
            scale: self.scale.unwrap_or(FloatDtype::Bf16),
        };
        options.scheme()?;
        Ok(options)
    }

    /// Fills in what is absent from `base`. Fails when the combination is no scheme.
    pub fn over(self, base: TensorOptions) -> Result<TensorOptions> {
        let options = TensorOptions {
            bits: self.bits.unwrap_or(base.bits),
            grouping: self.grouping.unwrap_or(base.grouping),
            grid: self.grid.unwrap_or(base.grid),
            clip: self.clip.unwrap_or(base.clip),
            scale: self.scale.unwrap_or(base.scale),
        };
        options.scheme()?;
        Ok(options)
    }

    /// Parses `bits:4,group:64,grid:zp,clip:mse,scale:f16`; every key is optional.
    pub fn parse(text: &str) -> Result<Self> {
        let fault = |reason: String| CalibError::Option {
            what: text.to_owned(),
            reason,
        };
        let mut options = Self::default();
        for item in text.split(',') {
            let Some((key, value)) = item.split_once(':') else {
                return Err(fault(format!(
                    "{item:?} is not of the form key:value, such as bits:4"
                )));
            };
            match key.trim() {
                "bits" => options.bits = Some(parse_bits(value)?),
                "group" => options.grouping = Some(parse_grouping(value)?),
                "grid" => options.grid = Some(parse_grid(value)?),
                "clip" => options.clip = Some(parse_clip(value)?),
                "scale" => options.scale = Some(parse_scale(value)?),
                other => {
                    return Err(fault(format!(
                        "no key {other:?}; keys are bits, group, grid, clip, scale"
                    )));
                }
            }
        }
        Ok(options)
    }
}

impl TensorOptions {
    /// The scheme these options ask for.
    pub fn scheme(&self) -> Result<AffineScheme> {
        Ok(AffineScheme::new(
            self.bits,
            self.grid,
            self.grouping,
            self.scale,
        )?)
    }
}

/// The form that [`PartialOptions::parse`] reads.
impl fmt::Display for TensorOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let group = match self.grouping {
            Grouping::Row => "row".to_owned(),
            Grouping::Columns(len) => len.to_string(),
        };
        let grid = match self.grid {
            Grid::Symmetric => "sym",
            Grid::Narrow => "narrow",
            Grid::ZeroPoint => "zp",
        };
        write!(
            f,
            "bits:{},group:{group},grid:{grid},clip:{},scale:{}",
            self.bits, self.clip, self.scale
        )
    }
}

fn fault<T>(what: &str, value: &str, accepted: &str) -> Result<T> {
    Err(CalibError::Option {
        what: format!("{what} {value:?}"),
        reason: format!("accepted are {accepted}"),
    })
}

/// A code width.
pub fn parse_bits(value: &str) -> Result<u8> {
    match value.trim().parse() {
        Ok(bits) if BITS.contains(&bits) => Ok(bits),
        _ => fault("bits", value, "4 and 8"),
    }
}

/// A group length, or `row`.
pub fn parse_grouping(value: &str) -> Result<Grouping> {
    let grouping = match value.trim() {
        "row" => Some(Grouping::Row),
        len => len.parse().ok().map(Grouping::Columns),
    };
    let valid = grouping.filter(|&g| AffineScheme::new(8, Grid::Symmetric, g, FloatDtype::F32).is_ok());
    match valid {
        Some(grouping) => Ok(grouping),
        None => fault("group size", value, "16, 32, 64, 128, 256, 512 and row"),
    }
}

/// `sym`, `narrow` or `zp`.
pub fn parse_grid(value: &str) -> Result<Grid> {
    match value.trim() {
        "sym" => Ok(Grid::Symmetric),
        "narrow" => Ok(Grid::Narrow),
        "zp" => Ok(Grid::ZeroPoint),
        _ => fault("grid", value, "sym, narrow and zp"),
    }
}

/// A method name.
pub fn parse_clip(value: &str) -> Result<&'static str> {
    match crate::find(value.trim()) {
        Some(method) => Ok(method.name),
        None => fault(
            "clip",
            value,
            &METHODS.iter().map(|m| m.name).collect::<Vec<_>>().join(" and "),
        ),
    }
}

/// A scale dtype.
pub fn parse_scale(value: &str) -> Result<FloatDtype> {
    match FloatDtype::parse(value.trim()) {
        Some(dtype) => Ok(dtype),
        None => fault("scale dtype", value, "bf16, f16 and f32"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_reads_back() {
        for text in [
            "bits:4,group:128,grid:zp,clip:none,scale:f16",
            "bits:8,group:row,grid:sym,clip:mse,scale:f32",
        ] {
            let options = PartialOptions::parse(text).unwrap().complete(8).unwrap();
            assert_eq!(options.to_string(), text);
        }
    }

    #[test]
    fn defaults_follow_the_code_width() {
        let four = PartialOptions::parse("bits:4").unwrap().complete(8).unwrap();
        assert_eq!(four.to_string(), "bits:4,group:64,grid:sym,clip:mse,scale:bf16");
        let eight = PartialOptions::default().complete(8).unwrap();
        assert_eq!(
            eight.to_string(),
            "bits:8,group:row,grid:sym,clip:none,scale:bf16"
        );
    }

    #[test]
    fn nonsense_names_what_is_accepted() {
        for (text, accepted) in [
            ("bits:5", "4 and 8"),
            ("group:48", "16, 32, 64"),
            ("grid:odd", "sym, narrow and zp"),
            ("clip:max", "none and mse"),
            ("scale:f8", "bf16, f16 and f32"),
            ("bits", "key:value"),
            ("bit:4", "keys are"),
        ] {
            let message = PartialOptions::parse(text).unwrap_err().to_string();
            assert!(message.contains(accepted), "{text}: {message}");
        }
    }
}
