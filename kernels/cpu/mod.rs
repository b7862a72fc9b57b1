//! The operations on the processor. Each page below holds one family of loops, written once over
//! [`simd::Vector`]; [`isa`] chooses the instruction set at run time; [`simd`] alone contains unsafe code.

pub(crate) mod backend;
pub(crate) mod clip;
pub(crate) mod codewords;
pub(crate) mod error;
pub(crate) mod extent;
pub(crate) mod histogram;
pub(crate) mod isa;
pub(crate) mod metric;
pub(crate) mod pack;
pub(crate) mod round;
pub(crate) mod simd;
pub(crate) mod widen;
