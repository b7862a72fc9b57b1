//! Asks a served model, for comparisons with other programs (`tests/interop/served_model.py`).
//!
//! ```text
//! cargo run --release --example served -- URL JOBS ANSWERS [CONCURRENCY] [RETRIES]
//! ```
//!
//! JOBS holds a JSON object a line: `prompt` or `messages`, and `answers` to be scored or `most` tokens of a
//! reply, perhaps held to a `schema`. All lines are of one kind. ANSWERS gets a line for each, in their order:
//! an answer, or why there is none.

use std::error::Error;
use std::fs;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use qtool::scorer::{Answer, Prompt, Question, Request, Scorer};
use qtool::scoring::endpoint::{EndpointScorer, Key, Options};
use serde::Serialize;
use serde_json::{Value, json};

fn prompt(job: &Value) -> Result<Prompt, Box<dyn Error>> {
    match job["prompt"].as_str() {
        Some(text) => Ok(Prompt::Text(text.to_owned())),
        None => Ok(Prompt::Chat(serde_json::from_value(job["messages"].clone())?)),
    }
}

fn line<T: Serialize>(answer: Answer<T>) -> String {
    match answer {
        Ok(found) => json!(found).to_string(),
        Err(miss) => json!(miss).to_string(),
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [url, jobs, answers, numbers @ ..] = args.as_slice() else {
        return Err("usage: served URL JOBS ANSWERS [CONCURRENCY] [RETRIES]".into());
    };
    let mut options = Options {
        key: Key::from_env("OPENAI_API_KEY"),
        first_wait: Duration::from_millis(100),
        ..Options::new(url)
    };
    if let Some(number) = numbers.first() {
        options.concurrency = number.parse()?;
    }
    if let Some(number) = numbers.get(1) {
        options.retries = number.parse()?;
    }
    let jobs: Vec<Value> = fs::read_to_string(jobs)?
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()?;
    let scorer = EndpointScorer::open(&options)?;
    eprintln!("asking {}", scorer.model());
    let begun = Instant::now();
    let mut lines = vec![String::new(); jobs.len()];
    if jobs.first().is_some_and(|job| job.get("answers").is_some()) {
        let question = |job: &Value| -> Result<Question, Box<dyn Error>> {
            Ok(Question {
                prompt: prompt(job)?,
                answers: serde_json::from_value(job["answers"].clone())?,
            })
        };
        let questions: Vec<Question> = jobs.iter().map(question).collect::<Result<_, _>>()?;
        scorer.likelihoods(&questions, &mut |index, answer| {
            lines[index] = line(answer);
            ControlFlow::Continue(())
        })?;
    } else {
        let request = |job: &Value| -> Result<Request, Box<dyn Error>> {
            Ok(Request {
                prompt: prompt(job)?,
                most: job["most"].as_u64().ok_or("no most")? as usize,
                stop: Vec::new(),
                allowed: None,
                schema: job.get("schema").cloned(),
            })
        };
        let requests: Vec<Request> = jobs.iter().map(request).collect::<Result<_, _>>()?;
        scorer.replies(&requests, &mut |index, answer| {
            lines[index] = line(answer);
            ControlFlow::Continue(())
        })?;
    }
    fs::write(answers, lines.join("\n") + "\n")?;
    let met = json!({
        "model": scorer.model(),
        "notes": scorer.notes(),
        "tokens_run": scorer.tokens_run(),
        "seconds": begun.elapsed().as_secs_f64(),
    });
    println!("{met}");
    Ok(())
}
