//! kernels.

#![deny(unsafe_code)]

mod cpu;

pub use cpu::codewords::{Codewords, SearchWeights, nearest_codewords};
pub use cpu::isa::{Isa, IsaKind};
