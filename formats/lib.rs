//! formats.

pub mod packing;
