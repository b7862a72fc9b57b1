//! The foldings of a rotation. R turns the residual stream, P the values of every head; both are Hadamard matrices
//! with seeded signs where their size allows. Outliers of single channels are spread over all of them, and what is
//! to be rounded becomes more even.
//!
//! Why it changes nothing: an RMS norm divides by a length, which R keeps, once its gain is in the weights behind
//! it; attention takes sums of values, which P passes through. Queries and keys keep their rotary embedding and are
//! not turned. Sources: QuaRot (Ashkboos et al. 2024), SpinQuant (Liu et al. 2024), their parts that cost nothing at
//! run time.

use std::sync::Arc;

use qtool_formats::artifact::transform::RotationRecord;
use qtool_kernels::Orthogonal;

use super::folding::Step;
use super::layout::{HEAD, Layout};
use super::{Made, Transform};
use crate::source::{Source, WeightSource};
use crate::{Error, Result};

/// What makes the seed of P differ from that of R.
const HEADS: u64 = 0x5eed_0f4e_ad50_0001;

/// R and P of a model.
fn matrices(layout: &Layout, seed: u64) -> (Orthogonal, Orthogonal) {
    (
        Orthogonal::seeded(layout.hidden, seed),
        Orthogonal::seeded(layout.head_width(), seed ^ HEADS),
    )
}

/// What the manifest says of the rotation of the model in `source` by `seed`.
pub fn record(source: &Source, seed: u64) -> Result<RotationRecord> {
    let (stream, heads) = matrices(&Layout::of(source)?, seed);
    Ok(RotationRecord {
        seed,
        stream: stream.describe(),
        heads: heads.describe(),
    })
}

/// Adds the foldings.
pub(super) fn fold(
    transform: &mut Transform,
    source: &dyn WeightSource,
    layout: &Layout,
    seed: u64,
) -> Result<()> {
    let (stream, heads) = matrices(layout, seed);
    check(transform, source, &stream, &heads)?;
    let (stream, heads) = (Arc::new(stream), Arc::new(heads));
    let turn = || Step::Rotate {
        by: Arc::clone(&stream),
        range: 0..layout.hidden,
    };
    let gain = |name: &str| -> Result<Arc<[f64]>> {
        let gain = source.vector(name, layout.hidden)?;
        Ok(gain.into_iter().map(f64::from).collect())
    };
    let ones: Arc<[f64]> = vec![1.0; layout.hidden].into();
    for norm in &layout.norms {
        let absorbed = gain(&norm.gain)?;
        for reader in &norm.readers {
            let columns = &mut transform.entry(reader).columns;
            columns.extend([Step::Scale(Arc::clone(&absorbed)), turn()]);
        }
        transform
            .entry(&norm.gain)
            .columns
            .push(Step::Set(Arc::clone(&ones)));
    }
    for writer in &layout.writers {
        transform.entry(writer).rows.push(turn());
        if let Some(bias) = bias_of(source, writer) {
            transform.entry(&bias).columns.push(turn());
        }
    }
    for pair in &layout.values {
        let turn = |range| Step::Rotate {
            by: Arc::clone(&heads),
            range,
        };
        transform.entry(&pair.writer).rows.push(turn(pair.rows.clone()));
        if let Some(bias) = bias_of(source, &pair.writer) {
            transform.entry(&bias).columns.push(turn(pair.rows.clone()));
        }
        let columns = 0..layout.attention_width();
        transform.entry(&pair.reader).columns.push(turn(columns));
    }
    let absorbed = gain(&layout.last_norm)?;
    transform.entry(&layout.last_norm).columns.push(Step::Set(ones));
    transform.entry(&layout.embedding).columns.push(turn());
    transform
        .entry(HEAD)
        .columns
        .extend([Step::Scale(absorbed), turn()]);
    if layout.tied {
        transform.made = Some(Made {
            name: HEAD.to_owned(),
            origin: layout.embedding.clone(),
        });
    }
    Ok(())
}

/// The bias of a weight, if there is one.
pub(super) fn bias_of(source: &dyn WeightSource, weight: &str) -> Option<String> {
    let bias = format!("{}.bias", weight.strip_suffix(".weight")?);
    source.contains(&bias).then_some(bias)
}

/// Fails when the record speaks of other matrices than these: it was written by another version, or damaged.
fn check(
    transform: &Transform,
    source: &dyn WeightSource,
    stream: &Orthogonal,
    heads: &Orthogonal,
) -> Result<()> {
    let Some(stated) = &transform.record.rotation else {
        return Ok(());
    };
    let made = (stream.describe(), heads.describe());
    if (&stated.stream, &stated.heads) == (&made.0, &made.1) {
        return Ok(());
    }
    Err(Error::Source {
        path: source.path().to_owned(),
        reason: format!(
            "its rotation is of {:?} and {:?}, expected {:?} and {:?} for this model; give the model the artifact was made from, and the qtool that made it",
            stated.stream, stated.heads, made.0, made.1
        ),
    })
}
