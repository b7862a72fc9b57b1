//! Products of many rows in f32. Owns which kernel multiplies by which weight, and the shape of the launch.

use cudarc::driver::{CudaSlice, DriverError, PushKernelArg};

use super::backend::CudaBackend;
use super::launch::run;
use super::weight::{DeviceWeight, WeightArgs};

/// Which tiles products of many rows in f32 are cut into. The sums are the same by either.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Tiles {
    /// Those that suit the number of outputs.
    #[default]
    Fitting,
    /// 128 x 128, for whoever holds one beside the other.
    Large,
    /// 32 x 32, for the same.
    Small,
}

/// Outputs of a block on each side.
pub(super) const TILE: usize = 128;
/// The same of the kernels for few outputs.
const LOW_TILE: usize = 32;
/// Tiles that are enough to keep a device at work.
const ENOUGH: usize = 64;
/// Threads of a block.
const THREADS: u32 = 256;
/// Neighbouring columns that a thread brings: they must share a scale, and lie in whole words.
const RUN: i32 = 8;

/// A kernel for one weight, one for few outputs, and one for experts' weights.
type Names = [&'static str; 3];

const ANY: Names = ["exact_any", "exact_low_any", "exact_grouped_any"];
const F32: Names = ["exact_f32", "exact_low_f32", "exact_grouped_f32"];
const BF16: Names = ["exact_bf16", "exact_low_bf16", "exact_grouped_bf16"];
const INT8: Names = ["exact_int8", "exact_low_int8", "exact_grouped_int8"];
const INT4: Names = ["exact_int4", "exact_low_int4", "exact_grouped_int4"];
const WINT2: Names = ["exact_wint2", "exact_low_wint2", "exact_grouped_wint2"];
const NF4: Names = ["exact_nf4", "exact_low_nf4", "exact_grouped_nf4"];

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
        first[2]
    } else {
        ANY[2]
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
        let (kernel, tile) = self.tiles.chosen(names(&args), m, args.n as usize);
        let mut call = self.kernel(kernel);
        call.arg(y).arg(x).arg(&args).arg(&rows);
        let blocks = ((args.n as usize).div_ceil(tile), m.div_ceil(tile));
        run(call, (blocks.0 as u32, blocks.1 as u32), THREADS)
    }
}

impl Tiles {
    /// The kernel for m x n outputs, and their tile. Small tiles do nearly twice the work for each output, so that they pay where large
    /// ones would leave more than half of the multiprocessors without any.
    fn chosen(self, [large, low, _]: Names, m: usize, n: usize) -> (&'static str, usize) {
        let few = m.div_ceil(TILE) * n.div_ceil(TILE) < ENOUGH;
        if self == Self::Small || (self == Self::Fitting && few) {
            (low, LOW_TILE)
        } else {
            (large, TILE)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_outputs_take_small_tiles() {
        for (m, n, expected) in [
            (17, 1024, ("exact_low_bf16", 32)),
            (512, 1024, ("exact_low_bf16", 32)),
            (1024, 1024, ("exact_bf16", 128)),
            (17, 103_424, ("exact_bf16", 128)),
            (8192, 256, ("exact_bf16", 128)),
        ] {
            assert_eq!(Tiles::Fitting.chosen(BF16, m, n), expected, "{m} x {n}");
        }
    }
}
