//! Pipeline page: `--target-bpw`. Statistics become sensitivities, sensitivities a plan of bits, the plan a recipe.
//! Owns the budget (what counts), which tensors share a choice, and the refusal of targets out of reach.
//!
//! ```text
//! budget = target * weights / 8 bytes, over every tensor that is or could be quantized, everything stored counted
//! ```
//!
//! All routed experts of a layer share one choice, as kernels that fuse them and FastDeploy's folders need it.
//! Tensors under a `--rule` keep what it says and count; tensors that were not observed get 8 bits and count.

use std::collections::HashMap;

use qtool_calib::allocation::{Choice, allocate, range};
use qtool_calib::options::PartialOptions;
use qtool_calib::{Recipe, TensorOptions};
use qtool_formats::checkpoint::Checkpoint;
use serde::Serialize;

use super::coverage::{EvidenceSource, expert_of};
use super::sensitivity::{Sensitivity, candidates, measure};
use crate::plan::QuantizePlan;
use crate::{Error, Result, quantize};

/// What `--target-bpw` came to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Allocated {
    /// Bits per weight asked for.
    pub target: f64,
    /// Bits per weight of the plan.
    pub reached: f64,
    /// Fewest and most bits per weight that could be asked for.
    pub reachable: [f64; 2],
    /// Estimated loss of the plan: shares of error in the residual stream, see [`super::sensitivity`].
    pub loss: f64,
    /// No plan within the budget has less.
    pub bound: f64,
    /// How many tensors and weights got what.
    pub shares: Vec<Share>,
}

/// Tensors that got the same.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Share {
    /// Options, or `keep`.
    pub options: String,
    /// Tensors.
    pub tensors: usize,
    /// Weights.
    pub weights: u64,
}

/// Tensors that share a choice.
struct Item {
    members: Vec<usize>,
    options: Vec<Option<TensorOptions>>,
    choices: Vec<Choice>,
}

/// A recipe like `recipe` whose open tensors are assigned options so that all quantized tensors together take at
/// most `target` bits per weight, by what `source` knows.
///
/// Fails when the target is out of reach (naming what is in reach), or the statistics do not serve.
pub fn run(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    (target, base): (f64, PartialOptions),
    source: &dyn EvidenceSource,
    threads: usize,
) -> Result<(Recipe, Allocated)> {
    let plan = QuantizePlan::new(checkpoint, recipe)?;
    let candidates = candidates(base)?;
    let measured = quantize::with_threads(threads, || {
        measure(checkpoint, &plan, recipe, source, &candidates)
    })?;
    decide(&plan, recipe, target, &measured)
}

/// The plan of bits for tensors as sensitive as that.
fn decide(
    plan: &QuantizePlan,
    recipe: &Recipe,
    target: f64,
    measured: &[Sensitivity],
) -> Result<(Recipe, Allocated)> {
    let observed: HashMap<&str, usize> = measured
        .iter()
        .enumerate()
        .map(|(i, s)| (s.tensor.as_str(), i))
        .collect();
    let mut assigned = HashMap::new();
    let (mut weights, mut fixed) = (0u64, 0u64);
    let mut shares = Vec::new();
    for (tensor, q) in plan.quantized() {
        let count = (q.n * q.k) as u64;
        weights += count;
        if observed.contains_key(tensor.name.as_str()) {
            continue;
        }
        let eight = PartialOptions::default().complete(8).map_err(Error::Option)?;
        let parts = eight.scheme().map_err(Error::Option)?.parts(q.n, q.k);
        match parts {
            Ok(parts) if recipe.leaves_open(&tensor.name, tensor.dtype, &tensor.shape) => {
                fixed += parts.iter().map(|part| part.bytes() as u64).sum::<u64>();
                assigned.insert(tensor.name.clone(), Some(eight));
                share(&mut shares, "bits:8 (not observed)", count);
            }
            _ => {
                fixed += tensor.stored_bytes();
                share(&mut shares, "--rule", count);
            }
        }
    }
    let items = items(measured);
    let choices: Vec<Vec<Choice>> = items.iter().map(|item| item.choices.clone()).collect();
    let per_weight = |bytes: u64| bytes as f64 * 8.0 / weights.max(1) as f64;
    let (least, most) = range(&choices);
    let reachable = [per_weight(least + fixed), per_weight(most + fixed)];
    let budget = (target * weights as f64 / 8.0).floor() - fixed as f64;
    let found = if budget >= 0.0 && target < reachable[1] {
        allocate(&choices, budget as u64)
    } else {
        None
    };
    let Some(found) = found else {
        return Err(Error::Target { target, reachable });
    };
    for (item, &choice) in items.iter().zip(&found.chosen) {
        for &member in &item.members {
            let options = item.options[choice];
            let text = options.map_or_else(|| "keep".to_owned(), |o| o.to_string());
            share(&mut shares, &text, measured[member].weights);
            assigned.insert(measured[member].tensor.clone(), options);
        }
    }
    shares.sort_by(|a, b| a.options.cmp(&b.options));
    let allocated = Allocated {
        target,
        reached: per_weight(found.bytes + fixed),
        reachable,
        loss: found.loss,
        bound: found.bound,
        shares,
    };
    Ok((recipe.assign(assigned), allocated))
}

fn share(shares: &mut Vec<Share>, options: &str, weights: u64) {
    match shares.iter_mut().find(|s| s.options == options) {
        Some(share) => {
            share.tensors += 1;
            share.weights += weights;
        }
        None => shares.push(Share {
            options: options.to_owned(),
            tensors: 1,
            weights,
        }),
    }
}

/// One item a tensor, but one for all routed experts of a layer, with the choices that all of them have.
fn items(measured: &[Sensitivity]) -> Vec<Item> {
    let mut items: Vec<Item> = Vec::new();
    let mut layers: HashMap<&str, usize> = HashMap::new();
    for (i, tensor) in measured.iter().enumerate() {
        let layer = expert_of(&tensor.tensor).map(|(layer, ..)| layer);
        let known = layer.and_then(|layer| layers.get(layer)).copied();
        let Some(at) = known else {
            if let Some(layer) = layer {
                layers.insert(layer, items.len());
            }
            items.push(Item {
                members: vec![i],
                options: tensor.options.clone(),
                choices: tensor.choices.clone(),
            });
            continue;
        };
        let item = &mut items[at];
        item.members.push(i);
        let (mut options, mut choices) = (Vec::new(), Vec::new());
        for (option, choice) in item.options.iter().zip(&item.choices) {
            if let Some(own) = tensor.options.iter().position(|o| o == option) {
                options.push(*option);
                choices.push(Choice {
                    bytes: choice.bytes + tensor.choices[own].bytes,
                    loss: choice.loss + tensor.choices[own].loss,
                });
            }
        }
        (item.options, item.choices) = (options, choices);
    }
    items
}
