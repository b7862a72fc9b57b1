//! Codes chosen on a GPU are the processor's, byte for byte. Needs a driver: a real one, or the library that
//! `kernels/cuda/host/build` makes. Without one these tests say that they were skipped; with QTOOL_REQUIRE_CUDA=1 that is a
//! failure.

use std::io::Write;

use qtool_calib::options::PartialOptions;
use qtool_calib::stats::Moment;
use qtool_calib::{CalibError, LayerStats, Quantizer};
use qtool_kernels::Isa;
use qtool_kernels::cuda::{Encoder, probe};

fn encoder(test: &str) -> Option<Encoder> {
    match probe(0) {
        Ok(device) => Some(Encoder::new(device)),
        Err(reason) => {
            let required = std::env::var_os("QTOOL_REQUIRE_CUDA").is_some_and(|v| v == "1");
            assert!(!required, "QTOOL_REQUIRE_CUDA=1, and {reason}");
            // Past the test harness, which swallows what a passing test prints.
            let _ = writeln!(std::io::stderr(), "SKIPPED {test}: {reason}");
            None
        }
    }
}

fn quantizer(options: &str) -> Box<dyn Quantizer> {
    let options = PartialOptions::parse(options).unwrap().complete(8).unwrap();
    (qtool_calib::find(options.method).unwrap().build)(&options).unwrap()
}

/// Deterministic, nearly Gaussian numbers.
fn gaussian(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / 16_777_216.0
    };
    (0..count)
        .map(|_| (0..12).map(|_| uniform()).sum::<f32>() - 6.0)
        .collect()
}

/// Rows of `k` weights with everything that is hard: zeros, ties, outliers, the ends of the range, subnormal numbers.
fn rows(k: usize) -> Vec<(&'static str, Vec<f32>)> {
    let plain = || gaussian(k as u64, k);
    let scaled = |factor: f32| plain().into_iter().map(|x| x * factor).collect::<Vec<f32>>();
    let mut outlier = plain();
    outlier[k / 3] = 300.0;
    let mut first_group_zero = plain();
    first_group_zero[..k.min(64)].fill(0.0);
    let mut last_group_zero = plain();
    last_group_zero[k - k.min(64)..].fill(-0.0);
    let mut spread = plain();
    spread
        .iter_mut()
        .enumerate()
        .for_each(|(i, x)| *x *= 2f32.powi((i / 64 % 40) as i32 - 20));
    vec![
        ("plain", plain()),
        ("zeros", vec![0.0; k]),
        ("all the same", vec![-0.75; k]),
        (
            "halves: ties",
            (0..k).map(|i| (i % 31) as f32 * 0.5 - 7.5).collect(),
        ),
        ("positive", plain().into_iter().map(f32::abs).collect()),
        ("tiny", scaled(1e-38)),
        ("subnormal", scaled(1e-43)),
        ("below f16", scaled(1e-9)),
        ("large", scaled(1e37)),
        ("one outlier", outlier),
        ("a group of zeros first", first_group_zero),
        ("a group of zeros last", last_group_zero),
        ("groups of many sizes", spread),
    ]
}

/// The same codes of both, of these numbers and of them in BF16, which go to the device in another form.
fn assert_same(what: &str, cpu: &dyn Quantizer, gpu: &dyn Quantizer, x: &[f32], n: usize) {
    let short: Vec<f32> = x.iter().map(|&x| half::bf16::from_f32(x).to_f32()).collect();
    same_codes(what, cpu, gpu, x, n);
    same_codes(&format!("{what}, in bf16"), cpu, gpu, &short, n);
}

fn same_codes(what: &str, cpu: &dyn Quantizer, gpu: &dyn Quantizer, x: &[f32], n: usize) {
    let k = x.len() / n;
    let (left, right) = (
        gpu.quantize(Isa::best(), x, n, k),
        cpu.quantize(Isa::best(), x, n, k),
    );
    match (left, right) {
        (Ok(left), Ok(right)) => {
            assert_eq!(left.codes(), right.codes(), "{what}: codes");
            assert_eq!(left, right, "{what}");
        }
        (left, right) => {
            let said = |result: Result<_, CalibError>| result.err().map(|e| e.to_string());
            assert_eq!(said(left), said(right), "{what}");
        }
    }
}

#[test]
fn affine_codes_are_the_processors() {
    let Some(encoder) = encoder("affine_codes_are_the_processors") else {
        return;
    };
    let mut cases = 0;
    for (options, widths) in [
        ("bits:8,clip:none", &[1usize, 31, 33, 127, 129, 640][..]),
        ("bits:8,clip:mse", &[1, 31, 130]),
        ("bits:8,clip:mse,grid:zp,group:32,scale:f16", &[96]),
        ("bits:8,clip:none,grid:zp,scale:f32", &[33, 129]),
        ("bits:4,group:64,clip:none", &[64, 192]),
        ("bits:4,group:64,clip:mse", &[64, 320]),
        ("bits:4,group:128,clip:mse,scale:f16", &[256]),
        ("bits:4,group:64,grid:zp,clip:none,scale:f16", &[192]),
        ("bits:4,group:32,grid:zp,clip:mse", &[96]),
        ("bits:4,group:16,grid:narrow,clip:mse,scale:f32", &[80]),
        ("bits:4,group:row,grid:narrow,clip:mse", &[131]),
        ("bits:3,group:512,clip:mse", &[512]),
        ("bits:3,group:16,grid:zp,clip:none", &[48]),
    ] {
        let cpu = quantizer(options);
        let gpu = cpu.on_device(&encoder).unwrap().expect("a kernel");
        assert_eq!((gpu.describe(), gpu.scheme()), (cpu.describe(), cpu.scheme()));
        for &k in widths {
            let rows = rows(k);
            for (name, row) in &rows {
                assert_same(&format!("{options}, K = {k}, {name}"), &*cpu, &*gpu, row, 1);
                cases += 1;
            }
            let all: Vec<f32> = rows
                .iter()
                .filter(|(name, _)| !["large", "one outlier"].contains(name))
                .flat_map(|(_, row)| row.clone())
                .collect();
            assert_same(
                &format!("{options}, K = {k}, all rows"),
                &*cpu,
                &*gpu,
                &all,
                all.len() / k,
            );
        }
    }
    // Many groups: some have candidates that are nearly as good as each other.
    let (cpu, x) = (quantizer("bits:8,clip:mse,group:32"), gaussian(99, 4096 * 32));
    let gpu = cpu.on_device(&encoder).unwrap().expect("a kernel");
    assert_same("many groups", &*cpu, &*gpu, &x, 64);
    assert!(cases > 200, "{cases}");
}

#[test]
fn wint2_codes_are_the_processors() {
    let Some(encoder) = encoder("wint2_codes_are_the_processors") else {
        return;
    };
    let mut cases = 0;
    for (effort, widths) in [
        ("fast", &[64usize, 192, 1280][..]),
        ("default", &[64, 320, 1088]),
        ("best", &[128]),
    ] {
        let cpu = quantizer(&format!("bits:2,effort:{effort}"));
        let gpu = cpu.on_device(&encoder).unwrap().expect("a kernel");
        assert_eq!(gpu.describe(), cpu.describe());
        for &k in widths {
            let rows = rows(k);
            let rows = if effort == "best" { &rows[..5] } else { &rows[..] };
            let all: Vec<f32> = rows.iter().flat_map(|(_, row)| row.clone()).collect();
            assert_same(
                &format!("effort {effort}, K = {k}, all rows"),
                &*cpu,
                &*gpu,
                &all,
                rows.len(),
            );
            for (name, row) in rows {
                assert_same(&format!("effort {effort}, K = {k}, {name}"), &*cpu, &*gpu, row, 1);
                cases += 1;
            }
        }
    }
    assert!(cases > 60, "{cases}");
}

/// Statistics of `rows` rows of inputs, some columns of which are larger than others; or the mean squares alone.
fn observed(k: usize, rows: usize, full: bool) -> LayerStats {
    let size = |c: usize| [1.0, 0.03, 4.0, 0.3, 0.0][c * 7 % 5];
    let x: Vec<f32> = gaussian(17, rows * k)
        .iter()
        .enumerate()
        .map(|(i, x)| x * size(i % k))
        .collect();
    let dot = |a: usize, b: usize| -> f64 {
        let products = x.chunks_exact(k).map(|row| f64::from(row[a]) * f64::from(row[b]));
        products.sum()
    };
    let moment = if full {
        Moment::Full((0..k * k).map(|i| dot(i / k, i % k)).collect())
    } else {
        Moment::Diagonal((0..k).map(|c| dot(c, c)).collect())
    };
    LayerStats::new(k, rows as u64, moment, vec![30.0; k]).unwrap()
}

#[test]
fn informed_codes_are_the_processors() {
    let Some(encoder) = encoder("informed_codes_are_the_processors") else {
        return;
    };
    let mut cases = 0;
    for (options, k) in [
        ("bits:8,clip:mse", 131),
        ("bits:4,group:64,clip:mse", 192),
        ("bits:4,group:32,grid:zp,clip:mse,scale:f16", 96),
        ("bits:3,group:16,clip:mse", 80),
        ("bits:2,effort:fast", 192),
        ("bits:2,effort:default", 128),
        ("bits:2,effort:best", 64),
    ] {
        for full in [false, true] {
            let (stats, plain) = (observed(k, 300, full), quantizer(options));
            let there = plain.on_device(&encoder).unwrap().expect("a kernel");
            let (cpu, gpu) = (plain.informed(&stats).unwrap(), there.informed(&stats).unwrap());
            assert_eq!(gpu.describe(), cpu.describe());
            assert!(
                gpu.rows_together(k).is_some_and(|rows| rows > 1),
                "{options}: on the device"
            );
            let rows: Vec<(&str, Vec<f32>)> =
                rows(k).into_iter().filter(|(name, _)| *name != "large").collect();
            let all: Vec<f32> = rows.iter().flat_map(|(_, row)| row.clone()).collect();
            assert_same(&format!("{options}, full {full}"), &*cpu, &*gpu, &all, rows.len());
            // The knowledge matters.
            let without = plain.quantize(Isa::best(), &all, rows.len(), k).unwrap();
            let with = gpu.quantize(Isa::best(), &all, rows.len(), k).unwrap();
            assert_ne!(with.codes(), without.codes(), "{options}, full {full}");
            // Of another layer, and numbers that are none.
            let mut bad = all.clone();
            bad[k + 1] = f32::NAN;
            assert_same(&format!("{options}, NaN"), &*cpu, &*gpu, &bad, rows.len());
            assert_same(&format!("{options}, narrow"), &*cpu, &*gpu, &[0.5; 64], 1);
            cases += 1;
        }
    }
    assert_eq!(cases, 14);
}

#[test]
fn what_has_no_codes_is_said_as_the_processor_says_it() {
    let Some(encoder) = encoder("what_has_no_codes_is_said_as_the_processor_says_it") else {
        return;
    };
    let mut said = 0;
    for options in [
        "bits:8",
        "bits:4,group:64,scale:f16,clip:mse",
        "bits:2,effort:fast",
    ] {
        let cpu = quantizer(options);
        let gpu = cpu.on_device(&encoder).unwrap().expect("a kernel");
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 3e38] {
            let mut x = gaussian(1, 3 * 192);
            x[192 + 70] = bad;
            x[2 * 192] = f32::NAN;
            let result = gpu.quantize(Isa::best(), &x, 3, 192);
            assert!(result.is_err(), "{options}, {bad}");
            assert_same(&format!("{options}, {bad}"), &*cpu, &*gpu, &x, 3);
            said += 1;
        }
    }
    assert_eq!(said, 12);
}

#[test]
fn methods_without_a_kernel_say_so() {
    let Some(encoder) = encoder("methods_without_a_kernel_say_so") else {
        return;
    };
    let with_kernel = |options: &str| quantizer(options).on_device(&encoder).unwrap().is_some();
    assert!(with_kernel("bits:8") && with_kernel("bits:4") && with_kernel("bits:2"));
    assert!(!with_kernel("bits:4,method:nf4"));
    assert!(!with_kernel("bits:8,scale-bits:7") && !with_kernel("bits:4,scale-bits:7"));
}
