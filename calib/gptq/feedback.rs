//! The way of rows through the columns: scales chosen, codes rounded and errors fed back, group by group. Owns the
//! state of a row on its way, in the order of the factor.

use qtool_formats::scheme::AffineScheme;
use qtool_kernels::{Isa, add_scaled, first_non_finite};

use super::group::{Coded, STEP, Task, Triangle};
use crate::affine::{GroupScale, ZERO_GROUP_SCALE};
use crate::clip::Search;
use crate::hessian::{Factor, upper_factor};
use crate::scale_grid::ScaleGrid;
use crate::{CalibError, Result};

/// Longest group whose scale is searched by feeding its errors back for every candidate.
const LONGEST_SEARCHED: usize = 512;
/// Columns that go together in longer groups.
const PANEL: usize = 64;
/// Factors of the scale of least weighted error that feedback within the group is tried with, the likeliest first.
const FACTORS: [f32; 9] = [1.0, 0.965, 1.035, 0.93, 1.07, 0.895, 1.105, 0.86, 1.14];
/// Zero points tried to both sides.
const ZERO_REACH: i32 = 1;

/// What all rows of a weight share.
#[derive(Debug, Clone)]
pub(super) struct Prepared {
    pub(super) factor: Factor,
    /// Columns of a group, and of what goes through together.
    pub(super) group: usize,
    pub(super) panel: usize,
    /// Factors of the groups' blocks of H, (len, len) each; empty when groups are too long to be searched, or one
    /// has no factor.
    pub(super) blocks: Vec<Vec<f32>>,
}

impl Prepared {
    /// For groups of `group` columns, which the factor's order keeps together.
    pub(super) fn new(factor: Factor, group: usize) -> Self {
        let k = factor.columns();
        let searched = group <= LONGEST_SEARCHED;
        let block = |from: usize| {
            let len = group.min(k - from);
            upper_factor(len, |i, j| f64::from(factor.h(from + i)[from + j]))
        };
        let blocks = if searched {
            (0..k).step_by(group).map(block).collect::<Option<_>>()
        } else {
            None
        };
        Self {
            blocks: blocks.unwrap_or_default(),
            panel: if searched { group } else { PANEL },
            group,
            factor,
        }
    }
}

/// A group's block of the factor.
pub(super) struct Within<'a> {
    pub(super) factor: &'a Factor,
    pub(super) from: usize,
    pub(super) to: usize,
}

impl Triangle for Within<'_> {
    fn line(&self, i: usize) -> &[f32] {
        &self.factor.v(self.from + i)[..self.to - self.from - i]
    }
}

/// A row on its way: everything in the order of the factor, but `scales`, which lie as they are stored.
pub(super) struct Row {
    pub(super) w: Vec<f32>,
    /// What earlier errors caused in each column of e V.
    pub(super) r: Vec<f32>,
    pub(super) e: Vec<f32>,
    /// e H, once all columns have codes.
    pub(super) gradient: Vec<f32>,
    pub(super) codes: Vec<u8>,
    pub(super) scales: Vec<GroupScale>,
}

impl Row {
    pub(super) fn new(factor: &Factor, x: &[f32], groups: usize) -> Self {
        let k = x.len();
        let resting = GroupScale {
            scale: ZERO_GROUP_SCALE,
            zero: 0,
        };
        Self {
            w: factor.order().iter().map(|&c| x[c]).collect(),
            r: vec![0.0; k],
            e: vec![0.0; k],
            gradient: Vec::new(),
            codes: vec![0; k],
            scales: vec![resting; groups],
        }
    }
}

fn overflowed() -> CalibError {
    CalibError::Statistics {
        reason: "error feedback overflowed; the inputs' second moment is too unbalanced".to_owned(),
    }
}

/// Takes rows through the columns of one weight.
pub(super) struct Walk<'a> {
    pub(super) scheme: AffineScheme,
    pub(super) scales: ScaleGrid,
    pub(super) known: &'a Prepared,
}

impl Walk<'_> {
    /// The stored number of the group that the column in place `at` belongs to.
    pub(super) fn group_at(&self, at: usize) -> usize {
        self.known.factor.order()[at] / self.known.group
    }

    /// w minus what is encoded.
    pub(super) fn errors(&self, row: &Row) -> Vec<f32> {
        let error = |(at, (w, code)): (usize, (&f32, &u8))| {
            let GroupScale { scale, zero } = row.scales[self.group_at(at)];
            w - (f32::from(*code) - f32::from(zero)) * scale
        };
        row.w.iter().zip(&row.codes).enumerate().map(error).collect()
    }

    /// Chooses scales and codes of all columns of `rows`.
    ///
    /// Fails when errors grow beyond what f32 holds, or a scale does not fit its dtype.
    pub(super) fn feed_back(&self, isa: Isa, rows: &mut [Row]) -> Result<()> {
        let factor = &self.known.factor;
        let (k, group) = (factor.columns(), self.known.group);
        let mut search = Search::new(self.scheme, self.scales);
        let (mut best, mut scratch) = (Coded::default(), Coded::default());
        for from in (0..k).step_by(group) {
            let end = (from + group).min(k);
            let weights: Vec<f32> = (from..end)
                .map(|i| factor.v(i)[..end - i].iter().map(|v| v * v).sum())
                .collect();
            for (number, row) in rows.iter_mut().enumerate() {
                row.scales[self.group_at(from)] =
                    self.choose(isa, &mut search, (number, row), from..end, &weights)?;
            }
            for at in (from..end).step_by(self.known.panel) {
                let to = (at + self.known.panel).min(end);
                let within = Within { factor, from: at, to };
                for row in rows.iter_mut() {
                    let task = Task {
                        scheme: self.scheme,
                        scales: self.scales,
                        v: &within,
                        w: &row.w[at..to],
                        r: &row.r[at..to],
                    };
                    let chosen = &mut row.scales[self.group_at(at)];
                    best.cost = f64::INFINITY;
                    let found = if self.known.blocks.is_empty() {
                        task.round(isa, *chosen, f64::INFINITY, &mut best)
                    } else {
                        task.search(isa, &FACTORS, ZERO_REACH, chosen, &mut best, &mut scratch)
                    };
                    if !found {
                        return Err(overflowed());
                    }
                    row.codes[at..to].copy_from_slice(&best.codes);
                    row.e[at..to].copy_from_slice(&best.e);
                }
                self.carry_on(isa, rows, at..to);
            }
        }
        Ok(())
    }

    /// The scale of a group by the targets its columns would have if none of them caused an error.
    fn choose(
        &self,
        isa: Isa,
        search: &mut Search,
        (number, row): (usize, &Row),
        columns: std::ops::Range<usize>,
        weights: &[f32],
    ) -> Result<GroupScale> {
        let targets = self.known.factor.targets(columns, &row.w, &row.r);
        if first_non_finite(&targets).is_some() {
            return Err(overflowed());
        }
        if targets.iter().all(|t| *t == 0.0) {
            return Ok(GroupScale {
                scale: ZERO_GROUP_SCALE,
                zero: self.scheme.fixed_zero().unwrap_or(0),
            });
        }
        let chosen = search.choose_weighted(isa, &targets, weights);
        if !chosen.scale.is_finite() {
            return Err(CalibError::ScaleOverflow {
                row: number,
                scale: targets.iter().fold(0.0, |top, t| t.abs().max(top)),
                dtype: self.scheme.scale_dtype().name(),
            });
        }
        Ok(chosen)
    }

    /// Adds what the errors of `columns` cause to the columns after them.
    fn carry_on(&self, isa: Isa, rows: &mut [Row], columns: std::ops::Range<usize>) {
        let (factor, to) = (&self.known.factor, columns.end);
        if to == factor.columns() {
            return;
        }
        for step in columns.step_by(STEP) {
            let lines = std::array::from_fn(|i| {
                let line = (step + i).min(to - 1);
                &factor.v(line)[to - line..]
            });
            for row in rows.iter_mut() {
                let e = std::array::from_fn(|i| if step + i < to { row.e[step + i] } else { 0.0 });
                add_scaled(isa, e, lines, &mut row.r[to..]);
            }
        }
    }
}
