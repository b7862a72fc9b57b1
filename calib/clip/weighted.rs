//! The clip search that knows its inputs: the error of a column counts as much as its inputs are large.
//!
//! ```text
//! minimise over (s, z) of a group  sum_k d_k (w_k - (clamp(round(w_k / s) + z, lo, hi) - z) * s)^2,   d = diag(H)
//! ```
//!
//! Of plain rounding, the search without weights and the one with them, each row keeps the one with the least
//! e H e^T: the diagonal alone does not see errors that make each other good.

use qtool_formats::scheme::AffineScheme;
use qtool_formats::{QuantizedWeight, Scheme};
use qtool_kernels::Isa;
use qtool_kernels::cuda::Encoder;

use super::{ClipSearch, Search, floored};
use crate::affine::quantize_rows;
use crate::device::DeviceAffine;
use crate::proxy::Proxy;
use crate::rtn::{Rtn, Span};
use crate::scale_grid::ScaleGrid;
use crate::stats::LayerStats;
use crate::{CalibError, Quantizer, Result};

/// See the module's text.
pub(super) struct Weighted {
    scheme: AffineScheme,
    scales: ScaleGrid,
    importance: Vec<f32>,
    proxy: Proxy,
    /// Plain rounding and the two searches on a GPU, if they run there.
    there: Option<[Box<dyn Quantizer>; 3]>,
}

impl Weighted {
    /// For inputs like these.
    pub(super) fn new(scheme: AffineScheme, scales: ScaleGrid, stats: &LayerStats) -> Self {
        Self {
            scheme,
            scales,
            importance: stats.importance(),
            proxy: Proxy::new(stats),
            there: None,
        }
    }

    /// The same, with the same codes, chosen on a GPU; the three are priced here. Scales take all values of their type
    /// there.
    pub(super) fn on_device(
        scheme: AffineScheme,
        stats: &LayerStats,
        encoder: &Encoder,
    ) -> Result<Box<dyn Quantizer>> {
        let scales = ScaleGrid::all(scheme.scale_dtype());
        let here = Self::new(scheme, scales, stats);
        let search = || DeviceAffine::searching(ClipSearch { scheme, scales }, scheme, encoder);
        let weighted = search().weighted(floored(&here.importance));
        Ok(Box::new(Self {
            there: Some([
                Box::new(DeviceAffine::rounding(Rtn::new(scheme, scales), scheme, encoder)),
                Box::new(search()),
                Box::new(weighted),
            ]),
            ..here
        }))
    }

    /// By plain rounding, by the search without weights and by the one with them.
    fn candidates(&self, isa: Isa, x: &[f32], n: usize, k: usize) -> Result<[QuantizedWeight; 3]> {
        let (scheme, scales) = (self.scheme, self.scales);
        if let Some([plain, search, weighted]) = &self.there {
            return Ok([
                plain.quantize(isa, x, n, k)?,
                search.quantize(isa, x, n, k)?,
                weighted.quantize(isa, x, n, k)?,
            ]);
        }
        let mut weighted = Search::new(scheme, scales);
        weighted.weigh(&self.importance);
        Ok([
            quantize_rows(isa, scheme, x, n, k, &mut Span(scheme, scales))?,
            quantize_rows(isa, scheme, x, n, k, &mut Search::new(scheme, scales))?,
            quantize_rows(isa, scheme, x, n, k, &mut weighted)?,
        ])
    }
}

impl Quantizer for Weighted {
    fn scheme(&self) -> Scheme {
        Scheme::Affine(self.scheme)
    }

    fn describe(&self) -> String {
        format!("rtn, clip search weighted by inputs{}", self.scales)
    }

    fn rows_together(&self, k: usize) -> Option<usize> {
        self.there.as_ref().and_then(|[plain, ..]| plain.rows_together(k))
    }

    fn quantize(&self, isa: Isa, x: &[f32], n: usize, k: usize) -> Result<QuantizedWeight> {
        if k != self.importance.len() {
            return Err(CalibError::Statistics {
                reason: format!("expected rows of {} columns, got {k}", self.importance.len()),
            });
        }
        let candidates = self.candidates(isa, x, n, k)?;
        let costs: Vec<Vec<f64>> = candidates.iter().map(|c| self.proxy.row_errors(x, c)).collect();
        let best = |row: usize| {
            (1..candidates.len()).fold(0, |b, c| if costs[c][row] < costs[b][row] { c } else { b })
        };
        let rows = (0..n)
            .map(|row| candidates[best(row)].rows(row..row + 1))
            .collect::<qtool_formats::Result<Vec<_>>>()?;
        let [plain, ..] = candidates;
        Ok(QuantizedWeight::stack(&rows).unwrap_or(plain))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hessian::tests::of_rows;
    use crate::options::PartialOptions;

    #[test]
    fn inputs_decide_what_is_clipped() {
        let k = 128;
        let value = |i: usize| ((i * 2_654_435_761) % 2003) as f32 / 1001.0 - 1.0;
        // Large weights meet small inputs: clipping them costs little.
        let quiet = |c: usize| c % 9 == 4;
        let x: Vec<f32> = (0..300 * k)
            .map(|i| value(i + 5) * if quiet(i % k) { 0.02 } else { 1.0 })
            .collect();
        let w: Vec<f32> = (0..24 * k)
            .map(|i| value(7 * i + 3).powi(3) * if quiet(i % k) { 4.0 } else { 1.0 })
            .collect();
        let stats = of_rows(&x, k);
        let proxy = Proxy::new(&stats);
        let mut tried = 0;
        for base in [
            "bits:4,group:64",
            "bits:4,group:32,grid:zp",
            "bits:3,group:64",
            "bits:8",
        ] {
            let build = |clip: &str| {
                let options = PartialOptions::parse(&format!("{base},clip:{clip}")).unwrap();
                let options = options.complete(4).unwrap();
                (crate::find(options.method).unwrap().build)(&options).unwrap()
            };
            let isa = Isa::best();
            let [plain, searched] = ["none", "mse"].map(|c| build(c).quantize(isa, &w, 24, k).unwrap());
            let informed = build("mse").informed(&stats).unwrap();
            let found = informed.quantize(isa, &w, 24, k).unwrap();
            let costs = [&plain, &searched, &found].map(|c| proxy.row_errors(&w, c));
            let never_worse = (0..24).all(|row| costs[2][row] <= costs[0][row].min(costs[1][row]));
            assert!(never_worse, "{base}: {costs:?}");
            let total = |i: usize| costs[i].iter().sum::<f64>();
            assert!(
                total(2) < 0.8 * total(0) || base == "bits:8",
                "{base}: {} {}",
                total(2),
                total(0)
            );
            assert!((total(0) - proxy.sums(&w, &plain).0).abs() < 1e-9 * total(0));
            // A row's codes do not depend on its neighbours.
            let alone = informed.quantize(isa, &w[5 * k..6 * k], 1, k).unwrap();
            assert_eq!(alone.codes(), &found.codes()[5 * k..6 * k]);
            tried += 1;
        }
        assert_eq!(tried, 4);
        let narrow = build_width(&stats, 64);
        assert!(
            narrow.contains("expected rows of 128 columns, got 64"),
            "{narrow}"
        );
    }

    fn build_width(stats: &LayerStats, k: usize) -> String {
        let scheme = AffineScheme::parse("w4-sym-g64-bf16").unwrap();
        let scales = ScaleGrid::all(scheme.scale_dtype());
        let error = Weighted::new(scheme, scales, stats).quantize(Isa::best(), &vec![1.0; k], 1, k);
        error.map(|_| ()).unwrap_err().to_string()
    }
}
