//! `qtool export`: what was typed.

use std::path::PathBuf;

use anyhow::bail;
use qtool_formats::export::{EXPORTERS, find};
use serde_json::json;

use super::{print, print_json, size, wants_progress};

/// What was typed.
#[derive(Debug, clap::Args)]
#[command(after_help = after_help())]
pub struct Args {
    /// The artifact, or a model that another tool quantized: a folder or a GGUF file
    pub artifact: PathBuf,
    /// Format to write
    #[arg(long, value_name = "FORMAT")]
    pub to: String,
    /// Folder to create
    #[arg(short, long, value_name = "DIR")]
    pub output: PathBuf,
    /// Most tensor data in one file
    #[arg(long, value_name = "SIZE", default_value = "5GB", value_parser = size::parse)]
    pub max_shard_size: u64,
    /// Replace the folder when qtool wrote it
    #[arg(long)]
    pub force: bool,
    /// Print the outcome as JSON
    #[arg(long)]
    pub json: bool,
    /// No progress line
    #[arg(short, long)]
    pub quiet: bool,
}

fn after_help() -> String {
    let formats: Vec<String> = EXPORTERS
        .iter()
        .map(|e| format!("  {:<24}{}", e.name(), e.summary()))
        .collect();
    format!(
        "Formats:\n{}\n\nExample:\n  qtool export OUT --to bf16 -o OUT-bf16",
        formats.join("\n")
    )
}

/// The name a mistyped one was probably meant to be: nearer than by chance, by Jaro and Winkler's measure.
fn nearest<'a>(typed: &str, known: &[&'a str]) -> Option<&'a str> {
    let typed = typed.to_lowercase();
    let similar = known
        .iter()
        .map(|name| (strsim::jaro_winkler(&typed, name), *name));
    let (score, name) = similar.max_by(|a, b| a.0.total_cmp(&b.0))?;
    (score > 0.75).then_some(name)
}

impl Args {
    /// Runs the export.
    pub fn run(&self) -> anyhow::Result<i32> {
        let Some(exporter) = find(&self.to) else {
            let known: Vec<&str> = EXPORTERS.iter().map(|e| e.name()).collect();
            bail!(
                "no export format {:?}{}; known formats: {}",
                self.to,
                nearest(&self.to, &known)
                    .map(|name| format!(", did you mean {name}?"))
                    .unwrap_or_default(),
                known.join(", ")
            );
        };
        let progress = wants_progress(self.json, self.quiet);
        let bytes = crate::export::run(
            &self.artifact,
            exporter,
            &self.output,
            self.force,
            self.max_shard_size,
            progress,
        )?;
        if self.json {
            print_json(&json!({"format": self.to, "output": self.output, "tensor_bytes": bytes}))?;
        } else {
            print(&format!(
                "Exported {} to {} as {}\n",
                size::bytes(bytes),
                self.output.display(),
                self.to
            ))?;
        }
        Ok(0)
    }
}
