//! The encoder against brute force in f64, and at its corners.

use half::bf16;
use qtool_formats::packing::wint2::{self, Arithmetic};
use qtool_kernels::Isa;

use super::pairs::PAIRS;
use super::*;

/// Deterministic, nearly Gaussian numbers: sums of twelve uniform ones.
fn gaussian(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed;
    let mut uniform = move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / 16_777_216.0
    };
    (0..count)
        .map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0)
        .collect()
}

fn encode(x: &[f32], weights: Option<&[f32]>, effort: Effort) -> CcqRow {
    encode_row(x, weights, effort, Isa::best(), &mut Scratch::default()).unwrap()
}

fn decode(row: &CcqRow) -> Vec<f32> {
    let mut out = vec![bf16::NAN; row.local.len() * 64];
    decode_row(row, Arithmetic::Gemm, &mut out).unwrap();
    out.iter().map(|x| x.to_f32()).collect()
}

/// The objective in f64, of what the serving arithmetic decodes.
fn error(x: &[f32], weights: Option<&[f32]>, row: &CcqRow) -> f64 {
    let weight = |k: usize| weights.map_or(1.0, |w| f64::from(w[k]));
    let pairs = x.iter().zip(decode(row)).enumerate();
    pairs
        .map(|(k, (x, y))| weight(k) * (f64::from(*x) - f64::from(y)).powi(2))
        .sum()
}

fn energy(x: &[f32]) -> f64 {
    x.iter().map(|x| f64::from(*x).powi(2)).sum()
}

/// The slow reference: for the row's own pair and scales, the byte of least error of each four weights by
/// trying all 256 in f64, lowest byte on ties.
fn reference_codes(x: &[f32], weights: Option<&[f32]>, row: &CcqRow) -> Vec<u8> {
    let book = wint2::codebook(row.code_scale, row.code_zp, Arithmetic::Unzip);
    let nearest = |r: usize| {
        let scale = f64::from(row.local[r / 16]) * row.super_scale.to_f64();
        let cost = |byte: usize| -> f64 {
            let term = |i: usize| {
                let k = 4 * r + i;
                let w = weights.map_or(1.0, |w| f64::from(w[k]));
                w * (f64::from(x[k]) - f64::from(book[byte][i]) * scale).powi(2)
            };
            (0..4).map(term).sum()
        };
        (1..256)
            .fold((0, cost(0)), |best, byte| {
                if cost(byte) < best.1 {
                    (byte, cost(byte))
                } else {
                    best
                }
            })
            .0 as u8
    };
    (0..x.len() / 4).map(nearest).collect()
}

#[test]
fn codes_are_those_of_brute_force() {
    let x = gaussian(1, 512);
    let importance: Vec<f32> = gaussian(2, 512).iter().map(|g| g.exp()).collect();
    for weights in [None, Some(importance.as_slice())] {
        for effort in [Effort::Fast, Effort::Default, Effort::Best] {
            let row = encode(&x, weights, effort);
            let codes = reference_codes(&x, weights, &row);
            let equal = codes.iter().zip(&row.code_bytes).filter(|(a, b)| a == b).count();
            assert!(equal >= 120, "{equal} of 128 codes");
            let slow = CcqRow {
                code_bytes: codes,
                ..row.clone()
            };
            let (ours, least) = (error(&x, weights, &row), error(&x, weights, &slow));
            assert!(ours <= least * 1.001, "{ours} {least}");
        }
    }
}

#[test]
fn gaussian_error_is_below_the_ceilings_and_effort_pays() {
    let mut sums = [0.0; 4];
    for seed in 0..6 {
        let x = gaussian(seed + 10, 4096);
        for (effort, sum) in [Effort::Fast, Effort::Default, Effort::Best]
            .into_iter()
            .zip(&mut sums)
        {
            *sum += error(&x, None, &encode(&x, None, effort));
        }
        sums[3] += energy(&x);
    }
    let [fast, default, best] = [0, 1, 2].map(|i| sums[i] / sums[3]);
    assert!(
        fast < 0.1055 && default < 0.1040 && best < 0.1030,
        "{fast} {default} {best}"
    );
    assert!(best < default && default < fast);
}

#[test]
fn all_instruction_sets_and_any_scratch_give_the_same_row() {
    let importance: Vec<f32> = gaussian(3, 576).iter().map(|g| g * g).collect();
    let mut used = Scratch::default();
    for k in [64, 128, 576] {
        let x = gaussian(k as u64, k);
        for weights in [None, Some(&importance[..k])] {
            for effort in [Effort::Fast, Effort::Default] {
                let expected = encode(&x, weights, effort);
                for isa in Isa::available() {
                    assert_eq!(
                        encode_row(&x, weights, effort, isa, &mut used).unwrap(),
                        expected,
                        "{isa}"
                    );
                }
            }
        }
    }
}

#[test]
fn every_code_of_every_pair_lies_in_fifteen_bits() {
    for (code_scale, code_zp) in PAIRS {
        assert!(255 * u32::from(code_scale) + u32::from(code_zp) <= wint2::MAX_CODE as u32);
    }
    let mut sorted = PAIRS.to_vec();
    sorted.sort_unstable();
    sorted.dedup();
    assert_eq!(sorted.len(), PAIRS.len());
}

#[test]
fn zeros_decode_to_zeros() {
    for k in [64, 192] {
        let row = encode(&vec![0.0; k], None, Effort::Default);
        assert_eq!(row.super_scale, bf16::ONE);
        assert!(decode(&row).iter().all(|x| *x == 0.0));
        let row = encode(&vec![-0.0; k], Some(&vec![0.0; k]), Effort::Fast);
        assert!(decode(&row).iter().all(|x| *x == 0.0));
    }
    let mut x = gaussian(5, 320);
    x[64..128].fill(0.0);
    x[256..].fill(0.0);
    for effort in [Effort::Fast, Effort::Default, Effort::Best] {
        let row = encode(&x, None, effort);
        assert_eq!((row.local[1], row.local[4]), (0, 0));
        let y = decode(&row);
        assert!(y[64..128].iter().chain(&y[256..]).all(|y| *y == 0.0));
        assert!(error(&x, None, &row) < 0.12 * energy(&x));
    }
}

#[test]
fn any_size_of_weights_stays_finite_and_as_good() {
    let x = gaussian(6, 256);
    let relative = |x: &[f32]| error(x, None, &encode(x, None, Effort::Default)) / energy(x);
    let usual = relative(&x);
    for exponent in [-100, -60, 40, 100] {
        let scaled: Vec<f32> = x.iter().map(|x| x * 2.0_f32.powi(exponent)).collect();
        assert!((relative(&scaled) - usual).abs() < 1e-9, "2^{exponent}");
    }
    // At the very ends precision ends, but nothing overflows.
    for extreme in [f32::MAX, f32::MIN_POSITIVE, 1e-43, f32::from_bits(1)] {
        let largest = x.iter().fold(0.0_f32, |m, x| m.max(x.abs()));
        let scaled: Vec<f32> = x.iter().map(|x| x / largest * extreme).collect();
        let row = encode(&scaled, None, Effort::Default);
        assert!(
            row.super_scale.is_finite() && row.super_scale > bf16::ZERO,
            "{extreme:e}"
        );
        assert!(decode(&row).iter().all(|y| y.is_finite()), "{extreme:e}");
        assert!(error(&scaled, None, &row) <= energy(&scaled), "{extreme:e}");
    }
}

#[test]
fn outliers_constants_and_alternations() {
    let mut outlier = gaussian(7, 512).iter().map(|x| x * 0.01).collect::<Vec<_>>();
    outlier[100] = 50.0;
    let constant = vec![0.37; 128];
    let alternating: Vec<f32> = (0..128).map(|k| if k % 2 == 0 { 1.0 } else { -1.0 }).collect();
    let mut one_hot = vec![0.0; 128];
    one_hot[77] = -3.0;
    // The windows overlap, so no codeword is (1, 0, 0, 0) and few are near zero: an outlier among small weights
    // costs its group about half its energy. The ceilings say so.
    for (x, ceiling) in [
        (&outlier, 0.75),
        (&constant, 0.04),
        (&alternating, 0.04),
        (&one_hot, 0.75),
    ] {
        for effort in [Effort::Fast, Effort::Default, Effort::Best] {
            let row = encode(x, None, effort);
            let relative = error(x, None, &row) / energy(x);
            assert!(relative < ceiling, "{effort:?} {relative} {ceiling}");
        }
    }
}

#[test]
fn importance_lowers_the_weighted_error() {
    let x = gaussian(8, 1024);
    let importance: Vec<f32> = gaussian(9, 1024).iter().map(|g| (1.5 * g).exp()).collect();
    let weights = Some(importance.as_slice());
    for effort in [Effort::Fast, Effort::Default] {
        let with = error(&x, weights, &encode(&x, weights, effort));
        let without = error(&x, weights, &encode(&x, None, effort));
        assert!(with < 0.9 * without, "{with} {without}");
    }
    let (even, scaled) = (
        encode(&x, Some(&[1.0; 1024]), Effort::Fast),
        encode(&x, Some(&[8.0; 1024]), Effort::Fast),
    );
    assert_eq!(even, scaled);
    assert_eq!(
        encode(&x, Some(&[0.0; 1024]), Effort::Fast),
        encode(&x, None, Effort::Fast)
    );
}

#[test]
fn bad_input_is_named() {
    let fail = |x: &[f32], w: Option<&[f32]>| {
        encode_row(x, w, Effort::Fast, Isa::best(), &mut Scratch::default()).unwrap_err()
    };
    assert_eq!(fail(&[], None), CcqError::Columns { got: 0 });
    assert_eq!(fail(&[1.0; 96], None), CcqError::Columns { got: 96 });
    let mut x = [1.0; 64];
    assert_eq!(
        fail(&x, Some(&[1.0; 63])),
        CcqError::ImportanceLength {
            expected: 64,
            got: 63
        }
    );
    assert_eq!(fail(&x, Some(&[-1.0; 64])), CcqError::Importance { column: 0 });
    x[5] = f32::NAN;
    assert_eq!(fail(&x, None), CcqError::NotFinite { column: 5 });
}
