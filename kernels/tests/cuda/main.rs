//! The GPU backend against the processor's, operation by operation, at awkward sizes. Needs a driver: a real one, or the
//! library that `kernels/cuda/host/build` makes. Without one these tests say that they were skipped; with
//! QTOOL_REQUIRE_CUDA=1 that is a failure.

mod attention;
mod encode;
mod failures;
mod few_rows;
mod library;
mod memory;
mod moe;
mod operations;
mod products;
mod scores;
mod tensor;

use std::io::Write;
use std::sync::Arc;

use qtool_kernels::cuda::device::Device;
use qtool_kernels::cuda::{Unavailable, probe};
use qtool_kernels::{Backend, CpuBackend, CudaBackend, Isa};

/// Sizes around the widths of warps, tiles and blocks.
pub const SIZES: [usize; 8] = [1, 2, 31, 33, 64, 65, 127, 130];

/// Largest difference of a value from the processor's, as a share of the largest: sums of at most a few hundred products in
/// f32, in another order.
pub const CLOSE: f32 = 2e-6;

/// Both backends, or `None` after saying why not.
pub fn both(test: &str) -> Option<(CudaBackend, CpuBackend)> {
    let device: Result<Arc<Device>, Unavailable> = probe(0);
    match device {
        Ok(device) => Some((CudaBackend::new(device), CpuBackend::new(Isa::best()))),
        Err(reason) => {
            let required = std::env::var_os("QTOOL_REQUIRE_CUDA").is_some_and(|v| v == "1");
            assert!(!required, "QTOOL_REQUIRE_CUDA=1, and {reason}");
            skipped(test, &reason);
            None
        }
    }
}

/// Says so past the test harness, which swallows what a passing test prints.
pub fn skipped(test: &str, reason: &dyn std::fmt::Display) {
    let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {reason}");
}

/// Numbers of a seed, about -1 to 1.
pub fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / 8_388_608.0 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// Fails when the values differ by more than `bound` times the largest of `right`.
pub fn assert_close(left: &[f32], right: &[f32], bound: f32, what: &str) {
    assert_eq!(left.len(), right.len(), "{what}");
    let top = right.iter().fold(1e-30f32, |top, x| top.max(x.abs()));
    for (i, (l, r)) in left.iter().zip(right).enumerate() {
        assert!(
            (l - r).abs() <= bound * top,
            "{what}: value {i} is {l}, expected {r}"
        );
    }
}

/// Downloads after asking whether all went well.
pub fn values<B: Backend>(backend: &B, x: &B::Tensor) -> Vec<f32> {
    backend.fault().unwrap();
    backend.download(x)
}

#[test]
fn a_device_says_what_it_is() {
    let Some((gpu, _)) = both("a_device_says_what_it_is") else {
        return;
    };
    assert!(!gpu.device().name().is_empty());
    assert_eq!(gpu.fault(), Ok(()));
}
