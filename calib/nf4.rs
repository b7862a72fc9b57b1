//! `nf4`: each group of 64 columns is divided by its largest magnitude, and each weight takes the nearest of the 16
//! levels; of two as near, the lower. bitsandbytes does the same, with thresholds that are the middles between
//! neighbouring levels.
//!
//! `nf4-dq`: the same codes, chosen by the scales as they are; then the scales are quantized ([`crate::nested`]),
//! which takes a survey of all of them.

use qtool_formats::scheme::nf4::{GROUP, LEVELS, ZERO};
use qtool_formats::weight::Nf4Weight;
use qtool_formats::weight::nested::NestedScales;
use qtool_formats::{QuantizedWeight, Scheme};
use qtool_kernels::{Isa, absmax_groups, first_non_finite};

use crate::{CalibError, Method, Quantizer, Result, TensorOptions, nested};

/// The registry entry.
pub const METHOD: Method = Method {
    name: "nf4",
    bits: &[4],
    summary: "NormalFloat: 16 quantiles of a normal distribution, a scale for each 64 (bitsandbytes)",
    build,
};

/// The registry entry with quantized scales.
pub const DOUBLE_METHOD: Method = Method {
    name: "nf4-dq",
    bits: &[4],
    summary: "NormalFloat with double quantization: its scales quantized to 8 bits, 4.127 bits a weight (bitsandbytes)",
    build: |_| Ok(Box::new(Double { whole: None })),
};

fn build(_: &TensorOptions) -> Result<Box<dyn Quantizer>> {
    Ok(Box::new(Nf4))
}

/// The quantizer.
#[derive(Debug, Clone, Copy)]
struct Nf4;

/// Where one level's share ends and the next one's begins.
fn thresholds() -> [f32; 15] {
    std::array::from_fn(|i| ((f64::from(LEVELS[i]) + f64::from(LEVELS[i + 1])) / 2.0) as f32)
}

impl Quantizer for Nf4 {
    fn scheme(&self) -> Scheme {
        Scheme::Nf4
    }

    fn describe(&self) -> String {
        "nf4".to_owned()
    }

    /// Only the search for the largest magnitude uses the instruction set, and that is exact.
    fn quantize(&self, isa: Isa, x: &[f32], n: usize, k: usize) -> Result<QuantizedWeight> {
        let scales = magnitudes(isa, x, n, k)?;
        let codes = codes(x, &scales);
        Ok(QuantizedWeight::Nf4(Nf4Weight::new(n, k, codes, scales)?))
    }
}

/// The quantizer with quantized scales; before a survey, and after it.
#[derive(Debug, Clone)]
struct Double {
    whole: Option<NestedScales>,
}

impl Quantizer for Double {
    fn scheme(&self) -> Scheme {
        Scheme::Nf4Double
    }

    fn describe(&self) -> String {
        "nf4-dq".to_owned()
    }

    fn surveys(&self) -> bool {
        self.whole.is_none()
    }

    fn survey(&self, isa: Isa, x: &[f32], n: usize, k: usize) -> Result<Vec<f32>> {
        magnitudes(isa, x, n, k)
    }

    fn surveyed(&self, notes: Vec<f32>, _k: usize) -> Result<Box<dyn Quantizer>> {
        let whole = Some(nested::quantize(&notes)?);
        Ok(Box::new(Self { whole }))
    }

    fn quantize(&self, isa: Isa, x: &[f32], n: usize, k: usize) -> Result<QuantizedWeight> {
        let notes = self.survey(isa, x, n, k)?;
        self.surveyed(notes, k)?.quantize_rows(isa, 0, x, (n, k))
    }

    fn quantize_rows(
        &self,
        isa: Isa,
        first_row: usize,
        x: &[f32],
        (n, k): (usize, usize),
    ) -> Result<QuantizedWeight> {
        let Some(whole) = &self.whole else {
            return self.quantize(isa, x, n, k);
        };
        let codes = codes(x, &magnitudes(isa, x, n, k)?);
        let groups = k / GROUP;
        let scales = whole.cut(first_row * groups..(first_row + n) * groups);
        Ok(QuantizedWeight::Nf4(Nf4Weight::double(n, k, codes, scales)?))
    }
}

/// The largest magnitude of each 64 columns, (N, K/64).
fn magnitudes(isa: Isa, x: &[f32], n: usize, k: usize) -> Result<Vec<f32>> {
    Scheme::Nf4.parts(n, k)?;
    let mut scales = vec![0f32; n * (k / GROUP)];
    absmax_groups(isa, x, GROUP, &mut scales);
    if scales.iter().any(|scale| !scale.is_finite())
        && let Some(at) = first_non_finite(x)
    {
        return Err(CalibError::NonFinite {
            row: at / k,
            column: at % k,
            value: x[at].to_string(),
        });
    }
    Ok(scales)
}

/// The level nearest to each weight, where groups have these largest magnitudes.
fn codes(x: &[f32], scales: &[f32]) -> Vec<u8> {
    let thresholds = thresholds();
    let mut codes = Vec::with_capacity(x.len());
    for (group, scale) in x.chunks_exact(GROUP).zip(scales) {
        if *scale == 0.0 {
            codes.resize(codes.len() + GROUP, ZERO);
            continue;
        }
        // Divided, not multiplied with a reciprocal, which may overflow.
        codes.extend(group.iter().map(|w| {
            let share = w / scale;
            thresholds.iter().map(|t| u8::from(share > *t)).sum::<u8>()
        }));
    }
    codes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_find_themselves_and_middles_go_down() {
        let mut x = vec![0f32; 64];
        x[..16].copy_from_slice(&LEVELS.map(|level| level * 3.0));
        let middle = thresholds()[9] * 3.0;
        x[20] = middle;
        let weight = Nf4.quantize(Isa::best(), &x, 1, 64).unwrap();
        let codes: Vec<u8> = (0..16).collect();
        assert_eq!(weight.codes()[..16], codes);
        assert_eq!((weight.codes()[16], weight.codes()[20]), (ZERO, 9));
        assert!(Nf4.quantize(Isa::best(), &x[..32], 1, 32).is_err());
    }

    /// The mean absolute error that bitsandbytes' own tests hold for blocks of 64: 0.072798.
    #[test]
    fn normal_numbers_lose_what_bitsandbytes_says() {
        let mut state = 1u64;
        let mut uniform = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64
        };
        let x: Vec<f32> = (0..1 << 18)
            .map(|_| ((-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32)
            .collect();
        let weight = Nf4.quantize(Isa::best(), &x, 1 << 10, 1 << 8).unwrap();
        let mut row = [0f32; 256];
        let mut sum = 0f64;
        for (n, x) in x.chunks_exact(256).enumerate() {
            weight.dequantize_row(n, &mut row);
            sum += x
                .iter()
                .zip(&row)
                .map(|(x, y)| f64::from((x - y).abs()))
                .sum::<f64>();
        }
        let mean = sum / x.len() as f64;
        assert!((mean - 0.072_798).abs() < 0.0005, "{mean}");
    }
}
