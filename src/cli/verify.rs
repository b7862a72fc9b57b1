//! `qtool verify`: what was typed, and the findings as printed.

use std::path::PathBuf;

use console::style;
use serde_json::json;

use super::{FOUND, print, print_json, size, wants_progress};
use crate::verify::{TensorFigures, Verification};

/// What was typed.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Checks digests of all tensors and side files, the manifest against the files, code ranges, scales,
and degenerate weights. With --base it also checks that the base is the one the artifact was made
from, and derives every quality figure a second time by an independent decoder.

Models that others quantized (GPTQ, AWQ, compressed-tensors, bitsandbytes NF4, GGUF) have no manifest: every tensor is
decoded, scales, zero points, group indexes and floats are looked at, and the model is read as a forward pass
would. With --base, names and shapes are compared and every tensor's error is measured.

Exit status: 0 sound, 1 something was found, 2 neither an artifact nor such a model.

Examples:
  qtool verify OUT --base MODEL
  qtool verify VENDOR-GPTQ --base MODEL")]
pub struct Args {
    /// The artifact, or a model that others quantized
    pub artifact: PathBuf,
    /// The model it was made from
    #[arg(long, value_name = "MODEL")]
    pub base: Option<PathBuf>,
    /// Worker threads; 0 means one per core
    #[arg(long, default_value_t = 0)]
    pub threads: usize,
    /// Print the findings as JSON
    #[arg(long)]
    pub json: bool,
    /// No progress line
    #[arg(short, long)]
    pub quiet: bool,
}

/// Findings printed before the rest is only counted.
const SHOWN: usize = 50;

impl Args {
    /// Runs the check.
    pub fn run(&self) -> anyhow::Result<i32> {
        let progress = wants_progress(self.json, self.quiet);
        let outcome = crate::quantize::with_threads(self.threads, || {
            crate::verify::run(&self.artifact, self.base.as_deref(), progress)
        })?;
        let sound = outcome.findings.is_empty();
        if self.json {
            print_json(&json!({"sound": sound, "verification": outcome}))?;
            return Ok(if sound { 0 } else { FOUND });
        }
        let mut text = String::new();
        for finding in outcome.findings.iter().take(SHOWN) {
            text += &format!(
                "{} {}: {}\n",
                style("found:").red().bold(),
                finding.subject,
                finding.problem
            );
        }
        if outcome.findings.len() > SHOWN {
            text += &format!("... and {} more\n", outcome.findings.len() - SHOWN);
        }
        let scope = format!(
            "{} tensors, {}",
            size::count(outcome.tensors as u64),
            size::bytes(outcome.bytes)
        );
        let (checked, figures) = match outcome.format {
            Some(format) => (
                format!("read as {format}, complete and in order"),
                against(&outcome, self),
            ),
            None => (
                "all digests, codes and scales as stated".to_owned(),
                self.figures(&outcome),
            ),
        };
        for note in &outcome.notes {
            text += &format!("{} {note}\n", style("note:").yellow().bold());
        }
        text += &if sound {
            format!(
                "{} {}: {scope}, {checked}{figures}\n",
                style("sound:").green().bold(),
                self.artifact.display()
            )
        } else {
            format!(
                "{} {}: {} findings in {scope}{figures}\n",
                style("not sound:").red().bold(),
                self.artifact.display(),
                outcome.findings.len()
            )
        };
        print(&text)?;
        Ok(if sound { 0 } else { FOUND })
    }

    fn figures(&self, outcome: &Verification) -> String {
        match &self.base {
            Some(base) => format!(
                "; figures of {} derived again from {}",
                outcome.figures_rederived,
                base.display()
            ),
            None => "; figures not checked (pass --base MODEL)".to_owned(),
        }
    }
}

/// How near a model without a manifest is to its base.
fn against(outcome: &Verification, args: &Args) -> String {
    let Some(base) = &args.base else {
        return "; not compared with a base (pass --base MODEL)".to_owned();
    };
    let coded = |one: &&TensorFigures| one.sqnr_db.is_some();
    let decibels = |one: &TensorFigures| one.sqnr_db.unwrap_or(f64::INFINITY);
    let figures: Vec<&TensorFigures> = outcome.figures.iter().filter(coded).collect();
    let mean = figures.iter().map(|one| decibels(one)).sum::<f64>() / figures.len().max(1) as f64;
    match figures.iter().min_by(|a, b| decibels(a).total_cmp(&decibels(b))) {
        Some(worst) => format!(
            "; SQNR against {}: mean {mean:.1} dB, worst {:.1} dB ({})",
            base.display(),
            decibels(worst),
            worst.name
        ),
        None => format!("; every value is that of {}", base.display()),
    }
}
