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
//! With whole second moments, errors are fed back from column to column as well: `feedback`.
//!
//! Arithmetic is plain f32 in one order, with sums of a fit in f64: every instruction set gives the same.

use std::sync::Arc;

use half::f16;
use qtool_formats::scheme::kquant::{KQuant, SUPER_BLOCK};
use qtool_formats::weight::KWeight;
use qtool_formats::weight::kquant::KScales;
use qtool_formats::{QuantizedWeight, Scheme};
use qtool_kernels::{Isa, first_non_finite};

use crate::stats::LayerStats;
use crate::{CalibError, Evidence, Method, Quantizer, Result};

mod feedback;
use feedback::Feedback;

/// The registry entry of 4 bits.
pub const Q4: Method = Method {
    name: "q4-k",
    bits: &[4],
    summary: "GGML's Q4_K: groups of 32 with 6-bit scales and minima, 4.5 bits a weight (llama.cpp); error feedback with --calib",
    build: |_| Ok(Box::new(KQuantizer::new(KQuant::Q4))),
};

/// The registry entry of 2 bits.
pub const Q2: Method = Method {
    name: "q2-k",
    bits: &[2],
    summary: "GGML's Q2_K: groups of 16 with 4-bit scales and minima, 2.625 bits a weight (llama.cpp); error feedback with --calib",
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
    /// When the whole second moment is known.
    feedback: Option<Arc<Feedback>>,
}

/// Rows that are fed back together, so that the factor is read once for all of them.
const TOGETHER: usize = 16;

impl KQuantizer {
    fn new(kind: KQuant) -> Self {
        Self {
            kind,
            importance: Vec::new(),
            feedback: None,
        }
    }

    /// The blocks of a row by themselves, each column counting as much as `importance` says; all the same when it is empty.
    fn row(&self, number: usize, x: &[f32], importance: &[f32]) -> Result<Vec<SuperBlock>> {
        let same = [1f32; SUPER_BLOCK];
        let block = |(i, w): (usize, &[f32])| {
            let weights = importance.get(i * SUPER_BLOCK..(i + 1) * SUPER_BLOCK);
            SuperBlock::of(self.kind, number, w, weights.unwrap_or(&same))
        };
        x.chunks_exact(SUPER_BLOCK).enumerate().map(block).collect()
    }

    /// The blocks of a few rows of K weights, the first of which has the number `first`.
    fn rows(&self, isa: Isa, first: usize, x: &[f32], k: usize) -> Result<Vec<Vec<SuperBlock>>> {
        let alone = |importance: &[f32]| -> Result<Vec<Vec<SuperBlock>>> {
            let rows = x.chunks_exact(k).enumerate();
            rows.map(|(i, x)| self.row(first + i, x, importance)).collect()
        };
        let Some(feedback) = &self.feedback else {
            return alone(&self.importance);
        };
        let fed_back = feedback.rows(isa, first, x)?;
        let others = alone(&self.importance)?.into_iter().zip(alone(&[])?);
        let best = |((x, fed_back), (weighted, plain)): ((&[f32], Vec<SuperBlock>), _)| {
            let costed = |blocks: Vec<SuperBlock>| (feedback.cost(isa, x, &blocks), blocks);
            let less = |a: (f64, _), b: (f64, _)| if b.0 < a.0 { b } else { a };
            less(less(costed(fed_back), costed(weighted)), costed(plain)).1
        };
        Ok(x.chunks_exact(k).zip(fed_back).zip(others).map(best).collect())
    }
}

impl Quantizer for KQuantizer {
    fn scheme(&self) -> Scheme {
        Scheme::K(self.kind)
    }

    fn describe(&self) -> String {
        let how = match &self.feedback {
            Some(feedback) => format!(", {}", feedback.describe()),
            None if self.importance.is_empty() => String::new(),
            None => ", weighted by inputs".to_owned(),
        };
        format!("{}{how}", self.kind.name())
    }

    fn evidence(&self) -> Evidence {
        Evidence::Full
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
            feedback: Feedback::new(self.kind, stats).map(Arc::new),
        }))
    }

    fn quantize(&self, isa: Isa, x: &[f32], n: usize, k: usize) -> Result<QuantizedWeight> {
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
        let mut codes = Vec::with_capacity(x.len());
        let mut numbers = KScales::default();
        for (batch, x) in x.chunks(TOGETHER * k).enumerate() {
            for block in self.rows(isa, batch * TOGETHER, x, k)?.into_iter().flatten() {
                codes.extend_from_slice(&block.codes);
                numbers.scales.extend_from_slice(&block.scales);
                numbers.mins.extend_from_slice(&block.mins);
                numbers.super_scales.push(block.d);
                numbers.super_mins.push(block.dmin);
            }
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
mod tests;
