//! How long calibration will take and how large its statistics are, before it runs: one row of the real text
//! through a block of each kind, and each method informed by it on a few rows of a real tensor.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use qtool_calib::{Evidence, LayerStats};
use qtool_formats::checkpoint::Checkpoint;
use qtool_kernels::{Backend, Isa};
use serde::Serialize;

use super::pipeline::{self, Calibration};
use super::recorder::Recorder;
use super::statistics::Statistics;
use crate::blocks::read_rows;
use crate::device::Device;
use crate::model::Batch;
use crate::model::stack::Stack;
use crate::plan::{Quantization, QuantizePlan};
use crate::source::Source;
use crate::{Result, quantize};

/// Weights that a method is timed on.
const SAMPLE_WEIGHTS: usize = 64 << 10;

/// A forecast. Times are of this machine with as many threads as asked for.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Forecast {
    /// Rows of the text.
    pub rows: usize,
    /// Tokens of the text.
    pub tokens: usize,
    /// Running the model; twice where blocks are quantized one after the other.
    pub forward_seconds: f64,
    /// Choosing codes by what was seen.
    pub choose_seconds: f64,
    /// Bytes of the statistics, as files; in memory those of one block are there twice, in twice the width.
    pub statistics_bytes: u64,
}

/// One kind of block: how long a row takes and what is kept of it.
struct Kind {
    blocks: usize,
    observed: f64,
    plain: f64,
    bytes: u64,
}

/// Forecasts calibration by `calibration` for these plans.
pub fn forecast(
    checkpoint: &Arc<Checkpoint>,
    plans: &[QuantizePlan],
    calibration: &Calibration,
    (device, threads): (&Device, usize),
) -> Result<Forecast> {
    match device {
        Device::Cpu(backend) => forecast_on(*backend, checkpoint, plans, calibration, threads),
        Device::Cuda(backend) => forecast_on(backend.clone(), checkpoint, plans, calibration, threads),
    }
}

fn forecast_on<B: Backend>(
    backend: B,
    checkpoint: &Arc<Checkpoint>,
    plans: &[QuantizePlan],
    calibration: &Calibration,
    threads: usize,
) -> Result<Forecast> {
    let (corpus, passes) = match calibration {
        Calibration::Sequential(corpus) => (corpus, 2),
        Calibration::OnePass(corpus) => (corpus, 1),
        Calibration::Statistics(folder) => {
            return quantize::with_threads(threads, || of_folder(checkpoint, plans, folder));
        }
    };
    let evidence = pipeline::evidence(plans).max(Evidence::Diagonal);
    quantize::with_threads(threads, || {
        let source = Arc::new(Source::of_checkpoint(Arc::clone(checkpoint))?);
        let model = Stack::open(backend, source)?;
        let row = &corpus.rows()[0];
        let batch = Batch::new(std::slice::from_ref(row));
        let mut x = model.begin(&batch)?;
        let layers = model.layers();
        let routed = model.routed();
        let mut samples = vec![(layers - 1, if routed > 0 { routed } else { layers })];
        if routed > 0 && routed < layers {
            samples.insert(0, (0, layers - routed));
        }
        let all: Vec<usize> = (0..row.len()).collect();
        let mut seen: Vec<LayerStats> = Vec::new();
        let mut kinds = Vec::new();
        for (number, blocks) in samples {
            let block = model.layer(number, model.source())?;
            let mut recorder = Recorder::new(model.backend(), evidence);
            let mut copy = model.backend().gather(&x, &all);
            let started = Instant::now();
            model.run(&block, &mut copy, &batch, Some(&mut recorder));
            let observed = recorder.finish(model.source().path())?;
            let with = started.elapsed().as_secs_f64();
            let started = Instant::now();
            model.run(&block, &mut x, &batch, None);
            // Also waits, where a device works while we go on.
            model.backend().fault()?;
            let plain = started.elapsed().as_secs_f64();
            let stats = observed.inputs.into_iter().map(|i| i.stats);
            let before = seen.len();
            seen.extend(stats);
            let bytes = seen[before..]
                .iter()
                .map(|s| file_bytes(s.columns(), evidence))
                .sum();
            kinds.push(Kind {
                blocks,
                observed: with,
                plain,
                bytes,
            });
        }
        let once = |kind: &Kind| {
            let again = if passes == 2 { kind.plain } else { 0.0 };
            (kind.observed + again) * kind.blocks as f64
        };
        let head = model.head().map_or(0, |_| file_bytes(model.hidden(), evidence));
        Ok(Forecast {
            rows: corpus.rows().len(),
            tokens: corpus.tokens(),
            forward_seconds: kinds.iter().map(once).sum::<f64>() * corpus.tokens() as f64 / row.len() as f64,
            choose_seconds: choose(checkpoint, plans, &seen)? / rayon::current_num_threads() as f64,
            statistics_bytes: kinds.iter().map(|k| k.bytes * k.blocks as u64).sum::<u64>() + head,
        })
    })
}

/// Bytes of one input's statistics in a file: the triangle or the diagonal, and the largest magnitudes, in F32.
fn file_bytes(columns: usize, evidence: Evidence) -> u64 {
    let k = columns as u64;
    let moment = if evidence == Evidence::Full {
        k * (k + 1) / 2
    } else {
        k
    };
    (moment + k) * 4
}

/// Seconds of one thread for all tensors: what all rows share once, and the rows themselves.
fn choose(checkpoint: &Checkpoint, plans: &[QuantizePlan], seen: &[LayerStats]) -> Result<f64> {
    let mut known: BTreeMap<String, (f64, f64)> = BTreeMap::new();
    let mut seconds = 0.0;
    for (_, q) in plans.iter().flat_map(QuantizePlan::quantized) {
        let key = format!("{} {} {}", q.scheme, q.quantizer.describe(), q.k);
        let (shared, each) = match known.get(&key) {
            Some(known) => *known,
            None => {
                let timed = time(checkpoint, q, seen)?;
                known.insert(key, timed);
                timed
            }
        };
        seconds += shared + each * (q.n * q.k) as f64;
    }
    Ok(seconds)
}

/// Seconds to inform a quantizer, and seconds a weight afterwards.
fn time(checkpoint: &Checkpoint, q: &Quantization, seen: &[LayerStats]) -> Result<(f64, f64)> {
    let isa = Isa::best();
    let started = Instant::now();
    let stats = seen.iter().find(|s| s.columns() == q.k && s.rows() > 0);
    let informed = match stats.filter(|_| q.quantizer.evidence() > Evidence::None) {
        // A single row's moment may lack what the whole text's has; a refusal then costs what it cost.
        Some(stats) => q.quantizer.informed(stats).ok(),
        None => None,
    };
    let shared = started.elapsed().as_secs_f64();
    let rows = q.n.clamp(1, (SAMPLE_WEIGHTS / q.k.max(1)).max(1));
    let mut values = Vec::new();
    read_rows(isa, checkpoint, &q.pieces, 0..rows, &mut values)?;
    let started = Instant::now();
    // Values that cannot be quantized are reported when the plan runs.
    let _ = match &informed {
        Some(informed) => informed.quantize(isa, &values, rows, q.k),
        None => q.quantizer.quantize(isa, &values, rows, q.k),
    };
    Ok((shared, started.elapsed().as_secs_f64() / (rows * q.k) as f64))
}

/// A folder that is there already: nothing is run, and its size is known.
fn of_folder(checkpoint: &Checkpoint, plans: &[QuantizePlan], folder: &Path) -> Result<Forecast> {
    let statistics = Statistics::open(folder)?;
    let index = statistics.index();
    let number = |key: &str| {
        index
            .corpus
            .get(key)
            .and_then(serde_json::Value::as_u64)
            .unwrap_or(0) as usize
    };
    let size = |block: &super::statistics::BlockIndex| {
        std::fs::metadata(folder.join(&block.file)).map_or(0, |m| m.len())
    };
    let mut seen = Vec::new();
    let blocks = index.blocks.len();
    for block in (0..blocks).filter(|&b| !index.part && (b == 0 || b + 2 >= blocks)) {
        for input in 0..index.blocks[block].inputs.len() {
            seen.push(statistics.load(block, input, None)?);
        }
    }
    Ok(Forecast {
        rows: number("rows"),
        tokens: number("rows") * number("length"),
        forward_seconds: 0.0,
        choose_seconds: choose(checkpoint, plans, &seen)? / rayon::current_num_threads() as f64,
        statistics_bytes: index.blocks.iter().map(size).sum(),
    })
}
