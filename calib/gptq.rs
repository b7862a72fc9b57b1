//! `gptq`: rounding with error feedback. Column after column, the error made so far is compensated in the columns
//! still to come, as far as the inputs' second moment allows ([`crate::hessian`]).
//!
//! ```text
//! t_j = w_j + r_j / V_jj      code_j = clamp(round(t_j / s) + z)      e_j = w_j - value(code_j)
//! r_c += e_j V_jc  for c > j
//! ```
//!
//! A group's scale (and zero point) is searched when its first column is reached, on the targets its columns would
//! have if none of them caused an error, each weighted by the diagonal of the group's conditional moment
//! V_G V_G^T. Columns are visited group by group, groups of large inputs first, and within a group likewise
//! ("act-order" that needs no index at run time).
//!
//! Without statistics it is clip search, with a diagonal alone clip search weighted by it. Every row is compared
//! with its plain rounding under the same moment, and the better of both is kept.

use std::sync::Arc;

use qtool_formats::scheme::AffineScheme;
use qtool_formats::weight::AffineWeight;
use qtool_formats::{QuantizedWeight, Scheme};
use qtool_kernels::{Isa, add_scaled, first_non_finite};

use crate::affine::{ChooseScale, GroupScale, ZERO_GROUP_SCALE};
use crate::clip::Search;
use crate::hessian::{DAMPING, Factor, order_by_importance};
use crate::rtn::Rtn;
use crate::{CalibError, Evidence, LayerStats, Method, Quantizer, Result, TensorOptions};

/// The registry entry.
pub const METHOD: Method = Method {
    name: "gptq",
    bits: &[2, 3, 4, 8],
    summary: "clip search and error feedback through the inputs' second moment (the default with --calib)",
    build,
};

fn build(options: &TensorOptions) -> Result<Box<dyn Quantizer>> {
    Ok(Box::new(Gptq {
        scheme: options.affine_scheme()?,
        knowledge: Knowledge::Nothing,
        search: options.bits < 8,
    }))
}

/// The quantizer.
#[derive(Debug, Clone)]
pub struct Gptq {
    scheme: AffineScheme,
    knowledge: Knowledge,
    /// Whether scales are searched; otherwise they span each group.
    search: bool,
}

#[derive(Debug, Clone)]
enum Knowledge {
    Nothing,
    /// Mean square of each column.
    Diagonal(Arc<Vec<f32>>),
    Full(Arc<Factor>),
}

impl Quantizer for Gptq {
    fn scheme(&self) -> Scheme {
        Scheme::Affine(self.scheme)
    }

    fn describe(&self) -> String {
        match &self.knowledge {
            Knowledge::Nothing => "gptq".to_owned(),
            Knowledge::Diagonal(_) => "clip search weighted by the inputs' mean squares".to_owned(),
            Knowledge::Full(factor) => format!("gptq, damping {}, act-order by group", factor.damping()),
        }
    }

    fn evidence(&self) -> Evidence {
        Evidence::Full
    }

    fn informed(&self, stats: &LayerStats) -> Result<Box<dyn Quantizer>> {
        let importance = stats.importance();
        let group = self.scheme.grouping().len(stats.columns());
        let order = order_by_importance(&importance, group, 1);
        let knowledge = match Factor::new(stats, order, DAMPING) {
            Some(factor) => Knowledge::Full(Arc::new(factor)),
            None => Knowledge::Diagonal(Arc::new(importance)),
        };
        Ok(Box::new(Self {
            knowledge,
            ..self.clone()
        }))
    }

    fn quantize(&self, isa: Isa, x: &[f32], n: usize, k: usize) -> Result<QuantizedWeight> {
        let mut search = Search::new(self.scheme);
        match &self.knowledge {
            Knowledge::Nothing => crate::affine::quantize_rows(isa, self.scheme, x, n, k, &mut search),
            Knowledge::Diagonal(importance) => {
                check_width(importance.len(), k)?;
                search.weigh(importance);
                crate::affine::quantize_rows(isa, self.scheme, x, n, k, &mut search)
            }
            Knowledge::Full(factor) => {
                check_width(factor.columns(), k)?;
                self.feed_back(isa, factor, x, n, k)
            }
        }
    }
}

fn check_width(known: usize, k: usize) -> Result<()> {
    if known == k {
        return Ok(());
    }
    Err(CalibError::Statistics {
        reason: format!("they are of {known} columns, the weight has {k}"),
    })
}

/// Rows that go through the columns together, so that each row of V is read once for all of them.
const TOGETHER: usize = 16;
/// Columns whose errors are carried on together.
const STEP: usize = 4;

/// A row on its way: everything in the order of the factor.
struct Row {
    w: Vec<f32>,
    /// What earlier errors caused in each column of e V.
    r: Vec<f32>,
    e: Vec<f32>,
    codes: Vec<u8>,
    scales: Vec<GroupScale>,
}

impl Gptq {
    fn feed_back(&self, isa: Isa, factor: &Factor, x: &[f32], n: usize, k: usize) -> Result<QuantizedWeight> {
        let scheme = self.scheme;
        let groups = scheme.groups(n, k)?;
        let rtn = Rtn::new(scheme).quantize(isa, x, n, k)?;
        let QuantizedWeight::Affine(plain) = &rtn else {
            return Ok(rtn);
        };
        let has_zeros = scheme.fixed_zero().is_none();
        let (mut codes, mut scales) = (plain.codes().to_vec(), plain.scales().to_vec());
        let mut zeros = plain.zeros().to_vec();
        let mut decoded = vec![0f32; k];
        for (batch, x) in x.chunks(TOGETHER * k).enumerate() {
            let mut rows: Vec<Row> = x.chunks_exact(k).map(|x| Row::new(factor, x)).collect();
            self.walk(isa, factor, &mut rows)?;
            for (i, (row, x)) in rows.iter().zip(x.chunks_exact(k)).enumerate() {
                let at = batch * TOGETHER + i;
                rtn.dequantize_row(at, &mut decoded);
                let errors: Vec<f32> = factor.order().iter().map(|&c| x[c] - decoded[c]).collect();
                if cost(isa, factor, &row.e) >= cost(isa, factor, &errors) {
                    continue;
                }
                for (place, &column) in factor.order().iter().enumerate() {
                    codes[at * k + column] = row.codes[place];
                }
                for (g, chosen) in row.scales.iter().enumerate() {
                    scales[at * groups + g] = chosen.scale;
                    if has_zeros {
                        zeros[at * groups + g] = chosen.zero;
                    }
                }
            }
        }
        Ok(QuantizedWeight::Affine(AffineWeight::new(
            scheme, n, k, codes, scales, zeros,
        )?))
    }

    fn walk(&self, isa: Isa, factor: &Factor, rows: &mut [Row]) -> Result<()> {
        let k = factor.columns();
        let group = self.scheme.grouping().len(k);
        let mut search = Search::new(self.scheme);
        for from in (0..k).step_by(group) {
            let to = (from + group).min(k);
            let g = factor.order()[from] / group;
            let weights: Vec<f32> = (from..to)
                .map(|i| factor.v(i)[..to - i].iter().map(|v| v * v).sum())
                .collect();
            for (number, row) in rows.iter_mut().enumerate() {
                let targets = targets(factor, row, from, to);
                if first_non_finite(&targets).is_some() {
                    return Err(CalibError::Statistics {
                        reason: "error feedback overflowed; the inputs' second moment is too unbalanced"
                            .to_owned(),
                    });
                }
                let chosen = self.choose(isa, &mut search, &targets, &weights);
                if !chosen.scale.is_finite() {
                    return Err(CalibError::ScaleOverflow {
                        row: number,
                        scale: targets.iter().fold(0.0, |top, t| t.abs().max(top)),
                        dtype: self.scheme.scale_dtype().name(),
                    });
                }
                row.scales[g] = chosen;
            }
            for step in (from..to).step_by(STEP) {
                let end = (step + STEP).min(to);
                for row in rows.iter_mut() {
                    self.round(factor, row, step..end, g);
                    let e: [f32; STEP] = std::array::from_fn(|i| {
                        row.e
                            .get(step + i)
                            .filter(|_| step + i < end)
                            .copied()
                            .unwrap_or(0.0)
                    });
                    if end < k {
                        let lines = std::array::from_fn(|i| {
                            let line = (step + i).min(end - 1);
                            &factor.v(line)[end - line..]
                        });
                        add_scaled(isa, e, lines, &mut row.r[end..]);
                    }
                }
            }
        }
        Ok(())
    }

    fn choose(&self, isa: Isa, search: &mut Search, targets: &[f32], weights: &[f32]) -> GroupScale {
        if targets.iter().all(|t| *t == 0.0) {
            return GroupScale {
                scale: ZERO_GROUP_SCALE,
                zero: self.scheme.fixed_zero().unwrap_or(0),
            };
        }
        if self.search {
            search.choose_weighted(isa, targets, weights)
        } else {
            crate::rtn::Span(self.scheme).choose(isa, targets, 0)
        }
    }

    /// Rounds a few columns of a row, feeding errors back among them.
    fn round(&self, factor: &Factor, row: &mut Row, columns: std::ops::Range<usize>, g: usize) {
        let (lo, hi) = self.scheme.code_range();
        let GroupScale { scale, zero } = row.scales[g];
        for j in columns.clone() {
            let target = row.w[j] + row.r[j] / factor.v_at(j, j);
            let code =
                ((target / scale).round_ties_even() + f32::from(zero)).clamp(f32::from(lo), f32::from(hi));
            row.codes[j] = code as u8;
            row.e[j] = row.w[j] - (code - f32::from(zero)) * scale;
            for c in j + 1..columns.end {
                row.r[c] += row.e[j] * factor.v_at(j, c);
            }
        }
    }
}

impl Row {
    fn new(factor: &Factor, x: &[f32]) -> Self {
        let k = x.len();
        let resting = GroupScale {
            scale: ZERO_GROUP_SCALE,
            zero: 0,
        };
        Self {
            w: factor.order().iter().map(|&c| x[c]).collect(),
            r: vec![0.0; k],
            e: vec![0.0; k],
            codes: vec![0; k],
            scales: vec![resting; k],
        }
    }
}

/// What columns `from..to` should be if each could be met exactly: the solution of d V_G = r_G, added to w.
fn targets(factor: &Factor, row: &Row, from: usize, to: usize) -> Vec<f32> {
    let mut delta = vec![0f32; to - from];
    for j in from..to {
        let carried: f32 = (from..j).map(|i| delta[i - from] * factor.v_at(i, j)).sum();
        delta[j - from] = (row.r[j] - carried) / factor.v_at(j, j);
    }
    delta.iter().zip(&row.w[from..to]).map(|(d, w)| w + d).collect()
}

/// e H e^T of errors in the factor's order.
pub fn cost(isa: Isa, factor: &Factor, e: &[f32]) -> f64 {
    let gradient = gradient(isa, factor, e);
    gradient
        .iter()
        .zip(e)
        .map(|(g, e)| f64::from(*g) * f64::from(*e))
        .sum()
}

/// e H.
pub fn gradient(isa: Isa, factor: &Factor, e: &[f32]) -> Vec<f32> {
    let k = factor.columns();
    let mut out = vec![0f32; k];
    for i in (0..k).step_by(4) {
        let scale = std::array::from_fn(|d| e.get(i + d).copied().unwrap_or(0.0));
        if scale != [0.0; 4] {
            add_scaled(
                isa,
                scale,
                std::array::from_fn(|d| factor.h((i + d).min(k - 1))),
                &mut out,
            );
        }
    }
    out
}
