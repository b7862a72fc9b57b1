//! Attention against the reference in f64 and the processor, at sizes around those of tiles and chunks, in every width that has a
//! kernel of its own and some that have none.

use std::ops::Range;

use qtool_kernels::backend::{Heads, Segment};
use qtool_kernels::reference::forward as reference;
use qtool_kernels::{Backend, CpuBackend, CudaBackend};

use crate::{assert_close, both, numbers, values};

/// Half a unit in the last place of f32.
const HALF_ULP: f64 = 1.0 / (1u64 << 24) as f64;

fn segment(queries: Range<usize>, prefix: Range<usize>, own: Range<usize>) -> Segment {
    Segment { queries, prefix, own }
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

struct Case {
    heads: Heads,
    segments: Vec<Segment>,
    rows: usize,
    keys: usize,
}

impl Case {
    /// Sequences of these lengths behind a prefix, each with keys of its own.
    fn batch(heads: Heads, lengths: &[usize], prefix: usize) -> Self {
        let (mut at, mut segments) = (0, Vec::new());
        for &len in lengths {
            segments.push(segment(at..at + len, 0..prefix, prefix + at..prefix + at + len));
            at += len;
        }
        Self {
            heads,
            segments,
            rows: at,
            keys: prefix + at,
        }
    }

    /// q, keys and values. Every fourth has scores of several hundred, whose softmax is nearly one of a single key.
    fn inputs(&self, seed: u64) -> [Vec<f32>; 3] {
        let size = if seed.is_multiple_of(4) { 12.0 } else { 1.0 };
        let drawn = |n: u64, count: usize, size: f32| -> Vec<f32> {
            numbers(3 * seed + n, count).iter().map(|x| x * size).collect()
        };
        let width = self.heads.kv * self.heads.dim;
        [
            drawn(1, self.rows * self.heads.query * self.heads.dim, size),
            drawn(2, self.keys * width, size),
            drawn(3, self.keys * width, 1.0),
        ]
    }

    fn on<B: Backend>(&self, backend: &B, [q, keys, values_]: &[Vec<f32>; 3]) -> Vec<f32> {
        let up = |x: &[f32], heads: usize| backend.upload(x, heads * self.heads.dim);
        let y = backend.attention(
            &up(q, self.heads.query),
            &up(keys, self.heads.kv),
            &up(values_, self.heads.kv),
            &self.segments,
            self.heads,
        );
        values(backend, &y)
    }
}

fn check(gpu: &CudaBackend, cpu: &CpuBackend, case: &Case, seed: u64) -> usize {
    let inputs = case.inputs(seed);
    let (heads, [q, keys, values_]) = (case.heads, &inputs);
    let (truth, magnitudes) = reference::attention(q, keys, values_, &case.segments, heads);
    let (there, here) = (case.on(gpu, &inputs), case.on(cpu, &inputs));
    assert_eq!((there.len(), here.len()), (truth.len(), truth.len()));
    for (at, y) in there.iter().enumerate() {
        // A score is off by (D + 3) roundings of the sum behind it, which moves a share by twice as much; exponentials, sums over
        // keys and products add theirs. Values are at most 1.
        let score = 2.0 * (heads.dim + 3) as f64 * magnitudes[at / heads.dim];
        let bound = HALF_ULP * (2.0 * score + 2.0 * case.keys as f64 + 24.0);
        let off = (f64::from(*y) - truth[at]).abs();
        assert!(
            off <= bound,
            "case {seed}, {heads:?}, {:?}: value {at} is {y}, expected {}, bound {bound:e}",
            case.segments,
            truth[at]
        );
    }
    // Scores of several hundred turn roundings into more.
    let bound = if seed.is_multiple_of(4) { 2e-3 } else { 1e-5 };
    assert_close(&there, &here, bound, &format!("case {seed}, {heads:?}"));
    there.len()
}

#[test]
fn attention_is_within_the_bound_and_the_processors() {
    let Some((gpu, cpu)) = both("attention_is_within_the_bound_and_the_processors") else {
        return;
    };
    let (mut seed, mut checked) = (0, 0);
    for causal in [true, false] {
        for (query, kv, dim) in [
            (1, 1, 64),
            (3, 1, 64),
            (8, 1, 16),
            (9, 3, 20),
            (4, 2, 80),
            (16, 2, 128),
            (2, 2, 96),
            (2, 1, 256),
            (130, 1, 8),
            (4, 2, 34),
        ] {
            let heads = heads(query, kv, dim, causal);
            let mut cases = vec![
                Case::batch(heads, &[1, 31, 0, 33], 0),
                Case::batch(heads, &[2, 63], 65),
                // More queries than keys of their own: the first see the prefix alone, or nothing. A row of no segment.
                Case {
                    heads,
                    segments: vec![segment(0..5, 0..3, 3..5), segment(5..9, 0..0, 3..5)],
                    rows: 10,
                    keys: 5,
                },
                // Answers behind a prompt that is not the first row, not in the order of their rows; and a query of nothing.
                Case {
                    heads,
                    segments: vec![
                        segment(5..12, 3..73, 75..82),
                        segment(0..5, 3..73, 82..87),
                        segment(12..12, 3..73, 87..87),
                        segment(12..14, 0..0, 0..0),
                    ],
                    rows: 14,
                    keys: 90,
                },
            ];
            // New tokens after a cache of which some rows are not filled yet.
            for (new, filled) in [(1, 129), (1, 64), (3, 127), (17, 65)] {
                cases.push(Case {
                    heads,
                    segments: vec![segment(0..new, 0..0, 2..2 + filled)],
                    rows: new,
                    keys: filled + 9,
                });
            }
            if query <= 16 {
                cases.push(Case::batch(heads, &[64, 65], 0));
                cases.push(Case::batch(heads, &[127, 1, 129], 1));
            }
            for case in &cases {
                checked += check(&gpu, &cpu, case, seed);
                seed += 1;
            }
        }
    }
    assert!(seed > 150 && checked > 500_000, "{seed} cases, {checked} values");
}

/// What runs beside a row must not show in it: batches are cut by the memory there is.
#[test]
fn a_row_does_not_depend_on_its_neighbours() {
    let Some((gpu, _)) = both("a_row_does_not_depend_on_its_neighbours") else {
        return;
    };
    for (query, kv, dim) in [(8, 2, 128), (3, 1, 64), (4, 4, 80), (2, 1, 256)] {
        let heads = heads(query, kv, dim, true);
        let whole = Case::batch(heads, &[70, 3, 1, 130], 41);
        let inputs = whole.inputs(1);
        let together = whole.on(&gpu, &inputs);
        assert!(together.iter().all(|x| *x != 0.0));
        for one in &whole.segments {
            // Alone, and its last query by itself, as the kernel for few rows has it.
            let last = segment(
                one.queries.end - 1..one.queries.end,
                one.prefix.clone(),
                one.own.clone(),
            );
            for part in [one.clone(), last] {
                let range = part.queries.start * query * dim..part.queries.end * query * dim;
                let alone = Case {
                    segments: vec![part],
                    ..Case::batch(heads, &[70, 3, 1, 130], 41)
                };
                let alone = alone.on(&gpu, &inputs);
                assert!(alone[range.clone()] == together[range], "{query} {kv} {dim}");
            }
        }
    }
}
