//! Scores the answers of questions by a model run here, for benchmarks and comparisons with other programs.
//!
//! ```text
//! cargo run --release --example likelihoods -- FOLDER QUESTIONS ANSWERS [--batch-tokens N] [--alone]
//! ```
//!
//! QUESTIONS holds a line `{"prompt": "...", "answers": ["...", ...]}` each; ANSWERS gets a line
//! `{"nats": [...], "tokens": [...], "cut": 0}` for each, in their order. What it took is printed as JSON; the
//! time to open the model is counted apart. `--alone` shares no prefixes.

use std::error::Error;
use std::fs;
use std::ops::ControlFlow;
use std::path::Path;
use std::time::Instant;

use qtool::scorer::{Prompt, Question, Scorer};
use qtool::scoring::local::{LocalScorer, Options};
use qtool_kernels::{CpuBackend, Isa};
use serde_json::{Value, json};

fn question(line: &str) -> Result<Question, Box<dyn Error>> {
    let value: Value = serde_json::from_str(line)?;
    let prompt = value["prompt"].as_str().ok_or("no prompt")?.to_owned();
    let answers = value["answers"].as_array().ok_or("no answers")?;
    let answers = answers
        .iter()
        .map(|a| a.as_str().map(str::to_owned).ok_or("an answer is no text"));
    Ok(Question {
        prompt: Prompt::Text(prompt),
        answers: answers.collect::<Result<_, _>>()?,
    })
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [folder, questions, answers, flags @ ..] = args.as_slice() else {
        return Err("usage: likelihoods FOLDER QUESTIONS ANSWERS [--batch-tokens N] [--alone]".into());
    };
    let mut options = Options {
        share_prefixes: !flags.iter().any(|f| f == "--alone"),
        ..Options::default()
    };
    if let Some(at) = flags.iter().position(|f| f == "--batch-tokens") {
        options.batch_tokens = Some(flags.get(at + 1).ok_or("--batch-tokens N")?.parse()?);
    }
    let questions: Vec<Question> = fs::read_to_string(questions)?
        .lines()
        .map(question)
        .collect::<Result<_, _>>()?;

    let begun = Instant::now();
    let scorer = LocalScorer::open(CpuBackend::new(Isa::best()), Path::new(folder), options)?;
    let open_seconds = begun.elapsed().as_secs_f64();
    let begun = Instant::now();
    let mut lines = vec![String::new(); questions.len()];
    let mut missed = 0;
    scorer.likelihoods(&questions, &mut |index, answer| {
        lines[index] = match answer {
            Ok(found) => json!(found).to_string(),
            Err(miss) => {
                missed += 1;
                json!(miss).to_string()
            }
        };
        ControlFlow::Continue(())
    })?;
    let seconds = begun.elapsed().as_secs_f64();
    fs::write(answers, lines.join("\n") + "\n")?;
    let took = json!({
        "questions": questions.len(),
        "missed": missed,
        "open_seconds": open_seconds,
        "seconds": seconds,
        "tokens_run": scorer.tokens_run(),
        "threads": std::thread::available_parallelism().map_or(1, usize::from),
    });
    println!("{took}");
    Ok(())
}
