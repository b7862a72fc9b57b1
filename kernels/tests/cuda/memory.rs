//! Device memory under a budget: weights that take turns in it, tensors that push them out, and what does not fit.

use std::sync::Arc;

use qtool_formats::FloatDtype;
use qtool_kernels::backend::{Form, HostWeight};
use qtool_kernels::cuda::open;
use qtool_kernels::{Backend, CudaBackend};

use crate::{CLOSE, assert_close, both, numbers, values};

/// Columns of the weights here.
const K: usize = 64;

fn weight(seed: u64, n: usize) -> HostWeight {
    let bytes = numbers(seed, n * K)
        .iter()
        .flat_map(|x| x.to_le_bytes())
        .collect::<Vec<u8>>();
    HostWeight {
        n,
        k: K,
        form: Form::Dense {
            dtype: FloatDtype::F32,
            bytes: Arc::new(bytes),
        },
    }
}

fn within(budget: usize) -> CudaBackend {
    CudaBackend::new(open(0, Some(budget)).unwrap())
}

#[test]
fn weights_take_turns() {
    let Some((_, cpu)) = both("weights_take_turns") else {
        return;
    };
    // Six weights of 8 to 18 KiB, 78 KiB in all.
    let hosts: Vec<HostWeight> = (0..6).map(|i| weight(i, 32 + 8 * i as usize)).collect();
    let x = numbers(99, 3 * K);
    let expected: Vec<Vec<f32>> = hosts
        .iter()
        .map(|host| cpu.download(&cpu.matmul(&cpu.upload(&x, K), &cpu.weight(host))))
        .collect();
    for budget in [96 << 10, 64 << 10, 40 << 10, 24 << 10] {
        let gpu = within(budget);
        {
            let mut weights: Vec<Option<_>> = hosts.iter().map(|host| Some(gpu.weight(host))).collect();
            let there = gpu.upload(&x, K);
            // In order, as models do; then in no order, some of them gone.
            let mut order: Vec<usize> = (0..24).map(|i| i % 6).collect();
            order.extend((0..24).map(|i| (i * i * 5 + i * 7) % 6));
            for (step, i) in order.into_iter().enumerate() {
                if step == 30 {
                    weights[2] = None;
                }
                let Some(weight) = &weights[i] else { continue };
                let product = gpu.matmul(&there, weight);
                assert_close(
                    &values(&gpu, &product),
                    &expected[i],
                    CLOSE,
                    &format!("{budget} {step}"),
                );
            }
            let memory = gpu.device().memory();
            assert!(memory.most <= budget, "{memory:?}");
            if budget < 64 << 10 {
                assert!(memory.fetched > 12, "{memory:?}");
            }
            if budget == 40 << 10 {
                assert!(memory.foreseen > 0, "{memory:?}");
            }
            if budget == 64 << 10 {
                assert!(memory.foreseen * 3 > memory.fetched, "{memory:?}");
            }
        }
        assert_eq!(gpu.device().memory().used, 0, "all is given back");
    }
}

#[test]
fn tensors_push_weights_out_and_are_refused_when_nothing_is_left() {
    let Some(_) = both("tensors_push_weights_out_and_are_refused_when_nothing_is_left") else {
        return;
    };
    let gpu = within(64 << 10);
    let (host, x) = (weight(1, 100), numbers(2, 2 * K));
    let weight = gpu.weight(&host);
    let before = gpu.device().memory().used;
    assert!(before >= 100 * K * 4);
    let product = values(&gpu, &gpu.matmul(&gpu.upload(&x, K), &weight));
    // 60 KiB: the weight must go, and comes back afterwards.
    let large = gpu.upload(&numbers(3, 15 << 10), K);
    assert_eq!(values(&gpu, &large), numbers(3, 15 << 10));
    drop(large);
    assert_eq!(values(&gpu, &gpu.matmul(&gpu.upload(&x, K), &weight)), product);
    assert_eq!(gpu.device().memory().fetched, 1);
    let refused = gpu.upload(&numbers(4, 20 << 10), K);
    let fault = gpu.read(&refused).unwrap_err().to_string();
    for part in ["do not fit a budget of 1 MiB", "--device-memory", "--device cpu"] {
        assert!(fault.contains(part), "{fault}");
    }
}
