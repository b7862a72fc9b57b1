//! The models of a validation: what is in each folder, how its column is headed, and whether they can be compared.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use qtool_formats::artifact::manifest::Manifest;
use qtool_formats::artifact::{Artifact, Stored};
use qtool_formats::checkpoint::Checkpoint;
use qtool_formats::scheme::Scheme;
use qtool_formats::{FormatError, TensorView};
use serde_json::Value;

use crate::plan::read_config;
use crate::report::{ModelEntry, TensorFigure};
use crate::scorer::Scorer;
use crate::{Error, Result, verify};

/// A model that can be asked.
pub struct Asked {
    /// What it is.
    pub entry: ModelEntry,
    /// Whom to ask.
    pub scorer: Box<dyn Scorer>,
    /// Rows of its embedding, where its folder says.
    pub vocabulary: Option<u64>,
}

/// What is in a folder. The label is not final: see [`label`].
///
/// Fails when it holds no model, or is an artifact that does not verify and `verified` is wanted.
pub fn describe(folder: &Path, verified: bool, show_progress: bool) -> Result<(ModelEntry, Option<u64>)> {
    let config = read_config(folder)?.ok_or_else(|| Error::Source {
        path: folder.to_owned(),
        reason: "holds no config.json; give a model folder or an artifact".to_owned(),
    })?;
    let vocabulary = config.get("vocab_size").and_then(Value::as_u64);
    let entry = if Artifact::is_artifact(folder) {
        let artifact = Artifact::open(folder)?;
        if verified {
            let found = verify::run(folder, None, show_progress)?;
            if let Some(first) = found.findings.first() {
                return Err(Error::Unsound {
                    path: folder.to_owned(),
                    first: format!("{}: {}", first.subject, first.problem),
                    findings: found.findings.len(),
                });
            }
        }
        of_artifact(folder, artifact.manifest(), artifact.files())?
    } else {
        of_checkpoint(folder, &Checkpoint::open(folder)?)?
    };
    Ok((entry, vocabulary))
}

fn of_artifact(folder: &Path, manifest: &Manifest, files: &Checkpoint) -> Result<ModelEntry> {
    let mut weights: HashMap<Scheme, u64> = HashMap::new();
    let mut tensors = Vec::new();
    for record in &manifest.tensors {
        if let Stored::Quantized(q) = &record.stored {
            *weights.entry(q.scheme).or_default() += (q.rows * q.columns) as u64;
            tensors.push(TensorFigure {
                name: record.name.clone(),
                scheme: q.scheme.to_string(),
                sqnr_db: q.figures.sqnr_db,
                bits_per_weight: q.figures.bits_per_weight,
            });
        }
    }
    // Of equal numbers of weights the name decides, so that a label does not depend on chance.
    let main = weights
        .into_iter()
        .max_by_key(|(scheme, n)| (*n, scheme.to_string()));
    let path = folder.join(qtool_formats::artifact::MANIFEST_FILE);
    let bytes = std::fs::read(&path).map_err(FormatError::io(&path, "read"))?;
    Ok(ModelEntry {
        label: main
            .as_ref()
            .map_or("KEPT".to_owned(), |(scheme, _)| heading(scheme)),
        path: folder.display().to_string(),
        kind: main.map_or("artifact, nothing quantized".to_owned(), |(scheme, _)| {
            format!("artifact {scheme}")
        }),
        bytes: Some(files.tensor_bytes()),
        bits_per_weight: Some(manifest.totals.bits_per_weight),
        digest: Some(format!("blake3:{}", blake3::hash(&bytes).to_hex())),
        tokenizer_digest: None,
        tensors,
    })
}

/// `INT4` of four-bit codes; `INT2`, `INT2.5` of the schemes `wint2`, `wint2.5`, whose codes stand for several weights.
fn heading(scheme: &Scheme) -> String {
    let name = scheme.to_string();
    match name.strip_prefix("wint") {
        Some(bits) => format!("INT{bits}"),
        None => format!("INT{}", scheme.bits()),
    }
}

/// Bytes of each tensor that a checkpoint's digest covers, besides names, types and shapes of all.
const SAMPLED_BYTES: usize = 4096;

fn of_checkpoint(folder: &Path, checkpoint: &Checkpoint) -> Result<ModelEntry> {
    let mut hasher = blake3::Hasher::new();
    let mut types: HashMap<String, u64> = HashMap::new();
    let (mut weights, mut bytes) = (0_u64, 0_u64);
    for view in checkpoint.tensors() {
        let view: TensorView<'_> = view?;
        let count: u64 = view.shape().iter().map(|d| *d as u64).product();
        weights += count;
        bytes += view.bytes().len() as u64;
        *types.entry(view.dtype().to_string()).or_default() += count;
        hasher.update(format!("{} {} {:?};", view.name(), view.dtype(), view.shape()).as_bytes());
        hasher.update(&view.bytes()[..view.bytes().len().min(SAMPLED_BYTES)]);
    }
    let path = folder.join("config.json");
    hasher.update(&std::fs::read(&path).map_err(FormatError::io(&path, "read"))?);
    let main = types.into_iter().max_by_key(|(name, n)| (*n, name.clone()));
    let main = main.map_or(String::new(), |(name, _)| name);
    Ok(ModelEntry {
        label: main.clone(),
        path: folder.display().to_string(),
        kind: format!("checkpoint {main}"),
        bytes: Some(bytes),
        bits_per_weight: (weights > 0).then(|| bytes as f64 * 8.0 / weights as f64),
        digest: Some(format!("blake3:{}", hasher.finalize().to_hex())),
        tokenizer_digest: None,
        tensors: Vec::new(),
    })
}

/// Heads the columns: `BASE` for the first, each candidate by its bits; where two would be equal, by the folder's
/// name, and where that is, too, by its number.
pub fn label(entries: &mut [ModelEntry]) {
    let Some((base, candidates)) = entries.split_first_mut() else {
        return;
    };
    "BASE".clone_into(&mut base.label);
    let twice = |all: &[ModelEntry], i: usize| {
        all.iter()
            .enumerate()
            .any(|(j, e)| j != i && e.label == all[i].label)
    };
    let equal: Vec<usize> = (0..candidates.len()).filter(|&i| twice(candidates, i)).collect();
    for i in equal {
        let name = PathBuf::from(&candidates[i].path)
            .file_name()
            .map(|n| n.to_string_lossy().into_owned());
        candidates[i].label = name.unwrap_or_else(|| candidates[i].path.clone());
    }
    let equal: Vec<usize> = (0..candidates.len())
        .filter(|&i| twice(candidates, i) || candidates[i].label == "BASE")
        .collect();
    for i in equal {
        let numbered = format!("{} ({})", candidates[i].label, i + 1);
        candidates[i].label = numbered;
    }
}

/// Fails when a candidate cannot stand beside the base: another vocabulary, or, where tokens are compared one by one,
/// another tokenizer.
pub fn comparable(models: &[Asked], by_token: bool) -> Result<()> {
    let Some((base, candidates)) = models.split_first() else {
        return Ok(());
    };
    for candidate in candidates {
        let fault = |reason: String| Error::Incomparable {
            base: base.entry.path.clone(),
            candidate: candidate.entry.path.clone(),
            reason,
        };
        if let (Some(expected), Some(got)) = (base.vocabulary, candidate.vocabulary)
            && expected != got
        {
            return Err(fault(format!(
                "its vocabulary has {got} entries, expected {expected}"
            )));
        }
        let digests = (&base.entry.tokenizer_digest, &candidate.entry.tokenizer_digest);
        if by_token
            && let (Some(expected), Some(got)) = digests
            && expected != got
        {
            return Err(fault(
                "it has another tokenizer (its files differ), and this task compares token by token; copy the base's \
                 tokenizer files, or leave the task out"
                    .to_owned(),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headings_of_schemes() {
        for (name, expected) in [
            ("w8-sym-row-bf16", "INT8"),
            ("w4-sym-g64-bf16", "INT4"),
            ("wint2", "INT2"),
        ] {
            assert_eq!(heading(&serde_json::from_value(name.into()).unwrap()), expected);
        }
    }

    fn entry(label: &str, path: &str) -> ModelEntry {
        ModelEntry {
            label: label.to_owned(),
            path: path.to_owned(),
            kind: String::new(),
            bytes: None,
            bits_per_weight: None,
            digest: None,
            tokenizer_digest: None,
            tensors: Vec::new(),
        }
    }

    #[test]
    fn columns_are_told_apart() {
        let mut entries = [
            entry("BF16", "m"),
            entry("INT8", "out/a"),
            entry("INT4", "out/rtn"),
            entry("INT4", "out/gptq"),
            entry("INT2", "x/same"),
            entry("INT2", "y/same"),
        ];
        label(&mut entries);
        let labels: Vec<&str> = entries.iter().map(|e| e.label.as_str()).collect();
        assert_eq!(labels, ["BASE", "INT8", "rtn", "gptq", "same (4)", "same (5)"]);
    }
}
