//! How fast is a GPU? Copies within its memory as the yardstick, and the kernels that a model spends its time in, timed
//! over many launches in a row. Owns what is timed and how often.

use qtool_kernels::cuda::Precision;
use qtool_kernels::{Backend, CudaBackend};
use serde::Serialize;

use super::check::{FORMS, Size, numbers, stored_bytes, weight};
use crate::Result;

/// How often each is started in a row; the mean counts.
const TIMES: usize = 20;
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
    /// Of that number: `byte/s`, `FLOP/s` or `/s`.
    pub unit: &'static str,
    /// As a share of the yardstick: copies for products of few rows, for the others the product of a BF16 weight on tensor
    /// cores, by NVIDIA's library where it is there and else by our own kernel.
    pub share: Option<f64>,
}

/// Bytes of weights that take turns, so that none of them stays in the device's cache.
const IN_TURN: usize = 256 << 20;

/// Times everything.
pub fn run(gpu: &CudaBackend, size: Size) -> Result<Vec<Figure>> {
    let (bytes, times, in_turn) = match size {
        Size::Real => (1 << 30, TIMES, IN_TURN),
        Size::Toy => (1 << 16, 2, 1),
    };
    let asked = |figure: Option<f64>| -> Result<f64> {
        gpu.fault()?;
        Ok(figure.unwrap_or(f64::NAN))
    };
    let copy = asked(gpu.copy_rate(bytes, times))?;
    let launch = asked(gpu.launch_seconds(times))?;
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
    let tensor = gpu.clone().with_precision(Precision::Bf16);
    let k = size.width();
    let own = tensor.clone().without_library();
    let (mut plain, mut plain_of) = (None, None);
    for (name, options) in FORMS {
        let (host, _) = weight(options, k, k)?;
        let stored = stored_bytes(&host);
        let copies = in_turn.div_ceil(stored).min(MOST_COPIES);
        let weights: Vec<_> = (0..copies).map(|_| gpu.weight(&host)).collect();
        for m in size.rows() {
            let x = gpu.upload(&numbers(m as u64, m * k), k);
            if m <= 16 {
                let seconds = asked(gpu.product_seconds(&x, &weights, times))?;
                let rate = stored as f64 / seconds;
                figures.push(Figure {
                    what: format!("product {m} x {k} x {k}, {name}, bytes of the weight"),
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
            for (precision, backend) in ways {
                let seconds = asked(backend.product_seconds(&x, &weights, times))?;
                let rate = 2.0 * (m * k * k) as f64 / seconds;
                let yardstick = options.is_none() && precision != "f32" && plain_of != Some(m);
                if yardstick {
                    (plain, plain_of) = (Some(rate), Some(m));
                }
                figures.push(Figure {
                    what: format!("product {m} x {k} x {k}, {name}, {precision}"),
                    seconds,
                    rate,
                    unit: "FLOP/s",
                    share: plain.filter(|_| precision != "f32").map(|plain| rate / plain),
                });
            }
        }
    }
    let rows = size.rows()[3];
    let x = gpu.upload(&numbers(1, rows * k), k);
    let seconds = asked(gpu.gram_seconds(&x, times))?;
    let rate = (rows * k) as f64 * (k + 1) as f64 / seconds;
    figures.push(Figure {
        what: format!("second moments of {rows} x {k}"),
        seconds,
        rate,
        unit: "FLOP/s",
        share: plain.map(|plain| rate / plain),
    });
    Ok(figures)
}
