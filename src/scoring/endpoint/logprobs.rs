//! ln p of answers from a server that returns log-probabilities. Two ways, and which of them works is found out
//! by asking, not by the server's name:
//!
//! * *echo*: `/v1/completions` with `echo` and `logprobs` returns ln p of every token of prompt and answer. The
//!   border between them is found as for a model run here: where the joint tokens part from those of the prompt.
//! * *next*: the most likely next tokens (`logprobs`, or `top_logprobs` of chats). Answers of a single token can
//!   be scored when they are among them; a question with an answer that is not is a miss, never a guess.
//!
//! Echoed numbers are not believed unseen. The server is asked for its next token after a few short prompts, then to
//! echo each with that token; all pairs of numbers must agree. Servers exist whose echo is off by one position.

use std::collections::HashMap;
use std::sync::atomic::AtomicBool;

use serde_json::{Value, json};

use super::Server;
use super::http::Failure;
use super::reply::{PROBE, body, excerpt};
use crate::scorer::{Answer, Likelihoods, Message, Miss, Prompt, Question};
use crate::scoring::border::miss;

/// Prompts of the first meeting. Several, because in one of them a false number may be close to the true one by
/// chance: counting was, within 0.13 nats, on a server whose echo is off by one.
const PROBES: [&str; 4] = [
    PROBE,
    "The capital of France is",
    "Water freezes below zero and boils at one",
    "To be, or not",
];
/// How far an echoed ln p may be from the same token's when it was generated: batches of servers in BF16.
const AGREE: f64 = 0.1;
/// Next tokens asked for, most first: 20 is what chats allow, 5 what completions do.
const TOPS: [usize; 2] = [20, 5];

/// How ln p is had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mode {
    /// Of every token.
    Echo,
    /// Of this many next tokens.
    Next(usize),
    /// Not at all: why.
    None(String),
}

/// The same for texts and for conversations.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Modes {
    /// Through `/v1/completions`.
    pub text: Mode,
    /// Through `/v1/chat/completions`.
    pub chat: Mode,
    /// Why texts are not scored by echo.
    echo: Option<String>,
}

impl Modes {
    /// Asks the server. `Err` where it cannot be asked at all.
    pub fn probe(server: &Server) -> Result<Self, Failure> {
        let text = Prompt::Text(PROBE.to_owned());
        let chat = Prompt::Chat(vec![Message {
            role: "user".to_owned(),
            content: PROBE.to_owned(),
        }]);
        let chat = next_mode(server, &chat)?;
        let mut text = next_mode(server, &text)?;
        let mut echo = None;
        if let Mode::Next(top) = text {
            match PROBES.iter().try_for_each(|probe| check_echo(server, probe, top)) {
                Ok(()) => text = Mode::Echo,
                Err(miss) => echo = Some(miss.detail),
            }
        }
        Ok(Self { text, chat, echo })
    }

    /// Whether any question can be scored.
    pub fn any(&self) -> bool {
        ![&self.text, &self.chat]
            .iter()
            .all(|m| matches!(m, Mode::None(_)))
    }

    /// A sentence for each kind of prompt.
    pub fn notes(&self) -> Vec<String> {
        let one = |what: &str, mode: &Mode| match mode {
            Mode::Echo => format!("{what} are scored by echo"),
            Mode::Next(top) => {
                format!(
                    "{what} are scored by the {top} most likely next tokens: answers must be single tokens"
                )
            }
            Mode::None(reason) => format!("{what}: the server cannot {reason}"),
        };
        let mut notes = vec![one("texts", &self.text), one("conversations", &self.chat)];
        notes.extend(self.echo.iter().map(|why| format!("echo is not used: {why}")));
        notes
    }
}

/// Whether next tokens come with log-probabilities, and how many.
fn next_mode(server: &Server, prompt: &Prompt) -> Result<Mode, Failure> {
    let on = AtomicBool::new(false);
    let mut why = String::new();
    for top in TOPS {
        match next_tokens(server, 0, prompt, top, &on) {
            Ok(Ok(tokens)) if tokens.is_empty() => {
                why = "no next token came with a log-probability".to_owned();
            }
            Ok(Ok(_)) => return Ok(Mode::Next(top)),
            Ok(Err(miss)) => why = miss.detail,
            Err(failure) if failure.kind.starts_with("status") || !failure.passing => why = failure.detail,
            Err(failure) => return Err(failure),
        }
    }
    Ok(Mode::None(format!("tell log-probabilities: {why}")))
}

/// The most likely next tokens and their ln p.
fn next_tokens(
    server: &Server,
    index: usize,
    prompt: &Prompt,
    top: usize,
    broken_off: &AtomicBool,
) -> Result<Answer<HashMap<String, f64>>, Failure> {
    let (path, mut body) = body(server, prompt, 1);
    let chat = matches!(prompt, Prompt::Chat(_));
    if chat {
        body["logprobs"] = json!(true);
        body["top_logprobs"] = json!(top);
    } else {
        body["logprobs"] = json!(top);
    }
    let answer = server.ask(index, broken_off, path, &body)?;
    let place = if chat {
        "/choices/0/logprobs/content/0/top_logprobs"
    } else {
        "/choices/0/logprobs/top_logprobs/0"
    };
    let found = match answer.pointer(place) {
        Some(Value::Object(map)) => map
            .iter()
            .filter_map(|(token, nats)| Some((token.clone(), nats.as_f64()?)))
            .collect(),
        Some(Value::Array(list)) => list
            .iter()
            .filter_map(|t| Some((t.get("token")?.as_str()?.to_owned(), t.get("logprob")?.as_f64()?)))
            .collect(),
        _ => return Ok(Err(unexpected("no top_logprobs", &answer))),
    };
    Ok(Ok(found))
}

fn unexpected(what: &str, answer: &Value) -> Miss {
    let detail = format!("the answer holds {what}: {}", excerpt(answer));
    miss("no log-probabilities", detail)
}

/// Tokens of a text as the server cuts it, each with its ln p; the first has none.
fn echo(
    server: &Server,
    index: usize,
    text: &str,
    broken_off: &AtomicBool,
) -> Answer<Vec<(String, Option<f64>)>> {
    // Some servers take 0 for as many as there is room for, so one token is generated, and dropped.
    let (path, mut body) = body(server, &Prompt::Text(text.to_owned()), 1);
    body["echo"] = json!(true);
    body["logprobs"] = json!(1);
    let answer = server.ask(index, broken_off, path, &body)?;
    let list = |name: &str| {
        let place = format!("/choices/0/logprobs/{name}");
        answer.pointer(&place).and_then(Value::as_array)
    };
    let (Some(tokens), Some(nats)) = (list("tokens"), list("token_logprobs")) else {
        return Err(unexpected("no tokens and token_logprobs", &answer));
    };
    let given = answer.pointer("/usage/prompt_tokens").and_then(Value::as_u64);
    let given = given.map_or(tokens.len().saturating_sub(1), |n| n as usize);
    if tokens.len() != nats.len() || given > tokens.len() || given == 0 {
        return Err(unexpected(
            "log-probabilities of another number of tokens",
            &answer,
        ));
    }
    let name = |t: &Value| t.as_str().map_or_else(|| t.to_string(), str::to_owned);
    let both = tokens.iter().zip(nats).take(given);
    Ok(both.map(|(t, n)| (name(t), n.as_f64())).collect())
}

/// Whether the echoed ln p of a token is what the same token has as the next one of `probe`.
fn check_echo(server: &Server, probe: &str, top: usize) -> Answer<()> {
    let on = AtomicBool::new(false);
    let next = next_tokens(server, 0, &Prompt::Text(probe.to_owned()), top, &on)??;
    let Some((token, nats)) = next.into_iter().max_by(|a, b| a.1.total_cmp(&b.1)) else {
        return Err(miss("echo", format!("no next token after {probe:?}")));
    };
    let before = echo(server, 0, probe, &on)?;
    let tokens = echo(server, 0, &format!("{probe}{token}"), &on)?;
    let kept = tokens.len() == before.len() + 1 && tokens.iter().zip(&before).all(|(a, b)| a.0 == b.0);
    let last = tokens.last().and_then(|(_, nats)| *nats);
    match last {
        _ if !kept => Err(miss(
            "echo",
            "the echoed tokens are not those of the prompt".to_owned(),
        )),
        Some(echoed) if (echoed - nats).abs() <= AGREE => Ok(()),
        echoed => {
            let echoed = echoed.map_or("none".to_owned(), |e| format!("{e:.3}"));
            let detail = format!(
                "after {probe:?} the same token has a log-probability of {nats:.3} as the next token and of {echoed} when echoed"
            );
            Err(miss("echo", detail))
        }
    }
}

/// ln p of the answers of one question.
pub fn likelihoods(
    server: &Server,
    modes: &Modes,
    index: usize,
    question: &Question,
    broken_off: &AtomicBool,
) -> Answer<Likelihoods> {
    let mode = match &question.prompt {
        Prompt::Text(_) => &modes.text,
        Prompt::Chat(_) => &modes.chat,
    };
    match (mode, &question.prompt) {
        (Mode::Echo, Prompt::Text(text)) => by_echo(server, index, text, &question.answers, broken_off),
        (Mode::Next(top), prompt) => {
            let tokens = next_tokens(server, index, prompt, *top, broken_off)??;
            among(&tokens, &question.answers)
        }
        (Mode::Echo | Mode::None(_), _) => Err(miss(
            "no log-probabilities",
            "the server tells none for such prompts".to_owned(),
        )),
    }
}

fn by_echo(
    server: &Server,
    index: usize,
    prompt: &str,
    answers: &[String],
    broken_off: &AtomicBool,
) -> Answer<Likelihoods> {
    let context = echo(server, index, prompt, broken_off)?;
    let joint = answers
        .iter()
        .map(|answer| echo(server, index, &format!("{prompt}{answer}"), broken_off))
        .collect::<Answer<Vec<_>>>()?;
    let parting = |ids: &Vec<(String, Option<f64>)>| {
        let same = context.iter().zip(ids).take_while(|(a, b)| a.0 == b.0);
        same.count()
    };
    let border = joint.iter().map(parting).min().unwrap_or(context.len());
    let mut found = Likelihoods {
        nats: Vec::new(),
        tokens: Vec::new(),
        cut: 0,
    };
    for (tokens, answer) in joint.iter().zip(answers) {
        let own = &tokens[border..];
        let nats: Option<f64> = own.iter().map(|(_, nats)| *nats).sum();
        match nats.filter(|n| n.is_finite() && !own.is_empty()) {
            Some(nats) => found.nats.push(nats),
            None => {
                let detail = format!("the server tells no log-probability for every token of {answer:?}");
                return Err(miss("no log-probabilities", detail));
            }
        }
        found.tokens.push(own.len());
    }
    Ok(found)
}

/// Answers among the most likely next tokens. A chat's answer may begin with a space or not.
fn among(tokens: &HashMap<String, f64>, answers: &[String]) -> Answer<Likelihoods> {
    let find = |answer: &String| {
        let trimmed = || {
            let alike = tokens.iter().filter(|(token, _)| token.trim() == answer.trim());
            alike.map(|(_, nats)| *nats).max_by(f64::total_cmp)
        };
        tokens.get(answer).copied().or_else(trimmed)
    };
    let nats = answers.iter().map(|answer| find(answer).ok_or(answer));
    let nats = nats.collect::<Result<Vec<f64>, &String>>().map_err(|answer| {
        let detail = format!(
            "{answer:?} is not among the {} most likely next tokens",
            tokens.len()
        );
        miss("not among next tokens", detail)
    })?;
    Ok(Likelihoods {
        tokens: vec![1; nats.len()],
        nats,
        cut: 0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_found_exactly_or_but_for_spaces() {
        let tokens = HashMap::from([
            (" 1".to_owned(), -0.5),
            ("1".to_owned(), -3.0),
            (" yes".to_owned(), -2.0),
        ]);
        let ask = |answers: &[&str]| {
            let answers: Vec<String> = answers.iter().map(|a| (*a).to_owned()).collect();
            among(&tokens, &answers)
        };
        assert_eq!(ask(&["1", "yes"]).unwrap().nats, [-3.0, -2.0]);
        assert_eq!(ask(&[" 1"]).unwrap().nats, [-0.5]);
        let missed = ask(&["1", "no"]).unwrap_err();
        assert!(
            missed.detail.contains("\"no\" is not among the 3"),
            "{}",
            missed.detail
        );
    }
}
