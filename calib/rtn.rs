//! `none`: plain rounding to nearest on a grid that spans each group.
//!
//! ```text
//! symmetric 8 bits     scale = max|w| / 127                    codes -127..127
//! symmetric, fewer     scale = max|w| / (2^(bits-1) - 1/2)     codes -2^(bits-1)..2^(bits-1)-1
//! narrow               scale = max|w| / (2^(bits-1) - 1)       codes -(2^(bits-1)-1)..2^(bits-1)-1
//! with zero point      scale = (max - min) / (2^bits - 1), zero = round(-min / scale); 0 lies in the range
//! ```
//!
//! The half step of the second line uses the lowest code too: the largest weight is off by at most
//! half a step, as every other weight, and the step is finer (compressed-tensors does the same).
//! Scales are rounded to their stored type before codes are chosen, so codes fit what is stored.

use qtool_formats::scheme::{AffineScheme, Grid};
use qtool_formats::{QuantizedWeight, Scheme};
use qtool_kernels::cuda::Encoder;
use qtool_kernels::{Isa, minmax};

use crate::affine::{ChooseScale, GroupScale, quantize_rows};
use crate::device::DeviceAffine;
use crate::scale_grid::ScaleGrid;
use crate::{Method, Quantizer, Result, TensorOptions};

/// The registry entry.
pub const METHOD: Method = Method {
    name: "none",
    bits: &[2, 3, 4, 8],
    summary: "plain rounding: the grid spans each group's largest magnitude (or its minimum and maximum)",
    build,
};

fn build(options: &TensorOptions) -> Result<Box<dyn Quantizer>> {
    Ok(Box::new(Rtn {
        scheme: options.affine_scheme()?,
        scales: options.scale_grid()?,
    }))
}

/// The quantizer.
#[derive(Debug, Clone, Copy)]
pub struct Rtn {
    scheme: AffineScheme,
    scales: ScaleGrid,
}

impl Rtn {
    /// For this scheme, with scales of this grid.
    pub(crate) fn new(scheme: AffineScheme, scales: ScaleGrid) -> Self {
        Self { scheme, scales }
    }
}

impl Quantizer for Rtn {
    fn scheme(&self) -> Scheme {
        Scheme::Affine(self.scheme)
    }

    fn describe(&self) -> String {
        format!("rtn{}", self.scales)
    }

    fn on_device(&self, encoder: &Encoder) -> Result<Option<Box<dyn Quantizer>>> {
        if self.scales.is_coarse() {
            return Ok(None);
        }
        let there = DeviceAffine::rounding(*self, self.scheme, encoder);
        Ok(Some(Box::new(there)))
    }

    fn quantize(&self, isa: Isa, x: &[f32], n: usize, k: usize) -> Result<QuantizedWeight> {
        quantize_rows(isa, self.scheme, x, n, k, &mut Span(self.scheme, self.scales))
    }
}

/// Steps between zero and the largest magnitude on a symmetric grid.
pub fn symmetric_steps(scheme: AffineScheme) -> f32 {
    let half = f32::from(1u16 << (scheme.bits() - 1));
    if scheme.code_range().0 > 0 {
        half - 1.0
    } else {
        half - 0.5
    }
}

/// The choice of plain rounding.
pub(crate) struct Span(pub(crate) AffineScheme, pub(crate) ScaleGrid);

impl ChooseScale for Span {
    fn choose(&mut self, isa: Isa, group: &[f32], _from: usize, top: f32) -> GroupScale {
        match self.0.grid() {
            Grid::Symmetric | Grid::Narrow => GroupScale {
                scale: self.1.store(top / symmetric_steps(self.0)),
                zero: self.0.fixed_zero().unwrap_or(0),
            },
            Grid::ZeroPoint => {
                let top = f32::from(self.0.code_range().1);
                let (min, max) = minmax(isa, group);
                let (min, max) = (min.min(0.0), max.max(0.0));
                // Dividing first keeps the span of huge weights finite.
                let scale = self.1.store(max / top - min / top);
                GroupScale {
                    scale,
                    zero: (-min / scale).round_ties_even().clamp(0.0, top) as u8,
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::PartialOptions;

    fn run(options: &str, x: &[f32], n: usize) -> QuantizedWeight {
        let options = PartialOptions::parse(options).unwrap().complete(8).unwrap();
        build(&options)
            .unwrap()
            .quantize(Isa::best(), x, n, x.len() / n)
            .unwrap()
    }

    #[test]
    fn int8_by_hand() {
        let w = run("bits:8,scale:f32,clip:none", &[-127.0, 63.5, 0.4, 0.6], 1);
        assert_eq!(w.codes(), [1, 192, 128, 129], "63.5 ties to the even 64");
        let mut row = [0.0; 4];
        w.dequantize_row(0, &mut row);
        assert_eq!(row, [-127.0, 64.0, 0.0, 1.0]);
    }

    #[test]
    fn int4_uses_the_lowest_code_and_the_largest_weight_is_off_by_half_a_step() {
        let mut x = [0.0f32; 16];
        (x[0], x[1], x[2]) = (7.5, -7.5, 1.0);
        let w = run("bits:4,group:16,scale:f32,clip:none", &x, 1);
        assert_eq!(w.codes()[..4], [15, 0, 9, 8]);
        let mut row = [0.0; 16];
        w.dequantize_row(0, &mut row);
        assert_eq!(row[..3], [7.0, -8.0, 1.0]);
    }

    #[test]
    fn zero_point_by_hand() {
        let mut x = [0.0f32; 16];
        (x[0], x[1]) = (-5.0, 10.0);
        let w = run("bits:4,group:16,grid:zp,scale:f32,clip:none", &x, 1);
        assert_eq!(w.codes()[..3], [0, 15, 5]);
        let mut row = [1.0; 16];
        w.dequantize_row(0, &mut row);
        assert_eq!(row[..3], [-5.0, 10.0, 0.0]);
    }

    #[test]
    fn extreme_groups_stay_finite() {
        for x in [[0.0f32; 16], [3e38; 16], [1e-44; 16], [-3e38; 16]] {
            for options in [
                "bits:4,group:16,clip:none",
                "bits:8,clip:none",
                "bits:4,group:16,grid:zp,clip:none",
            ] {
                let w = run(options, &x, 1);
                let mut row = [f32::NAN; 16];
                w.dequantize_row(0, &mut row);
                assert!(
                    row.iter().all(|v| v.is_finite()),
                    "{options} {:e} -> {row:?}",
                    x[0]
                );
                if x[0] == 0.0 {
                    assert_eq!(row, x);
                }
            }
        }
    }
}
