//! `divergence`: how far a candidate's next-token distributions are from the base's, token by token, on running text.
//!
//! ```text
//! KL         sum over the vocabulary of p (ln p - ln q), p the base's distribution and q the candidate's, in f64
//! delta p    q - p of the token that stands in the text
//! agreement  share of positions where both find the same token the likeliest (of equal ones, the lowest id)
//! ```
//!
//! **The noise floor** is the same KL with the base's own logits, each rounded to the nearest BF16 (ties to even), in
//! the candidate's place: what a server that keeps its logits in BF16 differs by from one that does not, with no
//! weight quantized. A candidate at the floor cannot be told from the base by such a server.
//!
//! The base and every candidate go through the text window by window, side by side; of logits only those of one window
//! of the base are held, and of the noise floor's. A candidate's are compared where they are computed, be that a GPU
//! (`Backend::divergences`), part by part. Positions where a logit of either is not finite are counted apart.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::answers::{Answers, Said, WindowDivergence};
use super::logits::bf16;
use super::perplexity::fits;
use super::setup::Setup;
use super::windows::Windows;
use super::{Prepared, Reporting, Task};
use crate::report::{DataFile, DetailTable, Histogram, TaskReport, Unit};
use crate::scorer::{Abilities, OtherVocabulary, Scorer};
use crate::statistics::compare::{self, How, Items, bootstrap_statistic};
use crate::{Error, Result};

/// See the module's text.
pub struct Divergence;

impl Task for Divergence {
    fn name(&self) -> &'static str {
        "divergence"
    }

    fn version(&self) -> u32 {
        1
    }

    fn summary(&self) -> &'static str {
        "how far a candidate's next-token distributions are from the base's (KL, agreement)"
    }

    fn data(&self) -> &'static str {
        "a text file, or .jsonl with {\"text\": ..} or {\"ids\": [..]} a line; --window, --stride"
    }

    fn prepare(&self, setup: &Setup, base: &dyn Scorer) -> Result<Box<dyn Prepared>> {
        Ok(Box::new(Compared(Windows::read(self.name(), setup, base)?)))
    }
}

struct Compared(Windows);

/// Name of the baseline of a base against itself in BF16.
pub const NOISE_FLOOR: &str = "noise floor (BF16 logits)";

/// Resamples of quantiles: each walks all tokens.
const QUANTILE_RESAMPLES: usize = 1000;

impl Prepared for Compared {
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
        (!abilities.windows)
            .then(|| "gives no logits of given tokens; it is no causal model run here".to_owned())
    }

    fn by_token(&self) -> bool {
        true
    }

    fn tokens(&self, _count: &dyn Fn(&str) -> Result<usize>) -> Result<u64> {
        Ok(self.0.tokens())
    }

    fn ask(&self, models: &[&dyn Scorer], answers: &mut Answers<'_>) -> Result<()> {
        fits(models, &self.0.windows)?;
        let Some((base, _)) = models.split_first() else {
            return Ok(());
        };
        let open: Vec<Vec<usize>> = (0..models.len()).map(|m| answers.open(m)).collect();
        for (slot, window) in self.0.windows.iter().enumerate() {
            if open.iter().all(|o| o.binary_search(&slot).is_err()) {
                continue;
            }
            let targets = window.scored();
            let mut of_base = Vec::new();
            answers.timed(0, *base, |answers| {
                of_base = base.logits(window)?;
                if open[0].binary_search(&slot).is_ok() {
                    let rounded: Vec<f32> = of_base.iter().map(|l| bf16(*l)).collect();
                    let found = base.compared(&of_base, &rounded, targets)?;
                    let _ = answers.put(0, slot, Said::Divergence(WindowDivergence::of(&found)));
                }
                Ok(())
            })?;
            for (model, scorer) in models.iter().enumerate().skip(1) {
                if open[model].binary_search(&slot).is_err() {
                    continue;
                }
                answers.timed(model, *scorer, |answers| {
                    let found = scorer
                        .beside(&of_base, window)?
                        .map_err(|other| incomparable(other, of_base.len() / targets.len().max(1), model))?;
                    let _ = answers.put(model, slot, Said::Divergence(WindowDivergence::of(&found)));
                    Ok(())
                })?;
            }
        }
        Ok(())
    }

    fn report(&self, answers: &Answers<'_>, how: &Reporting) -> Result<TaskReport> {
        Ok(Found::new(self, answers).report(how))
    }
}

fn incomparable(other: OtherVocabulary, expected: usize, model: usize) -> Error {
    Error::Incomparable {
        base: "the base".to_owned(),
        candidate: format!("candidate {model}"),
        reason: format!("it has a vocabulary of {}, expected {expected}", other.0),
    }
}

/// Everything about the tokens of all models.
struct Found<'a> {
    of: &'a Compared,
    answers: &'a Answers<'a>,
}

impl<'a> Found<'a> {
    fn new(of: &'a Compared, answers: &'a Answers<'a>) -> Self {
        Self { of, answers }
    }

    fn window(&self, model: usize, window: usize) -> Option<&WindowDivergence> {
        match self.answers.get(model, window) {
            Some(Said::Divergence(found)) => Some(found),
            _ => None,
        }
    }

    /// (value, window) of each token, rising.
    fn sorted(&self, model: usize, of: impl Fn(&WindowDivergence) -> &[f32]) -> Vec<(f32, usize)> {
        let windows = (0..self.of.items()).filter_map(|w| Some((self.window(model, w)?, w)));
        let mut all: Vec<(f32, usize)> = windows
            .flat_map(|(found, w)| of(found).iter().map(move |v| (*v, w)))
            .collect();
        all.sort_by(|a, b| a.0.total_cmp(&b.0));
        all
    }

    fn report(&self, how: &Reporting) -> TaskReport {
        let (count, models) = (self.of.items(), self.answers.models());
        // The base's own slots hold the noise floor, which is no value of a column.
        let items = |score: &dyn Fn(&WindowDivergence) -> Option<f64>| Items {
            groups: vec![compare::ALL.to_owned()],
            group_of: vec![0; count],
            scores: (0..models)
                .map(|m| {
                    let of = |w| self.window(m, w).filter(|_| m > 0).and_then(score);
                    (0..count).map(of).collect()
                })
                .collect(),
            weights: Some((0..count).map(|w| self.of.0.scored(w) as f64).collect()),
        };
        let mean = |values: &[f32]| {
            let sum: f64 = values.iter().map(|v| f64::from(*v)).sum();
            (!values.is_empty()).then(|| sum / values.len() as f64)
        };
        let floor = |share: Option<f64>| -> Vec<(String, f64)> {
            let all = self.sorted(0, |d| &d.kl);
            let plain: Vec<f32> = all.iter().map(|v| v.0).collect();
            let value = match share {
                None => mean(&plain),
                Some(share) => quantile(&all, None, share),
            };
            value.map(|v| (NOISE_FLOOR.to_owned(), v)).into_iter().collect()
        };
        let asked = |name: &str, unit, higher, headline, resamples| {
            let mut asked = How {
                resamples,
                ..How::mean(name, unit, Some(higher), how.seed)
            };
            asked.baselines.headline = headline;
            asked
        };
        let kl = items(&|d| mean(&d.kl));
        let of_kl = asked(
            "KL to base",
            Unit::NatsPerToken,
            false,
            floor(None),
            how.resamples,
        );
        let mut metrics = compare::compare(&kl, &of_kl);
        let agreed = |d: &WindowDivergence| (!d.kl.is_empty()).then(|| d.agreed as f64 / d.kl.len() as f64);
        let agreed_floor: (u64, usize) = (0..count)
            .filter_map(|w| self.window(0, w))
            .fold((0, 0), |sum, d| (sum.0 + d.agreed, sum.1 + d.kl.len()));
        let agreed_floor = (agreed_floor.1 > 0).then(|| {
            (
                NOISE_FLOOR.to_owned(),
                agreed_floor.0 as f64 / agreed_floor.1 as f64,
            )
        });
        let of_agreement = asked(
            "top-1 agreement",
            Unit::Share,
            true,
            agreed_floor.into_iter().collect(),
            how.resamples,
        );
        metrics.extend(compare::compare(&items(&agreed), &of_agreement));
        let sorted: Vec<Vec<(f32, usize)>> = (0..models)
            .map(|m| {
                if m == 0 {
                    Vec::new()
                } else {
                    self.sorted(m, |d| &d.kl)
                }
            })
            .collect();
        for (name, share) in [("KL median", 0.5), ("KL p95", 0.95), ("KL p99", 0.99)] {
            let resamples = how.resamples.min(QUANTILE_RESAMPLES);
            let asked = asked(name, Unit::NatsPerToken, false, floor(Some(share)), resamples);
            metrics.push(bootstrap_statistic(
                compare::ALL,
                &vec![0; count],
                &asked,
                |drawn| {
                    let mut times = vec![0_u32; count];
                    drawn.iter().for_each(|&w| times[w] += 1);
                    sorted.iter().map(|s| quantile(s, Some(&times), share)).collect()
                },
            ));
        }
        let non_finite: Vec<u64> = (0..models)
            .map(|m| {
                (0..count)
                    .filter_map(|w| self.window(m, w))
                    .map(|d| d.non_finite)
                    .sum()
            })
            .collect();
        let mut warnings = compare::warnings(&kl, &of_kl, &how.models);
        for (label, number) in how.models.iter().zip(&non_finite).filter(|(_, n)| **n > 0) {
            warnings.push(format!(
                "{label}: {number} positions are not finite in it or the base and are left out"
            ));
        }
        let mut counts = self.answers.misses(count);
        counts.insert("non-finite positions".to_owned(), non_finite);
        let one = |w: usize| {
            let each: Vec<Value> = (0..models).map(|m| json!(self.window(m, w))).collect();
            json!({"window": w, "scored_tokens": self.of.0.scored(w), "models": each})
        };
        TaskReport {
            task: Divergence.name().to_owned(),
            version: Divergence.version(),
            data: self.of.files(),
            settings: self.of.settings(),
            metrics,
            tables: (1..models).map(|m| self.table(m, &sorted[m])).collect(),
            histograms: (1..models).map(|m| histogram(m, &sorted[m])).collect(),
            counts,
            warnings,
            speed: self.answers.speeds().to_vec(),
            items: how.items.then(|| (0..count).map(one).collect()),
        }
    }

    /// The largest KL, and percentiles of delta p.
    fn table(&self, model: usize, kl: &[(f32, usize)]) -> DetailTable {
        let delta = self.sorted(model, |d| &d.delta_p);
        let square: f64 = delta.iter().map(|d| f64::from(d.0).powi(2)).sum();
        let mut rows = vec![
            ("KL, largest".to_owned(), vec![kl.last().map(|v| f64::from(v.0))]),
            (
                "delta p, root mean square".to_owned(),
                vec![(!delta.is_empty()).then(|| (square / delta.len() as f64).sqrt())],
            ),
        ];
        for (name, share) in [
            ("p1", 0.01),
            ("p5", 0.05),
            ("median", 0.5),
            ("p95", 0.95),
            ("p99", 0.99),
        ] {
            rows.push((format!("delta p, {name}"), vec![quantile(&delta, None, share)]));
        }
        DetailTable {
            name: "per token".to_owned(),
            model,
            columns: vec!["value".to_owned()],
            rows,
        }
    }
}

/// The smallest value that at least `share` of all do not exceed (no interpolation); each token counted as often as
/// its window was drawn.
fn quantile(sorted: &[(f32, usize)], times: Option<&[u32]>, share: f64) -> Option<f64> {
    let weight = |window: usize| times.map_or(1, |t| u64::from(t[window]));
    let total: u64 = sorted.iter().map(|(_, w)| weight(*w)).sum();
    let rank = ((share * total as f64).ceil() as u64).max(1);
    let mut before = 0;
    for (value, window) in sorted {
        before += weight(*window);
        if before >= rank {
            return Some(f64::from(*value));
        }
    }
    None
}

/// Tokens by log10 of their KL, in bins of a quarter; the first and last hold what is beyond.
fn histogram(model: usize, sorted: &[(f32, usize)]) -> Histogram {
    let edges: Vec<f64> = (0..=32).map(|i| -7.0 + f64::from(i) / 4.0).collect();
    let mut counts = vec![0; edges.len() - 1];
    for (value, _) in sorted {
        let log = f64::from(*value).max(1e-30).log10();
        let bin = ((log + 7.0) * 4.0).floor().clamp(0.0, 31.0);
        counts[bin as usize] += 1;
    }
    Histogram {
        name: "log10 of KL to base in nats, over tokens".to_owned(),
        model,
        edges,
        counts,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_by_hand() {
        let sorted: Vec<(f32, usize)> = (1..=10).map(|i| (i as f32, usize::from(i > 5))).collect();
        assert_eq!(quantile(&sorted, None, 0.5), Some(5.0));
        assert_eq!(quantile(&sorted, None, 0.95), Some(10.0));
        assert_eq!(quantile(&sorted, Some(&[0, 2]), 0.5), Some(8.0));
        assert_eq!(quantile(&sorted, Some(&[0, 0]), 0.5), None);
        let counts = histogram(1, &[(0.0, 0), (1.0, 0), (100.0, 0)]).counts;
        assert_eq!((counts[0], counts[28], counts[31]), (1, 1, 1));
    }
}
