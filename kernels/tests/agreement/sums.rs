//! Clip search and row errors: f32 sums, compared with the reference within the stated number of roundings, and
//! bit for bit between instruction sets.

use crate::{FILLS, Fill, GROUPS, Random, SIZES, assert_same, bits, for_each_row, row};
use proptest::prelude::*;
use qtool_kernels::{Candidate, ErrorSums, Isa, clip_errors, clip_errors_weighted, reference, row_error};

/// An f32 sum against its f64 value. Each term rounds at most twice by 2^-24 relative, then takes part in
/// `terms_per_lane` additions in its lane and four in the tree, and may lose 2^-149 twice by underflow.
/// `magnitude` is the sum of the terms' magnitudes, or a bound of it.
fn assert_sum(got: f64, exact: f64, magnitude: f64, terms_per_lane: usize, what: &str) {
    if exact.is_nan() || magnitude > f64::from(f32::MAX) {
        assert!(!got.is_finite(), "{what}: {got} where f32 cannot hold {exact}");
        return;
    }
    let roundings = (terms_per_lane + 6) as f64;
    let lost = (16 * terms_per_lane) as f64 * 2f64.powi(-148);
    let tolerance = magnitude * roundings / f64::from(1 << 24) + lost;
    assert!(
        (got - exact).abs() <= tolerance,
        "{what}: {got} and {exact}, tolerance {tolerance:e}"
    );
}

fn bits64(x: f64) -> u64 {
    if x.is_nan() {
        f64::NAN.to_bits()
    } else {
        x.to_bits()
    }
}

fn candidates(count: usize, x: &[f32], random: &mut Random) -> Vec<Candidate> {
    let largest = x
        .iter()
        .filter(|x| x.is_finite())
        .fold(1e-30f32, |a, x| a.max(x.abs()));
    let one = |i: usize| {
        let scale = largest / 7.0 * (1.0 - 0.6 * i as f32 / count as f32);
        let zero = random.below(20) as f32 - 2.0;
        Candidate {
            scale,
            inv_scale: 1.0 / scale,
            zero,
            lo: 0.0,
            hi: [1.0, 15.0, 255.0][i % 3],
        }
    };
    (0..count).map(one).collect()
}

#[test]
fn clip_search() {
    let mut finite = 0;
    let cases = for_each_row(|x, fill, random| {
        let importance: Vec<f32> = x.iter().map(|_| random.unit().abs()).collect();
        for count in [0, 1, 15, 16, 17, 40] {
            let candidates = candidates(count, x, random);
            let mut portable: Option<(Vec<f32>, Vec<f32>)> = None;
            for isa in Isa::available() {
                let (mut plain, mut weighted) = (vec![-1.0; count], vec![-1.0; count]);
                clip_errors(isa, x, &candidates, &mut plain);
                clip_errors_weighted(isa, x, &importance, &candidates, &mut weighted);
                for (c, candidate) in candidates.iter().enumerate() {
                    let what = format!("{isa} {fill:?} {} candidate {c}", x.len());
                    let terms = x.len().div_ceil(16);
                    let exact = reference::clip_error(x, None, candidate);
                    assert_sum(plain[c].into(), exact, exact, terms, &what);
                    let exact = reference::clip_error(x, Some(&importance), candidate);
                    if plain[c].is_finite() {
                        assert_sum(weighted[c].into(), exact, exact, terms, &what);
                        finite += 1;
                    }
                }
                let (first, first_weighted) = portable.get_or_insert((plain.clone(), weighted.clone()));
                assert_same(&plain, first, "isas agree");
                assert_same(&weighted, first_weighted, "isas agree, weighted");
            }
        }
    });
    assert!(finite > 3_000, "{finite} sums compared");
    assert_eq!(cases, FILLS.len() * SIZES.len());
}

#[test]
fn clip_search_in_registers_equals_the_general_loop() {
    let mut random = Random(21);
    let mut cases = 0;
    for isa in Isa::available() {
        for n in [32, 64, 128] {
            let x = row(Fill::Typical, n, &mut random);
            let candidates = candidates(33, &x, &mut random);
            // One more element, 0.0, which every candidate decodes exactly when its zero is a code, takes the general loop.
            let mut longer = x.clone();
            longer.push(0.0);
            let with_zero: Vec<Candidate> = candidates
                .iter()
                .map(|c| Candidate {
                    zero: c.zero.clamp(c.lo, c.hi),
                    ..*c
                })
                .collect();
            let (mut short_errors, mut long_errors) = (vec![0.0; 33], vec![0.0; 33]);
            clip_errors(isa, &x, &with_zero, &mut short_errors);
            clip_errors(isa, &longer, &with_zero, &mut long_errors);
            assert_same(&short_errors, &long_errors, "fixed and general");
            cases += 1;
        }
    }
    assert!(cases >= 3);
}

#[test]
fn error_sums() {
    let cases = for_each_row(|x, fill, random| {
        let codes = random.bytes(x.len());
        for group in GROUPS {
            let groups = x.len().div_ceil(group);
            let scales: Vec<f32> = (0..groups).map(|_| random.unit() * 0.01).collect();
            let zeros: Vec<f32> = (0..groups).map(|_| random.below(256) as f32).collect();
            let exact = reference::row_error(x, &codes, group, &scales, &zeros);
            let mut portable: Option<ErrorSums> = None;
            for isa in Isa::available() {
                let mut got = ErrorSums::default();
                row_error(isa, x, &codes, group, &scales, &zeros, &mut got);
                let what = format!("{isa} {fill:?} {} in groups of {group}", x.len());
                assert_eq!(got.n, x.len() as u64);
                if fill != Fill::Huge && fill != Fill::MixedFinite && fill != Fill::NonFinite {
                    assert_eq!(got.max_abs_e, exact.max_abs_e, "{what}");
                    let terms = x.len().min(256).div_ceil(16);
                    assert_sum(got.sum_x2, exact.sum_x2, exact.sum_x2, terms, &what);
                    assert_sum(got.sum_e2, exact.sum_e2, exact.sum_e2, terms, &what);
                    let magnitude = (exact.sum_x2 * exact.sum_e2).sqrt();
                    assert_sum(got.sum_xe, exact.sum_xe, magnitude, terms, &what);
                }
                let first = portable.get_or_insert(got);
                assert_eq!(bits(got.max_abs_e), bits(first.max_abs_e), "{what}");
                assert_eq!(bits64(got.sum_x2), bits64(first.sum_x2), "{what}");
                assert_eq!(bits64(got.sum_e2), bits64(first.sum_e2), "{what}");
                assert_eq!(bits64(got.sum_xe), bits64(first.sum_xe), "{what}");
            }
        }
    });
    assert_eq!(cases, FILLS.len() * SIZES.len());
}

#[test]
fn error_sums_of_grouped_and_ungrouped_loops_are_equal() {
    let mut random = Random(31);
    let mut cases = 0;
    for isa in Isa::available() {
        for n in SIZES {
            let (x, codes) = (row(Fill::Typical, n, &mut random), random.bytes(n));
            let mut sums = [ErrorSums::default(); 2];
            for (group, sums) in [16, 5].into_iter().zip(&mut sums) {
                let groups = n.div_ceil(group);
                row_error(
                    isa,
                    &x,
                    &codes,
                    group,
                    &vec![0.01; groups],
                    &vec![128.0; groups],
                    sums,
                );
            }
            assert_eq!(sums[0], sums[1]);
            cases += 1;
        }
    }
    assert!(cases >= SIZES.len());
}

proptest! {
    /// Any bit patterns: clip errors are the same on every instruction set.
    #[test]
    fn clip_errors_of_any_bits(
        x in prop::collection::vec(any::<u32>().prop_map(f32::from_bits), 0..200),
        scale in any::<u32>().prop_map(f32::from_bits),
        zero in -20i16..20,
    ) {
        let candidate =
            Candidate { scale, inv_scale: 1.0 / scale, zero: zero.into(), lo: 0.0, hi: 15.0 };
        let mut first = None;
        for isa in Isa::available() {
            let mut errors = [0.0];
            clip_errors(isa, &x, &[candidate], &mut errors);
            prop_assert_eq!(bits(errors[0]), *first.get_or_insert(bits(errors[0])));
        }
    }
}
