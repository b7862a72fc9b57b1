//! A path and what stands there about quantization, before any weight file is opened: `config.json` with its
//! `quantization_config`, or the file beside it that older writers used.

use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::Result;
use crate::checkpoint::shards::read_json;
use crate::import::gguf;

/// Files in which AutoGPTQ and AutoAWQ kept what is in `config.json` today, with the method they stand for.
const OLDER: [(&str, &str); 2] = [("quantize_config.json", "gptq"), ("quant_config.json", "awq")];

/// A path and what it says of itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Place {
    /// The path.
    pub path: PathBuf,
    /// `config.json`; null where there is none.
    pub config: Value,
    /// What is said about quantization; null where nothing is.
    pub quantization: Value,
    /// The GGUF file that it is or holds.
    pub gguf: Option<PathBuf>,
    /// The method, where another file than `config.json` says it.
    older: Option<&'static str>,
}

impl Place {
    /// Looks at a path. Fails when a file that is there is no JSON.
    pub fn of(path: &Path) -> Result<Self> {
        let json = |name: &str| -> Result<Value> {
            let file = path.join(name);
            if file.is_file() {
                read_json(&file)
            } else {
                Ok(Value::Null)
            }
        };
        let config = json("config.json")?;
        let mut this = Self {
            path: path.to_owned(),
            quantization: config.get("quantization_config").cloned().unwrap_or_default(),
            config,
            gguf: None,
            older: None,
        };
        let artifact = path.join(crate::artifact::MANIFEST_FILE).is_file();
        if !artifact {
            this.gguf = gguf::file_of(path)?;
        }
        if this.quantization.is_null() && !artifact {
            for (name, method) in OLDER {
                let about = json(name)?;
                if about.is_object() {
                    (this.quantization, this.older) = (about, Some(method));
                    break;
                }
            }
        }
        Ok(this)
    }

    /// The method of quantization it names, in lower case.
    pub fn method(&self) -> Option<String> {
        if self.path.join(crate::artifact::MANIFEST_FILE).is_file() {
            return None;
        }
        let named = self.quantization.get("quant_method").and_then(Value::as_str);
        // bitsandbytes' first configs named no method.
        let bits = self.quantization.get("load_in_4bit").map(|_| "bitsandbytes");
        named.or(self.older).or(bits).map(str::to_lowercase)
    }

    /// The file that says it.
    pub fn said_in(&self) -> PathBuf {
        let older = OLDER.iter().find(|(_, method)| self.older == Some(*method));
        self.path.join(older.map_or("config.json", |(name, _)| *name))
    }

    /// A number under one of these keys.
    pub fn number(&self, keys: &[&str]) -> Option<i64> {
        keys.iter().find_map(|key| self.quantization.get(key)?.as_i64())
    }

    /// A text under one of these keys, in lower case.
    pub fn text(&self, keys: &[&str]) -> Option<String> {
        let text = keys.iter().find_map(|key| self.quantization.get(key)?.as_str());
        text.map(str::to_lowercase)
    }
}
