//! How fast is a GPU? Copies within its memory as the yardstick, and the kernels that a model spends its time in, timed by
//! the device's own clock. Owns what is timed and how often.

use qtool_kernels::{Backend, CudaBackend};
use serde::Serialize;

use super::check::{FORMS, Size, numbers, stored_bytes, weight};
use crate::Result;

/// How often each is timed; the best counts.
const TIMES: usize = 10;

/// One figure.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Figure {
    /// What was timed, with its sizes.
    pub what: String,
    /// Best time.
    pub seconds: f64,
    /// Work a second.
    pub rate: f64,
    /// Of that number: `byte/s`, or `FLOP/s`.
    pub unit: &'static str,
    /// As a share of the yardstick: copies for products of few rows, the BF16 product of as many rows for the others.
    pub share: Option<f64>,
}

/// Times everything.
pub fn run(gpu: &CudaBackend, size: Size) -> Result<Vec<Figure>> {
    let (bytes, times) = match size {
        Size::Real => (1 << 30, TIMES),
        Size::Toy => (1 << 16, 2),
    };
    let copy = gpu.copy_rate(bytes, times)?;
    let mut figures = vec![Figure {
        what: format!("copy of {bytes} bytes within the device, read and written counted"),
        seconds: 2.0 * bytes as f64 / copy,
        rate: copy,
        unit: "byte/s",
        share: None,
    }];
    let k = size.width();
    let mut plain = Vec::new();
    for (name, options) in FORMS {
        let (host, _) = weight(options, k, k)?;
        let on_device = gpu.weight(&host);
        for m in size.rows() {
            let x = gpu.upload(&numbers(m as u64, m * k), k);
            let seconds = best(gpu, times, || drop(gpu.matmul(&x, &on_device)))?;
            let what = format!("product {m} x {k} x {k}, {name}");
            figures.push(if m <= 16 {
                let rate = stored_bytes(&host) as f64 / seconds;
                Figure {
                    what: what + ", bytes of the weight",
                    seconds,
                    rate,
                    unit: "byte/s",
                    share: Some(rate / copy),
                }
            } else {
                let rate = 2.0 * (m * k * k) as f64 / seconds;
                if options.is_none() {
                    plain.push((m, rate));
                }
                let yardstick = plain.iter().find(|(rows, _)| *rows == m);
                Figure {
                    what,
                    seconds,
                    rate,
                    unit: "FLOP/s",
                    share: yardstick.map(|(_, plain)| rate / plain),
                }
            });
        }
    }
    let rows = size.rows()[3];
    let x = gpu.upload(&numbers(1, rows * k), k);
    let mut moment = vec![0.0; k * k];
    let seconds = best(gpu, times.min(3), || gpu.gram(&x, &mut moment))?;
    figures.push(Figure {
        what: format!("second moments of {rows} x {k}, the copy to the host included"),
        seconds,
        rate: (rows * k) as f64 * (k + 1) as f64 / seconds,
        unit: "FLOP/s",
        share: None,
    });
    Ok(figures)
}

/// Best of some times, after one that is not counted.
fn best(gpu: &CudaBackend, times: usize, mut work: impl FnMut()) -> Result<f64> {
    work();
    let mut best = f64::INFINITY;
    for _ in 0..times {
        best = best.min(gpu.timed(&mut work)?);
    }
    Ok(best)
}
