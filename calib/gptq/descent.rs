//! Descent on the exact objective once all columns have codes: codes one by one, then groups anew with other scales,
//! then scales and zero points by least squares, each taken only when the objective falls.
//!
//! ```text
//! minimise e H e^T      g = e H
//! code of column j, all else fixed:     t = w_j + g_j / H_jj - e_j
//! group G anew, all else fixed:         |e V + r|^2,  V V^T = H_GG,  r V^T = g_G - e_G H_GG     (`group.rs`)
//! scale s' and zero z + d of group G:   s' (m H m^T - 2 d m H 1^T + d^2 1 H 1^T) = g.m - d g.1 + s (m H m^T - d m H 1^T)
//!                                       m the codes less their zero point, all sums over G
//! ```

use qtool_kernels::{Isa, add_scaled};

use super::feedback::{Row, Walk};
use super::group::{Coded, STEP, Task, Triangle};
use crate::affine::GroupScale;
use crate::hessian::gradient;

/// Rounds of descent.
const ROUNDS: usize = 3;
/// Factors of a group's scale that are tried.
const FACTORS: [f32; 5] = [1.0, 0.98, 1.02, 0.95, 1.05];
/// Zero points tried to both sides.
const ZERO_REACH: i32 = 1;
/// A group is done anew when that saves at least this share of its cost: less may be rounding.
const WORTH: f64 = 1e-5;

/// The factor of a group's block of H.
struct Block<'a> {
    v: &'a [f32],
    len: usize,
}

impl Triangle for Block<'_> {
    fn line(&self, i: usize) -> &[f32] {
        &self.v[i * self.len + i..(i + 1) * self.len]
    }
}

impl Walk<'_> {
    /// Improves rows that have codes.
    pub(super) fn descend(&self, isa: Isa, rows: &mut [Row]) {
        for row in rows.iter_mut() {
            row.e = self.errors(row);
            row.gradient = gradient(isa, &self.known.factor, &row.e);
        }
        for _ in 0..ROUNDS {
            self.round_of_descent(isa, rows);
        }
    }

    pub(super) fn round_of_descent(&self, isa: Isa, rows: &mut [Row]) {
        let (k, group) = (self.known.factor.columns(), self.known.group);
        let (mut best, mut scratch) = (Coded::default(), Coded::default());
        for (number, from) in (0..k).step_by(group).enumerate() {
            let to = (from + group).min(k);
            for step in (from..to).step_by(STEP) {
                for row in rows.iter_mut() {
                    self.recode(isa, row, step, (step + STEP).min(to));
                }
            }
            for row in rows.iter_mut() {
                if let Some(v) = self.known.blocks.get(number) {
                    let block = Block { v, len: to - from };
                    self.anew(isa, row, (from, to), &block, &mut best, &mut scratch);
                }
                self.rescale(isa, row, from, to);
            }
        }
    }

    /// Adds what `changes` of the errors from column `from` on do to e H.
    fn follow(&self, isa: Isa, row: &mut Row, from: usize, changes: &[f32]) {
        let last = self.known.factor.columns() - 1;
        for (step, four) in changes.chunks(STEP).enumerate() {
            let change: [f32; STEP] = std::array::from_fn(|i| four.get(i).copied().unwrap_or(0.0));
            if change != [0.0; STEP] {
                let lines = std::array::from_fn(|i| self.known.factor.h((from + step * STEP + i).min(last)));
                add_scaled(isa, change, lines, &mut row.gradient);
            }
        }
    }

    /// The best code for each of a few columns in turn.
    fn recode(&self, isa: Isa, row: &mut Row, from: usize, to: usize) {
        let (lo, hi) = self.scheme.code_range();
        let (lo, hi) = (f32::from(lo), f32::from(hi));
        let GroupScale { scale, zero } = row.scales[self.group_at(from)];
        let zero = f32::from(zero);
        let mut changes = [0f32; STEP];
        for j in from..to {
            let h = self.known.factor.h(j);
            let carried: f32 = (from..j).map(|i| changes[i - from] * h[i]).sum();
            let target = row.w[j] + (row.gradient[j] + carried) / h[j] - row.e[j];
            let code = ((target / scale).round_ties_even() + zero).clamp(lo, hi);
            let error = row.w[j] - (code - zero) * scale;
            if code as u8 != row.codes[j] {
                row.codes[j] = code as u8;
                changes[j - from] = error - row.e[j];
                row.e[j] = error;
            }
        }
        self.follow(isa, row, from, &changes[..to - from]);
    }

    /// Rounds a whole group again, with its own scale and others.
    fn anew(
        &self,
        isa: Isa,
        row: &mut Row,
        (from, to): (usize, usize),
        v: &Block<'_>,
        best: &mut Coded,
        scratch: &mut Coded,
    ) {
        let len = to - from;
        let e = &row.e[from..to];
        // What the other columns' errors ask for: g - e H_GG, and r with r V^T equal to it.
        let mut r: Vec<f32> = row.gradient[from..to].to_vec();
        for (i, e) in e.iter().enumerate() {
            let line = &self.known.factor.h(from + i)[from..to];
            r.iter_mut().zip(line).for_each(|(r, h)| *r -= e * h);
        }
        for i in (0..len).rev() {
            let line = v.line(i);
            let known: f32 = line[1..].iter().zip(&r[i + 1..]).map(|(v, r)| v * r).sum();
            r[i] = (r[i] - known) / line[0];
        }
        let mut left = r.clone();
        for (i, e) in e.iter().enumerate() {
            left[i..].iter_mut().zip(v.line(i)).for_each(|(l, v)| *l += e * v);
        }
        best.cost = left.iter().map(|l| f64::from(*l).powi(2)).sum::<f64>() * (1.0 - WORTH);
        let task = Task {
            scheme: self.scheme,
            scales: self.scales,
            v,
            w: &row.w[from..to],
            r: &r,
        };
        let mut chosen = row.scales[self.group_at(from)];
        if !task.search(isa, &FACTORS, ZERO_REACH, &mut chosen, best, scratch) {
            return;
        }
        let at = self.group_at(from);
        row.scales[at] = chosen;
        row.codes[from..to].copy_from_slice(&best.codes);
        let changes: Vec<f32> = best
            .e
            .iter()
            .zip(&row.e[from..to])
            .map(|(new, old)| new - old)
            .collect();
        row.e[from..to].copy_from_slice(&best.e);
        self.follow(isa, row, from, &changes);
    }

    /// Scale and zero point of least squares for the codes as they are.
    fn rescale(&self, isa: Isa, row: &mut Row, from: usize, to: usize) {
        let at = self.group_at(from);
        let old = row.scales[at];
        let s = f64::from(old.scale);
        let m: Vec<f32> = row.codes[from..to]
            .iter()
            .map(|c| f32::from(*c) - f32::from(old.zero))
            .collect();
        let g = &row.gradient[from..to];
        let sum = |a: &mut dyn Iterator<Item = f32>| a.map(f64::from).sum::<f64>();
        let (mut mm, mut m1, mut one) = (0f64, 0f64, 0f64);
        let shifts: &[i32] = if self.scheme.fixed_zero().is_some() {
            &[0]
        } else {
            &[0, -1, 1]
        };
        for (i, mi) in m.iter().enumerate() {
            let line = &self.known.factor.h(from + i)[from..to];
            let dot: f32 = line.iter().zip(&m).map(|(h, m)| h * m).sum();
            mm += f64::from(dot * mi);
            if shifts.len() > 1 {
                m1 += f64::from(dot);
                one += f64::from(line.iter().sum::<f32>());
            }
        }
        let (gm, g1) = (
            sum(&mut g.iter().zip(&m).map(|(g, m)| g * m)),
            sum(&mut g.iter().copied()),
        );
        let (lo, hi) = self.scheme.code_range();
        let mut best: Option<(f64, GroupScale)> = None;
        for &shift in shifts {
            let (zero, d) = (i32::from(old.zero) + shift, f64::from(shift));
            let curve = mm - 2.0 * d * m1 + d * d * one;
            if zero < i32::from(lo) || zero > i32::from(hi) || curve <= 0.0 {
                continue;
            }
            let wanted = (gm - d * g1 + s * (mm - d * m1)) / curve;
            let scale = self.scales.store(wanted as f32);
            if !(wanted > 0.0 && scale.is_finite()) {
                continue;
            }
            // e changes by x m + y.
            let (x, y) = (s - f64::from(scale), d * f64::from(scale));
            let rise = 2.0 * (x * gm + y * g1) + x * x * mm + 2.0 * x * y * m1 + y * y * one;
            let least = best.map_or(0.0, |(rise, _)| rise);
            if rise < least {
                let zero = zero as u8;
                best = Some((rise, GroupScale { scale, zero }));
            }
        }
        let Some((_, chosen)) = best else { return };
        row.scales[at] = chosen;
        let (x, y) = (
            (s - f64::from(chosen.scale)) as f32,
            (f32::from(chosen.zero) - f32::from(old.zero)) * chosen.scale,
        );
        let changes: Vec<f32> = m.iter().map(|m| x * m + y).collect();
        row.e[from..to]
            .iter_mut()
            .zip(&changes)
            .for_each(|(e, c)| *e += c);
        self.follow(isa, row, from, &changes);
    }
}
