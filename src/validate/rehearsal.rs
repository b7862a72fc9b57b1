//! What a run will take, before it is run: a few items of each task are really asked of each model and timed.

use super::{Open, Plan, Ready, opened, prepared};
use crate::Result;
use crate::scorer::Miss;
use crate::scorer::Scorer;
use crate::tasks::answers::{Answers, Said};

/// Questions asked of each model.
pub const SAMPLE: usize = 4;

/// What one task will take.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Rehearsal {
    /// The task.
    pub task: String,
    /// Items that will be scored.
    pub items: usize,
    /// Questions to each model, those for calibration or a threshold included.
    pub questions: usize,
    /// Tokens of all questions for one model, before shared prefixes are counted once; `None` when the model cannot
    /// cut text into tokens.
    pub tokens: Option<u64>,
    /// Label and estimated seconds of each model, from [`SAMPLE`] of its questions.
    pub seconds: Vec<(String, f64)>,
}

/// Rehearses every task of a plan. Nothing is kept.
pub fn run(plan: &Plan, open: Open<'_>) -> Result<Vec<Rehearsal>> {
    let models = opened(plan, open)?;
    let scorers: Vec<&dyn Scorer> = models.iter().map(|m| m.scorer.as_ref()).collect();
    let one = |ready: &Ready| {
        let slots = ready.prepared.slots();
        let mut answers = Answers::unkept(models.len(), slots);
        let sampled: Vec<usize> = (0..SAMPLE.min(slots))
            .map(|i| i * slots / SAMPLE.min(slots))
            .collect();
        for slot in (0..slots).filter(|s| !sampled.contains(s)) {
            for model in 0..models.len() {
                let miss = Miss {
                    kind: "not asked".to_owned(),
                    detail: String::new(),
                };
                answers.restore(model, slot, Said::Miss(miss));
            }
        }
        ready.prepared.ask(&scorers, &mut answers)?;
        let share = slots as f64 / sampled.len().max(1) as f64;
        let tokens = models[0].scorer.abilities().windows.then(|| {
            let count = |text: &str| Ok(models[0].scorer.tokenize(text)?.len());
            ready.prepared.tokens(&count)
        });
        Ok(Rehearsal {
            task: ready.task.name().to_owned(),
            items: ready.prepared.items(),
            questions: slots,
            tokens: tokens.transpose()?,
            seconds: models
                .iter()
                .zip(answers.speeds())
                .map(|(m, speed)| (m.entry.label.clone(), speed.seconds * share))
                .collect(),
        })
    };
    prepared(plan, &models)?.iter().map(one).collect()
}
