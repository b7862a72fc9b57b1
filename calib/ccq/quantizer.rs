//! The encoder as a quantizer: blocks of rows in, a WINT2 weight out. Owns no decision but which encoder is asked:
//! the one that looks at the weights alone, at the inputs' mean squares, or at their whole second moment.

use std::sync::Arc;

use qtool_formats::packing::wint2::GROUP;
use qtool_formats::weight::CcqWeight;
use qtool_formats::{FormatError, QuantizedWeight, Scheme};
use qtool_kernels::Isa;
use qtool_kernels::cuda::Encoder;

use super::device::DeviceCcq;
use super::feedback::{Prepared, TOGETHER};
use super::{CcqError, CcqRow, Effort, Scratch, encode_row};
use crate::{CalibError, Evidence, LayerStats, Method, Quantizer, Result, TensorOptions};

/// The registry entry.
pub const METHOD: Method = Method {
    name: "ccq",
    bits: &[2],
    summary: "WINT2, the 2-bit convolutional code of FastDeploy: pair, scale and code search (2 bits only)",
    build,
};

fn build(options: &TensorOptions) -> Result<Box<dyn Quantizer>> {
    Ok(Box::new(Ccq {
        effort: options.effort,
        knowledge: None,
    }))
}

/// The quantizer.
#[derive(Debug, Clone)]
pub struct Ccq {
    pub(super) effort: Effort,
    pub(super) knowledge: Option<Arc<Knowledge>>,
}

/// What is known of a layer's inputs.
#[derive(Debug)]
pub(super) struct Knowledge {
    pub(super) importance: Vec<f32>,
    pub(super) prepared: Option<Prepared>,
}

impl Knowledge {
    /// Fails when it is of other columns.
    pub(super) fn fits(&self, k: usize) -> Result<()> {
        let known = self.importance.len();
        if known == k {
            return Ok(());
        }
        Err(CalibError::Statistics {
            reason: format!("they are of {known} columns, the weight has {k}"),
        })
    }
}

impl Quantizer for Ccq {
    fn scheme(&self) -> Scheme {
        Scheme::Ccq
    }

    fn describe(&self) -> String {
        let effort = self.effort;
        match self.knowledge.as_deref() {
            None => format!("ccq, effort {effort}"),
            Some(Knowledge {
                prepared: Some(prepared),
                ..
            }) => format!(
                "ccq, effort {effort}, error feedback and descent, damping {}, shrunk by {}",
                prepared.damping(),
                prepared.shrinkage()
            ),
            Some(_) => format!("ccq, effort {effort}, weighted by the inputs' mean squares"),
        }
    }

    fn evidence(&self) -> Evidence {
        Evidence::Full
    }

    fn informed(&self, stats: &LayerStats) -> Result<Box<dyn Quantizer>> {
        Ok(Box::new(self.knowing(stats)))
    }

    fn on_device(&self, encoder: &Encoder) -> Result<Option<Box<dyn Quantizer>>> {
        Ok(match self.knowledge {
            None => Some(Box::new(DeviceCcq::new(self.clone(), encoder)?)),
            Some(_) => None,
        })
    }

    fn quantize(&self, isa: Isa, x: &[f32], n: usize, k: usize) -> Result<QuantizedWeight> {
        thread_local!(static SCRATCH: std::cell::RefCell<Scratch> = std::cell::RefCell::default());
        Scheme::Ccq.parts(n, k)?;
        self.knowledge.as_deref().map_or(Ok(()), |known| known.fits(k))?;
        let mut all = Vec::with_capacity(n);
        SCRATCH.with_borrow_mut(|scratch| {
            for (batch, x) in x.chunks(TOGETHER * k).enumerate() {
                let rows = self
                    .encode(isa, x, k, scratch)
                    .map_err(|(row, e)| located(e, batch * TOGETHER + row, &x[row * k..]))?;
                all.extend(rows);
            }
            stacked(all, k)
        })
    }
}

/// A weight of these rows of K weights.
pub(super) fn stacked(rows: Vec<CcqRow>, k: usize) -> Result<QuantizedWeight> {
    let n = rows.len();
    let (mut codes, mut locals) = (Vec::with_capacity(n * k / 4), Vec::with_capacity(n * k / GROUP));
    let mut channels = Vec::with_capacity(n);
    for row in rows {
        channels.push(row.channel());
        codes.extend(row.code_bytes);
        locals.extend(row.local);
    }
    Ok(QuantizedWeight::Ccq(CcqWeight::new(k, codes, locals, channels)?))
}

impl Ccq {
    /// The same, knowing its inputs.
    pub(super) fn knowing(&self, stats: &LayerStats) -> Self {
        Self {
            effort: self.effort,
            knowledge: Some(Arc::new(Knowledge {
                importance: stats.importance(),
                prepared: Prepared::new(stats),
            })),
        }
    }

    fn encode(
        &self,
        isa: Isa,
        x: &[f32],
        k: usize,
        scratch: &mut Scratch,
    ) -> std::result::Result<Vec<CcqRow>, (usize, CcqError)> {
        let importance = self.knowledge.as_deref().map(|known| known.importance.as_slice());
        let prepared = self
            .knowledge
            .as_deref()
            .and_then(|known| known.prepared.as_ref());
        if let (Some(prepared), Some(importance)) = (prepared, importance) {
            return prepared.encode(isa, x, importance, self.effort, scratch);
        }
        let row = |(number, x)| encode_row(x, importance, self.effort, isa, scratch).map_err(|e| (number, e));
        x.chunks_exact(k).enumerate().map(row).collect()
    }
}

/// An encoder's error with its row.
pub(crate) fn located(error: CcqError, row: usize, x: &[f32]) -> CalibError {
    match error {
        CcqError::NotFinite { column } => CalibError::NonFinite {
            row,
            column,
            value: x[column].to_string(),
        },
        other => CalibError::Format(FormatError::Weight {
            what: "row of a WINT2 weight",
            expected: "a row that can be encoded".to_owned(),
            got: other.to_string(),
        }),
    }
}
