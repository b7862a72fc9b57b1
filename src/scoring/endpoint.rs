//! A served model as a [`Scorer`]: any server that speaks OpenAI's protocol (FastDeploy, vLLM, llama.cpp ...).
//! Owns what is asked of a server when it is met; the pages below own the parts.
//!
//! | Page | Idea |
//! |---|---|
//! | `http` | one exchange, and what can go wrong |
//! | `patience` | trying again |
//! | `crowd` | many questions under way |
//! | `reply` | replies, held to a JSON schema where the server can |
//! | `logprobs` | ln p of answers, as far as the server tells, and whether what it tells is true |
//!
//! What a server cannot do: windows and whole distributions (no protocol hands them out), embeddings of an
//! encoder, and telling whether a prompt was cut. Greedy means temperature 0; a server may still answer the
//! same question differently when its batches differ.

mod crowd;
mod http;
mod logprobs;
mod patience;
mod reply;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::Value;

pub use self::http::Key;
use self::http::{Client, Failure};
use self::logprobs::Modes;
use self::patience::Patience;
use crate::scorer::{
    Abilities, Likelihoods, Miss, OnAnswer, Pair, Prompt, Question, Reply, Request, Scorer, Window,
};
use crate::{Error, Result};

/// Tokens that may come back for one question before the server is thought to ignore `max_tokens`.
const PATIENCE_FACTOR: usize = 2;

/// How a server is asked.
#[derive(Debug, Clone)]
pub struct Options {
    /// `http://host:port`, with `/v1` or without.
    pub url: String,
    /// Name of the model; may be left out where the server has only one.
    pub model: Option<String>,
    /// Sent as a bearer token.
    pub key: Option<Key>,
    /// Questions under way at once.
    pub concurrency: usize,
    /// Of one exchange, everything included.
    pub timeout: Duration,
    /// Tries after a failed one that may pass.
    pub retries: u32,
    /// Wait before the first of them; doubled for each further one.
    pub first_wait: Duration,
    /// No wait is longer, even if the server asks for one.
    pub longest_wait: Duration,
    /// Of the waits' jitter.
    pub seed: u64,
}

impl Options {
    /// For this server, with defaults for everything else.
    pub fn new(url: &str) -> Self {
        Self {
            url: url.to_owned(),
            model: None,
            key: None,
            concurrency: 64,
            timeout: Duration::from_secs(120),
            retries: 5,
            first_wait: Duration::from_millis(500),
            longest_wait: Duration::from_secs(30),
            seed: 0,
        }
    }
}

/// What all threads share.
struct Server {
    client: Client,
    patience: Patience,
    model: String,
    tokens: AtomicU64,
    /// How far the server follows schemas; `reply` knows the values.
    schemas: AtomicU8,
    /// Whether it is told to punish no repetitions.
    neutral: AtomicBool,
}

impl Server {
    /// One question, tried as often as patience allows.
    fn ask(
        &self,
        index: usize,
        broken_off: &AtomicBool,
        path: &str,
        body: &Value,
    ) -> std::result::Result<Value, Failure> {
        let answer = self
            .patience
            .run(index, broken_off, || self.client.post(path, body))?;
        let tokens = answer.pointer("/usage/total_tokens").and_then(Value::as_u64);
        self.tokens.fetch_add(tokens.unwrap_or(0), Ordering::Relaxed);
        Ok(answer)
    }
}

impl From<Failure> for Miss {
    fn from(failure: Failure) -> Self {
        Self {
            kind: failure.kind,
            detail: failure.detail,
        }
    }
}

/// See the module's text.
pub struct EndpointScorer {
    server: Arc<Server>,
    concurrency: usize,
    context: Option<usize>,
    modes: Modes,
}

impl EndpointScorer {
    /// Meets the server: asks for its models, and with a few short questions what log-probabilities it tells.
    /// Fails when it cannot be reached, refuses the key, or the model's name is missing or unknown to it.
    pub fn open(options: &Options) -> Result<Self> {
        let fault = |reason: String| Error::Endpoint {
            url: options.url.clone(),
            reason,
        };
        let client = Client::new(&options.url, options.key.clone(), options.timeout)
            .map_err(|reason| Error::Question { reason })?;
        let concurrency = options.concurrency.max(1);
        let patience = Patience::new(
            options.retries,
            options.first_wait,
            options.longest_wait,
            options.seed,
            (PATIENCE_FACTOR * concurrency).max(16),
        );
        let on = AtomicBool::new(false);
        let models = patience.run(0, &on, || client.get("/models"));
        let (model, context) = choose(options.model.as_deref(), models).map_err(fault)?;
        let server = Arc::new(Server {
            client,
            patience,
            model,
            tokens: AtomicU64::new(0),
            schemas: AtomicU8::new(reply::UNTRIED),
            neutral: AtomicBool::new(true),
        });
        reply::probe(&server);
        let modes = Modes::probe(&server).map_err(|f| fault(f.detail))?;
        Ok(Self {
            server,
            concurrency,
            context,
            modes,
        })
    }

    /// The model's name.
    pub fn model(&self) -> &str {
        &self.server.model
    }

    /// What was found out about the server, a sentence each.
    pub fn notes(&self) -> Vec<String> {
        let mut notes = self.modes.notes();
        notes.extend(reply::notes(&self.server));
        notes
    }

    fn unable(&self, what: &str) -> Error {
        Error::Unable {
            model: format!("{} at {}", self.server.model, self.server.client.base()),
            what: what.to_owned(),
        }
    }
}

/// The model to ask, and how many tokens it takes where the server says so.
fn choose(
    wanted: Option<&str>,
    models: std::result::Result<Value, Failure>,
) -> std::result::Result<(String, Option<usize>), String> {
    let listed = match (models, wanted) {
        (Ok(models), _) => models,
        // A server without the list may still have the model.
        (Err(f), Some(wanted)) if ["status 404", "status 405", "not json"].contains(&f.kind.as_str()) => {
            return Ok((wanted.to_owned(), None));
        }
        (Err(f), _) if ["status 401", "status 403"].contains(&f.kind.as_str()) => {
            return Err(format!(
                "{}; set the environment variable that holds the API key",
                f.detail
            ));
        }
        (Err(f), _) => return Err(f.detail),
    };
    let entries = listed.get("data").and_then(Value::as_array);
    let entries = entries.map(Vec::as_slice).unwrap_or_default();
    let named = |entry: &Value| Some(entry.get("id")?.as_str()?.to_owned());
    let names: Vec<String> = entries.iter().filter_map(named).collect();
    let name = match (wanted, names.as_slice()) {
        // A server may know more names than it lists, so the first question decides.
        (Some(wanted), _) => wanted.to_owned(),
        (None, [only]) => only.clone(),
        (None, []) => return Err("names no model; say which one with --model".to_owned()),
        (None, several) => {
            return Err(format!(
                "serves {} models; say which one with --model: {}",
                several.len(),
                several.join(", ")
            ));
        }
    };
    let entry = entries.iter().find(|e| named(e).as_deref() == Some(&name));
    let context = entry.and_then(|e| e.get("max_model_len")).and_then(Value::as_u64);
    Ok((name, context.and_then(|c| usize::try_from(c).ok())))
}

impl Scorer for EndpointScorer {
    fn notes(&self) -> Vec<String> {
        EndpointScorer::notes(self)
    }

    fn abilities(&self) -> Abilities {
        Abilities {
            likelihoods: self.modes.any(),
            replies: true,
            windows: false,
            labels: 0,
            embeddings: false,
        }
    }

    fn context(&self) -> Option<usize> {
        self.context
    }

    fn tokenizer_digest(&self) -> Option<String> {
        None
    }

    fn tokens_run(&self) -> u64 {
        self.server.tokens.load(Ordering::Relaxed)
    }

    fn likelihoods(&self, questions: &[Question], on_answer: OnAnswer<'_, Likelihoods>) -> Result<()> {
        let is_chat = |q: &&Question| matches!(q.prompt, Prompt::Chat(_));
        let impossible = [
            (questions.iter().any(|q| is_chat(&q)), &self.modes.chat),
            (!questions.iter().all(|q| is_chat(&q)), &self.modes.text),
        ];
        for (_, mode) in impossible.iter().filter(|(asked, _)| *asked) {
            if let logprobs::Mode::None(reason) = mode {
                return Err(self.unable(reason));
            }
        }
        let (server, modes) = (Arc::clone(&self.server), self.modes.clone());
        let work = move |index: usize, question: &Question, broken_off: &AtomicBool| {
            logprobs::likelihoods(&server, &modes, index, question, broken_off)
        };
        crowd::run(questions.to_vec(), self.concurrency, work, on_answer)
    }

    fn replies(&self, requests: &[Request], on_answer: OnAnswer<'_, Reply>) -> Result<()> {
        let server = Arc::clone(&self.server);
        let work = move |index: usize, request: &Request, broken_off: &AtomicBool| {
            reply::reply(&server, index, request, broken_off)
        };
        crowd::run(requests.to_vec(), self.concurrency, work, on_answer)
    }

    fn tokenize(&self, _: &str) -> Result<Vec<u32>> {
        Err(self.unable("tokenize a text: the protocol does not hand out token ids"))
    }

    fn windows(&self, _: &[Window], _: OnAnswer<'_, Vec<f32>>) -> Result<()> {
        Err(self.unable("score windows of token ids: the tokenizer of a served model is not known"))
    }

    fn logits(&self, _: &Window) -> Result<Vec<f32>> {
        Err(self.unable("give whole distributions: the protocol does not hand them out"))
    }

    fn classify(&self, _: &[Pair], _: OnAnswer<'_, Vec<f32>>) -> Result<()> {
        Err(self.unable("classify texts: a served language model has no sequence-classification head"))
    }

    fn embed(&self, _: &[String], _: OnAnswer<'_, Vec<f32>>) -> Result<()> {
        Err(self.unable("embed texts: only the completions of a server are asked"))
    }
}
