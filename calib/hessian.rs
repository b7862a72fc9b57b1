//! The second moment of a layer's inputs, made ready for error feedback. Owns damping, dead inputs, the order of
//! columns, and the factor all rows of a weight share.
//!
//! ```text
//! cost of errors e (1, K) of a row:   e H e^T = |e V|^2        H = V V^T, V upper triangular
//! ```
//!
//! Column j of e V holds e_0 .. e_j alone. Going through the columns in order, with r_j the part of column j that
//! earlier errors have caused, the target of column j is w_j + r_j / V_jj: the error feedback of GPTQ (Frantar et
//! al., arXiv 2210.17323), in the triangular form of LDLQ (Chee et al., arXiv 2307.13304), which are equal.
//!
//! H is shrunk toward its diagonal: H' = (1 - a) H + a diag(H), with a from [`shrinkage`]. In the quantized model the
//! layer's input is off by the errors of all layers before it, and those have little in common with the moment that
//! was measured: a cancellation between columns that H promises is kept only in part. The fewer the bits, the less.
//! Of inputs that were rotated after measuring, the diagonal means nothing: there the original's diagonal, rotated,
//! stands in its place ([`LayerStats::independent`]).
//!
//! Damping: `damp` times the mean of the diagonal is added to it; when the factorisation fails, ten times as much,
//! up to [`MOST_DAMPING`]; after that there is no factor, and callers go by the diagonal alone. An input that is
//! always zero (a dead one) has a diagonal of zero and gets the damping only. H is scaled to a mean diagonal of 1.

use std::ops::Range;

use faer::{Mat, Side};
use qtool_kernels::{Isa, add_scaled};

use crate::stats::LayerStats;

/// Damping as a share of the mean diagonal, first try.
pub const DAMPING: f64 = 0.001;
/// Largest damping tried.
pub const MOST_DAMPING: f64 = 1.0;

/// How far H is shrunk toward its diagonal for codes of that many bits. Measured on SmolLM2-135M, see
/// `docs/benchmarks/calibration-2026-11-25.md`.
pub fn shrinkage(bits: u8) -> f64 {
    match bits {
        0..=2 => 0.2,
        3 | 4 => 0.1,
        _ => 0.02,
    }
}

/// H and its factor, with rows and columns in the order in which they are quantized.
#[derive(Debug, Clone, PartialEq)]
pub struct Factor {
    k: usize,
    order: Vec<usize>,
    h: Vec<f32>,
    v: Vec<f32>,
    /// What H was shrunk toward, in the same order, unless it is the diagonal.
    independent: Option<Vec<f32>>,
    damping: f64,
    shrinkage: f64,
}

impl Factor {
    /// Factors the second moment with column `order[i]` in place i. `None` when only a diagonal is known, all
    /// inputs are dead, or no damping makes it positive definite.
    pub fn new(stats: &LayerStats, order: Vec<usize>, damp: f64, shrink: f64) -> Option<Self> {
        let k = stats.columns();
        let moment = stats.hessian()?;
        let mean = (0..k).map(|i| moment[i * k + i]).sum::<f64>() / k.max(1) as f64;
        if !(mean > 0.0 && mean.is_finite()) {
            return None;
        }

        let independent = stats.independent();
        let toward = |i: usize, j: usize| match &independent {
            Some(sums) => sums[order[i] * k + order[j]] / mean,
            None if i == j => moment[order[i] * k + order[j]] / mean,
            None => 0.0,
        };
        let at = |i: usize, j: usize| {
            if independent.is_none() && i == j {
                return toward(i, j);
            }
            moment[order[i] * k + order[j]] / mean * (1.0 - shrink) + shrink * toward(i, j)
        };
        let mut damping = damp;
        while damping <= MOST_DAMPING * 1.000_001 {
            let damped = |i: usize, j: usize| at(i, j) + if i == j { damping } else { 0.0 };
            if let Some(v) = upper_factor(k, damped) {
                let h = (0..k * k).map(|at| damped(at / k, at % k) as f32).collect();
                let places = || (0..k * k).map(|at| toward(at / k, at % k) as f32).collect();
                let independent = independent.as_ref().map(|_| places());
                return Some(Self {
                    k,
                    order,
                    h,
                    v,
                    independent,
                    damping,
                    shrinkage: shrink,
                });
            }
            damping *= 10.0;
        }
        None
    }

    /// K.
    pub fn columns(&self) -> usize {
        self.k
    }

    /// Which column lies in each place.
    pub fn order(&self) -> &[usize] {
        &self.order
    }

    /// Row `i` of V, from its diagonal on: K - i numbers.
    pub fn v(&self, i: usize) -> &[f32] {
        &self.v[i * self.k + i..(i + 1) * self.k]
    }

    /// V_ij, for i <= j.
    pub fn v_at(&self, i: usize, j: usize) -> f32 {
        self.v[i * self.k + j]
    }

    /// Row `i` of H, damped, K numbers.
    pub fn h(&self, i: usize) -> &[f32] {
        &self.h[i * self.k..(i + 1) * self.k]
    }

    /// What `columns` of a row should be if each could be met exactly, after earlier errors caused `r` (K): the solution of
    /// d V_C = r_C, added to `w` (K, in this order).
    pub fn targets(&self, columns: Range<usize>, w: &[f32], r: &[f32]) -> Vec<f32> {
        if columns.start == 0 {
            return w[columns].to_vec();
        }
        let mut carried = vec![0f32; columns.len()];
        let mut targets = Vec::with_capacity(columns.len());
        for j in columns.clone() {
            let line = &self.v(j)[..columns.end - j];
            let delta = (r[j] - carried[j - columns.start]) / line[0];
            for (sum, v) in carried[j - columns.start..].iter_mut().zip(line) {
                *sum += delta * v;
            }
            targets.push(w[j] + delta);
        }
        targets
    }

    /// The damping it took.
    pub fn damping(&self) -> f64 {
        self.damping
    }

    /// The shrinkage it was made with.
    pub fn shrinkage(&self) -> f64 {
        self.shrinkage
    }

    /// e H e^T of errors in the factor's order under the moment as it was measured: not shrunk, not damped.
    pub fn measured_cost(&self, isa: Isa, e: &[f32]) -> f64 {
        let diagonal = |by: &dyn Fn(f64) -> f64| -> f64 {
            let squares = e.iter().map(|e| f64::from(*e).powi(2)).enumerate();
            squares
                .map(|(i, square)| square * by(f64::from(self.h[i * self.k + i])))
                .sum()
        };
        if let Some(independent) = &self.independent {
            let shrunk =
                cost(isa, self, e) - self.damping * e.iter().map(|e| f64::from(*e).powi(2)).sum::<f64>();
            return (shrunk - self.shrinkage * quadratic(isa, independent, e)) / (1.0 - self.shrinkage);
        }
        let apart = cost(isa, self, e) - diagonal(&|h| h);
        apart / (1.0 - self.shrinkage) + diagonal(&|h| h - self.damping)
    }
}

/// e H e^T of errors in the factor's order.
pub fn cost(isa: Isa, factor: &Factor, e: &[f32]) -> f64 {
    quadratic(isa, &factor.h, e)
}

/// e H.
pub fn gradient(isa: Isa, factor: &Factor, e: &[f32]) -> Vec<f32> {
    product(isa, &factor.h, factor.columns(), e)
}

/// e M e^T, M (K, K).
fn quadratic(isa: Isa, m: &[f32], e: &[f32]) -> f64 {
    let product = product(isa, m, e.len(), e);
    product
        .iter()
        .zip(e)
        .map(|(g, e)| f64::from(*g) * f64::from(*e))
        .sum()
}

/// e M, M (K, K).
fn product(isa: Isa, m: &[f32], k: usize, e: &[f32]) -> Vec<f32> {
    let row = |i: usize| &m[i * k..(i + 1) * k];
    let mut out = vec![0f32; k];
    for i in (0..k).step_by(4) {
        let scale = std::array::from_fn(|d| e.get(i + d).copied().unwrap_or(0.0));
        if scale != [0.0; 4] {
            add_scaled(
                isa,
                scale,
                std::array::from_fn(|d| row((i + d).min(k - 1))),
                &mut out,
            );
        }
    }
    out
}

/// V of H = V V^T, upper triangular, (k, k) with zeros below the diagonal. `None` when H is not positive definite.
pub(crate) fn upper_factor(k: usize, h: impl Fn(usize, usize) -> f64) -> Option<Vec<f32>> {
    // The upper factor is the lower one of the matrix turned by 180 degrees, turned back.
    let turned = Mat::<f64>::from_fn(k, k, |i, j| h(k - 1 - i, k - 1 - j));
    let factor = turned.llt(Side::Lower).ok()?;
    let lower = factor.L();
    let mut v = vec![0f32; k * k];
    for i in 0..k {
        for j in i..k {
            v[i * k + j] = lower[(k - 1 - i, k - 1 - j)] as f32;
        }
    }
    let sound = (0..k).all(|i| v[i * k + i] > 0.0) && v.iter().all(|v| v.is_finite());
    sound.then_some(v)
}

/// Columns in blocks of `inner` that stay together, those in groups of `outer` that stay together (both of equal
/// length, except for the last): groups by falling importance, blocks within each likewise; earlier first on ties.
/// An order of this kind needs no index at run time.
pub fn order_by_importance(importance: &[f32], outer: usize, inner: usize) -> Vec<usize> {
    let sum = |range: &Range<usize>| {
        importance[range.clone()]
            .iter()
            .map(|&v| f64::from(v))
            .sum::<f64>()
    };
    let sorted = |from: usize, to: usize, step: usize| {
        let mut parts: Vec<(f64, Range<usize>)> = (from..to)
            .step_by(step.max(1))
            .map(|start| start..to.min(start + step))
            .map(|range| (sum(&range), range))
            .collect();
        parts.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.start.cmp(&b.1.start)));
        parts.into_iter().map(|(_, range)| range)
    };
    let groups = sorted(0, importance.len(), outer);
    groups
        .flat_map(|group| {
            sorted(group.start, group.end, inner)
                .flatten()
                .collect::<Vec<_>>()
        })
        .collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::stats::Moment;

    /// Statistics of `rows` rows made of a few common directions and some noise: ill-conditioned, with one dead
    /// column (the last) when `dead`.
    pub(crate) fn correlated(k: usize, rows: usize, seed: u64, dead: bool) -> LayerStats {
        let mut next = noise(seed);
        let directions = 5;
        let mix: Vec<f32> = (0..directions * k).map(|_| next()).collect();
        let mut x = vec![0f32; rows * k];
        for row in x.chunks_exact_mut(k) {
            let strength: Vec<f32> = (0..directions)
                .map(|d| next() * (4.0 / (1 << d) as f32))
                .collect();
            for (c, x) in row.iter_mut().enumerate() {
                *x = 0.05 * next() + (0..directions).map(|d| strength[d] * mix[d * k + c]).sum::<f32>();
                if dead && c + 1 == k {
                    *x = 0.0;
                }
            }
        }
        of_rows(&x, k)
    }

    pub(crate) fn of_rows(x: &[f32], k: usize) -> LayerStats {
        let (mut h, mut tops) = (vec![0.0; k * k], vec![0f32; k]);
        for row in x.chunks_exact(k) {
            for i in 0..k {
                tops[i] = tops[i].max(row[i].abs());
                for j in 0..k {
                    h[i * k + j] += f64::from(row[i]) * f64::from(row[j]);
                }
            }
        }
        LayerStats::new(k, (x.len() / k) as u64, Moment::Full(h), tops).unwrap()
    }

    /// V of the module's text in f64, (K, K): the Cholesky factor of the turned matrix, by hand, turned back.
    pub(crate) fn slow_factor(stats: &LayerStats, order: &[usize], shrink: f64) -> Vec<f64> {
        let k = order.len();
        let h = stats.hessian().unwrap();
        let mean = (0..k).map(|i| h[i * k + i]).sum::<f64>() / k as f64;
        let at = |i: usize, j: usize| {
            let h = h[order[i] * k + order[j]] / mean;
            if i == j { h + DAMPING } else { h * (1.0 - shrink) }
        };
        let mut lower = vec![0f64; k * k];
        for i in 0..k {
            for j in 0..=i {
                let sum: f64 = (0..j).map(|c| lower[i * k + c] * lower[j * k + c]).sum();
                let value = at(k - 1 - i, k - 1 - j) - sum;
                lower[i * k + j] = if i == j {
                    value.sqrt()
                } else {
                    value / lower[j * k + j]
                };
            }
        }
        (0..k * k)
            .map(|at| lower[(k - 1 - at / k) * k + (k - 1 - at % k)])
            .collect()
    }

    /// Numbers between -1 and 1.
    pub(crate) fn noise(seed: u64) -> impl FnMut() -> f32 {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        }
    }

    #[test]
    fn the_factor_multiplies_back() {
        let stats = correlated(24, 40, 3, true);
        let order = order_by_importance(&stats.importance(), 8, 4);
        let factor = Factor::new(&stats, order, DAMPING, 0.1).unwrap();
        let k = factor.columns();
        for i in 0..k {
            for j in 0..k {
                let product: f64 = (i.max(j)..k)
                    .map(|c| f64::from(factor.v_at(i, c)) * f64::from(factor.v_at(j, c)))
                    .sum();
                assert!((product - f64::from(factor.h(i)[j])).abs() < 1e-4, "{i} {j}");
            }
        }
        let moment = stats.hessian().unwrap();
        let mean = (0..k).map(|i| moment[i * k + i]).sum::<f64>() / k as f64;
        let (a, b) = (factor.order()[2], factor.order()[5]);
        let shrunk = 0.9 * moment[a * k + b] / mean;
        assert!((f64::from(factor.h(2)[5]) - shrunk).abs() < 1e-6);
        let e: Vec<f32> = (0..k).map(|i| (i as f32 * 0.7).sin()).collect();
        let mut slow = 0.0;
        for i in 0..k {
            for j in 0..k {
                slow += f64::from(e[i] * e[j]) * moment[factor.order()[i] * k + factor.order()[j]] / mean;
            }
        }
        let fast = factor.measured_cost(Isa::best(), &e);
        assert!((fast / slow - 1.0).abs() < 1e-4, "{fast} {slow}");

        // Shrunk toward another matrix than the diagonal; what was measured comes out again.
        let toward = correlated(24, 30, 8, false).hessian().unwrap();
        let rows = stats.rows() as f64;
        let rotated = stats.clone();
        let rotated = rotated
            .with_independent(toward.iter().map(|h| h * rows).collect())
            .unwrap();
        let factor = Factor::new(&rotated, factor.order().to_vec(), DAMPING, 0.3).unwrap();
        for (i, j) in [(2, 5), (3, 3)] {
            let at = factor.order()[i] * k + factor.order()[j];
            let damping = if i == j { factor.damping() } else { 0.0 };
            let expected = (0.7 * moment[at] + 0.3 * toward[at]) / mean + damping;
            assert!((f64::from(factor.h(i)[j]) - expected).abs() < 1e-5, "{i} {j}");
        }
        let fast = factor.measured_cost(Isa::best(), &e);
        assert!((fast / slow - 1.0).abs() < 1e-3, "{fast} {slow}");
    }

    #[test]
    fn singular_moments_are_damped_and_empty_ones_have_no_factor() {
        let one = of_rows(&[1.0, 2.0, 3.0, 4.0], 4);
        let factor = Factor::new(&one, (0..4).collect(), 1e-20, 0.0).unwrap();
        assert!(factor.damping() > 1e-20, "rank one needs more than that");
        let diagonal = LayerStats::new(4, 1, Moment::Diagonal(vec![1.0; 4]), vec![1.0; 4]).unwrap();
        for stats in [of_rows(&[], 4), diagonal] {
            assert_eq!(Factor::new(&stats, (0..4).collect(), DAMPING, 0.1), None);
        }
    }

    #[test]
    fn groups_stay_together() {
        let order = order_by_importance(&[1.0, 1.0, 5.0, 0.0, 9.0, 1.0, 2.0, 9.0], 4, 2);
        assert_eq!(order, [6, 7, 4, 5, 2, 3, 0, 1]);
        assert_eq!(order_by_importance(&[1.0, 3.0, 2.0], 8, 1), [1, 2, 0]);
    }
}
