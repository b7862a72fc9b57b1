//! simd.

#![allow(unsafe_code)]

pub(crate) mod dot16;
