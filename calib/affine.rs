//! What every affine quantizer shares: the walk over rows and groups, the check for non-finite
//! values, and the final rounding. How a group's scale and zero point are chosen is the [`ChooseScale`] given to
//! [`quantize_rows`], and which values a scale may take is [`crate::scale_grid`].
//!
//! ```text
//! code = clamp(round_to_even(w * (1 / scale)) + zero, lo, hi)      1 / scale in f32, once per group
//! ```

use qtool_formats::QuantizedWeight;
use qtool_formats::scheme::AffineScheme;
use qtool_formats::weight::AffineWeight;
use qtool_kernels::{Isa, first_non_finite, round_codes_groups};

use crate::{CalibError, Result};

/// Scale and zero point of one group.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GroupScale {
    /// A value of the scheme's scale dtype, positive and finite.
    pub scale: f32,
    /// Zero point as a code.
    pub zero: u8,
}

/// Chooses the scale and zero point of one group of finite values.
pub trait ChooseScale {
    /// `group`, the values from column `from` on, has at least one value other than zero; `top` is the largest
    /// magnitude among them. A scale that overflows the scale dtype is returned as infinity.
    fn choose(&mut self, isa: Isa, group: &[f32], from: usize, top: f32) -> GroupScale;
}

/// The scale of an all-zero group: every code is the zero point, so any scale decodes to zeros;
/// one is a value every dtype and every reader holds exactly.
pub const ZERO_GROUP_SCALE: f32 = 1.0;

/// Quantizes a block of `n` rows of `k` values with `choose` for each group.
pub fn quantize_rows(
    isa: Isa,
    scheme: AffineScheme,
    x: &[f32],
    n: usize,
    k: usize,
    choose: &mut dyn ChooseScale,
) -> Result<QuantizedWeight> {
    let groups = scheme.groups(n, k)?;
    let len = scheme.grouping().len(k);
    let (low, high) = scheme.code_range();
    let middle = scheme.fixed_zero();
    let resting = middle.unwrap_or(0);
    let mut codes = vec![0u8; n * k];
    let mut scales = Vec::with_capacity(n * groups);
    let mut zeros = Vec::with_capacity(if middle.is_none() { n * groups } else { 0 });
    let (mut inverse, mut zero_points) = (vec![0f32; groups], vec![0f32; groups]);
    let mut extents = vec![0f32; groups];
    for (row, (x, codes)) in x.chunks_exact(k).zip(codes.chunks_exact_mut(k)).enumerate() {
        qtool_kernels::absmax_groups(isa, x, len, &mut extents);
        for (g, (group, &extent)) in x.chunks_exact(len).zip(&extents).enumerate() {
            if !extent.is_finite() {
                let column = first_non_finite(x).unwrap_or(g * len);
                return Err(CalibError::NonFinite {
                    row,
                    column,
                    value: x[column].to_string(),
                });
            }
            let chosen = if extent == 0.0 {
                GroupScale {
                    scale: ZERO_GROUP_SCALE,
                    zero: resting,
                }
            } else {
                choose.choose(isa, group, g * len, extent)
            };
            if !chosen.scale.is_finite() {
                return Err(CalibError::ScaleOverflow {
                    row,
                    scale: extent,
                    dtype: scheme.scale_dtype().name(),
                });
            }
            inverse[g] = 1.0 / chosen.scale;
            zero_points[g] = f32::from(chosen.zero);
            scales.push(chosen.scale);
            if middle.is_none() {
                zeros.push(chosen.zero);
            }
        }
        round_codes_groups(isa, x, len, &inverse, &zero_points, (low, high), codes);
    }
    Ok(QuantizedWeight::Affine(AffineWeight::new(
        scheme, n, k, codes, scales, zeros,
    )?))
}
