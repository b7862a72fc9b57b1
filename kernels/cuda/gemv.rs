//! Products of at most 16 rows. Owns which kernel takes which form and how many rows, how the work is dealt to blocks and
//! warps, and the shared memory that takes.

use cudarc::driver::{CudaSlice, DriverError, PushKernelArg};

use super::backend::CudaBackend;
use super::launch::{run, run_with_shared};
use super::temporary::Temporary;
use super::weight::WeightArgs;

/// Rows of x that a kernel of each family holds.
const BATCHES: [usize; 3] = [4, 8, 16];
/// Warps of a block, and threads.
const WARPS: usize = 16;
const THREADS: u32 = 32 * WARPS as u32;
/// Rows of w that a warp takes.
const ROWS: usize = 16;
/// Bytes of shared memory of a block: what every device since compute capability 8.0 has.
const SHARED: usize = 99 << 10;
/// Bytes for numbers that belong to whole rows of x.
const ROW_NUMBERS: usize = 256;
/// Blocks that a plan reckons with: those of an H100 or H200. A plan, and with it the order of sums, depends on sizes alone.
const BLOCKS: usize = 132;
/// What a tile takes besides its steps, in tenths of a step: about a third of one.
const TILE_TENTHS: usize = 3;
/// What it costs that blocks wait for each other's sums: about a microsecond, as bytes of w.
const MEETING: usize = 32 << 10;
/// How many times the parts that need be are tried.
const MORE_PARTS: [usize; 4] = [1, 2, 4, 8];
/// Most blocks side by side, each with a number that says how many others have left their sums.
pub(super) const MOST_BLOCKS: usize = 1024;

/// The kernels of a form, one for each of [`BATCHES`].
struct Family {
    names: [&'static str; 3],
    /// Columns of a step of a warp, of each.
    spans: [usize; 3],
    /// Bytes of w of a step of all warps.
    steps: [usize; 3],
    /// Numbers of two bytes that stand for one of x.
    parts: usize,
    /// Bytes of a table.
    table: usize,
}

const fn family(
    names: [&'static str; 3],
    bits: usize,
    spans: [usize; 3],
    parts: usize,
    table: usize,
) -> Family {
    let step = WARPS * ROWS * bits / 8;
    Family {
        names,
        spans,
        steps: [step * spans[0], step * spans[1], step * spans[2]],
        parts,
        table,
    }
}

const FAMILIES: [Family; 8] = [
    family(
        ["gemv_bf16_4", "gemv_bf16_8", "gemv_bf16_16"],
        16,
        [64, 64, 32],
        3,
        0,
    ),
    family(
        ["gemv_int8_4", "gemv_int8_8", "gemv_int8_16"],
        8,
        [128, 128, 64],
        2,
        0,
    ),
    family(
        ["gemv_int4_4", "gemv_int4_8", "gemv_int4_16"],
        4,
        [256, 256, 128],
        2,
        0,
    ),
    family(
        ["gemv_int4_128_4", "gemv_int4_128_8", "gemv_int4_128_16"],
        4,
        [256, 256, 128],
        2,
        0,
    ),
    family(
        ["gemv_int4_64_4", "gemv_int4_64_8", "gemv_int4_64_16"],
        4,
        [256, 256, 128],
        2,
        0,
    ),
    family(
        ["gemv_int4_32_4", "gemv_int4_32_8", "gemv_int4_32_16"],
        4,
        [256, 256, 128],
        2,
        0,
    ),
    family(
        ["gemv_wint2_4", "gemv_wint2_8", "gemv_wint2_16"],
        2,
        [512, 512, 256],
        2,
        16 * 16,
    ),
    family(
        ["gemv_nf4_4", "gemv_nf4_8", "gemv_nf4_16"],
        4,
        [128; 3],
        2,
        256 * 16 * 8,
    ),
];

/// How a product is dealt out.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    /// Columns of a block: whole steps.
    part: usize,
    /// Blocks that share rows.
    parts: usize,
    /// Warps that share rows, each with every so many of a block's steps.
    ways: usize,
    /// Tiles of rows.
    tiles: usize,
    /// Bytes of shared memory.
    shared: usize,
}

impl Family {
    /// The plan that lets the busiest multiprocessor wait for least, reckoned in bytes of w: those of its steps, of x, and of sums.
    fn plan(&self, m: usize, n: usize, k: usize) -> Plan {
        let batch = batch_of(m);
        let (span, rows) = (self.spans[batch], if batch == 0 { m } else { BATCHES[batch] });
        let column = 2 * self.parts * rows;
        let fixed = self.table + 2 * WARPS * ROWS * 4 * m + ROW_NUMBERS;
        let most = (SHARED - fixed) / column / span * span;
        let least = k.div_ceil(most);
        let mut best: Option<(usize, Plan)> = None;
        for wanted in MORE_PARTS.map(|times| least * times) {
            let part = k.div_ceil(wanted).next_multiple_of(span);
            let (parts, steps) = (k.div_ceil(part), part / span);
            for ways in [8, 16, 4, 2, 1].into_iter().filter(|ways| *ways <= steps) {
                let tiles = n.div_ceil(WARPS * ROWS / ways);
                let rounds = tiles.div_ceil((BLOCKS / parts).max(1));
                let steps = rounds * (10 * steps.div_ceil(ways) + TILE_TENTHS) * self.steps[batch] / 10;
                let sums = match parts {
                    1 => 0,
                    _ => MEETING + 2 * rounds * (WARPS * ROWS / ways) * m * 4,
                };
                let cost = steps + part * m * 4 + sums;
                if best.as_ref().is_none_or(|(least, _)| cost < *least) {
                    let shared = fixed + column * part;
                    let plan = Plan {
                        part,
                        parts,
                        ways,
                        tiles,
                        shared,
                    };
                    best = Some((cost, plan));
                }
            }
        }
        best.expect("one warp to a row is always a way").1
    }
}

/// Every kernel with the shared memory it may need, in bytes.
pub(super) fn shared_memory() -> impl Iterator<Item = (&'static str, usize)> {
    FAMILIES
        .iter()
        .flat_map(|family| family.names.map(|name| (name, SHARED)))
}

/// The kernels for this weight, if its rows and groups are whole packs.
fn family_for(w: &WeightArgs) -> Option<&'static Family> {
    let whole = |columns: i32| w.k % columns == 0;
    match (w.form, w.bits) {
        (1, _) if whole(8) => Some(&FAMILIES[0]),
        (3, 8) if whole(16) && w.group == w.k => Some(&FAMILIES[1]),
        (3, 4) if whole(32) && w.group == w.k => Some(&FAMILIES[2]),
        // Scales of 32 bits do not fit where two of 16 are read.
        (3, 4) if w.scale != 0 => match w.group {
            128 => Some(&FAMILIES[3]),
            64 => Some(&FAMILIES[4]),
            32 => Some(&FAMILIES[5]),
            _ => None,
        },
        (4, _) => Some(&FAMILIES[6]),
        (6, _) => Some(&FAMILIES[7]),
        _ => None,
    }
}

fn batch_of(m: usize) -> usize {
    BATCHES.iter().position(|&batch| m <= batch).unwrap_or(2)
}

/// A product of few rows, dealt out, with room for the sums of blocks that share rows if there are such.
#[derive(Debug)]
pub(super) struct FewRows {
    /// None: the kernel for any form.
    kernel: Option<(&'static str, Plan)>,
    room: Option<Temporary<f32>>,
}

impl CudaBackend {
    /// How a product of M of at most 16 rows by such a weight is to be done; to be asked for before weights are told to kernels.
    pub(super) fn deal_few_rows(&self, w: &WeightArgs, m: usize) -> Result<FewRows, DriverError> {
        let (n, k) = (w.n as usize, w.k as usize);
        let kernel = family_for(w).map(|family| (family.names[batch_of(m)], family.plan(m, n, k)));
        let parts = kernel.as_ref().map_or(1, |(_, plan)| plan.parts);
        let room = (parts > 1)
            .then(|| self.device().room(parts * m * n))
            .transpose()?;
        Ok(FewRows { kernel, room })
    }

    /// y (M, N) = x (M, K) times the transpose of `w`.
    pub(super) fn few_rows(
        &self,
        y: &mut CudaSlice<f32>,
        x: &CudaSlice<f32>,
        w: &WeightArgs,
        m: usize,
        dealt: &FewRows,
    ) -> Result<(), DriverError> {
        let (n, rows) = (w.n as usize, m as i32);
        let Some((name, plan)) = &dealt.kernel else {
            let mut call = self.kernel("gemv");
            call.arg(y).arg(x).arg(w).arg(&rows);
            return run(call, (n.div_ceil(8) as u32, 1), 256);
        };
        let side_by_side = (self.device().processors / plan.parts).clamp(1, MOST_BLOCKS);
        let (part, way_bits) = (plan.part as i32, plan.ways.ilog2() as i32);
        let mut call = self.kernel(name);
        // Where there is one part, nothing is left in the room: any numbers will do for an address.
        let room = dealt.room.as_deref().unwrap_or(x);
        call.arg(y).arg(x).arg(w).arg(&rows).arg(room);
        call.arg(&self.device().arrived).arg(&part).arg(&way_bits);
        let blocks = (plan.tiles.min(side_by_side) as u32, plan.parts as u32);
        run_with_shared(call, blocks, THREADS, plan.shared)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plans_fit_and_leave_nothing_out() {
        let mut count = 0;
        for family in &FAMILIES {
            for m in 1..=16 {
                for (n, k) in [
                    (1, 64),
                    (4096, 4096),
                    (14_336, 4096),
                    (8192, 8192),
                    (576, 49_152),
                    (1, 1600),
                ] {
                    let plan = family.plan(m, n, k);
                    assert!(plan.shared <= SHARED, "{:?} {plan:?}", family.names);
                    let span = family.spans[batch_of(m)];
                    assert_eq!(plan.part % span, 0);
                    assert!(plan.part * plan.parts >= k && plan.part * (plan.parts - 1) < k);
                    assert!(plan.tiles * (WARPS * ROWS / plan.ways) >= n);
                    assert!(plan.ways <= plan.part / span);
                    count += 1;
                }
            }
        }
        assert_eq!(count, FAMILIES.len() * 16 * 6);
    }

    #[test]
    fn a_square_weight_keeps_nearly_all_blocks_busy() {
        let plan = FAMILIES[1].plan(1, 4096, 4096);
        assert_eq!((plan.parts, plan.ways, plan.tiles), (1, 8, 128));
        let plan = FAMILIES[6].plan(16, 4096, 4096);
        assert_eq!((plan.parts, plan.tiles, plan.ways), (8, 16, 1));
    }
}
