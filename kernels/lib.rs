//! Arithmetic on rows of weights. This package owns the inner loops of quantization: reading stored numbers
//! as f32, finding extents, rounding to codes, packing codes, summing errors. It opens no file, knows no
//! format and decides nothing: which scale a group gets is the caller's business.
//!
//! A row is a `&[f32]` of K weights; groups run along K. Every operation takes an [`Isa`] first, which says
//! which instruction set to use, and exists three times from one source: portable, AVX2, AVX-512.
//!
//! | Operation | Page | Meaning |
//! |---|---|---|
//! | [`widen_bf16`], [`widen_f16`], [`widen_f32`] | `cpu/widen.rs` | little-endian bytes to f32, exact |
//! | [`narrow_bf16`], [`narrow_f16`] | `cpu/widen.rs` | f32 to bytes, nearest, ties to even |
//! | [`absmax`], [`absmax_groups`] | `cpu/extent.rs` | largest magnitude |
//! | [`minmax`], [`minmax_groups`] | `cpu/extent.rs` | smallest and largest value |
//! | [`first_non_finite`] | `cpu/extent.rs` | where a NaN or an infinity sits |
//! | [`round_codes`], [`round_codes_groups`] | `cpu/round.rs` | `clamp(rne(x * inv_scale) + zero, lo, hi)` |
//! | [`pack_nibbles`], [`unpack_nibbles`], [`pack_crumbs`], [`unpack_crumbs`] | `cpu/pack.rs` | 4-bit and 2-bit codes |
//! | [`clip_errors`], [`clip_errors_weighted`] | `cpu/clip.rs` | squared error of one group under many scales |
//! | [`row_error`], [`ErrorSums`] | `cpu/error.rs` | how far decoded weights are from the originals |
//! | [`nearest_codewords`] | `cpu/codewords.rs` | nearest of 256 codewords for vectors of 4 weights, in integers |
//! | [`nearest_in_metric`], [`add_scaled`] | `cpu/metric.rs` | nearest codeword under a 4 x 4 metric; a few scaled rows added up |
//! | [`code_histogram`] | `cpu/histogram.rs` | how often each code occurs |
//! | [`divergences`] | `cpu/divergence.rs` | KL, change of p and agreement of two models' logits |
//! | [`log_sum_exp`] | `cpu/log_sum.rs` | ln(sum of exp(x)), for log-probabilities |
//! | [`Orthogonal`] | `orthogonal.rs` | rotations by Hadamard and seeded matrices, in f64 |
//!
//! A [`Backend`] runs models. [`CpuBackend`] does so by idea:
//!
//! | Page | Idea |
//! |---|---|
//! | `cpu/weight.rs` | 64 columns of a row, straight from packed codes to lanes |
//! | `cpu/matmul.rs`, `cpu/simd/tile.rs` | many rows of activations: tiles decoded into panels, multiplied in registers |
//! | `cpu/gemv.rs` | up to eight rows: each packed byte read once, nothing decoded written back |
//! | `cpu/attention.rs` | keys and values where they lie, a running softmax |
//! | `cpu/norm.rs`, `cpu/elementwise.rs`, `cpu/functions.rs`, `cpu/embed.rs`, `cpu/gram.rs`, `cpu/sums.rs` | the rest of a block, and what its inputs add up to |
//!
//! # One result, whatever the machine
//!
//! The loops of quantization give the same bits on all instruction sets. Vectors always have 16 lanes; element k of a segment is in lane
//! k mod 16; each lane adds its elements in order; lanes are added in a fixed tree (i + 8, then i + 4, i + 2,
//! i + 1). Every multiplication and every addition rounds by itself: no fused multiply-add. The one
//! exception is the payload of a NaN: a result that is NaN is NaN everywhere, but its payload is unspecified.
//!
//! The forward pass of models does fuse: there AVX2 and AVX-512 give the same bits, and portable code the same
//! within rounding. On one instruction set its results do not depend on the number of threads.
//!
//! [`mod@reference`] holds the same operations without cleverness; the tests compare everything with it.

#![deny(unsafe_code)]

pub mod backend;
mod cpu;
pub mod cuda;
pub mod orthogonal;
pub mod reference;

pub use backend::Backend;
pub use cpu::backend::{CpuBackend, Matrix};
pub use cpu::clip::{Candidate, clip_errors, clip_errors_weighted};
pub use cpu::codewords::{Codewords, SearchWeights, nearest_codewords};
pub use cpu::divergence::divergences;
pub use cpu::error::{ErrorSums, row_error};
pub use cpu::extent::{absmax, absmax_groups, first_non_finite, minmax, minmax_groups};
pub use cpu::histogram::code_histogram;
pub use cpu::isa::{Isa, IsaKind};
pub use cpu::log_sum::log_sum_exp;
pub use cpu::metric::{Metric, MetricBook, PRODUCTS, add_scaled, nearest_in_metric};
pub use cpu::pack::{pack_crumbs, pack_nibbles, unpack_crumbs, unpack_nibbles};
pub use cpu::round::{round_codes, round_codes_groups};
pub use cpu::weight::CpuWeight;
pub use cpu::widen::{narrow_bf16, narrow_f16, widen_bf16, widen_f16, widen_f32};
pub use cuda::CudaBackend;
pub use orthogonal::Orthogonal;
