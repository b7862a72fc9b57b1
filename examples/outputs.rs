//! What a model computes, as JSON lines, for comparison with other libraries.
//!
//! ```text
//! cargo run --example outputs MODEL [--next] < IDS
//! ```
//!
//! MODEL is a checkpoint or an artifact. Each line of IDS is `[id, ..]`, or `[[id, ..], [type, ..]]` for an
//! encoder. For each line one is printed: for a language model ln p of every id but the first, with
//! `--next` an object of these (`ln_p`), the likeliest id after the last (`next`) and by how many nats it leads (`lead`);
//! for an encoder the mean of its last hidden states and, where it has a head, its logits.

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
        let next = std::env::args().any(|arg| arg == "--next");
        Box::new(move |line| likelihoods(&model, line, next))
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

fn likelihoods(model: &Model<CpuBackend>, line: &Value, next: bool) -> anyhow::Result<Value> {
    let ids = ids(line)?;
    let logits = model.backend().download(&model.forward(&Batch::new(&[&ids]))?);
    let of = |(row, &id): (&[f32], &u32)| {
        let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = row.iter().map(|x| f64::from(x - top).exp()).sum();
        f64::from(row[id as usize] - top) - sum.ln()
    };
    let rows = logits.chunks_exact(model.decoder().vocabulary);
    let ln_p: Vec<f64> = rows.clone().zip(&ids[1..]).map(of).collect();
    if !next {
        return Ok(json!(ln_p));
    }
    let mut order: Vec<(usize, f32)> = rows
        .last()
        .unwrap_or_default()
        .iter()
        .copied()
        .enumerate()
        .collect();
    order.sort_by(|a, b| b.1.total_cmp(&a.1));
    let lead = order.get(..2).map_or(0.0, |two| two[0].1 - two[1].1);
    Ok(json!({"ln_p": ln_p, "next": order.first().map(|best| best.0), "lead": lead}))
}

fn ids(value: &Value) -> anyhow::Result<Vec<u32>> {
    serde_json::from_value(value.clone()).with_context(|| format!("expected a list of ids, got {value}"))
}
