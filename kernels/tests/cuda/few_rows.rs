//! Products of at most 16 rows, against sums in f64: every form at sizes around those of tiles, steps and parts, every number of
//! rows, numbers of every size, and what is not finite.

use half::bf16;
use qtool_formats::packing::wint2::Channel;
use qtool_formats::weight::CcqWeight;
use qtool_formats::{FloatDtype, QuantizedWeight};
use qtool_kernels::backend::HostWeight;
use qtool_kernels::reference::forward::{decode, matmul};
use qtool_kernels::{Backend, CudaBackend};

use crate::products::{affine, ccq, dense, nf4, packed};
use crate::{both, numbers, values};

/// Sums of f32 by 16 to 64 products, of two parts of x that are off by a unit of its last place.
const RELATIVE: f64 = 1.0 / 1_048_576.0;
/// What is left out of x where it is small beside the largest of its row.
const BESIDE_THE_LARGEST: f64 = 1.0 / (1u64 << 46) as f64;

/// A form, and a weight of it of any size that its packs allow: K a multiple of so many columns.
type Made = (&'static str, usize, fn(usize, usize) -> HostWeight);

fn forms() -> Vec<Made> {
    vec![
        ("bf16", 8, |n, k| dense(FloatDtype::Bf16, n, k)),
        ("int8", 16, |n, k| affine("w8-sym-row-bf16", n, k)),
        ("int8 zeros", 16, |n, k| affine("w8-zp-row-f16", n, k)),
        ("int8 zeros by 64", 64, |n, k| affine("w8-zp-g64-f16", n, k)),
        ("int4 by row", 32, |n, k| affine("w4-narrow-row-f32", n, k)),
        ("int4 zeros by row", 32, |n, k| affine("w4-zp-row-bf16", n, k)),
        ("int4 by 128", 128, |n, k| affine("w4-sym-g128-bf16", n, k)),
        ("int4 zeros by 128", 128, |n, k| affine("w4-zp-g128-f16", n, k)),
        ("int4 by 64", 64, |n, k| affine("w4-sym-g64-bf16", n, k)),
        ("int4 zeros by 64", 64, |n, k| affine("w4-zp-g64-bf16", n, k)),
        ("int4 by 32", 32, |n, k| affine("w4-narrow-g32-f16", n, k)),
        ("int4 zeros by 32", 32, |n, k| affine("w4-zp-g32-f16", n, k)),
        ("int4 zeros by 16", 16, |n, k| affine("w4-zp-g16-f16", n, k)),
        ("int4 scales of 32 bits", 64, |n, k| {
            affine("w4-sym-g64-f32", n, k)
        }),
        ("wint2", 64, ccq),
        ("nf4", 64, nf4),
    ]
}

/// The products of `x` by `weight` are those of f64, and the same when they are asked for again.
fn holds(gpu: &CudaBackend, what: &str, weight: &HostWeight, exact: &[f32], x: &[f32]) {
    let (there, up) = (gpu.weight(weight), gpu.upload(x, weight.k));
    let got = values(gpu, &gpu.matmul(&up, &there));
    let again = values(gpu, &gpu.matmul(&up, &there));
    let bits = |x: &[f32]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&got), bits(&again), "{what}, a second time");
    let (expected, magnitudes) = matmul(x, exact, weight.k);
    assert_eq!(got.len(), expected.len(), "{what}");
    let sizes: Vec<f64> = exact
        .chunks_exact(weight.k)
        .map(|row| row.iter().map(|w| f64::from(w.abs())).sum())
        .collect();
    for (i, got) in got.iter().enumerate() {
        let (row, n) = (i / weight.n, i % weight.n);
        let largest = x[row * weight.k..][..weight.k]
            .iter()
            .fold(0f32, |top, x| top.max(x.abs()));
        let bound = magnitudes[i] * RELATIVE + f64::from(largest) * sizes[n] * BESIDE_THE_LARGEST;
        let off = (f64::from(*got) - expected[i]).abs();
        assert!(
            off <= bound.max(1e-42),
            "{what}, row {row}, output {n}: {got}, expected {} within {bound:e}",
            expected[i]
        );
    }
}

#[test]
fn every_form_at_awkward_sizes() {
    let Some((gpu, _)) = both("every_form_at_awkward_sizes") else {
        return;
    };
    let mut count = 0;
    for (form, pack, make) in forms() {
        // One row and one pack; tiles cut off; parts of steps; more columns than fit into a block at once.
        for (n, k) in [(1, 1), (17, 300), (33, 1100), (70, 2600), (300, 260)] {
            let weight = make(n, k.max(pack) / pack * pack);
            let exact = decode(&weight);
            for m in if n == 33 {
                vec![2, 4, 7, 9, 16]
            } else {
                vec![1, 5, 16]
            } {
                let x = numbers((m * 31 + n) as u64, m * weight.k);
                holds(
                    &gpu,
                    &format!("{m} rows times {form} {n} x {}", weight.k),
                    &weight,
                    &exact,
                    &x,
                );
                count += 1;
            }
        }
    }
    assert_eq!(count, forms().len() * 17);
}

#[test]
fn a_row_too_long_for_one_block() {
    let Some((gpu, _)) = both("a_row_too_long_for_one_block") else {
        return;
    };
    for (form, pack, make) in forms() {
        let weight = make(3, 26_000 / pack * pack);
        let exact = decode(&weight);
        let x = numbers(9, 2 * weight.k);
        holds(
            &gpu,
            &format!("one row times {form}"),
            &weight,
            &exact,
            &x[..weight.k],
        );
        holds(&gpu, &format!("two rows times {form}"), &weight, &exact, &x);
    }
}

#[test]
fn every_number_of_rows() {
    let Some((gpu, _)) = both("every_number_of_rows") else {
        return;
    };
    for (form, pack, make) in forms() {
        let weight = make(35, 640usize.next_multiple_of(pack));
        let exact = decode(&weight);
        for m in 1..=16 {
            let x = numbers(m as u64, m * weight.k);
            holds(&gpu, &format!("{m} rows times {form}"), &weight, &exact, &x);
        }
    }
}

#[test]
fn numbers_of_every_size() {
    let Some((gpu, _)) = both("numbers_of_every_size") else {
        return;
    };
    for (form, pack, make) in forms() {
        let weight = make(19, 256usize.next_multiple_of(pack));
        let (k, exact) = (weight.k, decode(&weight));
        let plain = numbers(5, k);
        let sized = |size: fn(usize) -> f32| -> Vec<f32> {
            plain.iter().enumerate().map(|(i, x)| x * size(i)).collect()
        };
        let rows = [
            sized(|_| 1e-30),
            sized(|_| 1e30),
            sized(|i| 2f32.powi(i as i32 % 40 - 20)),
            sized(|i| if i == 100 { 1e30 } else { 1e-30 }),
            sized(|i| if i == 7 { 3000.0 } else { 1e-3 }),
            sized(|_| 0.0),
            sized(|_| -0.0),
            // Numbers whose sum does not cancel, with all bits set.
            plain
                .iter()
                .map(|x| f32::from_bits(x.abs().to_bits() | 0xfff))
                .collect(),
        ];
        // Each alone, and all beside each other: none has to do with the others.
        for (i, row) in rows.iter().enumerate() {
            holds(&gpu, &format!("row {i} times {form}"), &weight, &exact, row);
        }
        holds(
            &gpu,
            &format!("all rows times {form}"),
            &weight,
            &exact,
            &rows.concat(),
        );
    }
}

#[test]
fn what_is_not_finite_stays_so() {
    let Some((gpu, _)) = both("what_is_not_finite_stays_so") else {
        return;
    };
    for (form, pack, make) in forms() {
        let weight = make(18, 192usize.next_multiple_of(pack));
        let (k, exact) = (weight.k, decode(&weight));
        let there = gpu.weight(&weight);
        let mut x = numbers(3, 3 * k);
        (x[70], x[k + 71]) = (f32::NEG_INFINITY, f32::NAN);
        let got = values(&gpu, &gpu.matmul(&gpu.upload(&x, k), &there));
        let (plain, _) = matmul(&x[2 * k..], &exact, k);
        for n in 0..weight.n {
            let infinite = f32::NEG_INFINITY * exact[n * k + 70];
            let same = got[n] == infinite || (got[n].is_nan() && infinite.is_nan());
            assert!(same, "{form}, output {n}: {}, expected {infinite}", got[n]);
            assert!(got[weight.n + n].is_nan(), "{form}, output {n} of a row with NaN");
            let beside = (f64::from(got[2 * weight.n + n]) - plain[n]).abs();
            assert!(
                beside < 1e-3 * k as f64,
                "{form}, output {n} of a row beside them"
            );
        }
    }
}

/// A WINT2 weight with a line of codewords for each row.
fn of_lines(k: usize, lines: &[(f32, f32)]) -> HostWeight {
    let n = lines.len();
    let channel = |&(code_scale, code_zp): &(f32, f32)| Channel {
        super_scale: bf16::from_f32(0.01),
        code_scale,
        code_zp,
    };
    // Every byte is in every row.
    let codes = (0..n * k / 4).map(|i| (i * 37 + i / 256) as u8).collect();
    let locals = (0..n * k / 64).map(|i| (i * 5 % 16) as u8).collect();
    packed(&QuantizedWeight::Ccq(
        CcqWeight::new(k, codes, locals, lines.iter().map(channel).collect()).unwrap(),
    ))
}

#[test]
fn codewords_are_the_formulas_whatever_the_line() {
    let Some((gpu, _)) = both("codewords_are_the_formulas_whatever_the_line") else {
        return;
    };
    let k = 1024;
    // One number of x at a time shows each weight by itself. 0.49999997 is rounded up where 0.5 is added to it, so that level line goes by
    // the formula, and the 15 rows beside it; the last have sums near whole numbers.
    let mut lines: Vec<(f32, f32)> = vec![
        (0.0, 0.499_999_97),
        (1.0, -0.5),
        (-3.25, 1000.0),
        (0.0, 0.0),
        (0.125, 3.0),
    ];
    lines.extend(
        numbers(11, 60)
            .iter()
            .map(|x| (95.0 + 30.0 * x, 1000.0 - 900.0 * x)),
    );
    lines.extend((0..32).map(|i| (128.0 - (i as f32) / 512.0, 0.5 - (i as f32) / 4096.0)));
    let weight = of_lines(k, &lines);
    let (there, exact) = (gpu.weight(&weight), decode(&weight));
    for column in (0..k).step_by(67).chain(1020..1024) {
        let mut x = vec![0f32; 2 * k];
        (x[column], x[k + (column + 511) % k]) = (1.0, -2.0);
        let got = values(&gpu, &gpu.matmul(&gpu.upload(&x, k), &there));
        for (n, line) in lines.iter().enumerate() {
            for (row, (at, by)) in [(column, 1.0), ((column + 511) % k, -2.0)]
                .into_iter()
                .enumerate()
            {
                assert_eq!(
                    got[row * lines.len() + n],
                    by * exact[n * k + at],
                    "row {n}, {line:?}, column {at}"
                );
            }
        }
    }
    let x = numbers(1, 3 * k);
    holds(&gpu, "lines of every kind", &weight, &exact, &x);
}
