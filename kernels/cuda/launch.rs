//! The only unsafe code of the GPU backend: asking for the driver, blocks of memory, and starting a kernel.
//!
//! A launch is sound when the arguments are those the kernel declares, in order and type, and when every buffer is as long
//! as the kernel reads and writes. The first is checked by `tests/cuda`, where every operation runs; the second is the
//! business of `backend.rs`, which allocates what it launches over.
#![allow(unsafe_code)]

use std::sync::Arc;

use cudarc::driver::sys::CUresult;
use cudarc::driver::{
    CudaContext, CudaFunction, CudaSlice, CudaStream, DeviceRepr, DriverError, LaunchArgs, LaunchConfig,
    PinnedHostSlice, sys,
};

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

/// Lets a kernel have more shared memory than the 48 KiB that it gets without asking.
pub fn shared_limit(kernel: &CudaFunction, bytes: usize) -> Result<(), DriverError> {
    let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    kernel.set_attribute(most, bytes as i32)
}

/// Leaves the order of streams to `residency.rs`: everything but its copies goes through one stream.
pub fn order_by_hand(context: &CudaContext) {
    // SAFETY: there is one compute stream; the copy stream waits for it before it writes a block, and it for the copy
    // stream before a kernel reads one.
    unsafe { context.disable_event_tracking() }
}

/// A block of device memory with whatever was there before.
pub fn uninitialised<T: DeviceRepr>(
    stream: &Arc<CudaStream>,
    len: usize,
) -> Result<CudaSlice<T>, DriverError> {
    // SAFETY: whoever takes a block from the arena fills it before a kernel reads it, or has the kernel fill it.
    unsafe { stream.alloc(len) }
}

/// A block whose former owner has leaked it; `len` values fit, and any bits are values.
pub fn adopt<T: DeviceRepr>(stream: &Arc<CudaStream>, block: u64, len: usize) -> CudaSlice<T> {
    // SAFETY: the arena hands out a block once, at its size, which is that of `len` values rounded up.
    unsafe { stream.upgrade_device_ptr(block, len) }
}

/// Host memory that the device reads by itself.
pub fn pinned(context: &Arc<CudaContext>, bytes: usize) -> Result<PinnedHostSlice<u8>, DriverError> {
    // SAFETY: bytes are written before they are read: a copy takes only what was filled.
    unsafe { context.alloc_pinned(bytes) }
}

/// As the driver says it.
pub fn out_of_memory() -> DriverError {
    DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY)
}
