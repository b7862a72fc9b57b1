//! WINT2 codes by the error the layer's output sees: error feedback in steps of four columns, then coordinate
//! descent on the exact objective. Owns both; pairs and first scales come from the encoder that looks at weights
//! alone, weighted by the diagonal.
//!
//! ```text
//! minimise  e H e^T = |e V|^2,   e = w - c * local * super          H = V V^T, see `hessian.rs`
//!
//! feedback, block b of four columns:   t = w_b + r_b V_bb^-1         metric V_bb V_bb^T
//!                                      r_c += e_b V_bc for later c
//! descent, block b, all else fixed:    t = w_b + (g_b - e_b H_bb) H_bb^-1      g = e H,  metric H_bb
//! descent, local scale of group G:     local += round(g_G . m / (m H_GG m^T * super)),  m the windows
//! descent, super scale S:              S += g . M / (M H M^T), M = local * m, rounded to bf16 if that is better
//! ```
//!
//! The feedback is block LDLQ (Chee et al., arXiv 2307.13304) with blocks of four, as QTIP does for its own codes
//! (arXiv 2406.11235). Each descent step takes the best of all 256 code words, so the objective never rises. A row
//! that ends worse than it began keeps its first encoding.

use half::bf16;
use qtool_formats::packing::wint2::{self, Arithmetic, GROUP, MAX_LOCAL, VECTOR};
use qtool_kernels::{Isa, Metric, MetricBook, add_scaled, nearest_in_metric};

use super::{CcqError, CcqRow, Effort, Scratch, encode_row};
use crate::hessian::{DAMPING, Factor, gradient, order_by_importance, shrinkage};
use crate::stats::LayerStats;

/// Rows that go through the columns together, so that each row of V and H is read once for all of them.
pub(super) const TOGETHER: usize = 16;

/// Rounds of descent.
fn rounds(effort: Effort) -> usize {
    match effort {
        Effort::Fast => 1,
        Effort::Default => 4,
        Effort::Best => 12,
    }
}

/// What all rows of a weight share.
#[derive(Debug, Clone)]
pub(super) struct Prepared {
    factor: Factor,
    /// For each block of four columns in order: conditional and full metric, and what turns r and g into steps.
    blocks: Vec<BlockMetrics>,
}

#[derive(Debug, Clone, Copy)]
struct BlockMetrics {
    conditional: Metric,
    v_inverse: [[f32; 4]; 4],
    full: Metric,
    h_inverse: [[f32; 4]; 4],
}

impl Prepared {
    /// Factors the statistics; `None` when they have no factor.
    pub(super) fn new(stats: &LayerStats) -> Option<Self> {
        let order = order_by_importance(&stats.importance(), GROUP, VECTOR);
        let factor = Factor::new(stats, order, DAMPING, shrinkage(2))?;
        let block = |p: usize| {
            let v: [[f64; 4]; 4] = std::array::from_fn(|i| {
                std::array::from_fn(|j| {
                    if j >= i {
                        f64::from(factor.v_at(p + i, p + j))
                    } else {
                        0.0
                    }
                })
            });
            let h: [[f64; 4]; 4] =
                std::array::from_fn(|i| std::array::from_fn(|j| f64::from(factor.h(p + i)[p + j])));
            let vv = std::array::from_fn(|i| {
                std::array::from_fn(|j| (0..4).map(|c| v[i][c] * v[j][c]).sum::<f64>() as f32)
            });
            BlockMetrics {
                conditional: Metric::new(vv),
                v_inverse: inverse(v),
                full: Metric::new(h.map(|row| row.map(|x| x as f32))),
                h_inverse: inverse(h),
            }
        };
        let blocks = (0..factor.columns()).step_by(VECTOR).map(block).collect();
        Some(Self { factor, blocks })
    }

    /// The damping it took.
    pub(super) fn damping(&self) -> f64 {
        self.factor.damping()
    }

    /// How far the moment was shrunk.
    pub(super) fn shrinkage(&self) -> f64 {
        self.factor.shrinkage()
    }

    /// Encodes a few rows of K weights each; `importance` (K) weighs the first encoding.
    ///
    /// # Errors
    ///
    /// The number of a row that cannot be encoded, and why.
    pub(super) fn encode(
        &self,
        isa: Isa,
        x: &[f32],
        importance: &[f32],
        effort: Effort,
        scratch: &mut Scratch,
    ) -> Result<Vec<CcqRow>, (usize, CcqError)> {
        let encode = |(number, x)| {
            encode_row(x, Some(importance), effort, isa, scratch).map_err(|error| (number, error))
        };
        let numbered = x.chunks_exact(self.factor.columns()).enumerate();
        let firsts = numbered.map(encode).collect::<Result<Vec<_>, _>>()?;
        Ok(self.improve(isa, x, &firsts, effort))
    }

    /// What becomes of the first encodings of a few rows.
    pub(super) fn improve(&self, isa: Isa, x: &[f32], firsts: &[CcqRow], effort: Effort) -> Vec<CcqRow> {
        let both = x.chunks_exact(self.factor.columns()).zip(firsts);
        let mut rows: Vec<Row> = both.map(|(x, first)| Row::new(&self.factor, x, first)).collect();
        let firsts: Vec<(CcqRow, f64)> = rows
            .iter()
            .map(|row| {
                (
                    row.encoding(&self.factor),
                    self.factor.measured_cost(isa, &row.errors()),
                )
            })
            .collect();
        self.feed_back(isa, &mut rows);
        for row in &mut rows {
            row.gradient = gradient(isa, &self.factor, &row.e);
        }
        for _ in 0..rounds(effort) {
            self.descend(isa, &mut rows);
        }
        let last = |(row, (first, before)): (Row, (CcqRow, f64))| {
            if self.factor.measured_cost(isa, &row.errors()) < before {
                row.encoding(&self.factor)
            } else {
                first
            }
        };
        rows.into_iter().zip(firsts).map(last).collect()
    }

    fn feed_back(&self, isa: Isa, rows: &mut [Row]) {
        let k = self.factor.columns();
        for (b, metrics) in self.blocks.iter().enumerate() {
            let p = b * VECTOR;
            let lines = std::array::from_fn(|d| &self.factor.v(p + d)[VECTOR - d..]);
            for row in rows.iter_mut() {
                let step = times(four(&row.r, p), &metrics.v_inverse);
                row.decide(isa, p, step, &metrics.conditional);
                if p + VECTOR < k {
                    add_scaled(isa, four(&row.e, p), lines, &mut row.r[p + VECTOR..]);
                }
            }
        }
    }

    /// One round: codes and local scales group by group, then the super scale.
    fn descend(&self, isa: Isa, rows: &mut [Row]) {
        let k = self.factor.columns();
        for from in (0..k).step_by(GROUP) {
            for b in from / VECTOR..(from + GROUP) / VECTOR {
                let (p, metrics) = (b * VECTOR, &self.blocks[b]);
                let lines = std::array::from_fn(|d| self.factor.h(p + d));
                for row in rows.iter_mut() {
                    let (before, own) = (four(&row.e, p), times(four(&row.e, p), &metrics.full.b));
                    let g = four(&row.gradient, p);
                    let others = std::array::from_fn(|i| g[i] - own[i]);
                    if row.decide(isa, p, times(others, &metrics.h_inverse), &metrics.full) {
                        let after = four(&row.e, p);
                        let change = std::array::from_fn(|i| after[i] - before[i]);
                        add_scaled(isa, change, lines, &mut row.gradient);
                    }
                }
            }
            for row in rows.iter_mut() {
                self.rescale_group(isa, row, from);
            }
        }
        for row in rows.iter_mut() {
            self.rescale_row(isa, row);
        }
    }

    fn rescale_group(&self, isa: Isa, row: &mut Row, from: usize) {
        let local = row.local[from / GROUP];
        if local == 0 || row.super_scale <= 0.0 {
            return;
        }
        let m = row.windows(from);
        let mut curve = 0f64;
        for (i, mi) in m.iter().enumerate() {
            let line = &self.factor.h(from + i)[from..from + GROUP];
            let dot: f32 = line.iter().zip(&m).map(|(h, m)| h * m).sum();
            curve += f64::from(dot * mi);
        }
        let slope: f64 = m
            .iter()
            .zip(&row.gradient[from..from + GROUP])
            .map(|(m, g)| f64::from(m * g))
            .sum();
        if curve <= 0.0 {
            return;
        }
        let s = f64::from(row.super_scale);
        let best = (f64::from(local) + slope / (curve * s))
            .round_ties_even()
            .clamp(0.0, f64::from(MAX_LOCAL));
        let chosen = best as u8;
        if chosen == local {
            return;
        }
        let delta = (f64::from(local) - best) * s;
        if 2.0 * delta * slope + delta * delta * curve >= 0.0 {
            return;
        }
        row.local[from / GROUP] = chosen;
        for i in (0..GROUP).step_by(VECTOR) {
            let change = std::array::from_fn(|d| (delta as f32) * m[i + d]);
            (0..VECTOR).for_each(|d| row.e[from + i + d] += change[d]);
            let lines = std::array::from_fn(|d| self.factor.h(from + i + d));
            add_scaled(isa, change, lines, &mut row.gradient);
        }
    }

    fn rescale_row(&self, isa: Isa, row: &mut Row) {
        let k = self.factor.columns();
        let m: Vec<f32> = (0..k)
            .step_by(GROUP)
            .flat_map(|from| {
                let local = f32::from(row.local[from / GROUP]);
                row.windows(from).map(|w| w * local)
            })
            .collect();
        let image = gradient(isa, &self.factor, &m);
        let dot = |a: &[f32], b: &[f32]| {
            a.iter()
                .zip(b)
                .map(|(a, b)| f64::from(*a) * f64::from(*b))
                .sum::<f64>()
        };
        let (slope, curve) = (dot(&row.gradient, &m), dot(&image, &m));
        if curve <= 0.0 {
            return;
        }
        let old = f64::from(row.super_scale);
        let wanted = bf16::from_f64(old + slope / curve);
        let new = wanted.to_f64();
        let delta = old - new;
        if !(new > 0.0 && new.is_finite()) || 2.0 * delta * slope + delta * delta * curve >= 0.0 {
            return;
        }
        row.super_scale = wanted.to_f32();
        let delta = delta as f32;
        row.e.iter_mut().zip(&m).for_each(|(e, m)| *e += delta * m);
        row.gradient
            .iter_mut()
            .zip(&image)
            .for_each(|(g, i)| *g += delta * i);
    }
}

/// A row on its way, columns and groups in the order of the factor.
struct Row {
    w: Vec<f32>,
    r: Vec<f32>,
    e: Vec<f32>,
    gradient: Vec<f32>,
    codes: Vec<u8>,
    local: Vec<u8>,
    super_scale: f32,
    pair: (f32, f32),
    windows: Box<[[f32; VECTOR]; 256]>,
    book: MetricBook,
}

impl Row {
    fn new(factor: &Factor, x: &[f32], first: &CcqRow) -> Self {
        let order = factor.order();
        let words = wint2::codebook(first.code_scale, first.code_zp, Arithmetic::Gemm);
        let mut row = Self {
            w: order.iter().map(|&c| x[c]).collect(),
            r: vec![0.0; x.len()],
            e: vec![0.0; x.len()],
            gradient: Vec::new(),
            codes: order
                .iter()
                .step_by(VECTOR)
                .map(|&c| first.code_bytes[c / VECTOR])
                .collect(),
            local: order
                .iter()
                .step_by(GROUP)
                .map(|&c| first.local[c / GROUP])
                .collect(),
            super_scale: first.super_scale.to_f32(),
            pair: (first.code_scale, first.code_zp),
            windows: Box::new(words.map(|word| word.map(f32::from))),
            book: MetricBook::new(&words),
        };
        row.e = row.errors();
        row
    }

    fn scale(&self, p: usize) -> f32 {
        f32::from(self.local[p / GROUP]) * self.super_scale
    }

    /// w minus what is encoded.
    fn errors(&self) -> Vec<f32> {
        (0..self.w.len())
            .map(|p| {
                let word = &self.windows[usize::from(self.codes[p / VECTOR])];
                self.w[p] - word[p % VECTOR] * self.scale(p)
            })
            .collect()
    }

    /// Windows of a group.
    fn windows(&self, from: usize) -> [f32; GROUP] {
        std::array::from_fn(|i| self.windows[usize::from(self.codes[(from + i) / VECTOR])][i % VECTOR])
    }

    /// Takes the best code word for the four columns at `p` when their target is w + `step`, and sets their errors.
    /// Whether anything changed.
    fn decide(&mut self, isa: Isa, p: usize, step: [f32; 4], metric: &Metric) -> bool {
        let scale = self.scale(p);
        let w = four(&self.w, p);
        if scale <= 0.0 {
            self.e[p..p + VECTOR].copy_from_slice(&w);
            return false;
        }
        let inverse = 1.0 / scale;
        let target = std::array::from_fn(|i| (w[i] + step[i]) * inverse);
        let code = nearest_in_metric(isa, &self.book, target, metric);
        let changed = code != self.codes[p / VECTOR];
        self.codes[p / VECTOR] = code;
        for (i, window) in self.windows[usize::from(code)].iter().enumerate() {
            self.e[p + i] = w[i] - window * scale;
        }
        changed
    }

    /// Back in the order of the columns.
    fn encoding(&self, factor: &Factor) -> CcqRow {
        let order = factor.order();
        let mut out = CcqRow {
            code_bytes: vec![0; self.codes.len()],
            local: vec![0; self.local.len()],
            super_scale: bf16::from_f32(self.super_scale),
            code_scale: self.pair.0,
            code_zp: self.pair.1,
        };
        for (b, &code) in self.codes.iter().enumerate() {
            out.code_bytes[order[b * VECTOR] / VECTOR] = code;
        }
        for (g, &local) in self.local.iter().enumerate() {
            let group = order[g * GROUP] / GROUP;
            out.local[group] = local;
            if local == 0 {
                out.code_bytes[group * GROUP / VECTOR..(group + 1) * GROUP / VECTOR].fill(0);
            }
        }
        out
    }
}

fn four(x: &[f32], p: usize) -> [f32; 4] {
    std::array::from_fn(|i| x[p + i])
}

/// a B.
fn times(a: [f32; 4], b: &[[f32; 4]; 4]) -> [f32; 4] {
    std::array::from_fn(|j| a[0] * b[0][j] + a[1] * b[1][j] + a[2] * b[2][j] + a[3] * b[3][j])
}

/// The inverse of a matrix with positive pivots, by elimination in f64.
fn inverse(mut a: [[f64; 4]; 4]) -> [[f32; 4]; 4] {
    let mut out: [[f64; 4]; 4] =
        std::array::from_fn(|i| std::array::from_fn(|j| f64::from(u8::from(i == j))));
    for i in 0..4 {
        let pivot = a[i][i];
        for j in 0..4 {
            a[i][j] /= pivot;
            out[i][j] /= pivot;
        }
        for other in (0..4).filter(|&o| o != i) {
            let factor = a[other][i];
            for j in 0..4 {
                a[other][j] -= factor * a[i][j];
                out[other][j] -= factor * out[i][j];
            }
        }
    }
    out.map(|row| row.map(|x| x as f32))
}

#[cfg(test)]
mod tests;
