//! Chat templates: Jinja as the transformers library runs it. Owns the functions and filters a template may
//! call, and the bounds on what a foreign template may do.

use std::error::Error as _;
use std::path::PathBuf;
use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Serde, Value as Jinja};
use minijinja::{Environment, ErrorKind, context};
use minijinja_contrib::pycompat::unknown_method_callback;
use regex::Regex;
use serde_json::Value;

use super::config::{Config, TemplateSource};
use super::python::{self, Dumps};
use crate::{Error, Result};

/// Steps a template may take, and with them memory, at 64 bytes a step. A conversation of a thousand messages
/// through a long template takes less than a million.
const FUEL: u64 = 50_000_000;

/// No ending: one of `.html` would have the text escaped.
const NAME: &str = "chat_template";

/// A compiled template.
#[derive(Debug)]
pub struct Template {
    path: PathBuf,
    environment: Environment<'static>,
}

impl Template {
    /// Compiles.
    pub fn new(source: &TemplateSource, config: &Config) -> Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        environment.set_syntax(syntax.map_err(|e| Error::Template {
            path: source.path.clone(),
            reason: e.to_string(),
        })?);
        environment.set_fuel(Some(FUEL));
        environment.set_unknown_method_callback(unknown_method_callback);
        environment.add_filter("tojson", to_json);
        environment.add_function(
            "raise_exception",
            |text: String| -> std::result::Result<Jinja, _> {
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, text))
            },
        );
        for (name, token) in &config.specials {
            environment.add_global(name.clone(), token.clone());
        }
        let mut template = Self {
            path: source.path.clone(),
            environment,
        };
        let text = without_tracking(&source.text);
        let compiled = template.environment.add_template_owned(NAME, text);
        compiled.map_err(|e| template.fault("is no chat template that can be read", &e))?;
        Ok(template)
    }

    /// Text of a conversation.
    pub fn render(&self, messages: &Value, add_generation_prompt: bool, now: SystemTime) -> Result<String> {
        let strftime_now = move |format: String| {
            python::strftime(&format, now).map_err(|e| minijinja::Error::new(ErrorKind::InvalidOperation, e))
        };
        let template = self.environment.get_template(NAME);
        let rendered = template.and_then(|t| {
            t.render(context! {
                messages => Jinja::from(Serde(messages)),
                add_generation_prompt,
                tools => (),
                documents => (),
                strftime_now => Jinja::from_function(strftime_now),
            })
        });
        rendered.map_err(|e| self.fault("cannot turn this conversation into text", &e))
    }

    fn fault(&self, what: &str, e: &minijinja::Error) -> Error {
        let mut innermost = e;
        while let Some(cause) = innermost.source().and_then(|s| s.downcast_ref()) {
            innermost = cause;
        }
        let line = innermost
            .line()
            .map(|line| format!("line {line}: "))
            .unwrap_or_default();
        let reason = innermost
            .detail()
            .map_or_else(|| innermost.kind().to_string(), str::to_owned);
        Error::Template {
            path: self.path.clone(),
            reason: format!("{what}: {line}{reason}"),
        }
    }
}

/// The template without `{% generation %}` around the answers: it marks what to train on and adds no text.
fn without_tracking(text: &str) -> String {
    let Ok(tag) = Regex::new(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}") else {
        return text.to_owned();
    };
    tag.replace_all(text, |found: &regex::Captures<'_>| {
        let word = if found.get(2).is_some() {
            "endif"
        } else {
            "if true"
        };
        format!("{{%{} {word} {}%}}", &found[1], &found[3])
    })
    .into_owned()
}

/// Python's `json.dumps`, which the transformers library puts in the place of Jinja's own filter.
#[expect(
    clippy::needless_pass_by_value,
    reason = "the form minijinja calls filters in"
)]
fn to_json(value: &Jinja, options: Kwargs) -> std::result::Result<String, minijinja::Error> {
    let fault = |text: String| minijinja::Error::new(ErrorKind::InvalidOperation, text);
    if value.is_undefined() {
        return Err(fault("an undefined value has no JSON".to_owned()));
    }
    let indent = match options.get::<Option<Jinja>>("indent")? {
        None => None,
        Some(value) if value.is_none() => None,
        Some(value) => Some(match value.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(usize::try_from(value).unwrap_or(0).min(64)),
        }),
    };
    let separators = match options.get::<Option<Vec<String>>>("separators")?.as_deref() {
        None => None,
        Some([item, key]) => Some((item.clone(), key.clone())),
        Some(_) => return Err(fault("separators are two texts".to_owned())),
    };
    let dumps = Dumps {
        ensure_ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        separators,
        indent,
    };
    options.assert_all_used()?;
    let value = serde_json::to_value(value).map_err(|e| fault(e.to_string()))?;
    Ok(dumps.write(&value))
}
