//! Error figures of a block of rows: adds up what [`Figures`] are made from. Owns the bridge from
//! the kernels' sums to the manifest's figures, no formula of its own.

use qtool_formats::artifact::Figures;
use qtool_formats::artifact::figures::ErrorMoments;
use qtool_formats::packing::wint2::{GROUP, ZERO_POINT};
use qtool_formats::packing::wint25;
use qtool_formats::weight::{AffineWeight, Ccq25Weight, CcqWeight};
use qtool_formats::{QuantizedWeight, Scheme};
use qtool_kernels::{ErrorSums, Isa, code_histogram, row_error};

/// Sums over any number of rows. Merge blocks in row order, so that the result does not depend on
/// how rows were spread over threads.
#[derive(Debug, Clone)]
pub struct BlockFigures {
    /// Error sums.
    pub sums: ErrorSums,
    /// How often each code occurs.
    pub histogram: [u64; 256],
}

impl Default for BlockFigures {
    fn default() -> Self {
        Self {
            sums: ErrorSums::default(),
            histogram: [0; 256],
        }
    }
}

impl BlockFigures {
    /// Adds the figures of the rows that follow.
    pub fn merge(&mut self, next: &Self) {
        self.sums.merge(&next.sums);
        self.histogram
            .iter_mut()
            .zip(&next.histogram)
            .for_each(|(sum, count)| *sum += count);
    }

    /// The manifest's figures.
    pub fn figures(&self, scheme: &Scheme, bits_per_weight: f64) -> Figures {
        let moments = ErrorMoments {
            sum_w2: self.sums.sum_x2,
            sum_e2: self.sums.sum_e2,
            sum_we: self.sums.sum_xe,
            max_abs_e: f64::from(self.sums.max_abs_e),
        };
        Figures::new(&moments, &self.histogram, scheme.code_range(), bits_per_weight)
    }
}

/// Adds the errors and codes of `weight` against its source `x`, (N, K).
pub fn measure(isa: Isa, x: &[f32], weight: &QuantizedWeight, into: &mut BlockFigures) {
    match weight {
        QuantizedWeight::Affine(affine) => measure_affine(isa, x, affine, into),
        QuantizedWeight::Ccq(ccq) => measure_ccq(isa, x, ccq, into),
        QuantizedWeight::Ccq25(ccq) => measure_ccq25(isa, x, ccq, into),
        QuantizedWeight::Nf4(_) | QuantizedWeight::K(_) => measure_values(x, weight, into),
    }
    code_histogram(weight.codes(), &mut into.histogram);
}

fn measure_affine(isa: Isa, x: &[f32], weight: &AffineWeight, into: &mut BlockFigures) {
    let (n, k) = weight.dims();
    let group = weight.scheme().grouping().len(k);
    let groups = weight.scales().len() / n.max(1);
    let middle = weight
        .scheme()
        .fixed_zero()
        .map(|zero| vec![f32::from(zero); groups]);
    let mut zeros = vec![0f32; groups];
    for (row, (x, codes)) in x.chunks_exact(k).zip(weight.codes().chunks_exact(k)).enumerate() {
        let at = row * groups..(row + 1) * groups;
        let zeros = match &middle {
            Some(middle) => middle,
            None => {
                zeros
                    .iter_mut()
                    .zip(&weight.zeros()[at.clone()])
                    .for_each(|(f, &z)| *f = f32::from(z));
                &zeros
            }
        };
        row_error(isa, x, codes, group, &weight.scales()[at], zeros, &mut into.sums);
    }
}

/// A WINT2 row is an affine row of windows: zero at 32, scale local * super per group of 64.
fn measure_ccq(isa: Isa, x: &[f32], weight: &CcqWeight, into: &mut BlockFigures) {
    let k = weight.k();
    let zeros = vec![ZERO_POINT as f32; k / GROUP];
    let mut windows = vec![0u8; k];
    for (row, x) in x.chunks_exact(k).enumerate() {
        weight.windows(row, &mut windows);
        row_error(
            isa,
            x,
            &windows,
            GROUP,
            &weight.group_scales(row),
            &zeros,
            &mut into.sums,
        );
    }
}

/// The same with zero at 4.
fn measure_ccq25(isa: Isa, x: &[f32], weight: &Ccq25Weight, into: &mut BlockFigures) {
    let k = weight.k();
    let zeros = vec![f32::from(wint25::ZERO_POINT); k / wint25::GROUP];
    let rows = x.chunks_exact(k).zip(weight.windows().chunks_exact(k));
    for (row, (x, windows)) in rows.enumerate() {
        let scales = weight.group_scales(row);
        row_error(isa, x, windows, wint25::GROUP, &scales, &zeros, &mut into.sums);
    }
}

/// Levels that are no grid: decoded values against the source, in f64, one after the other.
fn measure_values(x: &[f32], weight: &QuantizedWeight, into: &mut BlockFigures) {
    let (_, k) = weight.dims();
    let mut values = vec![0f32; k];
    let sums = &mut into.sums;
    for (row, x) in x.chunks_exact(k).enumerate() {
        weight.dequantize_row(row, &mut values);
        for (&w, &v) in x.iter().zip(&values) {
            let (x, e) = (f64::from(w), f64::from(w) - f64::from(v));
            sums.sum_x2 += x * x;
            sums.sum_e2 += e * e;
            sums.sum_xe += x * e;
            sums.max_abs_e = sums.max_abs_e.max(e.abs() as f32);
        }
    }
}
