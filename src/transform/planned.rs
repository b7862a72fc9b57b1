//! The plan of a transformed model: kept tensors that change are converted instead of copied, and a head that was
//! the embedding becomes a tensor of its own.

use std::sync::Arc;

use qtool_calib::{Decision, Recipe};
use qtool_formats::checkpoint::{Checkpoint, Orientation};
use qtool_formats::dtype::Dtype;
use qtool_formats::piece::Piece;
use qtool_formats::{FloatDtype, TensorView};

use super::{Made, Transform};
use crate::plan::{Action, Conversion, Quantization, QuantizePlan, TensorPlan, quantization};
use crate::{Error, Result};

impl QuantizePlan {
    /// This plan for the model of `checkpoint` through `transform`.
    ///
    /// Fails when a rule asks something of the new head that cannot be.
    pub fn transformed(
        mut self,
        checkpoint: &Checkpoint,
        recipe: &Recipe,
        transform: Arc<Transform>,
    ) -> Result<Self> {
        let untied = self.transform.as_ref().is_some_and(|t| t.made().is_some());
        if let (Some(made), false) = (transform.made(), untied) {
            self.untie(checkpoint, recipe, made)?;
        }
        self.folded(checkpoint, transform)
    }

    /// This plan, which has the tensors that the transformation makes, for the model it makes.
    pub(crate) fn folded(mut self, checkpoint: &Checkpoint, transform: Arc<Transform>) -> Result<Self> {
        for tensor in &mut self.tensors {
            if let Action::Keep { reason, source } = &tensor.action
                && transform.folding(&tensor.name, source).is_some()
            {
                let view = checkpoint.tensor(source)?;
                tensor.action =
                    conversion(reason.clone(), &view).map_err(|got| wrong(checkpoint, &tensor.name, got))?;
            }
        }
        self.transform = Some(transform);
        Ok(self)
    }

    /// Adds the head. A copy of the embedding under its name, which nothing reads, is dropped.
    fn untie(&mut self, checkpoint: &Checkpoint, recipe: &Recipe, made: &Made) -> Result<()> {
        let before = self.tensors.len();
        self.tensors.retain(|t| t.name != made.name);
        if self.tensors.len() < before {
            self.dropped.push(made.name.clone());
        }
        let view = checkpoint.tensor(&made.origin)?;
        let dtype = view
            .float_dtype()
            .ok_or_else(|| wrong(checkpoint, &made.origin, view.dtype()))?;
        let mut piece = Piece::of(&view, dtype, Orientation::OutIn);
        let orientation = checkpoint.naming().orientation(&made.name);
        let (n, k) = piece.dims;
        let shape = match orientation {
            Orientation::OutIn => vec![n, k],
            Orientation::InOut => vec![k, n],
        };
        let action = match recipe.decide(&made.name, view.dtype(), &shape) {
            Decision::Keep(reason) => {
                if orientation == Orientation::InOut {
                    // Rows as stored are columns of the embedding.
                    piece = Piece::whole(&made.origin, dtype, Orientation::InOut, (k, n));
                }
                Action::Convert(Conversion {
                    reason: format!("{reason}, untied"),
                    n: piece.dims.0,
                    k: piece.dims.1,
                    pieces: vec![piece],
                    dtype,
                })
            }
            Decision::Quantize(options) => {
                let refused = |reason: String| Error::Refused {
                    path: checkpoint.root().to_owned(),
                    refusals: vec![format!("{}: {reason}", made.name)],
                };
                let q: Quantization = quantization(&options, piece).map_err(refused)?;
                Action::Quantize(Box::new(Quantization { orientation, ..q }))
            }
        };
        self.tensors.push(TensorPlan {
            name: made.name.clone(),
            shape,
            dtype: view.dtype(),
            source_bytes: 0,
            action,
        });
        Ok(())
    }

    /// Bytes that the result holds because the head is no longer the embedding.
    pub fn untied_bytes(&self) -> u64 {
        let made = self.transform.as_ref().and_then(|t| t.made());
        made.and_then(|made| self.tensors.iter().find(|t| t.name == made.name))
            .map_or(0, TensorPlan::stored_bytes)
    }
}

/// A tensor stored in its own type, rounded once.
fn conversion(reason: String, view: &TensorView<'_>) -> Result<Action, Dtype> {
    let dtype = view.float_dtype().ok_or(view.dtype())?;
    let piece = Piece::of(view, dtype, Orientation::OutIn);
    Ok(Action::Convert(Conversion {
        reason,
        n: piece.dims.0,
        k: piece.dims.1,
        pieces: vec![piece],
        dtype,
    }))
}

fn wrong(checkpoint: &Checkpoint, tensor: &str, got: Dtype) -> Error {
    Error::ModelTensor {
        path: checkpoint.root().to_owned(),
        tensor: tensor.to_owned(),
        expected: format!("{} or another float type", FloatDtype::Bf16),
        got: got.to_string(),
    }
}
