//! The only unsafe code of the GPU backend: asking for the driver, and starting a kernel.
//!
//! A launch is sound when the arguments are those the kernel declares, in order and type, and when every buffer is as long
//! as the kernel reads and writes. The first is checked by `tests/cuda`, where every operation runs; the second is the
//! business of `backend.rs`, which allocates what it launches over.
#![allow(unsafe_code)]

use cudarc::driver::{DeviceRepr, DriverError, LaunchArgs, LaunchConfig, sys};

use super::encode::{AffineArgs, Wint2Args};
use super::weight::WeightArgs;

/// Whether the driver library can be loaded.
pub fn driver_is_there() -> bool {
    // SAFETY: loading the library runs its initialisers, as for any program that uses CUDA; nothing else is called.
    unsafe { sys::is_culib_present() }
}

/// The CUDA version the driver knows, as major * 1000 + minor * 10. The driver must be there.
pub fn driver_version() -> Result<i32, DriverError> {
    let mut version = 0;
    // SAFETY: the function writes one integer through the pointer, which lives until it returns.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result()?;
    Ok(version)
}

// SAFETY: `repr(C)`, of plain integers, field by field as `struct Weight` in weight.cuh.
unsafe impl DeviceRepr for WeightArgs {}
// SAFETY: `repr(C)`, of plain numbers, field by field as `struct AffineJob` in encode_affine.cu.
unsafe impl DeviceRepr for AffineArgs {}
// SAFETY: `repr(C)`, of plain numbers, field by field as `struct Wint2Job` in encode_wint2.cu.
unsafe impl DeviceRepr for Wint2Args {}

/// Starts a kernel whose arguments were pushed, with `threads` a block.
pub fn run(call: LaunchArgs<'_>, blocks: (u32, u32), threads: u32) -> Result<(), DriverError> {
    run_with_shared(call, blocks, threads, 0)
}

/// As [`run`], with `bytes` of shared memory for each block.
pub fn run_with_shared(
    mut call: LaunchArgs<'_>,
    blocks: (u32, u32),
    threads: u32,
    bytes: usize,
) -> Result<(), DriverError> {
    let config = LaunchConfig {
        grid_dim: (blocks.0, blocks.1, 1),
        block_dim: (threads, 1, 1),
        shared_mem_bytes: bytes as u32,
    };
    // SAFETY: see the module's text; the borrowed buffers outlive the launch on the one stream that also frees them.
    unsafe { call.launch(config) }.map(|_| ())
}
