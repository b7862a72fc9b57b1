//! Attention. Owns the cut of segments into tiles, which of its kernels does a call, and the shape of the launch.

use cudarc::driver::{CudaSlice, DriverError, PushKernelArg};

use super::backend::CudaBackend;
use super::launch::{run, run_with_shared};
use crate::backend::{Heads, Segment};

/// Largest head of `attention_any`: eight columns a thread.
pub(super) const LARGEST_HEAD: usize = 1024;
/// Threads of a block, which the kernels count on.
const THREADS: u32 = 128;
/// Numbers of `struct AttentionTile` of attention.cu.
const TILE: usize = 8;
/// Rows of a tile of the kernels for few rows.
const FEW: usize = 8;
/// What a row of a tile of these costs, about, beside one of a full tile: reading keys weighs more than multiplying them.
const FEW_COST: usize = 3;

/// A kernel for heads of at most `width` columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kernel {
    name: &'static str,
    width: usize,
    /// Rows of a tile.
    rows: usize,
    /// Keys of a chunk.
    keys: usize,
}

const fn kernel(name: &'static str, width: usize, rows: usize, keys: usize) -> Kernel {
    Kernel {
        name,
        width,
        rows,
        keys,
    }
}

/// For many rows, for many on devices with less shared memory, and for few, by width. They take as many keys at a time, so that a row's
/// result is the same by any.
const KERNELS: [[Kernel; 3]; 4] = [
    [
        kernel("attention_64", 64, 64, 64),
        kernel("attention_64", 64, 64, 64),
        kernel("attention_few_64", 64, FEW, 64),
    ],
    [
        kernel("attention_96", 96, 64, 64),
        kernel("attention_96", 96, 64, 64),
        kernel("attention_few_96", 96, FEW, 64),
    ],
    [
        kernel("attention_128", 128, 64, 64),
        kernel("attention_less_128", 128, 32, 64),
        kernel("attention_few_128", 128, FEW, 64),
    ],
    [
        kernel("attention_256", 256, 32, 32),
        kernel("attention_less_256", 256, 16, 32),
        kernel("attention_few_256", 256, FEW, 32),
    ],
];

impl Kernel {
    /// As its page lays it out: q, keys, values, shares of 32 keys, and two numbers a row.
    const fn shared_bytes(&self) -> usize {
        let floats =
            (self.rows + self.keys) * (self.width + 4) + self.keys * self.width + 32 * (self.rows + 4);
        4 * (floats + 2 * self.rows)
    }

    /// For these heads and segments, where a block has at most `shared` bytes; `None` when none is made for their width.
    fn of(heads: Heads, segments: &[Segment], shared: usize) -> Option<Self> {
        let whole = heads.dim.is_multiple_of(4);
        let [more, less, few] = KERNELS.iter().find(|all| whole && heads.dim <= all[0].width)?;
        let many = if more.shared_bytes() <= shared { more } else { less };
        let group = heads.query / heads.kv;
        let padded = |tile: usize| -> usize {
            let rows = segments.iter().map(|s| s.queries.len() * group);
            rows.map(|rows| rows.next_multiple_of(tile)).sum()
        };
        Some(if FEW_COST * padded(few.rows) < padded(many.rows) {
            *few
        } else {
            *many
        })
    }
}

/// Every tiled kernel with the shared memory it needs, in bytes.
pub(super) fn shared_memory() -> impl Iterator<Item = (&'static str, usize)> {
    let all = KERNELS.iter().flatten();
    all.map(|kernel| (kernel.name, kernel.shared_bytes()))
}

/// Keys that query `i` of a segment sees.
fn seen(segment: &Segment, i: usize, causal: bool) -> usize {
    let (queries, own) = (segment.queries.len(), segment.own.len());
    let visible = if causal {
        (own + i + 1).saturating_sub(queries)
    } else {
        own
    };
    segment.prefix.len() + visible
}

/// Tiles of `rows` rows, those that see most first: blocks that take long begin early.
fn tiles(segments: &[Segment], group: usize, rows: usize, causal: bool) -> Vec<[i32; TILE]> {
    let mut tiles = Vec::new();
    for segment in segments {
        let all = segment.queries.len() * group;
        for first in (0..all).step_by(rows) {
            let last = (first + rows).min(all) - 1;
            let numbers = [
                segment.queries.start,
                segment.queries.len(),
                segment.prefix.start,
                segment.prefix.len(),
                segment.own.start,
                segment.own.len(),
                first,
                0,
            ];
            tiles.push((
                seen(segment, last / group, causal),
                numbers.map(|number| number as i32),
            ));
        }
    }
    tiles.sort_by_key(|(seen, _)| std::cmp::Reverse(*seen));
    tiles.into_iter().map(|(_, tile)| tile).collect()
}

/// First row and count of the prefix, first row and count of its own, for each query of `rows`.
fn spans(segments: &[Segment], rows: usize, causal: bool) -> Vec<[i32; 4]> {
    let mut spans = vec![[0i32; 4]; rows];
    for segment in segments {
        for (i, row) in segment.queries.clone().enumerate() {
            let visible = seen(segment, i, causal) - segment.prefix.len();
            let numbers = [
                segment.prefix.start,
                segment.prefix.len(),
                segment.own.start,
                visible,
            ];
            spans[row] = numbers.map(|number| number as i32);
        }
    }
    spans
}

/// Rows that belong to a segment.
///
/// # Panics
///
/// When two segments share one.
fn covered(segments: &[Segment]) -> usize {
    let mut ordered: Vec<_> = segments.iter().map(|s| s.queries.clone()).collect();
    ordered.sort_by_key(|queries| queries.start);
    let mut end = 0;
    for queries in ordered.iter().filter(|queries| !queries.is_empty()) {
        assert!(queries.start >= end, "segments share queries");
        end = queries.end;
    }
    ordered.iter().map(ExactSizeIterator::len).sum()
}

impl CudaBackend {
    /// softmax(scale q k^T) v for each segment and head into `out` (M, query * D): all of it, zeros where a row sees nothing.
    pub(super) fn attend(
        &self,
        out: &mut CudaSlice<f32>,
        [q, keys, values]: [&CudaSlice<f32>; 3],
        segments: &[Segment],
        rows: usize,
        heads: Heads,
    ) -> Result<(), DriverError> {
        assert!(
            heads.dim <= LARGEST_HEAD,
            "heads of at most {LARGEST_HEAD} columns"
        );
        let covered = covered(segments);
        let (query, kv, d) = (heads.query as i32, heads.kv as i32, heads.dim as i32);
        let Some(kernel) = Kernel::of(heads, segments, self.device().shared) else {
            let spans = spans(segments, rows, heads.causal);
            let spans = self.device().sent_once(spans.as_flattened())?;
            let mut call = self.kernel("attention_any");
            call.arg(out).arg(q).arg(keys).arg(values).arg(&**spans);
            call.arg(&query).arg(&kv).arg(&d).arg(&heads.scale);
            return run(call, (rows as u32, heads.query as u32), THREADS);
        };
        if covered < rows {
            self.blank(out)?;
        }
        let tiles = tiles(segments, heads.query / heads.kv, kernel.rows, heads.causal);
        if tiles.is_empty() {
            return Ok(());
        }
        let there = self.device().sent_once(tiles.as_flattened())?;
        let causal = i32::from(heads.causal);
        let mut call = self.kernel(kernel.name);
        call.arg(out).arg(q).arg(keys).arg(values).arg(&**there);
        call.arg(&query).arg(&kv).arg(&d).arg(&heads.scale).arg(&causal);
        let blocks = (tiles.len() * heads.kv) as u32;
        run_with_shared(call, (blocks, 1), THREADS, kernel.shared_bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(queries: std::ops::Range<usize>, prefix: usize, own: usize) -> Segment {
        Segment {
            queries,
            prefix: 0..prefix,
            own: prefix..prefix + own,
        }
    }

    #[test]
    fn tiles_hold_every_row_once_and_the_longest_come_first() {
        let segments = [segment(3..10, 5, 7), segment(0..3, 0, 300), segment(10..10, 4, 0)];
        let found = tiles(&segments, 3, 8, true);
        let mut rows: Vec<(i32, i32)> = found
            .iter()
            .flat_map(|tile| (tile[6]..(tile[6] + 8).min(tile[1] * 3)).map(|r| (tile[0] + r / 3, r % 3)))
            .collect();
        rows.sort_unstable();
        let every: Vec<(i32, i32)> = (0..10).flat_map(|row| (0..3).map(move |h| (row, h))).collect();
        assert_eq!(rows, every);
        assert_eq!(found[0], [0, 3, 0, 0, 0, 300, 0, 0]);
    }

    #[test]
    fn a_query_sees_what_comes_before_it() {
        let more_queries = segment(0..5, 3, 2);
        let counts: Vec<usize> = (0..5).map(|i| seen(&more_queries, i, true)).collect();
        assert_eq!(counts, [3, 3, 3, 4, 5]);
        assert_eq!(seen(&more_queries, 0, false), 5);
        assert_eq!(covered(&[more_queries, segment(7..9, 0, 2)]), 7);
    }

    #[test]
    fn a_kernel_for_every_width_it_is_made_for() {
        let heads = |query, kv, dim| Heads {
            query,
            kv,
            dim,
            scale: 1.0,
            causal: true,
        };
        let on = |heads, segments: &[Segment], shared| Kernel::of(heads, segments, shared).map(|k| k.name);
        let name = |heads, segments: &[Segment]| on(heads, segments, 227 << 10);
        let (long, token) = (segment(0..100, 0, 100), segment(0..1, 0, 100));
        for (dim, many, few) in [
            (8, "attention_64", "attention_few_64"),
            (80, "attention_96", "attention_few_96"),
            (128, "attention_128", "attention_few_128"),
            (256, "attention_256", "attention_few_256"),
        ] {
            let long = std::slice::from_ref(&long);
            assert_eq!(name(heads(16, 2, dim), long), Some(many));
            assert_eq!(name(heads(16, 2, dim), std::slice::from_ref(&token)), Some(few));
        }
        // The least that devices have, and every kernel that is chosen there fits it.
        let least = 99 << 10;
        for (dim, many) in [
            (64, "attention_64"),
            (128, "attention_less_128"),
            (256, "attention_less_256"),
        ] {
            assert_eq!(
                on(heads(16, 2, dim), std::slice::from_ref(&long), least),
                Some(many)
            );
        }
        assert!(
            KERNELS
                .iter()
                .all(|[_, less, few]| less.shared_bytes().max(few.shared_bytes()) <= least)
        );
        for dim in [2, 34, 257, 260] {
            assert_eq!(name(heads(2, 1, dim), std::slice::from_ref(&long)), None);
        }
        // Two blocks on a multiprocessor of 228 KiB, of which each block costs one more.
        for (name, bytes) in shared_memory() {
            assert!(2 * (bytes + 1024) <= 228 << 10, "{name}: {bytes}");
        }
    }
}
