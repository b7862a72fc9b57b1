//! cpu.

pub(crate) mod codewords;
pub(crate) mod isa;
pub(crate) mod simd;
