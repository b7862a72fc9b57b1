//! `mse`: the scale (and zero point) with the least squared error, by search.
//!
//! ```text
//! minimise over (s, z)  sum_k (w_k - (clamp(round(w_k / s) + z, lo, hi) - z) * s)^2
//! ```
//!
//! Every candidate scale is rounded to its stored type before it is priced, so the search sees
//! what will be stored. Two passes: an even sweep of factors of the spanning scale (with the zero
//! points around the one that centres the range), then a finer sweep around the winner. Ties go to
//! the earlier candidate. The spanning scale of plain rounding is a candidate itself, so the result
//! is never worse than plain rounding.

use qtool_formats::scheme::{AffineScheme, Grid};
use qtool_formats::{QuantizedWeight, Scheme};
use qtool_kernels::cuda::Encoder;
use qtool_kernels::{Candidate, Isa, absmax, clip_errors, clip_errors_weighted, minmax};

use crate::affine::{ChooseScale, GroupScale, quantize_rows};
use crate::device::DeviceAffine;
use crate::rtn::symmetric_steps;
use crate::scale_grid::ScaleGrid;
use crate::stats::LayerStats;
use crate::{Evidence, Method, Quantizer, Result, TensorOptions};

mod weighted;
use weighted::Weighted;

/// The registry entry.
pub const METHOD: Method = Method {
    name: "mse",
    bits: &[2, 3, 4, 8],
    summary: "clip search: the scale of each group with the least squared error (the default at 4 bits)",
    build,
};

fn build(options: &TensorOptions) -> Result<Box<dyn Quantizer>> {
    Ok(Box::new(ClipSearch {
        scheme: options.affine_scheme()?,
        scales: options.scale_grid()?,
    }))
}

/// The quantizer.
#[derive(Debug, Clone, Copy)]
pub struct ClipSearch {
    scheme: AffineScheme,
    scales: ScaleGrid,
}

impl Quantizer for ClipSearch {
    fn scheme(&self) -> Scheme {
        Scheme::Affine(self.scheme)
    }

    fn describe(&self) -> String {
        format!("rtn, clip search{}", self.scales)
    }

    fn evidence(&self) -> Evidence {
        Evidence::Full
    }

    fn informed(&self, stats: &LayerStats) -> Result<Box<dyn Quantizer>> {
        Ok(Box::new(Weighted::new(self.scheme, self.scales, stats)))
    }

    fn on_device(&self, encoder: &Encoder) -> Result<Option<Box<dyn Quantizer>>> {
        if self.scales.is_coarse() {
            return Ok(None);
        }
        let there = DeviceAffine::searching(*self, self.scheme, encoder);
        let there =
            there.informed_by(|there, stats| Weighted::on_device(there.scheme_of(), stats, there.encoder()));
        Ok(Some(Box::new(there)))
    }

    fn quantize(&self, isa: Isa, x: &[f32], n: usize, k: usize) -> Result<QuantizedWeight> {
        let mut search = Search::new(self.scheme, self.scales);
        quantize_rows(isa, self.scheme, x, n, k, &mut search)
    }
}

/// First sweep: factors of the spanning scale, in steps of `COARSE_STEP` down from `COARSE_TOP`.
/// Above 1, because the even grid of plain rounding can profit from a wider step, too.
const COARSE_TOP: f32 = 1.08;
const COARSE_STEP: f32 = 0.04;
/// Lowest factor by code width: fewer codes clip more.
const COARSE_FLOOR: [(u8, f32); 4] = [(2, 0.24), (3, 0.36), (4, 0.52), (8, 0.36)];
/// Second sweep: this many steps of `FINE_STEP` to both sides of the winner.
const FINE_STEPS: i32 = 5;
const FINE_STEP: f32 = 0.007;
/// Zero points tried to both sides of the centring one, in the first and the second sweep.
pub(crate) const ZERO_REACH: [i32; 2] = [2, 1];

/// Factors of the spanning scale, in the order they are tried: that scale itself first.
pub(crate) fn coarse_factors(bits: u8) -> impl Iterator<Item = f32> {
    let floor = COARSE_FLOOR
        .iter()
        .find(|(b, _)| *b == bits)
        .map_or(0.5, |(_, f)| *f);
    let steps = ((COARSE_TOP - floor) / COARSE_STEP).round() as i32;
    let sweep = (0..=steps).map(|step| COARSE_TOP - COARSE_STEP * step as f32);
    std::iter::once(1.0).chain(sweep)
}

/// Factors of the first sweep's winner, which itself is kept before them.
pub(crate) fn fine_factors() -> impl Iterator<Item = f32> {
    (-FINE_STEPS..=FINE_STEPS)
        .filter(|&step| step != 0)
        .map(|step| 1.0 + FINE_STEP * step as f32)
}

/// The search, with its working memory.
pub(crate) struct Search {
    scheme: AffineScheme,
    scales: ScaleGrid,
    candidates: Vec<Candidate>,
    zeros: Vec<u8>,
    errors: Vec<f32>,
    /// How much each column counts; empty when all count the same.
    importance: Vec<f32>,
}

/// A column that never counts would let its group's scale run away: each counts a millionth of the mean at least.
pub(crate) fn floored(importance: &[f32]) -> Vec<f32> {
    let floor = importance.iter().sum::<f32>() / importance.len().max(1) as f32 * 1e-6;
    importance
        .iter()
        .map(|v| v.max(floor).max(f32::MIN_POSITIVE))
        .collect()
}

/// The values between which a zero point lies in a group, and the scale that spans them.
struct Extent {
    min: f32,
    max: f32,
    span_scale: f32,
}

impl Search {
    /// For groups of this scheme with scales of this grid, all columns counting the same.
    pub(crate) fn new(scheme: AffineScheme, scales: ScaleGrid) -> Self {
        Self {
            scheme,
            scales,
            candidates: Vec::new(),
            zeros: Vec::new(),
            errors: Vec::new(),
            importance: Vec::new(),
        }
    }

    /// Lets column c of every row count `importance[c]`.
    pub(crate) fn weigh(&mut self, importance: &[f32]) {
        self.importance = floored(importance);
    }

    /// The choice for one group whose values count `weights`.
    pub(crate) fn choose_weighted(&mut self, isa: Isa, group: &[f32], weights: &[f32]) -> GroupScale {
        self.weigh(weights);
        self.choose(isa, group, 0, absmax(isa, group))
    }

    /// Adds the candidates of one scale.
    fn push(&mut self, extent: &Extent, factor: f32, reach: i32) {
        let scale = self.scales.store(extent.span_scale * factor);
        if !scale.is_finite() {
            return;
        }
        let (lo, hi) = self.scheme.code_range();
        let (lo, hi) = (f32::from(lo), f32::from(hi));
        let mut push = |zero: f32| {
            self.zeros.push(zero as u8);
            self.candidates.push(Candidate {
                scale,
                inv_scale: 1.0 / scale,
                zero,
                lo,
                hi,
            });
        };
        match self.scheme.fixed_zero() {
            Some(zero) => push(f32::from(zero)),
            None => {
                let centre =
                    ((lo + hi) / 2.0 - (extent.min / scale + extent.max / scale) / 2.0).round_ties_even();
                for offset in -reach..=reach {
                    let zero = centre + offset as f32;
                    if zero >= lo && zero <= hi {
                        push(zero);
                    }
                }
            }
        }
    }

    /// Prices all candidates and returns the index of the cheapest.
    fn cheapest(&mut self, isa: Isa, group: &[f32], from: usize) -> Option<usize> {
        self.errors.clear();
        self.errors.resize(self.candidates.len(), 0.0);
        match self.importance.get(from..from + group.len()) {
            Some(weights) if !weights.is_empty() => {
                clip_errors_weighted(isa, group, weights, &self.candidates, &mut self.errors);
            }
            _ => clip_errors(isa, group, &self.candidates, &mut self.errors),
        }
        (0..self.errors.len()).min_by(|&a, &b| self.errors[a].total_cmp(&self.errors[b]))
    }
}

impl ChooseScale for Search {
    fn choose(&mut self, isa: Isa, group: &[f32], from: usize, top: f32) -> GroupScale {
        let scheme = self.scheme;
        let extent = match scheme.grid() {
            Grid::Symmetric | Grid::Narrow => Extent {
                min: -top,
                max: top,
                span_scale: top / symmetric_steps(scheme),
            },
            Grid::ZeroPoint => {
                let (min, max) = minmax(isa, group);
                let (min, max) = (min.min(0.0), max.max(0.0));
                let top = f32::from(scheme.code_range().1);
                Extent {
                    min,
                    max,
                    span_scale: max / top - min / top,
                }
            }
        };
        self.candidates.clear();
        self.zeros.clear();
        for factor in coarse_factors(scheme.bits()) {
            self.push(&extent, factor, ZERO_REACH[0]);
        }
        let Some(best) = self.cheapest(isa, group, from) else {
            return GroupScale {
                scale: f32::INFINITY,
                zero: 0,
            };
        };
        let (winner, zero) = (self.candidates[best], self.zeros[best]);
        // The winner stays first, so that a tie keeps it.
        self.candidates.clear();
        self.zeros.clear();
        self.candidates.push(winner);
        self.zeros.push(zero);
        let around = Extent {
            span_scale: winner.scale,
            ..extent
        };
        for factor in fine_factors() {
            self.push(&around, factor, ZERO_REACH[1]);
        }
        let best = self.cheapest(isa, group, from).unwrap_or(0);
        GroupScale {
            scale: self.candidates[best].scale,
            zero: self.zeros[best],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::{BlockFigures, measure};
    use crate::options::PartialOptions;

    fn gaussian(n: usize) -> Vec<f32> {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut uniform = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            ((state >> 40) as f32 + 0.5) / (1u64 << 24) as f32
        };
        (0..n)
            .map(|_| (-2.0 * uniform().ln()).sqrt() * (std::f32::consts::TAU * uniform()).cos())
            .collect()
    }

    fn relative_mse(options: &str, x: &[f32], n: usize) -> f64 {
        let options = PartialOptions::parse(options).unwrap().complete(8).unwrap();
        let quantizer = (crate::find(options.method).unwrap().build)(&options).unwrap();
        let k = x.len() / n;
        let w = quantizer.quantize(Isa::best(), x, n, k).unwrap();
        let mut figures = BlockFigures::default();
        measure(Isa::best(), x, &w, &mut figures);
        figures.sums.relative_mse()
    }

    /// Ceilings: measured on this sample 2026-11-23, plus 2 %.
    #[test]
    fn gaussian_error_is_near_the_best_known() {
        let x = gaussian(64 * 4096);
        for (options, ceiling) in [
            ("bits:4,group:64,clip:mse,scale:bf16", GAUSS_SYM_G64),
            ("bits:4,group:128,clip:mse,scale:f16", GAUSS_SYM_G128),
            ("bits:4,group:64,grid:zp,clip:mse,scale:f16", GAUSS_ZP_G64),
        ] {
            let clipped = relative_mse(options, &x, 64);
            let plain = relative_mse(&options.replace("mse", "none"), &x, 64);
            println!("{options}: {clipped:.5} against {plain:.5} by plain rounding");
            assert!(
                clipped < ceiling && clipped < plain,
                "{options}: {clipped} {plain}"
            );
        }
    }
    const GAUSS_SYM_G64: f64 = 0.00914;
    const GAUSS_SYM_G128: f64 = 0.01037;
    const GAUSS_ZP_G64: f64 = 0.00773;

    /// An exhaustive f64 search over 2000 scales finds hardly more.
    #[test]
    fn close_to_an_exhaustive_search() {
        let x = gaussian(64 * 64);
        let mut exhaustive = 0.0f64;
        for group in x.chunks_exact(64) {
            let max = group.iter().fold(0f32, |m, v| m.max(v.abs())) as f64;
            let price = |scale: f64| -> f64 {
                group
                    .iter()
                    .map(|&w| (w as f64 - (w as f64 / scale).round().clamp(-8.0, 7.0) * scale).powi(2))
                    .sum()
            };
            exhaustive += (1..2000)
                .map(|i| price(max / 7.5 * (0.4 + i as f64 / 2000.0)))
                .fold(f64::INFINITY, f64::min);
        }
        let energy: f64 = x.iter().map(|&v| (v as f64).powi(2)).sum();
        let ours = relative_mse("bits:4,group:64,clip:mse,scale:f32", &x, 64);
        assert!(
            ours < exhaustive / energy * 1.01,
            "{ours} against {}",
            exhaustive / energy
        );
    }

    #[test]
    fn never_worse_than_plain_rounding_even_on_odd_groups() {
        let mut outlier = gaussian(256);
        outlier[17] = 60.0;
        let mut ramp: Vec<f32> = (0..256).map(|i| i as f32).collect();
        ramp.iter_mut().for_each(|v| *v = v.powi(3));
        let mut cases = 0;
        for x in [
            outlier,
            ramp,
            vec![3.0; 256],
            vec![1e-30; 256],
            (0..256).map(|i| (i % 2) as f32).collect(),
        ] {
            for base in [
                "bits:4,group:64",
                "bits:4,group:row,grid:zp",
                "bits:8",
                "bits:8,grid:zp,group:32",
            ] {
                let clipped = relative_mse(&format!("{base},clip:mse"), &x, 1);
                let plain = relative_mse(&format!("{base},clip:none"), &x, 1);
                assert!(
                    clipped <= plain * 1.0001,
                    "{base}: {clipped} > {plain} for {:?}...",
                    &x[..3]
                );
                cases += 1;
            }
        }
        assert_eq!(cases, 20);
    }
}
