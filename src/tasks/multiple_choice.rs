//! `multiple-choice`: which choice answers the question? Files are JSON lines
//!
//! ```text
//! {"question": "..", "choices": ["..", ".."], "answer": 1}
//! ```
//!
//! where `answer` is an index counted from 0, a letter, or the choice itself, and an optional `"kind"` puts items into
//! rows of their own. The built-in prompt lists the choices with letters and compares the letters; a template with
//! `{% set answers = choices %}` compares the choices' texts (then `--normalize` matters). Number: accuracy.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::choice::{Choice, Item, Items, Kind};
use super::data::{TextFile, text_field, texts_field};
use super::decide::Decisions;
use super::figures::Labelled;
use super::setup::{Ask, Setup};
use super::{Prepared, Reporting, Task};
use crate::Result;
use crate::report::TaskReport;
use crate::scorer::{Pair, Scorer};
use crate::statistics::baselines::COIN_FLIP;

/// See the module's text.
pub struct MultipleChoice;

const KIND: Kind = Kind {
    name: "multiple-choice",
    version: 1,
    ways: &[Ask::Loglik, Ask::Generate],
    report,
};

/// Names of choices; no question may have more.
const LETTERS: &str = "ABCDEFGHIJKLMNOPQRSTUVWXYZ";

impl Task for MultipleChoice {
    fn name(&self) -> &'static str {
        KIND.name
    }

    fn version(&self) -> u32 {
        KIND.version
    }

    fn summary(&self) -> &'static str {
        "which of some choices answers a question: accuracy"
    }

    fn data(&self) -> &'static str {
        "JSON lines question, choices, answer[, kind]; --ask, --prompt, --shots, --normalize"
    }

    fn prepare(&self, setup: &Setup, base: &dyn Scorer) -> Result<Box<dyn Prepared>> {
        Choice::prepare(KIND, setup, base, &read)
    }
}

fn read(path: &Path, labelled: bool) -> Result<Items> {
    let file = TextFile::read(path)?;
    let mut items = Vec::new();
    let mut groups: Vec<String> = Vec::new();
    let mut most = 0;
    for (line, object) in file.objects()? {
        let question = text_field(&file, line, &object, "question")?;
        let choices = texts_field(&file, line, &object, "choices", 2)?;
        if choices.len() > LETTERS.len() {
            let reason = format!(
                "choices: expected at most {}, got {}",
                LETTERS.len(),
                choices.len()
            );
            return Err(file.fault(Some(line), reason));
        }
        let letters: Vec<String> = LETTERS.chars().take(choices.len()).map(String::from).collect();
        let gold = match labelled {
            true => Some(answer(&file, line, &object, &choices, &letters)?),
            false => None,
        };
        let kind = object.get("kind").and_then(Value::as_str).unwrap_or("all");
        let group = groups.iter().position(|g| g == kind).unwrap_or_else(|| {
            groups.push(kind.to_owned());
            groups.len() - 1
        });
        most = most.max(choices.len());
        let fields = json!({"question": question, "choices": choices, "letters": letters});
        items.push(Item {
            fields: fields.as_object().cloned().unwrap_or_default(),
            content: &["question"],
            pair: Pair { a: question, b: None },
            results: letters.iter().map(|l| json!(l)).collect(),
            words: letters,
            group,
            gold,
            line,
        });
    }
    Ok(Items {
        files: vec![file.entry(items.len())],
        items,
        groups,
        labels: LETTERS.chars().take(most).map(String::from).collect(),
        warnings: Vec::new(),
    })
}

fn answer(
    file: &TextFile,
    line: usize,
    object: &Map<String, Value>,
    choices: &[String],
    letters: &[String],
) -> Result<usize> {
    let found = match object.get("answer") {
        Some(Value::Number(n)) => n.as_u64().map(|n| n as usize).filter(|n| *n < choices.len()),
        Some(Value::String(text)) => {
            let same = |list: &[String]| list.iter().position(|c| c == text);
            same(choices).or_else(|| same(letters))
        }
        _ => None,
    };
    found.ok_or_else(|| {
        let got = object
            .get("answer")
            .map_or("nothing".to_owned(), Value::to_string);
        file.fault(
            Some(line),
            format!(
                "answer: expected 0 to {}, A to {} or one of the choices, got {got}",
                choices.len() - 1,
                letters.last().map_or("", String::as_str)
            ),
        )
    })
}

fn report(choice: &Choice, decisions: &[Decisions], how: &Reporting) -> TaskReport {
    let labelled = Labelled::new(choice, decisions);
    let (mut metrics, warnings) = labelled.accuracy(how, choice.data.labels.len());
    // Questions may have unequal numbers of choices: a coin has as many sides as each question.
    let chance = |group: Option<usize>| {
        let members = choice
            .data
            .items
            .iter()
            .filter(|i| group.is_none_or(|g| i.group == g));
        let chances: Vec<f64> = members.map(|i| 1.0 / i.words.len() as f64).collect();
        chances.iter().sum::<f64>() / chances.len().max(1) as f64
    };
    let groups = choice.data.groups.len();
    for (row, metric) in metrics.iter_mut().enumerate() {
        let value = match row {
            0 if groups > 1 => (0..groups).map(|g| chance(Some(g))).sum::<f64>() / groups as f64,
            0 => chance(None),
            row => chance(Some(row - 1)),
        };
        for baseline in metric.baselines.iter_mut().filter(|b| b.0 == COIN_FLIP) {
            baseline.1 = value;
        }
    }
    let confusions = labelled.confusion(None);
    let labels = &choice.data.labels;
    let tables = confusions
        .iter()
        .enumerate()
        .map(|(m, c)| c.table(m, labels))
        .collect();
    TaskReport {
        task: KIND.name.to_owned(),
        version: KIND.version,
        metrics,
        tables,
        warnings,
        ..TaskReport::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(content: &str) -> Result<Items> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q.jsonl");
        std::fs::write(&path, content).unwrap();
        read(&path, true)
    }

    #[test]
    fn answers_in_three_forms() {
        let lines = "{\"question\": \"q\", \"choices\": [\"x\", \"y\"], \"answer\": 1}\n\
                     {\"question\": \"q\", \"choices\": [\"x\", \"y\"], \"answer\": \"B\"}\n\
                     {\"question\": \"q\", \"choices\": [\"x\", \"y\", \"z\"], \"answer\": \"y\", \"kind\": \"k\"}\n";
        let items = of(lines).unwrap();
        assert!(items.items.iter().all(|i| i.gold == Some(1)));
        assert_eq!((items.groups.len(), items.labels.len()), (2, 3));
    }

    #[test]
    fn faults_say_where() {
        for (content, expected) in [
            (
                "{\"choices\": [\"x\", \"y\"]}",
                "line 1: has no question; its keys are choices",
            ),
            (
                "{\"question\": \"q\", \"choices\": [\"x\"]}",
                "expected a list of at least 2 texts",
            ),
            (
                "{\"question\": \"q\", \"choices\": [\"x\", \"y\"]}",
                "answer: expected 0 to 1, A to B",
            ),
            (
                "{\"question\": \"q\", \"choices\": [\"x\", \"y\"], \"answer\": 2}",
                "got 2",
            ),
            ("nonsense", "line 1: no JSON"),
        ] {
            let message = of(content).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }
}
