//! Conversions and extents: exact operations, compared bit for bit.

use crate::{FILLS, GROUPS, Random, SIZES, assert_same, bits, for_each_row};
use qtool_kernels::{
    Isa, absmax, absmax_groups, first_non_finite, minmax, minmax_groups, narrow_bf16, narrow_f16, reference,
    widen_bf16, widen_f16, widen_f32,
};

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
