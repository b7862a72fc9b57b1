//! What a quantization leaves behind besides weights: the manifest's records, the model's
//! `config.json` with its `quantization_config`, and the copied side files.

use std::path::Path;

use qtool_formats::artifact::manifest::{QuantizedRecord, Totals};
use qtool_formats::artifact::{
    FORMAT, FORMAT_VERSION, FileRecord, MANIFEST_FILE, Manifest, PartRecord, PieceRecord, SourceRecord,
    Stored, TensorRecord,
};
use qtool_formats::checkpoint::shards::INDEX_FILE;
use qtool_formats::checkpoint::{Checkpoint, Orientation};
use qtool_formats::export::fastdeploy::kv_cache::SCALE_FILE;
use qtool_formats::piece::Piece;
use qtool_formats::replace::{copy_file, write_file};
use qtool_formats::scheme::Part;
use qtool_formats::shard_writer::{Written, WrittenShards, digest_text};
use serde_json::{Value, json};

use crate::plan::{Action, Conversion, Quantization, QuantizePlan, TensorPlan, read_config};
use crate::quantize::{NonFinite, Options, Results};
use crate::{Error, Result, TOOL};

/// The manifest of what was written.
pub(crate) fn manifest(
    checkpoint: &Checkpoint,
    plan: &QuantizePlan,
    options: &Options,
    written: &WrittenShards,
    first_part: &[usize],
    results: &Results,
    folder: &Path,
) -> Result<Manifest> {
    let mut tensors = Vec::with_capacity(plan.tensors.len());
    let results_of = results.figures.iter().zip(&results.calibrated);
    for ((tensor, (figures, calibrated)), &first) in plan.tensors.iter().zip(results_of).zip(first_part) {
        let kept_as = &written.tensors[first];
        let sources = sources(checkpoint, tensor, results, kept_as)?;
        let assembled = !sources.is_empty();
        let (stored, source_digest) = match &tensor.action {
            Action::Keep { reason, .. } | Action::Convert(Conversion { reason, .. }) => (
                Stored::Kept {
                    reason: reason.clone(),
                    file: kept_as.file.clone(),
                    digest: assembled.then(|| kept_as.digest.clone()),
                },
                kept_as.digest.clone(),
            ),
            Action::Measure(measured) => {
                let stored = Stored::Kept {
                    reason: measured.reason.clone(),
                    file: kept_as.file.clone(),
                    digest: Some(kept_as.digest.clone()),
                };
                tensors.push(TensorRecord {
                    name: tensor.name.clone(),
                    shape: tensor.shape.clone(),
                    dtype: tensor.dtype,
                    source_digest: None,
                    sources,
                    stored,
                });
                continue;
            }
            Action::Quantize(q) => {
                let bits_per_weight = bits_per_weight(q);
                let figures = figures.figures(&q.scheme, bits_per_weight);
                let parts = q.parts.iter().zip(&written.tensors[first..]);
                let record = QuantizedRecord {
                    scheme: q.scheme,
                    method: calibrated
                        .method
                        .clone()
                        .unwrap_or_else(|| q.quantizer.describe()),
                    proxy_error: calibrated.proxy_error(),
                    rows: q.n,
                    columns: q.k,
                    orientation: q.orientation,
                    parts: parts
                        .map(|(p, w)| {
                            PartRecord::new(plan.family, &tensor.name, p, w.file.clone(), w.digest.clone())
                        })
                        .collect(),
                    faults: figures.faults(q.scheme.bits()),
                    figures,
                };
                let digest = results.sources.get(&tensor.name).map(digest_text);
                (Stored::Quantized(record), digest.unwrap_or_default())
            }
        };
        tensors.push(TensorRecord {
            name: tensor.name.clone(),
            shape: tensor.shape.clone(),
            dtype: tensor.dtype,
            source_digest: (!assembled).then_some(source_digest),
            sources,
            stored,
        });
    }
    let record = |(name, bytes): (String, u64)| FileRecord {
        name,
        bytes,
        digest: None,
    };
    let mut files: Vec<FileRecord> = written.files.iter().cloned().map(record).collect();
    // Weight files are covered tensor by tensor.
    for index in files.iter_mut().filter(|file| file.name == INDEX_FILE) {
        *index = file_record(&folder.join(INDEX_FILE), INDEX_FILE.to_owned())?;
    }
    files.extend(side_files(checkpoint, plan, options, folder)?);
    let mut manifest = Manifest {
        format: FORMAT.to_owned(),
        version: FORMAT_VERSION,
        tool: TOOL.to_owned(),
        source: SourceRecord {
            name: source_name(checkpoint),
            naming: checkpoint.naming(),
            tensor_bytes: checkpoint.tensor_bytes(),
            files: checkpoint.files().map(record).collect(),
            dropped: plan.dropped.clone(),
        },
        options: {
            let mut all = match &plan.foreign {
                Some(foreign) => foreign.options.clone(),
                None => effective_options(options),
            };
            if let Some(calibration) = &options.calibration {
                all["calibration"] = calibration.clone();
            }
            all
        },
        transform: plan.transform.as_ref().map(|t| t.record().clone()),
        family: plan.family,
        layouts: Default::default(),
        schemes: Default::default(),
        totals: Totals::default(),
        tensors,
        files,
    };
    let sizes: std::collections::HashMap<&str, u64> = plan
        .tensors
        .iter()
        .map(|t| (t.name.as_str(), t.stored_bytes()))
        .collect();
    manifest.describe(|record| sizes.get(record.name.as_str()).copied().unwrap_or(0));
    Ok(manifest)
}

/// Stored bits per weight, everything counted.
fn bits_per_weight(q: &Quantization) -> f64 {
    let bytes: usize = q.parts.iter().map(Part::bytes).sum();
    bytes as f64 * 8.0 / (q.n as f64 * q.k as f64).max(1.0)
}

/// What a tensor was assembled from; empty when it is a tensor of the source.
fn sources(
    checkpoint: &Checkpoint,
    tensor: &TensorPlan,
    results: &Results,
    stored: &Written,
) -> Result<Vec<PieceRecord>> {
    if let Action::Keep { source, .. } = &tensor.action {
        if *source == tensor.name {
            return Ok(Vec::new());
        }
        // Copied under another name: the digest it was written with is the source's.
        let (rows, columns) = checkpoint.tensor(source)?.matrix_dims();
        return Ok(vec![PieceRecord {
            tensor: source.clone(),
            shape: tensor.shape.clone(),
            dtype: tensor.dtype,
            digest: stored.digest.clone(),
            orientation: Orientation::OutIn,
            rows: [0, rows],
            columns: [0, columns],
        }]);
    }
    let record = |piece: &Piece| {
        let view = checkpoint.tensor(&piece.tensor)?;
        let digest = results.sources.get(&piece.tensor).map(digest_text);
        Ok(PieceRecord {
            tensor: piece.tensor.clone(),
            shape: view.shape().to_vec(),
            dtype: view.dtype(),
            digest: digest.unwrap_or_default(),
            orientation: piece.orientation,
            rows: [piece.rows.start, piece.rows.end],
            columns: [piece.columns.start, piece.columns.end],
        })
    };
    tensor.pieces().iter().map(record).collect()
}

/// Last component of the source's path, also when that was given as `.`.
fn source_name(checkpoint: &Checkpoint) -> String {
    let path = checkpoint
        .root()
        .canonicalize()
        .unwrap_or_else(|_| checkpoint.root().to_owned());
    path.file_name()
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// Every option with an effect on the bytes. Threads have none.
fn effective_options(options: &Options) -> Value {
    json!({
        "default": options.recipe.default_options().to_string(),
        "rules": options.recipe.describe(),
        "non_finite": match options.non_finite { NonFinite::Refuse => "refuse", NonFinite::Keep => "keep" },
        "max_shard_bytes": options.max_shard_bytes,
    })
}

/// Copies the side files and writes `config.json` with its `quantization_config`.
fn side_files(
    checkpoint: &Checkpoint,
    plan: &QuantizePlan,
    options: &Options,
    folder: &Path,
) -> Result<Vec<FileRecord>> {
    const CONFIG: &str = "config.json";
    let mut records = Vec::new();
    for path in checkpoint.side_files()? {
        let name = path
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default();
        // Scales of a former artifact describe other weights.
        if name != CONFIG && name != crate::transform::scales::FILE {
            records.push(file_record(&copy_file(folder, &path)?, name)?);
        }
    }
    let measured = plan.tensors.iter().filter_map(|t| match &t.action {
        Action::Measure(m) => Some((t.name.as_str(), m.values.as_slice())),
        _ => None,
    });
    let kv_cache = plan.foreign.as_ref().and_then(|foreign| foreign.kv_cache);
    if let Some(scales) = kv_cache.and_then(|kv| kv.scale_file(measured)) {
        write_file(folder, SCALE_FILE, format!("{scales:#}\n").as_bytes())?;
        records.retain(|r: &FileRecord| r.name != SCALE_FILE);
        records.push(file_record(&folder.join(SCALE_FILE), SCALE_FILE.to_owned())?);
    }
    if let Some(scales) = plan.transform.as_ref().and_then(|t| t.scales()) {
        let name = crate::transform::scales::FILE;
        write_file(folder, name, &scales.to_bytes()?)?;
        records.push(file_record(&folder.join(name), name.to_owned())?);
    }
    let config = match &plan.foreign {
        Some(foreign) => foreign.config.clone(),
        None => own_config(checkpoint, plan, options)?,
    };
    write_file(folder, CONFIG, format!("{config:#}\n").as_bytes())?;
    records.push(file_record(&folder.join(CONFIG), CONFIG.to_owned())?);
    records.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(records)
}

/// The source's `config.json` with a `quantization_config` that names qtool.
fn own_config(checkpoint: &Checkpoint, plan: &QuantizePlan, options: &Options) -> Result<Value> {
    let config = if checkpoint.root().is_dir() {
        read_config(checkpoint.folder())?
    } else {
        None
    };
    let mut config = config.unwrap_or_else(|| json!({}));
    if let Some(transform) = &plan.transform {
        transform.adjust_config(&mut config);
    }
    config["quantization_config"] = json!({
        "quant_method": FORMAT,
        "format_version": FORMAT_VERSION,
        "bits": options.recipe.default_options().bits,
        "scheme": options.recipe.default_options().scheme().map_err(Error::Option)?.to_string(),
        "manifest": MANIFEST_FILE,
    });
    Ok(config)
}

/// Size and digest of a file, read anew.
pub fn file_record(path: &Path, name: String) -> Result<FileRecord> {
    let fault = |e| Error::Format(qtool_formats::FormatError::io(path, "read")(e));
    let mut hasher = blake3::Hasher::new();
    hasher
        .update_reader(std::fs::File::open(path).map_err(fault)?)
        .map_err(fault)?;
    Ok(FileRecord {
        name,
        bytes: hasher.count(),
        digest: Some(digest_text(&hasher)),
    })
}
