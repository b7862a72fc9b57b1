//! What is done to the rows of a block: codes, figures, bytes, or a copy. Owns the choice between a block alone and several that a
//! quantizer wants together, and the sentence about a value that is not finite.

use qtool_calib::CalibError;
use qtool_calib::measure::{BlockFigures, measure};
use qtool_formats::QuantizedWeight;
use qtool_formats::checkpoint::Checkpoint;
use qtool_formats::piece::{Piece, overlapping};
use qtool_kernels::{Isa, first_non_finite};
use rayon::prelude::*;

use crate::blocks::{Block, pack};
use crate::informed::{ProxySums, Ready};
use crate::plan::{Action, Conversion, Quantization, QuantizePlan, TensorPlan};
use crate::quantize::NonFinite;
use crate::scan::{first_bad, unravel};
use crate::transform::weights::Weights;
use crate::writing::Output;
use crate::{Error, Result};

/// What every block needs.
pub(crate) struct Job<'a> {
    pub(crate) checkpoint: &'a Checkpoint,
    pub(crate) plan: &'a QuantizePlan,
    pub(crate) non_finite: NonFinite,
    pub(crate) isa: Isa,
}

/// Figures of a block of rows, and its share of the proxy error where inputs are known.
pub(crate) type Measured = (BlockFigures, Option<ProxySums>);

impl Job<'_> {
    /// Rows of a tensor that its quantizer wants together.
    pub(crate) fn rows_together(&self, tensor: usize, ready: Option<&Ready>) -> Option<usize> {
        match &self.plan.tensors[tensor].action {
            Action::Quantize(q) => match ready {
                Some(ready) => ready.rows_together(q),
                None => q.quantizer.rows_together(q.k),
            },
            _ => None,
        }
    }

    /// Blocks that follow each other in a tensor: one, or those that its quantizer wants together. Figures are those of
    /// the blocks either way.
    pub(crate) fn blocks(
        &self,
        blocks: &[Block],
        weights: &Weights<'_>,
        ready: Option<&Ready>,
    ) -> Result<Vec<(Output, Option<Measured>)>> {
        let [first, .., last] = blocks else {
            return blocks
                .iter()
                .map(|block| self.block(block, weights, ready))
                .collect();
        };
        let tensor = &self.plan.tensors[first.tensor];
        let Action::Quantize(q) = &tensor.action else {
            return blocks
                .iter()
                .map(|block| self.block(block, weights, ready))
                .collect();
        };
        let (from, mut rows) = (first.range.start, Vec::new());
        let all = from..last.range.end;
        weights.rows(self.isa, &tensor.name, &q.pieces, all.clone(), &mut rows)?;
        let weight = self.codes(tensor, q, &all, &rows, ready)?;
        let done = blocks.par_iter().map(|block| {
            let own = block.range.start - from..block.range.end - from;
            let (parts, measured) =
                self.finish(&rows[own.start * q.k..own.end * q.k], &weight.rows(own)?, ready)?;
            Ok((Output::Parts(parts), Some(measured)))
        });
        done.collect()
    }

    fn block(
        &self,
        block: &Block,
        weights: &Weights<'_>,
        ready: Option<&Ready>,
    ) -> Result<(Output, Option<Measured>)> {
        let tensor = &self.plan.tensors[block.tensor];
        match &tensor.action {
            Action::Keep { source, .. } => {
                let view = self.checkpoint.tensor(source)?;
                if let Some(dtype) = view.float_dtype()
                    && self.non_finite == NonFinite::Refuse
                    && let Some((at, value)) = first_bad(self.isa, dtype, &view.bytes()[block.range.clone()])
                {
                    let at = unravel(&tensor.shape, block.range.start / dtype.bytes() + at);
                    return Err(self.non_finite(source, at, value.to_string()));
                }
                Ok((Output::Copied, None))
            }
            Action::Measure(measured) => Ok((Output::Converted(measured.bytes()), None)),
            Action::Convert(conversion) => {
                let bytes = self.convert(&tensor.name, conversion, block, weights)?;
                Ok((Output::Converted(bytes), None))
            }
            Action::Quantize(q) => {
                let (parts, figures) = self.quantize(tensor, q, block, weights, ready)?;
                Ok((Output::Parts(parts), Some(figures)))
            }
        }
    }

    fn convert(
        &self,
        name: &str,
        conversion: &Conversion,
        block: &Block,
        weights: &Weights<'_>,
    ) -> Result<Vec<u8>> {
        let mut values = Vec::new();
        let range = block.range.clone();
        weights.rows(self.isa, name, &conversion.pieces, range, &mut values)?;
        if self.non_finite == NonFinite::Refuse
            && let Some(at) = first_non_finite(&values)
        {
            let (row, column) = (block.range.start + at / conversion.k, at % conversion.k);
            return Err(self.non_finite_in(&conversion.pieces, row, column, values[at].to_string()));
        }
        let mut bytes = Vec::with_capacity(values.len() * conversion.dtype.bytes());
        values.iter().for_each(|&v| conversion.dtype.push(v, &mut bytes));
        Ok(bytes)
    }

    fn quantize(
        &self,
        tensor: &TensorPlan,
        q: &Quantization,
        block: &Block,
        weights: &Weights<'_>,
        ready: Option<&Ready>,
    ) -> Result<(Vec<Vec<u8>>, Measured)> {
        thread_local!(static ROWS: std::cell::RefCell<Vec<f32>> = const { std::cell::RefCell::new(Vec::new()) });
        // Taken, not borrowed: a quantizer that waits for others may have this thread do another block meanwhile.
        let mut rows = ROWS.take();
        weights.rows(self.isa, &tensor.name, &q.pieces, block.range.clone(), &mut rows)?;
        let weight = self.codes(tensor, q, &block.range, &rows, ready)?;
        let done = self.finish(&rows, &weight, ready);
        ROWS.set(rows);
        done
    }

    /// The codes of rows `range` of a tensor, whose values are `rows`.
    fn codes(
        &self,
        tensor: &TensorPlan,
        q: &Quantization,
        range: &std::ops::Range<usize>,
        rows: &[f32],
        ready: Option<&Ready>,
    ) -> Result<QuantizedWeight> {
        let weight = match ready {
            Some(ready) => ready.quantize(self.isa, q, range, rows)?,
            None => q.quantizer.quantize(self.isa, rows, range.len(), q.k),
        };
        weight.map_err(|error| self.fault(tensor, q, range.start, error))
    }

    /// The bytes of a block of rows and their codes, and its figures.
    fn finish(
        &self,
        rows: &[f32],
        weight: &QuantizedWeight,
        ready: Option<&Ready>,
    ) -> Result<(Vec<Vec<u8>>, Measured)> {
        let mut figures = BlockFigures::default();
        measure(self.isa, rows, weight, &mut figures);
        let proxy = ready.and_then(|ready| ready.proxy(rows, weight));
        let pack = |bits, k: usize, codes: &[u8], out: &mut Vec<u8>| pack(self.isa, bits, k, codes, out);
        let parts = weight.encode_in(self.plan.family, &pack)?;
        Ok((parts, (figures, proxy)))
    }

    /// What went wrong with rows of a tensor, of which the first is `first_row`.
    pub(crate) fn fault(
        &self,
        tensor: &TensorPlan,
        q: &Quantization,
        first_row: usize,
        error: CalibError,
    ) -> Error {
        match error {
            CalibError::NonFinite { row, column, value } => {
                self.non_finite_in(&q.pieces, first_row + row, column, value)
            }
            source => Error::of_tensor(self.checkpoint.root(), &tensor.name, source),
        }
    }

    /// The fault at a place of an assembled matrix, by its place in the source.
    fn non_finite_in(&self, pieces: &[Piece], row: usize, column: usize, value: String) -> Error {
        let place = overlapping(pieces, row..row + 1).next();
        let Some((piece, rows)) = place else {
            return self.non_finite("", vec![row, column], value);
        };
        let [major, minor] = piece.source_index(rows.start, column);
        let shape = self
            .checkpoint
            .tensor(&piece.tensor)
            .map_or(&[][..], |view| view.shape());
        let at = major * shape.last().copied().unwrap_or(1) + minor;
        self.non_finite(&piece.tensor, unravel(shape, at), value)
    }

    fn non_finite(&self, tensor: &str, index: Vec<usize>, value: String) -> Error {
        Error::NonFinite {
            path: self.checkpoint.root().to_owned(),
            tensor: tensor.to_owned(),
            index,
            value,
        }
    }
}
