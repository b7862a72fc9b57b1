//! What the bytes of checkpoints and artifacts mean.
//!
//! The ground floor of qtool: reading safetensors checkpoints, the vocabulary of quantization
//! schemes, the neutral value every quantizer produces, byte layouts, and our self-describing
//! artifact folder. It has no threads and no GPU, and it takes no rounding decision: which code a
//! weight gets is decided in `qtool-calib`.
//!
//! Letters used throughout: **N** output rows, **K** input columns, **G** groups per row. Weights
//! are (N, K), row-major; groups run along K.
//!
//! | Idea | Where |
//! |---|---|
//! | a folder of safetensors files, mapped | [`checkpoint`] |
//! | what a code means | [`scheme`] |
//! | codes, scales and zero points of one weight | [`weight`] |
//! | codes to bytes | [`packing`] |
//! | a tensor assembled from parts of others | [`piece`] |
//! | our folder with its manifest | [`artifact`] |
//! | other people's folders, written | [`export`] |
//! | other people's folders and files, read | [`import`] |
//! | outputs that appear only when complete | [`replace`] |
#![deny(unsafe_code)]
#![deny(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing
    )
)]

pub mod artifact;
pub mod checkpoint;
pub mod dtype;
pub mod error;
pub mod export;
pub mod import;
pub mod limits;
pub mod packing;
pub mod piece;
pub mod replace;
mod room;
pub mod scheme;
pub mod shard_writer;
pub mod tensor;
pub mod weight;

pub use dtype::{Dtype, FloatDtype};
pub use error::FormatError;
pub use scheme::Scheme;
pub use tensor::TensorView;
pub use weight::QuantizedWeight;

/// Result of this package.
pub type Result<T, E = FormatError> = std::result::Result<T, E>;
