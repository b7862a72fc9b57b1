//! Attention against the naive one: ragged and empty segments, shared prefixes, grouped heads, long sequences.

use std::ops::Range;

use qtool_kernels::backend::{Backend, Heads, Segment};
use qtool_kernels::reference::forward as reference;
use qtool_kernels::{CpuBackend, Isa, IsaKind};

use crate::{Random, assert_same};

/// Half a unit in the last place of f32.
const HALF_ULP: f64 = 1.0 / (1u64 << 24) as f64;

struct Case {
    heads: Heads,
    segments: Vec<Segment>,
    rows: usize,
    keys: usize,
}

fn heads(query: usize, kv: usize, dim: usize, causal: bool) -> Heads {
    Heads {
        query,
        kv,
        dim,
        scale: 1.0 / (dim as f32).sqrt(),
        causal,
    }
}

fn segment(queries: Range<usize>, prefix: Range<usize>, own: Range<usize>) -> Segment {
    Segment { queries, prefix, own }
}

/// Sequences of these lengths, each its own keys.
fn batch(lengths: &[usize], heads: Heads) -> Case {
    let mut at = 0;
    let mut segments = Vec::new();
    for &len in lengths {
        segments.push(segment(at..at + len, 0..0, at..at + len));
        at += len;
    }
    Case {
        heads,
        segments,
        rows: at,
        keys: at,
    }
}

fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    for causal in [true, false] {
        for (query, kv, dim) in [
            (1, 1, 2),
            (3, 1, 64),
            (4, 2, 8),
            (9, 3, 20),
            (2, 2, 80),
            (8, 2, 128),
        ] {
            let heads = heads(query, kv, dim, causal);
            all.push(batch(&[1, 31, 0, 33, 64], heads));
            all.push(batch(&[127, 129], heads));
            all.push(batch(&[300], heads));
            // One new token, three, and forty, after a cache of 290 of which 10 rows are not filled yet.
            for new in [1, 3, 40] {
                all.push(Case {
                    heads,
                    segments: vec![segment(0..new, 0..0, 0..290)],
                    rows: new,
                    keys: 300,
                });
            }
            // Answers that share a prompt of 270 tokens, one of them empty, not in the order of their rows; and a
            // query of nothing.
            all.push(Case {
                heads,
                segments: vec![
                    segment(5..12, 0..270, 275..282),
                    segment(0..5, 0..270, 270..275),
                    segment(12..12, 0..270, 282..282),
                    segment(12..13, 0..270, 282..283),
                    segment(13..15, 0..0, 0..0),
                ],
                rows: 16,
                keys: 290,
            });
            // More queries than keys of their own: the first see the prefix alone, or nothing.
            all.push(Case {
                heads,
                segments: vec![segment(0..5, 0..3, 3..5), segment(5..9, 0..0, 3..5)],
                rows: 9,
                keys: 5,
            });
        }
    }
    all
}

#[test]
fn attention_is_within_the_bound() {
    let mut random = Random(0xabc);
    let mut checked = 0;
    for (number, case) in cases().iter().enumerate() {
        let heads = case.heads;
        // Every fourth case has scores of several hundred, whose softmax is nearly one of a single key.
        let size = if number % 4 == 0 { 12.0 } else { 1.0 };
        let mut numbers =
            |n: usize, size: f32| -> Vec<f32> { (0..n).map(|_| random.unit() * size).collect() };
        let q = numbers(case.rows * heads.query * heads.dim, size);
        let k = numbers(case.keys * heads.kv * heads.dim, size);
        let values = numbers(case.keys * heads.kv * heads.dim, 1.0);
        let (truth, magnitudes) = reference::attention(&q, &k, &values, &case.segments, heads);
        let mut wide: Vec<Vec<f32>> = Vec::new();
        for isa in Isa::available() {
            let backend = CpuBackend::new(isa);
            let up = |x: &[f32], heads: usize| backend.upload(x, heads * case.heads.dim);
            let y = backend.attention(
                &up(&q, heads.query),
                &up(&k, heads.kv),
                &up(&values, heads.kv),
                &case.segments,
                heads,
            );
            let y = backend.download(&y);
            assert_eq!(y.len(), truth.len());
            for (at, y) in y.iter().enumerate() {
                // A score is off by (D + 3) roundings of the sum behind it, which moves a share by twice as much;
                // exponentials, sums over keys (at most 300) and products add theirs. Values are at most 1.
                let score = 2.0 * (heads.dim + 3) as f64 * magnitudes[at / heads.dim];
                let bound = HALF_ULP * (2.0 * score + 2.0 * 300.0 + 16.0);
                let off = (f64::from(*y) - truth[at]).abs();
                assert!(
                    off <= bound,
                    "case {number} on {isa}: {at} is off by {off:e}, bound {bound:e}"
                );
                checked += 1;
            }
            if isa.kind() != IsaKind::Portable {
                wide.push(y);
            }
        }
        for pair in wide.windows(2) {
            assert_same(&pair[0], &pair[1], "AVX2 and AVX-512");
        }
    }
    assert!(checked > 1_000_000, "{checked}");
}

#[test]
fn no_thread_count_changes_a_bit() {
    let mut random = Random(0xdef);
    let heads = heads(9, 3, 64, true);
    let case = batch(&[200, 3, 90], heads);
    let mut numbers = |n: usize| -> Vec<f32> { (0..n).map(|_| random.unit()).collect() };
    let (q, k, values) = (
        numbers(case.rows * 576),
        numbers(case.rows * 192),
        numbers(case.rows * 192),
    );
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let backend = CpuBackend::new(Isa::best());
            let (q, k) = (backend.upload(&q, 576), backend.upload(&k, 192));
            let values = backend.upload(&values, 192);
            backend.download(&backend.attention(&q, &k, &values, &case.segments, heads))
        })
    };
    let alone = run(1);
    assert!(alone.iter().any(|&x| x != 0.0));
    for threads in [2, 3, 7] {
        assert!(run(threads) == alone, "{threads} threads");
    }
}

#[test]
#[should_panic(expected = "share queries")]
fn segments_that_share_queries_are_refused() {
    let backend = CpuBackend::new(Isa::best());
    let x = backend.upload(&[1.0; 8], 2);
    let segments = [segment(0..2, 0..0, 0..2), segment(1..3, 0..0, 0..2)];
    backend.attention(&x, &x, &x, &segments, heads(1, 1, 2, true));
}
