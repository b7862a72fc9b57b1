//! One group of a row, all else fixed: its codes for given scale and zero point by feedback within the group, and the
//! best of a few scales and zero points by the error that is really left. Owns the metric of a group.
//!
//! ```text
//! cost of errors e of the group:   |r + e V|^2      V upper triangular, e = w - (code - z) s
//! ```
//!
//! While errors are fed back, V is the group's block of the factor and r what earlier columns have caused. Later,
//! when all columns have codes, V is the factor of the group's block of H, and r is what the other columns' errors
//! ask of it.

use std::ops::RangeInclusive;

use qtool_formats::scheme::AffineScheme;
use qtool_kernels::{Isa, add_scaled};

use crate::affine::GroupScale;
use crate::scale_grid::ScaleGrid;

/// Columns whose errors are carried on together.
pub(super) const STEP: usize = 4;

/// An upper triangle, (len, len): row i from its diagonal on.
pub(super) trait Triangle {
    /// V_ij for j in i..len.
    fn line(&self, i: usize) -> &[f32];
}

/// What a group is to meet.
pub(super) struct Task<'a, T: Triangle> {
    pub(super) scheme: AffineScheme,
    pub(super) scales: ScaleGrid,
    pub(super) v: &'a T,
    /// Weights, (len).
    pub(super) w: &'a [f32],
    /// What is there already in each column of e V, (len).
    pub(super) r: &'a [f32],
}

/// Codes of a group and the errors they leave.
#[derive(Debug, Clone, Default)]
pub(super) struct Coded {
    pub(super) codes: Vec<u8>,
    pub(super) e: Vec<f32>,
    pub(super) cost: f64,
    r: Vec<f32>,
}

impl<T: Triangle> Task<'_, T> {
    /// Rounds the group column by column with this scale. False, with nothing to be used in `out`, as soon as the
    /// cost reaches `limit`.
    pub(super) fn round(&self, isa: Isa, chosen: GroupScale, limit: f64, out: &mut Coded) -> bool {
        let len = self.w.len();
        let (lo, hi) = self.scheme.code_range();
        let (lo, hi, zero) = (f32::from(lo), f32::from(hi), f32::from(chosen.zero));
        out.codes.resize(len, 0);
        out.e.resize(len, 0.0);
        out.r.clear();
        out.r.extend_from_slice(self.r);
        out.cost = 0.0;
        for from in (0..len).step_by(STEP) {
            let to = (from + STEP).min(len);
            let mut e = [0f32; STEP];
            for j in from..to {
                let line = self.v.line(j);
                let target = self.w[j] + out.r[j] / line[0];
                let code = ((target / chosen.scale).round_ties_even() + zero).clamp(lo, hi);
                let error = self.w[j] - (code - zero) * chosen.scale;
                out.codes[j] = code as u8;
                (out.e[j], e[j - from]) = (error, error);
                let left = out.r[j] + error * line[0];
                out.cost += f64::from(left).powi(2);
                for c in j + 1..to {
                    out.r[c] += error * line[c - j];
                }
            }
            if out.cost.is_nan() || out.cost >= limit {
                return false;
            }
            if to < len {
                let lines = std::array::from_fn(|i| {
                    let line = (from + i).min(to - 1);
                    &self.v.line(line)[to - line..]
                });
                add_scaled(isa, e, lines, &mut out.r[to..]);
            }
        }
        true
    }

    /// Tries the scale of `best` times each of `factors`, with zero points up to `reach` from its own, and puts the
    /// cheapest into `best` and `at` when it is cheaper than what is there. Whether it was.
    pub(super) fn search(
        &self,
        isa: Isa,
        factors: &[f32],
        reach: i32,
        at: &mut GroupScale,
        best: &mut Coded,
        scratch: &mut Coded,
    ) -> bool {
        let middle = *at;
        let zeros = self.zeros(middle.zero, reach);
        let mut found = false;
        for factor in factors {
            let scale = self.scales.store(middle.scale * factor);
            if !scale.is_finite() {
                continue;
            }
            for zero in zeros.clone() {
                let chosen = GroupScale { scale, zero };
                if self.round(isa, chosen, best.cost, scratch) {
                    std::mem::swap(best, scratch);
                    *at = chosen;
                    found = true;
                }
            }
        }
        found
    }

    fn zeros(&self, middle: u8, reach: i32) -> RangeInclusive<u8> {
        if self.scheme.fixed_zero().is_some() {
            return middle..=middle;
        }
        let (lo, hi) = self.scheme.code_range();
        let near = |z: i32| z.clamp(i32::from(lo), i32::from(hi)) as u8;
        near(i32::from(middle) - reach)..=near(i32::from(middle) + reach)
    }
}
