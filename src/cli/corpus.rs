//! Options that say what a model is calibrated on, shared by `calibrate` and `quantize`.

use std::path::{Path, PathBuf};

use crate::calibrate::corpus::{Corpus, CorpusOptions};
use crate::calibrate::coverage::MIN_COVERAGE;
use crate::calibrate::pipeline::Calibration;
use crate::calibrate::statistics::Statistics;
use crate::model::architectures;
use crate::source::{Source, WeightSource};
use crate::tokenizer::Tokenizer;

/// What was typed.
#[derive(Debug, Clone, clap::Args)]
pub struct RowsArgs {
    /// Calibration rows, drawn at random from the text
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..))]
    pub rows: u32,
    /// Tokens of a row
    #[arg(long, value_name = "TOKENS", default_value_t = 512, value_parser = clap::value_parser!(u32).range(1..))]
    pub length: u32,
    /// Which rows are drawn, and in which order
    #[arg(long, default_value_t = 0)]
    pub seed: u64,
    /// Rows a routed expert must see; with fewer it shares the statistics of its layer's experts
    #[arg(long, value_name = "ROWS", default_value_t = MIN_COVERAGE)]
    pub min_coverage: u64,
}

/// What `quantize` is to be calibrated on.
#[derive(Debug, Clone, clap::Args)]
pub struct EvidenceArgs {
    /// Calibrate on these: text, JSON lines, token ids, or a folder made by `qtool calibrate`
    #[arg(long, value_name = "FILE", num_args = 1..)]
    pub calib: Vec<PathBuf>,
    /// With --calib: measure the original model once, instead of block by block behind quantized blocks
    #[arg(long, requires = "calib")]
    pub one_pass: bool,
    /// Which rows of the text.
    #[command(flatten)]
    pub rows: RowsArgs,
}

impl EvidenceArgs {
    /// Whether the model will run: with a text, but not with statistics that are there already.
    pub fn runs_the_model(&self) -> bool {
        match self.calib.as_slice() {
            [] => false,
            [stats] => !Statistics::is_statistics(stats),
            _ => true,
        }
    }

    /// Whether it is a folder of statistics without whole second moments.
    pub fn diagonals_only(&self) -> bool {
        match self.calib.as_slice() {
            [stats] if Statistics::is_statistics(stats) => {
                Statistics::open(stats).is_ok_and(|statistics| !statistics.index().full)
            }
            _ => false,
        }
    }

    /// Where evidence for the model in `folder` comes from, if any was asked for.
    pub fn read(&self, folder: &Path) -> anyhow::Result<Option<Calibration>> {
        Ok(match self.calib.as_slice() {
            [] => None,
            [stats] if Statistics::is_statistics(stats) => Some(Calibration::Statistics(stats.clone())),
            files => {
                let corpus = self.rows.read(folder, files)?;
                Some(if self.one_pass {
                    Calibration::OnePass(corpus)
                } else {
                    Calibration::Sequential(corpus)
                })
            }
        })
    }
}

impl RowsArgs {
    /// Reads the rows for the model in `folder`.
    pub fn read(&self, folder: &Path, files: &[PathBuf]) -> anyhow::Result<Corpus> {
        let source = Source::open(folder)?;
        let (context, vocabulary) = architectures::bounds(&source as &dyn WeightSource)?;
        let length = self.length as usize;
        if length > context {
            anyhow::bail!("--length {length} is more than the {context} positions the model was made for");
        }
        let tokenizer = Tokenizer::open(folder)?;
        let options = CorpusOptions {
            files: files.to_vec(),
            rows: self.rows as usize,
            length,
            seed: self.seed,
        };
        Ok(Corpus::read(&options, &tokenizer, vocabulary)?)
    }
}
