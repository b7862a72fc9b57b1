//! ln p of answers and of windows: trees of tokens through the model, batch by batch, and the rows of logits
//! that are needed, and only those, through the head.

use std::ops::ControlFlow;

use qtool_kernels::Backend;
use qtool_kernels::backend::Divergence;
use rayon::prelude::*;

use super::border::{Split, miss};
use super::local::LocalScorer;
use super::sharing::batches;
use super::softmax::log_p;
use crate::Result;
use crate::model::Cache;
use crate::model::shared::Tree;
use crate::scorer::{Answer, Beside, Likelihoods, OnAnswer, OtherVocabulary, Window};

/// Bytes of logits that are on the host at a time.
const LOGIT_BYTES: usize = 64 << 20;
/// Most questions of a batch.
const MOST: usize = 1024;

/// A row of a batch and the tokens whose ln p is read there.
struct Want {
    row: usize,
    tokens: Vec<u32>,
}

/// Rows of logits that are computed together.
pub fn rows_together(vocabulary: usize) -> usize {
    (LOGIT_BYTES / 4 / vocabulary.max(1)).clamp(16, 512)
}

/// One question's tree behind a prefix.
struct Planted<'a> {
    trunk: &'a [u32],
    branches: Vec<&'a [u32]>,
}

impl<'a> Planted<'a> {
    fn new(split: &'a Split, prefix: usize) -> Self {
        Self {
            trunk: &split.context[prefix..],
            // The last token of an answer is read, but nothing after it is.
            branches: split.answers.iter().map(|a| &a[..a.len() - 1]).collect(),
        }
    }

    fn tree(&self) -> Tree<'_> {
        Tree {
            trunk: self.trunk,
            branches: &self.branches,
        }
    }
}

/// Answers the questions `open`, in the order of batches. Batches are those of all questions, and each runs whole
/// when one of its questions is open.
pub fn likelihoods<B: Backend>(
    scorer: &LocalScorer<B>,
    splits: &[Answer<Split>],
    open: &[usize],
    on_answer: OnAnswer<'_, Likelihoods>,
) -> Result<()> {
    let is_open = |index: usize| open.binary_search(&index).is_ok();
    let mut asked = Vec::new();
    for (index, split) in splits.iter().enumerate() {
        match split {
            Ok(split) => asked.push((index, split)),
            Err(miss) => {
                if is_open(index) && on_answer(index, Err(miss.clone())).is_break() {
                    return Ok(());
                }
            }
        }
    }
    let contexts: Vec<&[u32]> = asked.iter().map(|(_, s)| s.context.as_slice()).collect();
    for group in scorer.groups(&contexts) {
        if !group.items.iter().any(|&i| is_open(asked[i].0)) {
            continue;
        }
        let prefix = scorer.prefix(&contexts[group.items[0]][..group.prefix])?;
        let planted = |i: usize| Planted::new(asked[i].1, group.prefix);
        let rows = |i: usize| planted(i).tree().rows();
        for batch in batches(&group.items, rows, scorer.batch_tokens(), MOST) {
            if !batch.iter().any(|&i| is_open(asked[i].0)) {
                continue;
            }
            let trees: Vec<Planted<'_>> = batch.iter().map(|&i| planted(i)).collect();
            let splits: Vec<&Split> = batch.iter().map(|&i| asked[i].1).collect();
            let found = run(scorer, prefix.as_deref(), &trees, &splits)?;
            for (&i, nats) in batch.iter().zip(found) {
                let (index, split) = asked[i];
                if is_open(index) && on_answer(index, answer(split, nats)).is_break() {
                    return Ok(());
                }
            }
        }
    }
    Ok(())
}

fn answer(split: &Split, nats: Vec<f64>) -> Answer<Likelihoods> {
    if nats.iter().any(|n| n.is_nan()) {
        return Err(miss(
            "non-finite",
            "the model gave logits that are not finite".to_owned(),
        ));
    }
    Ok(Likelihoods {
        nats,
        tokens: split.answers.iter().map(Vec::len).collect(),
        cut: split.cut,
    })
}

/// ln p of each answer of each question of a batch.
fn run<B: Backend>(
    scorer: &LocalScorer<B>,
    prefix: Option<&Cache<B>>,
    trees: &[Planted<'_>],
    splits: &[&Split],
) -> Result<Vec<Vec<f64>>> {
    let trees: Vec<Tree<'_>> = trees.iter().map(Planted::tree).collect();
    let x = scorer.run(prefix, &trees)?;
    let mut wants = Vec::new();
    let mut from = 0;
    for (tree, split) in trees.iter().zip(splits) {
        wants.push(Want {
            row: from + tree.trunk.len() - 1,
            tokens: split.answers.iter().map(|a| a[0]).collect(),
        });
        let others = split.answers.iter().flat_map(|a| &a[1..]);
        wants.extend((from + tree.trunk.len()..).zip(others).map(|(row, token)| Want {
            row,
            tokens: vec![*token],
        }));
        from += tree.rows();
    }
    let mut found = read(scorer, &x, &wants)?.into_iter();
    let mut next = || found.next().unwrap_or_default();
    let sums = splits.iter().map(|split| {
        let mut nats = next();
        for (nats, answer) in nats.iter_mut().zip(&split.answers) {
            *nats += answer[1..].iter().flat_map(|_| next()).sum::<f64>();
        }
        nats
    });
    Ok(sums.collect())
}

/// ln p of the wanted tokens of the wanted rows of the last block's output.
fn read<B: Backend>(scorer: &LocalScorer<B>, x: &B::Tensor, wants: &[Want]) -> Result<Vec<Vec<f64>>> {
    let model = scorer.model();
    let vocabulary = model.decoder().vocabulary;
    let mut found = Vec::with_capacity(wants.len());
    for part in wants.chunks(rows_together(vocabulary)) {
        let rows: Vec<usize> = part.iter().map(|w| w.row).collect();
        let logits = model.logits(x, Some(&rows));
        let wanted: Vec<Vec<u32>> = part.iter().map(|want| want.tokens.clone()).collect();
        let known = wanted
            .iter()
            .flatten()
            .all(|&token| (token as usize) < vocabulary);
        if known && let Some(done) = model.backend().log_probabilities(&logits, &wanted) {
            model.backend().fault()?;
            found.extend(done);
            continue;
        }
        let logits = model.backend().read(&logits)?;
        let one = |(logits, want): (&[f32], &Want)| log_p(logits, &want.tokens);
        found.par_extend(logits.par_chunks_exact(vocabulary).zip(part).map(one));
    }
    Ok(found)
}

/// ln p of the scored tokens of windows.
pub fn windows<B: Backend>(
    scorer: &LocalScorer<B>,
    windows: &[Window],
    on_answer: OnAnswer<'_, Vec<f32>>,
) -> Result<()> {
    let mut asked = Vec::new();
    for (index, window) in windows.iter().enumerate() {
        let answer = match scorer.fits(window) {
            Err(miss) => Err(miss),
            Ok(()) if window.context.max(1) >= window.ids.len() => Ok(Vec::new()),
            Ok(()) => {
                asked.push(index);
                continue;
            }
        };
        if on_answer(index, answer).is_break() {
            return Ok(());
        }
    }
    let rows = |i: usize| windows[i].ids.len() - 1;
    for batch in batches(&asked, rows, scorer.batch_tokens(), MOST) {
        let trees: Vec<Tree<'_>> = batch.iter().map(|&i| trunk(&windows[i])).collect();
        let x = scorer.run(None, &trees)?;
        let mut wants = Vec::new();
        let mut from = 0;
        for &i in &batch {
            let window = &windows[i];
            for at in window.context.max(1)..window.ids.len() {
                wants.push(Want {
                    row: from + at - 1,
                    tokens: vec![window.ids[at]],
                });
            }
            from += rows(i);
        }
        let mut found = read(scorer, &x, &wants)?.into_iter().flatten();
        for &i in &batch {
            let scored = windows[i].ids.len() - windows[i].context.max(1);
            let nats = found.by_ref().take(scored).map(|n| n as f32).collect();
            if let ControlFlow::Break(()) = on_answer(i, Ok(nats)) {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Logits of the scored tokens of one window, (scored, V).
pub fn logits<B: Backend>(scorer: &LocalScorer<B>, window: &Window) -> Result<Vec<f32>> {
    let first = window.context.max(1);
    if first >= window.ids.len() {
        return Ok(Vec::new());
    }
    let x = scorer.run(None, &[trunk(window)])?;
    let model = scorer.model();
    let rows: Vec<usize> = (first - 1..window.ids.len() - 1).collect();
    let mut out = Vec::with_capacity(rows.len() * model.decoder().vocabulary);
    for part in rows.chunks(rows_together(model.decoder().vocabulary)) {
        out.extend(model.backend().read(&model.logits(&x, Some(part)))?);
    }
    Ok(out)
}

/// What the model predicts for one window beside the base's logits, (scored, V).
pub fn beside<B: Backend>(scorer: &LocalScorer<B>, base: &[f32], window: &Window) -> Result<Beside> {
    let (model, targets) = (scorer.model(), window.scored());
    let (backend, vocabulary) = (model.backend(), model.decoder().vocabulary);
    if targets.is_empty() {
        return Ok(Ok(Vec::new()));
    }
    if base.len() != targets.len() * vocabulary {
        return Ok(Err(OtherVocabulary(vocabulary)));
    }
    let x = scorer.run(None, &[trunk(window)])?;
    let first = window.ids.len() - targets.len();
    let rows: Vec<usize> = (first - 1..window.ids.len() - 1).collect();
    let together = rows_together(vocabulary);
    let mut found = Vec::with_capacity(rows.len());
    let parts = rows.chunks(together).zip(targets.chunks(together));
    for ((rows, targets), base) in parts.zip(base.chunks(together * vocabulary)) {
        let logits = model.logits(&x, Some(rows));
        found.extend(backend.divergences(&backend.upload(base, vocabulary), &logits, targets));
        backend.fault()?;
    }
    Ok(Ok(found))
}

/// Logits beside the base's, both (scored, V), on this device.
pub fn compared<B: Backend>(
    backend: &B,
    base: &[f32],
    logits: &[f32],
    targets: &[u32],
) -> Result<Vec<Option<Divergence>>> {
    assert_eq!(base.len(), logits.len(), "equal vocabularies");
    let vocabulary = base.len() / targets.len().max(1);
    let together = rows_together(vocabulary);
    let mut found = Vec::with_capacity(targets.len());
    let width = (together * vocabulary).max(1);
    let parts = base.chunks(width).zip(logits.chunks(width));
    for ((base, logits), targets) in parts.zip(targets.chunks(together)) {
        let (base, logits) = (
            backend.upload(base, vocabulary),
            backend.upload(logits, vocabulary),
        );
        found.extend(backend.divergences(&base, &logits, targets));
        backend.fault()?;
    }
    Ok(found)
}

/// The last token is scored, but nothing after it is.
fn trunk(window: &Window) -> Tree<'_> {
    Tree {
        trunk: &window.ids[..window.ids.len() - 1],
        branches: &[],
    }
}
