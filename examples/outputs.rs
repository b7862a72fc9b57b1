//! What a model computes, as JSON lines, for comparison with other libraries.
//!
//! ```text
//! cargo run --example outputs MODEL < IDS
//! ```
//!
//! MODEL is a checkpoint or an artifact. Each line of IDS is `[id, ..]`, or `[[id, ..], [type, ..]]` for an
//! encoder. For each line one is printed: for a language model ln p of every id but the first; for an encoder
//! the mean of its last hidden states and, where it has a head, its logits.

use std::io::{BufRead, Write, stdin, stdout};
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use qtool::model::architectures::is_encoder;
use qtool::model::{Batch, Encoder, Model};
use qtool::source::Source;
use qtool_kernels::{Backend, CpuBackend, Isa};
use serde_json::{Value, json};

/// Answers one line.
type Answer = Box<dyn Fn(&Value) -> anyhow::Result<Value>>;

fn main() -> anyhow::Result<()> {
    let folder: PathBuf = std::env::args_os()
        .nth(1)
        .context("expected a MODEL folder")?
        .into();
    let source = Arc::new(Source::open(&folder)?);
    let backend = CpuBackend::new(Isa::best());
    let answer: Answer = if is_encoder(source.as_ref()) {
        let encoder = Encoder::open(backend, source)?.load()?;
        Box::new(move |line| encode(&encoder, line))
    } else {
        let model = Model::open(backend, source)?.load()?;
        Box::new(move |line| likelihoods(&model, line))
    };
    let mut out = stdout().lock();
    for line in stdin().lock().lines() {
        writeln!(out, "{}", answer(&serde_json::from_str(&line?)?)?)?;
    }
    Ok(())
}

fn encode(encoder: &Encoder<CpuBackend>, line: &Value) -> anyhow::Result<Value> {
    let batch = Batch::new(&[ids(&line[0])?]).with_types(ids(&line[1])?);
    let down = |x| encoder.backend().download(&x);
    let logits = match encoder.labels() {
        0 => Value::Null,
        _ => json!(down(encoder.classify(&batch)?)),
    };
    Ok(json!({"mean": down(encoder.embed(&batch)?), "logits": logits}))
}

fn likelihoods(model: &Model<CpuBackend>, line: &Value) -> anyhow::Result<Value> {
    let ids = ids(line)?;
    let logits = model.backend().download(&model.forward(&Batch::new(&[&ids]))?);
    let of = |(row, &id): (&[f32], &u32)| {
        let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = row.iter().map(|x| f64::from(x - top).exp()).sum();
        f64::from(row[id as usize] - top) - sum.ln()
    };
    let rows = logits.chunks_exact(model.decoder().vocabulary);
    Ok(json!(rows.zip(&ids[1..]).map(of).collect::<Vec<f64>>()))
}

fn ids(value: &Value) -> anyhow::Result<Vec<u32>> {
    serde_json::from_value(value.clone()).with_context(|| format!("expected a list of ids, got {value}"))
}
