//! A served model, with servers that behave well, badly, and worse. A real one is asked by
//! `tests/interop/served_model.py`.

mod logprobs;
pub mod server;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use qtool::scorer::{Answer, Message, Prompt, Reply, Request, Scorer};
use qtool::scoring::endpoint::{EndpointScorer, Key, Options};
use serde_json::{Value, json};

use server::{Act, Asked, Server};

/// Longer than any good answer takes on a busy machine; only servers that hang make a test wait for it.
const TIMEOUT: Duration = Duration::from_secs(4);

fn options(server: &Server) -> Options {
    Options {
        concurrency: 8,
        timeout: TIMEOUT,
        retries: 2,
        first_wait: Duration::from_millis(2),
        longest_wait: Duration::from_secs(2),
        ..Options::new(&server.url)
    }
}

fn open(server: &Server) -> EndpointScorer {
    EndpointScorer::open(&options(server)).unwrap()
}

fn models() -> Act {
    Act::Json(json!({"object": "list", "data": [{"id": "little", "max_model_len": 512}]}))
}

fn completion(text: &str) -> Value {
    json!({"choices": [{"text": text, "index": 0, "finish_reason": "stop"}], "usage": {"total_tokens": 5}})
}

fn chat(text: &str) -> Value {
    json!({"choices": [{"message": {"role": "assistant", "content": text}}], "usage": {"total_tokens": 5}})
}

/// A server without log-probabilities that does `act` once it has been met.
fn plain(act: impl Fn(&Asked) -> Act + Send + Sync + 'static) -> Server {
    Server::start(move |asked| match asked.path.as_str() {
        "/v1/models" => models(),
        _ if asked.body.get("logprobs").is_some() => Act::Status(400, "", "no logprobs here".to_owned()),
        _ if is_probe(asked) => Act::Json(completion("ten")),
        _ => act(asked),
    })
}

/// Whether this is a question of the first meeting.
fn is_probe(asked: &Asked) -> bool {
    asked.body["max_tokens"] == 1
}

fn request(text: String) -> Request {
    Request {
        prompt: Prompt::Text(text),
        most: 8,
        stop: vec!["\n".to_owned()],
        allowed: None,
        schema: None,
    }
}

fn chat_request(text: &str) -> Request {
    let message = Message {
        role: "user".to_owned(),
        content: text.to_owned(),
    };
    Request {
        prompt: Prompt::Chat(vec![message]),
        ..request(String::new())
    }
}

/// All answers in the order of the requests; each must come exactly once.
fn replies(scorer: &EndpointScorer, requests: &[Request]) -> Vec<Answer<Reply>> {
    let mut found: Vec<Option<Answer<Reply>>> = vec![None; requests.len()];
    scorer
        .replies(requests, &mut |index, answer| {
            assert!(found[index].replace(answer).is_none(), "{index} twice");
            ControlFlow::Continue(())
        })
        .unwrap();
    found
        .into_iter()
        .map(|a| a.expect("an answer or a miss"))
        .collect()
}

fn number(asked: &Asked) -> usize {
    let prompt = asked.body["prompt"].as_str().unwrap();
    prompt.rsplit(' ').next().unwrap().parse().unwrap()
}

/// Every third question meets another kind of trouble; every failure is counted, no good answer lost.
#[test]
fn a_misbehaving_server_costs_only_what_it_spoils() {
    let server = plain(|asked| {
        let n = number(asked);
        let good = completion(&format!("reply {n}\nand more"));
        match n {
            3 | 33 => Act::Half(good),
            6 | 36 => Act::Status(
                500,
                "",
                "{\"error\": {\"message\": \"out of\\nmemory\"}}".to_owned(),
            ),
            9 => Act::Hang(TIMEOUT * 3),
            12 | 42 => Act::Raw("<html>busy</html>"),
            15 if asked.times == 0 => Act::Status(503, "", String::new()),
            18 if asked.times < 2 => Act::Torn,
            21 => Act::Slow(Duration::from_millis(200), good),
            24 => Act::Status(400, "", "{\"error\": \"too long\"}".to_owned()),
            27 => Act::Raw("{\"choices\": []}"),
            30 if asked.times == 0 => Act::Half(good),
            _ => Act::Json(good),
        }
    });
    let scorer = open(&server);
    assert_eq!((scorer.model(), scorer.context()), ("little", Some(512)));
    let requests: Vec<Request> = (0..60).map(|n| request(format!("item {n}"))).collect();
    let (begun, met) = (Instant::now(), scorer.tokens_run());
    let found = replies(&scorer, &requests);
    assert!(begun.elapsed() < TIMEOUT * 10, "{:?}", begun.elapsed());
    let mut kinds: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (n, answer) in found.iter().enumerate() {
        match answer {
            Ok(reply) => assert_eq!(reply.text, format!("reply {n}")),
            Err(miss) => kinds.entry(miss.kind.as_str()).or_default().push(n),
        }
    }
    let expected = BTreeMap::from([
        ("half answer", vec![3, 33]),
        ("status 500", vec![6, 36]),
        ("timeout", vec![9]),
        ("not json", vec![12, 42]),
        ("status 400", vec![24]),
        ("no text", vec![27]),
    ]);
    assert_eq!(kinds, expected);
    let detail = |n: usize| found[n].as_ref().unwrap_err().detail.clone();
    assert!(
        detail(6).contains("out of memory (tried 3 times)"),
        "{}",
        detail(6)
    );
    assert!(detail(12).contains("<html>busy"), "{}", detail(12));
    assert!(
        detail(24).contains("too long") && !detail(24).contains("tried"),
        "{}",
        detail(24)
    );
    // What may pass is tried three times, what stays once.
    let log = server.log();
    let tries = |n: usize| {
        let asked = log
            .iter()
            .filter(|a| !is_probe(a))
            .filter(|a| a.path == "/v1/completions" && a.body.get("logprobs").is_none());
        asked.filter(|a| number(a) == n).count()
    };
    let counted = [3, 6, 9, 12, 15, 18, 21, 24, 27, 30, 31].map(tries);
    assert_eq!(counted, [3, 3, 3, 1, 2, 3, 1, 1, 1, 2, 1]);
    assert_eq!(scorer.tokens_run() - met, 5 * (60 - 9));
}

#[test]
fn a_server_may_ask_for_time() {
    let server = plain(|asked| match asked.times {
        0 => Act::Status(429, "Retry-After: 1\r\n", String::new()),
        _ => Act::Json(completion("now")),
    });
    let scorer = open(&server);
    let begun = Instant::now();
    assert_eq!(
        replies(&scorer, &[request("a".to_owned())])
            .remove(0)
            .unwrap()
            .text,
        "now"
    );
    assert!(begun.elapsed() >= Duration::from_secs(1));
}

/// A server that dies under way: what was answered is kept, the rest counted, and soon.
#[test]
fn a_server_that_dies_ends_the_run() {
    let pause = Duration::from_millis(16);
    let server = std::sync::Arc::new(plain(move |_| Act::Slow(pause, completion("x"))));
    let scorer = EndpointScorer::open(&Options {
        retries: 9,
        first_wait: Duration::from_millis(1),
        longest_wait: Duration::from_millis(20),
        ..options(&server)
    })
    .unwrap();
    let requests: Vec<Request> = (0..400).map(|n| request(format!("item {n}"))).collect();
    let (mut good, mut bad) = (0, BTreeMap::new());
    let dying = std::sync::Arc::clone(&server);
    scorer
        .replies(&requests, &mut |_, answer| {
            match answer {
                Ok(_) => good += 1,
                Err(miss) => *bad.entry(miss.kind).or_insert(0) += 1,
            }
            if good == 20 {
                dying.close();
            }
            ControlFlow::Continue(())
        })
        .unwrap();
    let lost: usize = bad.values().sum();
    assert_eq!(good + lost, 400);
    assert!(good >= 20 && lost > 50, "{good} {bad:?}");
    assert_eq!(bad.keys().collect::<Vec<_>>(), ["connection"]);
    let gone = EndpointScorer::open(&options(&server))
        .map(|_| ())
        .unwrap_err()
        .to_string();
    assert!(
        gone.contains(&server.url) && gone.contains("tried 3 times"),
        "{gone}"
    );
}

#[test]
fn breaking_off_does_not_wait_for_a_server_that_hangs() {
    let server = plain(|asked| match number(asked) {
        0 => Act::Json(completion("x")),
        _ => Act::Hang(Duration::from_secs(60)),
    });
    let scorer = EndpointScorer::open(&Options {
        timeout: Duration::from_secs(60),
        ..options(&server)
    })
    .unwrap();
    let requests: Vec<Request> = (0..5).map(|n| request(format!("item {n}"))).collect();
    let begun = Instant::now();
    let mut count = 0;
    scorer
        .replies(&requests, &mut |_, _| {
            count += 1;
            ControlFlow::Break(())
        })
        .unwrap();
    assert!(count == 1 && begun.elapsed() < Duration::from_secs(30));
}

#[test]
fn keys_are_sent_and_never_told() {
    let server = Server::start(|asked| match asked.authorization.as_deref() {
        Some("Bearer right") if asked.path == "/v1/models" => models(),
        Some("Bearer right") => Act::Json(completion("x")),
        other => Act::Status(
            401,
            "",
            format!("{{\"error\": \"bad key {}\"}}", other.unwrap_or("none")),
        ),
    });
    let open = |key: &str| {
        let key = Key::new(key.to_owned());
        EndpointScorer::open(&Options {
            key,
            ..options(&server)
        })
    };
    assert!(
        replies(&open("right").unwrap(), &[request("a".to_owned())])
            .remove(0)
            .is_ok()
    );
    let message = open("wr0ng").map(|_| ()).unwrap_err().to_string();
    assert!(
        message.contains("environment variable") && !message.contains("wr0ng"),
        "{message}"
    );
    let message = open("").map(|_| ()).unwrap_err().to_string();
    assert!(message.contains("bad key none"), "{message}");
}

#[test]
fn models_are_named_or_chosen() {
    let listing = |ids: &[&str]| {
        let data: Vec<Value> = ids.iter().map(|id| json!({"id": id})).collect();
        Server::start(move |asked| match asked.path.as_str() {
            "/v1/models" if data.is_empty() => Act::Status(404, "", String::new()),
            "/v1/models" => Act::Json(json!({"data": data})),
            _ => Act::Json(completion("x")),
        })
    };
    let two = listing(&["a", "b"]);
    let message = EndpointScorer::open(&options(&two))
        .map(|_| ())
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("2 models; say which one with --model: a, b"),
        "{message}"
    );
    let named = |server: &Server| {
        let model = Some("c".to_owned());
        EndpointScorer::open(&Options {
            model,
            ..options(server)
        })
        .unwrap()
    };
    assert_eq!(named(&two).model(), "c");
    let silent = listing(&[]);
    assert_eq!(named(&silent).model(), "c");
    assert!(
        replies(&named(&silent), &[request("a".to_owned())])
            .remove(0)
            .is_ok()
    );
    assert_eq!(silent.log().last().unwrap().body["model"], "c");
    let message = EndpointScorer::open(&options(&silent))
        .map(|_| ())
        .unwrap_err()
        .to_string();
    assert!(message.contains("404"), "{message}");
    let nowhere = EndpointScorer::open(&Options::new("127.0.0.1:1"))
        .map(|_| ())
        .unwrap_err()
        .to_string();
    assert!(nowhere.contains("no URL of a server"), "{nowhere}");
}

/// A penalty of repetitions is switched off where the server lets us.
#[test]
fn penalties_are_switched_off() {
    for lenient in [true, false] {
        let server = Server::start(move |asked| match asked.path.as_str() {
            "/v1/models" => models(),
            _ if asked.body.get("repeat_penalty").is_some() && !lenient => {
                Act::Status(400, "", "unknown field repeat_penalty".to_owned())
            }
            _ => Act::Json(completion("x")),
        });
        let scorer = open(&server);
        replies(&scorer, &[request("a".to_owned())]).remove(0).unwrap();
        let body = server.log().last().unwrap().body.clone();
        for name in ["repeat_penalty", "repetition_penalty"] {
            assert_eq!(body.get(name), lenient.then(|| json!(1.0)).as_ref(), "{name}");
        }
        let told = scorer.notes().iter().any(|n| n.contains("punishes repetitions"));
        assert_eq!(told, !lenient);
    }
}

/// `json_schema`, then `json_object`, then nothing, as far as a server goes along.
#[test]
fn replies_are_held_to_a_schema_where_the_server_can() {
    let schema = json!({"type": "object", "properties": {"result": {"enum": [0, 1]}}});
    for (understands, requests_of_two) in [("json_schema", 2), ("json_object", 3), ("nothing", 4)] {
        let server = plain(move |asked| match asked.body.pointer("/response_format/type") {
            None => Act::Json(chat("{\"result\": 0}")),
            Some(form) if form == understands => Act::Json(chat("{\"result\": 1}")),
            // A server that tells of it with another status than one would think.
            Some(form) if form == "json_object" => Act::Status(
                500,
                "",
                "{\"error\": \"1 validation error: response_format\"}".to_owned(),
            ),
            Some(_) => Act::Status(422, "", "{\"detail\": \"unknown response_format\"}".to_owned()),
        });
        let scorer = open(&server);
        let before = server.log().len();
        let request = Request {
            schema: Some(schema.clone()),
            ..chat_request("equal?")
        };
        let expected = format!("{{\"result\": {}}}", i32::from(understands != "nothing"));
        for _ in 0..2 {
            let found = replies(&scorer, std::slice::from_ref(&request))
                .remove(0)
                .unwrap();
            assert_eq!(found.text, expected);
        }
        let log = server.log();
        assert_eq!(log.len() - before, requests_of_two, "{understands}");
        let sent = log.iter().filter_map(|a| a.body.get("response_format"));
        for format in sent {
            let carried = format
                .get("schema")
                .or_else(|| format.pointer("/json_schema/schema"));
            assert_eq!(carried, Some(&schema));
        }
        let notes = scorer.notes().join("\n");
        assert_eq!(
            notes.contains("refuses response_format"),
            understands != "json_schema",
            "{notes}"
        );
    }
    // A list of allowed replies is a schema, too; the quotes around a JSON text are not part of the reply.
    let server = plain(|asked| {
        assert_eq!(
            asked.body["response_format"]["json_schema"]["schema"]["enum"],
            json!(["yes", "no"])
        );
        Act::Json(chat("\"no\""))
    });
    let allowed = Some(vec!["yes".to_owned(), "no".to_owned()]);
    let request = Request {
        allowed,
        ..chat_request("equal?")
    };
    assert_eq!(replies(&open(&server), &[request]).remove(0).unwrap().text, "no");
}

#[test]
fn what_a_server_cannot_do_is_said() {
    let server = plain(|_| Act::Json(completion("x")));
    let scorer = open(&server);
    assert!(!scorer.abilities().likelihoods && scorer.abilities().replies && !scorer.abilities().windows);
    let message = scorer.tokenize("a").unwrap_err().to_string();
    assert!(message.contains("little at http://127.0.0.1"), "{message}");
    let question = qtool::scorer::Question {
        prompt: Prompt::Text("a".to_owned()),
        answers: vec!["b".to_owned()],
    };
    let refused = scorer.likelihoods(&[question], &mut |_, _| ControlFlow::Continue(()));
    let message = refused.unwrap_err().to_string();
    assert!(
        message.contains("log-probabilities") && message.contains("no logprobs here"),
        "{message}"
    );
    assert!(
        scorer.notes()[0].contains("texts: the server cannot"),
        "{:?}",
        scorer.notes()
    );
}
