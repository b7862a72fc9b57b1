//! [`Backend`](crate::Backend) on an NVIDIA GPU through its driver, and nothing else of NVIDIA's: the driver library is
//! looked for at run time, and the kernels are PTX that lies here and that the driver translates.
//!
//! | Page | Idea |
//! |---|---|
//! | [`device`] | is there a GPU, and if not, why |
//! | [`weight`] | a weight's bytes on the device, still packed |
//! | [`backend`] | which kernel does each operation |
//! | `arena` | device memory under a budget |
//! | `temporary` | memory that an operation needs while it runs |
//! | `sent` | small operands that many operations read, sent once |
//! | `turns` | threads that encode take turns in it |
//! | `residency` | which weights lie on the device, and how the others get there in time |
//! | `codewords` | codewords of WINT2 by integers, found when a weight is taken in |
//! | `attention` | tiles of queries, and which kernel takes them |
//! | `gemv` | which kernel multiplies by few rows |
//! | `exact` | products of many rows in f32 |
//! | [`tensor`] | products on tensor cores, where their rounding is allowed |
//! | [`library`] | NVIDIA's product of plain BF16 weights, where it is installed |
//! | `gram` | second moments, exact or on tensor cores |
//! | `moe` | tokens sent to experts |
//! | `rates` | how fast the kernels run |
//! | [`scores`] | log-probabilities and divergences of logits, without copying them back |
//! | [`encode`] | codes chosen on the device, the same bytes as on the processor |
//! | `launch` | the only unsafe code: kernels started, arguments as the kernels see them |
//! | `*.cu`, `*.cuh` | the kernels; `ptx/` is made of them by `build_ptx` |
//! | `host/` | the same kernels on the processor behind a library that looks like the driver, for tests without a GPU |
//!
//! # When something fails
//!
//! A device can fail in any operation, and operations return tensors, not results. So the first failure is kept: from
//! then on nothing is started, every tensor is empty of meaning, and [`Backend::fault`](crate::Backend::fault) says what happened. Whoever reads
//! results asks for it first.

mod arena;
mod attention;
pub mod backend;
mod codewords;
pub mod device;
pub mod encode;
mod exact;
mod gemv;
mod gram;
mod launch;
pub mod library;
mod moe;
mod rates;
mod residency;
mod rows;
pub mod scores;
mod sent;
mod sums;
mod temporary;
pub mod tensor;
mod turns;
pub mod warpgroup;
pub mod weight;

pub use backend::CudaBackend;
pub use device::{Device, MemoryUse, Unavailable, open, probe};
pub use encode::Encoder;
pub use library::NoLibrary;
pub use tensor::Precision;
pub use warpgroup::NoWarpgroups;
