//! How fast is a GPU? Copies within its memory as the yardstick, and the kernels that a model spends its time in, timed
//! over many launches in a row. Owns what is timed and how often.

use std::sync::Arc;
use std::time::Instant;

use qtool_kernels::backend::{Form, Heads, HostWeight, Segment, Storage};
use qtool_kernels::cuda::{Encoder, Precision};
use qtool_kernels::{Backend, CudaBackend, Isa};
use rayon::prelude::*;
use serde::Serialize;

use super::check::{FORMS, Size, numbers, quantizer, stored_bytes, weight};
use crate::{Error, Result};

/// How often each is started in a row; the mean counts.
const TIMES: usize = 20;
/// How many times more products of few rows, which take a few microseconds each: waiting for the last must not count.
const MORE: usize = 10;
/// Rows of a weight that are made; the others are copies of them, as only the time matters.
const MADE: usize = 64;
/// What is encoded: a name and its options.
const ENCODED: [(&str, &str); 5] = [
    ("INT8", "bits:8,method:none"),
    ("INT4", "bits:4,group:64,clip:none"),
    ("INT4 clip search", "bits:4,group:64,clip:mse"),
    ("WINT2 effort fast", "bits:2,effort:fast"),
    ("WINT2", "bits:2"),
];
/// Most copies of a weight.
const MOST_COPIES: usize = 40;

/// One figure.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figure {
    /// What was timed, with its sizes.
    pub what: String,
    /// Time of one.
    pub seconds: f64,
    /// Work a second.
    pub rate: f64,
    /// Of that number: `byte/s`, `FLOP/s`, `weight/s` or `/s`.
    pub unit: &'static str,
    /// As a share of the yardstick: copies for products of few rows, for the others the product of a BF16 weight on tensor
    /// cores, by NVIDIA's library where it is there and else by our own kernel.
    pub share: Option<f64>,
}

/// Bytes of weights that take turns, so that none of them stays in the device's cache.
const IN_TURN: usize = 256 << 20;

/// Times everything.
pub fn run(gpu: &CudaBackend, size: Size) -> Result<Vec<Figure>> {
    let (bytes, times) = match size {
        Size::Real => (1 << 30, TIMES),
        Size::Toy => (1 << 16, 2),
    };
    let copy = asked(gpu, gpu.copy_rate(bytes, times))?;
    let launch = asked(gpu, gpu.launch_seconds(MORE * times))?;
    let mut figures = vec![
        Figure {
            what: format!("copy of {bytes} bytes within the device, read and written counted"),
            seconds: 2.0 * bytes as f64 / copy,
            rate: copy,
            unit: "byte/s",
            share: None,
        },
        Figure {
            what: "launch of a kernel with nothing to do".to_owned(),
            seconds: launch,
            rate: 1.0 / launch,
            unit: "/s",
            share: None,
        },
    ];
    for (n, k) in shapes(size) {
        let many = products(gpu, size, (n, k), copy, &mut figures)?;
        if n == k {
            moments(gpu, size.rows()[3], k, many, &mut figures)?;
        }
    }
    attention(gpu, size, &mut figures)?;
    encoding(gpu, size, &mut figures)?;
    Ok(figures)
}

/// Waits for what was timed.
fn asked(gpu: &CudaBackend, figure: Option<f64>) -> Result<f64> {
    gpu.fault()?;
    Ok(figure.unwrap_or(f64::NAN))
}

/// (N, K) of weights: a square one of the size of 7 G models, and the larger ones of theirs and of 70 G models.
fn shapes(size: Size) -> Vec<(usize, usize)> {
    match size {
        Size::Real => vec![(4096, 4096), (14_336, 4096), (8192, 8192)],
        Size::Toy => vec![(size.width(), size.width())],
    }
}

/// A weight (n, k) of copies of a few rows.
fn repeated(options: Option<&str>, n: usize, k: usize) -> Result<HostWeight> {
    let (few, _) = weight(options, MADE, k)?;
    let grow = |part: &Arc<dyn Storage>| -> Arc<dyn Storage> { Arc::new(part.bytes().repeat(n / MADE)) };
    let form = match &few.form {
        Form::Dense { dtype, bytes } => Form::Dense {
            dtype: *dtype,
            bytes: grow(bytes),
        },
        Form::Packed { scheme, parts } => Form::Packed {
            scheme: *scheme,
            parts: parts.iter().map(grow).collect(),
        },
    };
    Ok(HostWeight { n, k, form })
}

/// Products by a weight (n, k) in every form. Gives the rate of the plain one of many rows on tensor cores, the yardstick.
fn products(
    gpu: &CudaBackend,
    size: Size,
    (n, k): (usize, usize),
    copy: f64,
    figures: &mut Vec<Figure>,
) -> Result<Option<f64>> {
    let (times, in_turn) = match size {
        Size::Real => (TIMES, IN_TURN),
        Size::Toy => (2, 1),
    };
    let tensor = gpu.clone().with_precision(Precision::Bf16);
    let own = tensor.clone().without_library();
    let warpgroups = own.clone().with_precision(Precision::Bf16Warpgroups);
    let (mut plain, mut plain_of) = (None, None);
    for (name, options) in FORMS {
        let host = repeated(options, n, k)?;
        let stored = stored_bytes(&host);
        let copies = in_turn.div_ceil(stored).min(MOST_COPIES);
        let weights: Vec<_> = (0..copies).map(|_| gpu.weight(&host)).collect();
        for m in size.rows() {
            let x = gpu.upload(&numbers(m as u64, m * k), k);
            if m <= 16 {
                let often = if size == Size::Real { MORE * times } else { times };
                let seconds = asked(gpu, gpu.product_seconds(&x, &weights, often))?;
                let rate = stored as f64 / seconds;
                figures.push(Figure {
                    what: format!("product {m} x {k} x {n}, {name}, bytes of the weight"),
                    seconds,
                    rate,
                    unit: "byte/s",
                    share: Some(rate / copy),
                });
                continue;
            }
            // The first of them is the yardstick of all that follow.
            let library = tensor.library().ok().filter(|_| options.is_none());
            let on_cores = match &library {
                Some(name) => format!("tensor cores, {name}"),
                None => "tensor cores".to_owned(),
            };
            let mut ways = vec![("f32".to_owned(), gpu), (on_cores, &tensor)];
            if library.is_some() {
                ways.push(("tensor cores, own kernel".to_owned(), &own));
            }
            if warpgroups.warpgroups().is_ok() {
                ways.push(("tensor cores by warpgroups".to_owned(), &warpgroups));
            }
            for (precision, backend) in ways {
                let seconds = asked(gpu, backend.product_seconds(&x, &weights, times))?;
                let rate = 2.0 * (m * k * n) as f64 / seconds;
                let yardstick = options.is_none() && precision != "f32" && plain_of != Some(m);
                if yardstick {
                    (plain, plain_of) = (Some(rate), Some(m));
                }
                figures.push(Figure {
                    what: format!("product {m} x {k} x {n}, {name}, {precision}"),
                    seconds,
                    rate,
                    unit: "FLOP/s",
                    share: plain.filter(|_| precision != "f32").map(|plain| rate / plain),
                });
            }
        }
    }
    Ok(plain)
}

/// Second moments, counted as the whole product x^T x, of which the half below the diagonal is not computed.
fn moments(
    gpu: &CudaBackend,
    rows: usize,
    k: usize,
    plain: Option<f64>,
    figures: &mut Vec<Figure>,
) -> Result<()> {
    let x = gpu.upload(&numbers(1, rows * k), k);
    let ways = [
        ("f32", Precision::F32),
        ("tensor cores", Precision::Bf16),
        ("tensor cores by warpgroups", Precision::Bf16Warpgroups),
    ];
    let some = if gpu.warpgroups().is_ok() { 3 } else { 2 };
    for (how, precision) in ways.into_iter().take(some) {
        let backend = gpu.clone().with_precision(precision);
        let times = if rows > MADE { TIMES } else { 2 };
        let seconds = asked(&backend, backend.gram_seconds(&x, times))?;
        let rate = 2.0 * (rows * k) as f64 * k as f64 / seconds;
        figures.push(Figure {
            what: format!("second moments of {rows} x {k}, {how}"),
            seconds,
            rate,
            unit: "FLOP/s",
            share: plain.map(|plain| rate / plain),
        });
    }
    Ok(())
}

/// Attention of a model shaped as ERNIE-4.5-0.3B: many short sequences, a few long ones, and a token each for many. Only products that
/// a query's own keys need are counted.
fn attention(gpu: &CudaBackend, size: Size, figures: &mut Vec<Figure>) -> Result<()> {
    let cases = match size {
        Size::Real => [(64, 128, 128), (2, 4096, 4096), (64, 1, 1024)],
        Size::Toy => [(3, 5, 5), (1, 70, 70), (2, 1, 9)],
    };
    let heads = Heads {
        query: 16,
        kv: 2,
        dim: 128,
        scale: 1.0 / 128f32.sqrt(),
        causal: true,
    };
    let (wide, narrow) = (heads.query * heads.dim, heads.kv * heads.dim);
    for (sequences, queries, keys) in cases {
        let segment = |i| Segment {
            queries: i * queries..(i + 1) * queries,
            prefix: 0..0,
            own: i * keys..(i + 1) * keys,
        };
        let segments: Vec<Segment> = (0..sequences).map(segment).collect();
        let there = [
            (1, sequences * queries, wide),
            (2, sequences * keys, narrow),
            (3, sequences * keys, narrow),
        ]
        .map(|(seed, rows, columns)| gpu.upload(&numbers(seed, rows * columns), columns));
        let times = if size == Size::Real { TIMES } else { 2 };
        let seconds = asked(
            gpu,
            gpu.attention_seconds(there.each_ref(), &segments, heads, times),
        )?;
        let seen: usize = (0..queries).map(|i| keys - queries + 1 + i).sum();
        figures.push(Figure {
            what: format!("attention of {sequences} sequences, {queries} queries and {keys} keys each"),
            seconds,
            rate: 4.0 * (sequences * seen * wide) as f64 / seconds,
            unit: "FLOP/s",
            share: None,
        });
    }
    Ok(())
}

/// Codes chosen on the device, from numbers on the host to codes there, by several threads as `quantize` does.
fn encoding(gpu: &CudaBackend, size: Size, figures: &mut Vec<Figure>) -> Result<()> {
    let (n, k) = match size {
        Size::Real => (8192, 8192),
        Size::Toy => (2, 128),
    };
    let encoder = Encoder::new(gpu.shared_device());
    let x: Vec<f32> = numbers(2, n * k).iter().map(|x| x * 0.05).collect();
    for (name, options) in ENCODED {
        let there = quantizer(options)?.on_device(&encoder).map_err(Error::Option)?;
        let Some(there) = there else { continue };
        let rows = there.rows_together(k).unwrap_or(1).min(n);
        let encode = || {
            x.par_chunks(rows * k).try_for_each(|part| {
                let made = there.quantize(Isa::best(), part, part.len() / k, k);
                made.map(drop).map_err(Error::Option)
            })
        };
        encode()?;
        let start = Instant::now();
        encode()?;
        let seconds = start.elapsed().as_secs_f64();
        figures.push(Figure {
            what: format!("encoding of {n} x {k}, {name}"),
            seconds,
            rate: (n * k) as f64 / seconds,
            unit: "weight/s",
            share: None,
        });
    }
    Ok(())
}
