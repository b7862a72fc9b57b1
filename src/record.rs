//! What a quantization leaves behind besides weights: the manifest's records, the model's
//! `config.json` with its `quantization_config`, and the copied side files.

use qtool_formats::artifact::manifest::{QuantizedRecord, Totals};
use qtool_formats::artifact::{
    FORMAT, FORMAT_VERSION, FileRecord, MANIFEST_FILE, Manifest, PartRecord, SourceRecord, Stored,
    TensorRecord,
};
use qtool_formats::checkpoint::Checkpoint;
use qtool_formats::replace::Staging;
use qtool_formats::shard_writer::{WrittenShards, digest_text};
use serde_json::{Value, json};

use crate::plan::{Action, QuantizePlan, read_config};
use crate::quantize::{NonFinite, Options, TensorResult};
use crate::{Error, Result, TOOL};

/// The manifest of what was written.
pub(crate) fn manifest(
    checkpoint: &Checkpoint,
    plan: &QuantizePlan,
    options: &Options,
    written: &WrittenShards,
    first_part: &[usize],
    results: Vec<TensorResult>,
    staging: &Staging,
) -> Result<Manifest> {
    let mut tensors = Vec::with_capacity(plan.tensors.len());
    for ((tensor, result), &first) in plan.tensors.iter().zip(results).zip(first_part) {
        let kept_as = &written.tensors[first];
        let (stored, source_digest) = match &tensor.action {
            Action::Keep { reason } => (
                Stored::Kept {
                    reason: reason.clone(),
                    file: kept_as.file.clone(),
                },
                kept_as.digest.clone(),
            ),
            Action::Quantize(q) => {
                let bits_per_weight = q.scheme.bits_per_weight(q.n, q.k)?;
                let figures = result.figures.figures(&q.scheme, bits_per_weight);
                let parts = q.parts.iter().zip(&written.tensors[first..]);
                let record = QuantizedRecord {
                    scheme: q.scheme,
                    method: q.quantizer.describe(),
                    rows: q.n,
                    columns: q.k,
                    orientation: q.orientation,
                    parts: parts
                        .map(|(p, w)| PartRecord::new(&tensor.name, p, w.file.clone(), w.digest.clone()))
                        .collect(),
                    faults: figures.faults(q.scheme.bits()),
                    figures,
                };
                (Stored::Quantized(record), digest_text(&result.source))
            }
        };
        tensors.push(TensorRecord {
            name: tensor.name.clone(),
            shape: tensor.shape.clone(),
            dtype: tensor.dtype,
            source_digest,
            stored,
        });
    }
    let record = |(name, bytes): (String, u64)| FileRecord {
        name,
        bytes,
        digest: None,
    };
    let mut files: Vec<FileRecord> = written.files.iter().cloned().map(record).collect();
    files.extend(side_files(checkpoint, options, staging)?);
    let mut manifest = Manifest {
        format: FORMAT.to_owned(),
        version: FORMAT_VERSION,
        tool: TOOL.to_owned(),
        source: SourceRecord {
            name: source_name(checkpoint),
            naming: checkpoint.naming(),
            tensor_bytes: checkpoint.tensor_bytes(),
            files: checkpoint.files().map(record).collect(),
        },
        options: effective_options(options),
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
fn side_files(checkpoint: &Checkpoint, options: &Options, staging: &Staging) -> Result<Vec<FileRecord>> {
    const CONFIG: &str = "config.json";
    let mut records = Vec::new();
    for path in checkpoint.side_files()? {
        let name = path
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default();
        if name != CONFIG {
            records.push(file_record(&staging.copy_file(&path)?, name)?);
        }
    }
    let config = if checkpoint.root().is_dir() {
        read_config(checkpoint.folder())?
    } else {
        None
    };
    let mut config = config.unwrap_or_else(|| json!({}));
    config["quantization_config"] = json!({
        "quant_method": FORMAT,
        "format_version": FORMAT_VERSION,
        "bits": options.recipe.default_options().bits,
        "scheme": options.recipe.default_options().scheme().map_err(Error::Option)?.to_string(),
        "manifest": MANIFEST_FILE,
    });
    staging.write_file(CONFIG, format!("{config:#}\n").as_bytes())?;
    records.push(file_record(&staging.folder().join(CONFIG), CONFIG.to_owned())?);
    records.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(records)
}

/// Size and digest of a file, read anew.
pub fn file_record(path: &std::path::Path, name: String) -> Result<FileRecord> {
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
