//! `perplexity`: how surprised a model is by running text.
//!
//! ```text
//! nats a token   sum of -ln p over all scored tokens / their number
//! perplexity     exp of it
//! bits a byte    sum of -log2 p / UTF-8 bytes of the scored text: comparable between tokenizers
//! ```
//!
//! Intervals resample windows. Positions whose logits are not finite are counted apart.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::answers::{Answers, Said, WindowSum, said};
use super::setup::Setup;
use super::windows::Windows;
use super::{Prepared, Reporting, Task};
use crate::report::{DataFile, TaskReport, Unit};
use crate::scorer::{Abilities, Scorer, Window};
use crate::statistics::compare::{self, How, Items};
use crate::{Error, Result};

/// See the module's text.
pub struct Perplexity;

impl Task for Perplexity {
    fn name(&self) -> &'static str {
        "perplexity"
    }

    fn version(&self) -> u32 {
        1
    }

    fn summary(&self) -> &'static str {
        "how surprised a model is by running text, in nats a token and bits a byte"
    }

    fn data(&self) -> &'static str {
        "a text file, or .jsonl with {\"text\": ..} or {\"ids\": [..]} a line; --window, --stride"
    }

    fn prepare(&self, setup: &Setup, base: &dyn Scorer) -> Result<Box<dyn Prepared>> {
        Ok(Box::new(Scored(Windows::read(self.name(), setup, base)?)))
    }
}

struct Scored(Windows);

/// Fails when a model's context is shorter than the windows.
pub(super) fn fits(models: &[&dyn Scorer], windows: &[Window]) -> Result<()> {
    let longest = windows.iter().map(|w| w.ids.len()).max().unwrap_or(0);
    for (model, scorer) in models.iter().enumerate() {
        if let Some(context) = scorer.context().filter(|c| longest > *c) {
            return Err(Error::Unsuited {
                model: format!("model {}", model + 1),
                reason: format!(
                    "has a context of {context} tokens, the windows have {longest}; pass a smaller --window"
                ),
            });
        }
    }
    Ok(())
}

impl Prepared for Scored {
    fn files(&self) -> Vec<DataFile> {
        self.0.files.clone()
    }

    fn settings(&self) -> BTreeMap<String, Value> {
        self.0.settings.clone()
    }

    fn items(&self) -> usize {
        self.0.windows.len()
    }

    fn slots(&self) -> usize {
        self.0.windows.len()
    }

    fn lacks(&self, abilities: &Abilities) -> Option<String> {
        (!abilities.windows).then(|| "does not score given tokens; it is no causal model run here".to_owned())
    }

    fn by_token(&self) -> bool {
        true
    }

    fn tokens(&self, _count: &dyn Fn(&str) -> Result<usize>) -> Result<u64> {
        Ok(self.0.tokens())
    }

    fn ask(&self, models: &[&dyn Scorer], answers: &mut Answers<'_>) -> Result<()> {
        fits(models, &self.0.windows)?;
        for (model, scorer) in models.iter().enumerate() {
            let open = answers.open(model);
            if open.is_empty() {
                continue;
            }
            let asked: Vec<Window> = open.iter().map(|&i| self.0.windows[i].clone()).collect();
            answers.timed(model, *scorer, |answers| {
                scorer.windows(&asked, &mut |i, answer| {
                    let said = said(answer, |ln_p| Said::Window(WindowSum::of(&ln_p)));
                    answers.put(model, open[i], said)
                })
            })?;
        }
        Ok(())
    }

    fn report(&self, answers: &Answers<'_>, how: &Reporting) -> Result<TaskReport> {
        let count = self.items();
        let sum = |model: usize, window: usize| match answers.get(model, window) {
            Some(Said::Window(sum)) if sum.tokens > 0 => Some(*sum),
            _ => None,
        };
        let models = answers.models();
        // A window without finite positions has no mean; weights are those of the text, the same for all models.
        let scores = |f: &dyn Fn(WindowSum, usize) -> f64| -> Vec<Vec<Option<f64>>> {
            let one = |model| (0..count).map(|w| sum(model, w).map(|s| f(s, w))).collect();
            (0..models).map(one).collect()
        };
        let items = |scores, weights| Items {
            groups: vec![compare::ALL.to_owned()],
            group_of: vec![0; count],
            scores,
            weights: Some(weights),
        };
        let mean = |name: &str, unit| How {
            resamples: how.resamples,
            ..How::mean(name, unit, Some(false), how.seed)
        };
        let nats = items(
            scores(&|s, _| s.nats / s.tokens as f64),
            (0..count).map(|w| self.0.scored(w) as f64).collect(),
        );
        let mut metrics = compare::compare(&nats, &mean("perplexity", Unit::Perplexity));
        metrics.extend(compare::compare(
            &nats,
            &mean("nats per token", Unit::NatsPerToken),
        ));
        if let Some(bytes) = &self.0.bytes {
            // Nats of finite positions stand for all of the window's.
            let bits = |s: WindowSum, w: usize| {
                s.nats / s.tokens as f64 * self.0.scored(w) as f64 / std::f64::consts::LN_2 / bytes[w]
            };
            let bits = items(scores(&bits), bytes.clone());
            metrics.extend(compare::compare(&bits, &mean("bits per byte", Unit::BitsPerByte)));
        }
        let non_finite: Vec<u64> = (0..models)
            .map(|m| {
                let of = |w| match answers.get(m, w) {
                    Some(Said::Window(sum)) => sum.non_finite,
                    _ => 0,
                };
                (0..count).map(of).sum()
            })
            .collect();
        let mut counts = answers.misses(count);
        counts.insert("non-finite positions".to_owned(), non_finite.clone());
        let mut warnings = compare::warnings(&nats, &mean("nats per token", Unit::NatsPerToken), &how.models);
        for (label, number) in how.models.iter().zip(&non_finite).filter(|(_, n)| **n > 0) {
            warnings.push(format!(
                "{label}: {number} positions are not finite and are left out"
            ));
        }
        let one = |w: usize| {
            let each: Vec<Value> = (0..models).map(|m| json!(sum(m, w).map(|s| s.nats))).collect();
            json!({"window": w, "scored_tokens": self.0.scored(w), "nats": each})
        };
        Ok(TaskReport {
            task: Perplexity.name().to_owned(),
            version: Perplexity.version(),
            data: self.files(),
            settings: self.settings(),
            metrics,
            counts,
            warnings,
            speed: answers.speeds().to_vec(),
            items: how.items.then(|| (0..count).map(one).collect()),
            ..TaskReport::default()
        })
    }
}

impl WindowSum {
    /// Of ln p of each scored token.
    pub fn of(ln_p: &[f32]) -> Self {
        let finite = ln_p.iter().filter(|p| p.is_finite());
        let tokens = finite.clone().count() as u64;
        Self {
            nats: finite.map(|p| -f64::from(*p)).sum(),
            tokens,
            non_finite: ln_p.len() as u64 - tokens,
        }
    }
}
