//! Products on tensor cores: tightly against sums of the rounded factors in f64, and within the stated bound of the exact
//! ones.

use half::bf16;
use qtool_formats::FloatDtype;
use qtool_kernels::backend::HostWeight;
use qtool_kernels::cuda::{NoWarpgroups, Precision};
use qtool_kernels::reference::forward::{decode, matmul};
use qtool_kernels::{Backend, CudaBackend};

use crate::products::{affine, ccq, dense, nf4, weights};
use crate::{assert_close, both, numbers, skipped, values};

/// What the roundings of both factors to bf16 may do, as a share of the sum of magnitudes.
const STATED: f64 = 1.0 / 256.0 + 1.0 / 65536.0;
/// What f32 sums of a few hundred products may do besides, in whatever order hardware takes them.
const SUMS: f64 = 1.0 / 1_048_576.0;

#[test]
fn products_on_tensor_cores_are_those_of_rounded_factors() {
    let Some((gpu, _)) = both("products_on_tensor_cores_are_those_of_rounded_factors") else {
        return;
    };
    let mut all: Vec<_> = weights().into_iter().map(|weight| (vec![31], weight)).collect();
    for (ms, name, weight) in [
        (&[17, 127, 129][..], "bf16", dense(FloatDtype::Bf16, 130, 168)),
        (&[33, 64], "bf16 of one slice", dense(FloatDtype::Bf16, 1, 8)),
        (&[17, 129], "int8", affine("w8-sym-row-bf16", 129, 96)),
        (&[65], "int8 of one slice", affine("w8-sym-row-f32", 31, 32)),
        (&[128, 130], "int4", affine("w4-sym-g64-bf16", 127, 320)),
        (&[33], "int4 with zero points", affine("w4-zp-g16-f16", 33, 160)),
        (&[17, 129], "wint2", ccq(129, 256)),
        (&[17, 129], "nf4", nf4(33, 256)),
    ] {
        all.push((ms.to_vec(), (name.to_owned(), weight)));
    }
    compare(&gpu.with_precision(Precision::Bf16), all);
}

/// Compares products of those numbers of rows by those weights.
fn compare(gpu: &CudaBackend, all: Vec<(Vec<usize>, (String, HostWeight))>) {
    let mut compared = 0;
    for (ms, (name, weight)) in all {
        let (there, k) = (gpu.weight(&weight), weight.k);
        let exact = decode(&weight);
        let round = |x: &[f32]| -> Vec<f32> { x.iter().map(|&x| bf16::from_f32(x).to_f32()).collect() };
        for m in ms {
            let x = numbers(m as u64, m * k);
            let got = values(gpu, &gpu.matmul(&gpu.upload(&x, k), &there));
            let (rounded, magnitudes) = matmul(&round(&x), &round(&exact), k);
            let (expected, _) = matmul(&x, &exact, k);
            for (i, &got) in got.iter().enumerate() {
                let off = (f64::from(got) - rounded[i]).abs();
                assert!(
                    off <= SUMS * magnitudes[i],
                    "{m} rows times {name}, value {i}: {got}, expected {}",
                    rounded[i]
                );
                let off = (f64::from(got) - expected[i]).abs();
                assert!(
                    off <= (STATED + SUMS) * magnitudes[i] * (1.0 + STATED),
                    "{m} rows times {name}, value {i}: {got}, far from {}",
                    expected[i]
                );
                compared += 1;
            }
        }
    }
    assert!(compared > 100_000, "{compared}");
}

/// The kernels of warpgroups, which one kind of device has: a real one of another kind says that they were skipped.
pub fn warpgroups(test: &str) -> Option<CudaBackend> {
    let (gpu, _) = both(test)?;
    let gpu = gpu.without_library().with_precision(Precision::Bf16Warpgroups);
    match gpu.warpgroups() {
        Ok(()) => Some(gpu),
        Err(reason @ NoWarpgroups::Capability(_)) => {
            skipped(test, &reason);
            None
        }
        Err(reason) => panic!("{reason}"),
    }
}

#[test]
fn products_of_warpgroups_are_those_of_rounded_factors() {
    let Some(gpu) = warpgroups("products_of_warpgroups_are_those_of_rounded_factors") else {
        return;
    };
    let cases = [
        (&[17, 128, 129][..], "bf16", dense(FloatDtype::Bf16, 130, 176)),
        (
            &[256, 300],
            "bf16 of less than a slice",
            dense(FloatDtype::Bf16, 1, 16),
        ),
        (&[127, 257], "int8", affine("w8-sym-row-bf16", 129, 96)),
        (&[65], "int8 of more slices", affine("w8-sym-row-f32", 31, 528)),
        (&[128, 130], "int4", affine("w4-sym-g64-bf16", 127, 320)),
        (
            &[33, 255],
            "int4 with zero points",
            affine("w4-zp-g16-f16", 33, 160),
        ),
        (&[17, 129], "wint2", ccq(129, 256)),
        (&[200], "wint2 of many slices", ccq(65, 832)),
        (&[17, 129], "nf4", nf4(33, 256)),
    ];
    let named = |(ms, name, weight): (&[usize], &str, _)| (ms.to_vec(), (name.to_owned(), weight));
    let (before, count) = (
        gpu.warpgroup_products(),
        cases.iter().map(|case| case.0.len()).sum::<usize>(),
    );
    compare(&gpu, cases.into_iter().map(named).collect());
    assert_eq!(gpu.warpgroup_products() - before, count as u64, "by warpgroups");
    // And those of which they do not take many, by the other kernels.
    let others = weights().into_iter().map(|weight| (vec![130], weight));
    compare(&gpu, others.collect());
}

#[test]
fn both_ways_give_the_same_but_for_the_order_of_sums() {
    let Some(gpu) = warpgroups("both_ways_give_the_same_but_for_the_order_of_sums") else {
        return;
    };
    let other = both("both").expect("a device").0.without_library();
    let other = other.with_precision(Precision::Bf16);
    for (name, weight) in [
        ("wint2", ccq(129, 256)),
        ("int4", affine("w4-zp-g16-f16", 33, 160)),
    ] {
        let x = numbers(7, 140 * weight.k);
        let product = |gpu: &CudaBackend| {
            let x = gpu.upload(&x, weight.k);
            values(gpu, &gpu.matmul(&x, &gpu.weight(&weight)))
        };
        assert_close(&product(&gpu), &product(&other), 4e-7, name);
    }
}

#[test]
fn few_rows_stay_exact() {
    let Some((gpu, _)) = both("few_rows_stay_exact") else {
        return;
    };
    let weight = affine("w4-sym-g64-bf16", 33, 192);
    let x = numbers(5, 16 * 192);
    let product = |gpu: &CudaBackend| values(gpu, &gpu.matmul(&gpu.upload(&x, 192), &gpu.weight(&weight)));
    assert_eq!(
        product(&gpu),
        product(&gpu.clone().with_precision(Precision::Bf16))
    );
}
