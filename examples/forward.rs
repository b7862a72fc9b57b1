//! Times the forward pass of a model folder (a checkpoint or an artifact) on request, so that another program can
//! be timed in turn on the same machine. Reads one request per line and answers each with one line.
//!
//! ```text
//! cargo run --release --example forward -- FOLDER
//! prefill TOKENS last|all     -> seconds and the greedy next token; logits of the last token, or of all
//! decode PROMPT TOKENS        -> seconds for TOKENS single steps after a prompt, and the last token
//! ```
//!
//! Token i of every prompt is `(i * 7919 + 13) mod V`.

use std::error::Error;
use std::io::{BufRead, Write};
use std::sync::Arc;
use std::time::Instant;

use qtool::model::{Batch, Model};
use qtool::source::Source;
use qtool_kernels::{Backend, CpuBackend, Isa};

fn greedy(logits: &[f32]) -> u32 {
    let better = |best: (usize, f32), (i, &x): (usize, &f32)| if x > best.1 { (i, x) } else { best };
    let best = logits.iter().enumerate().fold((0, f32::NEG_INFINITY), better);
    best.0 as u32
}

fn main() -> Result<(), Box<dyn Error>> {
    let folder = std::env::args().nth(1).ok_or("usage: forward FOLDER")?;
    let source = Arc::new(Source::open(folder.as_ref())?);
    let model = Model::open(CpuBackend::new(Isa::best()), source)?.load()?;
    let vocabulary = model.decoder().vocabulary;
    let prompt = |n: usize| -> Vec<u32> { (0..n).map(|i| ((i * 7919 + 13) % vocabulary) as u32).collect() };
    let stdin = std::io::stdin();
    for line in stdin.lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let (seconds, token) = match words[..] {
            ["prefill", tokens, which] => {
                let ids = prompt(tokens.parse()?);
                let start = Instant::now();
                let logits = if which == "all" {
                    model.forward(&Batch::new(&[ids]))?
                } else {
                    model.extend(&mut model.cache(ids.len()), &ids)?
                };
                let seconds = start.elapsed();
                let logits = model.backend().download(&logits);
                (seconds, greedy(&logits[logits.len() - vocabulary..]))
            }
            ["decode", tokens, steps] => {
                let (ids, steps): (Vec<u32>, usize) = (prompt(tokens.parse()?), steps.parse()?);
                let mut cache = model.cache(ids.len() + steps);
                let mut token = greedy(&model.backend().download(&model.extend(&mut cache, &ids)?));
                let start = Instant::now();
                for _ in 0..steps {
                    token = greedy(&model.backend().download(&model.extend(&mut cache, &[token])?));
                }
                (start.elapsed(), token)
            }
            _ => return Err(format!("expected prefill or decode, got {line:?}").into()),
        };
        println!("{} {token}", seconds.as_secs_f64());
        std::io::stdout().flush()?;
    }
    Ok(())
}
