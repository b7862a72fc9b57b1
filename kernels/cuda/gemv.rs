//! Products of at most 16 rows. Owns which kernel takes which form and how many rows, and the shared memory it needs.

use cudarc::driver::{CudaSlice, DriverError, PushKernelArg};

use super::backend::CudaBackend;
use super::launch::{run, run_with_shared};
use super::weight::WeightArgs;

/// Rows of x that a kernel of each family holds.
const BATCHES: [usize; 3] = [1, 4, 16];
/// Output columns of a block.
const COLUMNS: usize = 16;
/// Threads of a block.
const THREADS: u32 = 256;
/// Bytes of the tables of WINT2 codewords of a block.
const CODEWORD_TABLES: usize = COLUMNS * 256 * 4;
/// Bytes of the levels of NF4.
const LEVELS: usize = 16 * 4;

/// The kernels of a form, one for each of [`BATCHES`], and the columns of a tile of each.
struct Family {
    names: [&'static str; 3],
    tiles: [usize; 3],
    tables: usize,
}

const FAMILIES: [Family; 5] = [
    Family {
        names: ["gemv_bf16_1", "gemv_bf16_4", "gemv_bf16_16"],
        tiles: [256; 3],
        tables: 0,
    },
    Family {
        names: ["gemv_int8_1", "gemv_int8_4", "gemv_int8_16"],
        tiles: [512; 3],
        tables: 0,
    },
    Family {
        names: ["gemv_int4_1", "gemv_int4_4", "gemv_int4_16"],
        tiles: [1024; 3],
        tables: 0,
    },
    Family {
        names: ["gemv_wint2_1", "gemv_wint2_4", "gemv_wint2_16"],
        tiles: [2048, 2048, 1024],
        tables: CODEWORD_TABLES,
    },
    Family {
        names: ["gemv_nf4_1", "gemv_nf4_4", "gemv_nf4_16"],
        tiles: [1024; 3],
        tables: LEVELS,
    },
];

impl Family {
    fn shared_bytes(&self, batch: usize) -> usize {
        BATCHES[batch] * self.tiles[batch] * 4 + self.tables
    }
}

/// Every kernel with the shared memory it needs, in bytes.
pub(super) fn shared_memory() -> impl Iterator<Item = (&'static str, usize)> {
    FAMILIES
        .iter()
        .flat_map(|family| (0..3).map(|batch| (family.names[batch], family.shared_bytes(batch))))
}

/// The kernels for this weight, if its rows lie in whole packs.
fn family_for(w: &WeightArgs) -> Option<&'static Family> {
    let whole = |columns: i32| w.k % columns == 0;
    match (w.form, w.bits) {
        (1, _) if whole(8) => Some(&FAMILIES[0]),
        (3, 8) if whole(16) => Some(&FAMILIES[1]),
        (3, 4) if whole(32) => Some(&FAMILIES[2]),
        (4, _) => Some(&FAMILIES[3]),
        (6, _) => Some(&FAMILIES[4]),
        _ => None,
    }
}

impl CudaBackend {
    /// y (M, N) = x (M, K) times the transpose of `w`, for M of at most 16.
    pub(super) fn few_rows(
        &self,
        y: &mut CudaSlice<f32>,
        x: &CudaSlice<f32>,
        w: &WeightArgs,
        m: usize,
    ) -> Result<(), DriverError> {
        let (n, rows) = (w.n as usize, m as i32);
        let Some(family) = family_for(w) else {
            let mut call = self.kernel("gemv");
            call.arg(y).arg(x).arg(w).arg(&rows);
            return run(call, (n.div_ceil(THREADS as usize / 32) as u32, 1), THREADS);
        };
        let batch = BATCHES.iter().position(|&batch| m <= batch).unwrap_or(2);
        let mut call = self.kernel(family.names[batch]);
        call.arg(y).arg(x).arg(w).arg(&rows);
        let blocks = (n.div_ceil(COLUMNS) as u32, 1);
        run_with_shared(call, blocks, THREADS, family.shared_bytes(batch))
    }
}
