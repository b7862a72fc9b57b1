//! The plan of `qtool quantize --format fastdeploy`: one plan per rank, each an artifact whose stored
//! forms, names and `config.json` are those FastDeploy loads. What belongs where and what is refused
//! is known in [`qtool_formats::export::fastdeploy`]; this page joins it with quantizers.

use std::path::Path;
use std::sync::Arc;

use qtool_calib::TensorOptions;
use qtool_calib::ccq::Effort;
use qtool_calib::options::PartialOptions;
use qtool_formats::checkpoint::{Checkpoint, Orientation};
use qtool_formats::export::fastdeploy::kv_cache::KvCache;
use qtool_formats::export::fastdeploy::{
    Ernie, Kind, Placed, Source, Store, Wanted, kept_dtype, kept_reason, place,
};
use qtool_formats::scheme::{Family, Grid, Grouping};
use qtool_formats::{FloatDtype, FormatError};
use serde_json::{Value, json};

use crate::kv_scales;
use crate::plan::{
    Action, Conversion, Foreign, Quantization, QuantizePlan, TensorPlan, read_config, refuse_quantized,
};
use crate::transform::Transform;
use crate::{Error, Result};

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Width and mixture.
    pub wanted: Wanted,
    /// Ranks of tensor parallelism.
    pub ranks: usize,
    /// Method that chooses scales of INT8 and INT4; the width's default when absent.
    pub method: Option<&'static str>,
    /// Whether there will be evidence about the inputs.
    pub calibrated: bool,
    /// How long to search for 2-bit codes; the default when absent.
    pub effort: Option<Effort>,
    /// Most bytes of tensor data in one file.
    pub max_shard_bytes: u64,
    /// Type of a quantized key-value cache, whose scales are to be written.
    pub kv_cache: Option<KvCache>,
}

/// One plan per rank. Fails, before anything is read or written, with one sentence that says what
/// does not fit.
pub fn plans(checkpoint: &Checkpoint, request: &Request) -> Result<Vec<QuantizePlan>> {
    transformed_plans(checkpoint, request, None)
}

/// The same for the model that `transform` makes of it.
pub fn transformed_plans(
    checkpoint: &Checkpoint,
    request: &Request,
    transform: Option<&Arc<Transform>>,
) -> Result<Vec<QuantizePlan>> {
    refuse_quantized(checkpoint)?;
    let config_path = checkpoint.folder().join("config.json");
    let config = if checkpoint.root().is_dir() {
        read_config(checkpoint.folder())?
    } else {
        None
    };
    let Some(mut config) = config else {
        return Err(Error::Source {
            path: checkpoint.root().to_owned(),
            reason: "--format fastdeploy needs the model's config.json beside its weights; give the model's folder".to_owned(),
        });
    };
    if let Some(transform) = transform {
        transform.adjust_config(&mut config);
    }
    let model = Ernie::from_config(&config_path, &config)?;
    request.wanted.check(&model, checkpoint.root())?;
    if let Some(kv_cache) = request.kv_cache {
        kv_cache.check(&model, checkpoint.root())?;
    }
    (0..request.ranks.max(1))
        .map(|rank| plan(checkpoint, request, &model, &config, (transform, rank)))
        .collect()
}

fn plan(
    checkpoint: &Checkpoint,
    request: &Request,
    model: &Ernie,
    config: &Value,
    (transform, rank): (Option<&Arc<Transform>>, usize),
) -> Result<QuantizePlan> {
    let made = transform.and_then(|t| t.made());
    // A head of the Paddle form lies turned, the embedding it is made of does not.
    let turned = made.is_some_and(|m| checkpoint.naming().orientation(&m.name) == Orientation::InOut);
    let origin = |name: &str| made.filter(|m| m.name == name).map(|m| m.origin.clone());
    let find = |name: &str| {
        let origin = origin(name);
        let view = checkpoint.tensor(origin.as_deref().unwrap_or(name)).ok()?;
        let mut shape = view.shape().to_vec();
        if origin.is_some() && turned {
            shape.reverse();
        }
        Some((view.dtype(), shape))
    };
    let source = Source {
        path: checkpoint.root(),
        naming: checkpoint.naming(),
        names: checkpoint
            .names()
            .filter(|name| made.is_none_or(|m| m.name != *name))
            .chain(made.map(|m| m.name.as_str()))
            .collect(),
        find: &find,
    };
    let mut placement = place(model, &source, rank, request.ranks.max(1))?;
    for piece in placement.tensors.iter_mut().flat_map(|t| &mut t.pieces) {
        if let Some(origin) = origin(&piece.tensor) {
            piece.tensor = origin;
            if turned {
                piece.orientation = match piece.orientation {
                    Orientation::OutIn => Orientation::InOut,
                    Orientation::InOut => Orientation::OutIn,
                };
            }
        }
    }
    let mut tensors = Vec::with_capacity(placement.tensors.len());
    for placed in &placement.tensors {
        tensors.push(tensor(checkpoint.root(), request, model, placed)?);
    }
    let has_router_bias = placement.has_router_bias();
    let mut config = request.wanted.config(model, config.clone(), has_router_bias);
    if let Some(kv_cache) = request.kv_cache {
        tensors.extend(kv_scales::plan(kv_cache, model, rank, request.ranks));
        config["quantization_config"] = kv_cache.config(request.wanted.bits);
    }
    let plan = QuantizePlan {
        tensors,
        family: Family::FastDeploy,
        dropped: placement.dropped,
        transform: None,
        foreign: Some(Foreign {
            config,
            options: options(request, rank),
            kv_cache: request.kv_cache,
        }),
    };
    match transform {
        Some(transform) => plan.folded(checkpoint, Arc::clone(transform)),
        None => Ok(plan),
    }
}

/// Every option with an effect on the bytes.
fn options(request: &Request, rank: usize) -> Value {
    let mut options = json!({
        "format": "fastdeploy",
        "bits": request.wanted.bits,
        "clip": request.method,
        "max_shard_bytes": request.max_shard_bytes,
    });
    if request.wanted.bits == 2 {
        options["w4_until"] = json!(request.wanted.w4_until);
        options["effort"] = json!(request.effort.unwrap_or_default().name());
    }
    if let Some(kv_cache) = request.kv_cache {
        options["kv_cache"] = json!(kv_cache.name());
    }
    if request.ranks > 1 {
        options["tensor_parallel"] = json!({"ranks": request.ranks, "rank": rank});
    }
    options
}

fn tensor(root: &Path, request: &Request, model: &Ernie, placed: &Placed) -> Result<TensorPlan> {
    let bytes = |piece: &qtool_formats::piece::Piece| {
        (piece.rows.len() * piece.columns.len() * piece.dtype.bytes()) as u64
    };
    let source_bytes = placed.pieces.iter().map(bytes).sum();
    let (dtype, action) = match request.wanted.store(model, placed.kind) {
        Some(store) => {
            let quantization = quantization(root, request, placed, store)?;
            (FloatDtype::Bf16, Action::Quantize(Box::new(quantization)))
        }
        None => (kept_dtype(placed.kind), kept(placed)),
    };
    Ok(TensorPlan {
        name: placed.name.clone(),
        shape: placed.shape.clone(),
        dtype: dtype.dtype(),
        source_bytes,
        action,
    })
}

fn kept(placed: &Placed) -> Action {
    let (reason, dtype) = (kept_reason(placed.kind).to_owned(), kept_dtype(placed.kind));
    match placed.pieces.as_slice() {
        [piece] if piece.is_whole() && piece.dtype == dtype && piece.orientation == Orientation::OutIn => {
            Action::Keep {
                reason,
                source: piece.tensor.clone(),
            }
        }
        pieces => Action::Convert(Conversion {
            reason,
            n: placed.rows,
            k: placed.columns,
            pieces: pieces.to_vec(),
            dtype,
        }),
    }
}

fn quantization(root: &Path, request: &Request, placed: &Placed, store: Store) -> Result<Quantization> {
    let partial = |bits, grid| PartialOptions {
        bits: Some(bits),
        grouping: Some(Grouping::Row),
        grid: Some(grid),
        method: request.method,
        scale: Some(FloatDtype::Bf16),
        scale_bits: None,
        effort: None,
        calibrated: request.calibrated,
    };
    let two = PartialOptions {
        effort: request.effort,
        calibrated: request.calibrated,
        ..PartialOptions::default()
    };
    let options: TensorOptions = match store {
        Store::Int8 => partial(8, Grid::Symmetric).complete(8),
        Store::Int4 => partial(4, Grid::Narrow).complete(4),
        Store::Wint2 => two.complete(2),
    }
    .map_err(Error::Option)?;
    let method = qtool_calib::find(options.method).ok_or_else(|| Error::Source {
        path: root.to_owned(),
        reason: format!("no method {}", options.method),
    })?;
    let quantizer = (method.build)(&options).map_err(Error::Option)?;
    let scheme = quantizer.scheme();
    let parts = scheme
        .parts_in(Family::FastDeploy, placed.rows, placed.columns)
        .map_err(|error| unfit(root, placed, &error))?;
    Ok(Quantization {
        quantizer,
        scheme,
        n: placed.rows,
        k: placed.columns,
        orientation: Orientation::InOut,
        pieces: placed.pieces.clone(),
        parts,
    })
}

fn unfit(root: &Path, placed: &Placed, error: &FormatError) -> Error {
    let what = match placed.kind {
        Kind::Expert { .. } => "an expert's weight",
        _ => "a linear weight",
    };
    Error::Source {
        path: root.to_owned(),
        reason: format!("{} ({what}): {error}", placed.name),
    }
}
