//! A served model, as typed: its address, and how patient to be with it.

use std::time::Duration;

use crate::Result;
use crate::device::Device;
use crate::scorer::Scorer;
use crate::scoring::endpoint::{EndpointScorer, Key, Options};
use crate::scoring::local;
use crate::validate::Place;

/// What was typed.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "A served model")]
pub struct ServerArgs {
    /// Ask a model behind an OpenAI-compatible server, after the folders or alone
    #[arg(long, value_name = "URL")]
    pub endpoint: Option<String>,
    /// Its name there; several to compare models of one server
    #[arg(long = "model", value_name = "NAME", requires = "endpoint")]
    pub names: Vec<String>,
    /// Environment variable that holds the key
    #[arg(long, value_name = "VARIABLE", default_value = "OPENAI_API_KEY")]
    pub key_from: String,
    /// Questions in flight at once
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub concurrency: usize,
    /// Seconds to wait for one answer
    #[arg(long, value_name = "SECONDS", default_value_t = 120)]
    pub timeout: u64,
    /// How often a question is asked again after a failure that may pass
    #[arg(long, value_name = "N", default_value_t = 5)]
    pub retries: u32,
}

impl ServerArgs {
    /// The served models.
    pub fn places(&self) -> Vec<Place> {
        let served = |url: &String, name: &str| Place::Served {
            url: url.clone(),
            name: name.to_owned(),
        };
        match &self.endpoint {
            None => Vec::new(),
            // A server of one model knows which.
            Some(url) if self.names.is_empty() => vec![served(url, "")],
            Some(url) => self.names.iter().map(|name| served(url, name)).collect(),
        }
    }

    /// How one of them is asked; the key is read from the environment and shown nowhere.
    pub fn options(&self, url: &str, name: &str, seed: u64) -> Options {
        Options {
            model: (!name.is_empty()).then(|| name.to_owned()),
            key: Key::from_env(&self.key_from),
            concurrency: self.concurrency,
            timeout: Duration::from_secs(self.timeout),
            retries: self.retries,
            seed,
            ..Options::new(url)
        }
    }

    /// Makes a model ready to be asked, on this device or there.
    pub fn open(&self, place: &Place, device: &Device, seed: u64) -> Result<Box<dyn Scorer>> {
        Ok(match place {
            Place::Folder(folder) => crate::scoring::open_on(device, folder, local::Options::default())?,
            Place::Served { url, name } => Box::new(EndpointScorer::open(&self.options(url, name, seed))?),
        })
    }
}
