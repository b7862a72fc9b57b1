//! Greedy replies, many at a time: prompts run in batches, then every sequence grows by a token a step. Owns
//! when a reply ends, and the mask that keeps it to the replies allowed.
//!
//! A reply ends before an id that ends replies (`eos_token_id` of `generation_config.json` or `config.json`, the
//! tokenizer's end of text), before a stop string, or after `most` tokens. Where only some replies are allowed,
//! each step chooses among the tokens that lead to one of them; a reply that is complete but begins a longer one
//! ends where the model prefers an end to what the longer one goes on with. Those replies are never cut.

use std::fs;
use std::ops::ControlFlow;

use qtool_formats::FormatError;
use qtool_kernels::Backend;
use rayon::prelude::*;
use serde_json::Value;

use super::border::{Split, miss};
use super::local::LocalScorer;
use super::sharing::batches;
use super::softmax::greatest;
use crate::model::{Cache, Model};
use crate::scorer::{Answer, OnAnswer, Reply, Request};
use crate::tokenizer::Tokenizer;
use crate::{Error, Result};

/// Most replies that grow together.
const TOGETHER: usize = 64;

/// Ids that end a reply.
pub fn stop_ids<B: Backend>(model: &Model<B>, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
    let path = model.source().path().join("generation_config.json");
    let generation: Value = match fs::read(&path) {
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| Error::Source {
            path: path.clone(),
            reason: format!("no JSON: {e}"),
        })?,
        // Beside a model that is one file there is none.
        Err(e)
            if matches!(
                e.kind(),
                std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
            ) =>
        {
            Value::Null
        }
        Err(e) => return Err(FormatError::io(&path, "read")(e).into()),
    };
    let mut ids: Vec<u32> = Vec::from_iter(tokenizer.ids().eos);
    for config in [&generation, model.source().config()] {
        let one = |v: &Value| v.as_u64().and_then(|id| u32::try_from(id).ok());
        match config.get("eos_token_id") {
            Some(Value::Array(many)) => ids.extend(many.iter().filter_map(one)),
            Some(value) => ids.extend(one(value)),
            None => {}
        }
    }
    ids.sort_unstable();
    ids.dedup();
    Ok(ids)
}

/// A reply in progress.
struct Growing<'a> {
    index: usize,
    slot: usize,
    request: &'a Request,
    split: &'a Split,
    ids: Vec<u32>,
}

/// What became of a reply in one step.
enum Step {
    Goes(u32),
    Ends(Answer<String>),
}

impl Growing<'_> {
    fn step(&mut self, logits: &[f32], tokenizer: &Tokenizer, stops: &[u32]) -> Result<Step> {
        if !logits.iter().all(|l| l.is_finite()) {
            let detail = "the model gave logits that are not finite".to_owned();
            return Ok(Step::Ends(Err(miss("non-finite", detail))));
        }
        match &self.request.allowed {
            None => self.free(logits, tokenizer, stops),
            Some(allowed) => Ok(self.kept_to(allowed, logits, stops)),
        }
    }

    fn kept_to(&mut self, allowed: &[String], logits: &[f32], stops: &[u32]) -> Step {
        let at = self.ids.len();
        let open = |ids: &[u32]| -> Vec<usize> {
            let leads = |i: &usize| self.split.answers[*i].starts_with(ids);
            (0..allowed.len()).filter(leads).collect()
        };
        let now = open(&self.ids);
        let complete = now.iter().copied().find(|&i| self.split.answers[i].len() == at);
        let leads = |id: u32| now.iter().any(|&i| self.split.answers[i].get(at) == Some(&id));
        let may_end = |id: u32| complete.is_some() && stops.contains(&id);
        let Some(id) = greatest(logits, |id| leads(id) || may_end(id)) else {
            let detail = "the tokens of the allowed replies are beyond the model's vocabulary".to_owned();
            return Step::Ends(Err(miss("vocabulary", detail)));
        };
        if let Some(done) = complete.filter(|_| !leads(id)) {
            return Step::Ends(Ok(allowed[done].clone()));
        }
        self.ids.push(id);
        let left = open(&self.ids);
        let whole = |i: &usize| self.split.answers[*i].len() == self.ids.len();
        let ended = left.iter().copied().find(whole);
        let only = (left.len() == 1).then(|| left[0]);
        // Nothing is left to choose, or nothing could tell the shorter reply's end.
        match only.or(ended.filter(|_| stops.is_empty() || left.iter().all(whole))) {
            Some(i) => Step::Ends(Ok(allowed[i].clone())),
            None => Step::Goes(id),
        }
    }

    fn free(&mut self, logits: &[f32], tokenizer: &Tokenizer, stops: &[u32]) -> Result<Step> {
        let id = greatest(logits, |_| true).filter(|id| !stops.contains(id));
        let Some(id) = id else {
            return Ok(Step::Ends(Ok(tokenizer.decode(&self.ids, true)?)));
        };
        self.ids.push(id);
        let text = tokenizer.decode(&self.ids, true)?;
        let stop = self.request.stop.iter().filter(|s| !s.is_empty());
        if let Some(end) = stop.filter_map(|s| text.find(s.as_str())).min() {
            return Ok(Step::Ends(Ok(text[..end].to_owned())));
        }
        if self.ids.len() >= self.request.most {
            return Ok(Step::Ends(Ok(text)));
        }
        Ok(Step::Goes(id))
    }
}

/// Answers requests, in the order in which they end.
pub fn replies<B: Backend>(
    scorer: &LocalScorer<B>,
    requests: &[Request],
    splits: &[Answer<Split>],
    on_answer: OnAnswer<'_, Reply>,
) -> Result<()> {
    let mut asked = Vec::new();
    for (index, (request, split)) in requests.iter().zip(splits).enumerate() {
        let at_once = match (split, &request.allowed) {
            (Err(miss), _) => Err(miss.clone()),
            (Ok(_), Some(allowed)) if allowed.is_empty() => Err(miss(
                "nothing allowed",
                "the list of allowed replies is empty".to_owned(),
            )),
            (Ok(split), None) if request.most == 0 => Ok(Reply {
                text: String::new(),
                cut: split.cut,
            }),
            (Ok(split), _) => {
                asked.push((index, split));
                continue;
            }
        };
        if on_answer(index, at_once).is_break() {
            return Ok(());
        }
    }
    let contexts: Vec<&[u32]> = asked.iter().map(|(_, s)| s.context.as_slice()).collect();
    for group in scorer.groups(&contexts) {
        let prefix = scorer.prefix(&contexts[group.items[0]][..group.prefix])?;
        let room = |i: usize| {
            let (index, split) = asked[i];
            let longest = split.answers.iter().map(Vec::len).max();
            split.context.len() - group.prefix + longest.unwrap_or(requests[index].most)
        };
        let decoder = scorer.model().decoder();
        let row_bytes = 8 * decoder.heads.kv * decoder.heads.dim * decoder.blocks;
        let budget = scorer.options().reply_bytes / row_bytes;
        for batch in batches(&group.items, room, budget, TOGETHER) {
            let growing = batch.iter().enumerate().map(|(slot, &i)| Growing {
                index: asked[i].0,
                slot,
                request: &requests[asked[i].0],
                split: asked[i].1,
                ids: Vec::new(),
            });
            let rooms: Vec<usize> = batch.iter().map(|&i| room(i)).collect();
            let flow = run(scorer, prefix.as_deref(), growing.collect(), &rooms, on_answer)?;
            if flow.is_break() {
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Grows the replies of one batch to their ends.
fn run<B: Backend>(
    scorer: &LocalScorer<B>,
    prefix: Option<&Cache<B>>,
    mut growing: Vec<Growing<'_>>,
    rooms: &[usize],
    on_answer: OnAnswer<'_, Reply>,
) -> Result<ControlFlow<()>> {
    let model = scorer.model();
    let shared = prefix.map_or(0, Cache::len);
    let mut slots = model.slots(prefix, rooms);
    let mut next: Vec<(usize, Vec<u32>)> = growing
        .iter()
        .map(|g| (g.slot, g.split.context[shared..].to_vec()))
        .collect();
    while !growing.is_empty() {
        let lengths: Vec<usize> = next.iter().map(|(_, ids)| ids.len()).collect();
        let order: Vec<usize> = (0..next.len()).collect();
        let vocabulary = model.decoder().vocabulary;
        let mut logits = vec![Vec::new(); next.len()];
        for part in batches(&order, |i| lengths[i], scorer.batch_tokens(), TOGETHER) {
            let tokens = part.iter().map(|&i| (next[i].0, next[i].1.as_slice()));
            let tokens: Vec<(usize, &[u32])> = tokens.collect();
            scorer.count(part.iter().map(|&i| lengths[i]).sum());
            let rows = model.backend().read(&model.grow(&mut slots, &tokens)?)?;
            for (&i, row) in part.iter().zip(rows.chunks_exact(vocabulary)) {
                logits[i] = row.to_vec();
            }
        }
        let step =
            |(g, logits): (&mut Growing<'_>, &Vec<f32>)| g.step(logits, scorer.tokenizer(), scorer.stops());
        let steps = growing.par_iter_mut().zip(&logits).map(step);
        let steps = steps.collect::<Result<Vec<Step>>>()?;
        next.clear();
        let mut still = Vec::new();
        for (g, step) in growing.into_iter().zip(steps) {
            match step {
                Step::Goes(id) => {
                    next.push((g.slot, vec![id]));
                    still.push(g);
                }
                Step::Ends(text) => {
                    let cut = g.split.cut;
                    let reply = text.map(|text| Reply { text, cut });
                    if on_answer(g.index, reply).is_break() {
                        return Ok(ControlFlow::Break(()));
                    }
                }
            }
        }
        growing = still;
    }
    Ok(ControlFlow::Continue(()))
}
