//! Products of many rows in f32. Owns which kernel multiplies by which weight, and the shape of the launch.

use cudarc::driver::{CudaSlice, DriverError, PushKernelArg};

use super::backend::CudaBackend;
use super::launch::run;
use super::weight::{DeviceWeight, WeightArgs};

/// Outputs of a block on each side.
pub(super) const TILE: usize = 128;
/// Threads of a block.
const THREADS: u32 = 256;
/// Neighbouring columns that a thread brings: they must share a scale, and lie in whole words.
const RUN: i32 = 8;

/// A kernel for one weight, and for those of experts.
type Names = [&'static str; 2];

const ANY: Names = ["exact_any", "exact_grouped_any"];
const F32: Names = ["exact_f32", "exact_grouped_f32"];
const BF16: Names = ["exact_bf16", "exact_grouped_bf16"];
const INT8: Names = ["exact_int8", "exact_grouped_int8"];
const INT4: Names = ["exact_int4", "exact_grouped_int4"];
const WINT2: Names = ["exact_wint2", "exact_grouped_wint2"];
const NF4: Names = ["exact_nf4", "exact_grouped_nf4"];

/// Those for this weight: of its form where its rows are made of runs, or else for any.
fn names(w: &WeightArgs) -> Names {
    if w.k % RUN != 0 {
        return ANY;
    }
    match (w.form, w.bits) {
        (0, _) => F32,
        (1, _) => BF16,
        (3, 8) if w.group % RUN == 0 => INT8,
        (3, 4) if w.group % RUN == 0 => INT4,
        (4, _) => WINT2,
        (6, _) => NF4,
        _ => ANY,
    }
}

/// The kernel for all of these experts' weights.
pub(super) fn grouped_kernel(weights: &[&DeviceWeight]) -> &'static str {
    let mut each = weights.iter().map(|w| names(&w.args));
    let first = each.next().unwrap_or(ANY);
    if each.all(|other| other == first) {
        first[1]
    } else {
        ANY[1]
    }
}

impl CudaBackend {
    /// y (M, N) = x (M, K) times the transpose of `w`, in f32, each sum over rising k.
    pub(super) fn exact_product(
        &self,
        y: &mut CudaSlice<f32>,
        x: &CudaSlice<f32>,
        w: &DeviceWeight,
        m: usize,
    ) -> Result<(), DriverError> {
        let (rows, args) = (m as i32, self.resident(w)?);
        let mut call = self.kernel(names(&args)[0]);
        call.arg(y).arg(x).arg(&args).arg(&rows);
        let blocks = ((args.n as usize).div_ceil(TILE), m.div_ceil(TILE));
        run(call, (blocks.0 as u32, blocks.1 as u32), THREADS)
    }
}
