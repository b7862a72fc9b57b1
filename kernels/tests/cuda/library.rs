//! NVIDIA's library of products: used where it is there, and done without where it is not, is too old, declines or fails.
//! QTOOL_REQUIRE_CUBLASLT=1 makes it a failure that it is not there.

use std::process::Command;

use half::bf16;
use qtool_formats::FloatDtype;
use qtool_kernels::cuda::{NoLibrary, Precision};
use qtool_kernels::reference::forward::{decode, matmul};
use qtool_kernels::{Backend, CudaBackend};

use crate::products::dense;
use crate::{both, numbers, skipped, values};

/// What f32 sums of a few hundred products may do, in whatever order, as a share of the sum of magnitudes.
const SUMS: f64 = 1.0 / 1_048_576.0;

/// Sizes M, N, K of products that the library may do: plain BF16, K a multiple of 8.
const SIZES: [[usize; 3]; 6] = [
    [17, 130, 168],
    [33, 1, 8],
    [129, 31, 64],
    [64, 64, 32],
    [31, 127, 40],
    [17, 130, 168],
];

/// Fails when a product is not that of the rounded factors. Gives the number of products.
fn products_are_right(gpu: &CudaBackend) -> u64 {
    let round = |x: &[f32]| -> Vec<f32> { x.iter().map(|&x| bf16::from_f32(x).to_f32()).collect() };
    for [m, n, k] in SIZES {
        let weight = dense(FloatDtype::Bf16, n, k);
        let x = numbers(m as u64, m * k);
        let got = values(gpu, &gpu.matmul(&gpu.upload(&x, k), &gpu.weight(&weight)));
        let (expected, magnitudes) = matmul(&round(&x), &decode(&weight), k);
        assert_eq!(got.len(), expected.len());
        for (i, got) in got.iter().enumerate() {
            let off = (f64::from(*got) - expected[i]).abs();
            assert!(
                off <= SUMS * magnitudes[i],
                "{m} x {n} x {k}, value {i}: {got}, expected {}",
                expected[i]
            );
        }
    }
    SIZES.len() as u64
}

#[test]
fn the_library_does_plain_products_where_it_is_there() {
    let Some((gpu, _)) = both("the_library_does_plain_products_where_it_is_there") else {
        return;
    };
    let gpu = gpu.with_precision(Precision::Bf16);
    let required = std::env::var_os("QTOOL_REQUIRE_CUBLASLT").is_some_and(|v| v == "1");
    let there = match gpu.library() {
        Ok(name) => {
            assert!(name.starts_with("cuBLASLt "), "{name}");
            true
        }
        Err(why) => {
            assert!(!required, "QTOOL_REQUIRE_CUBLASLT=1, and {why}");
            if gpu.device().name() == "host shim" {
                assert_eq!(why, NoLibrary::Absent);
            }
            false
        }
    };
    let done = products_are_right(&gpu);
    let by_library = gpu.library_products();
    assert_eq!(by_library, if there { done } else { 0 });
    // By our own kernel, when that is wanted; other forms and exact products always.
    products_are_right(&gpu.clone().without_library());
    let exact = gpu.clone().with_precision(Precision::F32);
    for (gpu, dtype) in [(&gpu, FloatDtype::F16), (&exact, FloatDtype::Bf16)] {
        let (weight, x) = (dense(dtype, 20, 64), numbers(1, 20 * 64));
        values(gpu, &gpu.matmul(&gpu.upload(&x, 64), &gpu.weight(&weight)));
    }
    assert_eq!(gpu.library_products(), by_library);
}

/// Not a test of its own: what [`a_library_of_no_use_is_done_without`] runs beside a library that misbehaves.
#[test]
#[ignore = "run by a_library_of_no_use_is_done_without"]
fn beside_a_library_of_no_use() {
    let Some((gpu, _)) = both("beside_a_library_of_no_use") else {
        return;
    };
    let gpu = gpu.with_precision(Precision::Bf16);
    products_are_right(&gpu);
    let why = gpu.library().unwrap_or_else(|why| why.to_string());
    println!("{} products by {why}", gpu.library_products());
}

#[test]
fn a_library_of_no_use_is_done_without() {
    let test = "a_library_of_no_use_is_done_without";
    let Some((gpu, _)) = both(test) else { return };
    if gpu.device().name() != "host shim" || gpu.library().is_err() {
        let required = std::env::var_os("QTOOL_REQUIRE_CUBLASLT").is_some_and(|v| v == "1");
        assert!(!required || gpu.library().is_ok(), "QTOOL_REQUIRE_CUBLASLT=1");
        return skipped(test, &"there is no library here that does as it is told");
    }
    for (setting, value, expected) in [
        (
            "QTOOL_FAKE_CUBLASLT_VERSION",
            "110502",
            "0 products by the cuBLASLt that is installed is too old",
        ),
        (
            "QTOOL_FAKE_CUBLASLT_VERSION",
            "130001",
            "6 products by cuBLASLt 13.0.1",
        ),
        (
            "QTOOL_FAKE_CUBLASLT_DECLINE",
            "1",
            "0 products by cuBLASLt 12.8.4",
        ),
        ("QTOOL_FAKE_CUBLASLT_FAIL", "1", "0 products by cuBLASLt 12.8.4"),
    ] {
        let output = Command::new(std::env::current_exe().unwrap())
            .args([
                "--ignored",
                "--exact",
                "library::beside_a_library_of_no_use",
                "--nocapture",
            ])
            .env(setting, value)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && said.contains(expected),
            "{setting}={value}: {said}"
        );
    }
}
