//! The exporter: an artifact's codes laid out anew, without rounding again. It takes artifacts whose
//! linear weights are INT8 per channel (`w8-sym-row-bf16`) or narrow INT4 per channel
//! (`w4-narrow-row-bf16`) and whose experts may be 2-bit (`wint2`), as the loader asks for them; for any other it says which command gives a
//! folder that FastDeploy loads.

use serde_json::Value;

use super::{Ernie, Kind, Placed, Placement, Source, Store, Wanted, kept_dtype, place, refusal};
use crate::artifact::{Artifact, Stored};
use crate::checkpoint::Orientation;
use crate::checkpoint::shards::read_json;
use crate::dtype::FloatDtype;
use crate::export::{Exporter, OnBytes, card, copy_side_files, interrupted, write_provenance};
use crate::packing::{LSB_ROWS, Packing};
use crate::piece::Piece;
use crate::replace::Staging;
use crate::scheme::{Family, Scheme};
use crate::shard_writer::{ShardWriter, StoredTensor};
use crate::weight::QuantizedWeight;
use crate::{FormatError, Result};

/// The exporter's only value.
pub const FASTDEPLOY: FastDeploy = FastDeploy;

/// See the module's text.
#[derive(Debug, Clone, Copy)]
pub struct FastDeploy;

/// Schemes FastDeploy has a form for.
const INT8: &str = "w8-sym-row-bf16";
const INT4: &str = "w4-narrow-row-bf16";
const WINT2: &str = crate::scheme::ccq::NAME;

/// What will be written: every tensor with its scheme, or `None` when it is not quantized.
struct Plan {
    model: Ernie,
    wanted: Wanted,
    placement: Placement,
    schemes: Vec<Option<Scheme>>,
}

impl Exporter for FastDeploy {
    fn name(&self) -> &'static str {
        "fastdeploy"
    }

    fn summary(&self) -> &'static str {
        "the folder PaddlePaddle FastDeploy loads (ERNIE-4.5 with INT8 or narrow INT4 per channel)"
    }

    fn refuses(&self, scheme: &Scheme) -> Option<String> {
        let name = scheme.to_string();
        (![INT8, INT4, WINT2].contains(&name.as_str())).then(|| {
            format!("FastDeploy loads {INT8} and {INT4}, not {name}; make the folder from the model: qtool quantize MODEL --format fastdeploy --bits {} -o DIR", if scheme.bits() == 8 { 8 } else { 4 })
        })
    }

    fn planned_bytes(&self, artifact: &Artifact) -> u64 {
        let bytes = |plan: &Plan| stored_tensors(plan).map(|all| all.iter().map(|t| t.bytes).sum());
        plan(artifact).and_then(|plan| bytes(&plan)).unwrap_or(0)
    }

    fn check(&self, artifact: &Artifact) -> Result<()> {
        stored_tensors(&plan(artifact)?).map(drop)
    }

    fn export(
        &self,
        artifact: &Artifact,
        staging: &Staging,
        max_shard_bytes: u64,
        on_bytes: OnBytes<'_>,
    ) -> Result<()> {
        let plan = plan(artifact)?;
        let mut writer = ShardWriter::create(staging.folder(), stored_tensors(&plan)?, max_shard_bytes)?;
        let (mut index, mut done) = (0, 0u64);
        for (placed, scheme) in plan.placement.tensors.iter().zip(&plan.schemes) {
            let parts = match scheme {
                Some(scheme) => {
                    let forms = scheme.parts_in(Family::FastDeploy, placed.rows, placed.columns)?;
                    let rows = stacked(artifact, placed)?
                        .encode_in(Family::FastDeploy, &|b, k, c, o| LSB_ROWS.pack(b, k, c, o))?;
                    forms
                        .iter()
                        .zip(rows)
                        .map(|(form, rows)| form.laid_out(rows))
                        .collect()
                }
                None => vec![converted(artifact, placed)?],
            };
            for bytes in parts {
                writer.append(index, &bytes)?;
                index += 1;
                done += bytes.len() as u64;
            }
            if !on_bytes(done) {
                return Err(interrupted(staging));
            }
        }
        writer.finish()?;
        let source = read_json(&artifact.folder().join("config.json"))?;
        let config = plan
            .wanted
            .config(&plan.model, source, plan.placement.has_router_bias());
        staging.write_file("config.json", format!("{config:#}\n").as_bytes())?;
        copy_side_files(staging, artifact.files(), &[])?;
        card::write(staging, artifact, self.name(), self.planned_bytes(artifact))?;
        write_provenance(staging, artifact, self.name())
    }
}

fn plan(artifact: &Artifact) -> Result<Plan> {
    let path = artifact.folder();
    let config: Value = read_json(&path.join("config.json"))?;
    let model = Ernie::from_config(&path.join("config.json"), &config)?;
    let find = |name: &str| {
        let record = artifact.record(name).ok()?;
        Some((record.dtype, record.shape.clone()))
    };
    let source = Source {
        path,
        naming: artifact.manifest().source.naming,
        names: artifact
            .manifest()
            .tensors
            .iter()
            .map(|t| t.name.as_str())
            .collect(),
        find: &find,
    };
    let placement = place(&model, &source, 0, 1)?;
    let mut schemes = Vec::new();
    for placed in &placement.tensors {
        schemes.push(scheme_of(artifact, placed)?);
    }
    let linear = |kind: fn(Kind) -> bool| {
        let mut all = placement.tensors.iter().zip(&schemes);
        all.find(|(placed, _)| kind(placed.kind))
            .and_then(|(_, scheme)| *scheme)
    };
    let first = linear(|kind| matches!(kind, Kind::Linear));
    let bits = match model.moe {
        Some(_) => 4,
        None => first.map_or(8, |scheme| scheme.bits()),
    };
    let experts = placement.tensors.iter().zip(&schemes);
    let layers = |scheme: &str| {
        let of_layer = experts.clone().filter_map(|(placed, got)| match placed.kind {
            Kind::Expert { layer } => (got.as_ref()?.to_string() == scheme).then_some(layer),
            _ => None,
        });
        of_layer.max()
    };
    let wanted = match layers(WINT2) {
        Some(_) => Wanted {
            bits: 2,
            w4_until: layers(INT4),
        },
        None => Wanted { bits, w4_until: None },
    };
    let bits = wanted.bits;
    wanted.check(&model, path)?;
    for (placed, scheme) in placement.tensors.iter().zip(&schemes) {
        let expected = match wanted.store(&model, placed.kind) {
            Some(Store::Int8) => Some(INT8),
            Some(Store::Int4) => Some(INT4),
            Some(Store::Wint2) => Some(WINT2),
            None => None,
        };
        let got = scheme.map(|scheme| scheme.to_string());
        if got.as_deref() != expected {
            let text = |name: Option<&str>| name.unwrap_or("unquantized").to_owned();
            return Err(refusal(
                path,
                format!(
                    "{} is {}, FastDeploy asks for {} here; make the folder from the model: qtool quantize MODEL --format fastdeploy --bits {bits} -o DIR",
                    placed.name,
                    text(got.as_deref()),
                    text(expected),
                ),
            ));
        }
    }
    Ok(Plan {
        model,
        wanted,
        placement,
        schemes,
    })
}

/// The one scheme of all pieces, `None` when all are kept.
fn scheme_of(artifact: &Artifact, placed: &Placed) -> Result<Option<Scheme>> {
    let mut schemes = Vec::new();
    for piece in &placed.pieces {
        schemes.push(match &artifact.record(&piece.tensor)?.stored {
            Stored::Quantized(record) => Some(record.scheme),
            Stored::Kept { .. } => None,
        });
    }
    schemes.dedup();
    match schemes.as_slice() {
        [scheme] => Ok(*scheme),
        _ => Err(refusal(
            artifact.folder(),
            format!(
                "{} is made of weights with different schemes; FastDeploy loads them as one",
                placed.name
            ),
        )),
    }
}

fn stored_tensors(plan: &Plan) -> Result<Vec<StoredTensor>> {
    let mut all = Vec::new();
    for (group, (placed, scheme)) in plan.placement.tensors.iter().zip(&plan.schemes).enumerate() {
        match scheme {
            Some(scheme) => {
                let parts = scheme.parts_in(Family::FastDeploy, placed.rows, placed.columns)?;
                all.extend(parts.iter().map(|part| StoredTensor {
                    name: Family::FastDeploy.tensor_name(&placed.name, part.role),
                    dtype: part.dtype,
                    shape: part.shape.clone(),
                    bytes: part.bytes() as u64,
                    group,
                }));
            }
            None => {
                let dtype = kept_dtype(placed.kind);
                all.push(StoredTensor {
                    name: placed.name.clone(),
                    dtype: dtype.dtype(),
                    shape: placed.shape.clone(),
                    bytes: (placed.rows * placed.columns * dtype.bytes()) as u64,
                    group,
                });
            }
        }
    }
    Ok(all)
}

/// The rows of all pieces as one weight.
fn stacked(artifact: &Artifact, placed: &Placed) -> Result<QuantizedWeight> {
    let mut weights = Vec::new();
    for piece in &placed.pieces {
        if let Stored::Quantized(record) = &artifact.record(&piece.tensor)?.stored {
            weights.push(artifact.weight_rows(record, piece.rows.start, piece.rows.len())?);
        }
    }
    QuantizedWeight::stack(&weights).ok_or_else(|| {
        let reason = format!("{} is made of weights that do not stack", placed.name);
        refusal(artifact.folder(), reason)
    })
}

/// A kept tensor in the element type and orientation FastDeploy asks for.
fn converted(artifact: &Artifact, placed: &Placed) -> Result<Vec<u8>> {
    let mut bytes = Vec::with_capacity(placed.rows * placed.columns * 2);
    let dtype = kept_dtype(placed.kind);
    for piece in &placed.pieces {
        let view = artifact.stored(&piece.tensor)?;
        if piece.dtype == dtype && piece.orientation == Orientation::OutIn {
            bytes.extend_from_slice(view.bytes());
        } else {
            push_converted(piece, view.bytes(), dtype, &mut bytes)?;
        }
    }
    Ok(bytes)
}

fn push_converted(piece: &Piece, bytes: &[u8], dtype: FloatDtype, out: &mut Vec<u8>) -> Result<()> {
    let width = piece.dtype.bytes();
    let stride = match piece.orientation {
        Orientation::OutIn => piece.dims.1,
        Orientation::InOut => piece.dims.0,
    };
    for row in piece.rows.clone() {
        for column in 0..piece.columns.len() {
            let [major, minor] = piece.source_index(row - piece.rows.start, column);
            let at = (major * stride + minor) * width;
            let element = bytes.get(at..at + width).ok_or_else(|| FormatError::Weight {
                what: "kept tensor",
                expected: format!("{} x {} elements of {}", piece.dims.0, piece.dims.1, piece.dtype),
                got: format!("{} bytes", bytes.len()),
            })?;
            piece
                .dtype
                .widen(element)
                .iter()
                .for_each(|&v| dtype.push(v, out));
        }
    }
    Ok(())
}
