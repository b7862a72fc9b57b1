//! A causal model run here, as a [`Scorer`]. Owns the model, its tokenizer, and the prefix that was run last, so
//! that a task asked in several calls runs its instruction once.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use qtool_kernels::Backend;
use qtool_kernels::backend::Divergence;
use rayon::prelude::*;

use super::border::{Border, Split, miss};
use super::greedy;
use super::likelihood;
use super::sharing::{self, Group};
use crate::model::shared::Tree;
use crate::model::{Cache, Model};
use crate::scorer::{
    Abilities, Answer, Beside, Likelihoods, OnAnswer, Pair, Prompt, Question, Reply, Request, Scorer, Window,
};
use crate::source::Source;
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

/// How questions run. None of it changes an answer by more than rounding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options {
    /// Tokens that run through the model together; a longer question runs alone. Without it as many as suit the device.
    pub batch_tokens: Option<usize>,
    /// Whether prefixes that questions share run once.
    pub share_prefixes: bool,
    /// Most tokens of prompt and answer together, if fewer than the model was made for.
    pub context: Option<usize>,
    /// Bytes of keys and values that replies in progress may take.
    pub reply_bytes: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            batch_tokens: None,
            share_prefixes: true,
            context: None,
            reply_bytes: 256 << 20,
        }
    }
}

/// A prefix and what the model keeps of it.
type Run<B> = (Vec<u32>, Arc<Cache<B>>);

/// See the module's text.
pub struct LocalScorer<B: Backend> {
    model: Model<B>,
    tokenizer: Tokenizer,
    options: Options,
    stops: Vec<u32>,
    batch_tokens: usize,
    last: Mutex<Option<Run<B>>>,
    tokens: AtomicU64,
}

impl<B: Backend> LocalScorer<B> {
    /// Opens a checkpoint or an artifact, all blocks loaded, with the tokenizer beside it.
    pub fn open(backend: B, folder: &Path, options: Options) -> Result<Self> {
        let tokenizer = Tokenizer::open(folder)?;
        let model = Model::open(backend, Arc::new(Source::open(folder)?))?.load()?;
        Self::new(model, tokenizer, options)
    }

    /// Of a loaded model. Fails when its `generation_config.json` is damaged.
    pub fn new(model: Model<B>, tokenizer: Tokenizer, options: Options) -> Result<Self> {
        let stops = greedy::stop_ids(&model, &tokenizer)?;
        let suits = || model.backend().rows_together(model.decoder().bytes_a_token());
        Ok(Self {
            batch_tokens: options.batch_tokens.unwrap_or_else(suits),
            model,
            tokenizer,
            options,
            stops,
            last: Mutex::new(None),
            tokens: AtomicU64::new(0),
        })
    }

    /// The model.
    pub fn model(&self) -> &Model<B> {
        &self.model
    }

    /// Its tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// How questions run.
    pub fn options(&self) -> Options {
        self.options
    }

    /// Tokens that run through the model together.
    pub fn batch_tokens(&self) -> usize {
        self.batch_tokens
    }

    /// Ids that end a reply.
    pub fn stops(&self) -> &[u32] {
        &self.stops
    }

    fn limit(&self) -> usize {
        let context = self.model.decoder().context;
        self.options.context.map_or(context, |asked| asked.min(context))
    }

    /// Groups of prompts that share a prefix.
    pub(super) fn groups(&self, prompts: &[&[u32]]) -> Vec<Group> {
        if self.options.share_prefixes {
            return sharing::groups(prompts);
        }
        let items: Vec<usize> = (0..prompts.len()).collect();
        Vec::from_iter((!items.is_empty()).then_some(Group { prefix: 0, items }))
    }

    /// Keys and values of a prefix; none of an empty one.
    pub(super) fn prefix(&self, ids: &[u32]) -> Result<Option<Arc<Cache<B>>>> {
        if ids.is_empty() {
            return Ok(None);
        }
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, kept)) = last.as_ref().filter(|(of, _)| of == ids) {
            return Ok(Some(Arc::clone(kept)));
        }
        // The one before goes first: two prefixes need not fit.
        *last = None;
        let kept = Arc::new(self.model.prefix(ids)?);
        self.count(ids.len());
        *last = Some((ids.to_vec(), Arc::clone(&kept)));
        Ok(Some(kept))
    }

    /// What the last block gives for these trees, (M, hidden).
    pub(super) fn run(&self, prefix: Option<&Cache<B>>, trees: &[Tree<'_>]) -> Result<B::Tensor> {
        self.count(trees.iter().map(Tree::rows).sum());
        self.model.behind(prefix, trees)
    }

    pub(super) fn count(&self, tokens: usize) {
        self.tokens.fetch_add(tokens as u64, Ordering::Relaxed);
    }

    /// Whether the model takes a window of this length.
    pub(super) fn fits(&self, window: &Window) -> Answer<()> {
        let (tokens, limit) = (window.ids.len(), self.limit());
        if tokens > limit {
            let detail = format!("a window of {tokens} tokens does not fit a context of {limit}");
            return Err(miss("too long", detail));
        }
        Ok(())
    }

    /// Tokenizes prompts with what may follow them, in parallel.
    fn split<T: Sync>(
        &self,
        items: &[T],
        parts: impl Fn(&T) -> (&Prompt, &[String], usize) + Sync,
    ) -> Result<Vec<Answer<Split>>> {
        let border = Border::new(&self.tokenizer, self.limit())?;
        let one = |item| {
            let (prompt, answers, most) = parts(item);
            border.split(prompt, answers, most)
        };
        items.par_iter().map(one).collect()
    }

    fn unable(&self, what: &str) -> Error {
        Error::Unable {
            model: self.model.source().path().display().to_string(),
            what: what.to_owned(),
        }
    }
}

impl<B: Backend> Scorer for LocalScorer<B> {
    fn abilities(&self) -> Abilities {
        Abilities {
            likelihoods: true,
            replies: true,
            windows: true,
            labels: 0,
            embeddings: false,
        }
    }

    fn context(&self) -> Option<usize> {
        Some(self.limit())
    }

    fn tokenizer_digest(&self) -> Option<String> {
        Some(self.tokenizer.digest().to_owned())
    }

    fn tokens_run(&self) -> u64 {
        self.tokens.load(Ordering::Relaxed)
    }

    fn likelihoods(&self, questions: &[Question], on_answer: OnAnswer<'_, Likelihoods>) -> Result<()> {
        let all: Vec<usize> = (0..questions.len()).collect();
        self.likelihoods_of(questions, &all, on_answer)
    }

    fn likelihoods_of(
        &self,
        questions: &[Question],
        open: &[usize],
        on_answer: OnAnswer<'_, Likelihoods>,
    ) -> Result<()> {
        let splits = self.split(questions, |q| (&q.prompt, &q.answers, 0))?;
        likelihood::likelihoods(self, &splits, open, on_answer)
    }

    fn replies(&self, requests: &[Request], on_answer: OnAnswer<'_, Reply>) -> Result<()> {
        let splits = self.split(requests, |r| {
            (&r.prompt, r.allowed.as_deref().unwrap_or_default(), r.most)
        })?;
        greedy::replies(self, requests, &splits, on_answer)
    }

    fn tokenize(&self, text: &str) -> Result<Vec<u32>> {
        self.tokenizer.encode(text, false)
    }

    fn windows(&self, windows: &[Window], on_answer: OnAnswer<'_, Vec<f32>>) -> Result<()> {
        likelihood::windows(self, windows, on_answer)
    }

    fn logits(&self, window: &Window) -> Result<Vec<f32>> {
        match self.fits(window) {
            Ok(()) => likelihood::logits(self, window),
            Err(miss) => Err(Error::Question { reason: miss.detail }),
        }
    }

    fn beside(&self, base: &[f32], window: &Window) -> Result<Beside> {
        match self.fits(window) {
            Ok(()) => likelihood::beside(self, base, window),
            Err(miss) => Err(Error::Question { reason: miss.detail }),
        }
    }

    fn compared(&self, base: &[f32], logits: &[f32], targets: &[u32]) -> Result<Vec<Option<Divergence>>> {
        likelihood::compared(self.model.backend(), base, logits, targets)
    }

    fn classify(&self, _: &[Pair], _: OnAnswer<'_, Vec<f32>>) -> Result<()> {
        Err(self.unable("classify texts: it has no sequence-classification head"))
    }

    fn embed(&self, _: &[String], _: OnAnswer<'_, Vec<f32>>) -> Result<()> {
        Err(self.unable("embed texts: it is no encoder"))
    }
}
