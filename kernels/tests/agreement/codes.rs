//! Codes, packed codes and their counts: compared exactly.

use crate::{FILLS, GROUPS, Random, SIZES, for_each_row};
use proptest::prelude::*;
use qtool_kernels::{
    Isa, code_histogram, pack_crumbs, pack_nibbles, reference, round_codes, round_codes_groups,
    unpack_crumbs, unpack_nibbles,
};

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
}
