//! Scales quantized a second time: their mean is taken off, every 256 of them are divided by the largest distance from it,
//! and each takes the nearest of 256 levels ([`dynamic_map`](qtool_formats::scheme::dynamic_map)); of two as near, the lower.
//!
//! As bitsandbytes' `quantize_blockwise` does, step by step in f32; only the mean is a sum in f64, rounded once, where
//! the order of its own sum is its library's business.

use std::sync::Arc;

use qtool_formats::scheme::dynamic_map::MAP;
use qtool_formats::scheme::nf4::NESTED_GROUP;
use qtool_formats::weight::nested::{Nested, NestedScales};

use crate::Result;

/// Quantizes all scales of a weight.
pub fn quantize(scales: &[f32]) -> Result<NestedScales> {
    let sum: f64 = scales.iter().map(|&s| f64::from(s)).sum();
    around((sum / scales.len().max(1) as f64) as f32, scales)
}

/// The same around a given offset.
pub fn around(offset: f32, scales: &[f32]) -> Result<NestedScales> {
    let mut nested = Vec::with_capacity(scales.len().div_ceil(NESTED_GROUP));
    let mut codes = Vec::with_capacity(scales.len());
    for block in scales.chunks(NESTED_GROUP) {
        let largest = block.iter().fold(0f32, |m, s| m.max((s - offset).abs()));
        nested.push(largest);
        codes.extend(block.iter().map(|s| nearest((s - offset) / largest)));
    }
    let nested = Arc::new(Nested::new(nested, offset)?);
    Ok(NestedScales::new(0, codes, nested)?)
}

/// The code of the level nearest to `share`, from -1 to 1. What is no number, as where all scales agree and are divided by
/// zero, gets the highest: it is multiplied with zero again.
fn nearest(share: f32) -> u8 {
    if share.is_nan() {
        return u8::MAX;
    }
    let left = MAP.partition_point(|level| *level <= share).saturating_sub(1);
    let right = (left + 1).min(MAP.len() - 1);
    let nearer = (share - MAP[right]).abs() < (share - MAP[left]).abs();
    (if nearer { right } else { left }) as u8
}

#[cfg(test)]
mod tests {
    use super::*;
    use qtool_formats::scheme::dynamic_map::ZERO;

    #[test]
    fn levels_find_themselves_and_middles_go_down() {
        for (code, level) in MAP.iter().enumerate() {
            assert_eq!(usize::from(nearest(*level)), code);
        }
        // 0 and the level above it.
        assert_eq!(nearest(MAP[128] / 2.0), ZERO);
        assert_eq!(nearest(MAP[128] * 0.51), ZERO + 1);
        assert_eq!((nearest(-2.0), nearest(2.0), nearest(f32::NAN)), (0, 255, 255));
    }

    #[test]
    fn equal_scales_are_the_offset() {
        let quantized = quantize(&[0.3; 300]).unwrap();
        assert_eq!(quantized.values().unwrap(), [0.3; 300]);
        assert_eq!(quantized.nested().scales(), [0.0; 2]);
    }

    /// A level is at most 1.1 percent of the block's largest distance away: half of the widest gap.
    #[test]
    fn errors_stay_within_half_a_gap() {
        let scales: Vec<f32> = (0..1000).map(|i| 0.02 + (i * 37 % 101) as f32 * 1e-4).collect();
        let quantized = quantize(&scales).unwrap();
        let widest = MAP.windows(2).map(|w| w[1] - w[0]).fold(0f32, f32::max);
        for (i, (before, after)) in scales.iter().zip(quantized.values().unwrap()).enumerate() {
            let largest = quantized.nested().scales()[i / NESTED_GROUP];
            assert!((before - after).abs() <= widest / 2.0 * largest * 1.001, "{i}");
        }
    }
}
