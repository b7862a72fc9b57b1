//! One exchange with a server: JSON there and back, and a word for everything that can go wrong. Owns the forms
//! of a base URL, and that an API key appears in no message.

use std::fmt;
use std::time::Duration;

use serde_json::Value;
use ureq::Agent;
use ureq::http::{Response, StatusCode};

/// Most bytes of an answer. One with log-probabilities of a long prompt has a few megabytes.
const MOST_BYTES: u64 = 64 << 20;
/// Characters of a server's own words that are kept.
const WORDS: usize = 300;

/// An API key; it is sent, never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Key(String);

impl Key {
    /// The value of an environment variable; `None` when it is not set or empty.
    pub fn from_env(name: &str) -> Option<Self> {
        std::env::var(name).ok().and_then(Self::new)
    }

    /// A key; `None` of an empty text.
    pub fn new(key: String) -> Option<Self> {
        (!key.is_empty()).then_some(Self(key))
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(not shown)")
    }
}

/// Why an exchange failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// A word for counting: `timeout`, `connection`, `half answer`, `status 500`, `not json`, `too large`.
    pub kind: String,
    /// The whole story.
    pub detail: String,
    /// Whether it may pass when tried again: connections, timeouts, 429 and 5xx.
    pub passing: bool,
    /// How long the server asks to wait.
    pub wait: Option<Duration>,
}

/// See the module's text.
pub struct Client {
    agent: Agent,
    base: String,
    key: Option<Key>,
}

impl Client {
    /// For this base URL, with and without `/v1`. `Err` says what is wrong with it.
    pub fn new(url: &str, key: Option<Key>, timeout: Duration) -> Result<Self, String> {
        let base = base_url(url)?;
        let mut config = Agent::config_builder()
            .timeout_global(Some(timeout))
            .http_status_as_error(false)
            .max_idle_connections_per_host(256)
            .max_idle_connections(256)
            .user_agent(concat!("qtool/", env!("CARGO_PKG_VERSION")));
        if is_loopback(&base) {
            config = config.proxy(None);
        }
        Ok(Self {
            agent: config.build().new_agent(),
            base,
            key,
        })
    }

    /// The base URL, ending in `/v1` or what stands for it.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// JSON from `path`, such as `/models`.
    pub fn get(&self, path: &str) -> Result<Value, Failure> {
        let mut request = self.agent.get(format!("{}{path}", self.base));
        if let Some(Key(key)) = &self.key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        self.read(request.call())
    }

    /// Sends `body` to `path` and reads the answer.
    pub fn post(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        let mut request = self.agent.post(format!("{}{path}", self.base));
        if let Some(Key(key)) = &self.key {
            request = request.header("Authorization", format!("Bearer {key}"));
        }
        let request = request.header("Content-Type", "application/json");
        self.read(request.send(body.to_string()))
    }

    fn read(&self, answer: Result<Response<ureq::Body>, ureq::Error>) -> Result<Value, Failure> {
        let mut answer = answer.map_err(|e| self.failure(&e, "connection"))?;
        let status = answer.status();
        let header = |name: &str| answer.headers().get(name)?.to_str().ok().map(str::to_owned);
        let wait = header("retry-after").and_then(|text| text.trim().parse().ok());
        let body = answer.body_mut().with_config().limit(MOST_BYTES).read_to_vec();
        if !status.is_success() {
            let words = words(&body.unwrap_or_default());
            // A request that is not valid now will not be later, whatever the status says.
            let invalid = words.contains("validation error");
            let passing = status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error();
            return Err(Failure {
                kind: format!("status {}", status.as_u16()),
                detail: self.hide(format!("the server answered {status}: {words}")),
                passing: passing && !invalid,
                wait: wait.map(Duration::from_secs),
            });
        }
        let body = body.map_err(|e| self.failure(&e, "half answer"))?;
        serde_json::from_slice(&body).map_err(|e| {
            let detail = format!("the answer is no JSON ({e}): {}", words(&body));
            self.lasting("not json", detail)
        })
    }

    /// A failure of the transport; `kind` where it is no other.
    fn failure(&self, e: &ureq::Error, kind: &str) -> Failure {
        let kind = match e {
            ureq::Error::Timeout(_) => "timeout",
            ureq::Error::BodyExceedsLimit(_) => return self.lasting("too large", e.to_string()),
            ureq::Error::BadUri(_) | ureq::Error::Http(_) => return self.lasting("bad url", e.to_string()),
            _ => kind,
        };
        Failure {
            kind: kind.to_owned(),
            detail: self.hide(format!("{}: {e}", self.base)),
            passing: true,
            wait: None,
        }
    }

    fn lasting(&self, kind: &str, detail: String) -> Failure {
        Failure {
            kind: kind.to_owned(),
            detail: self.hide(detail),
            passing: false,
            wait: None,
        }
    }

    fn hide(&self, text: String) -> String {
        match &self.key {
            Some(Key(key)) => text.replace(key, "(key)"),
            None => text,
        }
    }
}

/// The server's own words: the message of an error object, or the beginning of whatever came.
fn words(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(body);
    let json: Option<Value> = serde_json::from_slice(body).ok();
    let message = json.as_ref().and_then(|v| {
        let error = v.get("error").unwrap_or(v);
        ["message", "detail"]
            .iter()
            .find_map(|k| error.get(k)?.as_str())
            .or(error.as_str())
    });
    let line = message
        .unwrap_or(&text)
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ");
    match line.char_indices().nth(WORDS) {
        Some((end, _)) => format!("{} ...", &line[..end]),
        None if line.is_empty() => "(nothing)".to_owned(),
        None => line,
    }
}

/// `http://host:port`, with `/v1` or the path of a method behind it or not, to what the methods' paths are
/// appended to. Another path, as proxies have, is kept and gets `/v1`.
fn base_url(url: &str) -> Result<String, String> {
    let fault = |why: &str| format!("{url:?} is no URL of a server: {why}, such as http://127.0.0.1:8000/v1");
    let (scheme, rest) = url
        .split_once("://")
        .ok_or_else(|| fault("expected http:// or https://"))?;
    if !["http", "https"].contains(&scheme.to_ascii_lowercase().as_str()) {
        return Err(fault("expected http:// or https://"));
    }
    if rest.contains(['?', '#', ' ']) {
        return Err(fault("expected no query, fragment or space"));
    }
    let mut rest = rest.trim_end_matches('/');
    for method in ["/chat/completions", "/completions", "/models"] {
        rest = rest.strip_suffix(method).unwrap_or(rest);
    }
    if rest.is_empty() || rest.starts_with(['/', ':']) {
        return Err(fault("expected a host"));
    }
    let last = rest.rsplit('/').next().unwrap_or_default();
    let versioned = rest.contains('/')
        && last.len() > 1
        && last.starts_with('v')
        && last[1..].bytes().all(|b| b.is_ascii_digit());
    Ok(if versioned {
        format!("{scheme}://{rest}")
    } else {
        format!("{scheme}://{rest}/v1")
    })
}

/// Whether the host is this machine, which no proxy can reach for us.
fn is_loopback(base: &str) -> bool {
    let host = base.split("://").nth(1).unwrap_or_default();
    ["127.", "localhost", "[::1]"].iter().any(|h| host.starts_with(h))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_of_a_base_url() {
        for (given, expected) in [
            ("http://h:8000", "http://h:8000/v1"),
            ("http://h:8000/", "http://h:8000/v1"),
            ("http://h:8000/v1", "http://h:8000/v1"),
            ("https://h/v1/", "https://h/v1"),
            ("https://h/v1/chat/completions", "https://h/v1"),
            ("https://h/api/v3", "https://h/api/v3"),
            ("https://h/team", "https://h/team/v1"),
            ("http://v1", "http://v1/v1"),
        ] {
            assert_eq!(base_url(given).as_deref(), Ok(expected), "{given}");
        }
        for wrong in ["h:8000", "ftp://h", "http://", "http:///v1", "http://h/v1?key=a"] {
            assert!(
                base_url(wrong).unwrap_err().contains("no URL of a server"),
                "{wrong}"
            );
        }
    }

    #[test]
    fn keys_and_long_words_are_not_shown() {
        let key = Key::new("secret-7".to_owned());
        assert!(!format!("{key:?}").contains("secret"));
        assert!(Key::new(String::new()).is_none());
        let client = Client::new("http://h", key, Duration::from_secs(1)).unwrap();
        assert_eq!(client.hide("bad key secret-7".to_owned()), "bad key (key)");
        assert_eq!(
            words(br#"{"error": {"message": "no\n such model"}}"#),
            "no such model"
        );
        assert_eq!(words(br#"{"detail": "gone"}"#), "gone");
        assert_eq!(words("语".repeat(400).as_bytes()).chars().count(), WORDS + 4);
        assert_eq!(words(b""), "(nothing)");
    }
}
