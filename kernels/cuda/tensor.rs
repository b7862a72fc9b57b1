//! Products on tensor cores. Owns the choice between them and exact f32, and the shape of their launches.
//!
//! The tensor cores multiply bf16 and add in f32: both factors are rounded to 8 significant bits, so a result is off from the
//! exact one by at most (2^-8 + 2^-16) times the sum of the products' magnitudes, besides the rounding of f32 sums. That is too
//! coarse where logits must agree to 1e-4, and fine where many of them are averaged; so it is asked for, never assumed.

use cudarc::driver::{CudaSlice, DriverError, PushKernelArg};

use super::backend::CudaBackend;
use super::launch::{run, run_with_shared};
use super::temporary::Temporary;
use super::weight::{DeviceWeight, WeightArgs};

/// How products of more than 16 rows are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Precision {
    /// Factors and sums in f32.
    #[default]
    F32,
    /// Factors in bf16 on tensor cores, sums in f32.
    Bf16,
    /// The same by warpgroups, see [`warpgroup`](super::warpgroup), where the device has them and the weight lies as they need it.
    Bf16Warpgroups,
}

impl Precision {
    /// Whether factors are bf16.
    pub fn on_tensor_cores(self) -> bool {
        self != Self::F32
    }
}

/// Outputs of a block on each side.
pub(super) const TILE: usize = 128;
/// Input columns of a slice.
const SLICE: usize = 32;
/// Bytes of a decoded slice of a tile.
const SLICE_BYTES: usize = TILE * SLICE * 2;
/// Slices under way to shared memory at a time.
const STAGES: usize = 4;
/// Threads of a block.
const THREADS: u32 = 256;

/// The kernels of a form, and the bytes of a packed slice of a tile and the number of decoded ones in both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TensorKernel {
    /// For one weight.
    one: &'static str,
    /// For experts' weights.
    pub(super) grouped: &'static str,
    packed: usize,
    decoded: usize,
}

const fn form(one: &'static str, grouped: &'static str, packed: usize, decoded: usize) -> TensorKernel {
    TensorKernel {
        one,
        grouped,
        packed,
        decoded,
    }
}

const ANY: TensorKernel = form("gemm_any", "grouped_any", 0, 2);
const BF16: TensorKernel = form("gemm_bf16", "grouped_bf16", SLICE_BYTES, 0);
const INT8: TensorKernel = form("gemm_int8", "grouped_int8", TILE * SLICE, 2);
const INT4: TensorKernel = form("gemm_int4", "grouped_int4", TILE * SLICE / 2, 2);
const WINT2: TensorKernel = form("gemm_wint2", "grouped_wint2", TILE * SLICE / 4, 2);
const NF4: TensorKernel = form("gemm_nf4", "grouped_nf4", TILE * SLICE / 2, 2);

/// Every kernel with the shared memory it needs, in bytes.
pub(super) fn shared_memory() -> impl Iterator<Item = (&'static str, usize)> {
    let all = [ANY, BF16, INT8, INT4, WINT2, NF4].into_iter();
    all.flat_map(|kernel| [kernel.one, kernel.grouped].map(|name| (name, kernel.shared_bytes())))
}

impl TensorKernel {
    pub(super) fn shared_bytes(&self) -> usize {
        STAGES * (SLICE_BYTES + self.packed) + self.decoded * SLICE_BYTES
    }

    /// That multiplies by this weight.
    pub(super) fn of(w: &WeightArgs) -> Self {
        // A thread decodes 16 neighbouring columns under one scale, and finds its group by a multiplication of 32 bits.
        let near = w.group == w.k || (i64::from(w.group) * i64::from(w.k)) < 1 << 32;
        let whole = w.k % SLICE as i32 == 0 && w.group % 16 == 0 && near;
        match (w.form, w.bits) {
            (1, _) if w.k % 8 == 0 => BF16,
            (3, 8) if whole => INT8,
            (3, 4) if whole => INT4,
            (4, _) => WINT2,
            (6, _) => NF4,
            _ => ANY,
        }
    }

    /// That multiplies by all of these.
    pub(super) fn of_all(weights: &[&DeviceWeight]) -> Self {
        let mut each = weights.iter().map(|w| Self::of(&w.args));
        let first = each.next().unwrap_or(ANY);
        if each.all(|other| other == first) {
            first
        } else {
            ANY
        }
    }
}

impl CudaBackend {
    /// x (M, K) in bf16, pairs of them, in rows of `padded` values with zeros behind the K-th; and `padded`.
    pub(super) fn narrowed(
        &self,
        x: &CudaSlice<f32>,
        m: usize,
        k: usize,
    ) -> Result<(Temporary<u32>, usize), DriverError> {
        let padded = k.next_multiple_of(SLICE);
        let pairs = m * padded / 2;
        let mut narrow = self.device().room::<u32>(pairs)?;
        let (count, columns, width) = (pairs as i64, k as i32, padded as i32);
        let mut call = self.kernel("narrow");
        call.arg(&mut *narrow)
            .arg(x)
            .arg(&count)
            .arg(&columns)
            .arg(&width);
        run(call, (pairs.div_ceil(THREADS as usize) as u32, 1), THREADS)?;
        Ok((narrow, padded))
    }

    /// y (M, N) = x (M, K) times the transpose of `w` on tensor cores: by NVIDIA's library where it is there and `w` lies in
    /// plain BF16, else by a kernel of our own.
    pub(super) fn tensor_product(
        &self,
        y: &mut CudaSlice<f32>,
        x: &CudaSlice<f32>,
        w: &DeviceWeight,
        m: usize,
    ) -> Result<(), DriverError> {
        let (n, k) = (w.args.n as usize, w.args.k as usize);
        let kernel = TensorKernel::of(&w.args);
        let library = kernel == BF16 && self.library && self.library().is_ok();
        if !library && self.by_warpgroups(y, x, w, m)? {
            return Ok(());
        }
        let (narrow, padded) = self.narrowed(x, m, k)?;
        if library && self.by_library(y, &narrow, w, [m, n, k, padded])? {
            return Ok(());
        }
        let (rows, width, args) = (m as i32, padded as i32, self.resident(w)?);
        let mut call = self.kernel(kernel.one);
        call.arg(y).arg(&*narrow).arg(&args).arg(&rows).arg(&width);
        let blocks = (n.div_ceil(TILE) as u32, m.div_ceil(TILE) as u32);
        run_with_shared(call, blocks, THREADS, kernel.shared_bytes())
    }
}
