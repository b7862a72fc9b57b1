//! Routed experts as one operation, against each token's experts in f64.

use std::sync::Arc;

use qtool_formats::FloatDtype;
use qtool_kernels::backend::{Activation, ExpertWeights, Form, HostWeight, Routing, Storage};
use qtool_kernels::cuda::{Precision, open};
use qtool_kernels::reference::forward::decode;
use qtool_kernels::{Backend, CudaBackend};

use crate::products::{affine, ccq, dense, nf4};
use crate::{both, numbers, values};

/// w (N, K) times x (K), in f64.
fn times(w: &[f32], x: &[f64]) -> Vec<f64> {
    w.chunks_exact(x.len())
        .map(|row| row.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum())
        .collect()
}

/// Rows `from..from + n` of a weight, so that experts differ.
fn rows_of(whole: &HostWeight, from: usize, n: usize) -> HostWeight {
    let cut = |part: &Arc<dyn Storage>| -> Arc<dyn Storage> {
        let row = part.bytes().len() / whole.n;
        Arc::new(part.bytes()[from * row..(from + n) * row].to_vec())
    };
    let form = match &whole.form {
        Form::Dense { dtype, bytes } => Form::Dense {
            dtype: *dtype,
            bytes: cut(bytes),
        },
        Form::Packed { scheme, parts } => Form::Packed {
            scheme: *scheme,
            parts: parts.iter().map(cut).collect(),
        },
    };
    HostWeight { n, k: whole.k, form }
}

/// The definition, for one token; `round` is what is done to both factors of a product first.
fn expected(
    x: &[f32],
    logits: &[f32],
    routing: &Routing<'_>,
    experts: &[[Vec<f32>; 3]],
    columns: usize,
    round: fn(f64) -> f64,
) -> Vec<f64> {
    let times = |w: &[f32], x: &[f64]| -> Vec<f64> {
        let w: Vec<f32> = w.iter().map(|&w| round(f64::from(w)) as f32).collect();
        let x: Vec<f64> = x.iter().map(|&x| round(x)).collect();
        times(&w, &x)
    };
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let p: Vec<f64> = logits.iter().map(|l| f64::from(l - top).exp()).collect();
    let total: f64 = p.iter().sum();
    let score = |e: usize| p[e] / total + routing.bias.map_or(0.0, |bias| f64::from(bias[e]));
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|&a, &b| score(b).total_cmp(&score(a)).then(a.cmp(&b)));
    order.truncate(routing.top);
    let sum = order.iter().map(|&e| p[e] / total).sum::<f64>();
    let sum = sum.max(f64::from(routing.least_sum));
    let x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
    let mut out = vec![0.0; columns];
    for e in order {
        let [gate, up, down] = &experts[e];
        let silu = |g: f64| g / (1.0 + (-g).exp());
        let hidden: Vec<f64> = times(gate, &x)
            .iter()
            .zip(times(up, &x))
            .map(|(&g, u)| silu(g) * u)
            .collect();
        let weight = p[e] / total / sum;
        out.iter_mut()
            .zip(times(down, &hidden))
            .for_each(|(o, y)| *o += weight * y);
    }
    out
}

#[test]
fn experts_together_are_experts_one_by_one() {
    let Some((gpu, cpu)) = both("experts_together_are_experts_one_by_one") else {
        return;
    };
    type Make = fn(usize, usize) -> HostWeight;
    let makes: [(&str, Make); 3] = [
        ("f32", |n, k| dense(FloatDtype::F32, n, k)),
        ("int4", |n, k| affine("w4-sym-g64-bf16", n, k)),
        ("wint2", ccq),
    ];
    let mut cases = 0;
    for (name, make) in makes {
        for (tokens, count, top, k, width) in [
            (1usize, 1usize, 1usize, 64usize, 64usize),
            (1, 5, 5, 64, 128),
            (33, 8, 2, 64, 64),
            (130, 3, 2, 128, 64),
            (7, 64, 6, 64, 64),
            (200, 2, 2, 64, 64), // more than a tile for each expert
        ] {
            let whole = [
                make(2 * count * width, k),
                make(2 * count * width, k),
                make(count * k, width),
            ];
            let hosts: Vec<[HostWeight; 3]> = (0..count)
                .map(|e| {
                    [
                        rows_of(&whole[0], e * width, width),
                        rows_of(&whole[1], (count + e) * width, width),
                        rows_of(&whole[2], e * k, k),
                    ]
                })
                .collect();
            let there: Vec<[_; 3]> = hosts
                .iter()
                .map(|h| h.each_ref().map(|w| gpu.weight(w)))
                .collect();
            let plain: Vec<[Vec<f32>; 3]> = hosts.iter().map(|h| h.each_ref().map(decode)).collect();
            let x = numbers(9, tokens * k);
            // Every third expert gets nothing.
            let mut logits: Vec<f32> = numbers(5, tokens * count).iter().map(|l| l * 4.0).collect();
            if count > 3 * top {
                logits.iter_mut().step_by(3).for_each(|l| *l = -50.0);
            }
            let bias: Vec<f32> = numbers(6, count).iter().map(|b| b * 0.3).collect();
            for bias in [None, Some(bias.as_slice())] {
                let routing = Routing {
                    top,
                    bias,
                    least_sum: 1e-12,
                };
                let experts = ExpertWeights {
                    gate: there.iter().map(|w| &w[0]).collect(),
                    up: there.iter().map(|w| &w[1]).collect(),
                    down: there.iter().map(|w| &w[2]).collect(),
                };
                let (sent, scored) = (gpu.upload(&x, k), gpu.upload(&logits, count));
                let got = gpu.experts(&sent, &scored, &routing, &experts, Activation::Silu);
                let got = values(&gpu, &got.expect("an operation for it"));
                assert_eq!(got.len(), tokens * k);
                for (m, got) in got.chunks_exact(k).enumerate() {
                    let (x, l) = (&x[m * k..(m + 1) * k], &logits[m * count..(m + 1) * count]);
                    let right = expected(x, l, &routing, &plain, k, |x| x);
                    let most = right.iter().fold(1e-30, |most: f64, y| most.max(y.abs()));
                    for (got, right) in got.iter().zip(right) {
                        let off = (f64::from(*got) - right).abs();
                        assert!(
                            off <= 1e-5 * most,
                            "{name}, {tokens} tokens, {top} of {count}: {got}, expected {right}"
                        );
                    }
                }
                cases += 1;
            }
        }
    }
    assert_eq!(cases, 36);
    // Experts over the budget are brought in some at a time, and one that does not fit at all is refused.
    scarce_memory_changes_nothing(&gpu);
    // The processor leaves it to its other operations.
    let none: ExpertWeights<'_, qtool_kernels::CpuWeight> = ExpertWeights {
        gate: vec![],
        up: vec![],
        down: vec![],
    };
    let routing = Routing {
        top: 1,
        bias: None,
        least_sum: 0.0,
    };
    let x = cpu.upload(&[0.0], 1);
    assert!(cpu.experts(&x, &x, &routing, &none, Activation::Silu).is_none());
}

/// Numbers of a mixture of experts, on the host.
struct Mixture {
    hosts: Vec<[HostWeight; 3]>,
    x: Vec<f32>,
    logits: Vec<f32>,
    k: usize,
}

impl Mixture {
    fn new(make: fn(usize, usize) -> HostWeight, [tokens, count, k, width]: [usize; 4]) -> Self {
        let whole = [
            make(count * width, k),
            make(2 * count * width, k),
            make(count * k, width),
        ];
        let host = |e: usize| {
            [
                rows_of(&whole[0], e * width, width),
                rows_of(&whole[1], (count + e) * width, width),
                rows_of(&whole[2], e * k, k),
            ]
        };
        Self {
            hosts: (0..count).map(host).collect(),
            x: numbers(9, tokens * k),
            logits: numbers(5, tokens * count).iter().map(|l| l * 4.0).collect(),
            k,
        }
    }

    const ROUTING: Routing<'static> = Routing {
        top: 2,
        bias: None,
        least_sum: 1e-12,
    };

    fn on(&self, gpu: &CudaBackend) -> Vec<f32> {
        let there: Vec<[_; 3]> = self
            .hosts
            .iter()
            .map(|h| h.each_ref().map(|w| gpu.weight(w)))
            .collect();
        let experts = ExpertWeights {
            gate: there.iter().map(|w| &w[0]).collect(),
            up: there.iter().map(|w| &w[1]).collect(),
            down: there.iter().map(|w| &w[2]).collect(),
        };
        let (x, logits) = (
            gpu.upload(&self.x, self.k),
            gpu.upload(&self.logits, self.hosts.len()),
        );
        let got = gpu.experts(&x, &logits, &Self::ROUTING, &experts, Activation::Silu);
        gpu.read(&got.expect("an operation for it")).unwrap()
    }
}

fn scarce_memory_changes_nothing(ample: &CudaBackend) {
    let mixture = Mixture::new(|n, k| dense(FloatDtype::Bf16, n, k), [20, 7, 64, 96]);
    for precision in [Precision::F32, Precision::Bf16] {
        let whole = mixture.on(&ample.clone().with_precision(precision));
        // Seven experts of three weights of 12 KiB, and some 90 KiB for what they make of 20 tokens.
        for budget in [400 << 10, 200 << 10, 140 << 10] {
            let gpu = CudaBackend::new(open(0, Some(budget)).unwrap()).with_precision(precision);
            assert_eq!(mixture.on(&gpu), whole, "{precision:?}, {budget} bytes");
            let memory = gpu.device().memory();
            assert!(
                memory.most <= budget && (memory.fetched > 0 || budget > 300 << 10),
                "{memory:?}"
            );
        }
    }
}

#[test]
fn experts_on_tensor_cores_are_those_of_rounded_factors() {
    let Some((gpu, _)) = both("experts_on_tensor_cores_are_those_of_rounded_factors") else {
        return;
    };
    let gpu = gpu.with_precision(Precision::Bf16);
    let round = |x: f64| half::bf16::from_f32(x as f32).to_f64();
    type Make = fn(usize, usize) -> HostWeight;
    let makes: [(&str, Make); 6] = [
        ("f16", |n, k| dense(FloatDtype::F16, n, k)),
        ("bf16", |n, k| dense(FloatDtype::Bf16, n, k)),
        ("int8", |n, k| affine("w8-sym-row-bf16", n, k)),
        ("int4", |n, k| affine("w4-sym-g64-bf16", n, k)),
        ("wint2", ccq),
        ("nf4", nf4),
    ];
    for (name, make) in makes {
        for sizes in [[17, 3, 64, 64], [150, 2, 64, 128], [33, 20, 128, 64]] {
            let mixture = Mixture::new(make, sizes);
            let got = mixture.on(&gpu);
            let plain: Vec<[Vec<f32>; 3]> = mixture.hosts.iter().map(|h| h.each_ref().map(decode)).collect();
            let (k, count) = (mixture.k, mixture.hosts.len());
            let mut differ = 0;
            for (m, got) in got.chunks_exact(k).enumerate() {
                let (x, l) = (&mixture.x[m * k..][..k], &mixture.logits[m * count..][..count]);
                let right = expected(x, l, &Mixture::ROUTING, &plain, k, round);
                let exact = expected(x, l, &Mixture::ROUTING, &plain, k, |x| x);
                let most = right.iter().fold(1e-30, |most: f64, y| most.max(y.abs()));
                for ((got, right), exact) in got.iter().zip(right).zip(exact) {
                    // The hidden numbers are rounded, too, and one that lies between two goes either way.
                    let off = (f64::from(*got) - right).abs();
                    assert!(off <= 1e-3 * most, "{name}, {sizes:?}: {got}, expected {right}");
                    differ += usize::from((f64::from(*got) - exact).abs() > 1e-4 * most);
                }
            }
            assert!(differ > 0, "{name}, {sizes:?}: not on tensor cores");
        }
    }
    // Few tokens are exact, as other products are.
    let mixture = Mixture::new(ccq, [16, 3, 64, 64]);
    assert_eq!(
        mixture.on(&gpu),
        mixture.on(&gpu.clone().with_precision(Precision::F32))
    );
}
