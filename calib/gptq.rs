//! `gptq`: rounding with error feedback. Column after column, the error made so far is compensated in the columns
//! still to come, as far as the inputs' second moment allows ([`crate::hessian`]).
//!
//! ```text
//! t_j = w_j + r_j / V_jj      code_j = clamp(round(t_j / s) + z)      e_j = w_j - value(code_j)
//! r_c += e_j V_jc  for c > j
//! ```
//!
//! A group's scale (and zero point) is searched when its first column is reached: first on the targets its columns
//! would have if none of them caused an error, each weighted by the diagonal of the group's conditional moment
//! V_G V_G^T, then around the best of these by feeding errors back within the group for every candidate
//! (`gptq/group.rs`). Columns are visited group by group, groups of large inputs first, and within a group likewise
//! ("act-order" that needs no index at run time). When all columns have codes, descent on the exact objective goes on
//! from there (`gptq/descent.rs`).
//!
//! Without statistics it is clip search, with a diagonal alone clip search weighted by it. Every row is compared
//! with its plain rounding under the same moment, and the better of both is kept.

use std::sync::Arc;

use qtool_formats::scheme::AffineScheme;
use qtool_formats::weight::AffineWeight;
use qtool_formats::{QuantizedWeight, Scheme};
use qtool_kernels::Isa;

use crate::clip::Search;
use crate::hessian::{DAMPING, Factor, order_by_importance, shrinkage};
use crate::rtn::Rtn;
use crate::scale_grid::ScaleGrid;
use crate::{CalibError, Evidence, LayerStats, Method, Quantizer, Result, TensorOptions};

mod descent;
mod feedback;
mod group;

use feedback::{Prepared, Row, Walk};

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
        scales: options.scale_grid()?,
        knowledge: Knowledge::Nothing,
    }))
}

/// The quantizer.
#[derive(Debug, Clone)]
pub struct Gptq {
    scheme: AffineScheme,
    scales: ScaleGrid,
    knowledge: Knowledge,
}

#[derive(Debug, Clone)]
enum Knowledge {
    Nothing,
    /// Mean square of each column.
    Diagonal(Arc<Vec<f32>>),
    Full(Arc<Prepared>),
}

impl Quantizer for Gptq {
    fn scheme(&self) -> Scheme {
        Scheme::Affine(self.scheme)
    }

    fn describe(&self) -> String {
        let name = match &self.knowledge {
            Knowledge::Nothing => "clip search (gptq without evidence)".to_owned(),
            Knowledge::Diagonal(_) => "clip search weighted by the inputs' mean squares".to_owned(),
            Knowledge::Full(known) => format!(
                "gptq, damping {}, shrunk by {}, act-order by group, descent",
                known.factor.damping(),
                known.factor.shrinkage()
            ),
        };
        name + &self.scales.to_string()
    }

    fn evidence(&self) -> Evidence {
        Evidence::Full
    }

    fn informed(&self, stats: &LayerStats) -> Result<Box<dyn Quantizer>> {
        let importance = stats.importance();
        let group = self.scheme.grouping().len(stats.columns());
        let order = order_by_importance(&importance, group, 1);
        let knowledge = match Factor::new(stats, order, DAMPING, shrinkage(self.scheme.bits())) {
            Some(factor) => Knowledge::Full(Arc::new(Prepared::new(factor, group))),
            None => Knowledge::Diagonal(Arc::new(importance)),
        };
        Ok(Box::new(Self {
            knowledge,
            ..self.clone()
        }))
    }

    fn quantize(&self, isa: Isa, x: &[f32], n: usize, k: usize) -> Result<QuantizedWeight> {
        let mut search = Search::new(self.scheme, self.scales);
        match &self.knowledge {
            Knowledge::Nothing => crate::affine::quantize_rows(isa, self.scheme, x, n, k, &mut search),
            Knowledge::Diagonal(importance) => {
                check_width(importance.len(), k)?;
                search.weigh(importance);
                crate::affine::quantize_rows(isa, self.scheme, x, n, k, &mut search)
            }
            Knowledge::Full(known) => {
                check_width(known.factor.columns(), k)?;
                self.feed_back(isa, known, x, n, k)
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

/// Rows that go through the columns together, so that each row of V and H is read once for all of them.
const TOGETHER: usize = 16;

impl Gptq {
    fn feed_back(
        &self,
        isa: Isa,
        known: &Prepared,
        x: &[f32],
        n: usize,
        k: usize,
    ) -> Result<QuantizedWeight> {
        let (scheme, factor) = (self.scheme, &known.factor);
        let groups = scheme.groups(n, k)?;
        let rtn = Rtn::new(scheme, self.scales).quantize(isa, x, n, k)?;
        let QuantizedWeight::Affine(plain) = &rtn else {
            return Ok(rtn);
        };
        let has_zeros = scheme.fixed_zero().is_none();
        let (mut codes, mut scales) = (plain.codes().to_vec(), plain.scales().to_vec());
        let mut zeros = plain.zeros().to_vec();
        let mut decoded = vec![0f32; k];
        let walk = Walk {
            scheme,
            scales: self.scales,
            known,
        };
        for (batch, x) in x.chunks(TOGETHER * k).enumerate() {
            let mut rows: Vec<Row> = x.chunks_exact(k).map(|x| Row::new(factor, x, groups)).collect();
            walk.feed_back(isa, &mut rows)?;
            walk.descend(isa, &mut rows);
            for (i, (row, x)) in rows.iter().zip(x.chunks_exact(k)).enumerate() {
                let at = batch * TOGETHER + i;
                rtn.dequantize_row(at, &mut decoded);
                let errors: Vec<f32> = factor.order().iter().map(|&c| x[c] - decoded[c]).collect();
                if factor.measured_cost(isa, &walk.errors(row)) >= factor.measured_cost(isa, &errors) {
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
}

#[cfg(test)]
mod tests;
