//! The models of a validation: what is in each folder, how its column is headed, and whether they can be compared.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use qtool_formats::artifact::manifest::Manifest;
use qtool_formats::artifact::{Artifact, Stored};
use qtool_formats::checkpoint::Checkpoint;
use qtool_formats::import::{self, Foreign};
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
    if !Artifact::is_artifact(folder)
        && let Some(model) = import::open(folder)?
    {
        let vocabulary = model.config().get("vocab_size").and_then(Value::as_u64);
        let entry = of_foreign(folder, &model)?;
        if verified {
            sound(folder, show_progress)?;
        }
        return Ok((entry, vocabulary));
    }
    let config = read_config(folder)?.ok_or_else(|| Error::Source {
        path: folder.to_owned(),
        reason: "holds no config.json; give a model folder or an artifact".to_owned(),
    })?;
    let vocabulary = config.get("vocab_size").and_then(Value::as_u64);
    let entry = if Artifact::is_artifact(folder) {
        let artifact = Artifact::open(folder)?;
        if verified {
            sound(folder, show_progress)?;
        }
        of_artifact(folder, artifact.manifest(), artifact.files())?
    } else {
        of_checkpoint(folder, &Checkpoint::open(folder)?)?
    };
    Ok((entry, vocabulary))
}

/// Fails unless what is in the folder verifies.
fn sound(folder: &Path, show_progress: bool) -> Result<()> {
    let found = verify::run(folder, None, show_progress)?;
    match found.findings.first() {
        None => Ok(()),
        Some(first) => Err(Error::Unsound {
            path: folder.to_owned(),
            first: format!("{}: {}", first.subject, first.problem),
            findings: found.findings.len(),
        }),
    }
}

/// A model that another ecosystem quantized, headed by what most of its weights are.
fn of_foreign(folder: &Path, model: &Foreign) -> Result<ModelEntry> {
    let mut weights: HashMap<&str, u64> = HashMap::new();
    let (mut tensors, mut bytes, mut elements) = (Vec::new(), 0u64, 0u64);
    for tensor in model.tensors() {
        let count: u64 = tensor.shape.iter().map(|d| *d as u64).product();
        let stored = model.stored_bytes(tensor)?;
        (bytes, elements) = (bytes + stored, elements + count);
        *weights.entry(tensor.stored_as.as_str()).or_default() += count;
        if tensor.coded.is_some() {
            tensors.push(TensorFigure {
                name: tensor.name.clone(),
                scheme: tensor.stored_as.clone(),
                sqnr_db: None,
                bits_per_weight: stored as f64 * 8.0 / count.max(1) as f64,
            });
        }
    }
    let main = weights.into_iter().max_by_key(|(name, n)| (*n, name.to_owned()));
    let main = main.map_or("", |(name, _)| name);
    let mut hasher = sampled(model.files())?;
    hasher.update(model.config().to_string().as_bytes());
    Ok(ModelEntry {
        label: foreign_heading(main),
        path: folder.display().to_string(),
        kind: format!("{} {main}", model.format()),
        bytes: Some(bytes),
        bits_per_weight: (elements > 0).then(|| bytes as f64 * 8.0 / elements as f64),
        digest: Some(format!("blake3:{}", hasher.finalize().to_hex())),
        tokenizer_digest: None,
        tensors,
    })
}

/// `INT4` of `w4-zp-g128-f16`, `NF4` of `nf4-g64-double`, and the name itself of a type of GGUF.
fn foreign_heading(stored_as: &str) -> String {
    match stored_as.split('-').next().unwrap_or_default() {
        first if first.starts_with("nf") || first.starts_with("fp") => first.to_uppercase(),
        first => match first.strip_prefix('w') {
            Some(bits) => format!("INT{bits}"),
            None => first.to_owned(),
        },
    }
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

/// Names, types and shapes of all stored tensors, and the beginning of each.
fn sampled(files: &Checkpoint) -> Result<blake3::Hasher> {
    let mut hasher = blake3::Hasher::new();
    for view in files.tensors() {
        let view: TensorView<'_> = view?;
        hasher.update(format!("{} {} {:?};", view.name(), view.dtype(), view.shape()).as_bytes());
        hasher.update(&view.bytes()[..view.bytes().len().min(SAMPLED_BYTES)]);
    }
    Ok(hasher)
}

fn of_checkpoint(folder: &Path, checkpoint: &Checkpoint) -> Result<ModelEntry> {
    let mut hasher = sampled(checkpoint)?;
    let mut types: HashMap<String, u64> = HashMap::new();
    let (mut weights, mut bytes) = (0_u64, 0_u64);
    for view in checkpoint.tensors() {
        let view: TensorView<'_> = view?;
        let count: u64 = view.shape().iter().map(|d| *d as u64).product();
        weights += count;
        bytes += view.bytes().len() as u64;
        *types.entry(view.dtype().to_string()).or_default() += count;
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

/// Two tokenizers whose files differ count as one when they cut this alike: others save a model's tokenizer anew, and
/// GGUF files have it in a form of their own.
const PROBE: &str = "The quick brown fox jumps over 13 lazy dogs; it's 3.14159 or 1,234,567?\n\n\tfor i in range(10):\n    \
    print(f\"{i:>4} != {x[i]}\")  # we'll see, they've said so\r\n  Straße, naïve café, Ελληνικά, Русский текст, עברית, \
    العربية, हिन्दी, ไทย, 한국어, 日本語のテキスト、中文分词：二〇二四年，“引号”……（完） \u{1f680}\u{1f44d}\u{1f3fd} ½ ² № ﬁ e\u{301} \u{a0}\u{3000}x    y";

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
            && base.scorer.tokenize(PROBE)? != candidate.scorer.tokenize(PROBE)?
        {
            return Err(fault(
                "it has another tokenizer (its files differ, and it cuts a text otherwise), and this task compares token \
                 by token; copy the base's tokenizer files, or leave the task out"
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

    #[test]
    fn headings_of_other_formats() {
        for (name, expected) in [
            ("w4-zp-g128-f16", "INT4"),
            ("nf4-g64-double", "NF4"),
            ("Q4_K", "Q4_K"),
            ("BF16", "BF16"),
        ] {
            assert_eq!(foreign_heading(name), expected);
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
