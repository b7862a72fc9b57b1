//! `qtool verify`: what was typed, and the findings as printed.

use std::path::PathBuf;

use console::style;
use serde_json::json;

use super::{FOUND, print, print_json, size, wants_progress};

/// What was typed.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Checks digests of all tensors and side files, the manifest against the files, code ranges, scales,
and degenerate weights. With --base it also checks that the base is the one the artifact was made
from, and derives every quality figure a second time by an independent decoder.

Exit status: 0 sound, 1 something was found, 2 not an artifact.

Example:
  qtool verify OUT --base MODEL")]
pub struct Args {
    /// The artifact
    pub artifact: PathBuf,
    /// The checkpoint it was made from
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
        let figures = match &self.base {
            Some(base) => format!(
                "; figures of {} derived again from {}",
                outcome.figures_rederived,
                base.display()
            ),
            None => "; figures not checked (pass --base MODEL)".to_owned(),
        };
        text += &if sound {
            format!(
                "{} {}: {scope}, all digests, codes and scales as stated{figures}\n",
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
}
