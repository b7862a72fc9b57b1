//! The four ways to have a model choose a label. Owns the questions and how they are put; what answers mean is
//! `decide`'s.

use std::collections::HashMap;
use std::ops::ControlFlow;

use serde_json::Value;

use super::answers::{Answers, Said, non_finite, said};
use super::choice::Item;
use super::prompt::Template;
use super::reply;
use super::setup::{Ask, Normalize, Setup};
use crate::scorer::{Pair, Prompt, Question, Request, Scorer};
use crate::{Error, Result};

/// Most tokens of a reply that names a label.
pub const REPLY_TOKENS: usize = 32;

/// Questions, one an item, and what else must be asked.
#[derive(Debug, Clone, PartialEq)]
pub enum Way {
    /// Likelihoods of the answers; those of content-free inputs come after the items.
    Loglik {
        /// One an item.
        questions: Vec<Question>,
        /// Content-free ones; none without calibration.
        blanks: Vec<Question>,
        /// Which of them each item is measured against.
        blank_of: Vec<usize>,
        /// What likelihoods are divided by.
        normalize: Normalize,
    },
    /// Replies.
    Generate {
        /// One an item.
        requests: Vec<Request>,
        /// What `result` may be, for each item, in the order of its labels.
        results: Vec<Vec<Value>>,
    },
    /// A classification head.
    Head {
        /// One an item.
        pairs: Vec<Pair>,
        /// Labels there must be.
        labels: usize,
    },
    /// Cosine; the dev file's pairs come after the items.
    Cosine {
        /// Items, then dev pairs.
        pairs: Vec<(String, String)>,
        /// Whether each dev pair has one meaning.
        dev: Vec<bool>,
    },
}

impl Way {
    /// Questions by likelihood, through a template. `shots` are the examples' fields, `answer` included.
    pub fn loglik(template: &Template, items: &[Item], shots: &[Value], setup: &Setup) -> Result<Self> {
        let render = |item: &Item, blank: bool| {
            let rendered = template.render(&item.variables(Ask::Loglik, shots, blank))?;
            let words = match &rendered.answers {
                Some(words) if words.len() == item.words.len() => words,
                Some(words) => {
                    return Err(Error::Prompt {
                        name: template.name().to_owned(),
                        reason: format!(
                            "sets answers to {} texts, expected {}, one a label",
                            words.len(),
                            item.words.len()
                        ),
                    });
                }
                None => &item.words,
            };
            let answers: Vec<String> = words.iter().map(|w| rendered.answer(w, setup.chat)).collect();
            let twice = (1..answers.len()).find(|&i| answers[..i].contains(&answers[i]));
            if let Some(twice) = twice {
                return Err(Error::Prompt {
                    name: template.name().to_owned(),
                    reason: format!("says two labels alike, as {:?}", answers[twice]),
                });
            }
            if answers.iter().any(String::is_empty) {
                return Err(Error::Prompt {
                    name: template.name().to_owned(),
                    reason: "says a label as nothing; an answer must have a text".to_owned(),
                });
            }
            Ok(Question {
                prompt: rendered.prompt(setup.chat),
                answers,
            })
        };
        let questions: Vec<Question> = items.iter().map(|i| render(i, false)).collect::<Result<_>>()?;
        let (mut blanks, mut blank_of) = (Vec::new(), Vec::new());
        if setup.calibrate {
            let mut known: HashMap<String, usize> = HashMap::new();
            for item in items {
                let question = render(item, true)?;
                let key = format!("{:?}", (&question.prompt, &question.answers));
                let index = *known.entry(key).or_insert_with(|| {
                    blanks.push(question);
                    blanks.len() - 1
                });
                blank_of.push(index);
            }
        }
        Ok(Self::Loglik {
            questions,
            blanks,
            blank_of,
            normalize: setup.normalize,
        })
    }

    /// Questions by reply.
    pub fn generate(template: &Template, items: &[Item], shots: &[Value], setup: &Setup) -> Result<Self> {
        let request = |item: &Item| {
            let rendered = template.render(&item.variables(Ask::Generate, shots, false))?;
            let replies = || item.results.iter().map(reply::written).collect();
            Ok(Request {
                prompt: rendered.prompt(setup.chat),
                most: setup.reply_tokens.unwrap_or(REPLY_TOKENS),
                // A base model goes on with the next example: its reply ends at the empty line before it.
                stop: vec!["\n\n".to_owned()],
                allowed: setup.constrain.then(replies),
                schema: setup.constrain.then(|| reply::schema(&item.results)),
            })
        };
        Ok(Self::Generate {
            requests: items.iter().map(request).collect::<Result<_>>()?,
            results: items.iter().map(|i| i.results.clone()).collect(),
        })
    }

    /// Its name, as typed.
    pub fn ask(&self) -> Ask {
        match self {
            Self::Loglik { .. } => Ask::Loglik,
            Self::Generate { .. } => Ask::Generate,
            Self::Head { .. } => Ask::Head,
            Self::Cosine { .. } => Ask::Cosine,
        }
    }

    /// Slots of answers.
    pub fn slots(&self) -> usize {
        match self {
            Self::Loglik {
                questions, blanks, ..
            } => questions.len() + blanks.len(),
            Self::Generate { requests, .. } => requests.len(),
            Self::Head { pairs, .. } => pairs.len(),
            Self::Cosine { pairs, .. } => pairs.len(),
        }
    }

    /// All texts that go through a model, answers included.
    pub fn texts(&self) -> Vec<String> {
        let prompt = |p: &Prompt| match p {
            Prompt::Text(text) => text.clone(),
            Prompt::Chat(messages) => messages.iter().map(|m| m.content.as_str()).collect(),
        };
        match self {
            Self::Loglik {
                questions, blanks, ..
            } => questions
                .iter()
                .chain(blanks)
                .map(|q| prompt(&q.prompt) + &q.answers.concat())
                .collect(),
            Self::Generate { requests, .. } => requests.iter().map(|r| prompt(&r.prompt)).collect(),
            Self::Head { pairs, .. } => {
                let text = |p: &Pair| p.a.clone() + p.b.as_deref().unwrap_or_default();
                pairs.iter().map(text).collect()
            }
            Self::Cosine { pairs, .. } => pairs.iter().map(|(a, b)| format!("{a}{b}")).collect(),
        }
    }

    /// Asks a model every open slot.
    pub fn put(&self, model: usize, scorer: &dyn Scorer, answers: &mut Answers<'_>) -> Result<()> {
        let open = answers.open(model);
        if open.is_empty() {
            return Ok(());
        }
        answers.timed(model, scorer, |answers| match self {
            Self::Loglik {
                questions, blanks, ..
            } => {
                let all: Vec<Question> = questions.iter().chain(blanks).cloned().collect();
                scorer.likelihoods_of(&all, &open, &mut |i, answer| {
                    let said = match answer {
                        Ok(l) if !l.nats.iter().all(|n| n.is_finite()) => {
                            non_finite("a log-likelihood is not finite")
                        }
                        answer => said(answer, Said::Likelihoods),
                    };
                    answers.put(model, i, said)
                })
            }
            Self::Generate { requests, .. } => {
                let asked: Vec<Request> = open.iter().map(|&i| requests[i].clone()).collect();
                scorer.replies(&asked, &mut |i, answer| {
                    answers.put(model, open[i], said(answer, Said::Reply))
                })
            }
            Self::Head { pairs, labels } => {
                let asked: Vec<Pair> = open.iter().map(|&i| pairs[i].clone()).collect();
                scorer.classify(&asked, &mut |i, answer| {
                    let said = match answer {
                        Ok(logits) if logits.len() != *labels => non_finite("the head has other labels"),
                        Ok(logits) if !logits.iter().all(|l| l.is_finite()) => {
                            non_finite("a logit of the head is not finite")
                        }
                        answer => said(answer, Said::Head),
                    };
                    answers.put(model, open[i], said)
                })
            }
            Self::Cosine { pairs, .. } => {
                let texts: Vec<String> = open
                    .iter()
                    .flat_map(|&i| [pairs[i].0.clone(), pairs[i].1.clone()])
                    .collect();
                let mut halves: HashMap<usize, crate::scorer::Answer<Vec<f32>>> = HashMap::new();
                scorer.embed(&texts, &mut |i, answer| {
                    let Some(other) = halves.remove(&(i ^ 1)) else {
                        halves.insert(i, answer);
                        return ControlFlow::Continue(());
                    };
                    let said = match (answer, other) {
                        (Ok(a), Ok(b)) => match cosine(&a, &b) {
                            Some(cosine) => Said::Cosine(cosine),
                            None => non_finite("the cosine of the two texts is not finite"),
                        },
                        (Err(miss), _) | (_, Err(miss)) => Said::Miss(miss),
                    };
                    answers.put(model, open[i / 2], said)
                })
            }
        })
    }
}

/// Cosine of two vectors, with f64 sums; `None` when it is not finite or the lengths differ.
fn cosine(a: &[f32], b: &[f32]) -> Option<f64> {
    let dot =
        |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum() };
    let cosine = dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
    (a.len() == b.len() && cosine.is_finite()).then_some(cosine)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cosines_by_hand() {
        assert_eq!(cosine(&[3.0, 4.0], &[4.0, 3.0]), Some(0.96));
        assert_eq!(cosine(&[1.0, 0.0], &[0.0, 2.0]), Some(0.0));
        assert_eq!(cosine(&[0.0, 0.0], &[1.0, 0.0]), None);
        assert_eq!(cosine(&[1.0], &[1.0, 0.0]), None);
    }
}
