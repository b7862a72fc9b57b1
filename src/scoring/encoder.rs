//! An encoder run here, as a [`Scorer`]: logits of its classification head, and mean-pooled
//! vectors. It continues no text, so it has neither likelihoods nor replies.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use qtool_kernels::Backend;
use rayon::prelude::*;

use super::border::miss;
use super::local::Options;
use super::sharing::batches;
use crate::model::{Batch, Encoder};
use crate::scorer::{Abilities, Likelihoods, OnAnswer, Pair, Question, Reply, Request, Scorer, Window};
use crate::source::Source;
use crate::tokenizer::{Row, Tokenizer};
use crate::{Error, Result};

/// Most texts of a batch.
const MOST: usize = 256;

/// See the module's text.
pub struct EncoderScorer<B: Backend> {
    model: Encoder<B>,
    tokenizer: Tokenizer,
    options: Options,
    tokens: AtomicU64,
    cut: AtomicU64,
}

impl<B: Backend> EncoderScorer<B> {
    /// Opens a checkpoint or an artifact, all layers loaded, with the tokenizer beside it.
    pub fn open(backend: B, folder: &Path, options: Options) -> Result<Self> {
        let tokenizer = Tokenizer::open(folder)?;
        let model = Encoder::open(backend, Arc::new(Source::open(folder)?))?.load()?;
        Ok(Self {
            model,
            tokenizer,
            options,
            tokens: AtomicU64::new(0),
            cut: AtomicU64::new(0),
        })
    }

    fn limit(&self) -> usize {
        let context = self.model.shape().context;
        self.options.context.map_or(context, |asked| asked.min(context))
    }

    /// Tokenizes in parallel, runs batches, and hands out the rows of what `run` gives.
    fn ask(
        &self,
        texts: &[(&str, Option<&str>)],
        run: impl Fn(&Batch) -> Result<B::Tensor>,
        on_answer: OnAnswer<'_, Vec<f32>>,
    ) -> Result<()> {
        let encode = |(a, b): &(&str, Option<&str>)| self.tokenizer.encode_row(a, *b, self.limit());
        let rows: Vec<Row> = texts.par_iter().map(encode).collect::<Result<_>>()?;
        let cut = rows.iter().filter(|row| row.cut > 0).count();
        self.cut.fetch_add(cut as u64, Ordering::Relaxed);
        let all: Vec<usize> = (0..rows.len()).collect();
        let suits = || {
            self.model
                .backend()
                .rows_together(self.model.shape().bytes_a_token())
        };
        let budget = self.options.batch_tokens.unwrap_or_else(suits);
        for batch in batches(&all, |i| rows[i].ids.len(), budget, MOST) {
            let together = Batch::of_rows(batch.iter().map(|&i| &rows[i]));
            self.tokens
                .fetch_add(together.ids().len() as u64, Ordering::Relaxed);
            let out = run(&together)?;
            let columns = self.model.backend().dims(&out).1.max(1);
            let values = self.model.backend().read(&out)?;
            for (&index, row) in batch.iter().zip(values.chunks_exact(columns)) {
                let answer = if row.iter().all(|v| v.is_finite()) {
                    Ok(row.to_vec())
                } else {
                    let detail = "the model gave numbers that are not finite".to_owned();
                    Err(miss("non-finite", detail))
                };
                if on_answer(index, answer).is_break() {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn unable(&self, what: &str) -> Error {
        Error::Unable {
            model: self.model.source().path().display().to_string(),
            what: format!("{what}: it is an encoder"),
        }
    }
}

impl<B: Backend> Scorer for EncoderScorer<B> {
    fn abilities(&self) -> Abilities {
        Abilities {
            likelihoods: false,
            replies: false,
            windows: false,
            labels: self.model.labels(),
            embeddings: true,
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

    fn texts_cut(&self) -> u64 {
        self.cut.load(Ordering::Relaxed)
    }

    fn likelihoods(&self, _: &[Question], _: OnAnswer<'_, Likelihoods>) -> Result<()> {
        Err(self.unable("tell how likely an answer is"))
    }

    fn replies(&self, _: &[Request], _: OnAnswer<'_, Reply>) -> Result<()> {
        Err(self.unable("continue a prompt"))
    }

    fn tokenize(&self, text: &str) -> Result<Vec<u32>> {
        self.tokenizer.encode(text, false)
    }

    fn windows(&self, _: &[Window], _: OnAnswer<'_, Vec<f32>>) -> Result<()> {
        Err(self.unable("score a text token by token"))
    }

    fn logits(&self, _: &Window) -> Result<Vec<f32>> {
        Err(self.unable("foretell a token"))
    }

    fn classify(&self, pairs: &[Pair], on_answer: OnAnswer<'_, Vec<f32>>) -> Result<()> {
        let texts: Vec<_> = pairs.iter().map(|p| (p.a.as_str(), p.b.as_deref())).collect();
        self.ask(&texts, |batch| self.model.classify(batch), on_answer)
    }

    fn embed(&self, texts: &[String], on_answer: OnAnswer<'_, Vec<f32>>) -> Result<()> {
        let texts: Vec<_> = texts.iter().map(|t| (t.as_str(), None)).collect();
        self.ask(&texts, |batch| self.model.embed(batch), on_answer)
    }
}
