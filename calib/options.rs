//! What can be asked of one tensor: bits, groups, grid, clip method, scale dtype and its bits. Owns defaults and
//! the `key:value` form in which rules spell them.

use std::fmt;

use qtool_formats::FloatDtype;
use qtool_formats::Scheme;
use qtool_formats::scheme::{AffineScheme, Grid, Grouping, KQuant};

use crate::ccq::Effort;
use crate::scale_grid::{ScaleGrid, significant_bits};
use crate::{CalibError, METHODS, Result};

/// Code widths that `--bits` and rules accept. Two bits are WINT2, whose codes, groups and scales
/// are fixed, unless another method is named.
pub const BITS: [u8; 4] = [2, 3, 4, 8];
/// The method of WINT2, and the default at two bits.
const CCQ: &str = "ccq";
/// The method of WINT2.5.
const CCQ25: &str = "ccq25";
/// The methods of NF4: plain, and with quantized scales.
const NF4: &str = "nf4";
const NF4_DQ: &str = "nf4-dq";
/// The methods of GGML's K types.
const Q4_K: &str = "q4-k";
const Q2_K: &str = "q2-k";

/// The methods that round each weight by itself, whose names `--clip` takes.
const CLIPS: [&str; 2] = ["none", "mse"];

/// Options of one tensor, all filled in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorOptions {
    /// Bits of a code.
    pub bits: u8,
    /// Which weights of a row share a scale.
    pub grouping: Grouping,
    /// Where the grid's zero lies.
    pub grid: Grid,
    /// Name of the method that chooses codes, one of [`METHODS`].
    pub method: &'static str,
    /// Type scales are stored in.
    pub scale: FloatDtype,
    /// Significant bits of a scale ([`ScaleGrid`]); `None` for all of its type.
    pub scale_bits: Option<u8>,
    /// How long to search; for WINT2 only.
    pub effort: Effort,
    /// Whether there will be evidence about the inputs: it decides which methods are the defaults.
    pub calibrated: bool,
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
    /// See [`TensorOptions::method`].
    pub method: Option<&'static str>,
    /// See [`TensorOptions::scale`].
    pub scale: Option<FloatDtype>,
    /// See [`TensorOptions::scale_bits`].
    pub scale_bits: Option<u8>,
    /// See [`TensorOptions::effort`].
    pub effort: Option<Effort>,
    /// See [`TensorOptions::calibrated`].
    pub calibrated: bool,
}

impl PartialOptions {
    /// Fills in defaults: 8 bits are per output channel and unclipped; 4 bits are in groups of 64
    /// with clip search, 3 bits likewise; all are symmetric, with BF16 scales. With evidence, `gptq` takes the
    /// place of rounding. 2 bits are WINT2 at default effort, and groups of 64 when another method is named.
    ///
    /// Fails when the combination is no scheme, or when an option has no meaning at this width.
    pub fn complete(self, bits: u8) -> Result<TensorOptions> {
        let bits = self.bits.unwrap_or(bits);
        let (grouping, method) = match bits {
            2 => (Grouping::Columns(64), CCQ),
            8 if self.calibrated => (Grouping::Row, "gptq"),
            8 => (Grouping::Row, "none"),
            _ if self.calibrated => (Grouping::Columns(64), "gptq"),
            _ => (Grouping::Columns(64), "mse"),
        };
        self.over(TensorOptions {
            bits,
            grouping,
            grid: Grid::Symmetric,
            method,
            scale: FloatDtype::Bf16,
            scale_bits: None,
            effort: Effort::Default,
            calibrated: self.calibrated,
        })
    }

    /// Fills in what is absent from `base`. Fails as [`complete`](Self::complete) does.
    pub fn over(self, base: TensorOptions) -> Result<TensorOptions> {
        let options = TensorOptions {
            bits: self.bits.unwrap_or(base.bits),
            grouping: self.grouping.unwrap_or(base.grouping),
            grid: self.grid.unwrap_or(base.grid),
            method: self.method.unwrap_or(base.method),
            scale: self.scale.unwrap_or(base.scale),
            scale_bits: self.scale_bits.or(base.scale_bits),
            effort: self.effort.unwrap_or(base.effort),
            calibrated: self.calibrated || base.calibrated,
        };
        self.check_meaning(&options)?;
        if let Scheme::Affine(_) = options.scheme()? {
            options.scale_grid()?;
        }
        Ok(options)
    }

    /// Fails when an option was given that the code width has no use for.
    fn check_meaning(&self, options: &TensorOptions) -> Result<()> {
        let fault = |what: &str, reason: &str| {
            Err(CalibError::Option {
                what: what.to_owned(),
                reason: reason.to_owned(),
            })
        };
        let wrong_width = |bits: &[u8]| {
            let bits: Vec<String> = bits.iter().map(ToString::to_string).collect();
            fault(
                &format!("method {} at {} bits", options.method, options.bits),
                &format!("it is for {} bits", bits.join(", ")),
            )
        };
        if let Some(method) = crate::find(options.method)
            && !method.bits.contains(&options.bits)
        {
            return wrong_width(method.bits);
        }
        let laid_out = self.grouping.is_some()
            || self.grid.is_some()
            || self.scale.is_some()
            || self.scale_bits.is_some();
        if laid_out && [NF4, NF4_DQ].contains(&options.method) {
            return fault(
                &format!("method {}", options.method),
                "NF4 fixes groups (64), levels and scale dtype (f32); leave these options out",
            );
        }
        if laid_out && [Q4_K, Q2_K].contains(&options.method) {
            return fault(
                &format!("method {}", options.method),
                "GGML's K types fix groups, minima and scale dtype (f16); leave these options out",
            );
        }
        if laid_out && [CCQ, CCQ25].contains(&options.method) {
            return fault(
                "2 bits",
                "WINT2 and WINT2.5 fix groups (64), grid and scale dtype; leave these options out, or name another method (method:mse, method:gptq)",
            );
        }
        if options.method != CCQ && self.effort.is_some() {
            return fault("effort", "only WINT2 (2 bits) has levels of effort");
        }
        Ok(())
    }

    /// Parses `bits:4,group:64,grid:zp,clip:mse,scale:f16,scale-bits:7`; every key is optional.
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
                "clip" => options.method = Some(parse_clip(value)?),
                "method" => options.method = Some(parse_method(value)?),
                "scale" => options.scale = Some(parse_scale(value)?),
                "scale-bits" => options.scale_bits = Some(parse_scale_bits(value)?),
                "effort" => options.effort = Some(parse_effort(value)?),
                other => {
                    return Err(fault(format!(
                        "no key {other:?}; keys are bits, group, grid, clip, method, scale, scale-bits, effort"
                    )));
                }
            }
        }
        Ok(options)
    }
}

impl TensorOptions {
    /// The scheme these options ask for.
    pub fn scheme(&self) -> Result<Scheme> {
        match self.method {
            CCQ => return Ok(Scheme::Ccq),
            CCQ25 => return Ok(Scheme::Ccq25),
            NF4 => return Ok(Scheme::Nf4),
            NF4_DQ => return Ok(Scheme::Nf4Double),
            Q4_K => return Ok(Scheme::K(KQuant::Q4)),
            Q2_K => return Ok(Scheme::K(KQuant::Q2)),
            _ => {}
        }
        let affine = AffineScheme::new(self.bits, self.grid, self.grouping, self.scale)?;
        Ok(Scheme::Affine(affine))
    }

    /// The affine scheme these options ask for, whatever their method.
    pub fn affine_scheme(&self) -> Result<AffineScheme> {
        Ok(AffineScheme::new(
            self.bits,
            self.grid,
            self.grouping,
            self.scale,
        )?)
    }

    /// The values that scales of an affine scheme may take.
    pub fn scale_grid(&self) -> Result<ScaleGrid> {
        ScaleGrid::new(self.scale, self.scale_bits)
    }
}

/// The form that [`PartialOptions::parse`] reads.
impl fmt::Display for TensorOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.method == CCQ {
            return write!(f, "bits:2,effort:{}", self.effort);
        }
        if self.method == CCQ25 {
            return write!(f, "bits:2,method:{CCQ25}");
        }
        if [NF4, NF4_DQ, Q4_K, Q2_K].contains(&self.method) {
            return write!(f, "bits:{},method:{}", self.bits, self.method);
        }
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
            "bits:{},group:{group},grid:{grid},{}:{},scale:{}",
            self.bits,
            if CLIPS.contains(&self.method) {
                "clip"
            } else {
                "method"
            },
            self.method,
            self.scale
        )?;
        match self.scale_bits {
            Some(bits) => write!(f, ",scale-bits:{bits}"),
            None => Ok(()),
        }
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
        _ => fault("bits", value, "2, 3, 4 and 8"),
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

/// A level of effort.
pub fn parse_effort(value: &str) -> Result<Effort> {
    match Effort::ALL.into_iter().find(|e| e.name() == value.trim()) {
        Some(effort) => Ok(effort),
        None => fault("effort", value, "fast, default and best"),
    }
}

/// `none` or `mse`.
pub fn parse_clip(value: &str) -> Result<&'static str> {
    match CLIPS.into_iter().find(|name| *name == value.trim()) {
        Some(name) => Ok(name),
        None => fault("clip", value, &CLIPS.join(" and ")),
    }
}

/// The name of any method.
pub fn parse_method(value: &str) -> Result<&'static str> {
    match crate::find(value.trim()) {
        Some(method) => Ok(method.name),
        None => {
            let names: Vec<&str> = METHODS.iter().map(|m| m.name).collect();
            fault("method", value, &names.join(", "))
        }
    }
}

/// A scale dtype.
pub fn parse_scale(value: &str) -> Result<FloatDtype> {
    match FloatDtype::parse(value.trim()) {
        Some(dtype) => Ok(dtype),
        None => fault("scale dtype", value, "bf16, f16 and f32"),
    }
}

/// A number of significant bits; which of them there are is the scale dtype's to say ([`ScaleGrid::new`]).
pub fn parse_scale_bits(value: &str) -> Result<u8> {
    match value.trim().parse() {
        Ok(bits) if bits <= significant_bits(FloatDtype::F32) => Ok(bits),
        _ => fault(
            "scale-bits",
            value,
            "4 to 8 for bf16 scales, to 11 for f16 and to 24 for f32",
        ),
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
            "bits:2,effort:fast",
            "bits:2,method:ccq25",
            "bits:4,method:nf4",
            "bits:4,method:nf4-dq",
            "bits:4,method:q4-k",
            "bits:2,method:q2-k",
            "bits:2,group:64,grid:sym,clip:mse,scale:bf16",
            "bits:3,group:32,grid:zp,method:gptq,scale:f16",
            "bits:4,group:32,grid:zp,clip:mse,scale:f16,scale-bits:7",
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
        let calibrated = PartialOptions {
            calibrated: true,
            ..PartialOptions::default()
        };
        let methods = [2, 3, 4, 8].map(|bits| calibrated.complete(bits).unwrap().method);
        assert_eq!(methods, ["ccq", "gptq", "gptq", "gptq"]);
    }

    #[test]
    fn nonsense_names_what_is_accepted() {
        for (text, accepted) in [
            ("bits:5", "2, 3, 4 and 8"),
            ("group:48", "16, 32, 64"),
            ("grid:odd", "sym, narrow and zp"),
            ("clip:max", "none and mse"),
            ("scale:f8", "bf16, f16 and f32"),
            (
                "scale:f16,scale-bits:12",
                "type f16 have 11 significant bits; accepted are 4 to 11",
            ),
            (
                "scale-bits:9",
                "type bf16 have 8 significant bits; accepted are 4 to 8",
            ),
            ("scale-bits:3", "accepted are 4 to 8"),
            ("scale-bits:many", "4 to 8 for bf16"),
            ("bits:2,scale-bits:7", "leave these options out"),
            ("bits", "key:value"),
            ("bit:4", "keys are"),
            ("effort:much", "fast, default and best"),
            ("bits:2,group:32", "leave these options out"),
            ("bits:4,clip:ccq", "none and mse"),
            ("bits:4,method:ccq", "it is for 2 bits"),
            ("bits:4,method:ccq25", "it is for 2 bits"),
            ("bits:8,method:nf4", "it is for 4 bits"),
            ("bits:4,method:nf4,group:32", "NF4 fixes groups"),
            ("bits:4,method:nf4-dq,scale:f16", "NF4 fixes groups"),
            ("bits:2,method:q2-k,group:64", "K types fix groups"),
            ("bits:4,method:q2-k", "it is for 2 bits"),
            ("bits:2,method:ccq25,group:32", "leave these options out"),
            ("bits:2,method:ccq25,effort:best", "only WINT2"),
            (
                "method:magic",
                "none, mse, gptq, ccq, ccq25, nf4, nf4-dq, q4-k, q2-k",
            ),
            ("bits:4,effort:best", "only WINT2"),
        ] {
            let parsed = PartialOptions::parse(text).and_then(|options| options.complete(4));
            let message = parsed.unwrap_err().to_string();
            assert!(message.contains(accepted), "{text}: {message}");
        }
    }
}
