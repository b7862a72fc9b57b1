//! `gguf`: one `model.gguf` that llama.cpp runs, with codes laid out in GGML's blocks, the model's dimensions
//! and its tokenizer. Codes are not rounded again: a weight gets the block type that holds it exactly, or is
//! refused ([`crate::packing::ggml`]).
//!
//! | artifact | block type | bits per weight |
//! |---|---|---|
//! | INT8 symmetric, groups of 32 or more | Q8_0 | 8.5 |
//! | INT4 symmetric or narrow, groups of 32 or more | Q4_0 | 4.5 |
//! | `q4-k`; INT4 with zero points, groups of 256 or more | Q4_K | 4.5 |
//! | INT4 with zero points, groups of 32 to 128 | Q4_1, where each scale times zero point is an F16 value | 5 |
//! | INT3 symmetric or narrow, groups of 256 or more | Q3_K | 3.44 |
//! | `q2-k`; INT2, groups of 256 or more | Q2_K | 2.63 |
//!
//! Kept matrices stay in their type, vectors become F32, as llama.cpp wants them. `docs/formats/gguf.md` is the
//! page about it; `model` has names and dimensions, `tokens` the tokenizer, `file` the container.

mod bert;
mod bpe;
mod experts;
pub mod file;
pub mod model;
mod sentencepiece;
pub mod tokens;
mod wordpiece;

use std::borrow::Cow;

use serde_json::Value as Json;

use self::file::{Entry, Value, Writer};
use self::model::{Model, pair_rows};
use super::ahead::in_order;
use super::linears::not_half;
use super::{Exporter, OnBytes, card, interrupted, refusal, write_provenance};
use crate::Result;
use crate::artifact::manifest::QuantizedRecord;
use crate::artifact::{Artifact, Stored, TensorRecord};
use crate::checkpoint::Naming;
use crate::checkpoint::shards::read_json;
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

/// Name of the file.
pub const FILE: &str = "model.gguf";

/// Matrices for which llama.cpp wants F32: whose rows it adds to others, and routers.
fn wants_f32(name: &str) -> bool {
    ["position_embd.weight", "token_types.weight"].contains(&name) || name.ends_with("ffn_gate_inp.weight")
}

/// Values handled at a time, about.
const BLOCK: usize = 1 << 20;

/// How one tensor becomes its entry.
enum Source<'a> {
    /// Bytes as they are stored.
    Copied,
    /// Floats widened to F32.
    Widened(FloatDtype),
    /// Codes in blocks.
    Packed(&'a QuantizedRecord, GgmlType),
}

struct Planned<'a> {
    /// Tensors of the artifact whose rows follow each other: one, or all experts of a layer; none for rotary factors.
    parts: Vec<(&'a TensorRecord, Source<'a>)>,
    /// Rows of a head, where rows are reordered.
    pairs: Option<usize>,
    entry: Entry,
}

/// Everything that will be written.
struct Plan<'a> {
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
            "gguf holds q4-k, q2-k, w8-sym, w4-sym and w4-narrow in groups of 32 or more and w4-zp, w3-sym and w2 in groups of 256 or 512, all with F16 scales, not {scheme}; quantize with --bits 4 --method q4-k, with --bits 4 --group-size 32 --scale-dtype f16, or with --bits 2 --method q2-k"
        ))
    }

    fn check(&self, artifact: &Artifact) -> Result<()> {
        let plan = plan(artifact)?;
        for (record, source) in plan.tensors.iter().flat_map(|planned| &planned.parts) {
            let Source::Packed(q, kind) = source else {
                continue;
            };
            let Scheme::Affine(scheme) = q.scheme else {
                continue;
            };
            let (scales, zeros) = super::linears::scales_and_zeros(artifact, q)?;
            if let Some(reason) = refuses_values(*kind, scheme, &scales, &zeros) {
                return Err(refusal(artifact, format!("{}: {reason}", record.name)));
            }
        }
        Ok(())
    }

    fn planned_bytes(&self, artifact: &Artifact) -> u64 {
        plan(artifact).map_or(0, |plan| plan.bytes())
    }

    fn export(
        &self,
        artifact: &Artifact,
        staging: &Staging,
        _max_shard_bytes: u64,
        on_bytes: OnBytes<'_>,
    ) -> Result<()> {
        let plan = plan(artifact)?;
        let entries = plan.tensors.iter().map(|t| t.entry.clone()).collect();
        let mut writer = Writer::create(&staging.folder().join(FILE), &plan.keys, entries)?;
        let mut done = 0u64;
        let mut append = |bytes: &[u8]| {
            writer.append(bytes)?;
            done += bytes.len() as u64;
            if on_bytes(done) {
                Ok(())
            } else {
                Err(interrupted(staging))
            }
        };
        let pieces = pieces(&plan.tensors);
        let make = |i: usize| match pieces.get(i) {
            Some(piece) => make(artifact, piece, &plan.rope_factors),
            None => Ok(Cow::Borrowed(&[][..])),
        };
        in_order(pieces.len(), make, |_, bytes| {
            bytes.chunks(1 << 23).try_for_each(&mut append)
        })?;
        writer.finish()?;
        card::write(staging, artifact, self.name(), plan.bytes())?;
        write_provenance(staging, artifact, self.name())
    }
}

impl Plan<'_> {
    fn bytes(&self) -> u64 {
        self.tensors.iter().map(|t| t.entry.bytes).sum()
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
            format!(
                "Q4_1 keeps scale times zero point as F16, which {m:e} is not, and rounding it would move the weights (scheme {scheme}); quantize without --asymmetric, or with --group-size 256 for Q4_K"
            )
        }),
        _ => None,
    }
}

/// Some rows of a part of a tensor.
struct Piece<'p, 'a> {
    planned: &'p Planned<'a>,
    part: Option<&'p (&'a TensorRecord, Source<'a>)>,
    /// The first of them; none stands for the check of the part's digests, which goes before its rows.
    at: Option<usize>,
}

fn pieces<'p, 'a>(tensors: &'p [Planned<'a>]) -> Vec<Piece<'p, 'a>> {
    let mut pieces = Vec::new();
    for planned in tensors {
        let (rows, step) = planned.rows();
        let mut add = |part, at| pieces.push(Piece { planned, part, at });
        if planned.parts.is_empty() {
            add(None, Some(0));
        }
        for part in &planned.parts {
            add(Some(part), None);
            (0..rows).step_by(step).for_each(|at| add(Some(part), Some(at)));
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
fn make<'a>(artifact: &'a Artifact, piece: &Piece<'_, '_>, rope_factors: &[f32]) -> Result<Cow<'a, [u8]>> {
    let planned = piece.planned;
    let Some((record, source)) = piece.part else {
        let factors = rope_factors.iter().flat_map(|f| f.to_le_bytes());
        return Ok(Cow::Owned(factors.collect()));
    };
    let Some(at) = piece.at else {
        artifact.check_digests(record)?;
        return Ok(Cow::Borrowed(&[]));
    };
    let (rows, step) = planned.rows();
    let until = rows.min(at + step);
    let row = planned.entry.bytes as usize / (rows * planned.parts.len());
    let of = |bytes: &'a [u8]| {
        let width = bytes.len() / rows;
        bytes.get(at * width..until * width).unwrap_or_default()
    };
    let bytes = match source {
        Source::Copied => Cow::Borrowed(of(artifact.stored(&record.name)?.bytes())),
        Source::Widened(dtype) => {
            let values = dtype.widen(of(artifact.stored(&record.name)?.bytes()));
            Cow::Owned(values.iter().flat_map(|v| v.to_le_bytes()).collect())
        }
        Source::Packed(q, kind) => {
            let mut out = Vec::with_capacity((until - at) * row);
            match artifact.weight_rows(q, at, step)? {
                QuantizedWeight::Affine(weight) => kind.pack(&weight, &mut out),
                QuantizedWeight::K(weight) => pack_k(&weight, &mut out),
                other => {
                    return Err(refusal(
                        artifact,
                        format!("{}: gguf has no block for {}", record.name, other.scheme()),
                    ));
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

/// What will be written; or why the artifact cannot become a file of this kind.
fn plan(artifact: &Artifact) -> Result<Plan<'_>> {
    let manifest = artifact.manifest();
    let refused = |reason: String| refusal(artifact, reason);
    if !manifest.family.is_own() || manifest.source.naming != Naming::Hf {
        return Err(refused(
            "gguf is written from the tensor names of Hugging Face models, and these are Paddle's; quantize the model's -PT form without --format fastdeploy".to_owned(),
        ));
    }
    let config: Json = read_json(&artifact.folder().join("config.json"))?;
    let headed = manifest.tensors.iter().any(|t| bert::is_head(&t.name));
    let model = Model::of(&config, headed).map_err(refused)?;
    let is_embedding = |t: &&TensorRecord| model.name_of(&t.name).as_deref() == Some("token_embd.weight");
    let embedding = match manifest.tensors.iter().find(is_embedding) {
        Some(embedding) => embedding,
        None => artifact.record("model.embed_tokens.weight")?,
    };
    if embedding.shape.first() != Some(&model.vocabulary) {
        return Err(refused(format!(
            "config.json: expected vocab_size to be the rows of the embedding, {:?}, got {}",
            embedding.shape, model.vocabulary
        )));
    }
    let tokens = tokens::keys(artifact.folder(), &config, model.vocabulary)?.map_err(refused)?;
    let mut tensors = Vec::new();
    for record in &manifest.tensors {
        tensors
            .push(planned(record, &model).map_err(|reason| refused(format!("{}: {reason}", record.name)))?);
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
        (
            "general.name".to_owned(),
            Value::Text(manifest.source.name.clone()),
        ),
        ("general.file_type".to_owned(), Value::U32(file_type(&tensors))),
        ("general.quantization_version".to_owned(), Value::U32(2)),
    ];
    keys.extend(model.keys);
    keys.extend(tokens);
    Ok(Plan {
        keys,
        tensors,
        rope_factors: model.rope_factors,
    })
}

fn planned<'a>(record: &'a TensorRecord, model: &Model) -> std::result::Result<Planned<'a>, String> {
    let name = model.name_of(&record.name).ok_or_else(|| {
        format!(
            "gguf's architecture {} has no tensor for it; leave the tensor out of the model, or export --to bf16",
            model.architecture
        )
    })?;
    let pairs = model.reorders(&record.name).then_some(model.head_dim);
    let rows = record.shape.first().copied().unwrap_or(0);
    if pairs.is_some_and(|d| d < 2 || !d.is_multiple_of(2) || !rows.is_multiple_of(d)) {
        return Err(format!(
            "expected rows of whole heads of {}, got {rows}",
            model.head_dim
        ));
    }
    let mut shape = record.shape.clone();
    if model.experts > 0 && name.ends_with("exp_probs_b.bias") {
        shape.retain(|d| *d != 1); // a row in the checkpoint
    }
    let elements = shape.iter().product::<usize>() as u64;
    let (source, kind, bytes) = match &record.stored {
        Stored::Kept { .. } => {
            let dtype = FloatDtype::from_dtype(record.dtype)
                .ok_or_else(|| format!("expected BF16, F16 or F32, got {}", record.dtype))?;
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
        Stored::Quantized(_) if wants_f32(&name) => {
            return Err("llama.cpp wants it as F32; keep it with --skip".to_owned());
        }
        Stored::Quantized(q) => {
            let kind = match q.scheme {
                Scheme::Affine(scheme) => GgmlType::of(scheme, q.columns),
                Scheme::K(KQuant::Q4) => Some(GgmlType::Q4K),
                Scheme::K(KQuant::Q2) => Some(GgmlType::Q2K),
                _ => None,
            };
            let kind = kind.ok_or_else(|| {
                format!(
                    "{} of {} columns is no whole number of GGML's blocks; quantize with --group-size 32, or keep it with --skip",
                    q.scheme, q.columns
                )
            })?;
            let bytes = q.rows as u64 * kind.row_bytes(q.columns) as u64;
            (Source::Packed(q, kind), kind.id(), bytes)
        }
    };
    Ok(Planned {
        parts: vec![(record, source)],
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
        let of_kind = |source: &&Source<'_>| matches!(source, Source::Packed(_, k) if *k == kind);
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
