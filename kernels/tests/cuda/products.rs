//! Products with weights in every form, embeddings, second moments.

use std::sync::Arc;

use half::{bf16, f16};
use qtool_formats::packing::wint2::Channel;
use qtool_formats::packing::{LSB_ROWS, Packing};
use qtool_formats::scheme::AffineScheme;
use qtool_formats::weight::{AffineWeight, Ccq25Weight, CcqWeight, Nf4Weight};
use qtool_formats::{FloatDtype, QuantizedWeight};
use qtool_kernels::backend::{Form, HostWeight, Storage};
use qtool_kernels::cuda::{Precision, Tiles};
use qtool_kernels::reference::forward::{decode, matmul};
use qtool_kernels::{Backend, CudaBackend};

use crate::tensor::warpgroups;
use crate::{CLOSE, SIZES, assert_close, both, numbers, values};

pub fn dense(dtype: FloatDtype, n: usize, k: usize) -> HostWeight {
    let mut bytes = Vec::new();
    for x in numbers((n * 1000 + k) as u64, n * k) {
        match dtype {
            FloatDtype::F32 => bytes.extend(x.to_le_bytes()),
            FloatDtype::Bf16 => bytes.extend(bf16::from_f32(x).to_le_bytes()),
            FloatDtype::F16 => bytes.extend(f16::from_f32(x).to_le_bytes()),
        }
    }
    HostWeight {
        n,
        k,
        form: Form::Dense {
            dtype,
            bytes: Arc::new(bytes),
        },
    }
}

pub fn packed(weight: &QuantizedWeight) -> HostWeight {
    let (n, k) = weight.dims();
    let parts = weight.encode(&|b, k, c, o| LSB_ROWS.pack(b, k, c, o)).unwrap();
    let storage = |part| -> Arc<dyn Storage> { Arc::new(part) };
    HostWeight {
        n,
        k,
        form: Form::Packed {
            scheme: weight.scheme(),
            parts: parts.into_iter().map(storage).collect(),
        },
    }
}

pub fn affine(name: &str, n: usize, k: usize) -> HostWeight {
    let scheme = AffineScheme::parse(name).unwrap();
    let groups = scheme.groups(n, k).unwrap();
    let (low, high) = scheme.code_range();
    let span = usize::from(high - low) + 1;
    let codes = (0..n * k).map(|i| low + (i * 37 % span) as u8).collect();
    let scale = |i: usize| scheme.scale_dtype().round(0.01 + 0.003 * (i % 11) as f32);
    let zeros = match scheme.fixed_zero() {
        Some(_) => Vec::new(),
        None => (0..n * groups).map(|i| low + (i % span) as u8).collect(),
    };
    let weight = AffineWeight::new(scheme, n, k, codes, (0..n * groups).map(scale).collect(), zeros);
    packed(&QuantizedWeight::Affine(weight.unwrap()))
}

pub fn ccq(n: usize, k: usize) -> HostWeight {
    let channel = |i: usize| Channel {
        super_scale: bf16::from_f32(0.001 + 0.0001 * i as f32),
        code_scale: 110.0 + i as f32 % 10.0,
        code_zp: 1000.0,
    };
    let codes = (0..n * k / 4).map(|i| (i * 37 + 11) as u8).collect();
    let locals = (0..n * k / 64).map(|i| (i * 5 % 16) as u8).collect();
    let weight = CcqWeight::new(k, codes, locals, (0..n).map(channel).collect()).unwrap();
    packed(&QuantizedWeight::Ccq(weight))
}

pub fn ccq25(n: usize, k: usize) -> HostWeight {
    let words = (0..n * k / 64 * 10).map(|i| (i * 40503 + 977) as u16).collect();
    let scales = (0..n)
        .map(|i| bf16::from_f32(1e-5 * (1 + i % 7) as f32))
        .collect();
    packed(&QuantizedWeight::Ccq25(
        Ccq25Weight::new(k, words, scales).unwrap(),
    ))
}

pub fn nf4(n: usize, k: usize) -> HostWeight {
    let codes = (0..n * k).map(|i| (i * 7 % 16) as u8).collect();
    let scales = (0..n * k / 64).map(|i| 0.01 * (i % 5) as f32).collect();
    packed(&QuantizedWeight::Nf4(
        Nf4Weight::new(n, k, codes, scales).unwrap(),
    ))
}

/// Weights in every form, with zeros, odd groups, one row.
pub fn weights() -> Vec<(String, HostWeight)> {
    let mut all = Vec::new();
    for dtype in [FloatDtype::F32, FloatDtype::Bf16, FloatDtype::F16] {
        for n in SIZES {
            all.push((format!("{dtype} {n} x 45"), dense(dtype, n, 45)));
        }
    }
    for (name, n, k) in [
        ("w8-sym-row-bf16", 33, 100),
        ("w8-zp-g32-f16", 5, 96),
        ("w4-sym-g64-bf16", 65, 192),
        ("w4-zp-g32-f16", 130, 96),
        ("w4-narrow-row-f32", 3, 50),
        ("w3-zp-g16-f32", 31, 80),
        ("w2-sym-g64-bf16", 64, 128),
    ] {
        all.push((name.to_owned(), affine(name, n, k)));
    }
    for (n, k) in [(1, 64), (33, 192), (65, 128)] {
        all.push((format!("wint2 {n} x {k}"), ccq(n, k)));
        all.push((format!("wint2.5 {n} x {k}"), ccq25(n, k)));
        all.push((format!("nf4 {n} x {k}"), nf4(n, k)));
    }
    all
}

/// Weights longer than what a warp takes at a time, in every form with kernels of its own.
fn long_weights() -> Vec<(String, HostWeight)> {
    let mut all: Vec<_> = [
        ("w8-sym-row-bf16", 17, 528),
        ("w8-zp-g16-f16", 3, 1040),
        ("w4-sym-g64-bf16", 15, 1088),
        ("w4-zp-g16-f32", 2, 1056),
        ("w4-narrow-row-f16", 18, 2080),
    ]
    .into_iter()
    .map(|(name, n, k)| (format!("{name} {n} x {k}"), affine(name, n, k)))
    .collect();
    all.push(("bf16 17 x 776".to_owned(), dense(FloatDtype::Bf16, 17, 776)));
    for (n, k) in [(3, 1088), (17, 2112), (1, 4160)] {
        all.push((format!("wint2 {n} x {k}"), ccq(n, k)));
        all.push((format!("nf4 {n} x {k}"), nf4(n, k)));
    }
    all
}

#[test]
fn products_with_few_rows_are_the_references() {
    let Some((gpu, _)) = both("products_with_few_rows_are_the_references") else {
        return;
    };
    for (name, weight) in long_weights() {
        let (there, exact) = (gpu.weight(&weight), decode(&weight));
        for m in [1, 2, 4, 5, 16] {
            let x = numbers(m as u64, m * weight.k);
            let got = values(&gpu, &gpu.matmul(&gpu.upload(&x, weight.k), &there));
            let (expected, magnitudes) = matmul(&x, &exact, weight.k);
            for (i, got) in got.iter().enumerate() {
                // Chains of at most a few hundred f32 additions.
                let off = (f64::from(*got) - expected[i]).abs();
                assert!(
                    off <= magnitudes[i] / 1_048_576.0,
                    "{m} rows times {name}, value {i}: {got}, expected {}",
                    expected[i]
                );
            }
        }
    }
}

#[test]
fn products_are_the_processors() {
    let Some((gpu, cpu)) = both("products_are_the_processors") else {
        return;
    };
    for (name, weight) in weights() {
        let (there, here) = (gpu.weight(&weight), cpu.weight(&weight));
        for m in [1, 3, 7, 16, 17, 70] {
            let x = numbers(m as u64, m * weight.k);
            let left = gpu.matmul(&gpu.upload(&x, weight.k), &there);
            let right = cpu.matmul(&cpu.upload(&x, weight.k), &here);
            assert_eq!(gpu.dims(&left), (m, weight.n));
            assert_close(
                &values(&gpu, &left),
                &values(&cpu, &right),
                CLOSE,
                &format!("{m} rows times {name}"),
            );
        }
    }
}

/// Sums in f32 have one order, whatever kernel and tile does them: fused, k rising, from zero. The weights' own values are compared in
/// `decoded_rows_are_the_processors_bit_for_bit`.
#[test]
fn products_with_many_rows_are_sums_in_rising_order_bit_for_bit() {
    let Some((gpu, _)) = both("products_with_many_rows_are_sums_in_rising_order_bit_for_bit") else {
        return;
    };
    let mut all = weights();
    all.extend(long_weights());
    for (n, k) in [(129, 136), (127, 24), (256, 8), (132, 512)] {
        all.push((format!("bf16 {n} x {k}"), dense(FloatDtype::Bf16, n, k)));
        all.push((format!("f32 {n} x {k}"), dense(FloatDtype::F32, n, k)));
        all.push((format!("int8 {n} x {k}"), affine("w8-sym-row-bf16", n, k)));
        all.push((format!("int4 {n} x {k}"), affine("w4-narrow-row-f16", n, k)));
    }
    for (n, k) in [(129, 192), (130, 64), (256, 128)] {
        all.push((format!("wint2 {n} x {k}"), ccq(n, k)));
        all.push((format!("nf4 {n} x {k}"), nf4(n, k)));
    }
    let (mut compared, mut telling) = (0, 0);
    for (name, weight) in all {
        let (there, exact) = (gpu.weight(&weight), decode(&weight));
        for m in [17, 128, 131] {
            let k = weight.k;
            let x = numbers(m as u64, m * k);
            let tiles = |tiles| {
                let gpu = gpu.clone().with_tiles(tiles);
                values(&gpu, &gpu.matmul(&gpu.upload(&x, k), &there))
            };
            let got = tiles(Tiles::Large);
            assert!(got == tiles(Tiles::Small), "{m} rows times {name}");
            assert_eq!(got.len(), m * weight.n);
            for (i, got) in got.iter().enumerate() {
                let (x, w) = (&x[i / weight.n * k..][..k], &exact[i % weight.n * k..][..k]);
                let rising = x.iter().zip(w).fold(0.0f32, |sum, (x, w)| x.mul_add(*w, sum));
                assert_eq!(
                    got.to_bits(),
                    (rising + 0.0).to_bits(),
                    "{m} rows times {name}, value {i}"
                );
                if i % 16 == 0 {
                    let falling = x.iter().zip(w).rev();
                    telling += usize::from(falling.fold(0.0f32, |sum, (x, w)| x.mul_add(*w, sum)) != rising);
                    compared += 1;
                }
            }
        }
    }
    assert!(
        telling * 2 > compared,
        "{telling} of {compared} tell orders apart"
    );
}

#[test]
fn decoded_rows_are_the_processors_bit_for_bit() {
    let Some((gpu, cpu)) = both("decoded_rows_are_the_processors_bit_for_bit") else {
        return;
    };
    for (name, weight) in weights() {
        let ids: Vec<u32> = [0, weight.n - 1, weight.n / 2, 0].map(|id| id as u32).to_vec();
        let left = gpu.embed(&gpu.weight(&weight), &ids);
        let right = cpu.embed(&cpu.weight(&weight), &ids);
        let bits = |x: Vec<f32>| -> Vec<u32> { x.into_iter().map(|x| (x + 0.0).to_bits()).collect() };
        assert_eq!(bits(values(&gpu, &left)), bits(values(&cpu, &right)), "{name}");
    }
}

#[test]
fn second_moments_are_the_processors() {
    let Some((gpu, cpu)) = both("second_moments_are_the_processors") else {
        return;
    };
    for (m, k) in [(1, 1), (31, 17), (600, 33), (513, 64), (40, 200)] {
        let x = numbers(k as u64, m * k);
        let (mut left, mut right) = (vec![0.5f64; k * k], vec![0.5f64; k * k]);
        gpu.gram(&gpu.upload(&x, k), &mut left);
        gpu.fault().unwrap();
        cpu.gram(&cpu.upload(&x, k), &mut right);
        let top = right.iter().fold(0f64, |top, x| top.max(x.abs()));
        for (l, r) in left.iter().zip(&right) {
            assert!((l - r).abs() <= 1e-6 * top, "{m} x {k}: {l}, expected {r}");
        }
    }
}

#[test]
fn second_moments_on_tensor_cores_are_within_their_bound() {
    let Some((gpu, _)) = both("second_moments_on_tensor_cores_are_within_their_bound") else {
        return;
    };
    within_bound(&gpu.with_precision(Precision::Bf16));
}

#[test]
fn second_moments_by_warpgroups_are_within_their_bound() {
    if let Some(gpu) = warpgroups("second_moments_by_warpgroups_are_within_their_bound") {
        let before = gpu.warpgroup_products();
        within_bound(&gpu);
        assert!(gpu.warpgroup_products() > before, "by warpgroups");
    }
}

/// Second moments of columns of many sizes, beside sums in f64.
fn within_bound(gpu: &CudaBackend) {
    for (m, k) in [(1, 1), (31, 17), (33, 130), (65, 300), (513, 129), (1100, 40)] {
        let mut x = numbers(k as u64, m * k);
        // Columns of many sizes.
        x.iter_mut()
            .enumerate()
            .for_each(|(i, x)| *x *= 2f32.powi((i % k % 30) as i32 - 15));
        let mut moment = vec![0.5f64; k * k];
        gpu.gram(&gpu.upload(&x, k), &mut moment);
        gpu.fault().unwrap();
        for i in 0..k {
            for j in 0..k {
                let products = || x.chunks_exact(k).map(|row| f64::from(row[i]) * f64::from(row[j]));
                let (right, size) = (
                    0.5 + products().sum::<f64>(),
                    products().map(f64::abs).sum::<f64>(),
                );
                let off = (moment[i * k + j] - right).abs();
                // The halves' bound, and f32 sums of 512 products.
                let bound = size * (3.0 / 262_144.0 + 1.0 / 1_048_576.0);
                assert!(
                    off <= bound,
                    "{m} x {k}, ({i}, {j}): {}, expected {right}",
                    moment[i * k + j]
                );
            }
        }
    }
}

/// Sums of inputs that stay on the device over batches, beside the processor's.
#[test]
fn what_inputs_add_up_to() {
    let Some((gpu, cpu)) = both("what_inputs_add_up_to") else {
        return;
    };
    // No room for 130 x 130 sums beside a quarter that stays free, but for a while beside a batch.
    let (small, mut on_the_host) = (probe_with(180 << 10), 0);
    for full in [true, false] {
        for k in [1, 31, 33, 64, 130] {
            for (gpu, most) in [(&gpu, 600), (&small, 60)] {
                let (mut there, mut here) = (gpu.sums(k, full), cpu.sums(k, full));
                for (batch, m) in [5usize, 0, 1, most, 33].into_iter().enumerate() {
                    let x = numbers((batch * 1000 + k) as u64, m * k);
                    gpu.watch(&gpu.upload(&x, k), &mut there);
                    cpu.watch(&cpu.upload(&x, k), &mut here);
                }
                gpu.fault().unwrap();
                on_the_host += usize::from(full && gpu.device().memory().used < 8 * k * k);
                let (there, here) = (gpu.summed(there).unwrap(), cpu.summed(here).unwrap());
                let rows = 39 + most as u64;
                assert_eq!((there.rows, there.finite), (rows, true));
                assert_eq!(
                    (&there.tops, here.rows, here.finite),
                    (&here.tops, rows, true),
                    "{k}"
                );
                assert_eq!(there.moment.len(), if full { k * k } else { k });
                let top = here.moment.iter().fold(0f64, |top, x| top.max(x.abs()));
                let bound = if full { 2e-6 } else { 1e-13 };
                for (i, (l, r)) in there.moment.iter().zip(&here.moment).enumerate() {
                    assert!(
                        (l - r).abs() <= bound * top,
                        "{k} {full}, value {i}: {l}, expected {r}"
                    );
                }
            }
        }
    }
    assert_eq!(on_the_host, 1, "the largest of the small device alone");
    // Nothing seen, and something that is no number.
    let nothing = gpu.summed(gpu.sums(3, true)).unwrap();
    assert_eq!(
        (nothing.rows, nothing.moment, nothing.finite),
        (0, vec![0.0; 9], true)
    );
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let x = [1.0, 2.0, bad, 4.0];
        let (mut there, mut here) = (gpu.sums(2, false), cpu.sums(2, false));
        gpu.watch(&gpu.upload(&x, 2), &mut there);
        cpu.watch(&cpu.upload(&x, 2), &mut here);
        assert!(
            !gpu.summed(there).unwrap().finite && !cpu.summed(here).unwrap().finite,
            "{bad}"
        );
    }
}

/// A device that may use so much memory; too little for second moments to stay there.
fn probe_with(budget: usize) -> CudaBackend {
    CudaBackend::new(qtool_kernels::cuda::open(0, Some(budget)).expect("a device"))
}
