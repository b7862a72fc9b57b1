//! Does a model say the same on both devices? Owns the tokens that are tried, and the two figures: the divergence of
//! the predicted distributions, and how often the likeliest is the same.

use std::path::Path;
use std::sync::Arc;

use qtool_kernels::{Backend, CpuBackend, CudaBackend, Isa};
use serde::Serialize;

use crate::Result;
use crate::model::architectures::is_encoder;
use crate::model::{Batch, Encoder, Model};
use crate::source::Source;

/// Most tokens of a sequence.
const LENGTH: usize = 96;

/// What both said.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// The model's folder.
    pub model: String,
    /// Distributions that were compared: one a token, or one a text for an encoder.
    pub compared: usize,
    /// Mean of KL(processor || GPU), in nats.
    pub mean_kl: f64,
    /// Largest of them.
    pub largest_kl: f64,
    /// Share of distributions whose likeliest entry is the same.
    pub same: f64,
}

/// Runs `tokens` random tokens through the model on both.
pub fn run(gpu: &CudaBackend, folder: &Path, tokens: usize) -> Result<Comparison> {
    let source = Arc::new(Source::open(folder)?);
    let (here, columns) = distributions(&CpuBackend::new(Isa::best()), &source, tokens)?;
    let (there, _) = distributions(gpu, &source, tokens)?;
    let mut found = Comparison {
        model: folder.display().to_string(),
        compared: here.len() / columns.max(1),
        mean_kl: 0.0,
        largest_kl: 0.0,
        same: 0.0,
    };
    for (here, there) in here.chunks_exact(columns).zip(there.chunks_exact(columns)) {
        let kl = divergence(here, there);
        found.mean_kl += kl;
        // A NaN is no small divergence.
        found.largest_kl = if kl <= found.largest_kl {
            found.largest_kl
        } else {
            kl
        };
        found.same += f64::from(u8::from(likeliest(here) == likeliest(there)));
    }
    let count = found.compared.max(1) as f64;
    found.mean_kl /= count;
    found.same /= count;
    Ok(found)
}

/// Logits of a model for random tokens, and how many belong together: those of an encoder are its labels', or the last
/// layer's numbers where it has none.
fn distributions<B: Backend + Clone>(
    backend: &B,
    source: &Arc<Source>,
    tokens: usize,
) -> Result<(Vec<f32>, usize)> {
    let source: Arc<Source> = Arc::clone(source);
    let mut all = Vec::new();
    let mut columns = 1;
    if is_encoder(source.as_ref()) {
        let model = Encoder::open(backend.clone(), source)?.load()?;
        let (vocabulary, context) = (model.shape().vocabulary, model.shape().context);
        for batch in batches(tokens, context.min(LENGTH), vocabulary) {
            let out = if model.labels() > 0 {
                model.classify(&batch)?
            } else {
                model.embed(&batch)?
            };
            columns = backend.dims(&out).1;
            all.extend(backend.read(&out)?);
        }
    } else {
        let model = Model::open(backend.clone(), source)?.load()?;
        let (vocabulary, context) = (model.decoder().vocabulary, model.decoder().context);
        columns = vocabulary;
        for batch in batches(tokens, context.min(LENGTH), vocabulary) {
            all.extend(backend.read(&model.forward(&batch)?)?);
        }
    }
    Ok((all, columns))
}

/// Sequences of growing length, a few together.
fn batches(tokens: usize, longest: usize, vocabulary: usize) -> Vec<Batch> {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let mut id = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        ((state >> 33) % vocabulary.max(1) as u64) as u32
    };
    let (mut made, mut left, mut length) = (Vec::new(), tokens, 1);
    while left > 0 {
        let mut sequences: Vec<Vec<u32>> = Vec::new();
        for _ in 0..3 {
            let now = length.min(left).min(longest);
            if now > 0 {
                sequences.push((0..now).map(|_| id()).collect());
            }
            left -= now;
            length = if length >= longest { 1 } else { length * 3 };
        }
        made.push(Batch::new(&sequences));
    }
    made
}

/// KL of the distributions of two rows of logits, in nats.
fn divergence(here: &[f32], there: &[f32]) -> f64 {
    let log_sum = |row: &[f32]| {
        let top = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = row.iter().map(|x| f64::from(x - top).exp()).sum();
        f64::from(top) + sum.ln()
    };
    let (p, q) = (log_sum(here), log_sum(there));
    let each = here.iter().zip(there).map(|(here, there)| {
        let (p, q) = (f64::from(*here) - p, f64::from(*there) - q);
        p.exp() * (p - q)
    });
    each.sum()
}

fn likeliest(row: &[f32]) -> usize {
    let each = row.iter().enumerate();
    each.fold(
        (0, f32::NEG_INFINITY),
        |best, (i, &x)| if x > best.1 { (i, x) } else { best },
    )
    .0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_by_hand() {
        let (p, q) = ([0.5f32, 0.25, 0.25], [0.25f32, 0.5, 0.25]);
        let logits = |p: [f32; 3]| p.map(|p| p.ln() + 3.0);
        // 0.5 ln 2 + 0.25 ln 0.5 = 0.25 ln 2
        let kl = divergence(&logits(p), &logits(q));
        assert!((kl - 0.25 * 2f64.ln()).abs() < 1e-6, "{kl}");
        assert!(divergence(&logits(p), &[f32::NAN; 3]).is_nan());
        assert_eq!((likeliest(&p), likeliest(&q)), (0, 1));
        let all = batches(500, 96, 50);
        assert_eq!(all.iter().map(|b| b.ids().len()).sum::<usize>(), 500);
        assert!(all.iter().flat_map(Batch::ids).all(|id| *id < 50));
    }
}
