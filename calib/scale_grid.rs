//! The values that scales of a weight may take: all of the type they are stored in, or only those of fewer significant
//! bits. Owns how a scale is rounded to one of them.
//!
//! ```text
//! all bits   the type's own rounding
//! N bits     nearest m * 2^e with m of at most N bits, ties to the even m; no finer than the type's smallest step
//! ```
//!
//! Fewer bits are for formats that store a product with a scale in the scale's own type. GGML's Q4_1 keeps scale times
//! zero point as F16: a zero point of four bits and a scale of seven give a product of at most eleven, which F16 holds
//! exactly, among its subnormal values too, as a multiple of a multiple of 2^-24 is one.

use std::fmt;

use qtool_formats::FloatDtype;

use crate::{CalibError, Result};

/// Fewest bits: with fewer, neighbours lie more than an eighth apart.
pub const FEWEST_BITS: u8 = 4;

/// See the module's text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScaleGrid {
    dtype: FloatDtype,
    /// Significant bits; `None` for all of the type.
    bits: Option<u8>,
}

/// Significant bits of this type's values, the leading one included.
pub fn significant_bits(dtype: FloatDtype) -> u8 {
    match dtype {
        FloatDtype::Bf16 => 8,
        FloatDtype::F16 => 11,
        FloatDtype::F32 => 24,
    }
}

impl ScaleGrid {
    /// All values of the type.
    pub fn all(dtype: FloatDtype) -> Self {
        Self { dtype, bits: None }
    }

    /// The values of the type with at most `bits` significant bits; all without a number.
    ///
    /// Fails when the type has fewer, or the number is below [`FEWEST_BITS`].
    pub fn new(dtype: FloatDtype, bits: Option<u8>) -> Result<Self> {
        let most = significant_bits(dtype);
        match bits {
            Some(bits) if !(FEWEST_BITS..=most).contains(&bits) => Err(CalibError::Option {
                what: format!("scale-bits {bits}"),
                reason: format!(
                    "scales of type {dtype} have {most} significant bits; accepted are {FEWEST_BITS} to {most}"
                ),
            }),
            _ => Ok(Self {
                dtype,
                bits: bits.filter(|bits| *bits < most),
            }),
        }
    }

    /// Whether values of the type are left out.
    pub fn is_coarse(self) -> bool {
        self.bits.is_some()
    }

    /// `scale` rounded to nearest, ties to even, but never below the smallest value whose reciprocal is finite.
    /// Infinity when it is beyond the type's largest value.
    pub fn store(self, scale: f32) -> f32 {
        let smallest = match self.dtype {
            FloatDtype::F16 => 2f32.powi(-24),
            FloatDtype::Bf16 | FloatDtype::F32 => f32::MIN_POSITIVE,
        };
        let scale = scale.max(smallest);
        match self.bits {
            Some(bits) if scale.is_finite() => self.dtype.round(self.coarse(scale, bits)),
            _ => self.dtype.round(scale),
        }
    }

    /// The rounding to fewer bits, of a positive finite `scale`. In f64 every step of it is exact but the rounding.
    fn coarse(self, scale: f32, bits: u8) -> f32 {
        let finest = match self.dtype {
            FloatDtype::F16 => 2f64.powi(-24),
            // Their steps are finer than `smallest` wherever a scale may lie.
            FloatDtype::Bf16 | FloatDtype::F32 => 0.0,
        };
        let scale = f64::from(scale);
        let exponent = (scale.to_bits() >> 52) as i32 - 1023;
        let step = 2f64.powi(exponent + 1 - i32::from(bits)).max(finest);
        ((scale / step).round_ties_even() * step) as f32
    }
}

/// What is added to a method's name: nothing for all values of the type.
impl fmt::Display for ScaleGrid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.bits {
            Some(bits) => write!(f, ", scales of {bits} significant bits"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Significant bits of a value, counted from its digits.
    fn significant(value: f32) -> u32 {
        let digits = (value.to_bits() & 0x7f_ffff) | 0x80_0000;
        24 - digits.trailing_zeros()
    }

    #[test]
    fn scales_are_storable_and_invertible() {
        let mut tried = 0;
        for dtype in [FloatDtype::Bf16, FloatDtype::F16, FloatDtype::F32] {
            for bits in [None, Some(4), Some(7), Some(8)] {
                let grid = ScaleGrid::new(dtype, bits).unwrap();
                for scale in [0.0, 1e-45, 1e-38, 1e-9, 0.1, 1000.0] {
                    let stored = grid.store(scale);
                    assert!(
                        stored > 0.0 && (1.0 / stored).is_finite(),
                        "{dtype} {scale:e} -> {stored:e}"
                    );
                    assert_eq!(dtype.round(stored), stored);
                    assert_eq!(grid.store(stored), stored);
                    tried += 1;
                }
            }
        }
        assert_eq!(tried, 3 * 4 * 6);
        assert_eq!(ScaleGrid::all(FloatDtype::F16).store(1e6), f32::INFINITY);
        let coarse = ScaleGrid::new(FloatDtype::F16, Some(7)).unwrap();
        assert_eq!(coarse.store(1e6), f32::INFINITY);
        assert_eq!(coarse.store(f32::INFINITY), f32::INFINITY);
    }

    /// The nearest of all values of the grid, by looking at each.
    #[test]
    fn rounding_is_to_the_nearest_value_of_the_grid() {
        for bits in [4u8, 7, 10] {
            let grid = ScaleGrid::new(FloatDtype::F16, Some(bits)).unwrap();
            // Every positive finite F16 is a multiple of 2^-24.
            let values: Vec<f32> = (1u16..0x7c00)
                .map(|bits| FloatDtype::F16.widen(&bits.to_le_bytes())[0])
                .filter(|v| significant(*v) <= u32::from(bits))
                .collect();
            assert!(values.len() > 200);
            for pair in values.windows(2) {
                let middle = (pair[0] + pair[1]) / 2.0;
                let [below, above] = [middle * (1.0 - 1e-6), middle * (1.0 + 1e-6)];
                assert_eq!(grid.store(below), pair[0], "{bits} {below:e}");
                assert_eq!(grid.store(above), pair[1], "{bits} {above:e}");
                let even = grid.store(middle);
                let step = pair[1] - pair[0];
                assert_eq!((even / step) % 2.0, 0.0, "{bits} {middle:e} -> {even:e}");
            }
        }
        // 1 + 2^-6 has seven bits; half a step above it lies between it and 1 + 2^-5, whose last digit of seven is 0.
        let seven = ScaleGrid::new(FloatDtype::F32, Some(7)).unwrap();
        assert_eq!(seven.store(1.0 + 1.5 / 64.0), 1.0 + 2.0 / 64.0);
        assert_eq!(seven.store(1.0 + 0.5 / 64.0), 1.0);
        assert_eq!(seven.store(1.9999), 2.0);
    }

    /// Seven bits times a zero point of four are an F16 value: all scales below 65504 / 15, subnormal ones included.
    #[test]
    fn seven_bits_times_a_zero_point_are_exact() {
        let grid = ScaleGrid::new(FloatDtype::F16, Some(7)).unwrap();
        let (mut tried, mut free) = (0, 0);
        for bits in 1u16..0x7c00 {
            let scale = FloatDtype::F16.widen(&bits.to_le_bytes())[0];
            let stored = grid.store(scale);
            for zero in (0..16u8).map(f32::from) {
                if stored * zero <= 65504.0 {
                    assert_eq!(FloatDtype::F16.round(stored * zero), stored * zero);
                    tried += 1;
                }
                free += u32::from(FloatDtype::F16.round(scale * zero) != scale * zero);
            }
        }
        assert!(tried > 400_000 && free > 100_000, "{tried} {free}");
    }

    #[test]
    fn numbers_out_of_range_name_the_range() {
        for (dtype, bits, range) in [
            (FloatDtype::F16, 12, "accepted are 4 to 11"),
            (FloatDtype::Bf16, 9, "accepted are 4 to 8"),
            (FloatDtype::F32, 25, "accepted are 4 to 24"),
            (FloatDtype::F16, 3, "accepted are 4 to 11"),
        ] {
            let message = ScaleGrid::new(dtype, Some(bits)).unwrap_err().to_string();
            assert!(message.contains(range), "{message}");
        }
        let full = ScaleGrid::new(FloatDtype::F16, Some(11)).unwrap();
        assert_eq!(full, ScaleGrid::all(FloatDtype::F16));
        assert_eq!(full.to_string(), "");
    }
}
