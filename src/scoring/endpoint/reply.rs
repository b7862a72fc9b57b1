//! Replies of a server. Owns the bodies of both kinds of completion, and the ways to hold a model to a JSON
//! schema: OpenAI's `json_schema` first, then `json_object` with a schema (llama-cpp-python), and where a server
//! refuses both, none. A refusal counts when the same question then goes through; it holds for the run.

use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use super::Server;
use super::http::Failure;
use crate::scorer::{Answer, Message, Prompt, Reply, Request};
use crate::scoring::border::{conversation, miss};

/// Nothing was refused yet.
pub const UNTRIED: u8 = 0;
/// `json_schema` was refused.
const OBJECT: u8 = 1;
/// Both forms were.
const NONE: u8 = 2;

/// A prompt of the first meeting.
pub const PROBE: &str = "one two three four five six seven eight nine";
/// What servers call their penalty of repetitions. Some have one by default, and then temperature 0 is not greedy.
const PENALTIES: [&str; 2] = ["repeat_penalty", "repetition_penalty"];

/// Most stop strings that OpenAI's protocol takes.
const STOPS: usize = 4;

/// Path of the method and body for a prompt, without what is asked about it.
pub fn body(server: &Server, prompt: &Prompt, most: usize) -> (&'static str, Value) {
    let mut body = json!({"model": server.model, "max_tokens": most, "temperature": 0});
    if server.neutral.load(Ordering::Relaxed) {
        PENALTIES.iter().for_each(|name| body[name] = json!(1.0));
    }
    match prompt {
        Prompt::Text(text) => {
            body["prompt"] = json!(text);
            ("/completions", body)
        }
        Prompt::Chat(messages) => {
            body["messages"] = conversation(messages);
            ("/chat/completions", body)
        }
    }
}

/// Finds out whether the server takes the fields that switch penalties off: OpenAI's own refuses what it does not
/// know, llama-cpp-python punishes repetitions unless told not to.
pub fn probe(server: &Server) {
    let on = AtomicBool::new(false);
    let chat = Prompt::Chat(vec![Message {
        role: "user".to_owned(),
        content: PROBE.to_owned(),
    }]);
    for prompt in [Prompt::Text(PROBE.to_owned()), chat] {
        for neutral in [true, false] {
            server.neutral.store(neutral, Ordering::Relaxed);
            let (path, body) = body(server, &prompt, 1);
            if server.ask(0, &on, path, &body).is_ok() {
                return;
            }
        }
    }
}

/// What the fields of this run came to.
pub fn notes(server: &Server) -> Vec<String> {
    let mut notes = Vec::from_iter(schema_note(server));
    if !server.neutral.load(Ordering::Relaxed) {
        notes.push(format!(
            "the server refuses {}; where it punishes repetitions by default, replies are not greedy",
            PENALTIES.join(" and ")
        ));
    }
    notes
}

fn schema_note(server: &Server) -> Option<String> {
    match server.schemas.load(Ordering::Relaxed) {
        OBJECT => Some(
            "the server refuses response_format json_schema; json_object with a schema was sent".to_owned(),
        ),
        NONE => Some("the server refuses response_format; replies were not held to a schema".to_owned()),
        _ => None,
    }
}

/// The schema a request asks for; of one with a list of replies, that list.
fn schema(request: &Request) -> Option<Value> {
    let listed = || request.allowed.as_ref().map(|allowed| json!({"enum": allowed}));
    request.schema.clone().or_else(listed)
}

fn response_format(level: u8, schema: &Value) -> Option<Value> {
    match level {
        UNTRIED => Some(json!({
            "type": "json_schema",
            "json_schema": {"name": "reply", "schema": schema, "strict": true},
        })),
        OBJECT => Some(json!({"type": "json_object", "schema": schema})),
        _ => None,
    }
}

/// One reply.
pub fn reply(server: &Server, index: usize, request: &Request, broken_off: &AtomicBool) -> Answer<Reply> {
    let (path, mut body) = body(server, &request.prompt, request.most);
    if !request.stop.is_empty() {
        let first: Vec<&String> = request.stop.iter().take(STOPS).collect();
        body["stop"] = json!(first);
    }
    let schema = schema(request).filter(|_| matches!(request.prompt, Prompt::Chat(_)));
    let mut level = server.schemas.load(Ordering::Relaxed);
    let answer = loop {
        let format = schema.as_ref().and_then(|s| response_format(level, s));
        let sent = format.is_some();
        match format {
            Some(format) => body["response_format"] = format,
            None => {
                body.as_object_mut().map(|b| b.remove("response_format"));
            }
        }
        match server.ask(index, broken_off, path, &body) {
            Err(failure) if sent && is_refusal(&failure) => level += 1,
            Err(failure) => return Err(failure.into()),
            Ok(answer) => break answer,
        }
    };
    // The same question went through without what was refused, so that was the reason.
    server.schemas.fetch_max(level, Ordering::Relaxed);
    let text = text(&answer).ok_or_else(|| {
        miss(
            "no text",
            format!("the answer holds no text: {}", excerpt(&answer)),
        )
    })?;
    let stops = request.stop.iter().filter(|s| !s.is_empty());
    let end = stops.filter_map(|s| text.find(s.as_str())).min();
    let mut text = end.map_or(text, |end| &text[..end]).to_owned();
    // A reply held to a list of texts comes as a JSON text.
    if let (Some(allowed), None) = (&request.allowed, &request.schema)
        && let Ok(plain) = serde_json::from_str::<String>(text.trim())
        && allowed.contains(&plain)
    {
        text = plain;
    }
    Ok(Reply { text, cut: 0 })
}

/// Whether a failure may be about a field of the body that the server does not know. llama-cpp-python tells of
/// it with status 500.
fn is_refusal(failure: &Failure) -> bool {
    ["status 400", "status 422", "status 501"].contains(&failure.kind.as_str())
        || (failure.kind.starts_with("status 5") && failure.detail.contains("response_format"))
}

/// Text of the first choice, of either kind of completion.
fn text(answer: &Value) -> Option<&str> {
    let choice = answer.pointer("/choices/0")?;
    choice
        .get("text")
        .or_else(|| choice.pointer("/message/content"))?
        .as_str()
}

/// The beginning of an answer, for messages.
pub fn excerpt(answer: &Value) -> String {
    let text = answer.to_string();
    match text.char_indices().nth(200) {
        Some((end, _)) => format!("{} ...", &text[..end]),
        None => text,
    }
}
