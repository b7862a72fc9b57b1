//! How a causal model is asked: prompt templates, built-in or from a file. Owns what a template is given and what is
//! taken from it.
//!
//! A template is [minijinja](https://docs.rs/minijinja) (Jinja2's language). It writes the prompt. It may also set
//!
//! | variable | meaning | without it |
//! |---|---|---|
//! | `answers` | list: how each label is said after the prompt, in the order of the labels | the task's own words |
//! | `lead` | what stands between prompt and answer when the model is given plain text (a blank, in English) | nothing |
//! | `system` | system message, with `--chat` only | none |
//!
//! and is given `ask` (`loglik` or `generate`), `shots` (list of items with their fields and `answer`), and the
//! item's fields: `text_a`, `text_b` (question-matching); `text`, `labels`, `words` (classification); `question`,
//! `choices`, `letters` (multiple-choice); `context`, `question` (qa). One newline at its end is taken away.

use std::path::Path;

use minijinja::value::{Serde, Value as Jinja};
use minijinja::{Environment, UndefinedBehavior};
use serde_json::{Map, Value};

use super::data::{Draw, TextFile};
use crate::scorer::{Message, Prompt};
use crate::{Error, Result};

/// Steps a template may take for one item.
const FUEL: u64 = 5_000_000;

/// Language of the built-in prompts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Language {
    /// Chinese.
    Zh,
    /// English.
    En,
}

impl Language {
    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Zh => "zh",
            Self::En => "en",
        }
    }

    /// Chinese when at least a fifth of the letters are Han characters.
    pub fn of<'a>(texts: impl Iterator<Item = &'a str>) -> Self {
        let (mut letters, mut han) = (0usize, 0usize);
        for c in texts.flat_map(str::chars).filter(|c| c.is_alphabetic()) {
            letters += 1;
            han += usize::from(is_han(c));
        }
        if han * 5 >= letters.max(1) {
            Self::Zh
        } else {
            Self::En
        }
    }
}

/// Whether a character is a Chinese one: unified ideographs with extensions, and compatibility ideographs.
pub fn is_han(c: char) -> bool {
    matches!(c, '\u{3400}'..='\u{4dbf}' | '\u{4e00}'..='\u{9fff}' | '\u{f900}'..='\u{faff}' | '\u{20000}'..='\u{323af}')
}

/// Built-in templates: task, language, text.
const BUILT_IN: [(&str, Language, &str); 8] = [
    (
        "question-matching",
        Language::Zh,
        include_str!("prompts/question-matching.zh.jinja"),
    ),
    (
        "question-matching",
        Language::En,
        include_str!("prompts/question-matching.en.jinja"),
    ),
    (
        "classification",
        Language::Zh,
        include_str!("prompts/classification.zh.jinja"),
    ),
    (
        "classification",
        Language::En,
        include_str!("prompts/classification.en.jinja"),
    ),
    (
        "multiple-choice",
        Language::Zh,
        include_str!("prompts/multiple-choice.zh.jinja"),
    ),
    (
        "multiple-choice",
        Language::En,
        include_str!("prompts/multiple-choice.en.jinja"),
    ),
    ("qa", Language::Zh, include_str!("prompts/qa.zh.jinja")),
    ("qa", Language::En, include_str!("prompts/qa.en.jinja")),
];

/// A template.
#[derive(Debug)]
pub struct Template {
    name: String,
    digest: String,
    environment: Environment<'static>,
}

/// What a template made of an item.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// The prompt.
    pub text: String,
    /// How each label is said, if the template says so.
    pub answers: Option<Vec<String>>,
    /// Between prompt and answer.
    pub lead: String,
    /// System message.
    pub system: Option<String>,
}

impl Template {
    /// The template in `file`, or the built-in one.
    pub fn open(task: &str, file: Option<&Path>, language: Language) -> Result<Self> {
        let (name, text) = match file {
            Some(path) => (
                path.display().to_string(),
                TextFile::read(path)?.text().to_owned(),
            ),
            None => {
                let found = BUILT_IN.iter().find(|(t, l, _)| *t == task && *l == language);
                let text = found.map_or("", |(_, _, text)| text);
                (format!("built-in {task}.{}", language.name()), text.to_owned())
            }
        };
        let digest = format!("blake3:{}", blake3::hash(text.as_bytes()).to_hex());
        let mut environment = Environment::new();
        environment.set_undefined_behavior(UndefinedBehavior::Strict);
        environment.set_fuel(Some(FUEL));
        let compiled = environment.add_template_owned("prompt", text);
        let fault = compiled.err().map(|e| reason(&e));
        match fault {
            Some(reason) => Err(Error::Prompt { name, reason }),
            None => Ok(Self {
                name,
                digest,
                environment,
            }),
        }
    }

    /// Where it is from.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// BLAKE3 of its text.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Renders. Fails when the template names a variable that is not there, or sets one of its own to something of
    /// another kind.
    pub fn render(&self, fields: &Map<String, Value>) -> Result<Rendered> {
        let fault = |e: &minijinja::Error| Error::Prompt {
            name: self.name.clone(),
            reason: reason(e),
        };
        let template = self.environment.get_template("prompt").map_err(|e| fault(&e))?;
        let captured = template
            .render_captured(Jinja::from(Serde(fields)))
            .map_err(|e| fault(&e))?;
        let set = |name: &str| {
            let exported = captured.state().exports().contains(&name);
            exported.then(|| captured.state().lookup(name)).flatten()
        };
        let wrong = |name: &str, expected: &str, got: &Jinja| Error::Prompt {
            name: self.name.clone(),
            reason: format!("sets {name} to {got}, expected {expected}"),
        };
        let text = |name: &str| match set(name) {
            None => Ok(None),
            Some(value) => match value.as_str() {
                Some(text) => Ok(Some(text.to_owned())),
                None => Err(wrong(name, "a text", &value)),
            },
        };
        let answers = match set("answers") {
            None => None,
            Some(value) => {
                let list: Option<Vec<String>> = value
                    .try_iter()
                    .ok()
                    .and_then(|list| list.map(|v| v.as_str().map(str::to_owned)).collect());
                Some(list.ok_or_else(|| wrong("answers", "a list of texts", &value))?)
            }
        };
        Ok(Rendered {
            answers,
            lead: text("lead")?.unwrap_or_default(),
            system: text("system")?,
            text: captured.into_output(),
        })
    }
}

impl Rendered {
    /// The prompt as a scorer takes it.
    pub fn prompt(&self, chat: bool) -> Prompt {
        if !chat {
            return Prompt::Text(self.text.clone());
        }
        let said = |role: &str, content: &str| Message {
            role: role.to_owned(),
            content: content.to_owned(),
        };
        let mut messages: Vec<Message> = self.system.iter().map(|s| said("system", s)).collect();
        messages.push(said("user", &self.text));
        Prompt::Chat(messages)
    }

    /// An answer as it follows the prompt: a chat template ends where an answer begins, so nothing leads there.
    pub fn answer(&self, word: &str, chat: bool) -> String {
        if chat {
            word.to_owned()
        } else {
            format!("{}{word}", self.lead)
        }
    }
}

/// The innermost cause, with its line where there is one.
fn reason(error: &minijinja::Error) -> String {
    use std::error::Error as _;
    let mut innermost = error;
    while let Some(cause) = innermost.source().and_then(|s| s.downcast_ref()) {
        innermost = cause;
    }
    let line = error.line().map(|l| format!("line {l}: ")).unwrap_or_default();
    format!("{line}{innermost}")
}

/// Indexes of `count` items to show as examples: labels in turn, each label's items in an order drawn by `seed`, the
/// whole in drawn order. Items without a label count as of one label.
pub fn choose_shots(labels: &[Option<usize>], count: usize, seed: u64) -> Vec<usize> {
    let mut draw = Draw::new(seed);
    let kinds: std::collections::BTreeSet<Option<usize>> = labels.iter().copied().collect();
    let mut piles: Vec<Vec<usize>> = kinds
        .into_iter()
        .map(|kind| {
            let mut pile: Vec<usize> = (0..labels.len()).filter(|&i| labels[i] == kind).collect();
            draw.shuffle(&mut pile);
            pile
        })
        .collect();
    let mut chosen = Vec::new();
    while chosen.len() < count.min(labels.len()) {
        for pile in &mut piles {
            if chosen.len() < count {
                chosen.extend(pile.pop());
            }
        }
    }
    draw.shuffle(&mut chosen);
    chosen
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn fields(value: &Value) -> Map<String, Value> {
        value.as_object().unwrap().clone()
    }

    fn of_text(text: &str) -> Result<Template> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p.jinja");
        std::fs::write(&path, text).unwrap();
        Template::open("x", Some(&path), Language::En)
    }

    #[test]
    fn a_built_in_prompt_as_it_is_seen() {
        let template = Template::open("question-matching", None, Language::En).unwrap();
        let shots = json!([{"text_a": "c", "text_b": "d", "answer": "yes"}]);
        let item = fields(&json!({"ask": "loglik", "text_a": "a", "text_b": "b", "shots": shots}));
        let rendered = template.render(&item).unwrap();
        assert_eq!(
            rendered.text,
            "Do the two questions ask the same? Answer yes or no.\n\n\
             Question 1: c\nQuestion 2: d\nAnswer: yes\n\n\
             Question 1: a\nQuestion 2: b\nAnswer:"
        );
        assert_eq!(
            rendered.answers.as_deref(),
            Some(["no".to_owned(), "yes".to_owned()].as_slice())
        );
        assert_eq!(rendered.answer("yes", false), " yes");
        assert_eq!(rendered.answer("yes", true), "yes");
        let template = Template::open("multiple-choice", None, Language::En).unwrap();
        let item = fields(&json!({
            "ask": "loglik", "question": "q", "choices": ["x", "y"], "letters": ["A", "B"], "shots": []
        }));
        let text = template.render(&item).unwrap().text;
        assert!(
            text.ends_with(".\n\nQuestion: q\nA. x\nB. y\nAnswer:"),
            "{text:?}"
        );
    }

    #[test]
    fn every_built_in_prompt_renders_in_every_way() {
        let mut seen = 0;
        for (task, language, _) in BUILT_IN {
            for ask in ["loglik", "generate"] {
                let shot = json!({
                    "text_a": "a", "text_b": "b", "text": "t", "question": "q", "choices": ["x"], "context": "c",
                    "answer": "SHOT"
                });
                let mut item = fields(&shot);
                for (name, value) in [
                    ("ask", json!(ask)),
                    ("shots", json!([shot])),
                    ("labels", json!(["l"])),
                    ("words", json!(["w"])),
                    ("letters", json!(["A"])),
                ] {
                    item.insert(name.to_owned(), value);
                }
                let template = Template::open(task, None, language).unwrap();
                let with = template.render(&item).unwrap();
                item.insert("shots".to_owned(), json!([]));
                let without = template.render(&item).unwrap();
                assert!(
                    with.text.contains("SHOT") && !without.text.contains("SHOT"),
                    "{task}"
                );
                assert!(
                    !without.text.ends_with('\n') && !without.text.contains("\n\n\n"),
                    "{}",
                    without.text
                );
                assert!(with.text.starts_with(without.text.lines().next().unwrap()));
                seen += 1;
            }
        }
        assert_eq!(seen, 16);
    }

    #[test]
    fn faults_of_templates() {
        for (text, expected) in [
            ("{{ nothing }}", "undefined"),
            ("a\n{% if %}", "line 2"),
            (
                "{% set answers = 3 %}x",
                "sets answers to 3, expected a list of texts",
            ),
            (
                "{% for i in range(10000) %}{% for j in range(10000) %}x{% endfor %}{% endfor %}",
                "fuel",
            ),
        ] {
            let outcome = of_text(text).and_then(|t| t.render(&Map::new()));
            let message = outcome.unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
    }

    #[test]
    fn languages() {
        assert_eq!(Language::of(["手机 激活 ABC"].into_iter()), Language::Zh);
        assert_eq!(Language::of(["a phone 机"].into_iter()), Language::En);
    }

    #[test]
    fn shots_take_labels_in_turn() {
        let labels: Vec<Option<usize>> = (0..20).map(|i| Some(usize::from(i < 15))).collect();
        let chosen = choose_shots(&labels, 4, 3);
        assert_eq!(chosen.iter().filter(|&&i| i < 15).count(), 2);
        assert_eq!(chosen, choose_shots(&labels, 4, 3));
        assert_eq!(choose_shots(&labels, 100, 3).len(), 20);
    }
}
