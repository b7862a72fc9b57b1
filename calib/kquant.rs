//! `q4-k` and `q2-k`: GGML's K types. Owns the choice of their numbers, a super-block of 256 weights at a time.
//!
//! ```text
//! minimise  sum_k h_k (w_k - (d s code_k - dmin m))^2,    h = mean square of the inputs, or 1
//! ```
//!
//! 1. Each group by itself: codes for some two dozen scales around the one that spans it, and for each the scale and
//!    minimum that fit these codes best (a weighted line). The minimum is not above zero.
//! 2. d and dmin are the largest scale and minimum over their highest number, as F16.
//! 3. Each group's s and m: the rounded ones, or a neighbour that leaves less error, with the nearest codes.
//! 4. d and dmin that fit these codes best, as F16; 3 again; as long as the error shrinks, three times at most.
//!
//! Arithmetic is plain f32 in one order, with sums of a fit in f64: every instruction set gives the same.

use half::f16;
use qtool_formats::scheme::kquant::{KQuant, SUPER_BLOCK};
use qtool_formats::weight::KWeight;
use qtool_formats::weight::kquant::KScales;
use qtool_formats::{QuantizedWeight, Scheme};
use qtool_kernels::{Isa, first_non_finite};

use crate::stats::LayerStats;
use crate::{CalibError, Evidence, Method, Quantizer, Result};

/// The registry entry of 4 bits.
pub const Q4: Method = Method {
    name: "q4-k",
    bits: &[4],
    summary: "GGML's Q4_K: groups of 32 with 6-bit scales and minima, 4.5 bits a weight (llama.cpp)",
    build: |_| Ok(Box::new(KQuantizer::new(KQuant::Q4))),
};

/// The registry entry of 2 bits.
pub const Q2: Method = Method {
    name: "q2-k",
    bits: &[2],
    summary: "GGML's Q2_K: groups of 16 with 4-bit scales and minima, 2.625 bits a weight (llama.cpp)",
    build: |_| Ok(Box::new(KQuantizer::new(KQuant::Q2))),
};

/// Scales tried for a group: this many steps of a tenth of a code to both sides of the spanning one.
const STEPS: i32 = 12;
/// Times that d and dmin are fitted anew.
const ROUNDS: usize = 3;

struct KQuantizer {
    kind: KQuant,
    /// How much each column counts; empty when all count the same.
    importance: Vec<f32>,
}

impl KQuantizer {
    fn new(kind: KQuant) -> Self {
        Self {
            kind,
            importance: Vec::new(),
        }
    }
}

impl Quantizer for KQuantizer {
    fn scheme(&self) -> Scheme {
        Scheme::K(self.kind)
    }

    fn describe(&self) -> String {
        let weighted = if self.importance.is_empty() {
            ""
        } else {
            ", weighted by inputs"
        };
        format!("{}{weighted}", self.kind.name())
    }

    fn evidence(&self) -> Evidence {
        Evidence::Diagonal
    }

    fn informed(&self, stats: &LayerStats) -> Result<Box<dyn Quantizer>> {
        let importance = stats.importance();
        // A column that never counts would let its group's numbers run away.
        let floor = importance.iter().sum::<f32>() / importance.len().max(1) as f32 * 1e-6;
        Ok(Box::new(Self {
            kind: self.kind,
            importance: importance
                .iter()
                .map(|v| v.max(floor).max(f32::MIN_POSITIVE))
                .collect(),
        }))
    }

    fn quantize(&self, _: Isa, x: &[f32], n: usize, k: usize) -> Result<QuantizedWeight> {
        self.scheme().parts(n, k)?;
        if !self.importance.is_empty() && self.importance.len() != k {
            return Err(CalibError::Statistics {
                reason: format!("expected rows of {} columns, got {k}", self.importance.len()),
            });
        }
        if let Some(at) = first_non_finite(x) {
            return Err(CalibError::NonFinite {
                row: at / k,
                column: at % k,
                value: x[at].to_string(),
            });
        }
        let same = [1f32; SUPER_BLOCK];
        let mut codes = Vec::with_capacity(x.len());
        let mut numbers = KScales::default();
        for (i, w) in x.chunks_exact(SUPER_BLOCK).enumerate() {
            let column = i * SUPER_BLOCK % k;
            let weights = self.importance.get(column..column + SUPER_BLOCK);
            let row = i * SUPER_BLOCK / k;
            let block = SuperBlock::of(self.kind, row, w, weights.unwrap_or(&same))?;
            codes.extend_from_slice(&block.codes);
            numbers.scales.extend_from_slice(&block.scales);
            numbers.mins.extend_from_slice(&block.mins);
            numbers.super_scales.push(block.d);
            numbers.super_mins.push(block.dmin);
        }
        Ok(QuantizedWeight::K(KWeight::new(self.kind, n, k, codes, numbers)?))
    }
}

/// 256 weights, quantized.
#[derive(Debug, Clone)]
struct SuperBlock {
    d: f16,
    dmin: f16,
    scales: Vec<u8>,
    mins: Vec<u8>,
    codes: Vec<u8>,
    error: f32,
}

impl SuperBlock {
    fn of(kind: KQuant, row: usize, w: &[f32], weights: &[f32]) -> Result<Self> {
        let group = kind.group();
        let top = ((1u16 << kind.bits()) - 1) as f32;
        let ideal: Vec<(f32, f32)> = w
            .chunks_exact(group)
            .zip(weights.chunks_exact(group))
            .map(|(w, h)| fit_group(w, h, top))
            .collect();
        let most = f32::from((1u16 << kind.scale_bits()) - 1);
        let largest = |of: fn(&(f32, f32)) -> f32| ideal.iter().map(of).fold(0f32, f32::max);
        let (d, dmin) = (
            half(kind, row, largest(|g| g.0) / most)?,
            half(kind, row, largest(|g| g.1) / most)?,
        );
        let mut best = Self::with(kind, d, dmin, &ideal, w, weights);
        for _ in 0..ROUNDS {
            let Some((d, dmin)) = best.fitted(kind, w, weights) else {
                break;
            };
            let next = Self::with(kind, d, dmin, &ideal, w, weights);
            if next.error >= best.error {
                break;
            }
            best = next;
        }
        Ok(best)
    }

    /// The groups' numbers and codes under these of the super-block.
    fn with(kind: KQuant, d: f16, dmin: f16, ideal: &[(f32, f32)], w: &[f32], weights: &[f32]) -> Self {
        let (group, most) = (kind.group(), f32::from((1u16 << kind.scale_bits()) - 1));
        let top = ((1u16 << kind.bits()) - 1) as f32;
        let mut block = Self {
            d,
            dmin,
            scales: Vec::with_capacity(ideal.len()),
            mins: Vec::with_capacity(ideal.len()),
            codes: Vec::with_capacity(w.len()),
            error: 0.0,
        };
        let near = |wanted: f32, unit: f32| -> f32 {
            if unit > 0.0 {
                (wanted / unit).round_ties_even().min(most)
            } else {
                0.0
            }
        };
        let groups = w.chunks_exact(group).zip(weights.chunks_exact(group));
        for ((w, h), (scale, min)) in groups.zip(ideal) {
            let (s, m) = (near(*scale, d.to_f32()), near(*min, dmin.to_f32()));
            let mut chosen = (s, m, f32::INFINITY);
            for (ds, dm) in NEIGHBOURS {
                let (s, m) = (s + ds, m + dm);
                if s < 0.0 || m < 0.0 || s > most || m > most {
                    continue;
                }
                let error = group_error(w, h, d.to_f32() * s, dmin.to_f32() * m, top);
                if error < chosen.2 {
                    chosen = (s, m, error);
                }
            }
            let (s, m, error) = chosen;
            let (scale, min) = (d.to_f32() * s, dmin.to_f32() * m);
            block.scales.push(s as u8);
            block.mins.push(m as u8);
            let inverse = inverse(scale);
            block
                .codes
                .extend(w.iter().map(|w| nearest(*w, inverse, min, top) as u8));
            block.error += error;
        }
        block
    }

    /// The d and dmin that fit its codes best; `None` where they are not determined, or are no F16 above zero.
    fn fitted(&self, kind: KQuant, w: &[f32], weights: &[f32]) -> Option<(f16, f16)> {
        // w = d a - dmin b, with a = s code and b = m.
        let (mut aa, mut ab, mut bb, mut aw, mut bw) = (0f64, 0f64, 0f64, 0f64, 0f64);
        let group = kind.group();
        for (i, (w, h)) in w.iter().zip(weights).enumerate() {
            let (w, h) = (f64::from(*w), f64::from(*h));
            let a = f64::from(self.scales[i / group]) * f64::from(self.codes[i]);
            let b = f64::from(self.mins[i / group]);
            aa += h * a * a;
            ab += h * a * b;
            bb += h * b * b;
            aw += h * a * w;
            bw += h * b * w;
        }
        let determinant = aa * bb - ab * ab;
        let (d, dmin) = if determinant > 1e-9 * aa * bb {
            (
                (aw * bb - bw * ab) / determinant,
                (aw * ab - bw * aa) / determinant,
            )
        } else if aa > 0.0 && bb == 0.0 {
            (aw / aa, 0.0)
        } else {
            return None;
        };
        let (d, dmin) = (f16::from_f64(d), f16::from_f64(dmin));
        let usable = |v: f16| v.is_finite() && v.to_f32() >= 0.0;
        (usable(d) && usable(dmin)).then_some((d, dmin))
    }
}

/// The numbers as they round, and those beside them; of two as good the first is taken.
const NEIGHBOURS: [(f32, f32); 9] = [
    (0.0, 0.0),
    (1.0, 0.0),
    (-1.0, 0.0),
    (0.0, 1.0),
    (0.0, -1.0),
    (1.0, 1.0),
    (-1.0, -1.0),
    (1.0, -1.0),
    (-1.0, 1.0),
];

fn half(kind: KQuant, row: usize, value: f32) -> Result<f16> {
    let half = f16::from_f32(value);
    if half.is_finite() {
        return Ok(half);
    }
    Err(CalibError::SuperScaleOverflow {
        row,
        scale: value,
        scheme: kind.name(),
        bits: kind.bits(),
    })
}

fn inverse(scale: f32) -> f32 {
    let inverse = 1.0 / scale;
    if inverse.is_finite() { inverse } else { 0.0 }
}

/// The code whose value is nearest to `w`.
#[inline(always)]
fn nearest(w: f32, inverse: f32, min: f32, top: f32) -> f32 {
    ((w + min) * inverse).round_ties_even().clamp(0.0, top)
}

/// Weighted squared error of a group under a scale and a minimum.
fn group_error(w: &[f32], h: &[f32], scale: f32, min: f32, top: f32) -> f32 {
    let inverse = inverse(scale);
    // Sixteen sums side by side, so that they can be vectors.
    let mut sums = [0f32; 16];
    for (w, h) in w.chunks_exact(16).zip(h.chunks_exact(16)) {
        for (sum, (w, h)) in sums.iter_mut().zip(w.iter().zip(h)) {
            let e = w - (scale * nearest(*w, inverse, min, top) - min);
            *sum += h * e * e;
        }
    }
    sums.iter().sum()
}

/// Scale and minimum (what is taken off, not below zero) of a group by itself.
fn fit_group(w: &[f32], h: &[f32], top: f32) -> (f32, f32) {
    let low = w.iter().fold(0f32, |m, w| m.min(*w));
    let high = w.iter().fold(0f32, |m, w| m.max(*w));
    let span = high - low;
    if span == 0.0 || !span.is_finite() {
        return (if span == 0.0 { 0.0 } else { f32::INFINITY }, 0.0);
    }
    let mut best = (span / top, -low);
    let mut least = group_error(w, h, best.0, best.1, top);
    for step in -STEPS..=STEPS {
        let scale = span / (top + 0.1 * step as f32);
        let Some((scale, min)) = line(w, h, inverse(scale), -low, top) else {
            continue;
        };
        let error = group_error(w, h, scale, min, top);
        if error < least {
            (best, least) = ((scale, min), error);
        }
    }
    best
}

/// The scale and minimum that fit best to the codes that these give: the weighted line w = scale * code - min.
fn line(w: &[f32], h: &[f32], inverse: f32, min: f32, top: f32) -> Option<(f32, f32)> {
    let (mut sum, mut c, mut cc, mut x, mut cx) = (0f32, 0f32, 0f32, 0f32, 0f32);
    for (w, h) in w.iter().zip(h) {
        let code = nearest(*w, inverse, min, top);
        let weighted = h * code;
        sum += h;
        c += weighted;
        cc += weighted * code;
        x += h * w;
        cx += weighted * w;
    }
    let determinant = sum * cc - c * c;
    if determinant <= 0.0 {
        return None;
    }
    let (scale, min) = ((sum * cx - c * x) / determinant, (c * cx - cc * x) / determinant);
    let (scale, min) = if min < 0.0 { (cx / cc, 0.0) } else { (scale, min) };
    (scale > 0.0 && scale.is_finite() && min.is_finite()).then_some((scale, min))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::Moment;

    /// Something like a normal distribution, the same on every run.
    fn numbers(seed: u64, count: usize) -> Vec<f32> {
        let mut state = seed;
        let mut uniform = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        };
        (0..count)
            .map(|_| (0..6).map(|_| uniform()).sum::<f32>() * 0.05)
            .collect()
    }

    fn errors(x: &[f32], weight: &QuantizedWeight, importance: &[f32]) -> f64 {
        let (n, k) = weight.dims();
        let mut row = vec![0f32; k];
        let mut sum = 0.0;
        for i in 0..n {
            weight.dequantize_row(i, &mut row);
            let of_row = x[i * k..].iter().zip(&row).zip(importance);
            sum += of_row
                .map(|((x, y), h)| f64::from(*h) * f64::from(x - y).powi(2))
                .sum::<f64>();
        }
        sum
    }

    /// Weights that a super-block can hold exactly come out as they were, up to the last bits of F16.
    #[test]
    fn what_fits_is_found_again() {
        for kind in KQuant::ALL {
            let top = (1usize << kind.bits()) - 1;
            let most = (1usize << kind.scale_bits()) - 1;
            let group = kind.group();
            let x: Vec<f32> = (0..SUPER_BLOCK)
                .map(|i| {
                    let g = i / group;
                    // One group has the highest scale and minimum, every group both ends of its codes.
                    let (s, m) = (most - g % 5, most - 2 * (g % 3));
                    let code = if i % group < 2 {
                        i % group * top
                    } else {
                        i * 7 % (top + 1)
                    };
                    0.01 * (s * code) as f32 - 0.02 * m as f32
                })
                .collect();
            let weight = KQuantizer::new(kind).quantize(Isa::best(), &x, 1, 256).unwrap();
            let energy: f64 = x.iter().map(|x| f64::from(x * x)).sum();
            let error = errors(&x, &weight, &[1.0; 256]) / energy;
            assert!(error < 1e-5, "{kind:?}: {error:e}");
        }
    }

    #[test]
    fn inputs_decide_what_counts() {
        let k = 512;
        let x = numbers(5, 24 * k);
        let importance: Vec<f32> = (0..k).map(|c| if c % 7 == 3 { 100.0 } else { 0.5 }).collect();
        let sums = importance.iter().map(|v| f64::from(*v)).collect();
        let stats = LayerStats::new(k, 1, Moment::Diagonal(sums), vec![1.0; k]).unwrap();
        for kind in KQuant::ALL {
            let plain = KQuantizer::new(kind);
            let informed = plain.informed(&stats).unwrap();
            assert!(informed.describe().contains("weighted by inputs"));
            let run = |q: &dyn Quantizer| q.quantize(Isa::best(), &x, 24, k).unwrap();
            let (a, b) = (run(&plain), run(informed.as_ref()));
            let (under, over) = (errors(&x, &b, &importance), errors(&x, &a, &importance));
            assert!(under < 0.8 * over, "{kind:?}: {under} {over}");
            let same = vec![1.0; k];
            assert!(errors(&x, &a, &same) < errors(&x, &b, &same), "{kind:?}");
            assert!(
                informed
                    .quantize(Isa::best(), &x[..256], 1, 256)
                    .unwrap_err()
                    .to_string()
                    .contains("512")
            );
        }
    }

    /// Groups of 32 with 6-bit scales lose less than groups of 64 with their own F16 scale and zero point of whole codes.
    #[test]
    fn it_beats_affine_codes_of_more_bits() {
        let x = numbers(9, 16 * 512);
        let ours = KQuantizer::new(KQuant::Q4)
            .quantize(Isa::best(), &x, 16, 512)
            .unwrap();
        let options =
            crate::options::PartialOptions::parse("bits:4,group:64,grid:zp,clip:mse,scale:f16").unwrap();
        let affine = (crate::clip::METHOD.build)(&options.complete(4).unwrap()).unwrap();
        let affine = affine.quantize(Isa::best(), &x, 16, 512).unwrap();
        let same = vec![1.0; 512];
        assert!(errors(&x, &ours, &same) < errors(&x, &affine, &same));
        assert!(
            KQuantizer::new(KQuant::Q4)
                .quantize(Isa::best(), &x[..320], 1, 320)
                .is_err()
        );
    }
}
