//! Everything that is no product.

use qtool_kernels::Backend;
use qtool_kernels::backend::{Activation, Heads, RopeStyle, RopeTable, Segment};

use crate::{CLOSE, SIZES, assert_close, both, numbers, values};

/// Calls `with` for both backends' results of one input (rows, columns).
fn compare(test: &str, mut with: impl FnMut(&dyn Fn(&str, Pair<'_>))) {
    let Some((gpu, cpu)) = both(test) else { return };
    let cases = std::cell::Cell::new(0);
    with(&|what, pair| {
        let left = (pair.gpu)(&gpu);
        let right = (pair.cpu)(&cpu);
        assert_close(&left, &right, pair.bound, what);
        cases.set(cases.get() + 1);
    });
    assert!(cases.get() > 1, "{test} compared nothing");
}

/// The same computation on both.
struct Pair<'a> {
    gpu: &'a dyn Fn(&qtool_kernels::CudaBackend) -> Vec<f32>,
    cpu: &'a dyn Fn(&qtool_kernels::CpuBackend) -> Vec<f32>,
    bound: f32,
}

/// Compares one generic computation on both backends.
macro_rules! same {
    ($check:expr, $what:expr, $bound:expr, |$backend:ident| $body:expr) => {
        $check(
            &$what,
            Pair {
                gpu: &|$backend| $body,
                cpu: &|$backend| $body,
                bound: $bound,
            },
        )
    };
}

#[test]
fn functions_of_one_number() {
    compare("functions_of_one_number", |check| {
        let mut x = numbers(3, 4000);
        x.iter_mut()
            .enumerate()
            .for_each(|(i, x)| *x *= (1 + i % 40) as f32 * 0.5);
        x.extend([0.0, -0.0, 30.0, -30.0, 100.0, -100.0, 1e-20, -1e-20, 3.0e4]);
        let up = numbers(4, x.len());
        for f in [
            Activation::Silu,
            Activation::Gelu,
            Activation::GeluTanh,
            Activation::Relu,
            Activation::Tanh,
        ] {
            // Parts of a size, so that the bound is relative to values of that size.
            for (part, (x, up)) in x.chunks(40).zip(up.chunks(40)).enumerate() {
                same!(check, format!("{f:?} of part {part}"), CLOSE, |b| {
                    let mut x = b.upload(x, 1);
                    b.activate(&mut x, f);
                    values(b, &x)
                });
                same!(check, format!("gate {f:?} of part {part}"), CLOSE, |b| {
                    let mut x = b.upload(x, x.len());
                    b.gate(&mut x, &b.upload(up, up.len()), f);
                    values(b, &x)
                });
            }
        }
    });
}

#[test]
fn norms_sums_and_rows() {
    compare("norms_sums_and_rows", |check| {
        for k in SIZES {
            let (rows, x) = (5, numbers(k as u64, 5 * k));
            let (gain, bias) = (numbers(1, k), numbers(2, k));
            same!(check, format!("rms norm of {k}"), CLOSE, |b| {
                values(b, &b.rms_norm(&b.upload(&x, k), &b.upload(&gain, k), 1e-5))
            });
            same!(check, format!("rms norm of stretches of {k}"), CLOSE, |b| {
                values(b, &b.rms_norm(&b.upload(&x, 5 * k), &b.upload(&gain, k), 1e-5))
            });
            same!(check, format!("layer norm of {k}"), 2.0 * CLOSE, |b| {
                values(
                    b,
                    &b.layer_norm(&b.upload(&x, k), &b.upload(&gain, k), &b.upload(&bias, k), 1e-12),
                )
            });
            same!(check, format!("bias of {k}"), 0.0, |b| {
                let mut y = b.upload(&x, k);
                b.add(&mut y, &b.upload(&bias, k));
                b.add(&mut y, &b.upload(&x, k));
                values(b, &y)
            });
            same!(check, format!("gather rows of {k}"), 0.0, |b| {
                values(b, &b.gather(&b.upload(&x, k), &[4, 0, 4, 2]))
            });
            same!(check, format!("scatter rows of {k}"), CLOSE, |b| {
                let mut y = b.upload(&x, k);
                let part = b.gather(&b.upload(&x, k), &[0, 1, 2]);
                b.scatter_add(&mut y, &[4, 1, 4], &part, &[0.5, -2.0, 0.25]);
                values(b, &y)
            });
            same!(check, format!("scatter rows of {k}, none twice"), CLOSE, |b| {
                let mut y = b.upload(&x, k);
                let part = b.gather(&b.upload(&x, k), &[0, 1, 2]);
                b.scatter_add(&mut y, &[4, 1, 0], &part, &[0.5, -2.0, 0.25]);
                values(b, &y)
            });
            same!(check, format!("place rows of {k}"), 0.0, |b| {
                let mut y = b.upload(&vec![0.0; (rows + 3) * k], k);
                b.place(&mut y, 2, &b.upload(&x, k));
                values(b, &y)
            });
        }
    });
}

#[test]
fn heads_turned_and_attended() {
    compare("heads_turned_and_attended", |check| {
        for (query, kv, dim) in [(1, 1, 2), (4, 2, 34), (6, 1, 64), (2, 2, 130), (9, 3, 64)] {
            let (rows, half) = (9, dim / 2);
            let x = numbers(dim as u64, rows * query * dim);
            let angles = numbers(7, 40 * half);
            for style in [RopeStyle::Halves, RopeStyle::Pairs] {
                let table = RopeTable {
                    style,
                    half,
                    cos: angles.iter().map(|a| a.cos()).collect(),
                    sin: angles.iter().map(|a| a.sin()).collect(),
                };
                let positions: Vec<u32> = (0..rows as u32).map(|i| i * 4 % 37).collect();
                same!(check, format!("rope {style:?} of {query} x {dim}"), CLOSE, |b| {
                    let mut y = b.upload(&x, query * dim);
                    b.rope(&mut y, &positions, &table);
                    values(b, &y)
                });
            }
            for causal in [true, false] {
                let heads = Heads {
                    query,
                    kv,
                    dim,
                    scale: 1.0 / (dim as f32).sqrt(),
                    causal,
                };
                // Sequences of unequal length; keys of a shared prefix; a cache that is longer than the queries.
                let segments = [
                    Segment {
                        queries: 0..1,
                        prefix: 0..0,
                        own: 0..1,
                    },
                    Segment {
                        queries: 1..4,
                        prefix: 0..0,
                        own: 10..13,
                    },
                    Segment {
                        queries: 4..6,
                        prefix: 20..170,
                        own: 13..15,
                    },
                    Segment {
                        queries: 6..9,
                        prefix: 0..0,
                        own: 170..310,
                    },
                ];
                let (keys, values_) = (numbers(11, 310 * kv * dim), numbers(12, 310 * kv * dim));
                same!(check, format!("attention {heads:?}"), 2.0 * CLOSE, |b| {
                    let y = b.attention(
                        &b.upload(&x, query * dim),
                        &b.upload(&keys, kv * dim),
                        &b.upload(&values_, kv * dim),
                        &segments,
                        heads,
                    );
                    values(b, &y)
                });
            }
        }
    });
}

/// Tables and positions that are sent once are told apart by what they hold, not by where they lie.
#[test]
fn a_table_that_changed_is_sent_again() {
    compare("a_table_that_changed_is_sent_again", |check| {
        let (rows, half) = (5, 4);
        let x = numbers(3, rows * 16);
        let angles = numbers(8, 12 * half);
        let mut table = RopeTable {
            style: RopeStyle::Halves,
            half,
            cos: angles.iter().map(|a| a.cos()).collect(),
            sin: angles.iter().map(|a| a.sin()).collect(),
        };
        let mut positions: Vec<u32> = (0..rows as u32).collect();
        // More tables than are kept; the last of them is the first again.
        for round in 0..24 {
            if round < 23 {
                table.cos[round % half] = 0.01 * round as f32;
                positions[round % rows] = (round % 12) as u32;
            }
            same!(check, format!("round {round}"), CLOSE, |b| {
                let mut y = b.upload(&x, 16);
                b.rope(&mut y, &positions, &table);
                b.rope(&mut y, &positions, &table);
                values(b, &y)
            });
        }
    });
}

/// Results take the place of others, so what a kernel does not write shows.
#[test]
fn every_number_of_a_result_is_written() {
    compare("every_number_of_a_result_is_written", |check| {
        for (rows, k) in [(3usize, 65usize), (40, 130)] {
            let (x, gain) = (numbers(1, rows * k), numbers(2, k));
            let weight = crate::products::dense(qtool_formats::FloatDtype::Bf16, 33, k);
            let ids: Vec<u32> = (0..rows as u32).map(|i| i % 33).collect();
            same!(check, format!("{rows} x {k}"), 4.0 * CLOSE, |b| {
                let leave = |rows: usize, columns: usize| {
                    drop([0; 3].map(|_| b.upload(&vec![f32::NAN; rows * columns], columns)));
                };
                let there = b.weight(&weight);
                let mut all = Vec::new();
                leave(rows, k);
                let normed = b.rms_norm(&b.upload(&x, k), &b.upload(&gain, k), 1e-5);
                leave(rows, k);
                let embedded = b.embed(&there, &ids);
                leave(rows, 33);
                let product = b.matmul(&normed, &there);
                leave(rows, 33);
                let gathered = b.gather(&product, &vec![0; rows]);
                leave(rows + 1, k);
                let zeros = b.zeros(rows + 1, k);
                for tensor in [normed, embedded, product, gathered, zeros] {
                    all.extend(values(b, &tensor));
                }
                all
            });
        }
    });
}

#[test]
fn nothing_is_nothing() {
    let Some((gpu, _)) = both("nothing_is_nothing") else {
        return;
    };
    let empty = gpu.upload(&[], 8);
    assert_eq!(gpu.dims(&empty), (0, 8));
    let mut none = gpu.gather(&empty, &[]);
    gpu.activate(&mut none, Activation::Silu);
    assert_eq!(values(&gpu, &none), Vec::<f32>::new());
}
