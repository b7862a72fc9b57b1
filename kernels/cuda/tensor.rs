//! Products on tensor cores. Owns the choice between them and exact f32, and the shape of their launches.
//!
//! The tensor cores multiply bf16 and add in f32: both factors are rounded to 8 significant bits, so a result is off from the
//! exact one by at most (2^-8 + 2^-16) times the sum of the products' magnitudes, besides the rounding of f32 sums. That is too
//! coarse where logits must agree to 1e-4, and fine where many of them are averaged; so it is asked for, never assumed.

use cudarc::driver::{CudaSlice, DriverError, PushKernelArg};

use super::backend::CudaBackend;
use super::launch::{run, run_with_shared};
use super::weight::WeightArgs;

/// How products of more than 16 rows are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// Factors and sums in f32.
    #[default]
    F32,
    /// Factors in bf16 on tensor cores, sums in f32.
    Bf16,
}

/// Outputs of a block on each side.
const TILE: usize = 128;
/// Input columns of a slice.
const SLICE: usize = 32;
/// Bytes of a decoded slice of a tile.
const SLICE_BYTES: usize = TILE * SLICE * 2;
/// Slices under way to shared memory at a time.
const STAGES: usize = 4;
/// Threads of a block.
const THREADS: u32 = 256;

/// The kernels, and the bytes of a packed slice of a tile in each.
const TENSOR_KERNELS: [(&str, usize); 6] = [
    ("gemm_any", 0),
    ("gemm_bf16", SLICE_BYTES),
    ("gemm_int8", TILE * SLICE),
    ("gemm_int4", TILE * SLICE / 2),
    ("gemm_wint2", TILE * SLICE / 4),
    ("gemm_nf4", TILE * SLICE / 2),
];

/// Every kernel with the shared memory it needs, in bytes.
pub(super) fn shared_memory() -> impl Iterator<Item = (&'static str, usize)> {
    (0..TENSOR_KERNELS.len()).map(|kernel| (TENSOR_KERNELS[kernel].0, shared_bytes(kernel)))
}

fn shared_bytes(kernel: usize) -> usize {
    let decoded = if TENSOR_KERNELS[kernel].0 == "gemm_bf16" {
        0
    } else {
        2
    };
    STAGES * (SLICE_BYTES + TENSOR_KERNELS[kernel].1) + decoded * SLICE_BYTES
}

/// Which of [`TENSOR_KERNELS`] multiplies by this weight.
fn kernel_for(w: &WeightArgs) -> usize {
    let whole = w.k % SLICE as i32 == 0;
    match (w.form, w.bits) {
        (1, _) if w.k % 8 == 0 => 1,
        (3, 8) if whole => 2,
        (3, 4) if whole => 3,
        (4, _) => 4,
        (6, _) => 5,
        _ => 0,
    }
}

impl CudaBackend {
    /// y (M, N) = x (M, K) times the transpose of `w` on tensor cores.
    pub(super) fn tensor_product(
        &self,
        y: &mut CudaSlice<f32>,
        x: &CudaSlice<f32>,
        w: &WeightArgs,
        m: usize,
    ) -> Result<(), DriverError> {
        let (n, k) = (w.n as usize, w.k as usize);
        let padded = k.next_multiple_of(SLICE);
        let pairs = m * padded / 2;
        let mut narrow = self.stream().alloc_zeros::<u32>(pairs)?;
        let (count, columns, width, rows) = (pairs as i64, k as i32, padded as i32, m as i32);
        let mut call = self.kernel("narrow");
        call.arg(&mut narrow).arg(x).arg(&count).arg(&columns).arg(&width);
        run(call, (pairs.div_ceil(THREADS as usize) as u32, 1), THREADS)?;
        let kernel = kernel_for(w);
        let mut call = self.kernel(TENSOR_KERNELS[kernel].0);
        call.arg(y).arg(&narrow).arg(w).arg(&rows).arg(&width);
        let blocks = (n.div_ceil(TILE) as u32, m.div_ceil(TILE) as u32);
        run_with_shared(call, blocks, THREADS, shared_bytes(kernel))
    }
}
