//! From what a model said to the label it chose.

use super::answers::{Answers, Said};
use super::reply;
use super::setup::Normalize;
use super::ways::Way;

/// A label, and how sure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Decision {
    /// Index of the label.
    pub label: usize,
    /// Its share after softmax over the labels' scores (likelihood, head), the cosine, or nothing for a reply.
    pub score: Option<f64>,
}

/// What one model decided.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Decisions {
    /// One an item; `None` where there was no answer, or a reply that names no label.
    pub items: Vec<Option<Decision>>,
    /// Replies that name no label.
    pub unparsable: u64,
    /// Prompts that were cut to the context.
    pub cut: u64,
    /// The cosine threshold, and the share of the dev pairs it gets right.
    pub threshold: Option<(f64, f64)>,
}

impl Decisions {
    /// Of a model's answers.
    pub fn of(way: &Way, answers: &Answers<'_>, model: usize) -> Self {
        let mut this = Self::default();
        let get = |slot: usize| answers.get(model, slot);
        match way {
            Way::Loglik {
                questions,
                blanks,
                blank_of,
                normalize,
            } => {
                for (i, question) in questions.iter().enumerate() {
                    let blank = blank_of.get(i).map(|b| get(questions.len() + b));
                    let decision = match (get(i), blank) {
                        (Some(Said::Likelihoods(said)), None) => {
                            this.cut += u64::from(said.cut > 0);
                            choose(&scores(&said.nats, &said.tokens, &question.answers, *normalize))
                        }
                        (Some(Said::Likelihoods(said)), Some(Some(Said::Likelihoods(blank)))) => {
                            this.cut += u64::from(said.cut > 0);
                            let own = scores(&said.nats, &said.tokens, &question.answers, *normalize);
                            let words = &blanks[blank_of[i]].answers;
                            let empty = scores(&blank.nats, &blank.tokens, words, *normalize);
                            let gained: Vec<f64> = own.iter().zip(&empty).map(|(a, b)| a - b).collect();
                            choose(&gained)
                        }
                        _ => None,
                    };
                    this.items.push(decision);
                }
            }
            Way::Generate { results, .. } => {
                for (i, results) in results.iter().enumerate() {
                    let label = match get(i) {
                        Some(Said::Reply(said)) => {
                            this.cut += u64::from(said.cut > 0);
                            let label = reply::parse(&said.text, results);
                            this.unparsable += u64::from(label.is_none());
                            label
                        }
                        _ => None,
                    };
                    this.items
                        .push(label.map(|label| Decision { label, score: None }));
                }
            }
            Way::Head { pairs, .. } => {
                for i in 0..pairs.len() {
                    let decision = match get(i) {
                        Some(Said::Head(logits)) => {
                            choose(&logits.iter().map(|l| f64::from(*l)).collect::<Vec<_>>())
                        }
                        _ => None,
                    };
                    this.items.push(decision);
                }
            }
            Way::Cosine { pairs, dev } => {
                let cosine = |slot: usize| match get(slot) {
                    Some(Said::Cosine(c)) => Some(*c),
                    _ => None,
                };
                let items = pairs.len() - dev.len();
                let known: Vec<(f64, bool)> = dev
                    .iter()
                    .enumerate()
                    .filter_map(|(i, same)| Some((cosine(items + i)?, *same)))
                    .collect();
                this.threshold = threshold(&known);
                for i in 0..items {
                    let decision = this.threshold.zip(cosine(i)).map(|((least, _), score)| Decision {
                        label: usize::from(score >= least),
                        score: Some(score),
                    });
                    this.items.push(decision);
                }
            }
        }
        this
    }
}

/// Sums of ln p, divided as asked.
fn scores(nats: &[f64], tokens: &[usize], answers: &[String], normalize: Normalize) -> Vec<f64> {
    let length = |i: usize| match normalize {
        Normalize::None => 1.0,
        Normalize::Tokens => tokens.get(i).map_or(1, |t| *t.max(&1)) as f64,
        Normalize::Bytes => answers.get(i).map_or(1, |a| a.len().max(1)) as f64,
    };
    nats.iter().enumerate().map(|(i, n)| n / length(i)).collect()
}

/// The highest score and its share after softmax; of equal ones the first.
fn choose(scores: &[f64]) -> Option<Decision> {
    let mut best: Option<(usize, f64)> = None;
    for (i, &score) in scores.iter().enumerate() {
        if best.is_none_or(|(_, b)| score > b) {
            best = Some((i, score));
        }
    }
    best.map(|(label, top)| Decision {
        label,
        score: Some(1.0 / scores.iter().map(|s| (s - top).exp()).sum::<f64>()),
    })
}

/// The threshold (alike means at least it) that gets most of the pairs right, and their share: it lies halfway
/// between two neighbouring cosines, or below or above all by 1e-6; of equally good ones the lowest.
fn threshold(pairs: &[(f64, bool)]) -> Option<(f64, f64)> {
    let mut sorted = pairs.to_vec();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (lowest, highest) = (sorted.first()?.0, sorted.last()?.0);
    let mut candidates = vec![lowest - 1e-6];
    candidates.extend(
        sorted
            .windows(2)
            .filter(|w| w[0].0 < w[1].0)
            .map(|w| (w[0].0 + w[1].0) / 2.0),
    );
    candidates.push(highest + 1e-6);
    let right = |least: f64| sorted.iter().filter(|(c, same)| (*c >= least) == *same).count();
    let mut best = (candidates[0], right(candidates[0]));
    for &candidate in &candidates[1..] {
        let count = right(candidate);
        if count > best.1 {
            best = (candidate, count);
        }
    }
    Some((best.0, best.1 as f64 / sorted.len() as f64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn choices_by_hand() {
        let ln = f64::ln;
        let decision = choose(&[ln(0.2), ln(0.6)]).unwrap();
        assert_eq!(decision.label, 1);
        assert!((decision.score.unwrap() - 0.75).abs() < 1e-12);
        assert_eq!(choose(&[-1.0, -1.0]).unwrap().label, 0, "of equal ones the first");
        assert_eq!(choose(&[]), None);
        let answers = ["ab".to_owned(), "abcd".to_owned()];
        assert_eq!(
            scores(&[-2.0, -3.0], &[1, 3], &answers, Normalize::None),
            [-2.0, -3.0]
        );
        assert_eq!(
            scores(&[-2.0, -3.0], &[1, 3], &answers, Normalize::Tokens),
            [-2.0, -1.0]
        );
        assert_eq!(
            scores(&[-2.0, -3.0], &[1, 3], &answers, Normalize::Bytes),
            [-1.0, -0.75]
        );
    }

    #[test]
    fn thresholds_by_hand() {
        let pairs = [(0.9, true), (0.5, true), (0.6, false), (0.1, false)];
        let (least, share) = threshold(&pairs).unwrap();
        assert!(
            (least - 0.3).abs() < 1e-12 && (share - 0.75).abs() < 1e-12,
            "{least}"
        );
        assert_eq!(threshold(&[]), None);
        let (least, share) = threshold(&[(0.4, false), (0.4, false)]).unwrap();
        assert!(least > 0.4 && share == 1.0);
    }
}
