//! Pipeline page: is this artifact what its manifest says, and with `--base`, are its figures true?
//!
//! Every byte is read again: digests of all stored tensors and side files, sizes and headers of all files,
//! codes and scales against what the scheme allows, and the code histogram of every weight. With a
//! base checkpoint, source digests are compared and every figure is derived a second time by a path
//! that shares nothing with the writer's: codes taken from the bytes bit by bit by the manifest's
//! formula, values and sums in plain `f64`.

mod foreign;

use std::collections::HashSet;
use std::path::Path;
use std::sync::Arc;

use qtool_formats::FloatDtype;
use qtool_formats::artifact::RankIndex;
use qtool_formats::artifact::manifest::QuantizedRecord;
use qtool_formats::artifact::{Artifact, Figures, FileRecord, Stored, TensorRecord};
use qtool_formats::checkpoint::Checkpoint;
use qtool_formats::dtype::Dtype;
use qtool_formats::import;
use rayon::prelude::*;
use serde::Serialize;

use crate::progress::Progress;
use crate::record::file_record;
use crate::second_decode::{SourceValues, rederive};
use crate::source::Source;
use crate::transform::Transform;
use crate::transform::scales::ChannelScales;
use crate::transform::second::Second;
use crate::{Result, interrupt};

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// File or tensor it is about.
    pub subject: String,
    /// What is wrong: expected and got.
    pub problem: String,
}

/// The outcome of a verification.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Verification {
    /// Tensors checked.
    pub tensors: usize,
    /// Bytes read in the artifact.
    pub bytes: u64,
    /// Quantized tensors whose figures were derived again from a base.
    pub figures_rederived: usize,
    /// Everything wrong; empty when the artifact is sound.
    pub findings: Vec<Finding>,
    /// The format, of a model that another ecosystem made.
    pub format: Option<&'static str>,
    /// How near its tensors are to the base's, of such a model with a base.
    pub figures: Vec<TensorFigures>,
    /// What could not be checked, and why.
    pub notes: Vec<String>,
}

/// A tensor and how near it is to the base's; formulas at [`Figures`].
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TensorFigures {
    /// Its name.
    pub name: String,
    /// What it is stored as.
    pub stored_as: String,
    /// Bits per weight, everything counted.
    pub bits_per_weight: f64,
    /// Squared error over squared weights.
    pub relative_mse: Option<f64>,
    /// The same in dB; `None` without error.
    pub sqnr_db: Option<f64>,
    /// Cosine of the two.
    pub cosine: Option<f64>,
    /// Largest difference.
    pub max_abs_error: f64,
}

/// Relative difference up to which two derivations of a figure agree. The writer adds squares in
/// `f32` for 256 weights at a time; measured on the sample models, that moves figures by at most
/// 2e-8. Decoded values that need more than 24 bits (`f32` scales) are rounded there but not here,
/// which moves the largest error of INT8 by up to 8e-6.
pub const FIGURE_TOLERANCE: f64 = 1e-5;

/// Verifies the artifact in `folder`, or every rank's when it is split, or another ecosystem's model. Fails only when
/// it cannot be opened as one at all.
pub fn run(folder: &Path, base: Option<&Path>, show_progress: bool) -> Result<Verification> {
    if !Artifact::is_artifact(folder)
        && let Some(model) = import::open(folder)?
    {
        return foreign::run(model, base, show_progress);
    }
    let Some(ranks) = RankIndex::folders(folder)? else {
        return one(folder, base, show_progress);
    };
    let mut all = Verification::default();
    for rank in ranks {
        let name = rank.file_name().map(|n| n.to_string_lossy().into_owned());
        let found = one(&rank, base, show_progress)?;
        all.tensors += found.tensors;
        all.bytes += found.bytes;
        all.figures_rederived += found.figures_rederived;
        all.findings
            .extend(found.findings.into_iter().map(|finding| Finding {
                subject: format!("{}: {}", name.as_deref().unwrap_or_default(), finding.subject),
                ..finding
            }));
    }
    Ok(all)
}

fn one(folder: &Path, base: Option<&Path>, show_progress: bool) -> Result<Verification> {
    let artifact = Artifact::open(folder)?;
    let base = base.map(Checkpoint::open).transpose()?.map(Arc::new);
    let second = match (&base, &artifact.manifest().transform) {
        (Some(base), Some(record)) => {
            let source = Source::of_checkpoint(Arc::clone(base))?;
            let scales = record.scales.as_ref();
            let scales = scales
                .map(|s| ChannelScales::read(&folder.join(&s.file)))
                .transpose()?;
            Some(Second::new(Transform::new(&source, record.clone(), scales)?))
        }
        _ => None,
    };
    let second = second.as_ref();
    let records = &artifact.manifest().tensors;
    let progress = Progress::new(show_progress, "verifying", artifact.files().tensor_bytes());
    let check = |record: &TensorRecord| -> Result<Vec<Finding>> {
        interrupt::check()?;
        let mut findings = Vec::new();
        let mut report = |problem: String| {
            findings.push(Finding {
                subject: record.name.clone(),
                problem,
            });
        };
        match &record.stored {
            Stored::Kept { digest, .. } => {
                let found = artifact.digest(&record.name)?;
                let stated = digest.as_ref().or(record.source_digest.as_ref());
                expect("digest", stated.map_or("none", |d| d), &found, &mut report);
                progress.add(artifact.stored(&record.name)?.bytes().len() as u64);
                if let (Some(base), false) = (&base, record.sources.is_empty()) {
                    check_converted(&artifact, base, record, second, &mut report)?;
                }
            }
            Stored::Quantized(quantized) => {
                for part in &quantized.parts {
                    expect(
                        &format!("digest of {}", part.tensor),
                        &part.digest,
                        &artifact.digest(&part.tensor)?,
                        &mut report,
                    );
                    progress.add(artifact.stored(&part.tensor)?.bytes().len() as u64);
                }
                let source = base
                    .as_ref()
                    .and_then(|base| SourceValues::of(base, record, Some(quantized), second));
                match rederive(&artifact, quantized, source.as_ref()) {
                    Ok(figures) => compare(quantized, &figures, source.is_some(), &mut report),
                    Err(error) => report(error.to_string()),
                }
            }
        }
        if let Some(base) = &base {
            check_source(base, record, &mut report);
        }
        Ok(findings)
    };
    let nested = records.par_iter().map(check).collect::<Result<Vec<_>>>();
    progress.clear();
    let mut findings = check_files(folder, &artifact.manifest().files)?;
    let headers = artifact.files().foreign_headers()?;
    findings.extend(headers.into_iter().map(|subject| Finding {
        subject,
        problem: "its header is not as qtool wrote it; copy the file again".to_owned(),
    }));
    findings.extend(nested?.into_iter().flatten());
    if let Some(base) = &base {
        let pieces = records.iter().flat_map(|r| &r.sources).map(|p| p.tensor.as_str());
        let whole = records
            .iter()
            .filter(|r| r.sources.is_empty())
            .map(|r| r.name.as_str());
        let dropped = artifact.manifest().source.dropped.iter().map(String::as_str);
        let known: HashSet<&str> = pieces.chain(whole).chain(dropped).collect();
        findings.extend(
            base.names()
                .filter(|name| !known.contains(name))
                .map(|name| Finding {
                    subject: name.to_owned(),
                    problem: "is in the base but not in the artifact".to_owned(),
                }),
        );
    }
    let quantized = records
        .iter()
        .filter(|r| matches!(r.stored, Stored::Quantized(_)))
        .count();
    Ok(Verification {
        tensors: records.len(),
        bytes: artifact.files().tensor_bytes(),
        figures_rederived: if base.is_some() { quantized } else { 0 },
        findings,
        ..Verification::default()
    })
}

fn expect(what: &str, expected: &str, got: &str, report: &mut impl FnMut(String)) {
    if expected != got {
        report(format!("{what}: expected {expected}, got {got}"));
    }
}

/// Sizes of all files, digests of those that carry one.
fn check_files(folder: &Path, files: &[FileRecord]) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for file in files {
        let path = folder.join(&file.name);
        let mut report = |problem: String| {
            findings.push(Finding {
                subject: file.name.clone(),
                problem,
            });
        };
        let found = match (std::fs::metadata(&path), &file.digest) {
            (Err(error), _) => {
                report(format!("expected {} bytes, cannot be read: {error}", file.bytes));
                continue;
            }
            (Ok(metadata), None) => FileRecord {
                bytes: metadata.len(),
                ..file.clone()
            },
            (Ok(_), Some(_)) => file_record(&path, file.name.clone())?,
        };
        expect(
            "size in bytes",
            &file.bytes.to_string(),
            &found.bytes.to_string(),
            &mut report,
        );
        let digest = |record: &FileRecord| record.digest.clone().unwrap_or_default();
        expect("digest", &digest(file), &digest(&found), &mut report);
    }
    Ok(findings)
}

/// The source tensors of a record are those of the base.
fn check_source(base: &Checkpoint, record: &TensorRecord, report: &mut impl FnMut(String)) {
    let mut check = |name: &str, dtype: Dtype, shape: &[usize], digest: &str| {
        let tensor = match base.tensor(name) {
            Ok(tensor) => tensor,
            Err(error) => return report(error.to_string()),
        };
        let text = |dtype, shape: &[usize]| format!("{dtype} {shape:?}");
        expect(
            "source",
            &text(dtype, shape),
            &text(tensor.dtype(), tensor.shape()),
            report,
        );
        let found = format!("blake3:{}", blake3::hash(tensor.bytes()).to_hex());
        expect("digest of the source", digest, &found, report);
    };
    if let Some(digest) = &record.source_digest {
        check(&record.name, record.dtype, &record.shape, digest);
    }
    for piece in &record.sources {
        check(&piece.tensor, piece.dtype, &piece.shape, &piece.digest);
    }
}

/// A kept tensor that was assembled holds the values of its sources, rounded once.
fn check_converted(
    artifact: &Artifact,
    base: &Checkpoint,
    record: &TensorRecord,
    second: Option<&Second>,
    report: &mut impl FnMut(String),
) -> Result<()> {
    let stored = artifact.stored(&record.name)?;
    let Some(dtype) = stored.float_dtype() else {
        return Ok(());
    };
    let (Some(source), (rows, columns)) =
        (SourceValues::of(base, record, None, second), stored.matrix_dims())
    else {
        report("its sources are not those of the base".to_owned());
        return Ok(());
    };
    let mut elements = stored.bytes().chunks_exact(dtype.bytes());
    for n in 0..rows {
        for k in 0..columns {
            let value = source.at(n, k) as f32;
            let mut expected = Vec::new();
            dtype.push(value, &mut expected);
            let element = elements.next().unwrap_or_default();
            let near = || source.is_transformed() && rounds_to(dtype, value, element);
            if element != expected && !near() {
                report(format!("the element at [{n}, {k}] is not the source's"));
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Whether the stored element is `value` rounded, where `value` itself is known up to rounding alone: two ways to a
/// sum of thousands of terms differ in the last bits, which matters half way between two elements, or near zero.
fn rounds_to(dtype: FloatDtype, value: f32, element: &[u8]) -> bool {
    let half_step = match dtype {
        FloatDtype::Bf16 => 2f32.powi(-8),
        FloatDtype::F16 => 2f32.powi(-11),
        FloatDtype::F32 => 2f32.powi(-22),
    };
    let stored = dtype.widen(element).first().copied().unwrap_or(f32::NAN);
    (stored - value).abs() <= value.abs() * half_step * 1.001 + 1e-9
}

fn compare(q: &QuantizedRecord, found: &Figures, with_errors: bool, report: &mut impl FnMut(String)) {
    let stated = &q.figures;
    let mut check = |what: &str, stated: Option<f64>, found: Option<f64>| {
        let close = match (stated, found) {
            (Some(a), Some(b)) => (a - b).abs() <= FIGURE_TOLERANCE * a.abs().max(b.abs()),
            (a, b) => a.is_none() && b.is_none(),
        };
        if !close {
            let text = |v: Option<f64>| v.map_or_else(|| "none".to_owned(), |v| format!("{v:e}"));
            report(format!(
                "{what}: the manifest says {}, the bytes give {}",
                text(stated),
                text(found)
            ));
        }
    };
    check(
        "code entropy",
        Some(stated.code_entropy_bits),
        Some(found.code_entropy_bits),
    );
    check("saturated codes", Some(stated.saturated), Some(found.saturated));
    check(
        "unused codes",
        Some(f64::from(stated.unused_codes)),
        Some(f64::from(found.unused_codes)),
    );
    check(
        "bits per weight",
        Some(stated.bits_per_weight),
        Some(found.bits_per_weight),
    );
    if with_errors {
        check("relative MSE", stated.relative_mse, found.relative_mse);
        check("SQNR", stated.sqnr_db, found.sqnr_db);
        check("cosine", stated.cosine, found.cosine);
        check(
            "largest error",
            Some(stated.max_abs_error),
            Some(found.max_abs_error),
        );
    }
    // Degenerate weights are found here even when the writer's record keeps silent about them.
    let figures = if with_errors {
        found.clone()
    } else {
        Figures {
            relative_mse: stated.relative_mse,
            ..found.clone()
        }
    };
    for fault in figures.faults(q.scheme.bits()) {
        report(fault);
    }
}
