//! Log-probabilities of a server that has a model one can do by hand: a token is a word with the space before
//! it, and its ln p is minus an eighth of its own length and of twice that of the token before.

use std::ops::ControlFlow;

use qtool::scorer::{Answer, Likelihoods, Message, Prompt, Question, Scorer};
use qtool::scoring::endpoint::EndpointScorer;
use serde_json::{Value, json};

use super::server::{Act, Asked, Server};
use super::{models, options};

/// Next tokens the server knows.
const NEXT: [&str; 3] = [" ten", " yes", " indeed"];

/// How a server's echo is wrong.
#[derive(Clone, Copy, PartialEq)]
enum Echo {
    Right,
    /// Each token's number is the next one's.
    Shifted,
    /// The field is ignored.
    Ignored,
}

/// Words with the space before them; a hyphen joins a word to what comes before it.
fn words(text: &str) -> Vec<String> {
    let mut words: Vec<String> = Vec::new();
    for c in text.chars() {
        match words.last_mut() {
            Some(word) if c != ' ' || word.trim().is_empty() => word.push(c),
            _ => words.push(c.to_string()),
        }
    }
    words
}

fn nats(before: &str, token: &str) -> f64 {
    -((token.len() + 2 * before.len()) as f64) / 8.0
}

fn answer(asked: &Asked, echo: Echo) -> Act {
    if asked.path == "/v1/models" {
        return models();
    }
    assert_eq!(asked.body["max_tokens"], 1);
    let Some(prompt) = asked.body["prompt"].as_str() else {
        return chat(asked);
    };
    let mut tokens = words(prompt);
    let given = tokens.len();
    let last = tokens.last().cloned().unwrap_or_default();
    let top: Value = NEXT
        .iter()
        .map(|t| ((*t).to_owned(), json!(nats(&last, t))))
        .collect::<serde_json::Map<_, _>>()
        .into();
    if asked.body["echo"] != true || echo == Echo::Ignored {
        let first =
            json!({"tokens": [NEXT[0]], "token_logprobs": [nats(&last, NEXT[0])], "top_logprobs": [top]});
        return Act::Json(
            json!({"choices": [{"text": NEXT[0], "logprobs": first}], "usage": {"prompt_tokens": given, "total_tokens": given + 1}}),
        );
    }
    tokens.push(NEXT[0].to_owned());
    let mut numbers: Vec<Value> = tokens.windows(2).map(|w| json!(nats(&w[0], &w[1]))).collect();
    if echo == Echo::Shifted {
        numbers.remove(0);
        numbers.push(json!(-1.0));
    }
    numbers.insert(0, Value::Null);
    let text = tokens.concat();
    let all = json!({"tokens": tokens, "token_logprobs": numbers});
    Act::Json(
        json!({"choices": [{"text": text, "logprobs": all}], "usage": {"prompt_tokens": given, "total_tokens": given + 1}}),
    )
}

/// Chats know five next tokens at most and say so.
fn chat(asked: &Asked) -> Act {
    if asked.body["top_logprobs"].as_u64() > Some(5) {
        return Act::Status(400, "", "{\"error\": \"top_logprobs is at most 5\"}".to_owned());
    }
    let one = |(token, logprob): (&str, f64)| json!({"token": token, "logprob": logprob});
    let top: Vec<Value> = [("0", -0.25), ("1", -2.5), ("I", -3.0)].map(one).to_vec();
    let content = json!([{"token": "0", "logprob": -0.25, "top_logprobs": top}]);
    Act::Json(json!({"choices": [{"message": {"content": "0"}, "logprobs": {"content": content}}]}))
}

fn likelihoods(scorer: &EndpointScorer, questions: &[Question]) -> Vec<Answer<Likelihoods>> {
    let mut found: Vec<Option<Answer<Likelihoods>>> = vec![None; questions.len()];
    scorer
        .likelihoods(questions, &mut |index, answer| {
            assert!(found[index].replace(answer).is_none());
            ControlFlow::Continue(())
        })
        .unwrap();
    found.into_iter().map(Option::unwrap).collect()
}

fn question(prompt: &str, answers: &[&str]) -> Question {
    Question {
        prompt: Prompt::Text(prompt.to_owned()),
        answers: answers.iter().map(|a| (*a).to_owned()).collect(),
    }
}

#[test]
fn echoed_answers_by_hand() {
    let server = Server::start(|asked| answer(asked, Echo::Right));
    let scorer = EndpointScorer::open(&options(&server)).unwrap();
    assert!(
        scorer.notes()[0].contains("texts are scored by echo"),
        "{:?}",
        scorer.notes()
    );
    let found = likelihoods(
        &scorer,
        &[
            question("is it so?", &[" yes", " no it is not"]),
            // "fine" and "-ish" are one token, so both answers begin with what follows "is".
            question("it is fine", &["-ish", " indeed"]),
            question("it is", &["", " so"]),
        ],
    );
    let first = found[0].as_ref().unwrap();
    assert_eq!(first.tokens, [1, 4]);
    let long = nats(" so?", " no") + nats(" no", " it") + nats(" it", " is") + nats(" is", " not");
    assert_eq!(first.nats, [nats(" so?", " yes"), long]);
    let merged = found[1].as_ref().unwrap();
    assert_eq!(merged.tokens, [1, 2]);
    assert_eq!(
        merged.nats,
        [
            nats(" is", " fine-ish"),
            nats(" is", " fine") + nats(" fine", " indeed")
        ]
    );
    assert_eq!(found[2].as_ref().unwrap_err().kind, "no log-probabilities");
}

/// An echo that is not true is found out, and the next tokens are used instead.
#[test]
fn a_false_echo_is_not_believed() {
    for (echo, reason) in [
        (Echo::Shifted, "as the next token and of -1.500 when echoed"),
        (Echo::Ignored, "number of tokens"),
    ] {
        let server = Server::start(move |asked| answer(asked, echo));
        let scorer = EndpointScorer::open(&options(&server)).unwrap();
        let notes = scorer.notes().join("\n");
        assert!(
            notes.contains("texts are scored by the 20 most likely") && notes.contains(reason),
            "{notes}"
        );
        assert!(scorer.abilities().likelihoods);
        let asked = [
            question("is it so?", &[" yes", " indeed"]),
            question("is it so?", &[" yes", " no"]),
        ];
        let found = likelihoods(&scorer, &asked);
        let good = found[0].as_ref().unwrap();
        assert_eq!(good.nats, [nats(" so?", " yes"), nats(" so?", " indeed")]);
        let missed = found[1].as_ref().unwrap_err();
        assert_eq!(missed.kind, "not among next tokens");
        assert!(missed.detail.contains("\" no\""), "{}", missed.detail);
    }
}

#[test]
fn chats_are_scored_by_their_next_token() {
    let server = Server::start(|asked| answer(asked, Echo::Right));
    let scorer = EndpointScorer::open(&options(&server)).unwrap();
    assert!(
        scorer.notes()[1].contains("conversations are scored by the 5 most"),
        "{:?}",
        scorer.notes()
    );
    let message = Message {
        role: "user".to_owned(),
        content: "equal?".to_owned(),
    };
    let asked = Question {
        prompt: Prompt::Chat(vec![message]),
        ..question("", &["1", " 0"])
    };
    let found = likelihoods(&scorer, &[asked]).remove(0).unwrap();
    assert_eq!(found.nats, [-2.5, -0.25]);
}
