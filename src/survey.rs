//! A weight seen as a whole before any of its rows is quantized, for quantizers that ask for it.

use std::ops::Range;

use qtool_calib::CalibError;
use qtool_kernels::Isa;
use rayon::prelude::*;

use crate::Result;
use crate::plan::{Quantization, TensorPlan};
use crate::transform::weights::Weights;

/// Weights that are read at a time by one thread.
const BLOCK: usize = 1 << 18;

/// What the quantizer of a tensor notes of its rows, in order; `fault` puts an error that counts rows from the
/// tensor's first into words.
pub(crate) fn survey(
    isa: Isa,
    weights: &Weights<'_>,
    tensor: &TensorPlan,
    q: &Quantization,
    fault: impl Fn(CalibError) -> crate::Error + Sync,
) -> Result<Vec<f32>> {
    let step = (BLOCK / q.k.max(1)).max(1);
    let blocks: Vec<Range<usize>> = (0..q.n)
        .step_by(step)
        .map(|from| from..q.n.min(from + step))
        .collect();
    let note = |block: &Range<usize>| {
        let mut rows = Vec::new();
        weights.rows(isa, &tensor.name, &q.pieces, block.clone(), &mut rows)?;
        let notes = q.quantizer.survey(isa, &rows, block.len(), q.k);
        notes.map_err(|error| {
            fault(match error {
                CalibError::NonFinite { row, column, value } => CalibError::NonFinite {
                    row: block.start + row,
                    column,
                    value,
                },
                other => other,
            })
        })
    };
    Ok(blocks.par_iter().map(note).collect::<Result<Vec<_>>>()?.concat())
}
