//! From scores to rows of a report: every model's value, every candidate's difference from the base, and what may be
//! said about them. The entry point for tasks.
//!
//! An item that a model gave no answer to is no evidence about that model: it is left out of its value, and out of
//! every pair the model is part of; it is never counted as wrong. So a difference may be of fewer items than the
//! values beside it. [`missing`] counts such items and [`warnings`] words them, with what the share would be if they
//! counted as wrong; a task shows both.

use super::baselines::Baselines;
use super::holm::holm;
use super::proportion::{mcnemar, wilson};
use super::resample::{self, RESAMPLES, Resampling};
use super::sample::{Sample, Stratum};
use super::{LEVEL, power, signs};
use crate::report::{Delta, Interval, Metric, Unit};

pub use super::recomputed::bootstrap_statistic;

/// Row that averages over groups.
pub const MACRO: &str = "macro average";
/// Row over all items.
pub const ALL: &str = "all";

/// Scores of several models on the same items.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Items {
    /// Names of the groups (kinds, classes), in the order of the table; one for ungrouped items.
    pub groups: Vec<String>,
    /// Group of each item.
    pub group_of: Vec<usize>,
    /// One list a model, the base first; one score an item. `None`, NaN and infinity are "no answer". 0 to 1 for
    /// [`Unit::Share`]; nats per token for [`Unit::Perplexity`].
    pub scores: Vec<Vec<Option<f64>>>,
    /// Weight of each item: its tokens or bytes where scores are means over them.
    pub weights: Option<Vec<f64>>,
}

/// What the scores are.
#[derive(Debug, Clone, PartialEq)]
pub struct How {
    /// Name of the metric: `accuracy`, `KL to base` ...
    pub name: String,
    /// Its unit.
    pub unit: Unit,
    /// Whether more is better; `None` when neither is, and then no model is best.
    pub higher_is_better: Option<bool>,
    /// Whether the first row is the mean over groups, each counting the same, instead of the mean over items.
    pub macro_average: bool,
    /// Scores are 0 or 1: Wilson's interval and the exact McNemar test where items count the same.
    pub binary: bool,
    /// Shown beside the rows.
    pub baselines: Baselines,
    /// Seed of everything drawn.
    pub seed: u64,
    /// Resamples of each bootstrap and flips of each permutation test.
    pub resamples: usize,
}

impl How {
    /// Accuracy: right or wrong, a macro average over groups, [`RESAMPLES`] resamples.
    pub fn accuracy(baselines: Baselines, seed: u64) -> Self {
        Self {
            name: "accuracy".to_owned(),
            unit: Unit::Share,
            higher_is_better: Some(true),
            macro_average: true,
            binary: true,
            baselines,
            seed,
            resamples: RESAMPLES,
        }
    }

    /// A mean of real-valued scores.
    pub fn mean(name: &str, unit: Unit, higher_is_better: Option<bool>, seed: u64) -> Self {
        let accuracy = Self::accuracy(Baselines::default(), seed);
        Self {
            name: name.to_owned(),
            unit,
            higher_is_better,
            binary: false,
            macro_average: false,
            ..accuracy
        }
    }

    pub(crate) fn resampling(&self) -> Resampling {
        Resampling::new(self.seed, self.resamples)
    }
}

/// Rows of the table: the macro average (or `all`), then each group; `all` alone where there is one group.
///
/// - **Values**: Wilson's interval for right-or-wrong items of one group; else the bootstrap's, within groups.
/// - **Deltas** of the items that both models answered: bootstrap interval; p by the exact McNemar test for
///   right-or-wrong items of one group, else by sign flips; Holm's correction over the groups, for each candidate by
///   itself, so that no verdict on one depends on which others stand beside it. The first row is the headline, tested
///   alone. A delta is noise unless its corrected p is below 5 % and its interval leaves out 0.
/// - **Perplexity**: values are exp of the mean, deltas are ratios, candidate over base, with 1 for no difference.
/// - **Detectable**: of the candidate with the most disagreement, see [`power`].
/// - **Best**: better than every other model at 5 %, corrected over rows and rivals.
///
/// A macro average is `None` for a model without an answer in some group. Panics when the lists differ in length or
/// name a group that is not there, which is a mistake of the calling task.
pub fn compare(items: &Items, how: &How) -> Vec<Metric> {
    let n = items.group_of.len();
    assert!(
        items.scores.iter().all(|s| s.len() == n),
        "one score for each model and item"
    );
    assert!(
        items.weights.as_ref().is_none_or(|w| w.len() == n),
        "one weight for each item"
    );
    let mut members = vec![Vec::new(); items.groups.len()];
    for (item, &group) in items.group_of.iter().enumerate() {
        members[group].push(item);
    }
    let everything = vec![(0..n).collect::<Vec<usize>>()];
    let mut rows = Vec::new();
    let headline = if members.len() > 1 && how.macro_average {
        (MACRO, &members)
    } else {
        (ALL, &everything)
    };
    let row = |name: &str, strata: &[Vec<usize>], baselines: &[(String, f64)]| {
        Row { items, how, strata }.metric(name, baselines)
    };
    let one = how
        .baselines
        .groups
        .first()
        .filter(|_| members.len() == 1 && how.baselines.headline.is_empty());
    rows.push(row(
        headline.0,
        headline.1,
        one.unwrap_or(&how.baselines.headline),
    ));
    if members.len() > 1 {
        for (group, name) in items.groups.iter().enumerate() {
            let baselines = how.baselines.groups.get(group).map_or(&[][..], Vec::as_slice);
            rows.push(row(name, std::slice::from_ref(&members[group]), baselines));
        }
    }
    correct(&mut rows);
    let (first, rest) = rows.split_at_mut(1);
    mark_best(first);
    mark_best(rest);
    rows.into_iter().map(|r| r.metric).collect()
}

/// A row with what its corrections need.
struct Tested {
    metric: Metric,
    /// The model with the best value, and p of it against each other model, where there is one.
    leader: Option<(usize, Vec<f64>)>,
}

/// One row in the making.
struct Row<'a> {
    items: &'a Items,
    how: &'a How,
    strata: &'a [Vec<usize>],
}

impl Row<'_> {
    fn metric(&self, name: &str, baselines: &[(String, f64)]) -> Tested {
        let models = self.items.scores.len();
        let values: Vec<Option<Interval>> = (0..models).map(|m| self.value(m)).collect();
        let pairs: Vec<Option<Sample>> = (0..models)
            .map(|m| if m == 0 { None } else { self.pair(m, 0) })
            .collect();
        let leader = self
            .how
            .higher_is_better
            .and_then(|higher| self.leader(&values, higher));
        let items: usize = self.strata.iter().map(Vec::len).sum();
        let metric = Metric {
            group: name.to_owned(),
            name: self.how.name.clone(),
            unit: self.how.unit,
            higher_is_better: self.how.higher_is_better,
            items,
            baselines: baselines.to_vec(),
            detectable: self.detectable(&pairs, &values),
            deltas: pairs.iter().map(|p| p.as_ref().map(|p| self.delta(p))).collect(),
            missing: self.missing(),
            values,
            best: None,
        };
        Tested { metric, leader }
    }

    /// Whether the items are coins of equal weight, for which there are exact formulas.
    fn exact(&self) -> bool {
        self.how.binary && self.strata.len() == 1 && self.items.weights.is_none()
    }

    fn sample(&self, score: impl Fn(usize) -> Option<f64>) -> Option<Sample> {
        let weight = |item: usize| self.items.weights.as_ref().map_or(1.0, |w| w[item]);
        let stratum = |members: &Vec<usize>| {
            let mut stratum = Stratum::default();
            for &item in members {
                if let Some(score) = score(item).filter(|s| s.is_finite()) {
                    stratum.values.push(score);
                    stratum.weights.push(weight(item));
                }
            }
            stratum
        };
        Sample::new(self.strata.iter().map(stratum).collect())
    }

    /// Differences of two models on what both answered.
    fn pair(&self, of: usize, from: usize) -> Option<Sample> {
        let (of, from) = (&self.items.scores[of], &self.items.scores[from]);
        self.sample(|item| Some(of[item]? - from[item]?))
    }

    fn value(&self, model: usize) -> Option<Interval> {
        let scores = &self.items.scores[model];
        let sample = self.sample(|item| scores[item])?;
        let found = if self.exact() {
            let right = sample.terms().filter(|(_, v)| *v > 0.5).count();
            wilson(right as u64, sample.items() as u64)?
        } else {
            resample::mean(&sample, self.how.binary, self.how.resampling())
        };
        Some(self.shown(found, 0.0))
    }

    fn delta(&self, pair: &Sample) -> Delta {
        let interval = resample::mean(pair, self.how.binary, self.how.resampling());
        let p = self.p(pair);
        Delta {
            interval: self.shown(interval, -1.0),
            p: Some(p),
            p_holm: None,
            noise: p >= LEVEL || (interval.low <= 0.0 && interval.high >= 0.0),
        }
    }

    fn p(&self, pair: &Sample) -> f64 {
        if self.exact() {
            let side = |s: f64| pair.terms().filter(|(_, v)| v * s > 0.5).count() as u64;
            mcnemar(side(1.0), side(-1.0))
        } else {
            signs::flip(pair, self.how.seed, self.how.resamples)
        }
    }

    /// An interval in the metric's unit: shares end at `least` and 1.
    fn shown(&self, found: Interval, least: f64) -> Interval {
        let each = |f: &dyn Fn(f64) -> f64| Interval {
            value: f(found.value),
            low: f(found.low),
            high: f(found.high),
        };
        match self.how.unit {
            Unit::Perplexity => each(&f64::exp),
            Unit::Share => each(&|x| x.clamp(least, 1.0)),
            _ => found,
        }
    }

    /// Items of the row without an answer, for each model; 0 for one that answers nothing anywhere.
    fn missing(&self) -> Vec<u64> {
        let answered = |s: &Option<f64>| s.is_some_and(f64::is_finite);
        let of = |scores: &Vec<Option<f64>>| {
            let gone = self
                .strata
                .iter()
                .flatten()
                .filter(|&&i| !answered(&scores[i]))
                .count();
            if scores.iter().any(answered) {
                gone as u64
            } else {
                0
            }
        };
        self.items.scores.iter().map(of).collect()
    }

    fn detectable(&self, pairs: &[Option<Sample>], values: &[Option<Interval>]) -> Option<f64> {
        let of_pair = |pair: &Sample| {
            let items = pair.items() as u64;
            if self.exact() {
                // The two imagined disagreements of `resample`: none seen does not make them impossible.
                let disagree = pair.terms().filter(|(_, v)| *v != 0.0).count() as f64 + 2.0;
                return power::paired(disagree / (items as f64 + 2.0), items);
            }
            let spread = pair.spread();
            let imagined = if self.how.binary {
                2.0 * spread.step * spread.step
            } else {
                0.0
            };
            (items > 1).then(|| power::of_standard_error((spread.error * spread.error + imagined).sqrt()))
        };
        let found = pairs.iter().flatten().filter_map(of_pair).max_by(f64::total_cmp);
        let alone = values.first().copied().flatten().filter(|_| self.exact());
        let found =
            found.or_else(|| alone.and_then(|v| power::unpaired(v.value, self.strata[0].len() as u64)));
        found.map(|d| {
            if self.how.unit == Unit::Perplexity {
                d.exp()
            } else {
                d
            }
        })
    }

    fn leader(&self, values: &[Option<Interval>], higher: bool) -> Option<(usize, Vec<f64>)> {
        let worth = |m: usize| values[m].map(|v| if higher { v.value } else { -v.value });
        let present: Vec<usize> = (0..values.len()).filter(|&m| worth(m).is_some()).collect();
        let &leader = present.iter().max_by(|&&a, &&b| {
            worth(a)
                .partial_cmp(&worth(b))
                .unwrap_or(std::cmp::Ordering::Equal)
        })?;
        let rivals = present.iter().filter(|&&m| m != leader);
        let p: Vec<f64> = rivals
            .map(|&m| self.pair(leader, m).map_or(1.0, |pair| self.p(&pair)))
            .collect();
        (!p.is_empty()).then_some((leader, p))
    }
}

/// Holm's correction of each candidate's deltas over the groups; the headline stands alone.
fn correct(rows: &mut [Tested]) {
    let models = rows.first().map_or(0, |r| r.metric.deltas.len());
    for family in [0..1, 1..rows.len()] {
        for model in 0..models {
            let tested: Vec<usize> = family
                .clone()
                .filter(|&r| rows[r].metric.deltas[model].is_some())
                .collect();
            let p: Vec<f64> = tested
                .iter()
                .filter_map(|&r| rows[r].metric.deltas[model].and_then(|d| d.p))
                .collect();
            for (&row, corrected) in tested.iter().zip(holm(&p)) {
                if let Some(delta) = rows[row].metric.deltas[model].as_mut() {
                    delta.p_holm = Some(corrected);
                    delta.noise |= corrected >= LEVEL;
                }
            }
        }
    }
}

fn mark_best(rows: &mut [Tested]) {
    let p: Vec<f64> = rows
        .iter()
        .filter_map(|r| r.leader.as_ref())
        .flat_map(|l| l.1.clone())
        .collect();
    let mut corrected = holm(&p).into_iter();
    for row in rows {
        if let Some((leader, p)) = &row.leader {
            let worst = corrected.by_ref().take(p.len()).fold(0.0, f64::max);
            row.metric.best = (worst < LEVEL).then_some(*leader);
        }
    }
}

/// Items without an answer, for each model.
pub fn missing(items: &Items) -> Vec<u64> {
    let none = |s: &&Option<f64>| s.is_none_or(|s| !s.is_finite());
    items
        .scores
        .iter()
        .map(|scores| scores.iter().filter(none).count() as u64)
        .collect()
}

/// What a reader must know about items without an answer: a sentence for each model that has some, though not for one
/// that has no answers at all (there is no such value then). `labels` are the models' names.
pub fn warnings(items: &Items, how: &How, labels: &[String]) -> Vec<String> {
    let total = items.group_of.len() as u64;
    let mut sentences = Vec::new();
    for (model, gone) in missing(items).into_iter().enumerate() {
        if gone == 0 || gone == total {
            continue;
        }
        let label = labels.get(model).map_or("a model", String::as_str);
        let mut sentence = format!(
            "{label} has no answer to {gone} of {total} items; its {} is of the others",
            how.name
        );
        if how.binary {
            let right: f64 = items.scores[model]
                .iter()
                .flatten()
                .filter(|s| s.is_finite())
                .sum();
            let (low, high) = (
                right / total as f64 * 100.0,
                (right + gone as f64) / total as f64 * 100.0,
            );
            sentence += &format!(
                ", over all items {low:.1} % if the missing count as wrong, {high:.1} % if as right"
            );
        }
        sentences.push(sentence);
    }
    sentences
}
