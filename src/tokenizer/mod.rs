//! Text to token ids and back, as the model's own folder defines it. Owns which file is believed and what a
//! caller sees; each kind of file has its page.
//!
//! | Page | Owns |
//! |---|---|
//! | `config` | `tokenizer_config.json` and the files beside it: names of special tokens, flags, templates |
//! | `library` | `tokenizer.json`, run by the `tokenizers` crate |
//! | `sentencepiece` | `tokenizer.model`, where there is no `tokenizer.json` |
//! | `gguf` | the tokenizer inside a GGUF file |
//! | `wordpiece` | of these, BERT's |
//! | `files` | the same as the files of a folder |
//! | `added` | tokens that are taken out of a text before that |
//! | `template` | conversations to text |
//! | `python` | what templates expect of Python |

mod added;
mod config;
mod files;
mod gguf;
mod library;
pub(crate) mod python;
mod sentencepiece;
mod template;
mod wordpiece;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use qtool_formats::FormatError;
use qtool_formats::limits::MAX_JSON_BYTES;
use serde_json::Value;

pub use self::files::files_of_gguf;

use self::config::Config;
use self::library::Library;
use self::sentencepiece::SentencePiece;
use self::template::Template;
use crate::calibrate::corpus::Encode;
use crate::{Error, Result};

/// Files that can define a vocabulary, the first one found is used.
const VOCABULARIES: [&str; 3] = ["tokenizer.json", "tokenizer.model", "spiece.model"];

/// The special tokens everyone asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct SpecialIds {
    /// Before a document.
    pub bos: Option<u32>,
    /// After a document or an answer.
    pub eos: Option<u32>,
    /// Fills short rows.
    pub pad: Option<u32>,
    /// Stands for what the vocabulary lacks.
    pub unk: Option<u32>,
}

/// One or two texts as an encoder reads them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Ids, special tokens included.
    pub ids: Vec<u32>,
    /// For each id which of the two texts it belongs to, as the tokenizer counts special tokens.
    pub types: Vec<u32>,
    /// Tokens that did not fit.
    pub cut: usize,
}

/// What turns text into ids.
#[derive(Debug)]
enum Vocabulary {
    Library(Box<Library>),
    SentencePiece(Box<SentencePiece>),
}

impl Vocabulary {
    fn read(path: &Path, bytes: &[u8], config: &Config) -> Result<Self> {
        Ok(if path.extension().is_some_and(|e| e == "json") {
            Self::Library(Box::new(Library::read(path, bytes)?))
        } else {
            Self::SentencePiece(Box::new(SentencePiece::read(path, bytes, config)?))
        })
    }

    fn len(&self) -> usize {
        match self {
            Self::Library(model) => model.vocabulary(),
            Self::SentencePiece(model) => model.vocabulary(),
        }
    }

    fn id(&self, token: &str) -> Option<u32> {
        match self {
            Self::Library(model) => model.id(token),
            Self::SentencePiece(model) => model.id(token),
        }
    }
}

/// A folder's tokenizer.
#[derive(Debug)]
pub struct Tokenizer {
    folder: PathBuf,
    model: Vocabulary,
    template: Option<Template>,
    ids: SpecialIds,
    digest: String,
}

impl Tokenizer {
    /// Reads the tokenizer of a model folder: its `tokenizer.json`, or else its SentencePiece model; or that of a GGUF
    /// file.
    ///
    /// Fails when there is none, or when one of its files is damaged or of an unknown kind.
    pub fn open(folder: &Path) -> Result<Self> {
        if let Some(file) = qtool_formats::import::gguf::file_of(folder)? {
            return Self::of_gguf(&file);
        }
        let mut sources = Sources::new(folder);
        let config = Config::read(&mut sources)?;
        let Some((path, bytes)) = sources.first(&VOCABULARIES)? else {
            return Err(Error::NoTokenizer {
                folder: folder.to_owned(),
                looked_for: VOCABULARIES.join(", "),
            });
        };
        let model = Vocabulary::read(&path, &bytes, &config)?;
        Self::of(folder, model, &config, sources.digest())
    }

    /// The tokenizer inside a GGUF file.
    fn of_gguf(file: &Path) -> Result<Self> {
        let about = qtool_formats::import::gguf::metadata(file)?;
        let (model, config) = gguf::read(file, &about)?;
        let mut hasher = blake3::Hasher::new();
        hasher.update(about.tokenizer_text().as_bytes());
        let digest = format!("blake3:{}", hasher.finalize().to_hex());
        Self::of(file, model, &config, digest)
    }

    fn of(folder: &Path, model: Vocabulary, config: &Config, digest: String) -> Result<Self> {
        let template = config
            .template
            .as_ref()
            .map(|t| Template::new(t, config))
            .transpose()?;
        let id = |name: &str| config.special(name).and_then(|token| model.id(token));
        let ids = SpecialIds {
            bos: id("bos_token"),
            eos: id("eos_token"),
            pad: id("pad_token"),
            unk: id("unk_token"),
        };
        Ok(Self {
            folder: folder.to_owned(),
            model,
            template,
            ids,
            digest,
        })
    }

    /// Ids of a text. Special tokens written out in it are recognised in any case; `special` adds those that
    /// the tokenizer puts around a document.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>> {
        match &self.model {
            Vocabulary::Library(model) => model.encode(text, special),
            Vocabulary::SentencePiece(model) => Ok(model.encode(text, special)),
        }
    }

    /// Ids of two texts in one row, special tokens included, and for each id which of the two it belongs to.
    pub fn encode_pair(&self, a: &str, b: &str) -> Result<(Vec<u32>, Vec<u32>)> {
        match &self.model {
            Vocabulary::Library(model) => model.encode_pair(a, b),
            Vocabulary::SentencePiece(model) => Ok(model.encode_pair(a, b)),
        }
    }

    /// What an encoder reads of one or two texts: special tokens included, and at most `most` ids. Where the
    /// texts are longer, tokens are cut from the end of the longer of the two until they fit
    /// (`longest_first`). Fails when `most` has no room even for the special tokens.
    pub fn encode_row(&self, a: &str, b: Option<&str>, most: usize) -> Result<Row> {
        let row = match &self.model {
            Vocabulary::Library(model) => model.encode_row(a, b, most)?,
            Vocabulary::SentencePiece(model) => model.encode_row(a, b, most),
        };
        row.ok_or_else(|| Error::Tokenizer {
            path: self.folder.clone(),
            reason: format!("the special tokens around a text are more than {most}, there is no room for it"),
        })
    }

    /// Text of ids. `skip_special` leaves special tokens out.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        match &self.model {
            Vocabulary::Library(model) => model.decode(ids, skip_special),
            Vocabulary::SentencePiece(model) => {
                model.decode(ids, skip_special).map_err(|id| Error::Vocabulary {
                    id,
                    vocabulary: model.vocabulary(),
                })
            }
        }
    }

    /// One past the highest id there is.
    pub fn vocabulary(&self) -> usize {
        self.model.len()
    }

    /// Digest of every file that was read, for manifests.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Ids of special tokens.
    pub fn ids(&self) -> SpecialIds {
        self.ids
    }

    /// Text of a conversation, through the folder's chat template. `messages` is an array of objects with
    /// `role` and `content`; `add_generation_prompt` ends the text where an answer would begin.
    pub fn chat(&self, messages: &Value, add_generation_prompt: bool) -> Result<String> {
        self.chat_at(messages, add_generation_prompt, SystemTime::now())
    }

    /// The same at a given time, for templates that print the date. Times are UTC.
    pub fn chat_at(&self, messages: &Value, add_generation_prompt: bool, now: SystemTime) -> Result<String> {
        match &self.template {
            Some(template) => template.render(messages, add_generation_prompt, now),
            None => Err(Error::Template {
                path: self.folder.clone(),
                reason: "has no chat template (chat_template.jinja, or chat_template in \
                         tokenizer_config.json); give text or token ids instead of messages"
                    .to_owned(),
            }),
        }
    }
}

impl Encode for Tokenizer {
    fn text(&self, text: &str) -> Result<Vec<u32>> {
        self.encode(text, true)
    }

    /// The template writes the special tokens, so none are added.
    fn messages(&self, messages: &Value) -> Result<Vec<u32>> {
        self.encode(&self.chat(messages, false)?, false)
    }
}

/// The files of a folder, read once each and remembered by digest.
struct Sources {
    folder: PathBuf,
    hasher: blake3::Hasher,
}

impl Sources {
    fn new(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
            hasher: blake3::Hasher::new(),
        }
    }

    /// A file's path and bytes, or nothing where it does not exist.
    fn bytes(&mut self, name: &str) -> Result<Option<(PathBuf, Vec<u8>)>> {
        let path = self.folder.join(name);
        let size = match fs::metadata(&path) {
            Ok(meta) => meta.len(),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(FormatError::io(&path, "read")(e).into()),
        };
        if size > MAX_JSON_BYTES {
            let reason = format!("has {size} bytes, expected at most {MAX_JSON_BYTES}");
            return Err(Error::Tokenizer { path, reason });
        }
        let bytes = fs::read(&path).map_err(FormatError::io(&path, "read"))?;
        // Lengths first: a file's end can not be moved into the next one unnoticed.
        for part in [name.as_bytes(), &bytes] {
            self.hasher.update(&(part.len() as u64).to_le_bytes());
            self.hasher.update(part);
        }
        Ok(Some((path, bytes)))
    }

    /// The first of these that exists.
    fn first(&mut self, names: &[&str]) -> Result<Option<(PathBuf, Vec<u8>)>> {
        for name in names {
            if let Some(found) = self.bytes(name)? {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// A JSON object.
    fn object(&mut self, name: &str) -> Result<Option<Value>> {
        let Some((path, bytes)) = self.bytes(name)? else {
            return Ok(None);
        };
        let reason = match serde_json::from_slice::<Value>(&bytes) {
            Ok(value) if value.is_object() => return Ok(Some(value)),
            Ok(_) => "expected a JSON object".to_owned(),
            Err(e) => format!("no JSON: {e}"),
        };
        Err(Error::Tokenizer { path, reason })
    }

    /// UTF-8 text.
    fn text(&mut self, name: &str) -> Result<Option<(PathBuf, String)>> {
        let Some((path, bytes)) = self.bytes(name)? else {
            return Ok(None);
        };
        match String::from_utf8(bytes) {
            Ok(text) => Ok(Some((path, text))),
            Err(e) => {
                let at = e.utf8_error().valid_up_to();
                let reason = format!("expected UTF-8 text, the byte at {at} is none");
                Err(Error::Tokenizer { path, reason })
            }
        }
    }

    fn digest(&self) -> String {
        format!("blake3:{}", self.hasher.finalize().to_hex())
    }
}
