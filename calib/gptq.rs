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
            Knowledge::Nothing => "clip search (gptq without evidence)".to_owned(),
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
            let mut rows: Vec<Row> = x.chunks_exact(k).map(|x| Row::new(factor, x, groups)).collect();
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
    fn new(factor: &Factor, x: &[f32], groups: usize) -> Self {
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
            scales: vec![resting; groups],
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hessian::tests::{correlated, noise, slow_factor};
    use crate::options::PartialOptions;
    use crate::proxy::Proxy;

    fn quantizer(options: &str) -> Box<dyn Quantizer> {
        let options = PartialOptions::parse(options).unwrap().complete(8).unwrap();
        (crate::find(options.method).unwrap().build)(&options).unwrap()
    }

    /// Plain error feedback in f64, columns in the factor's order, scales as given.
    fn slow(
        stats: &LayerStats,
        order: &[usize],
        x: &[f32],
        scales: &[f32],
        group: usize,
        top: f64,
    ) -> Vec<f64> {
        let k = x.len();
        let factor = slow_factor(stats, order);
        let v = |i: usize, j: usize| factor[i * k + j];
        let mut e = vec![0f64; k];
        let mut out = vec![0f64; k];
        for j in 0..k {
            let w = f64::from(x[order[j]]);
            let carried: f64 = (0..j).map(|i| e[i] * v(i, j)).sum();
            let scale = f64::from(scales[order[j] / group]);
            let code = ((w + carried / v(j, j)) / scale)
                .round_ties_even()
                .clamp(-top - 1.0, top);
            out[order[j]] = code * scale;
            e[j] = w - code * scale;
        }
        out
    }

    #[test]
    fn feedback_is_that_of_the_slow_version() {
        let (k, group) = (64, 32);
        let stats = correlated(k, 200, 5, false);
        let mut next = noise(9);
        let x: Vec<f32> = (0..k).map(|_| next()).collect();
        let quantizer = quantizer("bits:4,group:32,method:gptq,scale:f32")
            .informed(&stats)
            .unwrap();
        let QuantizedWeight::Affine(weight) = quantizer.quantize(Isa::best(), &x, 1, k).unwrap() else {
            panic!("affine")
        };
        let order = order_by_importance(&stats.importance(), group, 1);
        let expected = slow(&stats, &order, &x, weight.scales(), group, 7.0);
        let mut row = vec![0f32; k];
        QuantizedWeight::Affine(weight).dequantize_row(0, &mut row);
        let same = row
            .iter()
            .zip(&expected)
            .filter(|(a, b)| (f64::from(**a) - **b).abs() < 1e-5)
            .count();
        // A target within f32's rounding of a tie may go the other way, and then what follows it differs.
        assert_eq!(same, k, "{row:?} {expected:?}");
    }

    #[test]
    fn informed_methods_are_never_worse_than_plain_rounding() {
        let mut cases = 0;
        for (k, dead) in [(64, false), (192, true), (576, false)] {
            let stats = correlated(k, 300, k as u64, dead);
            let proxy = Proxy::new(&stats);
            let mut next = noise(4);
            let n = 21;
            let mut x: Vec<f32> = (0..n * k).map(|_| next() * next() * next()).collect();
            x[k..2 * k].fill(0.0);
            x[2 * k..2 * k + 64].fill(0.0);
            for (options, plain) in [
                ("bits:8,method:gptq", "bits:8,clip:none"),
                ("bits:4,method:gptq", "bits:4,clip:none"),
                (
                    "bits:4,group:32,grid:zp,method:gptq",
                    "bits:4,group:32,grid:zp,clip:none",
                ),
                ("bits:3,method:gptq", "bits:3,clip:none"),
                ("bits:2,method:gptq", "bits:2,method:none"),
                ("bits:2,effort:fast", "bits:2,effort:fast"),
            ] {
                let informed = quantizer(options).informed(&stats).unwrap();
                assert!(informed.describe().contains("damping"), "{}", informed.describe());
                let weight = informed.quantize(Isa::best(), &x, n, k).unwrap();
                let base = quantizer(plain).quantize(Isa::best(), &x, n, k).unwrap();
                let (with, without) = (proxy.sums(&x, &weight).0, proxy.sums(&x, &base).0);
                assert!(
                    with <= without * 1.001,
                    "{options}, {k} columns: {with} against {without}"
                );
                let parts: Vec<QuantizedWeight> = [0..16, 16..n]
                    .map(|r| {
                        informed
                            .quantize(Isa::best(), &x[r.start * k..r.end * k], r.len(), k)
                            .unwrap()
                    })
                    .into();
                assert_eq!(
                    QuantizedWeight::stack(&parts),
                    Some(weight.clone()),
                    "{options}: rows are independent"
                );
                for isa in Isa::available() {
                    assert_eq!(
                        informed.quantize(isa, &x, n, k).unwrap(),
                        weight,
                        "{options} on {isa}"
                    );
                }
                cases += 1;
            }
        }
        assert_eq!(cases, 3 * 6);
    }

    #[test]
    fn a_diagonal_alone_weighs_the_search() {
        let full = correlated(64, 100, 8, false);
        let sums = full.importance().iter().map(|v| f64::from(*v) * 100.0).collect();
        let diagonal = LayerStats::new(
            64,
            100,
            crate::stats::Moment::Diagonal(sums),
            full.absmax().to_vec(),
        )
        .unwrap();
        let mut next = noise(2);
        let x: Vec<f32> = (0..64).map(|_| next()).collect();
        for options in ["bits:4,method:gptq", "bits:2,effort:fast"] {
            let informed = quantizer(options).informed(&diagonal).unwrap();
            assert!(
                informed.describe().contains("mean squares"),
                "{}",
                informed.describe()
            );
            informed.quantize(Isa::best(), &x, 1, 64).unwrap();
            assert!(
                informed.quantize(Isa::best(), &x, 2, 32).is_err(),
                "of another width"
            );
        }
    }
}
