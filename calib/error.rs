//! What can go wrong while deciding codes.

use qtool_formats::FormatError;
use thiserror::Error;

/// Everything this package can fail with.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum CalibError {
    /// A weight is NaN or infinite.
    #[error("row {row}, column {column} is {value}")]
    NonFinite {
        /// Row within the block.
        row: usize,
        /// Column.
        column: usize,
        /// The value as text.
        value: String,
    },
    /// A scale is beyond the range of its dtype.
    #[error("row {row} needs a scale of {scale:e}, beyond the range of {dtype}; pass --scale-dtype bf16")]
    ScaleOverflow {
        /// Row within the block.
        row: usize,
        /// The scale before rounding.
        scale: f32,
        /// Type it should have been stored in.
        dtype: &'static str,
    },
    /// A scale is beyond the range of the F16 numbers that a scheme keeps.
    #[error(
        "row {row} needs a scale of {scale:e}, beyond the range of F16, in which {scheme} keeps it; quantize with --bits {bits} --method mse --scale-dtype bf16"
    )]
    SuperScaleOverflow {
        /// Row within the block.
        row: usize,
        /// The scale before rounding.
        scale: f32,
        /// The scheme.
        scheme: &'static str,
        /// Bits of its codes.
        bits: u8,
    },
    /// A rule or option does not parse.
    #[error("{what}: {reason}")]
    Option {
        /// The option as typed.
        what: String,
        /// What is wrong and what is accepted.
        reason: String,
    },
    /// Statistics of a layer's inputs that contradict themselves or fit nothing.
    #[error("statistics of a layer's inputs: {reason}")]
    Statistics {
        /// What is wrong.
        reason: String,
    },
    /// A device that chooses codes failed.
    #[error(transparent)]
    Device(#[from] qtool_kernels::backend::Fault),
    /// A scheme or shape that does not exist.
    #[error(transparent)]
    Format(#[from] FormatError),
}
