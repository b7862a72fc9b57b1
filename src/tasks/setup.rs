//! What can be asked of a task. Owns the options all tasks share and the rule which way a model is asked.

use std::path::PathBuf;

use super::prompt::Language;
use crate::scorer::Abilities;
use crate::{Error, Result};

/// How a model is asked for a label.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ask {
    /// The answer with the highest log-likelihood.
    Loglik,
    /// A greedy reply, read as JSON.
    Generate,
    /// An encoder's classification head.
    Head,
    /// Cosine of an encoder's mean-pooled texts, against a threshold.
    Cosine,
}

impl Ask {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Loglik, Self::Generate, Self::Head, Self::Cosine];

    /// As it is typed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Loglik => "loglik",
            Self::Generate => "generate",
            Self::Head => "head",
            Self::Cosine => "cosine",
        }
    }

    /// Why a model of these abilities cannot be asked so, if it cannot.
    pub fn lacks(self, abilities: &Abilities) -> Option<&'static str> {
        let (able, reason) = match self {
            Self::Loglik => (
                abilities.likelihoods,
                "gives no log-likelihoods; ask a causal model run here or a server that returns logprobs, or pass --ask generate",
            ),
            Self::Generate => (abilities.replies, "cannot write replies; it is no causal model"),
            Self::Head => (abilities.labels > 0, "has no classification head"),
            Self::Cosine => (abilities.embeddings, "gives no embeddings; it is no encoder"),
        };
        (!able).then_some(reason)
    }
}

/// What log-likelihoods of answers of unequal length are divided by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Normalize {
    /// Nothing: the sum of ln p.
    None,
    /// Tokens of the answer.
    Tokens,
    /// UTF-8 bytes of the answer.
    Bytes,
}

impl Normalize {
    /// As it is typed.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Tokens => "tokens",
            Self::Bytes => "bytes",
        }
    }
}

/// Everything that can be asked of a task. What a task has no use for, it ignores.
#[derive(Debug, Clone, PartialEq)]
pub struct Setup {
    /// File or folder of items.
    pub data: PathBuf,
    /// Whether items carry labels; `qtool predict` takes items without.
    pub labelled: bool,
    /// Names of the classes; `label.txt` beside the data when not given.
    pub labels: Option<PathBuf>,
    /// Labelled pairs to choose the cosine threshold on.
    pub dev: Option<PathBuf>,
    /// How the model is asked; the best it is able to when not given.
    pub ask: Option<Ask>,
    /// Template file in place of the built-in one.
    pub prompt: Option<PathBuf>,
    /// Language of the built-in prompt; that of the data when not given.
    pub language: Option<Language>,
    /// File of the examples, shaped as the data.
    pub shots: Option<PathBuf>,
    /// How many of them.
    pub shots_count: usize,
    /// Bring prompts into the model's chat form.
    pub chat: bool,
    /// What likelihoods are divided by.
    pub normalize: Normalize,
    /// Take off what each answer gets from a content-free input (Zhao et al. 2021, in log space).
    pub calibrate: bool,
    /// Let only replies through that name a label.
    pub constrain: bool,
    /// Most tokens of a reply; the task's own number when not given.
    pub reply_tokens: Option<usize>,
    /// Tokens of a window.
    pub window: usize,
    /// Tokens from one window's start to the next; the window's length when not given.
    pub stride: Option<usize>,
    /// Most items, by a stratified draw.
    pub limit: Option<usize>,
    /// Seed of everything drawn.
    pub seed: u64,
}

impl Setup {
    /// Labelled data asked in the default way.
    pub fn new(data: impl Into<PathBuf>) -> Self {
        Self {
            data: data.into(),
            labelled: true,
            labels: None,
            dev: None,
            ask: None,
            prompt: None,
            language: None,
            shots: None,
            shots_count: 4,
            chat: false,
            normalize: Normalize::None,
            calibrate: false,
            constrain: true,
            reply_tokens: None,
            window: 512,
            stride: None,
            limit: None,
            seed: 0,
        }
    }

    /// The way this model is asked: the one given, or of those it is able to, likelihoods before a head before
    /// cosine. Replies are never chosen silently.
    pub fn way(&self, task: &str, allowed: &[Ask], abilities: &Abilities) -> Result<Ask> {
        let fault = |reason: String| Error::Task {
            task: task.to_owned(),
            reason,
        };
        if let Some(ask) = self.ask {
            if allowed.contains(&ask) {
                let lacks = ask.lacks(abilities);
                return lacks.map_or(Ok(ask), |reason| Err(fault(format!("the base {reason}"))));
            }
            let there: Vec<&str> = allowed.iter().map(|a| a.name()).collect();
            return Err(fault(format!(
                "cannot be asked by --ask {}; there are {}",
                ask.name(),
                there.join(", ")
            )));
        }
        let order = [Ask::Loglik, Ask::Head, Ask::Cosine];
        let found = order
            .into_iter()
            .find(|ask| allowed.contains(ask) && ask.lacks(abilities).is_none());
        found.ok_or_else(|| {
            let hint = if abilities.replies && allowed.contains(&Ask::Generate) {
                "the base gives no log-likelihoods; pass --ask generate to read its replies"
            } else if abilities.embeddings {
                "the base is an encoder without a head, which this task has no use for"
            } else {
                "the base cannot be asked in any way this task has"
            };
            fault(hint.to_owned())
        })
    }
}
