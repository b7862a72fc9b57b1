//! Norms, rotary embedding, activations and the small movements of rows, against the naive ones.

use qtool_kernels::backend::{Activation, Backend, RopeStyle, RopeTable};
use qtool_kernels::reference::forward as reference;
use qtool_kernels::{CpuBackend, Isa, IsaKind, Matrix, log_sum_exp};

use crate::{Random, assert_same};

/// Half a unit in the last place of f32.
const HALF_ULP: f64 = 1.0 / (1u64 << 24) as f64;

/// An activation, as a share of the larger of 1 and its value: measured at 1.2e-7 for GELU, whose polynomial is off
/// by 9.6e-8 (`kernels/cpu/functions.rs`), and less for the others.
const ACTIVATION: f64 = 2.5e-7;

const ROWS: [usize; 6] = [0, 1, 2, 31, 33, 129];
const COLUMNS: [usize; 7] = [1, 15, 31, 64, 127, 576, 900];

fn numbers(n: usize, size: f32, random: &mut Random) -> Vec<f32> {
    (0..n).map(|_| random.unit() * size).collect()
}

/// Runs `f` on every instruction set; AVX2 and AVX-512 must give the same bits.
fn everywhere(what: &str, f: impl Fn(&CpuBackend) -> Matrix, mut check: impl FnMut(&[f32], Isa)) {
    let mut wide: Vec<Vec<f32>> = Vec::new();
    for isa in Isa::available() {
        let backend = CpuBackend::new(isa);
        let y = backend.download(&f(&backend));
        check(&y, isa);
        if isa.kind() != IsaKind::Portable {
            wide.push(y);
        }
    }
    for pair in wide.windows(2) {
        assert_same(&pair[0], &pair[1], what);
    }
}

#[test]
fn norms() {
    let mut random = Random(21);
    let mut cases = 0;
    for rows in ROWS {
        for columns in COLUMNS {
            for (size, eps, shift) in [
                (1.0f32, 1e-5f32, 0.0f32),
                (1e-4, 1e-6, 0.0),
                (300.0, 1e-5, 0.0),
                (1.0, 1e-5, 50.0),
            ] {
                let mut x = numbers(rows * columns, size, &mut random);
                x.iter_mut().for_each(|x| *x += shift);
                if rows > 2 {
                    x[columns..2 * columns].fill(0.0);
                }
                let gain = numbers(columns, 2.0, &mut random);
                let bias = numbers(columns, 2.0, &mut random);
                // K additions, and the few steps behind them; a mean that cancels leaves the rounding of the values.
                let steps = (columns + 16) as f64 * HALF_ULP;
                let truth = reference::rms_norm(&x, &gain, eps);
                everywhere(
                    "rms norm",
                    |b| b.rms_norm(&b.upload(&x, columns), &b.upload(&gain, columns), eps),
                    |y, isa| {
                        for (y, truth) in y.iter().zip(&truth) {
                            assert!(
                                (f64::from(*y) - truth).abs() <= steps * truth.abs(),
                                "{rows} x {columns} on {isa}: {y} and {truth}"
                            );
                        }
                        assert_eq!(y.len(), truth.len());
                        cases += 1;
                    },
                );
                let truth = reference::layer_norm(&x, &gain, &bias, eps);
                let reach: Vec<f64> = x
                    .chunks_exact(columns)
                    .flat_map(|row| {
                        let count = columns as f64;
                        let mean = row.iter().map(|&x| f64::from(x)).sum::<f64>() / count;
                        let variance =
                            row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / count;
                        let top = row.iter().fold(0f32, |top, x| top.max(x.abs()));
                        vec![f64::from(top) / (variance + f64::from(eps)).sqrt(); columns]
                    })
                    .collect();
                everywhere(
                    "layer norm",
                    |b| {
                        let (gain, bias) = (b.upload(&gain, columns), b.upload(&bias, columns));
                        b.layer_norm(&b.upload(&x, columns), &gain, &bias, eps)
                    },
                    |y, isa| {
                        for (at, (y, truth)) in y.iter().zip(&truth).enumerate() {
                            let bound = steps * (2.0 * reach[at] + truth.abs() + 2.0);
                            assert!(
                                (f64::from(*y) - truth).abs() <= bound,
                                "{rows} x {columns}, {size} about {shift} on {isa}: {y} and {truth}"
                            );
                        }
                        assert_eq!(y.len(), truth.len());
                        cases += 1;
                    },
                );
            }
        }
    }
    assert!(cases >= ROWS.len() * COLUMNS.len() * 8);
}

/// A gain shorter than a row norms each stretch by itself.
#[test]
fn heads_are_normed_one_by_one() {
    let mut random = Random(22);
    let (x, gain) = (
        numbers(5 * 3 * 20, 2.0, &mut random),
        numbers(20, 1.0, &mut random),
    );
    let backend = CpuBackend::new(Isa::best());
    let gain = backend.upload(&gain, 20);
    let rows = backend.rms_norm(&backend.upload(&x, 60), &gain, 1e-6);
    let heads = backend.rms_norm(&backend.upload(&x, 20), &gain, 1e-6);
    assert_same(&backend.download(&rows), &backend.download(&heads), "heads");
}

#[test]
fn rotary_embedding_of_both_styles() {
    let mut random = Random(23);
    let mut cases = 0;
    for style in [RopeStyle::Halves, RopeStyle::Pairs] {
        for (heads, half) in [(1, 1), (3, 4), (2, 16), (9, 32), (5, 31)] {
            for rows in ROWS {
                let columns = heads * 2 * half;
                let angles = numbers(200 * half, 3.2, &mut random);
                let table = RopeTable {
                    style,
                    half,
                    cos: angles.iter().map(|a| a.cos()).collect(),
                    sin: angles.iter().map(|a| a.sin()).collect(),
                };
                let positions: Vec<u32> = (0..rows).map(|_| random.below(200) as u32).collect();
                let x = numbers(rows * columns, 4.0, &mut random);
                let truth = reference::rope(&x, columns, &positions, &table);
                everywhere(
                    "rope",
                    |b| {
                        let mut x = b.upload(&x, columns);
                        b.rope(&mut x, &positions, &table);
                        x
                    },
                    |y, isa| {
                        for (y, truth) in y.iter().zip(&truth) {
                            // Two products and a sum of numbers up to 4.
                            let off = (f64::from(*y) - truth).abs();
                            assert!(
                                off <= 16.0 * HALF_ULP,
                                "{style:?} {heads} x {half} on {isa}: {off:e}"
                            );
                        }
                        assert_eq!(y.len(), truth.len());
                        cases += 1;
                    },
                );
            }
        }
    }
    assert!(cases >= 2 * 5 * ROWS.len());
}

const ACTIVATIONS: [Activation; 5] = [
    Activation::Silu,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Relu,
    Activation::Tanh,
];

#[test]
fn activations_and_gates() {
    let mut random = Random(24);
    // Evenly spaced, tiny, huge, and random.
    let mut x: Vec<f32> = (-40_000..40_000).map(|i| i as f32 / 2000.0).collect();
    for exponent in -40..=30 {
        x.extend([1.5, -1.5].map(|m| m * 10f32.powi(exponent)));
    }
    x.extend([0.0, -0.0, 88.0, -88.0, 104.0, -104.0, -87.3, 1e30, -1e30]);
    x.extend(numbers(10_001, 12.0, &mut random));
    let up = numbers(x.len(), 3.0, &mut random);
    let mut cases = 0;
    for f in ACTIVATIONS {
        let one = |x: f32, y: f32, isa: Isa| {
            let truth = reference::activation(f, x);
            let off = (f64::from(y) - truth).abs();
            assert!(
                off <= ACTIVATION * truth.abs().max(1.0),
                "{f:?}({x}) on {isa}: {y}, not {truth}"
            );
            truth
        };
        everywhere(
            "activation",
            |b| {
                let mut y = b.upload(&x, 1);
                b.activate(&mut y, f);
                y
            },
            |y, isa| {
                assert_eq!(y.len(), x.len());
                for (x, y) in x.iter().zip(y) {
                    one(*x, *y, isa);
                }
                cases += 1;
            },
        );
        everywhere(
            "gate",
            |b| {
                let mut y = b.upload(&x, 1);
                b.gate(&mut y, &b.upload(&up, 1), f);
                y
            },
            |y, isa| {
                for ((x, up), y) in x.iter().zip(&up).zip(y) {
                    let truth = reference::activation(f, *x);
                    let bound = (ACTIVATION * truth.abs().max(1.0) + HALF_ULP * truth.abs()) * 3.0;
                    let off = (f64::from(*y) - truth * f64::from(*up)).abs();
                    assert!(off <= bound, "{f:?}({x}) * {up} on {isa}: {y}");
                }
                cases += 1;
            },
        );
        // What is not a number stays so, in every lane.
        let mut bad = vec![1.0; 19];
        (bad[3], bad[17]) = (f32::NAN, f32::NAN);
        everywhere(
            "NaN",
            |b| {
                let mut y = b.upload(&bad, 1);
                b.activate(&mut y, f);
                y
            },
            |y, isa| {
                let found: Vec<usize> = (0..19).filter(|&i| y[i].is_nan()).collect();
                assert_eq!(found, [3, 17], "{f:?} on {isa}");
                cases += 1;
            },
        );
    }
    assert!(cases >= 3 * ACTIVATIONS.len());
}

#[test]
fn rows_move_exactly() {
    let mut random = Random(25);
    let mut cases = 0;
    for isa in Isa::available() {
        let b = CpuBackend::new(isa);
        for columns in COLUMNS {
            let x = numbers(33 * columns, 1.0, &mut random);
            let y = numbers(33 * columns, 1.0, &mut random);
            let row = &y[..columns];
            let mut sum = b.upload(&x, columns);
            b.add(&mut sum, &b.upload(&y, columns));
            let expected: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y).collect();
            assert_same(&b.download(&sum), &expected, "sum");
            let mut sum = b.upload(&x, columns);
            b.add(&mut sum, &b.upload(row, columns));
            let expected: Vec<f32> = x.iter().enumerate().map(|(i, x)| x + row[i % columns]).collect();
            assert_same(&b.download(&sum), &expected, "sum with one row");

            let rows = [5, 0, 32, 5];
            let gathered = b.gather(&b.upload(&x, columns), &rows);
            let expected: Vec<f32> = rows
                .iter()
                .flat_map(|r| x[r * columns..][..columns].to_vec())
                .collect();
            assert_same(&b.download(&gathered), &expected, "gather");
            let weights = [0.5, -2.0, 0.25, 1.5];
            let mut into = b.upload(&y, columns);
            b.scatter_add(&mut into, &rows, &gathered, &weights);
            let mut expected = y.clone();
            for (i, (row, weight)) in rows.iter().zip(weights).enumerate() {
                for c in 0..columns {
                    expected[row * columns + c] += weight * b.download(&gathered)[i * columns + c];
                }
            }
            assert_same(&b.download(&into), &expected, "scatter");
            let mut into = b.upload(&y, columns);
            b.place(&mut into, 7, &gathered);
            let mut expected = y.clone();
            expected[7 * columns..11 * columns].copy_from_slice(&b.download(&gathered));
            assert_same(&b.download(&into), &expected, "place");
            cases += 1;
        }
    }
    assert!(cases >= COLUMNS.len());
}

#[test]
fn logarithms_of_sums_of_exponentials() {
    let mut random = Random(26);
    let mut cases = 0;
    for n in [1, 15, 16, 17, 63, 64, 65, 127, 129, 1000, 49_152] {
        for (size, shift) in [
            (1.0f32, 0.0f32),
            (30.0, 0.0),
            (5.0, 1e4),
            (0.0, -3.0),
            (300.0, -1e3),
        ] {
            let mut x = numbers(n, size, &mut random);
            x.iter_mut().for_each(|x| *x += shift);
            let truth = reference::log_sum_exp(&x);
            for isa in Isa::available() {
                let off = (log_sum_exp(isa, &x) - truth).abs();
                assert!(off <= 1e-6, "{n} of {size} about {shift} on {isa}: {off:e}");
                cases += 1;
            }
        }
    }
    assert_eq!(log_sum_exp(Isa::best(), &[]), f64::NEG_INFINITY);
    assert!(cases >= 11 * 5);
}
