//! Every instruction set of this machine against the reference, and against each other bit for bit, at the
//! sizes where blocks, groups and segments begin and end. Each test counts its cases, so that an empty loop
//! cannot pass.

use proptest::prelude::*;
use qtool_kernels::{
    Candidate, ErrorSums, Isa, absmax, absmax_groups, clip_errors, clip_errors_weighted, code_histogram,
    first_non_finite, minmax, minmax_groups, narrow_bf16, narrow_f16, pack_crumbs, pack_nibbles, reference,
    round_codes, round_codes_groups, row_error, unpack_crumbs, unpack_nibbles, widen_bf16, widen_f16,
    widen_f32,
};

/// Sizes around the ends of blocks (16), group loops (32, 64, 128), segments (256), and one long row.
const SIZES: [usize; 19] = [
    0,
    1,
    2,
    15,
    16,
    17,
    31,
    32,
    33,
    63,
    64,
    65,
    127,
    128,
    129,
    255,
    257,
    1000,
    4096 + 3,
];

/// Group lengths: one element, inside a block, across blocks, whole blocks, longer than most rows.
const GROUPS: [usize; 7] = [1, 7, 16, 24, 64, 128, 5000];

/// Reproducible numbers.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }

    /// Uniform in -1..1.
    fn unit(&mut self) -> f32 {
        self.below(1 << 24) as f32 / (1 << 23) as f32 - 1.0
    }

    fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.next() as u8).collect()
    }

    fn small_codes(&mut self, n: usize, distinct: u64) -> Vec<u8> {
        (0..n).map(|_| self.below(distinct) as u8).collect()
    }
}

/// What a row is made of.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Fill {
    Typical,
    Zeros,
    Ties,
    Subnormal,
    Huge,
    MixedFinite,
    NonFinite,
}

const FILLS: [Fill; 7] = [
    Fill::Typical,
    Fill::Zeros,
    Fill::Ties,
    Fill::Subnormal,
    Fill::Huge,
    Fill::MixedFinite,
    Fill::NonFinite,
];

fn row(fill: Fill, n: usize, random: &mut Random) -> Vec<f32> {
    let one = |k: usize| match fill {
        Fill::Typical => random.unit() * 0.1,
        Fill::Zeros => [0.0, -0.0][k % 2],
        Fill::Ties => random.below(41) as f32 - 20.5,
        Fill::Subnormal => f32::from_bits(random.below(1 << 23) as u32 | (random.next() as u32 & 1) << 31),
        Fill::Huge => random.unit() * 1e38,
        Fill::MixedFinite | Fill::NonFinite => match random.below(6) {
            0 => 0.0,
            1 => random.unit() * 1e38,
            2 => random.unit() * 1e-40,
            3 => random.below(41) as f32 - 20.5,
            4 if fill == Fill::NonFinite => [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][k % 3],
            _ => random.unit(),
        },
    };
    (0..n).map(one).collect()
}

/// Runs a check on every kind and size of row; returns how many there were.
fn for_each_row(mut check: impl FnMut(&[f32], Fill, &mut Random)) -> usize {
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut cases = 0;
    for fill in FILLS {
        for n in SIZES {
            let x = row(fill, n, &mut random);
            check(&x, fill, &mut random);
            cases += 1;
        }
    }
    cases
}

/// The bit pattern, with all NaN alike.
fn bits(x: f32) -> u32 {
    if x.is_nan() {
        f32::NAN.to_bits()
    } else {
        x.to_bits()
    }
}

fn bits64(x: f64) -> u64 {
    if x.is_nan() {
        f64::NAN.to_bits()
    } else {
        x.to_bits()
    }
}

/// f32 results that must be equal, all NaN alike.
fn assert_same(got: &[f32], expected: &[f32], what: &str) {
    assert_eq!(got.len(), expected.len());
    for (k, (&got, &expected)) in got.iter().zip(expected).enumerate() {
        assert_eq!(
            bits(got),
            bits(expected),
            "{what}: element {k}: {got} and {expected}"
        );
    }
}

/// An f32 sum of n squares or products against its f64 value. Each lane adds at most n / 16 + 1 terms and the
/// tree has four levels; each term and each addition rounds by 2^-24, and may lose 2^-149 by underflow.
fn assert_sum(got: f64, expected: f64, magnitude: f64, n: usize, what: &str) {
    if expected.is_nan() || magnitude > f64::from(f32::MAX) * 0.999 {
        assert!(!got.is_finite(), "{what}: {got} where f32 cannot hold {expected}");
        return;
    }
    let roundings = (n.min(256) / 16 + 8) as f64;
    let tolerance = magnitude * roundings / f64::from(1 << 24) + (n + 1) as f64 * 2f64.powi(-148);
    assert!(
        (got - expected).abs() <= tolerance,
        "{what}: {got} and {expected}, tolerance {tolerance:e}"
    );
}

#[test]
fn widening_and_narrowing_every_sixteen_bit_pattern() {
    let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    let mut cases = 0;
    for isa in Isa::available() {
        let mut out = vec![0.0; all.len() / 2];
        widen_bf16(isa, &all, &mut out);
        let expected = reference::widen_bf16(&all);
        assert!(
            out.iter().zip(&expected).all(|(a, b)| bits(*a) == bits(*b)),
            "{isa}"
        );
        let mut back = vec![0; all.len()];
        narrow_bf16(isa, &out, &mut back);
        assert_eq!(back, reference::narrow_bf16(&expected), "{isa}");

        widen_f16(isa, &all, &mut out);
        let expected = reference::widen_f16(&all);
        assert!(
            out.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()),
            "{isa}"
        );
        narrow_f16(isa, &out, &mut back);
        assert_eq!(back, reference::narrow_f16(&expected), "{isa}");
        cases += 1;
    }
    assert!(cases >= 1);
}

#[test]
fn narrowing_around_every_tie() {
    let mut random = Random(77);
    let mut x = Vec::new();
    for bits in (0..=u32::MAX).step_by(0x8000) {
        for near in [bits.wrapping_sub(1), bits, bits.wrapping_add(1)] {
            x.push(f32::from_bits(near));
        }
    }
    for k in 0..1u32 << 17 {
        let f16_tie = f32::from_bits((k << 12) | 0x3000_0000);
        x.extend([f16_tie, -f16_tie, f16_tie.next_up(), f16_tie.next_down()]);
        x.push(f32::from_bits(random.next() as u32));
    }
    for isa in Isa::available() {
        let mut out = vec![0; 2 * x.len()];
        narrow_bf16(isa, &x, &mut out);
        assert!(out == reference::narrow_bf16(&x), "bf16 on {isa}");
        narrow_f16(isa, &x, &mut out);
        assert!(out == reference::narrow_f16(&x), "f16 on {isa}");
    }
    assert!(x.len() > 1_000_000);
}

#[test]
fn widening_any_size_at_any_address() {
    let mut random = Random(5);
    let mut cases = 0;
    for n in SIZES {
        let bytes = random.bytes(4 * n + 3);
        for isa in Isa::available() {
            for offset in 0..3 {
                let mut out = vec![0.0; n];
                widen_f32(isa, &bytes[offset..offset + 4 * n], &mut out);
                assert_same(&out, &reference::widen_f32(&bytes[offset..offset + 4 * n]), "f32");
                widen_f16(isa, &bytes[offset..offset + 2 * n], &mut out);
                assert_same(&out, &reference::widen_f16(&bytes[offset..offset + 2 * n]), "f16");
                widen_bf16(isa, &bytes[offset..offset + 2 * n], &mut out);
                assert_same(
                    &out,
                    &reference::widen_bf16(&bytes[offset..offset + 2 * n]),
                    "bf16",
                );

                let mut narrow = vec![0; 2 * n + offset];
                narrow_f16(isa, &out, &mut narrow[offset..]);
                assert_eq!(narrow[offset..], reference::narrow_f16(&out));
                narrow_bf16(isa, &out, &mut narrow[offset..]);
                assert_eq!(narrow[offset..], reference::narrow_bf16(&out));
                cases += 1;
            }
        }
    }
    assert!(cases >= 3 * SIZES.len());
}

#[test]
fn extents() {
    let cases = for_each_row(|x, fill, _| {
        for isa in Isa::available() {
            let largest = absmax(isa, x);
            assert_eq!(
                bits(largest),
                bits(reference::absmax(x)),
                "{isa} {fill:?} {}",
                x.len()
            );
            assert_eq!(largest.is_finite(), first_non_finite(x).is_none());
            let got = minmax(isa, x);
            assert_eq!(got, reference::minmax(x), "{isa} {fill:?} {}", x.len());
            let portable = minmax(Isa::available()[0], x);
            assert_eq!((bits(got.0), bits(got.1)), (bits(portable.0), bits(portable.1)));
            for group in GROUPS {
                let groups = x.len().div_ceil(group);
                let (mut largest, mut mins, mut maxs) =
                    (vec![0.0; groups], vec![0.0; groups], vec![0.0; groups]);
                absmax_groups(isa, x, group, &mut largest);
                minmax_groups(isa, x, group, &mut mins, &mut maxs);
                for (g, part) in x.chunks(group).enumerate() {
                    assert_eq!(bits(largest[g]), bits(absmax(isa, part)));
                    assert_eq!((mins[g], maxs[g]), minmax(isa, part));
                }
            }
        }
    });
    assert_eq!(cases, FILLS.len() * SIZES.len());
}

#[test]
fn one_bad_value_anywhere_is_seen() {
    let mut cases = 0;
    for isa in Isa::available() {
        for n in [1, 16, 33, 100] {
            for at in 0..n {
                for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                    let mut x = vec![1e38; n];
                    x[at] = bad;
                    assert!(!absmax(isa, &x).is_finite());
                    assert_eq!(first_non_finite(&x), Some(at));
                    cases += 1;
                }
            }
        }
    }
    assert!(cases >= 600);
}

#[test]
fn codes() {
    let settings = [
        (1.0, 0, 0, 255),
        (1.0, 128, 1, 255),
        (70.0, 8, 0, 15),
        (1e38, 2, 0, 3),
        (0.0, 7, 0, 15),
        (f32::INFINITY, 7, 1, 15),
        (-2.0, -300, 0, 255),
        (1.0, 4_000_000, 3, 3),
    ];
    let cases = for_each_row(|x, fill, _| {
        for isa in Isa::available() {
            for (inv_scale, zero, lo, hi) in settings {
                let mut got = vec![0xaa; x.len()];
                round_codes(isa, x, inv_scale, zero, lo, hi, &mut got);
                let expected = reference::round_codes(x, inv_scale, zero, lo, hi);
                assert_eq!(got, expected, "{isa} {fill:?} {} {inv_scale} {zero}", x.len());
            }
        }
    });
    assert_eq!(cases, FILLS.len() * SIZES.len());
}

#[test]
fn codes_in_groups() {
    let cases = for_each_row(|x, _, random| {
        for group in GROUPS {
            let groups = x.len().div_ceil(group);
            let inv_scales: Vec<f32> = (0..groups).map(|_| random.unit() * 100.0).collect();
            let zeros: Vec<f32> = (0..groups).map(|_| random.below(16) as f32).collect();
            let mut expected = Vec::new();
            for (g, part) in x.chunks(group).enumerate() {
                expected.extend(reference::round_codes(
                    part,
                    inv_scales[g],
                    zeros[g] as i32,
                    0,
                    15,
                ));
            }
            for isa in Isa::available() {
                let mut got = vec![0xaa; x.len()];
                round_codes_groups(isa, x, group, &inv_scales, &zeros, (0, 15), &mut got);
                assert_eq!(got, expected, "{isa} {group}");
            }
        }
    });
    assert_eq!(cases, FILLS.len() * SIZES.len());
}

#[test]
fn packing() {
    let mut random = Random(9);
    let mut cases = 0;
    for n in SIZES {
        for isa in Isa::available() {
            let wild = random.bytes(n);
            let mut packed = vec![0xaa; n.div_ceil(2)];
            pack_nibbles(isa, &wild, &mut packed);
            assert_eq!(packed, reference::pack(&wild, 2));
            let mut codes = vec![0xaa; n];
            unpack_nibbles(isa, &packed, &mut codes);
            assert_eq!(codes, reference::unpack(&packed, 2, n));
            assert!(codes.iter().zip(&wild).all(|(code, wild)| *code == wild & 15));

            let mut packed = vec![0xaa; n.div_ceil(4)];
            pack_crumbs(isa, &wild, &mut packed);
            assert_eq!(packed, reference::pack(&wild, 4));
            unpack_crumbs(isa, &packed, &mut codes);
            assert_eq!(codes, reference::unpack(&packed, 4, n));
            assert!(codes.iter().zip(&wild).all(|(code, wild)| *code == wild & 3));
            cases += 1;
        }
    }
    assert!(cases >= SIZES.len());
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
                    let (n, roundings) = (x.len(), x.len() * 256 / x.len().clamp(1, 256));
                    let exact = reference::clip_error(x, None, candidate);
                    assert_sum(plain[c].into(), exact, exact * roundings as f64 / 256.0, n, &what);
                    let exact = reference::clip_error(x, Some(&importance), candidate);
                    if exact.is_finite() && plain[c].is_finite() {
                        assert_sum(
                            weighted[c].into(),
                            exact,
                            exact * roundings as f64 / 256.0,
                            n,
                            &what,
                        );
                    }
                }
                let (first, first_weighted) = portable.get_or_insert((plain.clone(), weighted.clone()));
                assert_same(&plain, first, "isas agree");
                assert_same(&weighted, first_weighted, "isas agree, weighted");
            }
        }
    });
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
            let mut fixed = vec![0.0; 33];
            clip_errors(isa, &x, &candidates, &mut fixed);
            // One more element with a value that every candidate decodes exactly takes the general loop.
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
                    assert_sum(got.sum_x2, exact.sum_x2, exact.sum_x2, x.len(), &what);
                    assert_sum(got.sum_e2, exact.sum_e2, exact.sum_e2, x.len(), &what);
                    let magnitude = (exact.sum_x2 * exact.sum_e2).sqrt();
                    assert_sum(got.sum_xe, exact.sum_xe, magnitude, x.len(), &what);
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

#[test]
fn histograms() {
    let mut random = Random(41);
    let mut cases = 0;
    for n in SIZES.into_iter().chain([511, 512, 513, 100_003]) {
        for distinct in [1, 2, 16, 256] {
            let codes = random.small_codes(n, distinct);
            let mut counts = [3; 256];
            code_histogram(&codes, &mut counts);
            let expected = reference::code_histogram(&codes);
            assert!(
                counts
                    .iter()
                    .zip(expected)
                    .all(|(got, expected)| *got == expected + 3)
            );
            cases += 1;
        }
    }
    assert_eq!(cases, 4 * (SIZES.len() + 4));
}

proptest! {
    /// Any bit patterns, any length, any scale: codes equal the reference on every instruction set.
    #[test]
    fn codes_of_any_bits(
        x in prop::collection::vec(any::<u32>().prop_map(f32::from_bits), 0..200),
        inv_scale in any::<u32>().prop_map(f32::from_bits),
        zero in -300i32..300,
    ) {
        let expected = reference::round_codes(&x, inv_scale, zero, 1, 254);
        for isa in Isa::available() {
            let mut got = vec![0; x.len()];
            round_codes(isa, &x, inv_scale, zero, 1, 254, &mut got);
            prop_assert_eq!(&got, &expected);
        }
    }

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
