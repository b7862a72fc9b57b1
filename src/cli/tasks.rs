//! Options of tasks, as `validate` and `predict` take them.

use std::path::PathBuf;

use clap::ValueEnum;

use crate::tasks::prompt::Language;
use crate::tasks::setup::{Ask, Normalize, Setup};
use crate::tasks::{self, TASKS};

/// Languages of the built-in prompts, as typed.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum LanguageArg {
    /// Chinese
    Zh,
    /// English
    En,
}

/// Ways of asking, as typed.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum AskArg {
    /// Compare the log-likelihoods of the answers
    Loglik,
    /// Read a greedy reply as JSON {"result": ..}
    Generate,
    /// Take an encoder's classification head
    Head,
    /// Compare an encoder's mean-pooled texts; needs --dev
    Cosine,
}

/// Normalisations, as typed.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum NormalizeArg {
    /// Sum of ln p
    None,
    /// Divided by the answer's tokens
    Tokens,
    /// Divided by the answer's bytes
    Bytes,
}

/// Options that more than one task has.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "How models are asked")]
pub struct AskArgs {
    /// How a label is asked for; without it: loglik for causal models, head or cosine for encoders
    #[arg(long, value_enum)]
    pub ask: Option<AskArg>,
    /// Template in place of the built-in prompt (minijinja; see docs/validating.md)
    #[arg(long, value_name = "[TASK=]FILE")]
    pub prompt: Vec<String>,
    /// Language of the built-in prompts; without it, that of the data
    #[arg(long, value_enum)]
    pub language: Option<LanguageArg>,
    /// Examples for the prompt, in a file shaped as the data
    #[arg(long, value_name = "[TASK=]FILE")]
    pub shots: Vec<String>,
    /// How many of them; labels in turn, drawn by --seed
    #[arg(long, value_name = "N", default_value_t = 4)]
    pub shots_count: usize,
    /// Bring prompts into the form of the model's own chat template
    #[arg(long)]
    pub chat: bool,
    /// What log-likelihoods of answers are divided by
    #[arg(long, value_enum, default_value = "none")]
    pub normalize: NormalizeArg,
    /// Subtract what each answer gets from a content-free input
    #[arg(long)]
    pub content_free: bool,
    /// With --ask generate: let the model write anything, not only replies that name a label
    #[arg(long)]
    pub unconstrained: bool,
    /// Most tokens of a reply (32 for labels, 48 for qa)
    #[arg(long, value_name = "N")]
    pub reply_tokens: Option<usize>,
    /// Classes, one a line; without it, label.txt beside the data
    #[arg(long, value_name = "[TASK=]FILE")]
    pub labels: Vec<String>,
    /// Labelled pairs on which an encoder's cosine threshold is chosen
    #[arg(long, value_name = "[TASK=]FILE")]
    pub dev: Vec<String>,
    /// Tokens of a window (perplexity, divergence)
    #[arg(long, value_name = "N", default_value_t = 512)]
    pub window: usize,
    /// Tokens from one window's start to the next; less than --window slides
    #[arg(long, value_name = "N")]
    pub stride: Option<usize>,
    /// Only N items (windows) of each task, drawn by --seed so that kinds and labels keep their shares
    #[arg(long, value_name = "N")]
    pub limit: Option<usize>,
    /// Seed of everything that is drawn
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}

impl AskArgs {
    /// The setup of one task.
    pub fn setup(&self, task: &str, data: PathBuf, labelled: bool) -> anyhow::Result<Setup> {
        Ok(Setup {
            data,
            labelled,
            labels: file_of(task, "--labels", &self.labels)?,
            dev: file_of(task, "--dev", &self.dev)?,
            ask: self.ask.map(|ask| match ask {
                AskArg::Loglik => Ask::Loglik,
                AskArg::Generate => Ask::Generate,
                AskArg::Head => Ask::Head,
                AskArg::Cosine => Ask::Cosine,
            }),
            prompt: file_of(task, "--prompt", &self.prompt)?,
            language: self.language.map(|language| match language {
                LanguageArg::Zh => Language::Zh,
                LanguageArg::En => Language::En,
            }),
            shots: file_of(task, "--shots", &self.shots)?,
            shots_count: self.shots_count,
            chat: self.chat,
            normalize: match self.normalize {
                NormalizeArg::None => Normalize::None,
                NormalizeArg::Tokens => Normalize::Tokens,
                NormalizeArg::Bytes => Normalize::Bytes,
            },
            calibrate: self.content_free,
            constrain: !self.unconstrained,
            reply_tokens: self.reply_tokens,
            window: self.window,
            stride: self.stride,
            limit: self.limit,
            seed: self.seed,
        })
    }
}

/// The file that `[TASK=]FILE` options give a task: one of its own before one for all.
fn file_of(task: &str, option: &str, given: &[String]) -> anyhow::Result<Option<PathBuf>> {
    let (mut own, mut all) = (None, None);
    for text in given {
        let named = text.split_once('=').filter(|(name, _)| tasks::find(name).is_ok());
        let place = match named {
            Some((name, _)) if name != task => continue,
            Some(_) => &mut own,
            None => &mut all,
        };
        let file = named.map_or(text.as_str(), |(_, file)| file);
        if place.replace(PathBuf::from(file)).is_some() {
            anyhow::bail!(
                "{option} was given twice for {task}; write {option} TASK=FILE to tell tasks apart"
            );
        }
    }
    Ok(own.or(all))
}

/// `TASK=DATA` as typed.
pub fn task_and_data(text: &str) -> anyhow::Result<(&str, PathBuf)> {
    let Some((name, data)) = text.split_once('=').filter(|(_, data)| !data.is_empty()) else {
        anyhow::bail!(
            "--task {text:?}: expected TASK=DATA with TASK one of {}",
            tasks::names()
        );
    };
    tasks::find(name)?;
    Ok((name, PathBuf::from(data)))
}

/// The registry, for `--help`.
pub fn table() -> String {
    let mut text = String::from("Tasks:\n");
    for task in TASKS {
        text += &format!(
            "  {:18}{}\n  {:18}{}\n",
            task.name(),
            task.summary(),
            "",
            task.data()
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_for_one_task_or_for_all() {
        let given = ["a=b.txt", "qa=q.txt"].map(str::to_owned);
        assert_eq!(
            file_of("qa", "--prompt", &given).unwrap(),
            Some(PathBuf::from("q.txt"))
        );
        assert_eq!(
            file_of("perplexity", "--prompt", &given).unwrap(),
            Some(PathBuf::from("a=b.txt")),
            "a is no task"
        );
        let twice = ["a", "b"].map(str::to_owned);
        assert!(
            file_of("qa", "--prompt", &twice)
                .unwrap_err()
                .to_string()
                .contains("twice")
        );
        assert_eq!(task_and_data("qa=x=y").unwrap(), ("qa", PathBuf::from("x=y")));
        assert!(
            task_and_data("qa")
                .unwrap_err()
                .to_string()
                .contains("expected TASK=DATA")
        );
        assert!(
            task_and_data("mmlu=x")
                .unwrap_err()
                .to_string()
                .contains("there are")
        );
    }
}
