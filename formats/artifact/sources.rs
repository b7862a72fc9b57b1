//! Records of assembled tensors: which rectangles of which source tensors they were made from, and
//! the check that these make up the tensor.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::manifest::{Stored, TensorRecord, printable};
use crate::checkpoint::Orientation;
use crate::dtype::{Dtype, FloatDtype};
use crate::error::quoted;
use crate::piece::Piece;
use crate::{FormatError, Result};

/// A rectangle of a source tensor, see [`Piece`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PieceRecord {
    /// Name of the source tensor.
    #[serde(deserialize_with = "printable")]
    pub tensor: String,
    /// Its shape in the source.
    pub shape: Vec<usize>,
    /// Its element type in the source.
    pub dtype: Dtype,
    /// Digest of all its bytes in the source.
    #[serde(deserialize_with = "printable")]
    pub digest: String,
    /// Whether the (N, K) matrix is the source tensor (`out_in`) or its transpose (`in_out`).
    pub orientation: Orientation,
    /// First row and the one after the last, of the (N, K) matrix.
    pub rows: [usize; 2],
    /// First column and the one after the last.
    pub columns: [usize; 2],
}

impl PieceRecord {
    /// The piece of this record, or `None` when the tensor is no matrix of floats or the rectangle
    /// lies outside of it.
    pub fn piece(&self) -> Option<Piece> {
        let (columns, rows) = self.shape.split_last().map_or((1, &[][..]), |(c, r)| (*c, r));
        let rows = rows.iter().try_fold(1usize, |p, &d| p.checked_mul(d))?;
        let dims = match self.orientation {
            Orientation::OutIn => (rows, columns),
            Orientation::InOut => (columns, rows),
        };
        let range = |[from, to]: [usize; 2], end: usize| (from <= to && to <= end).then_some(from..to);
        Some(Piece {
            tensor: self.tensor.clone(),
            dtype: FloatDtype::from_dtype(self.dtype)?,
            orientation: self.orientation,
            dims,
            rows: range(self.rows, dims.0)?,
            columns: range(self.columns, dims.1)?,
        })
    }
}

impl TensorRecord {
    /// Whether calibration measured it: it is made of no tensor of the source, and no part of the model.
    pub fn is_measured(&self) -> bool {
        let own_digest = matches!(&self.stored, Stored::Kept { digest: Some(_), .. });
        own_digest && self.sources.is_empty() && self.source_digest.is_none()
    }

    /// The pieces of an assembled tensor must lie inside their sources and, for a quantized one, make
    /// up its rows and columns.
    pub(super) fn check_sources(&self, path: &Path) -> Result<()> {
        let tensor = self;
        let bad = |expected: &str, got: String| FormatError::Manifest {
            path: path.to_owned(),
            what: format!("sources of tensor {}", tensor.name),
            expected: expected.to_owned(),
            got,
        };
        if tensor.is_measured() {
            return Ok(());
        }
        if tensor.sources.is_empty() == tensor.source_digest.is_none() {
            let got = if tensor.sources.is_empty() {
                "neither"
            } else {
                "both"
            };
            return Err(bad("either source_digest or sources", got.to_owned()));
        }
        let quantized = match &tensor.stored {
            Stored::Quantized(record) => Some(record),
            Stored::Kept { .. } => None,
        };
        let mut rows = 0usize;
        for source in &tensor.sources {
            // A kept tensor of another type than float can only have been renamed.
            let Some(piece) = source.piece() else {
                if quantized.is_none() && tensor.sources.len() == 1 && source.dtype == tensor.dtype {
                    return Ok(());
                }
                return Err(bad(
                    "rectangles of float matrices",
                    quoted(&format!("{source:?}")),
                ));
            };
            rows = rows.saturating_add(piece.rows.len());
            if quantized.is_some_and(|record| record.columns != piece.columns.len()) {
                return Err(bad("pieces of K columns", quoted(&format!("{source:?}"))));
            }
        }
        match quantized {
            Some(record) if !tensor.sources.is_empty() && rows != record.rows => {
                Err(bad(&format!("{} rows in all", record.rows), rows.to_string()))
            }
            _ => Ok(()),
        }
    }
}
