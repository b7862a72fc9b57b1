//! Speed of the row kernels on one core, for each instruction set of the machine. Owns no claims: dated results
//! are in `docs/benchmarks/`. Run with `cargo bench -p qtool-kernels`.
//!
//! Rows have K = 4096 weights. The paths from BF16 to codes walk a matrix of 16 MiB, 32 rows per iteration and
//! round again, so their input comes from beyond the second-level cache; divan's bytes per second are bytes of
//! BF16 input. The other benches repeat one row that stays in cache, and count weights.

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use qtool_kernels::{
    Candidate, ErrorSums, Isa, absmax, absmax_groups, clip_errors, clip_errors_weighted, code_histogram,
    minmax, minmax_groups, narrow_bf16, narrow_f16, pack_crumbs, pack_nibbles, round_codes,
    round_codes_groups, row_error, unpack_nibbles, widen_bf16, widen_f16,
};

/// Columns of the benchmark matrix.
const K: usize = 4096;
/// Rows of the benchmark matrix.
const N: usize = 2048;
/// Rows per iteration of the paths from BF16 to codes; divides N.
const STRIP: usize = 32;

fn main() {
    divan::main();
}

fn isas() -> Vec<Isa> {
    Isa::available()
}

/// Bell-shaped weights of a typical size, the same on every run.
fn weights(n: usize) -> Vec<f32> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut uniform = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..n)
        .map(|_| (uniform() + uniform() + uniform() + uniform()) * 0.05)
        .collect()
}

fn bf16_matrix() -> Vec<u8> {
    let mut bytes = vec![0; 2 * N * K];
    narrow_bf16(Isa::best(), &weights(N * K), &mut bytes);
    bytes
}

/// BF16 to one INT8 code per byte, one scale per row.
#[divan::bench(args = isas(), sample_count = 2000)]
fn rtn_int8_row(bencher: Bencher, isa: Isa) {
    let (matrix, mut codes) = (bf16_matrix(), vec![1; N * K]);
    let mut row = vec![0.0; K];
    let mut first = 0;
    bencher.counter(BytesCount::new(2 * K * STRIP)).bench_local(|| {
        let strip = matrix
            .chunks(2 * K)
            .zip(codes.chunks_mut(K))
            .skip(first)
            .take(STRIP);
        first = (first + STRIP) % N;
        for (bytes, codes) in strip {
            widen_bf16(isa, bytes, &mut row);
            let scale = absmax(isa, &row) / 127.0;
            round_codes(isa, &row, 1.0 / scale, 128, 1, 255, codes);
        }
    });
}

/// BF16 to packed INT4, one scale per group.
#[divan::bench(args = isas(), consts = [64, 128], sample_count = 2000)]
fn rtn_int4_group<const GROUP: usize>(bencher: Bencher, isa: Isa) {
    let (matrix, mut packed) = (bf16_matrix(), vec![1; N * K / 2]);
    let (mut row, mut codes) = (vec![0.0; K], vec![0; K]);
    let (mut scales, zeros) = (vec![0.0; K / GROUP], vec![8.0; K / GROUP]);
    let mut first = 0;
    bencher.counter(BytesCount::new(2 * K * STRIP)).bench_local(|| {
        let strip = matrix
            .chunks(2 * K)
            .zip(packed.chunks_mut(K / 2))
            .skip(first)
            .take(STRIP);
        first = (first + STRIP) % N;
        for (bytes, packed) in strip {
            widen_bf16(isa, bytes, &mut row);
            absmax_groups(isa, &row, GROUP, &mut scales);
            for scale in &mut scales {
                *scale = 7.0 / *scale;
            }
            round_codes_groups(isa, &row, GROUP, &scales, &zeros, (1, 15), &mut codes);
            pack_nibbles(isa, &codes, packed);
        }
    });
}

/// Symmetric INT4 candidates for clip search.
fn symmetric(count: usize) -> Vec<Candidate> {
    let candidate = |i: usize| {
        let scale = 0.1 / 7.0 * (1.0 - 0.5 * i as f32 / count as f32);
        Candidate {
            scale,
            inv_scale: 1.0 / scale,
            zero: 8.0,
            lo: 0.0,
            hi: 15.0,
        }
    };
    (0..count).map(candidate).collect()
}

/// INT4 candidates with a zero point for clip search.
fn zero_point(count: usize) -> Vec<Candidate> {
    let mut candidates = symmetric(count);
    for (i, candidate) in candidates.iter_mut().enumerate() {
        candidate.zero = (6 + i % 5) as f32;
    }
    candidates
}

fn clip_row(bencher: Bencher, isa: Isa, group: usize, candidates: &[Candidate], weighted: bool) {
    let (row, importance) = (weights(K), vec![0.7; group]);
    let mut errors = vec![0.0; candidates.len()];
    bencher.counter(ItemsCount::new(K)).bench_local(|| {
        for x in row.chunks(group) {
            if weighted {
                clip_errors_weighted(isa, x, &importance, candidates, &mut errors);
            } else {
                clip_errors(isa, x, candidates, &mut errors);
            }
        }
    });
}

/// 40 symmetric candidates per group; items are weights.
#[divan::bench(args = isas(), consts = [32, 64, 128])]
fn clip_symmetric_40<const GROUP: usize>(bencher: Bencher, isa: Isa) {
    clip_row(bencher, isa, GROUP, &symmetric(40), false);
}

/// The same for a group length without a loop of its own.
#[divan::bench(args = isas())]
fn clip_symmetric_40_group_100(bencher: Bencher, isa: Isa) {
    clip_row(bencher, isa, 100, &symmetric(40), false);
}

/// 40 symmetric candidates with a weight per element.
#[divan::bench(args = isas(), consts = [64, 128])]
fn clip_weighted_40<const GROUP: usize>(bencher: Bencher, isa: Isa) {
    clip_row(bencher, isa, GROUP, &symmetric(40), true);
}

/// 300 candidates with a zero point; items are weights.
#[divan::bench(args = isas(), consts = [32, 64, 128])]
fn clip_zero_point_300<const GROUP: usize>(bencher: Bencher, isa: Isa) {
    clip_row(bencher, isa, GROUP, &zero_point(300), false);
}

/// Error sums of a row in cache; `GROUP` 100 takes the path where groups end inside a block.
#[divan::bench(args = isas(), consts = [64, 100, 4096])]
fn row_error_sums<const GROUP: usize>(bencher: Bencher, isa: Isa) {
    let (row, codes) = (weights(K), vec![9; K]);
    let groups = K.div_ceil(GROUP);
    let (scales, zeros) = (vec![0.01; groups], vec![8.0; groups]);
    let mut sums = ErrorSums::default();
    bencher.counter(ItemsCount::new(K)).bench_local(|| {
        row_error(isa, &row, &codes, GROUP, &scales, &zeros, &mut sums);
    });
}

/// Counting INT8 codes (many values) and INT4 codes (few); items are codes.
#[divan::bench(args = [16, 256])]
fn histogram(bencher: Bencher, distinct: u64) {
    let codes: Vec<u8> = weights(64 * K)
        .iter()
        .map(|x| ((x * 1e4).abs() as u64 % distinct) as u8)
        .collect();
    let mut counts = [0; 256];
    bencher
        .counter(ItemsCount::new(codes.len()))
        .bench_local(|| code_histogram(&codes, &mut counts));
}

/// The steps by themselves on a row in cache; items are weights.
mod steps {
    use super::*;

    #[divan::bench(args = isas())]
    fn widen_bf16_row(bencher: Bencher, isa: Isa) {
        let (src, mut row) = (vec![63; 2 * K], vec![0.0; K]);
        bencher
            .counter(ItemsCount::new(K))
            .bench_local(|| widen_bf16(isa, &src, &mut row));
    }

    #[divan::bench(args = isas())]
    fn widen_f16_row(bencher: Bencher, isa: Isa) {
        let (src, mut row) = (vec![63; 2 * K], vec![0.0; K]);
        bencher
            .counter(ItemsCount::new(K))
            .bench_local(|| widen_f16(isa, &src, &mut row));
    }

    #[divan::bench(args = isas())]
    fn narrow_bf16_row(bencher: Bencher, isa: Isa) {
        let (row, mut out) = (weights(K), vec![0; 2 * K]);
        bencher
            .counter(ItemsCount::new(K))
            .bench_local(|| narrow_bf16(isa, &row, &mut out));
    }

    #[divan::bench(args = isas())]
    fn narrow_f16_row(bencher: Bencher, isa: Isa) {
        let (row, mut out) = (weights(K), vec![0; 2 * K]);
        bencher
            .counter(ItemsCount::new(K))
            .bench_local(|| narrow_f16(isa, &row, &mut out));
    }

    #[divan::bench(args = isas())]
    fn absmax_row(bencher: Bencher, isa: Isa) {
        let row = weights(K);
        bencher
            .counter(ItemsCount::new(K))
            .bench_local(|| absmax(isa, &row));
    }

    #[divan::bench(args = isas())]
    fn absmax_groups_64(bencher: Bencher, isa: Isa) {
        let (row, mut out) = (weights(K), vec![0.0; K / 64]);
        bencher
            .counter(ItemsCount::new(K))
            .bench_local(|| absmax_groups(isa, &row, 64, &mut out));
    }

    #[divan::bench(args = isas())]
    fn minmax_row(bencher: Bencher, isa: Isa) {
        let row = weights(K);
        bencher
            .counter(ItemsCount::new(K))
            .bench_local(|| minmax(isa, &row));
    }

    #[divan::bench(args = isas())]
    fn minmax_groups_64(bencher: Bencher, isa: Isa) {
        let (row, mut mins, mut maxs) = (weights(K), vec![0.0; K / 64], vec![0.0; K / 64]);
        bencher
            .counter(ItemsCount::new(K))
            .bench_local(|| minmax_groups(isa, &row, 64, &mut mins, &mut maxs));
    }

    #[divan::bench(args = isas())]
    fn round_codes_row(bencher: Bencher, isa: Isa) {
        let (row, mut codes) = (weights(K), vec![0; K]);
        bencher
            .counter(ItemsCount::new(K))
            .bench_local(|| round_codes(isa, &row, 1270.0, 128, 1, 255, &mut codes));
    }

    #[divan::bench(args = isas(), consts = [64, 128])]
    fn round_codes_in_groups<const GROUP: usize>(bencher: Bencher, isa: Isa) {
        let (row, mut codes) = (weights(K), vec![0; K]);
        let (inv_scales, zeros) = (vec![70.0; K / GROUP], vec![8.0; K / GROUP]);
        bencher.counter(ItemsCount::new(K)).bench_local(|| {
            round_codes_groups(isa, &row, GROUP, &inv_scales, &zeros, (0, 15), &mut codes);
        });
    }

    #[divan::bench(args = isas())]
    fn pack_nibbles_row(bencher: Bencher, isa: Isa) {
        let (codes, mut out) = (vec![9; K], vec![0; K / 2]);
        bencher
            .counter(ItemsCount::new(K))
            .bench_local(|| pack_nibbles(isa, &codes, &mut out));
    }

    #[divan::bench(args = isas())]
    fn unpack_nibbles_row(bencher: Bencher, isa: Isa) {
        let (packed, mut codes) = (vec![0x97; K / 2], vec![0; K]);
        bencher
            .counter(ItemsCount::new(K))
            .bench_local(|| unpack_nibbles(isa, &packed, &mut codes));
    }

    #[divan::bench(args = isas())]
    fn pack_crumbs_row(bencher: Bencher, isa: Isa) {
        let (codes, mut out) = (vec![2; K], vec![0; K / 4]);
        bencher
            .counter(ItemsCount::new(K))
            .bench_local(|| pack_crumbs(isa, &codes, &mut out));
    }
}
