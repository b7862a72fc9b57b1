//! `qtool inspect`: what was typed, and the contents as printed.

use std::path::PathBuf;

use console::style;
use serde_json::{Value, json};

use super::{print, print_json, size};
use crate::classes::{class_of, group};
use crate::inspect::{Histogram, Line, Subject, open};
use crate::table::Table;

/// What was typed.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  qtool inspect MODEL                                            a checkpoint, by class of tensors
  qtool inspect OUT --all                                        an artifact, every tensor
  qtool inspect VENDOR                                           a GPTQ, AWQ, compressed-tensors, NF4 or GGUF model
  qtool inspect OUT --tensor model.layers.0.mlp.up_proj.weight   one tensor and its code histogram")]
pub struct Args {
    /// A model folder, a .safetensors or .gguf file, or an artifact
    pub path: PathBuf,
    /// Show this tensor, with a histogram of its codes or values
    #[arg(long, value_name = "NAME")]
    pub tensor: Option<String>,
    /// List every tensor instead of classes of tensors
    #[arg(long)]
    pub all: bool,
    /// Print as JSON
    #[arg(long)]
    pub json: bool,
}

/// Worst tensors shown.
const WORST: usize = 5;
/// Bins of a value histogram.
const BINS: usize = 24;
/// Width of the longest bar.
const BAR: usize = 40;

impl Args {
    /// Shows the folder.
    pub fn run(&self) -> anyhow::Result<i32> {
        let subject = open(&self.path)?;
        if let Some(name) = &self.tensor {
            return self.one(&subject, name);
        }
        let lines = subject.lines()?;
        if self.json {
            print_json(&json!({
                "path": self.path,
                "kind": subject.kind(),
                "source": subject.manifest().map(|m| &m.source),
                "totals": subject.manifest().map(|m| &m.totals),
                "tensor_bytes": subject.files().tensor_bytes(),
                "files": subject.files().files().map(|(name, bytes)| json!({"name": name, "bytes": bytes})).collect::<Vec<Value>>(),
                "tensors": lines,
            }))?;
            return Ok(0);
        }
        let mut text = self.heading(&subject, &lines);
        text += &if self.all {
            every_tensor(&lines)
        } else {
            by_class(&lines)
        };
        text += &worst(&lines);
        print(&text)?;
        Ok(0)
    }

    fn heading(&self, subject: &Subject, lines: &[Line]) -> String {
        let path = style(self.path.display()).bold();
        let stored = size::bytes(subject.files().tensor_bytes());
        let files = subject.files().files().len();
        match subject.manifest() {
            Some(manifest) => {
                let totals = &manifest.totals;
                format!(
                    "{path}: artifact (format {}, {}) of {}\n{} tensors in {files} file(s), {stored} from {}: {:.2} bits per weight, {:.2} in quantized tensors\n\n",
                    manifest.version,
                    manifest.tool,
                    manifest.source.name,
                    lines.len(),
                    size::bytes(manifest.source.tensor_bytes),
                    totals.bits_per_weight,
                    totals.quantized_bits_per_weight,
                )
            }
            None => format!(
                "{path}: {}\n{} tensors in {files} file(s), {stored}\n\n",
                subject.kind(),
                lines.len()
            ),
        }
    }

    fn one(&self, subject: &Subject, name: &str) -> anyhow::Result<i32> {
        let line = subject.line(name)?;
        let histogram = subject.histogram(name, BINS)?;
        let record = subject
            .manifest()
            .and_then(|m| m.tensors.iter().find(|t| t.name == name));
        if self.json {
            print_json(&json!({"tensor": line, "record": record, "histogram": histogram}))?;
            return Ok(0);
        }
        let mut text = format!(
            "{}\n  {} as {}, {}, {:.3} bits per weight\n",
            style(name).bold(),
            size::shape(&line.shape),
            line.stored_as,
            size::bytes(line.bytes),
            line.bits_per_weight
        );
        if let Some(qtool_formats::artifact::Stored::Quantized(q)) = record.map(|r| &r.stored) {
            let f = &q.figures;
            let number = |v: Option<f64>| v.map_or_else(|| "none".to_owned(), |v| format!("{v:.6}"));
            text += &format!(
                "  method {}, SQNR {} dB, relative MSE {}, cosine {}, largest error {:.3e}\n  code entropy {:.2} bits, {:.2} % saturated, {} codes unused\n",
                q.method,
                size::decibels(f.sqnr_db),
                number(f.relative_mse),
                number(f.cosine),
                f.max_abs_error,
                f.code_entropy_bits,
                f.saturated * 100.0,
                f.unused_codes
            );
        }
        for fault in &line.faults {
            text += &format!("  {} {fault}\n", style("warning:").yellow().bold());
        }
        match histogram {
            Some(histogram) => text += &draw(&histogram),
            None => text += "  (no histogram for this element type)\n",
        }
        print(&text)?;
        Ok(0)
    }
}

fn every_tensor(lines: &[Line]) -> String {
    let mut table = Table::new(&["tensor", "shape", "stored as", ">size", ">bits/w", ">SQNR dB"]);
    for line in lines {
        table.row([
            line.name.clone(),
            size::shape(&line.shape),
            line.stored_as.clone(),
            size::bytes(line.bytes),
            format!("{:.2}", line.bits_per_weight),
            line.sqnr_db.map(|v| format!("{v:.1}")).unwrap_or_default(),
        ]);
    }
    table.render()
}

fn by_class(lines: &[Line]) -> String {
    let mut table = Table::new(&[
        ">tensors",
        "class",
        "shape",
        "stored as",
        ">size",
        ">bits/w",
        ">SQNR dB",
        ">worst",
    ]);
    for (class, (shape, stored_as), members) in group(lines, |line| {
        (class_of(&line.name), (line.shape.clone(), line.stored_as.clone()))
    }) {
        let bytes: u64 = members.iter().map(|line| line.bytes).sum();
        let sqnr: Vec<f64> = members.iter().filter_map(|line| line.sqnr_db).collect();
        let mean = sqnr.iter().sum::<f64>() / sqnr.len() as f64;
        let text = |value: f64| {
            if sqnr.is_empty() {
                String::new()
            } else {
                format!("{value:.1}")
            }
        };
        table.row([
            members.len().to_string(),
            class,
            size::shape(&shape),
            stored_as,
            size::bytes(bytes),
            format!("{:.2}", members[0].bits_per_weight),
            text(mean),
            text(sqnr.iter().copied().fold(f64::INFINITY, f64::min)),
        ]);
    }
    table.render()
}

/// The quantized tensors with the lowest SQNR, and every suspicious one.
fn worst(lines: &[Line]) -> String {
    let mut ranked: Vec<(&Line, f64)> = lines
        .iter()
        .filter_map(|line| Some((line, line.sqnr_db?)))
        .collect();
    ranked.sort_by(|a, b| a.1.total_cmp(&b.1));
    let mut text = String::new();
    if !ranked.is_empty() {
        text += "\nWorst by SQNR:\n";
        let mut table = Table::new(&["tensor", "stored as", ">SQNR dB"]);
        for (line, sqnr) in ranked.iter().take(WORST) {
            table.row([line.name.clone(), line.stored_as.clone(), format!("{sqnr:.1}")]);
        }
        text += &table.render();
    }
    for line in lines {
        for fault in &line.faults {
            text += &format!("{} {}: {fault}\n", style("warning:").yellow().bold(), line.name);
        }
    }
    text
}

/// A bar per bin. Many codes are folded into at most 32 bars.
fn draw(histogram: &Histogram) -> String {
    let fold = histogram.counts.len().div_ceil(32);
    let bars: Vec<(f64, u64)> = histogram
        .edges
        .chunks(fold)
        .zip(histogram.counts.chunks(fold))
        .map(|(edges, counts)| (edges[0], counts.iter().sum()))
        .collect();
    let most = bars.iter().map(|bar| bar.1).max().unwrap_or(0).max(1);
    let total: u64 = histogram.counts.iter().sum();
    let mut table = Table::new(&[
        if histogram.of == "codes" { ">code" } else { ">from" },
        "",
        ">count",
        ">share",
    ]);
    for (edge, count) in bars {
        let length = (count as f64 / most as f64 * BAR as f64).round() as usize;
        let length = if count > 0 { length.max(1) } else { 0 };
        let edge = if histogram.of == "codes" {
            format!("{edge:.0}")
        } else {
            format!("{edge:.5}")
        };
        let share = format!("{:.2} %", count as f64 * 100.0 / total.max(1) as f64);
        table.row([edge, "#".repeat(length), size::count(count), share]);
    }
    let mut text = table.render();
    if histogram.non_finite > 0 {
        text += &format!("  {} NaN or infinite\n", size::count(histogram.non_finite));
    }
    text
}
