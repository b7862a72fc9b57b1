//! The encoder of WINT2.5 as a quantizer: blocks of rows in, a weight out. Owns no decision but whether the columns
//! count alike or by their inputs' mean squares.

use std::sync::Arc;

use qtool_formats::weight::Ccq25Weight;
use qtool_formats::{QuantizedWeight, Scheme};
use qtool_kernels::Isa;

use super::encode_row;
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
            let encoded = encode_row(x, importance).map_err(|e| located(e, row, x))?;
            words.extend(encoded.words);
            scales.push(encoded.super_scale);
        }
        Ok(QuantizedWeight::Ccq25(Ccq25Weight::new(k, words, scales)?))
    }
}
