//! The questions an evaluation may ask of a model, whatever answers them: a model run here, a server, or a script
//! in a test. Owns the vocabulary; tasks (`src/tasks`) meet nothing else of a model.
//!
//! Answers arrive in any order, each with the index of its question, as soon as they are there, so that a run that
//! is stopped loses nothing that was answered. A question that could not be answered is a [`Miss`], counted and
//! shown, never a wrong answer; an error of the whole run is an `Err`.

use std::ops::ControlFlow;

use qtool_kernels::backend::Divergence;
use qtool_kernels::divergences;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::Result;

/// Who speaks in a conversation, as chat templates call it: `system`, `user` or `assistant`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// `system`, `user` or `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

/// What comes before an answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Prompt {
    /// Text that the model continues.
    Text(String),
    /// A conversation, brought into the model's form by its own chat template.
    Chat(Vec<Message>),
}

/// How likely is each of these answers?
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// What comes before.
    pub prompt: Prompt,
    /// The answers, as they would follow the prompt: a leading space is part of an answer.
    pub answers: Vec<String>,
}

/// What continues this prompt?
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// What comes before.
    pub prompt: Prompt,
    /// Most tokens of the reply.
    pub most: usize,
    /// The reply ends before the first of these.
    pub stop: Vec<String>,
    /// The only replies allowed, if not all are: next tokens that lead to none of them are masked.
    pub allowed: Option<Vec<String>>,
    /// JSON schema of the reply, for servers that can hold a model to one.
    pub schema: Option<Value>,
}

/// Token ids to score, of which the first `context` are given. The first token of a window without context has
/// no distribution and is not scored: `context` counts as at least 1.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Window {
    /// The ids.
    pub ids: Vec<u32>,
    /// How many of them are given and not scored.
    pub context: usize,
}

impl Window {
    /// The tokens that are scored.
    pub fn scored(&self) -> &[u32] {
        self.ids.get(self.context.max(1)..).unwrap_or_default()
    }
}

/// Two models beside each other, token by token; or why they cannot be.
pub type Beside = std::result::Result<Vec<Option<Divergence>>, OtherVocabulary>;

/// The vocabulary of a model that cannot be compared with a base of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OtherVocabulary(pub usize);

/// An encoder's question: a text, or a pair of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pair {
    /// The first or only text.
    pub a: String,
    /// The second.
    pub b: Option<String>,
}

/// Answer to a [`Question`]; one number for each of its answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Likelihoods {
    /// Sum of ln p over the answer's tokens, in nats.
    pub nats: Vec<f64>,
    /// Tokens of each answer.
    pub tokens: Vec<usize>,
    /// Tokens of the prompt that did not fit the context and were cut from its front.
    pub cut: usize,
}

/// Answer to a [`Request`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// What the model said, without the stop.
    pub text: String,
    /// Tokens of the prompt that did not fit the context and were cut from its front.
    pub cut: usize,
}

/// Why one question has no answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Miss {
    /// A word for counting: `timeout`, `status 500`, `not json`, `non-finite` ...
    pub kind: String,
    /// The whole story.
    pub detail: String,
}

/// An answer, or why there is none.
pub type Answer<T> = std::result::Result<T, Miss>;

/// Takes the answer to question `index`; breaking off ends the run early, with what was answered so far.
pub type OnAnswer<'a, T> = &'a mut dyn FnMut(usize, Answer<T>) -> ControlFlow<()>;

/// What a scorer can be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Abilities {
    /// [`Scorer::likelihoods`].
    pub likelihoods: bool,
    /// [`Scorer::replies`].
    pub replies: bool,
    /// [`Scorer::windows`], [`Scorer::logits`] and [`Scorer::tokenize`].
    pub windows: bool,
    /// [`Scorer::classify`]: labels of its head; 0 for none.
    pub labels: usize,
    /// [`Scorer::embed`].
    pub embeddings: bool,
}

/// A model that answers. Every method that a scorer is not able to do is an error that says so.
pub trait Scorer: Send + Sync {
    /// What it can be asked.
    fn abilities(&self) -> Abilities;
    /// Most tokens of prompt and answer together; `None` when unknown.
    fn context(&self) -> Option<usize>;
    /// Digest of the tokenizer, where it is known: two models are compared token by token only when it is equal.
    fn tokenizer_digest(&self) -> Option<String>;
    /// Tokens that went through the model so far, shared prefixes counted once, for throughput.
    fn tokens_run(&self) -> u64;
    /// What a reader must know of how it answers, a sentence each.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }

    /// Texts that [`classify`](Self::classify) and [`embed`](Self::embed) cut so far because they were longer than
    /// the context.
    fn texts_cut(&self) -> u64 {
        0
    }

    /// How likely the answers are.
    fn likelihoods(&self, questions: &[Question], on_answer: OnAnswer<'_, Likelihoods>) -> Result<()>;
    /// How likely the answers of the questions `open` (rising indices) are. The others were answered before, in a
    /// run that was interrupted; they are told so that a scorer can run the batches that the whole list makes
    /// and give the numbers that run would have given, to the last bit.
    fn likelihoods_of(
        &self,
        questions: &[Question],
        open: &[usize],
        on_answer: OnAnswer<'_, Likelihoods>,
    ) -> Result<()> {
        let asked: Vec<Question> = open.iter().map(|&i| questions[i].clone()).collect();
        self.likelihoods(&asked, &mut |i, answer| on_answer(open[i], answer))
    }
    /// Greedy replies.
    fn replies(&self, requests: &[Request], on_answer: OnAnswer<'_, Reply>) -> Result<()>;
    /// Ids of a text, without special tokens.
    fn tokenize(&self, text: &str) -> Result<Vec<u32>>;
    /// ln p of each scored token of each window, in nats; NaN where a logit was not finite.
    fn windows(&self, windows: &[Window], on_answer: OnAnswer<'_, Vec<f32>>) -> Result<()>;
    /// Logits (scored tokens, V) of one window: row i is the distribution of its scored token i.
    fn logits(&self, window: &Window) -> Result<Vec<f32>>;
    /// What this model predicts for a window beside what another, the base, does: of each scored token, with the base's
    /// logits (scored tokens, V). `None` where a logit of either is not finite. A device does this where the logits are.
    fn beside(&self, base: &[f32], window: &Window) -> Result<Beside> {
        let logits = self.logits(window)?;
        let targets = window.scored();
        if logits.len() != base.len() {
            return Ok(Err(OtherVocabulary(logits.len() / targets.len().max(1))));
        }
        Ok(Ok(divergences(base, &logits, targets)))
    }
    /// Other logits beside the base's, as in [`beside`](Self::beside), computed where this model is.
    ///
    /// # Panics
    ///
    /// When there are more or fewer of them.
    fn compared(&self, base: &[f32], logits: &[f32], targets: &[u32]) -> Result<Vec<Option<Divergence>>> {
        Ok(divergences(base, logits, targets))
    }
    /// Logits of a sequence-classification head, one per label.
    fn classify(&self, pairs: &[Pair], on_answer: OnAnswer<'_, Vec<f32>>) -> Result<()>;
    /// Mean-pooled last hidden states, one vector a text.
    fn embed(&self, texts: &[String], on_answer: OnAnswer<'_, Vec<f32>>) -> Result<()>;
}
