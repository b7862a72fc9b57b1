//! Second moments. Owns which kernel sums them and the shape of its launch.

use cudarc::driver::{CudaSlice, DriverError, PushKernelArg};

use super::backend::CudaBackend;
use super::launch::{run, run_with_shared};
use super::tensor::Precision;

/// Columns of a tile of `gram`, and of `gram_split`.
const TILE: usize = 64;
const SPLIT_TILE: usize = 128;
/// Threads of a block.
const THREADS: u32 = 256;

/// `gram_split` and its shared memory: three slices of 32 rows, two tiles wide, in two halves of bf16.
pub(super) const SPLIT_SHARED: (&str, usize) = ("gram_split", 3 * 4 * 32 * SPLIT_TILE * 2);

/// Tiles on and above the diagonal.
fn triangle(tiles: usize) -> u32 {
    (tiles * (tiles + 1) / 2) as u32
}

impl CudaBackend {
    /// The upper triangle of x^T x (K, K) for x (M, K), into zeros: in f32, or with [`Precision::Bf16`] on tensor cores with each
    /// number as two of bf16, off by at most 3 * 2^-18 of the sum of the products' magnitudes. Either way at most 512 products
    /// are added in f32, and those sums in f64.
    pub(super) fn sum_products(
        &self,
        out: &mut CudaSlice<f64>,
        x: &CudaSlice<f32>,
        m: usize,
        k: usize,
    ) -> Result<(), DriverError> {
        let (rows, columns) = (m as i32, k as i32);
        if self.precision() == Precision::F32 {
            let mut call = self.kernel("gram");
            call.arg(out).arg(x).arg(&rows).arg(&columns);
            return run(call, (triangle(k.div_ceil(TILE)), 1), THREADS);
        }
        if self.moments_by_warpgroups(out, x, (m, k))? {
            return Ok(());
        }
        let padded = k.next_multiple_of(SPLIT_TILE);
        let pairs = m * padded / 2;
        let mut halves = self.device().room::<u32>(2 * pairs)?;
        let (count, width) = (pairs as i64, padded as i32);
        let mut call = self.kernel("split");
        call.arg(&mut *halves)
            .arg(x)
            .arg(&count)
            .arg(&columns)
            .arg(&width);
        run(call, (pairs.div_ceil(THREADS as usize) as u32, 1), THREADS)?;
        let mut call = self.kernel(SPLIT_SHARED.0);
        call.arg(out).arg(&*halves).arg(&rows).arg(&columns).arg(&width);
        let blocks = (triangle(padded / SPLIT_TILE), 1);
        run_with_shared(call, blocks, THREADS, SPLIT_SHARED.1)
    }
}
