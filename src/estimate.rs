//! How long a plan will take, before it runs: the quantizers are timed on a sample of the real
//! tensors, reading and writing are assumed at stated rates.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use qtool_formats::checkpoint::Checkpoint;
use qtool_kernels::Isa;
use serde::Serialize;

use crate::Result;
use crate::blocks::read_rows;
use crate::plan::QuantizePlan;

/// Disk rates assumed, in bytes per second: a modest SSD.
pub const READ_RATE: f64 = 1.0e9;
/// See [`READ_RATE`].
pub const WRITE_RATE: f64 = 0.5e9;
/// Time given to each quantizer's sample.
const SAMPLE: Duration = Duration::from_millis(60);

/// An estimate, in seconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Estimate {
    /// Choosing codes, on all threads; measured on a sample.
    pub compute_seconds: f64,
    /// Reading the source at [`READ_RATE`].
    pub read_seconds: f64,
    /// Writing the artifact at [`WRITE_RATE`].
    pub write_seconds: f64,
}

impl Estimate {
    /// The three overlap; the slowest decides.
    pub fn total_seconds(&self) -> f64 {
        self.compute_seconds
            .max(self.read_seconds)
            .max(self.write_seconds)
    }
}

/// Times each distinct quantizer on the first tensor it gets. Values that cannot be quantized count
/// as done; they are reported when the plan runs.
pub fn estimate(checkpoint: &Checkpoint, plan: &QuantizePlan, threads: usize) -> Result<Estimate> {
    let isa = Isa::best();
    let mut rates: BTreeMap<String, f64> = BTreeMap::new();
    let mut seconds = 0.0;
    for (_, q) in plan.quantized() {
        let key = format!("{} {}", q.scheme, q.quantizer.describe());
        let rate = match rates.get(&key) {
            Some(rate) => *rate,
            None => {
                let rows = q.n.clamp(1, (256 << 10) / q.k.max(1) + 1);
                let mut values = Vec::new();
                let (started, mut weights) = (Instant::now(), 0usize);
                while started.elapsed() < SAMPLE {
                    read_rows(isa, checkpoint, &q.pieces, 0..rows, &mut values)?;
                    let _ = q.quantizer.quantize(isa, &values, rows, q.k);
                    weights += rows * q.k;
                }
                let rate = weights as f64 / started.elapsed().as_secs_f64();
                rates.insert(key, rate);
                rate
            }
        };
        seconds += q.n as f64 * q.k as f64 / rate;
    }
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let workers = if threads == 0 { cores } else { threads.min(cores) };
    Ok(Estimate {
        compute_seconds: seconds / workers as f64,
        read_seconds: plan.source_bytes() as f64 / READ_RATE,
        write_seconds: plan.stored_bytes() as f64 / WRITE_RATE,
    })
}
