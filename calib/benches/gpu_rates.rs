//! Rates of the GPU kernels, as JSON on standard output. An example rather than a bench, so that a binary of it can be taken
//! to a machine with a GPU:
//!
//! ```text
//! cargo build --release -p qtool-calib --example gpu_rates
//! target/release/examples/gpu_rates           sizes of real models, some GB of GPU memory
//! target/release/examples/gpu_rates --tiny    toy sizes: whether everything runs, not how fast
//! ```
//!
//! The yardsticks, copy bandwidth and the time of a launch, are measured in the same run. Products of few rows are given in
//! packed bytes a second and as a share of the copy's, products of many in operations a second. Encoding includes the copies
//! to the device and back.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use qtool_calib::options::PartialOptions;
use qtool_formats::packing::{LSB_ROWS, Packing};
use qtool_formats::{FloatDtype, QuantizedWeight};
use qtool_kernels::backend::{Form, HostWeight, Storage};
use qtool_kernels::cuda::weight::DeviceWeight;
use qtool_kernels::cuda::{Encoder, Precision, probe};
use qtool_kernels::{Backend, CudaBackend, Isa};

/// What is measured.
struct Sizes {
    copied: usize,
    times: usize,
    /// (N, K) of products of few rows, and what their weights hold together, at least.
    few: &'static [(usize, usize)],
    few_bytes: usize,
    /// (M, N, K) of products of many rows.
    many: &'static [(usize, usize, usize)],
    /// (M, K) of second moments.
    moments: &'static [(usize, usize)],
    /// (N, K) of encoding.
    encoded: (usize, usize),
}

const REAL: Sizes = Sizes {
    copied: 1 << 30,
    times: 200,
    few: &[(4096, 4096), (8192, 8192), (28672, 8192)],
    few_bytes: 512 << 20,
    many: &[(1024, 4096, 4096), (4096, 8192, 8192)],
    moments: &[(8192, 4096)],
    encoded: (8192, 8192),
};

const TINY: Sizes = Sizes {
    copied: 1 << 16,
    times: 2,
    few: &[(32, 128)],
    few_bytes: 1 << 12,
    many: &[(17, 32, 128)],
    moments: &[(33, 32)],
    encoded: (2, 128),
};

const SCHEMES: [(&str, Option<&str>); 5] = [
    ("bf16", None),
    ("int8", Some("bits:8")),
    ("int4 g64", Some("bits:4,group:64,clip:none")),
    ("wint2", Some("bits:2,effort:fast")),
    ("nf4", Some("bits:4,method:nf4")),
];

fn numbers(count: usize) -> Vec<f32> {
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / 8_388_608.0 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// A weight of this scheme; rows are copies of a few, as only the time matters.
fn weight(options: Option<&str>, n: usize, k: usize) -> HostWeight {
    let storage = |bytes: Vec<u8>| -> Arc<dyn Storage> { Arc::new(bytes) };
    let few = n.min(4);
    let x = numbers(few * k);
    let Some(options) = options else {
        let row: Vec<u8> = x
            .iter()
            .flat_map(|x| half::bf16::from_f32(*x).to_le_bytes())
            .collect();
        let bytes = storage(row.repeat(n.div_ceil(few))[..n * k * 2].to_vec());
        let dtype = FloatDtype::Bf16;
        return HostWeight {
            n,
            k,
            form: Form::Dense { dtype, bytes },
        };
    };
    let options = PartialOptions::parse(options)
        .and_then(|o| o.complete(8))
        .expect("options");
    let method = qtool_calib::find(options.method).expect("a method");
    let quantizer = (method.build)(&options).expect("a quantizer");
    let codes = quantizer.quantize(Isa::best(), &x, few, k).expect("codes");
    let parts = QuantizedWeight::encode(&codes, &|b, k, c, o| LSB_ROWS.pack(b, k, c, o)).expect("parts");
    let grow = |part: Vec<u8>| {
        let bytes = part.len() / few * n;
        storage(part.repeat(n.div_ceil(few))[..bytes].to_vec())
    };
    let form = Form::Packed {
        scheme: codes.scheme(),
        parts: parts.into_iter().map(grow).collect(),
    };
    HostWeight { n, k, form }
}

fn bytes_of(weight: &HostWeight) -> usize {
    match &weight.form {
        Form::Dense { bytes, .. } => bytes.bytes().len(),
        Form::Packed { parts, .. } => parts.iter().map(|part| part.bytes().len()).sum(),
    }
}

/// One measurement: its numbers by name.
type Line = Vec<(&'static str, String)>;

fn object(line: &Line) -> String {
    let fields: Vec<String> = line
        .iter()
        .map(|(name, value)| format!("\"{name}\": {value}"))
        .collect();
    format!("{{{}}}", fields.join(", "))
}

fn measure(gpu: &CudaBackend, sizes: &Sizes) -> Option<(Line, Vec<Line>)> {
    let copy = gpu.copy_rate(sizes.copied, sizes.times)?;
    let head = vec![
        ("device", format!("{:?}", gpu.device().name())),
        ("copy_bytes_per_s", format!("{copy:.4e}")),
        (
            "launch_s",
            format!("{:.4e}", gpu.launch_seconds(10 * sizes.times)?),
        ),
    ];
    let mut lines = Vec::new();
    for (name, options) in SCHEMES {
        for &(n, k) in sizes.few {
            let host = weight(options, n, k);
            let bytes = bytes_of(&host);
            let copies: Vec<DeviceWeight> = (0..sizes.few_bytes.div_ceil(bytes))
                .map(|_| gpu.weight(&host))
                .collect();
            for m in [1, 4, 16] {
                let x = gpu.upload(&numbers(m * k), k);
                let seconds = gpu.product_seconds(&x, &copies, sizes.times)?;
                let rate = bytes as f64 / seconds;
                let mut line = product("gemv", name, (m, n, k), seconds);
                line.push(("packed_bytes_per_s", format!("{rate:.4e}")));
                line.push(("share_of_copy", format!("{:.4}", rate / copy)));
                lines.push(line);
            }
        }
        for &(m, n, k) in sizes.many {
            let there = [gpu.weight(&weight(options, n, k))];
            let x = gpu.upload(&numbers(m * k), k);
            for (what, precision) in [("gemm f32", Precision::F32), ("gemm bf16", Precision::Bf16)] {
                let gpu = gpu.clone().with_precision(precision);
                let seconds = gpu.product_seconds(&x, &there, sizes.times.div_ceil(10))?;
                let mut line = product(what, name, (m, n, k), seconds);
                let operations = 2.0 * (m * n * k) as f64;
                line.push(("operations_per_s", format!("{:.4e}", operations / seconds)));
                lines.push(line);
            }
        }
    }
    for &(m, k) in sizes.moments {
        let x = gpu.upload(&numbers(m * k), k);
        let seconds = gpu.gram_seconds(&x, sizes.times.div_ceil(50))?;
        let mut line = product("gram", "f32", (m, k, k), seconds);
        // Of the upper triangle alone.
        let operations = (m * k * k) as f64;
        line.push(("operations_per_s", format!("{:.4e}", operations / seconds)));
        lines.push(line);
    }
    Some((head, lines))
}

fn product(what: &str, scheme: &str, (m, n, k): (usize, usize, usize), seconds: f64) -> Line {
    vec![
        ("what", format!("{what:?}")),
        ("scheme", format!("{scheme:?}")),
        ("m", m.to_string()),
        ("n", n.to_string()),
        ("k", k.to_string()),
        ("seconds", format!("{seconds:.4e}")),
    ]
}

fn encoding(encoder: &Encoder, (n, k): (usize, usize)) -> Result<Vec<Line>, qtool_calib::CalibError> {
    let x = numbers(n * k);
    let mut lines = Vec::new();
    for options in [
        "bits:8",
        "bits:4,group:64,clip:none",
        "bits:4,group:64,clip:mse",
        "bits:2,effort:fast",
        "bits:2,effort:default",
    ] {
        let method = PartialOptions::parse(options)?.complete(8)?;
        let cpu = (qtool_calib::find(method.method).expect("a method").build)(&method)?;
        let gpu = cpu.on_device(encoder)?.expect("a kernel");
        gpu.quantize(Isa::best(), &x, n, k)?;
        let start = Instant::now();
        gpu.quantize(Isa::best(), &x, n, k)?;
        let seconds = start.elapsed().as_secs_f64();
        lines.push(vec![
            ("what", "\"encode\"".to_owned()),
            ("scheme", format!("{options:?}")),
            ("n", n.to_string()),
            ("k", k.to_string()),
            ("seconds", format!("{seconds:.4e}")),
            ("weights_per_s", format!("{:.4e}", (n * k) as f64 / seconds)),
        ]);
    }
    Ok(lines)
}

fn main() -> ExitCode {
    let tiny = std::env::args().any(|argument| argument == "--tiny");
    let sizes = if tiny { &TINY } else { &REAL };
    let device = match probe(0) {
        Ok(device) => device,
        Err(reason) => {
            eprintln!("gpu_rates: {reason}");
            return ExitCode::from(2);
        }
    };
    let gpu = CudaBackend::new(device.clone());
    let measured = measure(&gpu, sizes);
    let (Some((head, mut lines)), Ok(())) = (measured, gpu.fault()) else {
        let reason = gpu
            .fault()
            .err()
            .map_or_else(|| "no result".to_owned(), |f| f.to_string());
        eprintln!("gpu_rates: {reason}");
        return ExitCode::from(2);
    };
    match encoding(&Encoder::new(device), sizes.encoded) {
        Ok(more) => lines.extend(more),
        Err(error) => {
            eprintln!("gpu_rates: {error}");
            return ExitCode::from(2);
        }
    }
    let lines: Vec<String> = lines.iter().map(|line| format!("    {}", object(line))).collect();
    let head = object(&head);
    println!(
        "{},\n  \"tiny\": {tiny}, \"rates\": [\n{}\n]}}",
        head.trim_end_matches('}'),
        lines.join(",\n")
    );
    ExitCode::SUCCESS
}
