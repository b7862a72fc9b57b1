//! Is what a GPU computes right? Every operation at the sizes of real models, against the processor's, and products
//! against sums in f64. Owns the operations, the sizes and the bounds; those with a bound of their own are in `bounded` and
//! `experts`.

mod bounded;
mod experts;

use std::sync::Arc;

use qtool_calib::Quantizer;
use qtool_calib::options::PartialOptions;
use qtool_formats::packing::{LSB_ROWS, Packing};
use qtool_formats::{FloatDtype, QuantizedWeight};
use qtool_kernels::backend::{Activation, Form, Heads, HostWeight, RopeStyle, RopeTable, Segment, Storage};
use qtool_kernels::{Backend, CpuBackend, CudaBackend, Isa};
use serde::Serialize;

use crate::{Error, Result};

/// How large.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Size {
    /// As in models of a few billion weights.
    Real,
    /// Small enough for kernels that run on the processor: shows that the check works, and nothing else.
    Toy,
}

impl Size {
    /// Rows and columns of a square weight.
    pub fn width(self) -> usize {
        match self {
            Self::Real => 4096,
            Self::Toy => 128,
        }
    }

    /// Rows of activations of a product: one token, few, and a batch.
    pub fn rows(self) -> [usize; 4] {
        match self {
            Self::Real => [1, 8, 16, 2048],
            Self::Toy => [1, 3, 16, 33],
        }
    }
}

/// What one operation gave.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Check {
    /// The operation, its form and its sizes.
    pub what: String,
    /// Largest difference, as a share of the largest value that was expected.
    pub error: f64,
    /// Most there may be.
    pub bound: f64,
    /// Whether it holds.
    pub passed: bool,
}

/// Sums of thousands of products in f32, in another order.
const SUMS: f64 = 1e-4;
/// Functions of single numbers.
const FUNCTIONS: f64 = 1e-5;
/// Outputs of a product that are summed again in f64.
const SAMPLED: usize = 256;

/// Weights that are tried: a name and its options, or a type of floats.
pub const FORMS: [(&str, Option<&str>); 8] = [
    ("BF16", None),
    ("INT8", Some("bits:8")),
    ("INT4", Some("bits:4,method:none")),
    ("INT4 zero points", Some("bits:4,grid:zp,group:32,method:none")),
    ("INT3", Some("bits:3,method:none")),
    ("WINT2", Some("bits:2,effort:fast")),
    ("WINT2.5", Some("bits:2,method:ccq25")),
    ("NF4", Some("bits:4,method:nf4")),
];

/// Numbers of a seed, about -1 to 1.
pub fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / 8_388_608.0 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// A random weight (n, k) in one of [`FORMS`], and its rows decoded.
pub fn weight(options: Option<&str>, n: usize, k: usize) -> Result<(HostWeight, Vec<f32>)> {
    let mut values: Vec<f32> = numbers(n as u64 + 7, n * k).iter().map(|x| x * 0.05).collect();
    let form = match options {
        None => {
            let mut bytes = Vec::with_capacity(2 * n * k);
            values.iter().for_each(|&x| FloatDtype::Bf16.push(x, &mut bytes));
            values = FloatDtype::Bf16.widen(&bytes);
            Form::Dense {
                dtype: FloatDtype::Bf16,
                bytes: Arc::new(bytes),
            }
        }
        Some(options) => {
            let weight = quantized(options, &values, n, k)?;
            for (row, out) in values.chunks_exact_mut(k).enumerate() {
                weight.dequantize_row(row, out);
            }
            let parts = weight.encode(&|b, k, c, o| LSB_ROWS.pack(b, k, c, o))?;
            Form::Packed {
                scheme: weight.scheme(),
                parts: parts
                    .into_iter()
                    .map(|part| -> Arc<dyn Storage> { Arc::new(part) })
                    .collect(),
            }
        }
    };
    Ok((HostWeight { n, k, form }, values))
}

/// What chooses codes by these options.
pub(super) fn quantizer(options: &str) -> Result<Box<dyn Quantizer>> {
    let options = PartialOptions::parse(options)
        .and_then(|options| options.complete(4))
        .map_err(Error::Option)?;
    let method = qtool_calib::find(options.method).map(|method| (method.build)(&options));
    let unknown = || Error::Question {
        reason: format!("there is no method {}", options.method),
    };
    method.transpose().map_err(Error::Option)?.ok_or_else(unknown)
}

fn quantized(options: &str, values: &[f32], n: usize, k: usize) -> Result<QuantizedWeight> {
    quantizer(options)?
        .quantize(Isa::best(), values, n, k)
        .map_err(Error::Option)
}

/// Bytes of a weight as it lies.
pub fn stored_bytes(weight: &HostWeight) -> usize {
    match &weight.form {
        Form::Dense { bytes, .. } => bytes.bytes().len(),
        Form::Packed { parts, .. } => parts.iter().map(|part| part.bytes().len()).sum(),
    }
}

/// The checks, as they are made.
struct Checks {
    gpu: CudaBackend,
    cpu: CpuBackend,
    made: Vec<Check>,
}

impl Checks {
    fn add(&mut self, what: String, there: &[f32], here: &[f64], bound: f64) {
        self.made.push(judged(what, there, here, bound));
    }
}

fn judged(what: String, there: &[f32], here: &[f64], bound: f64) -> Check {
    let top = here.iter().fold(1e-30, |top: f64, x| top.max(x.abs()));
    let off = there
        .iter()
        .zip(here)
        .map(|(there, here)| (f64::from(*there) - here).abs() / top);
    // A NaN is no small difference, and the worst there is.
    let error = off.fold(
        0.0,
        |most: f64, off| if most.is_nan() || off <= most { most } else { off },
    );
    Check {
        what,
        error,
        bound,
        passed: !here.is_empty() && there.len() == here.len() && error <= bound,
    }
}

/// Runs the same lines on both devices and compares what they give.
macro_rules! alike {
    ($checks:expr, $bound:expr, $what:expr, |$device:ident| $work:expr) => {{
        let there = {
            let $device = &$checks.gpu;
            let made = $work;
            $device.read(&made)?
        };
        let here: Vec<f64> = {
            let $device = &$checks.cpu;
            let made = $work;
            $device.read(&made)?.into_iter().map(f64::from).collect()
        };
        $checks.add($what, &there, &here, $bound);
    }};
}

/// Checks every operation of a model. Fails when the device does, not when a check does.
pub fn run(gpu: &CudaBackend, size: Size) -> Result<Vec<Check>> {
    let mut checks = Checks {
        gpu: gpu.clone(),
        cpu: CpuBackend::new(Isa::best()),
        made: Vec::new(),
    };
    products(&mut checks, size)?;
    layers(&mut checks, size)?;
    attention(&mut checks, size)?;
    gram(&mut checks, size)?;
    bounded::run(&mut checks, size)?;
    experts::run(&mut checks, size)?;
    Ok(checks.made)
}

fn products(checks: &mut Checks, size: Size) -> Result<()> {
    let k = size.width();
    // No multiple of a tile.
    let n = k - 3;
    for (name, options) in FORMS {
        let (host, values) = weight(options, n, k)?;
        let on_device = checks.gpu.weight(&host);
        for m in size.rows() {
            let x = numbers(m as u64, m * k);
            let there = checks
                .gpu
                .read(&checks.gpu.matmul(&checks.gpu.upload(&x, k), &on_device))?;
            let chosen = (0..SAMPLED).map(|i| (i * 7919 % m, (i * 104_729 + i) % n));
            let (there, here): (Vec<f32>, Vec<f64>) = chosen
                .map(|(row, column)| {
                    let (x, w) = (&x[row * k..][..k], &values[column * k..][..k]);
                    let sum = x
                        .iter()
                        .zip(w)
                        .map(|(x, w)| f64::from(*x) * f64::from(*w))
                        .sum::<f64>();
                    (there[row * n + column], sum)
                })
                .unzip();
            checks.add(format!("product {m} x {k} x {n}, {name}"), &there, &here, SUMS);
        }
        let ids: Vec<u32> = (0..33).map(|i| (i * 7919 % n) as u32).collect();
        let there = checks.gpu.read(&checks.gpu.embed(&on_device, &ids))?;
        let rows = ids.iter().flat_map(|&id| &values[id as usize * k..][..k]);
        let here: Vec<f64> = rows.map(|x| f64::from(*x)).collect();
        checks.add(format!("embedding of {k} columns, {name}"), &there, &here, 0.0);
    }
    Ok(())
}

fn layers(checks: &mut Checks, size: Size) -> Result<()> {
    let (k, m) = (size.width(), size.rows()[3]);
    let (x, y, gain) = (numbers(1, m * k), numbers(2, m * k), numbers(3, k));
    let named = |what: &str| format!("{what}, {m} x {k}");
    alike!(checks, FUNCTIONS, named("RMS norm"), |d| {
        d.rms_norm(&d.upload(&x, k), &d.upload(&gain, k), 1e-6)
    });
    alike!(checks, FUNCTIONS, named("layer norm"), |d| {
        d.layer_norm(&d.upload(&x, k), &d.upload(&gain, k), &d.upload(&gain, k), 1e-6)
    });
    alike!(checks, 0.0, named("sum"), |d| {
        let mut sum = d.upload(&x, k);
        d.add(&mut sum, &d.upload(&y, k));
        sum
    });
    for f in [
        Activation::Silu,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::Relu,
        Activation::Tanh,
    ] {
        alike!(checks, FUNCTIONS, named(&format!("{f:?}")), |d| {
            let mut out = d.upload(&x, k);
            d.activate(&mut out, f);
            out
        });
    }
    alike!(checks, FUNCTIONS, named("gate"), |d| {
        let mut out = d.upload(&x, k);
        d.gate(&mut out, &d.upload(&y, k), Activation::Silu);
        out
    });
    let angles = numbers(4, m * 32);
    for style in [RopeStyle::Halves, RopeStyle::Pairs] {
        let table = RopeTable {
            style,
            half: 32,
            cos: angles.iter().map(|a| a.cos()).collect(),
            sin: angles.iter().map(|a| a.sin()).collect(),
        };
        let positions: Vec<u32> = (0..m as u32).rev().collect();
        alike!(
            checks,
            FUNCTIONS,
            named(&format!("rotary embedding, {style:?}")),
            |d| {
                let mut out = d.upload(&x, k);
                d.rope(&mut out, &positions, &table);
                out
            }
        );
    }
    let rows: Vec<usize> = (0..m).map(|i| i * 7 % m).collect();
    let weights = numbers(5, m);
    alike!(checks, FUNCTIONS, named("rows gathered and scattered"), |d| {
        let from = d.upload(&x, k);
        let mut into = d.upload(&y, k);
        d.scatter_add(&mut into, &rows, &d.gather(&from, &rows), &weights);
        into
    });
    Ok(())
}

/// In every width that has a kernel of its own, and one that has none.
fn attention(checks: &mut Checks, size: Size) -> Result<()> {
    let shapes = match size {
        Size::Real => [
            (16, 2, 128, 1024),
            (32, 8, 64, 515),
            (8, 8, 80, 257),
            (8, 1, 256, 300),
            (4, 2, 34, 70),
        ],
        Size::Toy => [
            (4, 2, 128, 17),
            (4, 2, 16, 17),
            (2, 2, 80, 9),
            (2, 1, 256, 9),
            (4, 2, 34, 9),
        ],
    };
    for (causal, (query, kv, dim, length)) in [true, false]
        .into_iter()
        .flat_map(|causal| shapes.map(|shape| (causal, shape)))
    {
        let heads = Heads {
            query,
            kv,
            dim,
            scale: 1.0 / (dim as f32).sqrt(),
            causal,
        };
        // A long sequence, a short one, and both behind a prefix; then a token that sees the long one.
        let prefix = length / 3;
        let segment = |queries, own| Segment {
            queries,
            prefix: 0..prefix,
            own,
        };
        let many = vec![
            segment(0..length, prefix..prefix + length),
            segment(length..length + 3, prefix + length..prefix + length + 3),
        ];
        let token = vec![segment(length + 2..length + 3, prefix..prefix + length)];
        let q = numbers(6, (length + 3) * query * dim);
        let (keys, values) = (
            numbers(7, (prefix + length + 3) * kv * dim),
            numbers(8, (prefix + length + 3) * kv * dim),
        );
        for (segments, tokens) in [(many, length), (token, 1)] {
            let what = format!(
                "attention of {query} and {kv} heads of {dim}, {tokens} tokens behind {prefix}, causal {causal}"
            );
            alike!(checks, SUMS, what, |d| {
                d.attention(
                    &d.upload(&q, query * dim),
                    &d.upload(&keys, kv * dim),
                    &d.upload(&values, kv * dim),
                    &segments,
                    heads,
                )
            });
        }
    }
    Ok(())
}

fn gram(checks: &mut Checks, size: Size) -> Result<()> {
    let (k, m) = match size {
        Size::Real => (2048, 2048),
        Size::Toy => (48, 40),
    };
    let x = numbers(9, m * k);
    let (mut there, mut here) = (vec![0.0; k * k], vec![0.0; k * k]);
    checks.gpu.gram(&checks.gpu.upload(&x, k), &mut there);
    checks.gpu.fault()?;
    checks.cpu.gram(&checks.cpu.upload(&x, k), &mut here);
    let there: Vec<f32> = there.into_iter().map(|x| x as f32).collect();
    checks.add(format!("second moments, {m} x {k}"), &there, &here, SUMS);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_does_not_pass() {
        let judge = |there: &[f32], bound: f64| judged(String::new(), there, &[1.0, -4.0], bound);
        assert!(judge(&[1.0, -4.0], 0.0).passed);
        let off = judge(&[1.0, -4.5], 0.1);
        assert!((off.error - 0.125).abs() < 1e-12 && !off.passed && judge(&[1.0, -4.5], 0.13).passed);
        for bad in [&[f32::NAN, -4.0][..], &[1.0, f32::INFINITY], &[1.0], &[]] {
            assert!(!judge(bad, 0.5).passed, "{bad:?}");
        }
    }

    #[test]
    fn every_form_can_be_made() {
        for (name, options) in FORMS {
            let (host, values) = weight(options, 5, 128).unwrap();
            assert!(
                values.len() == 5 * 128 && stored_bytes(&host) > 5 * 128 / 8,
                "{name}"
            );
            let spread = values.iter().fold(0f32, |top, x| top.max(x.abs()));
            assert!((0.02..0.2).contains(&spread), "{name}: {spread}");
        }
    }
}
