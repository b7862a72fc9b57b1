//! Which pieces of a source each tensor of a FastDeploy folder is made of, for one rank of several.
//! The source is known by names, element types and shapes only, so a checkpoint and an artifact are
//! placed alike. Everything that does not fit is refused here, before any byte is read.

use std::collections::HashSet;
use std::path::Path;

use super::ernie::{Ernie, Kind, Logical, Split};
use super::refusal;
use crate::checkpoint::{Naming, Orientation};
use crate::dtype::{Dtype, FloatDtype};
use crate::error::quoted;
use crate::piece::Piece;
use crate::{FormatError, Result};

/// Looks up a source tensor's element type and shape.
pub type Find<'a> = &'a dyn Fn(&str) -> Option<(Dtype, Vec<usize>)>;

/// A source, by its tensors' names and shapes.
pub struct Source<'a> {
    /// Named in messages.
    pub path: &'a Path,
    /// Name family.
    pub naming: Naming,
    /// All names.
    pub names: Vec<&'a str>,
    /// The tensor of a name.
    pub find: Find<'a>,
}

/// A tensor of one rank and what it is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// Paddle name.
    pub name: String,
    /// What it is.
    pub kind: Kind,
    /// Rows of its matrix: N of a linear weight.
    pub rows: usize,
    /// Columns of its matrix: K of a linear weight.
    pub columns: usize,
    /// Shape it has, or would have if it were not quantized.
    pub shape: Vec<usize>,
    /// Where its rows come from.
    pub pieces: Vec<Piece>,
}

/// A rank's tensors, and the source's tensors that no rank has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// In storage order.
    pub tensors: Vec<Placed>,
    /// The multi-token prediction block, a head that is tied, tables computed at load time.
    pub dropped: Vec<String>,
}

impl Placement {
    /// Whether routers have their correction bias.
    pub fn has_router_bias(&self) -> bool {
        self.tensors.iter().any(|t| t.kind == Kind::RouterBias)
    }
}

/// Places every tensor of `model` for `rank` of `ranks`.
///
/// Fails when a tensor is missing, has another shape than the config asks for or is no float tensor,
/// when the source has a tensor that is no part of the model, or when heads, widths or vocabulary
/// cannot be shared evenly.
pub fn place(model: &Ernie, source: &Source<'_>, rank: usize, ranks: usize) -> Result<Placement> {
    check_ranks(model, source.path, ranks)?;
    if model.moe.is_some() && !source.names.iter().any(|name| name.contains(".mlp.experts.")) {
        let reason = "config.json speaks of experts (moe_num_experts), but the weights hold none; the download is incomplete, or the config belongs to another model";
        return Err(refusal(source.path, reason.to_owned()));
    }
    let needs_bias = model.moe.as_ref().is_some_and(|moe| moe.needs_bias);
    let mut used: HashSet<String> = HashSet::new();
    let mut tensors = Vec::new();
    for logical in model.tensors() {
        let optional = logical.kind == Kind::RouterBias && !needs_bias;
        let pieces = whole_pieces(source, &logical)?;
        if optional && pieces.is_none() {
            continue;
        }
        let Some(pieces) = pieces else {
            return Err(missing(source, &logical));
        };
        used.extend(pieces.iter().map(|piece| piece.tensor.clone()));
        tensors.push(share(&logical, pieces, rank, ranks));
    }
    let mut dropped = Vec::new();
    for name in source.names.iter().filter(|name| !used.contains(**name)) {
        if !may_drop(model, name) {
            return Err(FormatError::TensorEntry {
                path: source.path.to_owned(),
                tensor: quoted(name),
                reason: format!(
                    "it is no part of {} as config.json describes it; FastDeploy would not load it",
                    model.architecture()
                ),
            });
        }
        dropped.push((*name).to_owned());
    }
    Ok(Placement { tensors, dropped })
}

fn check_ranks(model: &Ernie, path: &Path, ranks: usize) -> Result<()> {
    let mut shares = vec![
        ("attention heads", model.heads),
        ("key and value heads", model.kv_heads),
        ("vocabulary", model.vocab),
        ("columns of MLPs", model.intermediate),
    ];
    if let Some(moe) = &model.moe {
        shares.push(("columns of experts", moe.intermediate));
    }
    match shares
        .iter()
        .find(|(_, n)| ranks == 0 || !n.is_multiple_of(ranks))
    {
        None => Ok(()),
        Some((what, n)) => Err(refusal(
            path,
            format!("{n} {what} cannot be shared evenly by {ranks} ranks; choose another --tensor-parallel"),
        )),
    }
}

/// The source tensors a logical one is stacked of, unshared; `None` when the first is missing.
fn whole_pieces(source: &Source<'_>, logical: &Logical) -> Result<Option<Vec<Piece>>> {
    let (hf, paddle) = logical.orientations();
    let mut pieces = Vec::new();
    match source.naming {
        Naming::Hf => {
            for (name, rows) in &logical.segments {
                match piece(source, name, hf, (*rows, logical.columns))? {
                    Some(piece) => pieces.push(piece),
                    None if pieces.is_empty() => return Ok(None),
                    None => return Err(missing_tensor(source, name)),
                }
            }
        }
        Naming::Paddle => {
            let Some(whole) = piece(source, &logical.name, paddle, (logical.rows(), logical.columns))? else {
                return Ok(None);
            };
            let mut from = 0;
            for (_, rows) in &logical.segments {
                let mut piece = whole.clone();
                piece.rows = from..from + rows;
                from += rows;
                pieces.push(piece);
            }
        }
    }
    Ok(Some(pieces))
}

fn piece(
    source: &Source<'_>,
    name: &str,
    orientation: Orientation,
    dims: (usize, usize),
) -> Result<Option<Piece>> {
    let Some((dtype, shape)) = (source.find)(name) else {
        return Ok(None);
    };
    let bad = |reason: String| FormatError::TensorEntry {
        path: source.path.to_owned(),
        tensor: name.to_owned(),
        reason,
    };
    let expected = match orientation {
        Orientation::OutIn => [dims.0, dims.1],
        Orientation::InOut => [dims.1, dims.0],
    };
    let vector = dims.0 == 1 && shape == [dims.1];
    if shape != expected && !vector {
        return Err(bad(format!(
            "expected the shape {expected:?} that config.json asks for, got {shape:?}; config and weights are of different models"
        )));
    }
    let Some(dtype) = FloatDtype::from_dtype(dtype) else {
        return Err(bad(format!(
            "expected BF16, F16 or F32 weights, got {dtype}; give the unquantized original"
        )));
    };
    Ok(Some(Piece::whole(name, dtype, orientation, dims)))
}

fn missing(source: &Source<'_>, logical: &Logical) -> FormatError {
    match (source.naming, logical.segments.first()) {
        (Naming::Hf, Some((name, _))) => missing_tensor(source, name),
        _ => missing_tensor(source, &logical.name),
    }
}

fn missing_tensor(source: &Source<'_>, name: &str) -> FormatError {
    FormatError::MissingTensor {
        path: source.path.to_owned(),
        tensor: name.to_owned(),
        advice: "config.json asks for it: the download is incomplete, or config and weights are of different models",
    }
}

/// Whether a tensor that is no part of the model may be left out.
fn may_drop(model: &Ernie, name: &str) -> bool {
    let inner = name
        .strip_prefix("model.")
        .or_else(|| name.strip_prefix("ernie."))
        .unwrap_or(name);
    inner.starts_with("mtp_")
        || name.ends_with("rotary_emb.inv_freq")
        || (model.tied && name == "lm_head.weight")
}

/// A rank's share of a logical tensor.
fn share(logical: &Logical, mut pieces: Vec<Piece>, rank: usize, ranks: usize) -> Placed {
    let part = |range: std::ops::Range<usize>| {
        let width = range.len() / ranks;
        range.start + rank * width..range.start + (rank + 1) * width
    };
    for piece in &mut pieces {
        match logical.split {
            Split::None => {}
            Split::Rows => piece.rows = part(piece.rows.clone()),
            Split::Columns => piece.columns = part(piece.columns.clone()),
        }
    }
    if ranks == 1 && logical.segments.len() > 1 && pieces.iter().all(|p| p.tensor == logical.name) {
        // All segments of one fused tensor: it as a whole.
        pieces.truncate(1);
        pieces.iter_mut().for_each(|piece| piece.rows = 0..piece.dims.0);
    }
    let rows = pieces.iter().map(|piece| piece.rows.len()).sum();
    let columns = pieces.first().map_or(0, |piece| piece.columns.len());
    let shape = match logical.kind {
        Kind::Linear | Kind::Expert { .. } => vec![columns, rows],
        Kind::Norm => vec![columns],
        Kind::Embedding | Kind::Head | Kind::Router | Kind::RouterBias => vec![rows, columns],
    };
    Placed {
        name: logical.name.clone(),
        kind: logical.kind,
        rows,
        columns,
        shape,
        pieces,
    }
}
