//! What stands beside a vocabulary: `tokenizer_config.json`, `special_tokens_map.json`, `added_tokens.json` and
//! `chat_template.jinja`. Owns which of them is believed where they disagree.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::Value;

use super::Sources;
use crate::Result;

/// The names under which a folder lists its special tokens.
const NAMES: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
];

/// A token that is looked for in the text before anything else happens to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddedToken {
    /// As it stands in the text.
    pub content: String,
    /// Its id, where the file gives one.
    pub id: Option<u32>,
    /// Left out by a decode that skips special tokens.
    pub special: bool,
    /// Takes white space before it along.
    pub lstrip: bool,
    /// Takes white space after it along.
    pub rstrip: bool,
}

/// Source of a template.
#[derive(Debug, Clone)]
pub struct TemplateSource {
    /// The file it stands in.
    pub path: PathBuf,
    /// The template.
    pub text: String,
}

/// The files, put together.
#[derive(Debug, Default)]
pub struct Config {
    /// Special tokens by name (`bos_token`).
    pub specials: BTreeMap<String, String>,
    /// Tokens beyond the vocabulary, or special ones within it.
    pub added: Vec<AddedToken>,
    /// The chat template.
    pub template: Option<TemplateSource>,
    /// Name of the class in transformers.
    pub class: Option<String>,
    /// Whether a document begins with its token, where the folder says so.
    pub add_bos: Option<bool>,
    /// Whether it ends with one.
    pub add_eos: Option<bool>,
    /// Of Llama: every part of a text between special tokens gets the space of a first word.
    pub legacy: Option<bool>,
}

impl Config {
    /// Reads what there is; a folder with none of these files is fine.
    pub(super) fn read(sources: &mut Sources) -> Result<Self> {
        let path = sources.folder.join("tokenizer_config.json");
        let main = sources.object("tokenizer_config.json")?;
        let map = sources.object("special_tokens_map.json")?;
        let extra = sources.object("added_tokens.json")?;
        let file = sources.text("chat_template.jinja")?;
        let mut config = Self::default();
        // A file of its own wins over the config's field: that is where newer folders keep it.
        let field = || {
            let text = default_template(main.as_ref()?.get("chat_template")?)?;
            Some(TemplateSource { path, text })
        };
        config.template = file
            .map(|(path, text)| TemplateSource { path, text })
            .or_else(field);
        let flag = |name: &str| main.as_ref()?.get(name)?.as_bool();
        (config.add_bos, config.add_eos) = (flag("add_bos_token"), flag("add_eos_token"));
        config.legacy = flag("legacy");
        let class = main.as_ref().and_then(|m| m.get("tokenizer_class")?.as_str());
        config.class = class.map(str::to_owned);
        for source in [&main, &map].into_iter().flatten() {
            config.names(source);
        }
        if let Some(ids) = main
            .as_ref()
            .and_then(|m| m.get("added_tokens_decoder")?.as_object())
        {
            for (id, value) in ids {
                let id = id.parse().ok();
                added(value)
                    .into_iter()
                    .for_each(|t| config.put(AddedToken { id, ..t }));
            }
        }
        for (content, id) in extra.iter().filter_map(Value::as_object).flatten() {
            let id = id.as_u64().and_then(|id| u32::try_from(id).ok());
            let token = added(&Value::String(content.clone()));
            token.into_iter().for_each(|t| {
                config.put(AddedToken {
                    id,
                    special: false,
                    ..t
                });
            });
        }
        Ok(config)
    }

    /// A special token by name.
    pub fn special(&self, name: &str) -> Option<&str> {
        self.specials.get(name).map(String::as_str)
    }

    /// Special tokens that a file names. What an earlier file said stays.
    fn names(&mut self, source: &Value) {
        for name in NAMES {
            if let Some(token) = source.get(name).and_then(added) {
                self.specials
                    .entry(name.to_owned())
                    .or_insert(token.content.clone());
                self.put(token);
            }
        }
        for name in ["additional_special_tokens", "extra_special_tokens"] {
            let list = source.get(name).and_then(Value::as_array);
            list.into_iter()
                .flatten()
                .filter_map(added)
                .for_each(|t| self.put(t));
        }
    }

    /// The first mention of a token decides, a later one may still give it its id.
    fn put(&mut self, token: AddedToken) {
        match self.added.iter_mut().find(|t| t.content == token.content) {
            Some(known) if known.id.is_none() && token.id.is_some() => *known = token,
            Some(_) => {}
            None => self.added.push(token),
        }
    }
}

/// A token given as text or as an object; anything else, and the empty text, is none.
fn added(value: &Value) -> Option<AddedToken> {
    let flag = |name: &str| value.get(name).and_then(Value::as_bool);
    let content = value.as_str().or_else(|| value.get("content")?.as_str())?;
    (!content.is_empty()).then(|| AddedToken {
        content: content.to_owned(),
        id: None,
        special: flag("special").unwrap_or(true),
        lstrip: flag("lstrip").unwrap_or(false),
        rstrip: flag("rstrip").unwrap_or(false),
    })
}

/// The template itself, or the one named `default` of a list.
fn default_template(value: &Value) -> Option<String> {
    let named = |list: &Value| {
        let default = |v: &&Value| v.get("name").and_then(Value::as_str) == Some("default");
        list.as_array()?
            .iter()
            .find(default)?
            .get("template")?
            .as_str()
            .map(str::to_owned)
    };
    value.as_str().map(str::to_owned).or_else(|| named(value))
}
