//! Second moments. Owns which kernel sums them and the shape of its launch.

use cudarc::driver::{CudaSlice, DriverError, PushKernelArg};

use super::backend::{CudaBackend, DeviceTensor};
use super::launch::{run, run_with_shared};
use super::tensor::Precision;

/// Columns of a tile.
const TILE: usize = 128;
/// Threads of a block.
const THREADS: u32 = 256;

/// `gram_split` and its shared memory: three slices of 32 rows, two tiles wide, in two halves of bf16.
pub(super) const SPLIT_SHARED: (&str, usize) = ("gram_split", 3 * 4 * 32 * TILE * 2);

/// Tiles on and above the diagonal.
fn triangle(tiles: usize) -> u32 {
    (tiles * (tiles + 1) / 2) as u32
}

impl CudaBackend {
    /// `moment` (K, K) += x^T x, both triangles, on the host.
    pub(super) fn add_moments(&self, x: &DeviceTensor, moment: &mut [f64]) {
        let k = x.size().1;
        assert_eq!(moment.len(), k * k, "K x K");
        let Some(values) = x.values() else { return };
        let sums = self.attempt("sum products", || {
            let mut out = self.device().zeros::<f64>(k * k)?;
            self.sum_products(&mut out, values, x.size().0, k)?;
            self.device().stream.clone_dtoh(&*out)
        });
        let Some(sums) = sums else { return };
        for i in 0..k {
            for j in i..k {
                moment[i * k + j] += sums[i * k + j];
                moment[j * k + i] = moment[i * k + j];
            }
        }
    }

    /// Adds the upper triangle of x^T x (K, K) for x (M, K): in f32, or with [`Precision::Bf16`] on tensor cores with each
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
        let padded = k.next_multiple_of(TILE);
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
        let blocks = (triangle(padded / TILE), 1);
        run_with_shared(call, blocks, THREADS, SPLIT_SHARED.1)
    }
}
