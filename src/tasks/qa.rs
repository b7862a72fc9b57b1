//! `qa`: an answer written from a context, as a retrieval system would give it. Files are JSON lines
//!
//! ```text
//! {"context": "..", "question": "..", "answers": ["..", ".."]}
//! ```
//!
//! (`"answer": ".."` for one). The greedy reply ends at the first newline. Numbers: exact match and F1 of words with
//! the best of the answers, see `overlap`. A reply that says nothing scores 0; a request without a reply is no answer.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::answers::{Answers, Said, said};
use super::data::{TextFile, stratified, text_field, texts_field};
use super::overlap;
use super::prompt::{Language, Template, choose_shots};
use super::setup::{Ask, Setup};
use super::{BadCase, Prepared, Reporting, Task};
use crate::Result;
use crate::report::{DataFile, TaskReport, Unit};
use crate::scorer::{Abilities, Request, Scorer};
use crate::statistics::compare::{self, How, Items};

/// Most tokens of an answer.
pub const REPLY_TOKENS: usize = 48;

/// See the module's text.
pub struct Qa;

impl Task for Qa {
    fn name(&self) -> &'static str {
        "qa"
    }

    fn version(&self) -> u32 {
        1
    }

    fn summary(&self) -> &'static str {
        "answers written from a context: exact match and F1 of words"
    }

    fn data(&self) -> &'static str {
        "JSON lines context, question, answers; --prompt, --shots, --reply-tokens"
    }

    fn prepare(&self, setup: &Setup, base: &dyn Scorer) -> Result<Box<dyn Prepared>> {
        let ask = Setup {
            ask: Some(setup.ask.unwrap_or(Ask::Generate)),
            ..setup.clone()
        };
        ask.way(self.name(), &[Ask::Generate], &base.abilities())?;
        let file = TextFile::read(&setup.data)?;
        let mut items = read(&file)?;
        let mut settings = BTreeMap::from([("ask".to_owned(), json!("generate"))]);
        if let Some(limit) = setup.limit {
            let chosen = stratified(&vec![0; items.len()], limit, setup.seed);
            items = chosen.iter().map(|&i| items[i].clone()).collect();
            settings.insert("limit".to_owned(), json!(limit));
            settings.insert("seed".to_owned(), json!(setup.seed));
        }
        let mut files = vec![file.entry(items.len())];
        let language = setup
            .language
            .unwrap_or_else(|| Language::of(items.iter().map(|i| i.question.as_str())));
        let template = Template::open(self.name(), setup.prompt.as_deref(), language)?;
        let mut shots = Vec::new();
        if let Some(path) = &setup.shots {
            let file = TextFile::read(path)?;
            let from = read(&file)?;
            let chosen = choose_shots(&vec![None; from.len()], setup.shots_count, setup.seed);
            shots = chosen.iter().map(|&i| from[i].shot()).collect();
            files.push(file.entry(from.len()));
            settings.insert("shots".to_owned(), json!(shots.len()));
            settings.insert("seed".to_owned(), json!(setup.seed));
        }
        let most = setup.reply_tokens.unwrap_or(REPLY_TOKENS);
        for (name, value) in [
            ("prompt", json!(template.name())),
            ("prompt_digest", json!(template.digest())),
            ("chat", json!(setup.chat)),
            ("reply_tokens", json!(most)),
        ] {
            settings.insert(name.to_owned(), value);
        }
        let request = |item: &Asked| {
            Ok(Request {
                prompt: template.render(&item.variables(&shots))?.prompt(setup.chat),
                most,
                stop: vec!["\n".to_owned()],
                allowed: None,
                schema: None,
            })
        };
        let requests = items.iter().map(request).collect::<Result<_>>()?;
        Ok(Box::new(Questions {
            files,
            settings,
            items,
            requests,
        }))
    }
}

#[derive(Debug, Clone)]
struct Asked {
    context: String,
    question: String,
    answers: Vec<String>,
    line: usize,
}

impl Asked {
    fn variables(&self, shots: &[Value]) -> Map<String, Value> {
        let fields = json!({
            "context": self.context, "question": self.question, "ask": Ask::Generate.name(), "shots": shots
        });
        fields.as_object().cloned().unwrap_or_default()
    }

    fn shot(&self) -> Value {
        json!({"context": self.context, "question": self.question, "answer": self.answers[0]})
    }
}

fn read(file: &TextFile) -> Result<Vec<Asked>> {
    let one = |(line, object): (usize, Map<String, Value>)| {
        let answers = if object.contains_key("answer") && !object.contains_key("answers") {
            vec![text_field(file, line, &object, "answer")?]
        } else {
            texts_field(file, line, &object, "answers", 1)?
        };
        Ok(Asked {
            context: text_field(file, line, &object, "context")?,
            question: text_field(file, line, &object, "question")?,
            answers,
            line,
        })
    };
    file.objects()?.into_iter().map(one).collect()
}

struct Questions {
    files: Vec<DataFile>,
    settings: BTreeMap<String, Value>,
    items: Vec<Asked>,
    requests: Vec<Request>,
}

impl Questions {
    fn reply<'a>(&self, answers: &'a Answers<'_>, model: usize, item: usize) -> Option<&'a str> {
        match answers.get(model, item) {
            Some(Said::Reply(reply)) => Some(reply.text.trim()),
            _ => None,
        }
    }
}

impl Prepared for Questions {
    fn files(&self) -> Vec<DataFile> {
        self.files.clone()
    }

    fn settings(&self) -> BTreeMap<String, Value> {
        self.settings.clone()
    }

    fn items(&self) -> usize {
        self.items.len()
    }

    fn slots(&self) -> usize {
        self.items.len()
    }

    fn lacks(&self, abilities: &Abilities) -> Option<String> {
        Ask::Generate.lacks(abilities).map(str::to_owned)
    }

    fn tokens(&self, count: &dyn Fn(&str) -> Result<usize>) -> Result<u64> {
        let one = |sum: u64, item: &Asked| Ok(sum + (count(&item.context)? + count(&item.question)?) as u64);
        self.items.iter().try_fold(0, one)
    }

    fn ask(&self, models: &[&dyn Scorer], answers: &mut Answers<'_>) -> Result<()> {
        for (model, scorer) in models.iter().enumerate() {
            let open = answers.open(model);
            if open.is_empty() {
                continue;
            }
            let asked: Vec<Request> = open.iter().map(|&i| self.requests[i].clone()).collect();
            answers.timed(model, *scorer, |answers| {
                scorer.replies(&asked, &mut |i, answer| {
                    answers.put(model, open[i], said(answer, Said::Reply))
                })
            })?;
        }
        Ok(())
    }

    fn report(&self, answers: &Answers<'_>, how: &Reporting) -> Result<TaskReport> {
        let models = answers.models();
        let score = |which: fn((f64, f64)) -> f64| Items {
            groups: vec![compare::ALL.to_owned()],
            group_of: vec![0; self.items.len()],
            scores: (0..models)
                .map(|m| {
                    let of = |(i, item): (usize, &Asked)| {
                        self.reply(answers, m, i)
                            .map(|r| which(overlap::best(r, &item.answers)))
                    };
                    self.items.iter().enumerate().map(of).collect()
                })
                .collect(),
            weights: None,
        };
        let mean = How {
            resamples: how.resamples,
            ..How::mean("F1 of words", Unit::Share, Some(true), how.seed)
        };
        let exact = How {
            name: "exact match".to_owned(),
            binary: true,
            ..mean.clone()
        };
        let f1 = score(|(_, f1)| f1);
        let mut metrics = compare::compare(&f1, &mean);
        metrics.extend(compare::compare(&score(|(exact, _)| exact), &exact));
        let cut = |m: usize| {
            let long = |i: &usize| matches!(answers.get(m, *i), Some(Said::Reply(r)) if r.cut > 0);
            (0..self.items.len()).filter(long).count() as u64
        };
        let cut: Vec<u64> = (0..models).map(cut).collect();
        let mut counts = answers.misses(self.items.len());
        let mut warnings = compare::warnings(&f1, &mean, &how.models);
        if cut.iter().any(|c| *c > 0) {
            for (label, number) in how.models.iter().zip(&cut).filter(|(_, n)| **n > 0) {
                warnings.push(format!(
                    "{label}: {number} of {} prompts are longer than the context and lost their beginning",
                    self.items.len()
                ));
            }
            counts.insert("prompts cut to the context".to_owned(), cut);
        }
        let one = |(i, item): (usize, &Asked)| {
            let each: Vec<Value> = (0..models).map(|m| json!(self.reply(answers, m, i))).collect();
            json!({"line": item.line, "answers": item.answers, "predictions": each})
        };
        Ok(TaskReport {
            task: Qa.name().to_owned(),
            version: Qa.version(),
            data: self.files(),
            settings: self.settings(),
            metrics,
            counts,
            warnings,
            speed: answers.speeds().to_vec(),
            items: how
                .items
                .then(|| self.items.iter().enumerate().map(one).collect()),
            ..TaskReport::default()
        })
    }

    fn bad_cases(&self, answers: &Answers<'_>, model: usize) -> Option<Vec<BadCase>> {
        let plain = |text: &str| text.replace(['\t', '\n', '\r'], " ");
        let wrong = self.items.iter().enumerate().filter_map(|(i, item)| {
            let reply = self.reply(answers, model, i);
            let (exact, f1) = reply.map_or((0.0, 0.0), |r| overlap::best(r, &item.answers));
            (exact < 1.0).then(|| BadCase {
                text: plain(&item.question),
                label: plain(&item.answers[0]),
                prediction: plain(reply.unwrap_or_default()),
                score: reply.map(|_| f1),
            })
        });
        Some(wrong.collect())
    }
}
