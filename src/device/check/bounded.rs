//! Operations with a bound of their own: products on tensor cores, scores of logits in f64, and codes, which must be the
//! same. Owns what each is held against.

use qtool_formats::FloatDtype;
use qtool_kernels::cuda::{Encoder, Precision};
use qtool_kernels::{Backend, CudaBackend, Isa};

use super::{Check, Checks, FORMS, SAMPLED, Size, judged, numbers, quantizer, weight};
use crate::Result;

/// Sums of tensor cores, as a share of the sum of magnitudes: 256 additions of 16 products, each cut off at 2^-23 of the sum
/// so far. Factors that were rounded otherwise would be off by 2^-9.
const CORES: f64 = 1.0 / 32_768.0;
/// Second moments of two times bf16, by the same count and 3 * 2^-18 for what is left out.
const MOMENTS: f64 = CORES + 3.0 / 262_144.0;
/// Sums in f64, in another order.
const EXACT: f64 = 1e-10;
/// Ways to choose codes that a GPU has.
const CODES: [(&str, &str); 5] = [
    ("INT8", "bits:8,method:none"),
    ("INT4, clip search", "bits:4,group:64,clip:mse"),
    (
        "INT4 zero points, clip search",
        "bits:4,grid:zp,group:32,clip:mse",
    ),
    ("WINT2, effort fast", "bits:2,effort:fast"),
    ("WINT2", "bits:2"),
];

/// All of them. Fails when the device does.
pub(super) fn run(checks: &mut Checks, size: Size) -> Result<()> {
    let cores = checks.gpu.clone().with_precision(Precision::Bf16);
    products(checks, &cores, size)?;
    moments(checks, &cores, size)?;
    scores(checks, size)?;
    codes(checks, size)
}

/// Products of factors that were rounded to bf16, by NVIDIA's library where it is there, and by our own kernel.
fn products(checks: &mut Checks, cores: &CudaBackend, size: Size) -> Result<()> {
    let (k, m) = (size.width(), size.rows()[3]);
    let n = k - 3;
    let rounded = |values: &[f32]| -> Vec<f32> {
        let mut bytes = Vec::with_capacity(2 * values.len());
        values.iter().for_each(|&x| FloatDtype::Bf16.push(x, &mut bytes));
        FloatDtype::Bf16.widen(&bytes)
    };
    for (name, options) in FORMS {
        let (host, values) = weight(options, n, k)?;
        let x = numbers(m as u64 + 1, m * k);
        let (left, right) = (rounded(&x), rounded(&values));
        let mut ways = vec![("tensor cores", cores.clone().without_library())];
        if options.is_none() && cores.library().is_ok() {
            ways.push(("library", cores.clone()));
        }
        if cores.warpgroups().is_ok() {
            let by = cores.clone().without_library();
            ways.push(("warpgroups", by.with_precision(Precision::Bf16Warpgroups)));
        }
        for (way, gpu) in ways {
            let there = gpu.read(&gpu.matmul(&gpu.upload(&x, k), &gpu.weight(&host)))?;
            let off = (0..SAMPLED).map(|i| {
                let (row, column) = (i * 7919 % m, (i * 104_729 + i) % n);
                let pairs = left[row * k..][..k].iter().zip(&right[column * k..][..k]);
                let (sum, magnitude) = pairs.fold((0.0, 1e-30), |(sum, magnitude), (x, w)| {
                    let product = f64::from(*x) * f64::from(*w);
                    (sum + product, magnitude + product.abs())
                });
                (f64::from(there[row * n + column]) - sum).abs() / magnitude
            });
            let what = format!("product {m} x {k} x {n}, {name}, {way}, of the sum of magnitudes");
            checks.made.push(least(what, off, CORES));
        }
    }
    Ok(())
}

fn moments(checks: &mut Checks, cores: &CudaBackend, size: Size) -> Result<()> {
    let (k, m) = match size {
        Size::Real => (2048, 2048),
        Size::Toy => (48, 40),
    };
    let x = numbers(10, m * k);
    let mut here = vec![0.0; k * k];
    checks.cpu.gram(&checks.cpu.upload(&x, k), &mut here);
    let mut ways = vec![("tensor cores", cores.clone())];
    if cores.warpgroups().is_ok() {
        let by = cores.clone().with_precision(Precision::Bf16Warpgroups);
        ways.push(("warpgroups", by));
    }
    for (way, gpu) in ways {
        let mut there = vec![0.0; k * k];
        gpu.gram(&gpu.upload(&x, k), &mut there);
        gpu.fault()?;
        let there: Vec<f32> = there.into_iter().map(|x| x as f32).collect();
        let what = format!("second moments, {m} x {k}, {way}");
        checks.made.push(judged(what, &there, &here, MOMENTS));
    }
    Ok(())
}

/// ln p, and two models' logits beside each other, for a whole vocabulary.
fn scores(checks: &mut Checks, size: Size) -> Result<()> {
    let (m, v) = match size {
        Size::Real => (64, 103_424),
        Size::Toy => (3, 301),
    };
    let spread = |seed| -> Vec<f32> { numbers(seed, m * v).iter().map(|x| x * 12.0).collect() };
    let (base, candidate) = (spread(11), spread(12));
    let targets: Vec<u32> = (0..m).map(|i| (i * 7919 % v) as u32).collect();
    let gpu = &checks.gpu;
    let (there_base, there) = (gpu.upload(&base, v), gpu.upload(&candidate, v));
    let wanted: Vec<Vec<u32>> = targets.iter().map(|&t| vec![t, 0]).collect();
    let found = gpu.log_p(&there, &wanted);
    let beside = gpu.divergences(&there_base, &there, &targets);
    gpu.fault()?;
    let off = candidate.chunks_exact(v).zip(wanted.iter().zip(&found));
    let off = off.flat_map(|(row, (wanted, found))| {
        let norm = row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
        let each = wanted.iter().zip(found);
        each.map(move |(&t, found)| (found - (f64::from(row[t as usize]) - norm)).abs())
    });
    let made = least(format!("ln p of {m} rows of {v} logits"), off, EXACT);
    checks.made.push(made);
    let cpu = &checks.cpu;
    let here = cpu.divergences(&cpu.upload(&base, v), &cpu.upload(&candidate, v), &targets);
    let off = here.iter().zip(&beside).map(|pair| match pair {
        (Some(here), Some(there)) if here.agreed == there.agreed => (here.kl - there.kl)
            .abs()
            .max((here.delta_p - there.delta_p).abs()),
        _ => f64::NAN,
    });
    let made = least(format!("divergence of {m} rows of {v} logits"), off, EXACT);
    checks.made.push(made);
    Ok(())
}

/// Codes of both devices, which must be equal: the error is 1 where they are not.
fn codes(checks: &mut Checks, size: Size) -> Result<()> {
    let (n, k) = match size {
        Size::Real => (259, 4096),
        Size::Toy => (3, 128),
    };
    let encoder = Encoder::new(checks.gpu.shared_device());
    let x: Vec<f32> = numbers(13, n * k).iter().map(|x| x * x * x * 0.05).collect();
    for (name, options) in CODES {
        let here = quantizer(options)?;
        let there = here.on_device(&encoder).map_err(crate::Error::Option)?;
        let what = format!("codes of {n} x {k}, {name}: the same");
        let error = match there {
            Some(there) => {
                let choose = |by: &dyn qtool_calib::Quantizer| by.quantize(Isa::best(), &x, n, k);
                let both = choose(&*here).and_then(|here| Ok((here, choose(&*there)?)));
                let (here, there) = both.map_err(crate::Error::Option)?;
                f64::from(u8::from(here != there))
            }
            None => f64::NAN,
        };
        checks.made.push(least(what, std::iter::once(error), 0.0));
    }
    Ok(())
}

/// The largest of `off`, at most `bound`; a NaN is the largest.
fn least(what: String, off: impl Iterator<Item = f64>, bound: f64) -> Check {
    let mut count = 0;
    let error = off.fold(0.0, |most: f64, off| {
        count += 1;
        if most.is_nan() || off <= most { most } else { off }
    });
    Check {
        what,
        error,
        bound,
        passed: count > 0 && error <= bound,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_and_no_number_do_not_pass() {
        assert!(least(String::new(), [0.1, 0.2].into_iter(), 0.2).passed);
        for bad in [&[][..], &[0.3], &[0.1, f64::NAN], &[f64::NAN, 0.1]] {
            assert!(!least(String::new(), bad.iter().copied(), 0.2).passed, "{bad:?}");
        }
        for (name, options) in CODES {
            assert!(quantizer(options).is_ok(), "{name}");
        }
    }
}
