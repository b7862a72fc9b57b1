//! Choice tasks after they were asked: what the labels add up to, which items are wrong, what a reader must be told.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::answers::{Answers, Said};
use super::choice::{Choice, Item};
use super::decide::{Decision, Decisions};
use super::setup::Ask;
use super::ways::Way;
use super::{BadCase, Prepared, Reporting};
use crate::Result;
use crate::report::{DataFile, TaskReport};
use crate::scorer::{Abilities, Scorer};

impl Prepared for Choice {
    fn files(&self) -> Vec<DataFile> {
        self.data.files.clone()
    }

    fn settings(&self) -> BTreeMap<String, Value> {
        self.settings.clone()
    }

    fn items(&self) -> usize {
        self.data.items.len()
    }

    fn slots(&self) -> usize {
        self.way.slots()
    }

    fn lacks(&self, abilities: &Abilities) -> Option<String> {
        if let Way::Head { labels, .. } = &self.way
            && abilities.labels > 0
            && abilities.labels != *labels
        {
            return Some(format!(
                "its head has {} labels, expected {labels}",
                abilities.labels
            ));
        }
        self.way.ask().lacks(abilities).map(str::to_owned)
    }

    fn tokens(&self, count: &dyn Fn(&str) -> Result<usize>) -> Result<u64> {
        let texts = self.way.texts();
        texts
            .iter()
            .try_fold(0, |sum, text| Ok(sum + count(text)? as u64))
    }

    fn ask(&self, models: &[&dyn Scorer], answers: &mut Answers<'_>) -> Result<()> {
        for (model, scorer) in models.iter().enumerate() {
            self.way.put(model, *scorer, answers)?;
        }
        Ok(())
    }

    fn report(&self, answers: &Answers<'_>, how: &Reporting) -> Result<TaskReport> {
        let decisions = self.decisions(answers);
        let mut report = (self.kind.report)(self, &decisions, how);
        report.data.clone_from(&self.data.files);
        report.settings.clone_from(&self.settings);
        report.speed = answers.speeds().to_vec();
        report.counts.extend(answers.misses(self.items()));
        let every = |f: fn(&Decisions) -> u64| decisions.iter().map(f).collect::<Vec<_>>();
        let (unparsable, cut) = (every(|d| d.unparsable), every(|d| d.cut));
        if self.way.ask() == Ask::Generate {
            report
                .counts
                .insert("unparsable replies".to_owned(), unparsable.clone());
        }
        if cut.iter().any(|c| *c > 0) {
            report
                .counts
                .insert("prompts cut to the context".to_owned(), cut.clone());
        }
        for (model, label) in how.models.iter().enumerate() {
            let missing = decisions[model].items.iter().filter(|d| d.is_none()).count();
            if missing > 0 {
                report.warnings.push(format!(
                    "{label} gave no label for {missing} of {} items ({} unparsable replies): they count for no label",
                    self.items(),
                    unparsable[model]
                ));
            }
            if cut[model] > 0 {
                report.warnings.push(format!(
                    "{label}: {} of {} prompts are longer than the context and lost their beginning",
                    cut[model],
                    self.items()
                ));
            }
            if let Some(constant) = constant(&decisions[model]) {
                report.warnings.push(format!(
                    "{label} says {} to every item: it does not look at them",
                    self.data.labels[constant]
                ));
            }
        }
        report.warnings.extend(self.data.warnings.iter().cloned());
        if how.items {
            report.items = Some(self.predicted(&decisions));
        }
        Ok(report)
    }

    fn predictions(&self, answers: &Answers<'_>) -> Option<Vec<Result<String, String>>> {
        let decisions = Decisions::of(&self.way, answers, 0);
        let label = |(i, d): (usize, &Option<Decision>)| match (d, answers.get(0, i)) {
            (Some(d), _) => Ok(self.data.labels[d.label].clone()),
            (None, Some(Said::Reply(reply))) => Err(format!(
                "line {}: the reply {:?} names no label",
                self.data.items[i].line, reply.text
            )),
            (None, Some(Said::Miss(miss))) => Err(format!(
                "line {}: {}: {}",
                self.data.items[i].line, miss.kind, miss.detail
            )),
            (None, _) => Err(format!("line {}: no answer", self.data.items[i].line)),
        };
        Some(decisions.items.iter().enumerate().map(label).collect())
    }

    fn bad_cases(&self, answers: &Answers<'_>, model: usize) -> Option<Vec<BadCase>> {
        let decisions = Decisions::of(&self.way, answers, model);
        let items = self.data.items.iter().zip(&decisions.items);
        let wrong = items.filter_map(|(item, decision)| {
            let gold = item.gold?;
            if decision.is_some_and(|d| d.label == gold) {
                return None;
            }
            let name = |label: usize| self.data.labels[label].clone();
            Some(BadCase {
                text: item
                    .pair
                    .b
                    .iter()
                    .fold(item.pair.a.clone(), |a, b| format!("{a}\t{b}")),
                label: name(gold),
                prediction: decision.map(|d| name(d.label)).unwrap_or_default(),
                score: decision.and_then(|d| d.score),
            })
        });
        Some(wrong.collect())
    }
}

impl Choice {
    /// Decisions of every model.
    fn decisions(&self, answers: &Answers<'_>) -> Vec<Decisions> {
        (0..answers.models())
            .map(|model| Decisions::of(&self.way, answers, model))
            .collect()
    }

    /// Every item with what each model said.
    fn predicted(&self, decisions: &[Decisions]) -> Vec<Value> {
        let name = |label: usize| json!(self.data.labels.get(label));
        let one = |(i, item): (usize, &Item)| {
            let each = |f: &dyn Fn(&Decision) -> Value| -> Vec<Value> {
                decisions
                    .iter()
                    .map(|d| d.items[i].as_ref().map_or(Value::Null, f))
                    .collect()
            };
            json!({
                "line": item.line,
                "kind": self.data.groups.get(item.group),
                "label": item.gold.map(name),
                "predictions": each(&|d| name(d.label)),
                "scores": each(&|d| json!(d.score)),
            })
        };
        self.data.items.iter().enumerate().map(one).collect()
    }
}

/// The label that every item got, where there are at least ten.
fn constant(decisions: &Decisions) -> Option<usize> {
    let mut labels = decisions.items.iter().flatten().map(|d| d.label);
    let first = labels.next()?;
    (decisions.items.len() >= 10 && labels.all(|l| l == first)).then_some(first)
}
