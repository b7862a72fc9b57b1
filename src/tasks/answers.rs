//! What was answered: one slot a question and model, filled in any order, each answer handed to whoever keeps it.
//! Owns the bookkeeping of a task's run; where answers are kept (`src/validate/journal.rs`) is not known here.

use std::ops::ControlFlow;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::report::Speed;
use crate::scorer::{Likelihoods, Miss, Reply, Scorer};
use crate::{Error, Result, interrupt};

/// One answer, as it is kept. Numbers are finite: what is not becomes a [`Miss`] or a count.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Said {
    /// How likely each answer is.
    Likelihoods(Likelihoods),
    /// A reply.
    Reply(Reply),
    /// Logits of a classification head.
    Head(Vec<f32>),
    /// Cosine of two texts.
    Cosine(f64),
    /// Likelihood of a window.
    Window(WindowSum),
    /// A window of the base and of a candidate beside each other.
    Divergence(WindowDivergence),
    /// No answer.
    Miss(Miss),
}

/// Likelihood of one window.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct WindowSum {
    /// Sum of -ln p over its finite scored tokens.
    pub nats: f64,
    /// Scored tokens that are finite.
    pub tokens: u64,
    /// Scored tokens that are not.
    pub non_finite: u64,
}

/// Per scored token of one window, non-finite positions left out.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct WindowDivergence {
    /// KL(base || candidate) in nats.
    pub kl: Vec<f32>,
    /// Candidate's p of the true token minus the base's.
    pub delta_p: Vec<f32>,
    /// Tokens where both find the same token the likeliest.
    pub agreed: u64,
    /// Positions where a logit of either is not finite.
    pub non_finite: u64,
}

/// Called with model, slot and answer, before the answer counts.
pub type Keep<'a> = Box<dyn FnMut(usize, usize, &Said) -> Result<()> + 'a>;

/// All answers of a task.
pub struct Answers<'a> {
    said: Vec<Vec<Option<Said>>>,
    keep: Keep<'a>,
    speeds: Vec<Speed>,
    failed: Option<Error>,
}

impl<'a> Answers<'a> {
    /// Nothing answered yet.
    pub fn new(models: usize, slots: usize, keep: Keep<'a>) -> Self {
        Self {
            said: vec![vec![None; slots]; models],
            keep,
            speeds: vec![
                Speed {
                    items: 0,
                    tokens: 0,
                    seconds: 0.0
                };
                models
            ],
            failed: None,
        }
    }

    /// Nothing answered yet, and nothing kept.
    pub fn unkept(models: usize, slots: usize) -> Self {
        Self::new(models, slots, Box::new(|_, _, _| Ok(())))
    }

    /// Puts in an answer of an earlier run. Gives whether the slot exists.
    pub fn restore(&mut self, model: usize, slot: usize, said: Said) -> bool {
        let place = self.said.get_mut(model).and_then(|m| m.get_mut(slot));
        place.map(|p| *p = Some(said)).is_some()
    }

    /// Slots without an answer.
    pub fn open(&self, model: usize) -> Vec<usize> {
        let slots = self.said[model].iter().enumerate();
        slots.filter(|(_, s)| s.is_none()).map(|(i, _)| i).collect()
    }

    /// Answers there are.
    pub fn len(&self) -> usize {
        self.said.iter().flatten().flatten().count()
    }

    /// Whether nothing is answered.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Keeps an answer. Breaks off after a failure to keep it, or when ctrl-C was pressed.
    pub fn put(&mut self, model: usize, slot: usize, said: Said) -> ControlFlow<()> {
        if let Err(error) = (self.keep)(model, slot, &said) {
            self.failed = Some(error);
            return ControlFlow::Break(());
        }
        self.said[model][slot] = Some(said);
        self.speeds[model].items += 1;
        if interrupt::requested() {
            self.failed = Some(Error::Interrupted);
            return ControlFlow::Break(());
        }
        ControlFlow::Continue(())
    }

    /// Runs `work` and counts its time and tokens as the model's. Fails when `work` does, or was broken off.
    pub fn timed(
        &mut self,
        model: usize,
        scorer: &dyn Scorer,
        work: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let (started, tokens) = (Instant::now(), scorer.tokens_run());
        let outcome = work(self);
        let speed = &mut self.speeds[model];
        speed.seconds += started.elapsed().as_secs_f64();
        speed.tokens += scorer.tokens_run().saturating_sub(tokens);
        outcome?;
        self.failed.take().map_or(Ok(()), Err)
    }

    /// The answer in a slot.
    pub fn get(&self, model: usize, slot: usize) -> Option<&Said> {
        self.said.get(model)?.get(slot)?.as_ref()
    }

    /// Models there are.
    pub fn models(&self) -> usize {
        self.said.len()
    }

    /// How fast each model was in this run.
    pub fn speeds(&self) -> &[Speed] {
        &self.speeds
    }

    /// Misses of each model among its first `slots`, by kind.
    pub fn misses(&self, slots: usize) -> std::collections::BTreeMap<String, Vec<u64>> {
        let mut counts = std::collections::BTreeMap::new();
        for (model, said) in self.said.iter().enumerate() {
            for answer in said.iter().take(slots) {
                if let Some(Said::Miss(miss)) = answer {
                    let count = counts
                        .entry(format!("no answer: {}", miss.kind))
                        .or_insert_with(|| vec![0; self.said.len()]);
                    count[model] += 1;
                }
            }
        }
        counts
    }
}

/// An answer, or a miss with its kind.
pub fn said<T>(answer: crate::scorer::Answer<T>, wrap: impl FnOnce(T) -> Said) -> Said {
    answer.map_or_else(Said::Miss, wrap)
}

/// The miss of an answer with NaN or infinity in it.
pub fn non_finite(detail: &str) -> Said {
    Said::Miss(Miss {
        kind: "non-finite".to_owned(),
        detail: detail.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_come_back_from_json_bit_for_bit() {
        for said in [
            Said::Likelihoods(Likelihoods {
                nats: vec![-0.1, -1.0 / 3.0, -1e-300],
                tokens: vec![1, 2, 3],
                cut: 4,
            }),
            Said::Head(vec![0.1, -3.4e-38, 16_777_217.0]),
            Said::Cosine(2.0_f64.sqrt()),
            Said::Divergence(WindowDivergence {
                kl: vec![1.0e-7, 0.3],
                delta_p: vec![-0.7],
                agreed: 1,
                non_finite: 2,
            }),
        ] {
            let text = serde_json::to_string(&said).unwrap();
            assert_eq!(serde_json::from_str::<Said>(&text).unwrap(), said, "{text}");
        }
    }

    #[test]
    fn slots_are_filled_once_and_a_failure_to_keep_breaks_off() {
        let keep = |_: usize, slot: usize, _: &Said| {
            if slot == 2 {
                Err(Error::Interrupted)
            } else {
                Ok(())
            }
        };
        let mut answers = Answers::new(1, 3, Box::new(keep));
        assert!(answers.restore(0, 0, Said::Cosine(0.5)) && !answers.restore(0, 3, Said::Cosine(0.5)));
        assert_eq!(answers.open(0), [1, 2]);
        assert!(answers.put(0, 1, non_finite("x")).is_continue());
        assert!(answers.put(0, 2, Said::Cosine(0.5)).is_break());
        assert_eq!((answers.len(), answers.open(0)), (2, vec![2]));
        assert_eq!(answers.misses(3)["no answer: non-finite"], [1]);
    }
}
