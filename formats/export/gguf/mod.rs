//! `gguf`: one `model.gguf` that llama.cpp runs, with codes laid out in GGML's blocks, the model's dimensions
//! and its tokenizer. Codes are not rounded again: a weight gets the block type that holds it exactly, or is
//! refused ([`crate::packing::ggml`]).
//!
//! | artifact | block type | bits per weight |
//! |---|---|---|
//! | INT8 symmetric, groups of 32 or more | Q8_0 | 8.5 |
//! | INT4 symmetric or narrow, groups of 32 or more | Q4_0 | 4.5 |
//! | `q4-k`; INT4 with zero points, groups of 256 or more | Q4_K | 4.5 |
//! | INT4 with zero points, groups of 32 to 128 | Q4_1, where each scale times zero point is an F16 value, as with scales of 7 significant bits | 5 |
//! | INT3 symmetric or narrow, groups of 256 or more | Q3_K | 3.44 |
//! | `q2-k`; INT2, groups of 256 or more | Q2_K | 2.63 |
//!
//! Kept matrices stay in their type, vectors become F32, as llama.cpp wants them. `docs/formats/gguf.md` is the
//! page about it; `origin` is what it is written from, `model` has names and dimensions, `tokens` the tokenizer, `file` the
//! container.

mod bert;
mod bpe;
mod experts;
pub mod file;
pub mod model;
mod origin;
mod sentencepiece;
pub mod tokens;
mod wordpiece;

use std::borrow::Cow;

use self::file::{Entry, Value, Writer};
use self::model::{Model, pair_rows};
use self::origin::{Held, Origin, Part};
use super::ahead::in_order;
use super::foreign::{Given, Planned as PlannedExport};
use super::linears::{has_halves, not_half};
use super::spares::Spares;
use super::{Exporter, OnBytes, card, checking, interrupted, syncing, write_provenance};
use crate::Result;
use crate::artifact::Artifact;
use crate::dtype::FloatDtype;
use crate::packing::ggml::{GgmlType, offset, pack_k};
use crate::replace::Staging;
use crate::scheme::{AffineScheme, KQuant, Scheme};
use crate::weight::QuantizedWeight;

/// The exporter's only value.
pub const GGUF: Gguf = Gguf;

/// See the module's text.
#[derive(Debug, Clone, Copy)]
pub struct Gguf;

/// Largest finite F16.
const LARGEST_HALF: f32 = 65_504.0;

/// Name of the file.
pub const FILE: &str = "model.gguf";

/// Matrices for which llama.cpp wants F32: whose rows it adds to others, and routers.
fn wants_f32(name: &str) -> bool {
    ["position_embd.weight", "token_types.weight"].contains(&name) || name.ends_with("ffn_gate_inp.weight")
}

/// Values handled at a time, about: what stays in a processor's cache from its making to its writing.
const BLOCK: usize = 1 << 18;

/// How one tensor becomes its entry.
#[derive(Clone, Copy)]
enum Source {
    /// Bytes as they are stored.
    Copied,
    /// Floats widened to F32.
    Widened(FloatDtype),
    /// Codes in blocks.
    Packed(GgmlType),
}

struct Planned<'a> {
    /// Tensors of the model whose rows follow each other: one, or all experts of a layer; none for rotary factors.
    parts: Vec<(Part<'a>, Source)>,
    /// Rows of a head, where rows are reordered.
    pairs: Option<usize>,
    entry: Entry,
}

/// Everything that will be written.
struct Plan<'a> {
    origin: Origin<'a>,
    keys: Vec<(String, Value)>,
    tensors: Vec<Planned<'a>>,
    rope_factors: Vec<f32>,
}

impl Exporter for Gguf {
    fn name(&self) -> &'static str {
        "gguf"
    }

    fn summary(&self) -> &'static str {
        "one file for llama.cpp: q4-k, q2-k, INT8 and INT4 in groups of 32 or more, INT3 and INT2 in groups of 256 or more"
    }

    fn refuses(&self, scheme: &Scheme) -> Option<String> {
        if let Scheme::K(_) = scheme {
            return None;
        }
        // A row is taken for a multiple of the block here; check() knows its length.
        if let Scheme::Affine(s) = scheme
            && GgmlType::of(*s, 512).is_some()
        {
            return None;
        }
        Some(format!(
            "gguf holds q4-k, q2-k, w8-sym, w4-sym and w4-narrow in groups of 32 or more, w4-zp likewise where its scales have 7 significant bits (--scale-bits 7), and w4-zp, w3-sym and w2 in groups of 256 or 512, all with F16 scales, not {scheme}; quantize with --bits 4 --method q4-k, with --bits 4 --group-size 32 --scale-dtype f16, or with --bits 2 --method q2-k"
        ))
    }

    fn check(&self, artifact: &Artifact) -> Result<()> {
        plan(Origin::Artifact(artifact))?.check()
    }

    fn planned_bytes(&self, artifact: &Artifact) -> u64 {
        plan(Origin::Artifact(artifact)).map_or(0, |plan| plan.bytes())
    }

    fn export(
        &self,
        artifact: &Artifact,
        staging: &Staging,
        _max_shard_bytes: u64,
        on_bytes: OnBytes<'_>,
    ) -> Result<()> {
        let plan = plan(Origin::Artifact(artifact))?;
        plan.write(staging, on_bytes)?;
        card::write(staging, artifact, self.name(), plan.bytes())?;
        write_provenance(staging, artifact, self.name())
    }

    fn plan_foreign<'a>(&'a self, given: &'a Given<'a>) -> Result<PlannedExport<'a>> {
        let plan = plan(Origin::Foreign(given))?;
        plan.check()?;
        let tensor_bytes = plan.bytes();
        let write = move |staging: &Staging, _: u64, on_bytes: OnBytes<'_>| {
            plan.write(staging, on_bytes)?;
            given.around(staging, self.name(), tensor_bytes)
        };
        Ok(PlannedExport {
            tensor_bytes,
            write: Box::new(write),
        })
    }
}

impl Plan<'_> {
    fn bytes(&self) -> u64 {
        self.tensors.iter().map(|t| t.entry.bytes).sum()
    }

    /// Fails when values would have to be rounded.
    fn check(&self) -> Result<()> {
        for (part, source) in self.tensors.iter().flat_map(|planned| &planned.parts) {
            let (
                Source::Packed(kind),
                Held::Codes {
                    scheme: Scheme::Affine(scheme),
                    ..
                },
            ) = (source, part.held)
            else {
                continue;
            };
            if has_halves(Scheme::Affine(scheme)) && *kind != GgmlType::Q4_1 {
                continue;
            }
            let (scales, zeros) = self.origin.numbers(part)?;
            if let Some(reason) = refuses_values(*kind, scheme, &scales, &zeros) {
                return Err(self.origin.refusal(format!("{}: {reason}", part.name)));
            }
        }
        Ok(())
    }

    fn write(&self, staging: &Staging, on_bytes: OnBytes<'_>) -> Result<()> {
        let entries = self.tensors.iter().map(|t| t.entry.clone()).collect();
        let path = staging.folder().join(FILE);
        let mut writer = Writer::create(&path, &self.keys, entries)?;
        let pieces = pieces(self);
        let spares = Spares::default();
        let make = |i: usize| match pieces.get(i) {
            // What cannot be laid out may be damaged, which is the better thing to say.
            Some(piece) => make(self.origin, piece, &self.rope_factors, &spares).or_else(|error| {
                let checked = piece.part.map_or(Ok(()), |(part, _)| self.origin.check(part));
                checked.and(Err(error))
            }),
            None => Ok(Cow::Borrowed(&[][..])),
        };
        let read = self
            .tensors
            .iter()
            .flat_map(|planned| &planned.parts)
            .map(|(part, _)| part);
        let check = |part| self.origin.check(part);
        let write = |on_bytes: OnBytes<'_>| {
            syncing::beside(&path, |due| {
                let mut done = 0u64;
                in_order(pieces.len(), make, |_, bytes| {
                    for chunk in bytes.chunks(1 << 23) {
                        writer.append(chunk)?;
                        done += chunk.len() as u64;
                        if !on_bytes(done) {
                            return Err(interrupted(staging));
                        }
                        if let Some(file) = writer.due_for_sync()? {
                            due.offer(file);
                        }
                    }
                    if let Cow::Owned(bytes) = bytes {
                        spares.give(bytes);
                    }
                    Ok(())
                })?;
                drop(due);
                writer.finish()
            })
        };
        checking::beside(read, check, on_bytes, write)
    }
}

/// Why these values would have to be rounded, or `None`.
fn refuses_values(kind: GgmlType, scheme: AffineScheme, scales: &[f32], zeros: &[u8]) -> Option<String> {
    if let Some(reason) = not_half(Scheme::Affine(scheme), scales) {
        return Some(reason);
    }
    let offsets = scales
        .iter()
        .zip(zeros)
        .map(|(scale, zero)| offset(*scale, *zero));
    let inexact = |m: &f32| FloatDtype::F16.round(*m) != *m;
    match kind {
        GgmlType::Q4_1 => offsets.into_iter().find(inexact).map(|m| {
            if m.abs() > LARGEST_HALF {
                return format!(
                    "Q4_1 keeps scale times zero point as F16, whose largest value is {LARGEST_HALF}, got {m:e} (scheme {scheme}); quantize without --asymmetric, or keep the tensor with --skip"
                );
            }
            format!(
                "Q4_1 keeps scale times zero point as F16, which {m:e} is not, and rounding it would move the weights (scheme {scheme}); quantize with --scale-bits 7 --scale-dtype f16, whose scales leave room for the zero point, without --asymmetric, or with --group-size 256 for Q4_K"
            )
        }),
        _ => None,
    }
}

/// Some rows of a part of a tensor.
struct Piece<'p, 'a> {
    planned: &'p Planned<'a>,
    part: Option<&'p (Part<'a>, Source)>,
    /// The first of them, and how many at most.
    rows: (usize, usize),
}

fn pieces<'p, 'a>(plan: &'p Plan<'a>) -> Vec<Piece<'p, 'a>> {
    let mut pieces = Vec::new();
    for planned in &plan.tensors {
        let (rows, step) = planned.rows();
        let mut add = |part, rows| pieces.push(Piece { planned, part, rows });
        if planned.parts.is_empty() {
            add(None, (0, step));
        }
        for part in &planned.parts {
            let step = if plan.origin.is_whole(&part.0) { rows } else { step };
            (0..rows).step_by(step).for_each(|at| add(Some(part), (at, step)));
        }
    }
    pieces
}

impl Planned<'_> {
    /// Rows of a part, and rows of a piece of it.
    fn rows(&self) -> (usize, usize) {
        let experts = self.entry.shape.len() > 2;
        let of_part = self.entry.shape.get(usize::from(experts)..).unwrap_or_default();
        let rows = of_part.first().copied().unwrap_or(1).max(1);
        let k = (of_part.iter().product::<usize>() / rows).max(1);
        let step = (BLOCK / k).max(1).next_multiple_of(self.pairs.unwrap_or(1));
        (rows, step)
    }
}

/// The bytes of a piece.
fn make<'a>(
    origin: Origin<'a>,
    piece: &Piece<'_, 'a>,
    rope_factors: &[f32],
    spares: &Spares,
) -> Result<Cow<'a, [u8]>> {
    let planned = piece.planned;
    let Some((part, source)) = piece.part else {
        let factors = rope_factors.iter().flat_map(|f| f.to_le_bytes());
        return Ok(Cow::Owned(factors.collect()));
    };
    let (at, step) = piece.rows;
    let (rows, _) = planned.rows();
    let until = rows.min(at + step);
    let row = planned.entry.bytes as usize / (rows * planned.parts.len());
    let bytes = match source {
        Source::Copied => origin.elements(part, at..until, rows)?,
        Source::Widened(dtype) => {
            let values = dtype.widen(&origin.elements(part, at..until, rows)?);
            Cow::Owned(values.iter().flat_map(|v| v.to_le_bytes()).collect())
        }
        Source::Packed(kind) => {
            let mut out = spares.take();
            out.reserve((until - at) * row);
            if let Some(rows) = origin.stored(part, *kind, at..until)? {
                kind.pack_stored(rows.group, rows.codes, &rows.scales, &mut out);
            } else {
                match origin.weight(part, at, step)? {
                    QuantizedWeight::Affine(weight) => kind.pack(&weight, &mut out),
                    QuantizedWeight::K(weight) => pack_k(&weight, &mut out),
                    other => {
                        let reason = format!("{}: gguf has no block for {}", part.name, other.scheme());
                        return Err(origin.refusal(reason));
                    }
                }
            }
            Cow::Owned(out)
        }
    };
    Ok(match planned.pairs {
        Some(head_dim) => Cow::Owned(pair_rows(&bytes, row, head_dim)),
        None => bytes,
    })
}

/// What will be written; or why the model cannot become a file of this kind.
fn plan(origin: Origin<'_>) -> Result<Plan<'_>> {
    let refused = |reason: String| origin.refusal(reason);
    let config = origin.config()?;
    let parts = origin.parts()?;
    let headed = parts.iter().any(|part| bert::is_head(part.name));
    let model = Model::of(&config, headed).map_err(refused)?;
    let is_embedding = |part: &&Part<'_>| model.name_of(part.name).as_deref() == Some("token_embd.weight");
    let embedding = parts.iter().find(is_embedding).ok_or_else(|| {
        refused(
            "it has no embedding of tokens, which gguf needs; `qtool inspect` lists what is there".to_owned(),
        )
    })?;
    if embedding.shape.first() != Some(&model.vocabulary) {
        return Err(refused(format!(
            "config.json: expected vocab_size to be the rows of the embedding, {:?}, got {}",
            embedding.shape, model.vocabulary
        )));
    }
    let tokens = tokens::keys(origin.folder(), &config, model.vocabulary)?.map_err(refused)?;
    let mut tensors = Vec::new();
    for part in parts {
        tensors.push(planned(part, &model).map_err(|reason| refused(format!("{}: {reason}", part.name)))?);
    }
    let mut tensors = experts::together(tensors, model.experts).map_err(refused)?;
    if !model.rope_factors.is_empty() {
        let entry = Entry {
            name: "rope_freqs.weight".to_owned(),
            shape: vec![model.rope_factors.len()],
            kind: 0,
            bytes: 4 * model.rope_factors.len() as u64,
        };
        tensors.push(Planned {
            parts: Vec::new(),
            pairs: None,
            entry,
        });
    }
    let mut keys = vec![
        (
            "general.architecture".to_owned(),
            Value::Text(model.architecture.to_owned()),
        ),
        ("general.type".to_owned(), Value::Text("model".to_owned())),
        ("general.name".to_owned(), Value::Text(origin.name())),
        ("general.file_type".to_owned(), Value::U32(file_type(&tensors))),
        ("general.quantization_version".to_owned(), Value::U32(2)),
    ];
    keys.extend(model.keys);
    keys.extend(tokens);
    Ok(Plan {
        origin,
        keys,
        tensors,
        rope_factors: model.rope_factors,
    })
}

fn planned<'a>(part: Part<'a>, model: &Model) -> std::result::Result<Planned<'a>, String> {
    let name = model.name_of(part.name).ok_or_else(|| {
        format!(
            "gguf's architecture {} has no tensor for it; leave the tensor out of the model, or export --to bf16",
            model.architecture
        )
    })?;
    let pairs = model.reorders(part.name).then_some(model.head_dim);
    let rows = part.shape.first().copied().unwrap_or(0);
    if pairs.is_some_and(|d| d < 2 || !d.is_multiple_of(2) || !rows.is_multiple_of(d)) {
        return Err(format!(
            "expected rows of whole heads of {}, got {rows}",
            model.head_dim
        ));
    }
    let mut shape = part.shape.to_vec();
    if model.experts > 0 && name.ends_with("exp_probs_b.bias") {
        shape.retain(|d| *d != 1); // a row in the checkpoint
    }
    let elements = shape.iter().product::<usize>() as u64;
    let (source, kind, bytes) = match part.held {
        Held::Elements(dtype) => {
            let dtype = FloatDtype::from_dtype(dtype)
                .ok_or_else(|| format!("expected BF16, F16 or F32, got {dtype}"))?;
            if (shape.len() == 1 || wants_f32(&name)) && dtype != FloatDtype::F32 {
                (Source::Widened(dtype), 0, 4 * elements)
            } else {
                let kind = match dtype {
                    FloatDtype::F32 => 0,
                    FloatDtype::F16 => 1,
                    FloatDtype::Bf16 => 30,
                };
                (Source::Copied, kind, elements * dtype.bytes() as u64)
            }
        }
        Held::Floats => {
            return Err(
                "no block of GGML holds its codes (columns in another order than their groups, or levels of its own); export --to bf16"
                    .to_owned(),
            );
        }
        Held::Codes { .. } if wants_f32(&name) => {
            return Err("llama.cpp wants it as F32; keep it with --skip".to_owned());
        }
        Held::Codes {
            scheme,
            rows,
            columns,
        } => {
            let kind = match scheme {
                Scheme::Affine(scheme) => GgmlType::of(scheme, columns),
                Scheme::K(KQuant::Q4) => Some(GgmlType::Q4K),
                Scheme::K(KQuant::Q2) => Some(GgmlType::Q2K),
                _ => None,
            };
            let kind = kind.ok_or_else(|| {
                format!(
                    "{scheme} of {columns} columns is no whole number of GGML's blocks; quantize with --group-size 32, or keep it with --skip"
                )
            })?;
            let bytes = rows as u64 * kind.row_bytes(columns) as u64;
            (Source::Packed(kind), kind.id(), bytes)
        }
    };
    Ok(Planned {
        parts: vec![(part, source)],
        pairs,
        entry: Entry {
            name,
            shape,
            kind,
            bytes,
        },
    })
}

/// `general.file_type`: llama.cpp's number for what most quantized weights are, or for BF16.
fn file_type(tensors: &[Planned<'_>]) -> u32 {
    let packed = |kind: GgmlType| {
        let of_kind = |source: &&Source| matches!(source, Source::Packed(k) if *k == kind);
        let sources = tensors.iter().flat_map(|t| &t.parts).map(|(_, source)| source);
        sources.filter(of_kind).count()
    };
    let types = [
        (GgmlType::Q4_0, 2),
        (GgmlType::Q4_1, 3),
        (GgmlType::Q8_0, 7),
        (GgmlType::Q2K, 10),
        (GgmlType::Q3K, 12),
        (GgmlType::Q4K, 15),
    ];
    let most = types.iter().max_by_key(|(kind, _)| packed(*kind));
    most.filter(|(kind, _)| packed(*kind) > 0)
        .map_or(32, |(_, id)| *id)
}
