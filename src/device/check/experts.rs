//! Routed experts as one operation, at the sizes of models with many of them, against the definition in f64 for some of the tokens.
//! Owns that definition here; the tests of the kernels have one of their own.

use half::bf16;
use qtool_kernels::backend::{Activation, ExpertWeights, HostWeight, Routing};
use qtool_kernels::cuda::Precision;
use qtool_kernels::{Backend, CudaBackend};
use rayon::prelude::*;

use super::{Check, Checks, SUMS, Size, judged, numbers, weight};
use crate::Result;
use crate::source::rows_of;

/// Experts a token is sent to.
const TOP: usize = 6;
/// Tokens that are held against the definition.
const SAMPLED: usize = 16;
/// Tokens up to which products are exact with either precision.
const FEW: usize = 16;
/// Rows of a weight that an expert's lie behind those of the one before.
const STEP: usize = 8;
/// Of the largest number, where the hidden ones are rounded to bf16 between two products: one that lies between two goes either way.
const ROUNDED: f64 = 1e-3;
/// Forms that are tried.
const FORMS: [(&str, Option<&str>); 3] = [
    ("BF16", None),
    ("INT4", Some("bits:4,method:none")),
    ("WINT2", Some("bits:2,effort:fast")),
];

/// Experts whose weights are rows of larger ones: gate and up (F, K), down (K, F), and how many there are.
struct Mixture {
    hosts: [HostWeight; 3],
    values: [Vec<f32>; 3],
    k: usize,
    f: usize,
    count: usize,
}

impl Mixture {
    fn new(options: Option<&str>, (k, f, count): (usize, usize, usize)) -> Result<Self> {
        let more = STEP * count;
        let made = [
            weight(options, f + more, k)?,
            weight(options, f + more + 1, k)?,
            weight(options, k + more, f)?,
        ];
        let [(gate, gate_values), (up, up_values), (down, down_values)] = made;
        Ok(Self {
            hosts: [gate, up, down],
            values: [gate_values, up_values, down_values],
            k,
            f,
            count,
        })
    }

    /// Rows of the weight of kind `kind` of an expert.
    fn rows(&self, kind: usize, expert: usize) -> std::ops::Range<usize> {
        let from = expert * STEP;
        from..from + if kind == 2 { self.k } else { self.f }
    }

    fn on(&self, gpu: &CudaBackend, x: &[f32], logits: &[f32], routing: &Routing<'_>) -> Result<Vec<f32>> {
        let place = |kind: usize| -> Result<Vec<_>> {
            let one = |expert| Ok(gpu.weight(&rows_of(&self.hosts[kind], self.rows(kind, expert))?));
            (0..self.count).map(one).collect()
        };
        let there = [place(0)?, place(1)?, place(2)?];
        let [gate, up, down] = there.each_ref().map(|all| all.iter().collect());
        let experts = ExpertWeights { gate, up, down };
        let (x, logits) = (gpu.upload(x, self.k), gpu.upload(logits, self.count));
        let got = gpu.experts(&x, &logits, routing, &experts, Activation::Silu);
        gpu.fault()?;
        Ok(got.map_or(Ok(Vec::new()), |got| gpu.read(&got))?)
    }

    /// What a token's experts give, with both factors of products through `round`.
    fn expected(&self, x: &[f32], logits: &[f32], routing: &Routing<'_>, round: fn(f64) -> f64) -> Vec<f64> {
        let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let p: Vec<f64> = logits.iter().map(|l| f64::from(l - top).exp()).collect();
        let total: f64 = p.iter().sum();
        let score = |e: usize| p[e] / total + routing.bias.map_or(0.0, |bias| f64::from(bias[e]));
        let mut order: Vec<usize> = (0..self.count).collect();
        order.sort_by(|&a, &b| score(b).total_cmp(&score(a)).then(a.cmp(&b)));
        order.truncate(routing.top);
        let chosen = order.iter().map(|&e| p[e] / total).sum::<f64>();
        let chosen = chosen.max(f64::from(routing.least_sum));
        let times = |kind: usize, expert: usize, x: &[f64]| -> Vec<f64> {
            let x: Vec<f64> = x.iter().map(|&x| round(x)).collect();
            let rows = self.rows(kind, expert);
            let values = &self.values[kind][rows.start * x.len()..rows.end * x.len()];
            let row = |row: &[f32]| row.iter().zip(&x).map(|(&w, x)| round(f64::from(w)) * x).sum();
            values.chunks_exact(x.len()).map(row).collect()
        };
        let x: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
        let mut out = vec![0.0; self.k];
        for e in order {
            let (gate, up) = (times(0, e, &x), times(1, e, &x));
            let silu = |g: f64| g / (1.0 + (-g).exp());
            let hidden: Vec<f64> = gate.iter().zip(up).map(|(&g, u)| silu(g) * u).collect();
            let share = p[e] / total / chosen;
            let down = times(2, e, &hidden);
            out.iter_mut().zip(down).for_each(|(out, y)| *out += share * y);
        }
        out
    }
}

/// Few tokens and many, in f32 and on tensor cores. Fails when the device does.
pub(super) fn run(checks: &mut Checks, size: Size) -> Result<()> {
    let (sizes, tokens) = match size {
        Size::Real => ((2560, 1536, 64), [16, 1024]),
        Size::Toy => ((64, 64, 8), [3, 40]),
    };
    let (k, _, count) = sizes;
    let bias: Vec<f32> = numbers(23, count).iter().map(|b| b * 0.01).collect();
    let routing = Routing {
        top: TOP.min(count),
        bias: Some(&bias),
        least_sum: 1e-12,
    };
    for (name, options) in FORMS {
        let mixture = Mixture::new(options, sizes)?;
        for m in tokens {
            let (x, logits) = (numbers(21, m * k), numbers(22, m * count));
            let logits: Vec<f32> = logits.iter().map(|l| l * 4.0).collect();
            let ways = [("f32", Precision::F32), ("tensor cores", Precision::Bf16)];
            for (way, precision) in ways.into_iter().take(if m > FEW { 2 } else { 1 }) {
                let (round, bound): (fn(f64) -> f64, f64) = match precision {
                    Precision::F32 => (|x| x, SUMS),
                    _ => (|x| bf16::from_f64(x).to_f64(), ROUNDED),
                };
                let gpu = checks.gpu.clone().with_precision(precision);
                let got = mixture.on(&gpu, &x, &logits, &routing)?;
                let what = format!("{m} tokens to {TOP} of {count} experts, {sizes:?}, {name}, {way}");
                let made = sampled(what, &mixture, (&x, &logits), &routing, &got, (round, bound));
                checks.made.push(made);
            }
        }
    }
    Ok(())
}

/// Some of the tokens beside their definition.
fn sampled(
    what: String,
    mixture: &Mixture,
    (x, logits): (&[f32], &[f32]),
    routing: &Routing<'_>,
    got: &[f32],
    (round, bound): (fn(f64) -> f64, f64),
) -> Check {
    let (k, count) = (mixture.k, mixture.count);
    let m = x.len() / k;
    let some = SAMPLED.min(m);
    let tokens: Vec<usize> = (0..some).map(|i| i * m / some).collect();
    let there = tokens.iter().map(|token| got.get(token * k..(token + 1) * k));
    let there = there.map(Option::unwrap_or_default).collect::<Vec<_>>().concat();
    let here = tokens.par_iter().map(|token| {
        let (x, logits) = (&x[token * k..][..k], &logits[token * count..][..count]);
        mixture.expected(x, logits, routing, round)
    });
    judged(what, &there, &here.collect::<Vec<_>>().concat(), bound)
}
