//! Pipeline page: codes decided block by block, so that each block is calibrated on what the quantized blocks
//! before it give.
//!
//! ```text
//! rows -> embed -> [ observe block i | decide its codes | run it on its decoded codes ] -> block i + 1 ..
//! ```
//!
//! Each finished block is on disk before the next begins ([`Decisions`]); an interrupted run goes on after the
//! last of them, running the finished ones on their decoded codes again, which gives the same bits.
//!
//! Memory: one block's weights decoded, its statistics twice (a slice's and their sum), and the activations
//! between blocks (a file above [`super::activations::MEMORY_BYTES`]).

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use qtool_calib::Evidence;
use qtool_formats::checkpoint::Checkpoint;
use qtool_formats::piece::overlapping;
use qtool_formats::{FormatError, QuantizedWeight};
use qtool_kernels::{Backend, Isa};
use rayon::prelude::*;
use serde_json::json;

use super::corpus::{Corpus, SLICES};
use super::coverage::Observed;
use super::decisions::{Decided, Decision, Decisions};
use super::measure::digest;
use super::walk::{Seen, Walk};
use crate::device::Device;
use crate::informed::{Calibrated, Codes, Ready, Workshop};
use crate::model::stack::{Stack, StackLayer};
use crate::plan::{Action, Quantization, QuantizePlan, TensorPlan};
use crate::progress::Progress;
use crate::source::{Overlay, Source, WeightSource};
use crate::survey::survey;
use crate::transform::evidence::MeasuredTransformed;
use crate::transform::model::Transformed;
use crate::transform::weights::Weights;
use crate::{Error, Result, TOOL, interrupt, quantize};

/// Weights of a tensor that are decided together by one thread.
const BLOCK_WEIGHTS: usize = 128 << 10;

/// What a sequential run needs besides the plan.
pub struct Options<'a> {
    /// Options of the quantization.
    pub quantize: &'a quantize::Options,
    /// The most the methods have use for.
    pub evidence: Evidence,
    /// Rows an expert must see.
    pub min_coverage: u64,
}

/// Decides the codes of every tensor of the plans (one per rank) that a block of the model reads.
pub fn run(
    checkpoint: &Arc<Checkpoint>,
    plans: &[QuantizePlan],
    corpus: &Corpus,
    options: &Options<'_>,
) -> Result<Decisions> {
    match &options.quantize.device {
        Device::Cpu(backend) => run_on(*backend, checkpoint, plans, corpus, options),
        Device::Cuda(backend) => run_on(backend.clone(), checkpoint, plans, corpus, options),
    }
}

fn run_on<B: Backend>(
    backend: B,
    checkpoint: &Arc<Checkpoint>,
    plans: &[QuantizePlan],
    corpus: &Corpus,
    options: &Options<'_>,
) -> Result<Decisions> {
    quantize::with_threads(options.quantize.threads, || {
        let transform = plans.first().and_then(|plan| plan.transform.as_ref());
        let source: Arc<dyn WeightSource> = match transform {
            None => Arc::new(Source::of_checkpoint(Arc::clone(checkpoint))?),
            Some(transform) => Arc::new(Transformed::new(Arc::clone(checkpoint), Arc::clone(transform))?),
        };
        let model = Stack::open(backend, Arc::clone(&source))?;
        let methods: Vec<Vec<String>> = plans.iter().map(describe).collect();
        let fingerprint = json!({
            "tool": TOOL,
            "model": digest(checkpoint)?,
            "corpus": corpus.description(),
            "methods": blake3::hash(format!("{methods:?}").as_bytes()).to_hex().to_string(),
            "transform": transform.map(|t| t.fingerprint()).transpose()?,
            "min_coverage": options.min_coverage,
            "evidence": format!("{:?}", options.evidence),
            // The forward pass may differ in the last bit between instruction sets and devices.
            "processor": match &options.quantize.device {
                Device::Cpu(_) => format!("{:?}", Isa::best()),
                gpu @ Device::Cuda(_) => gpu.identity(),
            },
        });
        let mut decisions = Decisions::begin(&options.quantize.target, &fingerprint)?;
        let blocks = model.layers();
        let steps = blocks + blocks.saturating_sub(decisions.blocks());
        let progress = Progress::tokens(
            options.quantize.show_progress,
            "calibrating",
            (corpus.tokens() * steps) as u64,
        );
        let scratch = decisions.folder().to_owned();
        let mut walk = Walk::begin(&model, corpus, 0..SLICES, &scratch, &progress)?;
        let job = Job {
            checkpoint,
            plans,
            source: source.as_ref(),
            model: &model,
        };
        // A head of its own is one more block, where it is quantized at all.
        let head = model.head().filter(|head| !job.tensors_of(&[head]).is_empty());
        let head = head.filter(|_| decisions.blocks() <= blocks);
        for number in 0..blocks {
            interrupt::check()?;
            if number >= decisions.blocks() {
                let block = model.layer(number, model.source())?;
                let mut seen = Seen::nothing(false);
                walk.block(&block, Some((options.evidence, &mut seen)), false)?;
                let seen = seen.into_parts().swap_remove(0);
                let magnitudes = seen.magnitudes.clone();
                let observed = Observed::new(seen, options.min_coverage);
                let decided = job.decide(&block.tensors(), &observed)?;
                decisions.store(&decided, magnitudes.as_ref())?;
            }
            if number + 1 < blocks || head.is_some() {
                let quantized = job.quantized_block(number, &decisions)?;
                walk.block(&quantized, None, true)?;
            }
        }
        if let Some(head) = head {
            let mut seen = Seen::nothing(false);
            walk.head(options.evidence, &mut seen)?;
            let observed = Observed::new(seen.into_parts().swap_remove(0), options.min_coverage);
            decisions.store(&job.decide(&[head], &observed)?, None)?;
        }
        progress.clear();
        Ok(decisions)
    })
}

/// Everything a plan says of methods and shapes.
fn describe(plan: &QuantizePlan) -> Vec<String> {
    let line = |(t, q): (&TensorPlan, &Quantization)| {
        format!(
            "{} {} {} {}x{}",
            t.name,
            q.scheme,
            q.quantizer.describe(),
            q.n,
            q.k
        )
    };
    plan.quantized().map(line).collect()
}

struct Job<'a, B: Backend> {
    checkpoint: &'a Checkpoint,
    plans: &'a [QuantizePlan],
    source: &'a dyn WeightSource,
    model: &'a Stack<B>,
}

impl<B: Backend> Job<'_, B> {
    /// Tensors of the plans, by rank and number, that are made of one of these weights.
    fn tensors_of(&self, names: &[&str]) -> Vec<(usize, usize)> {
        let reads = |q: &Quantization| q.pieces.iter().any(|p| names.contains(&p.tensor.as_str()));
        let of_plan = |(rank, plan): (usize, &QuantizePlan)| {
            let wanted = plan
                .tensors
                .iter()
                .enumerate()
                .filter_map(move |(i, t)| match &t.action {
                    Action::Quantize(q) if reads(q) => Some((rank, i)),
                    _ => None,
                });
            wanted.collect::<Vec<_>>()
        };
        self.plans.iter().enumerate().flat_map(of_plan).collect()
    }

    /// The weights as the plans transform them.
    fn weights(&self) -> Weights<'_> {
        let transform = self.plans.first().and_then(|plan| plan.transform.as_deref());
        Weights::new(self.checkpoint, transform)
    }

    fn decide(&self, names: &[&str], observed: &Observed) -> Result<Vec<Decision>> {
        let transform = self.plans.first().and_then(|plan| plan.transform.as_deref());
        let observed = MeasuredTransformed::new(observed, transform);
        let mut decided = Vec::new();
        let mut workshops: HashMap<usize, Workshop<'_>> = HashMap::new();
        for (rank, index) in self.tensors_of(names) {
            interrupt::check()?;
            let plan = &self.plans[rank];
            let workshop = workshops
                .entry(rank)
                .or_insert_with(|| Workshop::new(Codes::Informed(&observed), rank));
            let survey = |tensor: &TensorPlan, q: &Quantization| {
                let mut weights = self.weights();
                weights.turn_to(q.pieces.iter().map(|piece| (tensor.name.as_str(), piece)))?;
                survey(Isa::best(), &weights, tensor, q, |source| {
                    self.fault(&tensor.name, source)
                })
            };
            let ready = workshop.turn_to(plan, std::iter::once(index), &survey)?;
            let tensor = &plan.tensors[index];
            if let (Action::Quantize(q), Some(ready)) = (&tensor.action, ready.get(&index)) {
                let (weight, calibrated) = self.quantize(&tensor.name, q, ready)?;
                decided.push(Decision {
                    rank,
                    name: tensor.name.clone(),
                    weight,
                    method: calibrated
                        .method
                        .clone()
                        .unwrap_or_else(|| q.quantizer.describe()),
                    proxy: calibrated.sums(),
                });
            }
        }
        Ok(decided)
    }

    fn fault(&self, name: &str, source: qtool_calib::CalibError) -> Error {
        Error::of_tensor(self.checkpoint.root(), name, source)
    }

    /// All rows of a tensor, in parts that do not depend on the number of threads.
    fn quantize(&self, name: &str, q: &Quantization, ready: &Ready) -> Result<(QuantizedWeight, Calibrated)> {
        let isa = Isa::best();
        let mut weights = self.weights();
        weights.turn_to(q.pieces.iter().map(|piece| (name, piece)))?;
        let step = (BLOCK_WEIGHTS / q.k.max(1)).max(1);
        let parts: Vec<Range<usize>> = (0..q.n)
            .step_by(step)
            .map(|from| from..q.n.min(from + step))
            .collect();
        let done = parts
            .par_iter()
            .map(|range| {
                let mut rows = Vec::new();
                weights.rows(isa, name, &q.pieces, range.clone(), &mut rows)?;
                let weight = ready
                    .quantize(isa, q, range, &rows)?
                    .map_err(|source| self.fault(name, source))?;
                let sums = ready.proxy(&rows, &weight);
                Ok((weight, sums))
            })
            .collect::<Result<Vec<_>>>()?;
        let mut calibrated = Calibrated::default();
        let mut weights = Vec::with_capacity(done.len());
        for (weight, sums) in done {
            calibrated.note(ready, sums);
            weights.push(weight);
        }
        let whole = QuantizedWeight::stack(&weights).ok_or_else(|| {
            Error::Format(FormatError::Weight {
                what: "rows of a tensor",
                expected: "the same scheme in all of them".to_owned(),
                got: name.to_owned(),
            })
        })?;
        Ok((whole, calibrated))
    }

    /// The block with its decided weights decoded, the others as they are.
    fn quantized_block(&self, number: usize, decisions: &Decisions) -> Result<StackLayer<B>> {
        let original = self.model.layer(number, self.model.source())?;
        let mut values: HashMap<String, (usize, Vec<f32>)> = HashMap::new();
        for (rank, index) in self.tensors_of(&original.tensors()) {
            let tensor = &self.plans[rank].tensors[index];
            let (Action::Quantize(q), Some(decided)) = (&tensor.action, decisions.find(rank, &tensor.name)?)
            else {
                continue;
            };
            self.put_back(q, &decided, &mut values)?;
        }
        let mut overlay = Overlay::new(self.source);
        for (name, (k, values)) in values {
            overlay.insert(&name, k, &values);
        }
        self.model.layer(number, &overlay)
    }

    /// Decodes a tensor of a plan into the places of the source tensors it is made of.
    fn put_back(
        &self,
        q: &Quantization,
        decided: &Decided,
        values: &mut HashMap<String, (usize, Vec<f32>)>,
    ) -> Result<()> {
        for piece in &q.pieces {
            if !values.contains_key(&piece.tensor) {
                let mut whole = Vec::new();
                let all = qtool_formats::piece::Piece::whole(
                    &piece.tensor,
                    piece.dtype,
                    piece.orientation,
                    piece.dims,
                );
                let name = &piece.tensor;
                self.weights()
                    .rows(Isa::best(), name, &[all], 0..piece.dims.0, &mut whole)?;
                values.insert(piece.tensor.clone(), (piece.dims.1, whole));
            }
        }
        let weight = decided.rows(0..q.n)?;
        let mut row = vec![0f32; q.k];
        for n in 0..q.n {
            weight.dequantize_row(n, &mut row);
            for (piece, within) in overlapping(&q.pieces, n..n + 1) {
                if let Some((k, whole)) = values.get_mut(&piece.tensor) {
                    let at = (piece.rows.start + within.start) * *k + piece.columns.start;
                    whole[at..at + row.len()].copy_from_slice(&row);
                }
            }
        }
        Ok(())
    }
}
