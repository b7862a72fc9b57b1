//! Products on tensor cores: tightly against sums of the rounded factors in f64, and within the stated bound of the exact
//! ones.

use half::bf16;
use qtool_formats::FloatDtype;
use qtool_kernels::Backend;
use qtool_kernels::cuda::Precision;
use qtool_kernels::reference::forward::{decode, matmul};

use crate::products::{affine, ccq, dense, nf4, weights};
use crate::{both, numbers, values};

/// What the roundings of both factors to bf16 may do, as a share of the sum of magnitudes.
const STATED: f64 = 1.0 / 256.0 + 1.0 / 65536.0;
/// What f32 sums of a few hundred products may do besides, in whatever order hardware takes them.
const SUMS: f64 = 1.0 / 1_048_576.0;

#[test]
fn products_on_tensor_cores_are_those_of_rounded_factors() {
    let Some((gpu, _)) = both("products_on_tensor_cores_are_those_of_rounded_factors") else {
        return;
    };
    let gpu = gpu.with_precision(Precision::Bf16);
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
    let mut compared = 0;
    for (ms, (name, weight)) in all {
        let (there, k) = (gpu.weight(&weight), weight.k);
        let exact = decode(&weight);
        let round = |x: &[f32]| -> Vec<f32> { x.iter().map(|&x| bf16::from_f32(x).to_f32()).collect() };
        for m in ms {
            let x = numbers(m as u64, m * k);
            let got = values(&gpu, &gpu.matmul(&gpu.upload(&x, k), &there));
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

#[test]
fn few_rows_stay_exact() {
    let Some((gpu, _)) = both("few_rows_stay_exact") else {
        return;
    };
    let weight = affine("w4-sym-g64-bf16", 33, 192);
    let x = numbers(5, 16 * 192);
    let product = |gpu: &qtool_kernels::CudaBackend| {
        values(gpu, &gpu.matmul(&gpu.upload(&x, 192), &gpu.weight(&weight)))
    };
    assert_eq!(
        product(&gpu),
        product(&gpu.clone().with_precision(Precision::Bf16))
    );
}
