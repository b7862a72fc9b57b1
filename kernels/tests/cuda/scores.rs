//! Log-probabilities and divergences on the device against plain f64.

use qtool_kernels::Backend;

use crate::{both, numbers};

fn log_sum(row: &[f32]) -> f64 {
    let top = f64::from(row.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    top + row.iter().map(|&l| (f64::from(l) - top).exp()).sum::<f64>().ln()
}

/// Logits of many sizes: near zero, far apart, far from zero, all the same.
fn logits(seed: u64, v: usize) -> Vec<Vec<f32>> {
    let plain = numbers(seed, v);
    vec![
        plain.iter().map(|x| x * 3.0).collect(),
        plain.iter().map(|x| x * 60.0 - 500.0).collect(),
        plain.iter().map(|x| x * 3000.0).collect(),
        vec![7.0; v],
        plain.iter().map(|x| x * 1e-3 + 1e4).collect(),
    ]
}

#[test]
fn log_probabilities_are_those_of_f64() {
    let Some((gpu, _)) = both("log_probabilities_are_those_of_f64") else {
        return;
    };
    let mut compared = 0;
    for v in [1usize, 2, 31, 33, 127, 255, 257, 1000, 5003] {
        let rows = logits(v as u64, v);
        let there = gpu.upload(&rows.concat(), v);
        let wanted: Vec<Vec<u32>> = (0..rows.len())
            .map(|m| (0..m * 70).map(|i| (i * 37 % v) as u32).collect())
            .collect();
        let found = gpu.log_p(&there, &wanted);
        gpu.fault().unwrap();
        for ((row, tokens), found) in rows.iter().zip(&wanted).zip(&found) {
            let norm = log_sum(row);
            assert_eq!(tokens.len(), found.len());
            for (&t, &found) in tokens.iter().zip(found) {
                let expected = f64::from(row[t as usize]) - norm;
                let bound = 1e-12 * (1.0 + norm.abs());
                assert!(
                    (found - expected).abs() <= bound,
                    "V = {v}: {found}, expected {expected}"
                );
                compared += 1;
            }
        }
    }
    assert!(compared > 3000, "{compared}");
}

#[test]
fn divergences_are_those_of_f64() {
    let Some((gpu, _)) = both("divergences_are_those_of_f64") else {
        return;
    };
    for v in [1usize, 2, 33, 257, 5003] {
        let base = logits(v as u64, v);
        for other in [v as u64, 77] {
            let mut candidate = logits(other, v);
            candidate[2].iter_mut().for_each(|l| *l *= 0.999);
            let targets: Vec<u32> = (0..base.len()).map(|m| (m * 11 % v) as u32).collect();
            let there = (gpu.upload(&base.concat(), v), gpu.upload(&candidate.concat(), v));
            let found = gpu.divergence(&there.0, &there.1, &targets);
            gpu.fault().unwrap();
            for (m, found) in found.iter().enumerate() {
                let (b, c, found) = (&base[m], &candidate[m], found.unwrap());
                let (z, y) = (log_sum(b), log_sum(c));
                let kl: f64 = b
                    .iter()
                    .zip(c)
                    .map(|(&b, &c)| {
                        let ln_p = f64::from(b) - z;
                        ln_p.exp() * (ln_p - (f64::from(c) - y))
                    })
                    .sum();
                let (off, bound) = ((found.kl - kl.max(0.0)).abs(), 1e-12 * (1.0 + z.abs() + kl));
                assert!(off <= bound, "V = {v}, row {m}: {found:?}, expected {kl}");
                let t = targets[m] as usize;
                let delta = (f64::from(c[t]) - y).exp() - (f64::from(b[t]) - z).exp();
                assert!(
                    (found.delta_p - delta).abs() <= bound,
                    "V = {v}: {found:?}, {delta}"
                );
                let first = |row: &[f32]| {
                    let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                    row.iter().position(|&l| l == top)
                };
                assert_eq!(found.agreed, first(b) == first(c), "V = {v}, row {m}");
            }
        }
    }
}

#[test]
fn what_is_not_finite_has_no_score() {
    let Some((gpu, _)) = both("what_is_not_finite_has_no_score") else {
        return;
    };
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = numbers(1, 3 * 300);
        x[300 + 299] = bad;
        let (there, base) = (gpu.upload(&x, 300), gpu.upload(&numbers(1, 900), 300));
        let found = gpu.log_p(&there, &[vec![1], vec![1, 2], vec![1]]);
        let nan: Vec<Vec<bool>> = found
            .iter()
            .map(|row| row.iter().map(|l| l.is_nan()).collect())
            .collect();
        assert_eq!(nan, [vec![false], vec![true; 2], vec![false]], "{bad}");
        for found in [
            gpu.divergence(&base, &there, &[0; 3]),
            gpu.divergence(&there, &base, &[0; 3]),
        ] {
            let some: Vec<bool> = found.iter().map(Option::is_some).collect();
            assert_eq!(some, [true, false, true], "{bad}");
        }
    }
}

#[test]
fn both_devices_say_the_same_of_the_same_logits() {
    let Some((gpu, cpu)) = both("both_devices_say_the_same_of_the_same_logits") else {
        return;
    };
    let mut compared = 0;
    for v in [1usize, 2, 33, 257, 5003] {
        let mut base = logits(v as u64, v);
        let mut candidate: Vec<Vec<f32>> = base
            .iter()
            .map(|row| row.iter().map(|l| l * 0.99).collect())
            .collect();
        // Equal rows, rows that are not finite, rows whose token is not in the vocabulary.
        base.extend([vec![1.0; v], vec![f32::NAN; v], vec![0.0; v], vec![0.0; v]]);
        candidate.extend([vec![1.0; v], vec![0.0; v], vec![f32::INFINITY; v], vec![1.0; v]]);
        let mut targets: Vec<u32> = (0..base.len()).map(|m| (m * 11 % v) as u32).collect();
        *targets.last_mut().unwrap() = v as u32;
        let here = (cpu.upload(&base.concat(), v), cpu.upload(&candidate.concat(), v));
        let there = (gpu.upload(&base.concat(), v), gpu.upload(&candidate.concat(), v));
        let expected = cpu.divergences(&here.0, &here.1, &targets);
        let found = gpu.divergences(&there.0, &there.1, &targets);
        gpu.fault().unwrap();
        assert_eq!((found.len(), expected.len()), (base.len(), base.len()));
        for (m, (found, expected)) in found.iter().zip(&expected).enumerate() {
            assert_eq!(found.is_some(), expected.is_some(), "V = {v}, row {m}");
            let Some((found, expected)) = found.zip(*expected) else {
                continue;
            };
            let bound = 1e-12 * (1.0 + log_sum(&base[m]).abs() + expected.kl);
            assert!(
                (found.kl - expected.kl).abs() <= bound,
                "V = {v}, row {m}: {found:?} {expected:?}"
            );
            assert!(
                (found.delta_p - expected.delta_p).abs() <= bound,
                "V = {v}, row {m}: {found:?} {expected:?}"
            );
            assert_eq!(found.agreed, expected.agreed, "V = {v}, row {m}");
            compared += 1;
        }
        assert_eq!(expected[expected.len() - 3..], [None, None, None], "V = {v}");
    }
    assert_eq!(compared, 5 * 6);
}
