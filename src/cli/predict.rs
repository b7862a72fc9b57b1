//! `qtool predict`: labels of unlabelled items, one a line.

use std::path::PathBuf;

use console::style;

use super::device::{self, DeviceArgs};
use super::server::ServerArgs;
use super::tasks::{AskArgs, task_and_data};
use super::{print, wants_progress};
use crate::validate::{self, Place, Plan, outputs};

/// What was typed.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
question-matching takes text_a<TAB>text_b and writes 0 or 1 a line, as leaderboards take it; classification takes
a text a line and writes its class; multiple-choice takes question and choices and writes a letter.

Examples:
  qtool predict MODEL --task question-matching=test.tsv -o predictions.txt
  qtool predict OUT --task classification=texts.txt --labels label.txt --shots train.txt -o classes.txt")]
pub struct Args {
    /// A checkpoint, an artifact, or a model that others quantized
    #[arg(
        required_unless_present = "endpoint",
        conflicts_with = "endpoint",
        value_name = "MODEL"
    )]
    pub folder: Option<PathBuf>,
    /// The task and the items
    #[arg(long, value_name = "TASK=DATA")]
    pub task: String,
    #[command(flatten)]
    ask: AskArgs,
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    device: DeviceArgs,
    /// File to write; without it, standard output
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
    /// Written for an item that got no label; without it, such an item is an error
    #[arg(long, value_name = "TEXT")]
    pub fallback: Option<String>,
    /// Take an artifact without checking its digests and codes first
    #[arg(long)]
    pub unverified: bool,
    /// Worker threads; 0 means one per core
    #[arg(short = 'j', long, default_value_t = 0)]
    pub threads: usize,
    /// No progress line
    #[arg(short, long)]
    pub quiet: bool,
}

impl Args {
    /// Predicts.
    pub fn run(&self) -> anyhow::Result<i32> {
        let (name, data) = task_and_data(&self.task)?;
        let folders = self.folder.iter().cloned().map(Place::Folder);
        let models: Vec<Place> = folders.chain(self.server.places()).collect();
        if models.len() > 1 {
            anyhow::bail!("predict asks one model; give one --model");
        }
        let chosen = self.device.choose_if(self.folder.is_some())?;
        let plan = Plan {
            models,
            tasks: vec![(name.to_owned(), self.ask.setup(name, data, false)?)],
            seed: self.ask.seed,
            resamples: 0,
            items: false,
            unverified: self.unverified,
            work: None,
            resume: false,
            show_progress: wants_progress(false, self.quiet),
            device: chosen.device.name(),
            device_reason: chosen.reason.clone(),
            device_identity: chosen.device.identity(),
        };
        let found = crate::quantize::with_threads(self.threads, || {
            validate::predict(&plan, &|place| {
                self.server.open(place, &chosen.device, self.ask.seed)
            })
        })?;
        let missing: Vec<&String> = found.iter().filter_map(|p| p.as_ref().err()).collect();
        let fallback = match (&self.fallback, missing.first()) {
            (None, Some(first)) => anyhow::bail!(
                "{} of {} items got no label, nothing was written (first: {first}); ask by log-likelihood, or pass --fallback LABEL",
                missing.len(),
                found.len()
            ),
            (fallback, _) => fallback.as_deref().unwrap_or_default(),
        };
        let lines: String = found
            .iter()
            .map(|p| p.as_deref().unwrap_or(fallback).to_owned() + "\n")
            .collect();
        let Some(path) = &self.output else {
            print(&lines)?;
            return Ok(0);
        };
        outputs::write(path, lines.as_bytes())?;
        print(&format!(
            "{} {} labels -> {}{}\n",
            style("Predicted").green().bold(),
            found.len(),
            path.display(),
            if missing.is_empty() {
                String::new()
            } else {
                format!(" ({} by --fallback)", missing.len())
            }
        ))?;
        if self.folder.is_some() {
            print(&device::line(&chosen))?;
        }
        Ok(0)
    }
}
