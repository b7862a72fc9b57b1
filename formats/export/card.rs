//! The model card of an export: `README.md` with the front matter that model hubs read. It says what the
//! weights came from, how they are stored, how good they are by the artifact's own figures, and the commands
//! to repeat it. The base model's card, where the artifact holds one, lies beside it under another name.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::Value;

use super::foreign::Given;
use crate::Result;
use crate::artifact::manifest::QuantizedRecord;
use crate::artifact::{Artifact, Stored};
use crate::replace::Staging;

/// File name of a card.
pub(super) const CARD: &str = "README.md";
/// Under which name the base model's card is copied.
pub(super) const BASE_CARD: &str = "README-base.md";

/// Writes the card of an export to `format` whose tensors take `tensor_bytes`.
pub(super) fn write(staging: &Staging, artifact: &Artifact, format: &str, tensor_bytes: u64) -> Result<()> {
    staging.write_file(CARD, text(artifact, format, tensor_bytes).as_bytes())
}

/// The card of a model that others quantized, exported to `format`.
pub(super) fn write_foreign(
    staging: &Staging,
    given: &Given<'_>,
    format: &str,
    tensor_bytes: u64,
) -> Result<()> {
    let (name, from, kinds, elements) = given.about();
    let stored: Vec<String> = kinds
        .iter()
        .map(|(kind, count)| format!("{} ({count} tensors)", plain_text(kind)))
        .collect();
    let per_weight = tensor_bytes as f64 * 8.0 / elements.max(1) as f64;
    let dense = ["bf16", "bf16-gemm", "f32"].contains(&format);
    let (title, how) = if dense {
        (
            "decoded",
            "Weights are what the codes of that model mean; none was quantized again.",
        )
    } else {
        (
            "laid out anew",
            "Codes and scales are that model's, in another layout; none was rounded again. What this format keeps as floats was decoded.",
        )
    };
    let plain = plain(&name);
    let text = format!(
        "{}# {plain}, {title} as {format}\n\n| | |\n|---|---|\n| made from | {plain}, a model in the format {from} |\n\
         | it holds | {} |\n| size | {tensor_bytes} bytes of tensors, {per_weight:.2} bits per weight |\n\n\
         {how} How it was quantized is not known here, and how well the model does its work is not measured.\n\n\
         Made by {}:\n\n```\nqtool export MODEL --to {format} -o DIR\n```\n",
        front_matter(&name, format),
        stored.join(", "),
        concat!("qtool ", env!("CARGO_PKG_VERSION")),
    );
    staging.write_file(CARD, text.as_bytes())
}

/// What model hubs read.
fn front_matter(name: &str, format: &str) -> String {
    // JSON strings are YAML strings.
    let name = Value::from(name);
    let library = if format == "gguf" { "gguf" } else { "transformers" };
    format!(
        "---\nbase_model: {name}\nbase_model_relation: quantized\nlibrary_name: {library}\ntags:\n- qtool\n- {format}\n---\n\n"
    )
}

fn text(artifact: &Artifact, format: &str, tensor_bytes: u64) -> String {
    let manifest = artifact.manifest();
    let quantized: Vec<(&str, &QuantizedRecord)> = manifest
        .tensors
        .iter()
        .filter_map(|t| match &t.stored {
            Stored::Quantized(q) => Some((t.name.as_str(), q)),
            Stored::Kept { .. } => None,
        })
        .collect();
    let plain = plain(&manifest.source.name);
    let mut out = format!(
        "{}# {plain}, quantized, as {format}\n\n| | |\n|---|---|\n| base model | {plain} |\n",
        front_matter(&manifest.source.name, format)
    );
    let mut line = |what: &str, says: String| {
        let _ = writeln!(out, "| {what} | {says} |");
    };
    line(
        "codes",
        counted(quantized.iter().map(|(_, q)| q.scheme.to_string())),
    );
    line(
        "chosen by",
        counted(quantized.iter().map(|(_, q)| plain_text(&q.method))),
    );
    let weights = manifest.totals.quantized_weights + manifest.totals.kept_weights;
    let per_weight = tensor_bytes as f64 * 8.0 / weights.max(1) as f64;
    line(
        "size",
        format!(
            "{tensor_bytes} bytes of tensors, {per_weight:.2} bits per weight ({:.2} in the artifact, {:.2} in its quantized tensors)",
            manifest.totals.bits_per_weight, manifest.totals.quantized_bits_per_weight
        ),
    );
    line(
        "calibration",
        match manifest.options.get("calibration") {
            Some(about) => plain_text(&about.to_string()),
            None => "none, codes follow from the weights alone".to_owned(),
        },
    );
    let worst = quantized
        .iter()
        .filter_map(|(name, q)| Some((q.figures.sqnr_db?, name)))
        .min_by(|a, b| a.0.total_cmp(&b.0));
    if let Some((least, name)) = worst {
        let all: Vec<f64> = quantized.iter().filter_map(|(_, q)| q.figures.sqnr_db).collect();
        let mean = all.iter().sum::<f64>() / all.len() as f64;
        line(
            "weights, signal to noise",
            format!("mean {mean:.1} dB, least {least:.1} dB in {}", plain_text(name)),
        );
    }
    let proxies: Vec<f64> = quantized.iter().filter_map(|(_, q)| q.proxy_error).collect();
    if !proxies.is_empty() {
        let mean = proxies.iter().sum::<f64>() / proxies.len() as f64;
        line(
            "layer outputs on the calibration text, relative error",
            format!("mean {mean:.5}"),
        );
    }
    let options = match manifest.options.get("default") {
        Some(Value::String(options)) => options.clone(),
        _ => manifest.options.to_string(),
    };
    let _ = write!(
        out,
        "\nHow well the model does its work is not measured here.\n\n\
         Made by {} from an artifact of {}, whose options were `{}`:\n\n\
         ```\nqtool quantize MODEL -o OUT ...\nqtool export OUT --to {format} -o DIR\n```\n",
        concat!("qtool ", env!("CARGO_PKG_VERSION")),
        plain_text(&manifest.tool),
        plain_text(&options),
    );
    out
}

/// Each text once, in alphabetical order, with how often it came.
fn counted(texts: impl Iterator<Item = String>) -> String {
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    texts.for_each(|text| *counts.entry(text).or_default() += 1);
    let each: Vec<String> = counts
        .iter()
        .map(|(text, n)| format!("{text} ({n} tensors)"))
        .collect();
    if each.is_empty() {
        "none".to_owned()
    } else {
        each.join(", ")
    }
}

fn plain(name: &str) -> String {
    if name.is_empty() {
        "a model".to_owned()
    } else {
        plain_text(name)
    }
}

/// Text that neither ends a table cell nor a code span.
fn plain_text(text: &str) -> String {
    text.replace(['|', '`', '\n'], " ")
}
