//! The operations on the processor. Each page below holds one family of loops, written once over
//! [`simd::Vector`]; [`isa`] chooses the instruction set at run time; [`simd`] alone contains unsafe code.

mod attention;
pub(crate) mod backend;
pub(crate) mod clip;
pub(crate) mod codewords;
pub(crate) mod divergence;
mod elementwise;
mod embed;
pub(crate) mod error;
pub(crate) mod extent;
mod functions;
mod gemv;
mod gram;
pub(crate) mod histogram;
pub(crate) mod isa;
mod kquant;
pub(crate) mod log_sum;
mod matmul;
pub(crate) mod metric;
mod nf4;
mod norm;
pub(crate) mod pack;
pub(crate) mod round;
mod scratch;
pub(crate) mod simd;
pub(crate) mod sums;
pub(crate) mod weight;
pub(crate) mod widen;
mod wint25;
