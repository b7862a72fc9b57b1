//! How much each tensor loses at each number of bits, estimated from statistics alone. Owns the choices, the sample
//! and the measure of loss.
//!
//! ```text
//! loss = share of error in the layer's output * energy of that output / energy of the residual stream behind it
//! ```
//!
//! The share of error is the mean over output channels of e H e^T / w H w^T. An error in `o_proj` or `down_proj` goes into
//! the residual stream as it is. One in query, key, value, gate or up does so by way of `o_proj` or `down_proj` of its
//! attention or expert, and is taken to leave the same share of error in that one's output. Later blocks normalize
//! their input, and are taken to pass on the share of error they are given. So all losses are in one unit, and can be
//! added up and compared across layers.
//!
//! The energy of an output (N channels) is N times that of its middle channel: a few channels of a few tokens carry
//! magnitudes thousands of times larger than all others, and would hide these. Energies add up along the stream.
//!
//! Errors come from the very method that each choice would use, on a sample of [`SAMPLE`] rows spread evenly over the
//! tensor. Routed experts count as often as tokens are sent to them.

use std::collections::BTreeMap;
use std::sync::Arc;

use qtool_calib::allocation::Choice;
use qtool_calib::options::PartialOptions;
use qtool_calib::proxy::Proxy;
use qtool_calib::{LayerStats, Recipe, TensorOptions};
use qtool_formats::checkpoint::Checkpoint;
use qtool_kernels::Isa;
use rayon::prelude::*;

use super::coverage::EvidenceSource;
use crate::blocks::read_rows;
use crate::informed::evidence_of;
use crate::plan::{Quantization, QuantizePlan, TensorPlan};
use crate::{Error, Result};

/// Rows of a tensor that are tried at each choice.
pub const SAMPLE: usize = 48;
/// Rows whose outputs are added up together.
const TOGETHER: usize = 256;

/// One tensor with its choices.
pub struct Sensitivity {
    /// Its name.
    pub tensor: String,
    /// Weights.
    pub weights: u64,
    /// Options of each choice; `None` keeps it.
    pub options: Vec<Option<TensorOptions>>,
    /// What each takes and costs, in the same order.
    pub choices: Vec<Choice>,
}

/// Options a tensor may get, besides being kept.
///
/// Fails when `effort` has no meaning; it never does for [`qtool_calib::ccq::Effort`] values.
pub fn candidates(base: PartialOptions) -> Result<Vec<TensorOptions>> {
    let complete = |bits: u8| {
        let effort = if bits == 2 { base.effort } else { None };
        PartialOptions {
            bits: Some(bits),
            effort,
            calibrated: true,
            ..PartialOptions::default()
        }
        .complete(bits)
        .map_err(Error::Option)
    };
    [2, 3, 4, 8].into_iter().map(complete).collect()
}

/// Measures every tensor of the plan that `recipe` leaves open. Those that were not observed are left out.
pub fn measure(
    checkpoint: &Checkpoint,
    plan: &QuantizePlan,
    recipe: &Recipe,
    source: &dyn EvidenceSource,
    candidates: &[TensorOptions],
) -> Result<Vec<Sensitivity>> {
    let mut open: Vec<(&TensorPlan, &Quantization)> = plan
        .quantized()
        .filter(|(t, _)| recipe.leaves_open(&t.name, t.dtype, &t.shape))
        .collect();
    // Tensors that share an input follow each other, so that it is read and factored once.
    open.sort_by_cached_key(|(t, _)| Influence::place(&t.name));
    let mut influence = Influence::default();
    let mut seen: Vec<(&TensorPlan, &Quantization, Vec<Option<f64>>)> = Vec::new();
    let mut from = 0;
    while from < open.len() {
        crate::interrupt::check()?;
        let Some(found) = evidence_of(source, open[from].1)? else {
            from += 1;
            continue;
        };
        let stats = found.stats;
        let mut to = from + 1;
        while to < open.len()
            && evidence_of(source, open[to].1)?.is_some_and(|next| Arc::ptr_eq(&next.stats, &stats))
        {
            to += 1;
        }
        let together = &open[from..to];
        let proxy = Proxy::new(&stats);
        let samples = together
            .iter()
            .map(|(_, q)| sample(checkpoint, q))
            .collect::<Result<Vec<_>>>()?;
        for (tensor, q) in together {
            if Influence::adds_to_the_stream(&tensor.name) {
                influence.note(&tensor.name, &stats, output(checkpoint, q, &proxy)?);
            }
        }
        let tried = candidates
            .par_iter()
            .map(|options| try_choice(together, &samples, &stats, &proxy, options))
            .collect::<Result<Vec<_>>>()?;
        for (i, (tensor, q)) in together.iter().enumerate() {
            seen.push((tensor, q, tried.iter().map(|of_choice| of_choice[i]).collect()));
        }
        from = to;
    }
    let stream = influence.stream();
    let finish = |(tensor, q, tried): (&TensorPlan, &Quantization, Vec<Option<f64>>)| {
        let mut options = vec![None];
        let mut choices = vec![Choice {
            bytes: tensor.source_bytes,
            loss: 0.0,
        }];
        let factor = influence.of(&tensor.name, &stream);
        for (option, share) in candidates.iter().zip(&tried) {
            let (Some(share), Ok(scheme)) = (share, option.scheme()) else {
                continue;
            };
            let Ok(parts) = scheme.parts(q.n, q.k) else {
                continue;
            };
            options.push(Some(*option));
            choices.push(Choice {
                bytes: parts.iter().map(|part| part.bytes() as u64).sum(),
                loss: factor * share,
            });
        }
        Sensitivity {
            tensor: tensor.name.clone(),
            weights: (q.n * q.k) as u64,
            options,
            choices,
        }
    };
    Ok(seen.into_iter().map(finish).collect())
}

/// A few rows of a tensor, spread evenly.
fn sample(checkpoint: &Checkpoint, q: &Quantization) -> Result<Vec<f32>> {
    let count = SAMPLE.min(q.n);
    let (mut all, mut row) = (Vec::with_capacity(count * q.k), Vec::new());
    for i in 0..count {
        let at = i * q.n / count;
        read_rows(Isa::best(), checkpoint, &q.pieces, at..at + 1, &mut row)?;
        all.extend_from_slice(&row);
    }
    Ok(all)
}

/// Energy of a tensor's output, as the module's text has it.
fn output(checkpoint: &Checkpoint, q: &Quantization, proxy: &Proxy) -> Result<f64> {
    let starts: Vec<usize> = (0..q.n).step_by(TOGETHER).collect();
    let parts = starts
        .par_iter()
        .map(|&from| {
            let mut rows = Vec::new();
            let range = from..q.n.min(from + TOGETHER);
            read_rows(Isa::best(), checkpoint, &q.pieces, range, &mut rows)?;
            Ok(proxy.energies(&rows))
        })
        .collect::<Result<Vec<_>>>()?;
    let mut energies = parts.concat();
    energies.sort_by(f64::total_cmp);
    let middle = energies.get(energies.len() / 2).copied().unwrap_or(0.0);
    Ok(middle * energies.len() as f64)
}

/// One choice for tensors that share their input; `None` where it does not fit the shape.
fn try_choice(
    tensors: &[(&TensorPlan, &Quantization)],
    samples: &[Vec<f32>],
    stats: &LayerStats,
    proxy: &Proxy,
    options: &TensorOptions,
) -> Result<Vec<Option<f64>>> {
    let fits = |q: &Quantization| options.scheme().is_ok_and(|s| s.parts(q.n, q.k).is_ok());
    if !tensors.iter().any(|(_, q)| fits(q)) {
        return Ok(vec![None; tensors.len()]);
    }
    let method = qtool_calib::find(options.method).map(|m| (m.build)(options));
    let Some(quantizer) = method.transpose().map_err(Error::Option)? else {
        return Ok(vec![None; tensors.len()]);
    };
    let informed = quantizer.informed(stats).map_err(Error::Option)?;
    let one = |((tensor, q), rows): (&(&TensorPlan, &Quantization), &Vec<f32>)| {
        if !fits(q) {
            return Ok(None);
        }
        let weight = informed.quantize(Isa::best(), rows, rows.len() / q.k, q.k);
        let weight = weight.map_err(|source| Error::Tensor {
            path: std::path::PathBuf::from("the sample for --target-bpw"),
            tensor: tensor.name.clone(),
            source: Box::new(source),
        })?;
        let shares = proxy.row_sums(rows, &weight).into_iter();
        let share = |(error, energy): (f64, f64)| if energy > 0.0 { error / energy } else { 0.0 };
        Ok(Some(
            shares.map(share).sum::<f64>() / (rows.len() / q.k).max(1) as f64,
        ))
    };
    tensors.iter().zip(samples).map(one).collect()
}

/// Layers whose output enters the residual stream, and those that reach it by way of them.
#[derive(Default)]
struct Influence {
    /// Of each such layer, where along the stream it lies, its energy, and the rows it was seen on.
    outputs: BTreeMap<String, (Place, f64, u64)>,
    /// Most rows that one of them saw.
    most: u64,
}

/// Number of the block, and whether behind its attention.
type Place = (usize, bool);

/// Last parts of names, and through which layer beside them they act.
const THROUGH: [(&[&str], &str); 2] = [
    (&["q_proj", "k_proj", "v_proj", "qkv_proj"], "o_proj"),
    (
        &["gate_proj", "up_proj", "up_gate_proj", "gate_up_proj"],
        "down_proj",
    ),
];

impl Influence {
    fn adds_to_the_stream(name: &str) -> bool {
        let stem = name.strip_suffix(".weight").unwrap_or(name);
        THROUGH.iter().any(|(_, writer)| stem.ends_with(writer))
    }

    /// Sorts readers of one input together.
    fn place(name: &str) -> (String, usize) {
        let stem = name.strip_suffix(".weight").unwrap_or(name);
        let (before, last) = stem.rsplit_once('.').unwrap_or(("", stem));
        let role = THROUGH.iter().position(|(readers, _)| readers.contains(&last));
        (before.to_owned(), role.unwrap_or(THROUGH.len()))
    }

    fn note(&mut self, name: &str, stats: &LayerStats, output: f64) {
        let number = name.split('.').find_map(|part| part.parse().ok());
        let place = (number.unwrap_or(0), !name.contains("o_proj"));
        self.outputs
            .insert(name.to_owned(), (place, output, stats.rows()));
    }

    /// How often a layer runs that saw that many rows.
    fn share(&self, rows: u64) -> f64 {
        rows as f64 / self.most.max(1) as f64
    }

    /// Energy of the residual stream behind each place. Adds in the order of names: the same on every run.
    fn stream(&self) -> BTreeMap<Place, f64> {
        let mut stream: BTreeMap<Place, f64> = BTreeMap::new();
        for (place, output, rows) in self.outputs.values() {
            *stream.entry(*place).or_default() += output * self.share(*rows);
        }
        let mut sum = 0.0;
        for energy in stream.values_mut() {
            sum += *energy;
            *energy = sum;
        }
        stream
    }

    /// What a share of error in the output of this tensor counts. One whose way into the stream is not known counts as
    /// if it were the whole stream.
    fn of(&self, name: &str, stream: &BTreeMap<Place, f64>) -> f64 {
        let stem = name.strip_suffix(".weight").unwrap_or(name);
        let (before, last) = stem.rsplit_once('.').unwrap_or(("", stem));
        let writer = THROUGH.iter().find(|(readers, _)| readers.contains(&last));
        let writer = writer.map(|(_, writer)| format!("{before}.{writer}{}", &name[stem.len()..]));
        let Some(own) = self.outputs.get(writer.as_deref().unwrap_or(name)) else {
            return 1.0;
        };
        match stream.get(&own.0) {
            Some(&all) if all > 0.0 => own.1 * self.share(own.2) / all,
            _ => 0.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use qtool_calib::stats::Moment;

    use super::*;

    /// Statistics of rows of a single 1.
    fn ones(rows: u64) -> LayerStats {
        LayerStats::new(1, rows, Moment::Diagonal(vec![rows as f64]), vec![1.0]).unwrap()
    }

    #[test]
    fn readers_count_as_the_layer_they_act_through() {
        let mut influence = Influence::default();
        let stats = ones(8);
        for (name, energy) in [
            ("l.0.self_attn.o_proj.weight", 2.0),
            ("l.0.mlp.down_proj.weight", 6.0),
            ("l.1.self_attn.o_proj.weight", 8.0),
        ] {
            assert!(Influence::adds_to_the_stream(name));
            influence.note(name, &stats, energy);
        }
        let table = [
            ("l.0.self_attn.v_proj.weight", 1.0),
            ("l.0.self_attn.o_proj.weight", 1.0),
            ("l.0.mlp.gate_proj.weight", 0.75),
            ("l.0.mlp.down_proj.weight", 0.75),
            ("l.1.self_attn.q_proj.weight", 0.5),
            ("elsewhere.weight", 1.0),
        ];
        for (name, expected) in table {
            assert_eq!(influence.of(name, &influence.stream()), expected, "{name}");
        }
        assert!(!Influence::adds_to_the_stream("l.0.mlp.up_proj.weight"));
    }

    #[test]
    fn rare_experts_count_less() {
        let mut influence = Influence::default();
        for (expert, rows) in [(0, 6), (1, 2)] {
            let stats = ones(rows);
            let name = format!("l.0.mlp.experts.{expert}.down_proj.weight");
            influence.note(&name, &stats, 4.0);
        }
        let of = |expert: usize| {
            influence.of(
                &format!("l.0.mlp.experts.{expert}.up_proj.weight"),
                &influence.stream(),
            )
        };
        assert!((of(0) - 0.75).abs() < 1e-12 && (of(1) - 0.25).abs() < 1e-12);
    }
}
