//! Tasks that choose one of some labels for each item: what an item is, and how all of them are prepared, asked and
//! reported. Each such task (question-matching, classification, multiple-choice) brings its items and its figures.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::data::stratified;
use super::decide::Decisions;
use super::prompt::{Language, Template, choose_shots};
use super::reply;
use super::setup::{Ask, Setup};
use super::ways::Way;
use super::{Prepared, Reporting};
use crate::report::{DataFile, TaskReport};
use crate::scorer::{Pair, Scorer};
use crate::{Error, Result};

/// Put in place of the text, to see what a model says without one (Zhao et al. 2021).
pub const CONTENT_FREE: &str = "N/A";

/// One item.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// What a template sees of it.
    pub fields: Map<String, Value>,
    /// Names of the fields that carry its content.
    pub content: &'static [&'static str],
    /// The text, or two, as an encoder takes them and `bad_case.txt` shows them.
    pub pair: Pair,
    /// How each label is said.
    pub words: Vec<String>,
    /// What a reply's `result` is for each label.
    pub results: Vec<Value>,
    /// Index of its kind.
    pub group: usize,
    /// Its label, where it has one.
    pub gold: Option<usize>,
    /// Line it stands in.
    pub line: usize,
}

impl Item {
    /// What a template is given; with `blank`, content-free.
    pub fn variables(&self, ask: Ask, shots: &[Value], blank: bool) -> Map<String, Value> {
        let mut variables = self.fields.clone();
        if blank {
            for name in self.content {
                variables.insert((*name).to_owned(), json!(CONTENT_FREE));
            }
        }
        variables.insert("ask".to_owned(), json!(ask.name()));
        variables.insert("shots".to_owned(), Value::Array(shots.to_vec()));
        variables
    }

    /// The item as an example: its fields, and its label said as `ask` wants it.
    fn shot(&self, ask: Ask, words: &[String]) -> Option<Value> {
        let gold = self.gold?;
        let answer = match ask {
            Ask::Generate => reply::written(self.results.get(gold)?),
            _ => words.get(gold)?.clone(),
        };
        let mut fields = self.fields.clone();
        fields.insert("answer".to_owned(), json!(answer));
        Some(Value::Object(fields))
    }
}

/// What a task has read.
#[derive(Debug, Clone, PartialEq)]
pub struct Items {
    /// The files.
    pub files: Vec<DataFile>,
    /// The items.
    pub items: Vec<Item>,
    /// Names of the kinds, in the order of the report.
    pub groups: Vec<String>,
    /// Names of the labels; for multiple choice, the letters.
    pub labels: Vec<String>,
    /// Sentences about the data that a reader must see.
    pub warnings: Vec<String>,
}

/// What a task says of itself.
#[derive(Debug, Clone, Copy)]
pub struct Kind {
    /// Its name.
    pub name: &'static str,
    /// Its version.
    pub version: u32,
    /// The ways it can be asked.
    pub ways: &'static [Ask],
    /// Makes the numbers.
    pub report: fn(&Choice, &[Decisions], &Reporting) -> TaskReport,
}

/// A choice task, ready to be asked.
pub struct Choice {
    /// Its kind.
    pub kind: Kind,
    /// What was read, after the draw.
    pub data: Items,
    /// The questions.
    pub way: Way,
    pub(super) settings: BTreeMap<String, Value>,
}

impl Choice {
    /// Draws from the items, renders the questions. `read` reads a file of items: the data's and the shots'.
    pub fn prepare(
        kind: Kind,
        setup: &Setup,
        base: &dyn Scorer,
        read: &dyn Fn(&std::path::Path, bool) -> Result<Items>,
    ) -> Result<Box<dyn Prepared>> {
        let mut data = read(&setup.data, setup.labelled)?;
        let ask = setup.way(kind.name, kind.ways, &base.abilities())?;
        let mut settings = BTreeMap::new();
        let mut set = |name: &str, value: Value| settings.insert(name.to_owned(), value);
        set("ask", json!(ask.name()));
        if let Some(limit) = setup.limit {
            let strata: Vec<(usize, Option<usize>)> = data.items.iter().map(|i| (i.group, i.gold)).collect();
            let chosen = stratified(&strata, limit, setup.seed);
            data.items = chosen.into_iter().map(|i| data.items[i].clone()).collect();
            set("limit", json!(limit));
            set("seed", json!(setup.seed));
        }
        let way = match ask {
            Ask::Loglik | Ask::Generate => {
                let texts = data.items.iter().map(|i| i.pair.a.as_str());
                let language = setup.language.unwrap_or_else(|| Language::of(texts));
                let template = Template::open(kind.name, setup.prompt.as_deref(), language)?;
                set("prompt", json!(template.name()));
                set("prompt_digest", json!(template.digest()));
                set("chat", json!(setup.chat));
                let shots = shots(kind, setup, ask, &template, &mut data, read, &mut set)?;
                if ask == Ask::Loglik {
                    set("normalize", json!(setup.normalize.name()));
                    set("calibrate", json!(setup.calibrate));
                    Way::loglik(&template, &data.items, &shots, setup)?
                } else {
                    set("constrain", json!(setup.constrain));
                    let way = Way::generate(&template, &data.items, &shots, setup)?;
                    if let Way::Generate { requests, .. } = &way {
                        set("reply_tokens", json!(requests.first().map(|r| r.most)));
                    }
                    way
                }
            }
            Ask::Head => {
                let labels = base.abilities().labels;
                if labels != data.labels.len() {
                    return Err(Error::Task {
                        task: kind.name.to_owned(),
                        reason: format!(
                            "the base's classification head has {labels} labels, the data have {}",
                            data.labels.len()
                        ),
                    });
                }
                Way::Head {
                    pairs: data.items.iter().map(|i| i.pair.clone()).collect(),
                    labels,
                }
            }
            Ask::Cosine => cosine(kind, setup, &mut data, read, &mut set)?,
        };
        Ok(Box::new(Self {
            kind,
            data,
            way,
            settings,
        }))
    }
}

type Set<'a> = &'a mut dyn FnMut(&str, Value) -> Option<Value>;

type Read<'a> = &'a dyn Fn(&std::path::Path, bool) -> Result<Items>;

/// The examples of a prompt.
fn shots(
    kind: Kind,
    setup: &Setup,
    ask: Ask,
    template: &Template,
    data: &mut Items,
    read: Read<'_>,
    set: Set<'_>,
) -> Result<Vec<Value>> {
    let Some(path) = &setup.shots else {
        return Ok(Vec::new());
    };
    let from = read(path, true)?;
    let labels: Vec<Option<usize>> = from.items.iter().map(|i| i.gold).collect();
    let chosen = choose_shots(&labels, setup.shots_count, setup.seed);
    let mut shots = Vec::new();
    for i in chosen {
        let item = &from.items[i];
        // The template's own words, so that examples say what is asked for.
        let rendered = template.render(&item.variables(ask, &[], false))?;
        let words = rendered.answers.as_ref().unwrap_or(&item.words);
        shots.extend(item.shot(ask, words));
        let again = data.items.iter().filter(|d| d.pair == item.pair).count();
        if again > 0 {
            data.warnings.push(format!(
                "{}: an example of {} (line {}) is also an item; its answer is given away",
                kind.name,
                path.display(),
                item.line
            ));
        }
    }
    set("shots", json!(shots.len()));
    set("seed", json!(setup.seed));
    data.files.extend(from.files);
    Ok(shots)
}

/// Pairs to be compared, and those the threshold is chosen on.
fn cosine(kind: Kind, setup: &Setup, data: &mut Items, read: Read<'_>, set: Set<'_>) -> Result<Way> {
    let Some(path) = &setup.dev else {
        return Err(Error::Task {
            task: kind.name.to_owned(),
            reason: "an encoder without a head answers by cosine; pass --dev FILE with labelled pairs to choose the threshold on".to_owned(),
        });
    };
    let dev = read(path, true)?;
    let both = |i: &Item| (i.pair.a.clone(), i.pair.b.clone().unwrap_or_default());
    let again = dev
        .items
        .iter()
        .filter(|d| data.items.iter().any(|i| i.pair == d.pair))
        .count();
    if again > 0 {
        data.warnings.push(format!(
            "{again} pairs of {} are also items; the threshold has seen them",
            path.display()
        ));
    }
    set("dev_pairs", json!(dev.items.len()));
    data.files.extend(dev.files);
    Ok(Way::Cosine {
        pairs: data.items.iter().chain(&dev.items).map(both).collect(),
        dev: dev.items.iter().map(|i| i.gold == Some(1)).collect(),
    })
}
