//! The encoder of WINT2.5 as a quantizer: blocks of rows in, a weight out. Owns no decision but whether the columns
//! count alike or by their inputs' mean squares. Under mean squares every row is compared with its plain encoding, and the
//! better of both is kept.

use std::sync::Arc;

use qtool_formats::packing::wint25::{GROUP, MAX_LOCAL, WORDS, weights};
use qtool_formats::weight::Ccq25Weight;
use qtool_formats::{QuantizedWeight, Scheme};
use qtool_kernels::Isa;

use super::{Ccq25Row, encode_row};
use crate::ccq::quantizer::located;
use crate::{CalibError, Evidence, LayerStats, Method, Quantizer, Result, TensorOptions};

/// The registry entry.
pub const METHOD: Method = Method {
    name: "ccq25",
    bits: &[2],
    summary: "WINT2.5, 2.5 bits a weight: exact code search, for qtool's own artifact only",
    build,
};

fn build(_: &TensorOptions) -> Result<Box<dyn Quantizer>> {
    Ok(Box::new(Ccq25 { importance: None }))
}

/// The quantizer. `importance` (K): mean squares of the inputs.
#[derive(Debug, Clone)]
struct Ccq25 {
    importance: Option<Arc<Vec<f32>>>,
}

impl Quantizer for Ccq25 {
    fn scheme(&self) -> Scheme {
        Scheme::Ccq25
    }

    fn describe(&self) -> String {
        let weighted = if self.importance.is_some() {
            ", weighted by the inputs' mean squares"
        } else {
            ""
        };
        format!("ccq25{weighted}")
    }

    fn evidence(&self) -> Evidence {
        Evidence::Diagonal
    }

    fn informed(&self, stats: &LayerStats) -> Result<Box<dyn Quantizer>> {
        Ok(Box::new(Self {
            importance: Some(Arc::new(stats.importance())),
        }))
    }

    /// No instruction set is used: every one gives the same words.
    fn quantize(&self, _: Isa, x: &[f32], n: usize, k: usize) -> Result<QuantizedWeight> {
        Scheme::Ccq25.parts(n, k)?;
        let importance = self.importance.as_deref().map(Vec::as_slice);
        if let Some(known) = importance.map(<[f32]>::len)
            && known != k
        {
            return Err(CalibError::Statistics {
                reason: format!("they are of {known} columns, the weight has {k}"),
            });
        }
        let (mut words, mut scales) = (Vec::new(), Vec::with_capacity(n));
        for (row, x) in x.chunks_exact(k).enumerate() {
            let mut encoded = encode_row(x, None).map_err(|e| located(e, row, x))?;
            if let Some(importance) = importance {
                let weighted = encode_row(x, Some(importance)).map_err(|e| located(e, row, x))?;
                if weighted_error(&weighted, x, importance) < weighted_error(&encoded, x, importance) {
                    encoded = weighted;
                }
            }
            words.extend(encoded.words);
            scales.push(encoded.super_scale);
        }
        Ok(QuantizedWeight::Ccq25(Ccq25Weight::new(k, words, scales)?))
    }
}

/// Sum over columns of importance times squared error, in f64.
fn weighted_error(row: &Ccq25Row, x: &[f32], importance: &[f32]) -> f64 {
    let mut sum = 0.0;
    let groups = row.words.as_chunks::<WORDS>().0.iter().zip(x.chunks_exact(GROUP));
    for ((words, x), importance) in groups.zip(importance.chunks_exact(GROUP)) {
        let scale = f64::from(words[WORDS - 1] & MAX_LOCAL) * row.super_scale.to_f64();
        for ((w, x), importance) in weights(words).iter().zip(x).zip(importance) {
            sum += f64::from(*importance) * (f64::from(*x) - f64::from(*w) * scale).powi(2);
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stats::Moment;

    /// Inputs of which a few columns are large: knowing them lowers the error they see, and never raises it.
    #[test]
    fn importance_is_never_worse_and_mostly_better() {
        let (n, k) = (24, 192);
        let mut state = 7u64;
        let mut uniform = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f32 / 8_388_608.0 - 1.0
        };
        let x: Vec<f32> = (0..n * k).map(|_| uniform() + uniform() + uniform()).collect();
        let squares: Vec<f64> = (0..k).map(|c| if c % 9 == 0 { 900.0 } else { 1.0 }).collect();
        let stats = LayerStats::new(k, 1, Moment::Diagonal(squares), vec![30.0; k]).unwrap();
        let importance = stats.importance();
        let plain = Ccq25 { importance: None };
        let informed = plain.informed(&stats).unwrap();
        let errors = |quantizer: &dyn Quantizer| -> Vec<f64> {
            let weight = quantizer.quantize(Isa::best(), &x, n, k).unwrap();
            let mut decoded = vec![0f32; k];
            let row = |n: usize| {
                weight.dequantize_row(n, &mut decoded);
                let terms = decoded.iter().zip(&x[n * k..]).zip(&importance);
                terms
                    .map(|((y, x), w)| f64::from(*w) * f64::from(x - y).powi(2))
                    .sum()
            };
            (0..n).map(row).collect()
        };
        let (with, without) = (errors(informed.as_ref()), errors(&plain));
        assert!(
            with.iter().zip(&without).all(|(a, b)| *a <= b * 1.000_001),
            "{with:?} {without:?}"
        );
        assert!(
            with.iter().sum::<f64>() < 0.7 * without.iter().sum::<f64>(),
            "{with:?} {without:?}"
        );
    }
}
