//! Where the codes of each tensor come from: the weights alone, evidence about its inputs, or a decision made
//! earlier. Owns the choice per tensor of a plan, and the quantizers that are at work.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use qtool_calib::proxy::Proxy;
use qtool_calib::{Evidence, LayerStats, Quantizer};
use qtool_formats::QuantizedWeight;
use qtool_kernels::Isa;

use crate::calibrate::coverage::{EvidenceSource, Found};
use crate::calibrate::decisions::Decisions;
use crate::plan::{Action, Quantization, QuantizePlan, TensorPlan};
use crate::{Error, Result};

/// Where codes come from.
#[derive(Clone, Copy)]
pub enum Codes<'a> {
    /// The plan's quantizers look at the weights alone.
    Plain,
    /// They are informed of their inputs where something is known of them.
    Informed(&'a dyn EvidenceSource),
    /// Decided before; tensors without a decision are done as in [`Self::Plain`].
    Decided(&'a Decisions),
}

/// How one tensor is being quantized.
pub struct Ready {
    how: How,
    /// What the manifest says of the method; `None` when the plan's quantizer says it.
    pub method: Option<String>,
    /// Prices errors by what its inputs look like.
    proxy: Option<Arc<Proxy>>,
}

enum How {
    Plan,
    Informed(Arc<dyn Quantizer>),
    Decided(Box<crate::calibrate::decisions::Decided>),
}

impl Ready {
    /// Sums for the proxy error of rows `rows` and their codes.
    pub fn proxy(&self, rows: &[f32], weight: &QuantizedWeight) -> Option<ProxySums> {
        let (error, energy) = self.proxy.as_ref()?.sums(rows, weight);
        Some(ProxySums { error, energy })
    }

    /// Rows that are best quantized together, where that is not for the caller to say.
    pub fn rows_together(&self, q: &Quantization) -> Option<usize> {
        match &self.how {
            How::Plan => q.quantizer.rows_together(q.k),
            How::Informed(quantizer) => quantizer.rows_together(q.k),
            How::Decided(_) => None,
        }
    }

    /// The codes of rows `range`, whose values are `rows`.
    pub fn quantize(
        &self,
        isa: Isa,
        q: &Quantization,
        range: &Range<usize>,
        rows: &[f32],
    ) -> Result<Result<QuantizedWeight, qtool_calib::CalibError>> {
        Ok(match &self.how {
            How::Plan => q.quantizer.quantize(isa, rows, range.len(), q.k),
            How::Informed(quantizer) => quantizer.quantize_rows(isa, range.start, rows, (range.len(), q.k)),
            How::Decided(decided) => Ok(decided.rows(range.clone())?),
        })
    }
}

/// tr(E H E^T) and tr(W H W^T) of some rows.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ProxySums {
    /// Of the errors.
    pub error: f64,
    /// Of the weights.
    pub energy: f64,
}

/// What calibration adds to the manifest's record of a tensor.
#[derive(Debug, Clone, Default)]
pub struct Calibrated {
    /// The method, when it is not the plan's quantizer's own description.
    pub method: Option<String>,
    sums: Option<ProxySums>,
}

impl Calibrated {
    /// Takes note of the next rows of a tensor.
    pub fn note(&mut self, ready: &Ready, sums: Option<ProxySums>) {
        if self.method.is_none() {
            self.method.clone_from(&ready.method);
        }
        if let How::Decided(decided) = &ready.how {
            self.sums = decided.proxy().map(|(error, energy)| ProxySums { error, energy });
        } else if let Some(more) = sums {
            let sums = self.sums.get_or_insert_default();
            sums.error += more.error;
            sums.energy += more.energy;
        }
    }

    /// tr(E H E^T) and tr(W H W^T) over all rows.
    pub fn sums(&self) -> Option<(f64, f64)> {
        self.sums.map(|s| (s.error, s.energy))
    }

    /// tr(E H E^T) / tr(W H W^T) over all rows.
    pub fn proxy_error(&self) -> Option<f64> {
        self.sums
            .map(|s| if s.energy > 0.0 { s.error / s.energy } else { 0.0 })
    }
}

/// An informed quantizer: tensors that agree in statistics and options share it.
struct Shared {
    stats: Arc<LayerStats>,
    kind: String,
    quantizer: Option<Arc<dyn Quantizer>>,
    proxy: Arc<Proxy>,
}

/// The tensors at work, each made ready when its first rows come.
pub struct Workshop<'a> {
    codes: Codes<'a>,
    rank: usize,
    ready: HashMap<usize, Arc<Ready>>,
    last: Option<Shared>,
}

impl<'a> Workshop<'a> {
    /// For a plan of rank `rank`, with codes that come from `codes`.
    pub fn new(codes: Codes<'a>, rank: usize) -> Self {
        Self {
            codes,
            rank,
            ready: HashMap::new(),
            last: None,
        }
    }

    /// Makes the tensors `wanted` of the plan ready, with `survey` for those that are to be seen as a whole, forgets all others, and gives those that are ready by number.
    pub fn turn_to(
        &mut self,
        plan: &QuantizePlan,
        wanted: impl Iterator<Item = usize>,
        survey: &dyn Fn(&TensorPlan, &Quantization) -> Result<Vec<f32>>,
    ) -> Result<&HashMap<usize, Arc<Ready>>> {
        let mut next = HashMap::new();
        for index in wanted {
            if next.contains_key(&index) {
                continue;
            }
            let tensor = &plan.tensors[index];
            let Action::Quantize(q) = &tensor.action else {
                continue;
            };
            let ready = match self.ready.remove(&index) {
                Some(ready) => ready,
                None => {
                    let mut ready = self.make(tensor, q)?;
                    if matches!(ready.how, How::Plan) && q.quantizer.surveys() {
                        let surveyed = q.quantizer.surveyed(survey(tensor, q)?, q.k);
                        ready.how = How::Informed(Arc::from(surveyed.map_err(Error::Option)?));
                    }
                    Arc::new(ready)
                }
            };
            next.insert(index, ready);
        }
        self.ready = next;
        Ok(&self.ready)
    }

    fn make(&mut self, tensor: &TensorPlan, q: &Quantization) -> Result<Ready> {
        let plain = Ready {
            how: How::Plan,
            method: None,
            proxy: None,
        };
        let source = match self.codes {
            Codes::Plain => return Ok(plain),
            Codes::Decided(decisions) => {
                return Ok(match decisions.find(self.rank, &tensor.name)? {
                    None => unseen(q, plain),
                    Some(decided) => Ready {
                        method: Some(decided.method.clone()),
                        proxy: None,
                        how: How::Decided(Box::new(decided)),
                    },
                });
            }
            Codes::Informed(source) => source,
        };
        let Some(Found { stats, note }) = evidence_of(source, q)? else {
            return Ok(unseen(q, plain));
        };
        if stats.columns() != q.k {
            return Err(Error::Evidence {
                tensor: tensor.name.clone(),
                expected: q.k,
                got: stats.columns(),
            });
        }
        let with_note = |method: String| match &note {
            Some(note) => format!("{method}; {note}"),
            None => method,
        };
        // The description of a method without evidence need not name its scheme.
        let kind = format!("{} {}", q.scheme, q.quantizer.describe());
        let known = self.last.as_ref();
        if !known.is_some_and(|last| last.kind == kind && same(&last.stats, &stats)) {
            let informed = if q.quantizer.evidence() == Evidence::None {
                None
            } else {
                Some(q.quantizer.informed(&stats).map_err(|source| Error::Tensor {
                    path: std::path::PathBuf::from("calibration"),
                    tensor: tensor.name.clone(),
                    source: Box::new(source),
                })?)
            };
            self.last = Some(Shared {
                proxy: Arc::new(Proxy::new(&stats)),
                stats,
                kind,
                quantizer: informed.map(Arc::from),
            });
        }
        let Some(shared) = &self.last else {
            return Ok(plain);
        };
        let proxy = Some(Arc::clone(&shared.proxy));
        Ok(match &shared.quantizer {
            None => Ready { proxy, ..plain },
            Some(quantizer) => Ready {
                method: Some(with_note(quantizer.describe())),
                how: How::Informed(Arc::clone(quantizer)),
                proxy,
            },
        })
    }
}

/// A tensor whose quantizer would look at its input, but nothing is known of it: the manifest says so.
fn unseen(q: &Quantization, plain: Ready) -> Ready {
    let method = (q.quantizer.evidence() > Evidence::None)
        .then(|| format!("{}; its input was not observed", q.quantizer.describe()));
    Ready { method, ..plain }
}

/// Evidence about the input of a tensor that may be assembled from pieces. All pieces must read the same
/// input, as query, key and value do; otherwise there is none.
pub fn evidence_of(source: &dyn EvidenceSource, q: &Quantization) -> Result<Option<Found>> {
    let Some(first) = q.pieces.first() else {
        return Ok(None);
    };
    let Some(found) = source.evidence(&first.tensor)? else {
        return Ok(None);
    };
    for piece in &q.pieces[1..] {
        let same = piece.columns == first.columns
            && (piece.tensor == first.tensor
                || source
                    .evidence(&piece.tensor)?
                    .is_some_and(|other| same(&other.stats, &found.stats)));
        if !same {
            return Ok(None);
        }
    }
    if first.columns == (0..found.stats.columns()) {
        return Ok(Some(found));
    }
    if first.columns.end > found.stats.columns() {
        return Ok(None);
    }
    Ok(Some(Found {
        stats: Arc::new(found.stats.columns_in(first.columns.clone())),
        note: found.note,
    }))
}

fn same(a: &Arc<LayerStats>, b: &Arc<LayerStats>) -> bool {
    Arc::ptr_eq(a, b) || a == b
}
