//! Products with weights in every form, against sums in f64 over the weights as their definition decodes them.

use qtool_kernels::backend::Backend;
use qtool_kernels::reference::forward as reference;
use qtool_kernels::{CpuBackend, Isa, IsaKind};

use crate::weights::{FORMS, weight};
use crate::{Random, assert_same};

/// Of a sum of K products, as a share of K times the sum of their magnitudes: half a unit in the last place of f32
/// for each product and each addition, whatever the order (Higham, "Accuracy and Stability of Numerical
/// Algorithms", section 3.1); twice that where products round by themselves.
const DOT: f64 = 2.0 / (1u64 << 24) as f64;

/// Rows of activations: every count the fused loop takes, around the tiles of the other (4, 6, 12), and beyond.
const ROWS: [usize; 14] = [1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 18, 31, 33, 64];

/// (N, K): around lanes, quads, panels, tiles and blocks.
const SHAPES: [(usize, usize); 14] = [
    (1, 1),
    (31, 31),
    (33, 33),
    (16, 64),
    (17, 80),
    (64, 127),
    (127, 64),
    (97, 128),
    (129, 129),
    (193, 192),
    (40, 768),
    (33, 1600),
    (7, 2048),
    (65, 512),
];

fn activations(m: usize, k: usize, size: f32, random: &mut Random) -> Vec<f32> {
    (0..m * k).map(|_| random.unit() * size).collect()
}

#[test]
fn products_in_every_form_are_within_the_bound() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut cases = 0;
    for form in FORMS {
        let mut shapes = 0;
        for (n, k) in SHAPES {
            let Some(host) = weight(form, n, k, 0.05, &mut random) else {
                continue;
            };
            shapes += 1;
            let most = *ROWS.last().unwrap();
            let x = activations(most, k, 3.0, &mut random);
            let (truth, magnitudes) = reference::matmul(&x, &reference::decode(&host), k);
            let mut wide: Vec<Vec<Vec<f32>>> = Vec::new();
            for isa in Isa::available() {
                let backend = CpuBackend::new(isa);
                let device = backend.weight(&host);
                let mut results = Vec::new();
                for m in ROWS {
                    let y = backend.matmul(&backend.upload(&x[..m * k], k), &device);
                    assert_eq!(backend.dims(&y), (m, n));
                    let y = backend.download(&y);
                    for (at, y) in y.iter().enumerate() {
                        let bound = DOT * k as f64 * magnitudes[at];
                        let off = (f64::from(*y) - truth[at]).abs();
                        assert!(
                            off <= bound,
                            "{form} {m} x {n} x {k} on {isa}: {at} is off by {off:e}"
                        );
                    }
                    results.push(y);
                    cases += 1;
                }
                if isa.kind() != IsaKind::Portable {
                    wide.push(results);
                }
            }
            // AVX2 and AVX-512 make the same fused steps in the same order.
            for pair in wide.windows(2) {
                for (a, b) in pair[0].iter().zip(&pair[1]) {
                    assert_same(a, b, form);
                }
            }
        }
        assert!(shapes >= 3, "{form}: {shapes}");
    }
    assert!(cases >= FORMS.len() * 3 * ROWS.len());
}

/// A row's product is the same in any company of its kind: few rows, or many.
#[test]
fn a_row_does_not_depend_on_the_others() {
    let mut random = Random(3);
    let mut cases = 0;
    for form in ["bf16", "w4-zp-g16-f32", "wint2"] {
        let (n, k) = (97, 832);
        let host = weight(form, n, k, 1.0, &mut random).unwrap();
        let x = activations(40, k, 1.0, &mut random);
        for isa in Isa::available() {
            let backend = CpuBackend::new(isa);
            let device = backend.weight(&host);
            let product =
                |m: usize| backend.download(&backend.matmul(&backend.upload(&x[..m * k], k), &device));
            for (least, most) in [(1, 8), (9, 40)] {
                let all = product(most);
                for m in least..most {
                    assert_same(&product(m), &all[..m * n], form);
                    cases += 1;
                }
            }
        }
    }
    assert!(cases >= 3 * 38);
}

#[test]
fn no_thread_count_changes_a_bit() {
    let mut random = Random(4);
    let host = weight("w4-sym-g64-bf16", 1000, 640, 1.0, &mut random).unwrap();
    let x = activations(70, 640, 1.0, &mut random);
    let backend = CpuBackend::new(Isa::best());
    let run = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| {
            let device = backend.weight(&host);
            let product =
                |m: usize| backend.download(&backend.matmul(&backend.upload(&x[..m * 640], 640), &device));
            (product(1), product(70))
        })
    };
    let alone = run(1);
    for threads in [2, 3, 7] {
        assert!(run(threads) == alone, "{threads} threads");
    }
}

#[test]
fn extreme_sizes_and_no_rows_at_all() {
    let mut random = Random(5);
    let mut cases = 0;
    for form in FORMS {
        for size in [1e-30f32, 1e30] {
            let (n, k) = (33, if form.ends_with("-k") { 512 } else { 384 });
            let host = weight(
                form,
                n,
                k,
                if form == "f16" {
                    size.clamp(1e-3, 1e3)
                } else {
                    size
                },
                &mut random,
            )
            .unwrap();
            let x = activations(9, k, 1e-3 / size.clamp(1e-3, 1e3), &mut random);
            let (truth, magnitudes) = reference::matmul(&x, &reference::decode(&host), k);
            for isa in Isa::available() {
                let backend = CpuBackend::new(isa);
                let device = backend.weight(&host);
                for m in [0, 1, 9] {
                    let y = backend.matmul(&backend.upload(&x[..m * k], k), &device);
                    assert_eq!(backend.dims(&y), (m, n));
                    for (at, y) in backend.download(&y).iter().enumerate() {
                        // Below the smallest normal number each step is off by up to half a subnormal one.
                        let bound = DOT * k as f64 * magnitudes[at] + k as f64 * f64::from(f32::from_bits(1));
                        assert!(
                            (f64::from(*y) - truth[at]).abs() <= bound,
                            "{form} {size:e} on {isa}"
                        );
                    }
                    cases += 1;
                }
            }
        }
    }
    assert!(cases >= FORMS.len() * 2 * 3);
}

/// Every decoded value is that of the definition, bit for bit.
#[test]
fn embedding_is_decoding() {
    let mut random = Random(6);
    let mut cases = 0;
    for form in FORMS {
        for (n, k) in SHAPES {
            let Some(host) = weight(form, n, k, 0.3, &mut random) else {
                continue;
            };
            let truth = reference::decode(&host);
            let ids: Vec<u32> = (0..n as u32).rev().chain([0, 0]).collect();
            let expected: Vec<f32> = ids
                .iter()
                .flat_map(|&id| truth[id as usize * k..(id as usize + 1) * k].to_vec())
                .collect();
            for isa in Isa::available() {
                let backend = CpuBackend::new(isa);
                let got = backend.download(&backend.embed(&backend.weight(&host), &ids));
                assert_same(&got, &expected, form);
                cases += 1;
            }
        }
    }
    assert!(cases >= FORMS.len() * 3);
}

#[test]
fn second_moments() {
    let mut random = Random(7);
    let mut cases = 0;
    for (m, k) in [(0, 5), (1, 1), (31, 33), (129, 64), (600, 127), (33, 129)] {
        let x = activations(m, k, 2.0, &mut random);
        let truth = reference::gram(&x, k);
        let sizes = reference::gram(&x.iter().map(|x| x.abs()).collect::<Vec<_>>(), k);
        let backend = CpuBackend::new(Isa::best());
        let mut moment = vec![0.0; k * k];
        backend.gram(&backend.upload(&x, k), &mut moment);
        for ((got, truth), size) in moment.iter().zip(&truth).zip(&sizes) {
            // Sums in f32 are of at most 512 rows.
            assert!((got - truth).abs() <= DOT * m.min(512) as f64 * size, "{m} x {k}");
        }
        cases += 1;
    }
    assert_eq!(cases, 6);
}
