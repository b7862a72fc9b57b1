//! What a model is evaluated on. A *task* reads data, asks questions of a [`Scorer`], and makes numbers of the
//! answers; it knows no model, prints nothing, and keeps nothing.
//!
//! | Page | Idea |
//! |---|---|
//! | [`data`] | files of items, and the seeded draw from them |
//! | [`prompt`] | templates and examples |
//! | [`setup`] | what can be asked of a task |
//! | [`answers`] | the slots that answers fill |
//! | [`choice`], `chosen`, [`ways`], [`decide`] | tasks that choose one of some labels, and the ways to ask them |
//! | [`figures`] | accuracy, precision, recall, F1 and confusion |
//! | [`reply`], [`overlap`] | replies read as JSON, replies compared with answers |
//! | [`windows`], [`logits`] | running text cut into windows, two models' logits of one beside each other |
//! | one page a task | its file and its numbers |

pub mod answers;
pub mod choice;
mod chosen;
mod classification;
pub mod data;
pub mod decide;
mod divergence;
pub mod figures;
pub mod logits;
mod multiple_choice;
pub mod overlap;
mod perplexity;
pub mod prompt;
mod qa;
mod question_matching;
pub mod reply;
pub mod setup;
pub mod ways;
pub mod windows;

use std::collections::BTreeMap;

use serde_json::Value;

use crate::report::{DataFile, TaskReport};
use crate::scorer::{Abilities, Scorer};
use crate::{Error, Result};
use answers::Answers;
use setup::Setup;

/// A kind of evaluation.
pub trait Task: Send + Sync {
    /// Its name, as typed.
    fn name(&self) -> &'static str;
    /// Version of its arithmetic: raised when the same answers would give another score.
    fn version(&self) -> u32;
    /// What it measures, in a line.
    fn summary(&self) -> &'static str;
    /// Its data and its options, for `--help` and docs.
    fn data(&self) -> &'static str;
    /// Reads the data and makes the questions. `base` answers nothing yet; it tells what can be asked, and cuts text
    /// into tokens.
    ///
    /// Fails at data that are not as described (with file and line), a template that does not fit, or an option that
    /// this task does not have.
    fn prepare(&self, setup: &Setup, base: &dyn Scorer) -> Result<Box<dyn Prepared>>;
}

/// A task with its questions, ready to be asked.
pub trait Prepared: Send + Sync {
    /// What was read.
    fn files(&self) -> Vec<DataFile>;
    /// Everything that decides the numbers besides data and models.
    fn settings(&self) -> BTreeMap<String, Value>;
    /// Items that are scored.
    fn items(&self) -> usize;
    /// Slots of answers: items first, then what else must be asked.
    fn slots(&self) -> usize;
    /// Why a model of these abilities cannot be asked, if it cannot.
    fn lacks(&self, abilities: &Abilities) -> Option<String>;
    /// Whether tokens of the models are put beside each other, so that their tokenizers must be one.
    fn by_token(&self) -> bool {
        false
    }
    /// About how many tokens go through one model, as `count` counts those of a text.
    fn tokens(&self, count: &dyn Fn(&str) -> Result<usize>) -> Result<u64>;
    /// Asks every open slot, the base being the first model.
    fn ask(&self, models: &[&dyn Scorer], answers: &mut Answers<'_>) -> Result<()>;
    /// The numbers. `items` puts in every item's prediction.
    fn report(&self, answers: &Answers<'_>, how: &Reporting) -> Result<TaskReport>;
    /// A label for each item and model 0, where the task gives labels.
    fn predictions(&self, _answers: &Answers<'_>) -> Option<Vec<Result<String, String>>> {
        None
    }
    /// Items that `model` got wrong, where the task has labels.
    fn bad_cases(&self, _answers: &Answers<'_>, _model: usize) -> Option<Vec<BadCase>> {
        None
    }
}

/// How to report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reporting {
    /// Seed of the bootstraps.
    pub seed: u64,
    /// Resamples of the bootstraps.
    pub resamples: usize,
    /// Put every item's prediction in.
    pub items: bool,
    /// Labels of the models, for warnings.
    pub models: Vec<String>,
}

/// An item with a wrong label, or none.
#[derive(Debug, Clone, PartialEq)]
pub struct BadCase {
    /// The text; of two, both with a tab between.
    pub text: String,
    /// Its label.
    pub label: String,
    /// What the model said; empty for nothing.
    pub prediction: String,
    /// How sure it was, where there is a number.
    pub score: Option<f64>,
}

impl BadCase {
    /// As a line of `bad_case.txt`: text, label, prediction, score, with tabs between.
    pub fn line(&self) -> String {
        let score = self.score.map(|s| format!("{s:.4}")).unwrap_or_default();
        format!("{}\t{}\t{}\t{score}\n", self.text, self.label, self.prediction)
    }
}

/// Every task there is.
pub const TASKS: &[&dyn Task] = &[
    &question_matching::QuestionMatching,
    &classification::Classification,
    &multiple_choice::MultipleChoice,
    &qa::Qa,
    &perplexity::Perplexity,
    &divergence::Divergence,
];

/// The task of this name.
pub fn find(name: &str) -> Result<&'static dyn Task> {
    let found = TASKS.iter().find(|t| t.name() == name);
    found.copied().ok_or_else(|| Error::Task {
        task: name.to_owned(),
        reason: format!("does not exist; there are {}", names()),
    })
}

/// Names of all tasks.
pub fn names() -> String {
    TASKS.iter().map(|t| t.name()).collect::<Vec<_>>().join(", ")
}
