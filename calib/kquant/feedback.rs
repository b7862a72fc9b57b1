//! Error feedback for the K types: super-blocks by falling importance, each fitted to what its columns should be after the
//! errors before it, its codes rounded column by column; then descent on the exact objective, the numbers held.
//!
//! ```text
//! minimise  e H e^T = |e V|^2,    e_k = w_k - (d s code_k - dmin m)
//! ```
//!
//! 1. Targets: w plus what would cancel the errors of the columns before, if the block's own could be met exactly.
//! 2. Scales and minima of the block: the fit of [`super::SuperBlock`] to the targets, each column weighed by its diagonal of
//!    V_B V_B^T, the moment given that later columns make good what they can.
//! 3. Codes: column j is rounded toward w_j + r_j / V_jj, with r what earlier errors have caused (see [`crate::hessian`]).
//! 4. Column by column, the code of least e H e^T with all others as they are, in [`SWEEPS`] sweeps.
//!
//! Of this and of the fits without feedback, weighed by inputs and not, a row keeps the one with the least error under the
//! moment as it was measured. Feedback into GGML's types is GPTQ's idea (Frantar et al., arXiv 2210.17323); that llama.cpp's
//! own quantizers stop at the diagonal is a choice of theirs, not a limit of the format.

use qtool_formats::scheme::kquant::{KQuant, SUPER_BLOCK};
use qtool_kernels::{Isa, add_scaled};

use super::{SuperBlock, inverse, nearest};
use crate::hessian::{DAMPING, Factor, gradient, order_by_importance, shrinkage};
use crate::stats::LayerStats;
use crate::{CalibError, Result};

/// Columns whose errors are carried on together.
const STEP: usize = 4;
/// Times that every column is given its best code anew.
const SWEEPS: usize = 3;

/// What all rows of a weight share.
#[derive(Debug, Clone)]
pub(super) struct Feedback {
    kind: KQuant,
    factor: Factor,
    /// The diagonal of V_B V_B^T for the super-block B of each place.
    weights: Vec<f32>,
}

impl Feedback {
    /// `None` when there is no factor, or rows are no whole super-blocks.
    pub(super) fn new(kind: KQuant, stats: &LayerStats) -> Option<Self> {
        if !stats.columns().is_multiple_of(SUPER_BLOCK) {
            return None;
        }
        let order = order_by_importance(&stats.importance(), SUPER_BLOCK, 1);
        let factor = Factor::new(stats, order, DAMPING, shrinkage(kind.bits()))?;
        let weight = |at: usize| {
            let within = SUPER_BLOCK - at % SUPER_BLOCK;
            factor.v(at)[..within].iter().map(|v| v * v).sum()
        };
        Some(Self {
            kind,
            weights: (0..factor.columns()).map(weight).collect(),
            factor,
        })
    }

    /// The damping and shrinkage it took, in words.
    pub(super) fn describe(&self) -> String {
        let (damping, shrunk) = (self.factor.damping(), self.factor.shrinkage());
        format!("error feedback, damping {damping}, shrunk by {shrunk}, descent")
    }

    /// e H e^T of a row and its blocks under the moment as it was measured.
    pub(super) fn cost(&self, isa: Isa, x: &[f32], blocks: &[SuperBlock]) -> f64 {
        let error =
            |&column: &usize| x[column] - blocks[column / SUPER_BLOCK].value(self.kind, column % SUPER_BLOCK);
        let errors: Vec<f32> = self.factor.order().iter().map(error).collect();
        self.factor.measured_cost(isa, &errors)
    }

    /// The super-blocks of a few rows of K weights, in the order they are stored; `first` is the number of the first row.
    ///
    /// Fails when errors grow beyond what f32 holds, or a number does not fit F16.
    pub(super) fn rows(&self, isa: Isa, first: usize, x: &[f32]) -> Result<Vec<Vec<SuperBlock>>> {
        let k = self.factor.columns();
        let mut rows: Vec<Row> = x.chunks_exact(k).map(|x| Row::new(&self.factor, x)).collect();
        for from in (0..k).step_by(SUPER_BLOCK) {
            for (i, row) in rows.iter_mut().enumerate() {
                self.super_block(isa, first + i, row, from)?;
            }
        }
        let finish = |mut row: Row| -> Result<Vec<SuperBlock>> {
            self.descend(isa, &mut row);
            row.blocks
                .into_iter()
                .map(|block| block.ok_or_else(overflowed))
                .collect()
        };
        rows.into_iter().map(finish).collect()
    }

    /// Numbers and codes of the columns in places `from..from + 256`, and their errors carried on.
    fn super_block(&self, isa: Isa, number: usize, row: &mut Row, from: usize) -> Result<()> {
        let (factor, k) = (&self.factor, self.factor.columns());
        let places = from..from + SUPER_BLOCK;
        let (mut targets, mut weights) = ([0f32; SUPER_BLOCK], [0f32; SUPER_BLOCK]);
        for (place, target) in places.clone().zip(factor.targets(places.clone(), &row.w, &row.r)) {
            let column = factor.order()[place] % SUPER_BLOCK;
            (targets[column], weights[column]) = (target, self.weights[place]);
        }
        if targets.iter().any(|t| !t.is_finite()) {
            return Err(overflowed());
        }
        let mut block = SuperBlock::of(self.kind, number, &targets, &weights)?;
        for at in places.step_by(STEP) {
            for j in at..at + STEP {
                let line = factor.v(j);
                let column = factor.order()[j] % SUPER_BLOCK;
                let error = block.round(self.kind, column, row.w[j], row.w[j] + row.r[j] / line[0]);
                row.e[j] = error;
                for c in j..at + STEP {
                    row.r[c] += error * line[c - j];
                }
            }
            let to = at + STEP;
            if to < k {
                let errors = std::array::from_fn(|i| row.e[at + i]);
                let lines = std::array::from_fn(|i| &factor.v(at + i)[to - at - i..]);
                add_scaled(isa, errors, lines, &mut row.r[to..]);
            }
        }
        row.blocks[factor.order()[from] / SUPER_BLOCK] = Some(block);
        Ok(())
    }

    /// Gives one column after the other the code of least e H e^T.
    fn descend(&self, isa: Isa, row: &mut Row) {
        let factor = &self.factor;
        for _ in 0..SWEEPS {
            let mut slope = gradient(isa, factor, &row.e);
            let mut moved = false;
            for place in 0..factor.columns() {
                let column = factor.order()[place];
                let Some(block) = &mut row.blocks[column / SUPER_BLOCK] else {
                    continue;
                };
                let h = factor.h(place);
                let (old, step) = (row.e[place], slope[place] / h[place]);
                let before = block.codes[column % SUPER_BLOCK];
                let new = block.round(
                    self.kind,
                    column % SUPER_BLOCK,
                    row.w[place],
                    row.w[place] - old + step,
                );
                let by = new - old;
                if 2.0 * by * slope[place] + by * by * h[place] < 0.0 {
                    row.e[place] = new;
                    add_scaled(isa, [by, 0.0, 0.0, 0.0], [h; 4], &mut slope);
                    moved = true;
                } else {
                    block.codes[column % SUPER_BLOCK] = before;
                }
            }
            if !moved {
                break;
            }
        }
    }
}

impl SuperBlock {
    /// Scale and minimum of the group that holds a column.
    fn line(&self, kind: KQuant, column: usize) -> (f32, f32) {
        let group = column / kind.group();
        (
            self.d.to_f32() * f32::from(self.scales[group]),
            self.dmin.to_f32() * f32::from(self.mins[group]),
        )
    }

    /// What the code of a column stands for.
    pub(super) fn value(&self, kind: KQuant, column: usize) -> f32 {
        let (scale, min) = self.line(kind, column);
        scale * f32::from(self.codes[column]) - min
    }

    /// Gives a column the code nearest to `target`; `w` minus what it stands for.
    fn round(&mut self, kind: KQuant, column: usize, w: f32, target: f32) -> f32 {
        let (scale, min) = self.line(kind, column);
        let top = f32::from((1u8 << kind.bits()) - 1);
        self.codes[column] = nearest(target, inverse(scale), min, top) as u8;
        w - self.value(kind, column)
    }
}

/// A row on its way: columns in the order of the factor, blocks as they are stored.
struct Row {
    w: Vec<f32>,
    /// What earlier errors caused in each column of e V.
    r: Vec<f32>,
    e: Vec<f32>,
    blocks: Vec<Option<SuperBlock>>,
}

impl Row {
    fn new(factor: &Factor, x: &[f32]) -> Self {
        Self {
            w: factor.order().iter().map(|&column| x[column]).collect(),
            r: vec![0.0; x.len()],
            e: vec![0.0; x.len()],
            blocks: vec![None; x.len() / SUPER_BLOCK],
        }
    }
}

fn overflowed() -> CalibError {
    CalibError::Statistics {
        reason: "error feedback overflowed; the inputs' second moment is too unbalanced".to_owned(),
    }
}

#[cfg(test)]
mod tests;
