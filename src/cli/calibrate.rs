//! `qtool calibrate` and `qtool merge-stats`: what was typed and what is printed.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use console::style;
use qtool_calib::Evidence;
use qtool_formats::checkpoint::Checkpoint;
use serde_json::json;

use super::device::{self, DeviceArgs};
use super::{corpus, print, print_json, size, wants_progress};
use crate::calibrate::coverage::{self, LayerCoverage, MIN_COVERAGE};
use crate::calibrate::measure::{self, Options};
use crate::calibrate::statistics::{Index, merge};
use crate::calibrate::walk::slices_of;
use crate::device::Chosen;
use crate::table::Table;

/// What was typed.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Runs the original model over the text once and keeps, for the input of every linear layer,
its second moment and largest magnitudes; and the largest magnitudes of keys and values.
The folder serves any number of `qtool quantize --calib STATS` runs, at any bits.

Text files are one document each; .jsonl files hold {\"text\": ..}, {\"messages\": [..]} or ids.

Examples:
  qtool calibrate MODEL --data text.txt -o STATS
  qtool calibrate MODEL --data a.jsonl b.jsonl --rows 256 -o STATS
  qtool calibrate MODEL --data text.txt --shard 0/4 -o PART0     (on four machines, then)
  qtool merge-stats PART0 PART1 PART2 PART3 -o STATS")]
pub struct Args {
    /// A model folder
    pub model: PathBuf,
    /// Text, JSON lines or token ids
    #[arg(long, value_name = "FILE", num_args = 1.., required = true)]
    pub data: Vec<PathBuf>,
    /// Folder to create
    #[arg(short, long, value_name = "STATS")]
    pub output: PathBuf,
    #[command(flatten)]
    corpus: corpus::RowsArgs,
    /// Keep diagonals only: small, enough for weighted searches, too little for error feedback and rotations
    #[arg(long)]
    pub diagonal: bool,
    /// Measure part I of N (N 1, 2, 4 or 8) of the rows; merge the parts afterwards
    #[arg(long, value_name = "I/N")]
    pub shard: Option<String>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Worker threads; 0 means one per core. The result does not depend on it
    #[arg(short = 'j', long, default_value_t = 0)]
    pub threads: usize,
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

impl Args {
    /// Measures.
    pub fn run(&self) -> anyhow::Result<i32> {
        let started = Instant::now();
        let slices = self.shard.as_deref().map(parse_shard).transpose()?;
        let checkpoint = Arc::new(Checkpoint::open(&self.model)?);
        crate::plan::refuse_quantized(&checkpoint)?;
        let corpus = self.corpus.read(&self.model, &self.data)?;
        let chosen = self.device.choose()?;
        let options = Options {
            target: self.output.clone(),
            force: self.force,
            evidence: if self.diagonal {
                Evidence::Diagonal
            } else {
                Evidence::Full
            },
            slices,
            threads: self.threads,
            device: chosen.device.clone(),
            show_progress: wants_progress(self.json, self.quiet),
        };
        let index = measure::run(&checkpoint, &corpus, &options)?;
        let printing = Printing {
            output: &self.output,
            min_coverage: self.corpus.min_coverage,
            json: self.json,
            started,
        };
        report(&index, Some(&chosen), &printing)?;
        Ok(0)
    }
}

fn parse_shard(text: &str) -> anyhow::Result<std::ops::Range<usize>> {
    let numbers = text
        .split_once('/')
        .and_then(|(i, n)| Some((i.trim().parse().ok()?, n.trim().parse().ok()?)));
    numbers.and_then(|(i, n)| slices_of(i, n)).ok_or_else(|| {
        anyhow::anyhow!("--shard {text:?}: expected I/N with N one of 1, 2, 4, 8 and I below N")
    })
}

/// What was typed.
#[derive(Debug, clap::Args)]
pub struct MergeArgs {
    /// Every part made with `qtool calibrate --shard`
    #[arg(required = true)]
    pub parts: Vec<PathBuf>,
    /// Folder to create
    #[arg(short, long, value_name = "STATS")]
    pub output: PathBuf,
    /// Replace the folder when qtool wrote it
    #[arg(long)]
    pub force: bool,
    /// Print the outcome as JSON
    #[arg(long)]
    pub json: bool,
}

impl MergeArgs {
    /// Merges.
    pub fn run(&self) -> anyhow::Result<i32> {
        let started = Instant::now();
        let index = merge(&self.parts, &self.output, self.force)?;
        let printing = Printing {
            output: &self.output,
            min_coverage: MIN_COVERAGE,
            json: self.json,
            started,
        };
        report(&index, None, &printing)?;
        Ok(0)
    }
}

/// What is printed of a folder of statistics.
struct Printing<'a> {
    output: &'a Path,
    min_coverage: u64,
    json: bool,
    started: Instant,
}

fn report(index: &Index, chosen: Option<&Chosen>, printing: &Printing<'_>) -> anyhow::Result<()> {
    let Printing {
        output,
        min_coverage,
        started,
        ..
    } = *printing;
    let inputs = index.blocks.iter().flat_map(|b| &b.inputs);
    let rows = inputs
        .clone()
        .filter_map(|i| Some((i.tensors.first()?.as_str(), i.rows.iter().sum())));
    let coverage = coverage::report(rows, min_coverage);
    if printing.json {
        return print_json(&json!({
            "output": output,
            "model_digest": index.model_digest,
            "corpus": index.corpus,
            "blocks": index.blocks.len(),
            "inputs": inputs.count(),
            "part": index.part,
            "seconds": started.elapsed().as_secs_f64(),
            "coverage": coverage,
            "device": chosen.map(|c| c.device.name()),
            "device_reason": chosen.and_then(|c| c.reason.as_ref()),
        }));
    }
    let mut text = String::new();
    if !coverage.is_empty() {
        text += &coverage_table(&coverage);
        text.push('\n');
    }
    text += &format!(
        "{} {} inputs of {} blocks on {} rows of {} tokens -> {} in {}\n",
        style("Measured").green().bold(),
        inputs.count(),
        index.blocks.len(),
        index.corpus["rows"],
        index.corpus["length"],
        output.display(),
        size::seconds(started.elapsed()),
    );
    text += &chosen.map(device::line).unwrap_or_default();
    let below: usize = coverage.iter().map(|c| c.below).sum();
    if below > 0 {
        text += &format!(
            "{} {below} experts saw fewer than {min_coverage} rows; they will share their layer's statistics. More text helps.\n",
            style("warning:").yellow().bold()
        );
    }
    text += &if index.part {
        format!(
            "Next: qtool merge-stats {} OTHER_PARTS.. -o STATS\n",
            output.display()
        )
    } else {
        format!(
            "Next: qtool quantize MODEL -o OUT --bits 2 --calib {}\n",
            output.display()
        )
    };
    print(&text)
}

fn coverage_table(coverage: &[LayerCoverage]) -> String {
    let mut table = Table::new(&[
        "layer",
        ">experts",
        ">fewest rows",
        ">median",
        ">most",
        ">too few",
    ]);
    for c in coverage {
        table.row([
            c.layer.clone(),
            c.experts.to_string(),
            size::count(c.fewest),
            size::count(c.median),
            size::count(c.most),
            c.below.to_string(),
        ]);
    }
    table.render()
}
