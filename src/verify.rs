//! Pipeline page: is this artifact what its manifest says, and with `--base`, are its figures true?
//!
//! Every byte is read again: digests of all stored tensors and side files, sizes of all files,
//! codes and scales against what the scheme allows, and the code histogram of every weight. With a
//! base checkpoint, source digests are compared and every figure is derived a second time by a path
//! that shares nothing with the writer's: codes taken from the bytes bit by bit by the manifest's
//! formula, values and sums in plain `f64`.

use std::path::Path;

use qtool_formats::artifact::figures::ErrorMoments;
use qtool_formats::artifact::manifest::QuantizedRecord;
use qtool_formats::artifact::{Artifact, Figures, FileRecord, Stored, TensorRecord};
use qtool_formats::checkpoint::{Checkpoint, Orientation};
use qtool_formats::scheme::Role;
use qtool_formats::{FloatDtype, FormatError, TensorView};
use rayon::prelude::*;
use serde::Serialize;

use crate::progress::Progress;
use crate::record::file_record;
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
#[derive(Debug, Clone, Serialize)]
pub struct Verification {
    /// Tensors checked.
    pub tensors: usize,
    /// Bytes read in the artifact.
    pub bytes: u64,
    /// Quantized tensors whose figures were derived again from a base.
    pub figures_rederived: usize,
    /// Everything wrong; empty when the artifact is sound.
    pub findings: Vec<Finding>,
}

/// Relative difference up to which two derivations of a figure agree. The writer adds squares in
/// `f32` for 256 weights at a time; measured on the sample models, that moves figures by at most
/// 2e-8. Decoded values that need more than 24 bits (`f32` scales) are rounded there but not here,
/// which moves the largest error of INT8 by up to 8e-6.
pub const FIGURE_TOLERANCE: f64 = 1e-5;

/// Verifies the artifact in `folder`. Fails only when it cannot be opened as one at all.
pub fn run(folder: &Path, base: Option<&Path>, show_progress: bool) -> Result<Verification> {
    let artifact = Artifact::open(folder)?;
    let base = base.map(Checkpoint::open).transpose()?;
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
            Stored::Kept { .. } => {
                let digest = artifact.digest(&record.name)?;
                expect("digest", &record.source_digest, &digest, &mut report);
                progress.add(artifact.stored(&record.name)?.bytes().len() as u64);
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
                let source = base.as_ref().and_then(|b| b.tensor(&record.name).ok());
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
    findings.extend(nested?.into_iter().flatten());
    if let Some(base) = &base {
        let known: std::collections::HashSet<&str> = records.iter().map(|r| r.name.as_str()).collect();
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

fn check_source(base: &Checkpoint, record: &TensorRecord, report: &mut impl FnMut(String)) {
    let tensor = match base.tensor(&record.name) {
        Ok(tensor) => tensor,
        Err(error) => return report(error.to_string()),
    };
    let shape = |dtype, shape: &[usize]| format!("{dtype} {shape:?}");
    expect(
        "source",
        &shape(record.dtype, &record.shape),
        &shape(tensor.dtype(), tensor.shape()),
        report,
    );
    let digest = format!("blake3:{}", blake3::hash(tensor.bytes()).to_hex());
    expect("digest of the source", &record.source_digest, &digest, report);
}

/// Figures from the stored bytes alone, or against the source.
struct Rederived {
    figures: Figures,
}

/// Decodes a weight bit by bit and sums in `f64`. Without a source, error sums stay zero.
fn rederive(
    artifact: &Artifact,
    q: &QuantizedRecord,
    source: Option<&TensorView<'_>>,
) -> Result<Rederived, FormatError> {
    // The library's own decoder checks code ranges and scales; this one then goes its own way.
    let stride = (1 << 22) / q.columns.max(1);
    for from in (0..q.rows).step_by(stride.max(1)) {
        artifact.weight_rows(q, from, stride.max(1))?;
    }
    let part = |role: Role| q.parts.iter().find(|p| p.role == role);
    let bytes = |role: Role| {
        part(role)
            .map(|p| artifact.stored(&p.tensor).map(|t| t.bytes()))
            .transpose()
    };
    let spelled = &artifact.manifest().schemes[&q.scheme.to_string()];
    let group = if spelled.group == 0 {
        q.columns
    } else {
        spelled.group
    };
    let groups = q.columns / group.max(1);
    let codes = bytes(Role::Codes)?.unwrap_or_default();
    let zero_points = bytes(Role::ZeroPoints)?;
    let scale_type = FloatDtype::from_dtype(spelled.scale_dtype).unwrap_or(FloatDtype::F32);
    let scales = scale_type.widen(bytes(Role::Scales)?.unwrap_or_default());
    let (code_row, zero_row) = (row_bytes(q, Role::Codes), row_bytes(q, Role::ZeroPoints));
    let source = source.and_then(|s| SourceValues::new(s, q));
    let mut histogram = [0u64; 256];
    let mut moments = ErrorMoments::default();
    for n in 0..q.rows {
        for k in 0..q.columns {
            let code = bits_at(codes, n * code_row, k, spelled.bits);
            let zero = match (&spelled.zero_point, zero_points) {
                (Some(zero), _) => *zero,
                (None, Some(bytes)) => bits_at(bytes, n * zero_row, k / group, spelled.bits),
                (None, None) => 0,
            };
            histogram[usize::from(code)] += 1;
            if let Some(source) = &source {
                let scale = f64::from(scales[n * groups + k / group]);
                let decoded = (f64::from(code) - f64::from(zero)) * scale;
                let w = source.at(n, k);
                let e = w - decoded;
                moments.sum_w2 += w * w;
                moments.sum_e2 += e * e;
                moments.sum_we += w * e;
                moments.max_abs_e = moments.max_abs_e.max(e.abs());
            }
        }
    }
    let stored_bits: usize = q.parts.iter().map(|p| p.shape[0] * p.row_bytes * 8).sum();
    let bits_per_weight = stored_bits as f64 / (q.rows * q.columns).max(1) as f64;
    Ok(Rederived {
        figures: Figures::new(&moments, &histogram, spelled.code_range, bits_per_weight),
    })
}

fn row_bytes(q: &QuantizedRecord, role: Role) -> usize {
    q.parts.iter().find(|p| p.role == role).map_or(0, |p| p.row_bytes)
}

/// Value `index` of a row of little-endian `bits`-bit values that begins at byte `row`: the
/// formula of `lsb-rows`, one bit at a time.
fn bits_at(bytes: &[u8], row: usize, index: usize, bits: u8) -> u8 {
    let bit = |i: usize| {
        let at = index * usize::from(bits) + i;
        bytes.get(row + at / 8).map_or(0, |byte| (byte >> (at % 8)) & 1)
    };
    (0..usize::from(bits)).map(|i| bit(i) << i).sum()
}

/// Source values by (n, k), whatever the orientation.
struct SourceValues<'a> {
    bytes: &'a [u8],
    dtype: FloatDtype,
    strides: (usize, usize),
}

impl<'a> SourceValues<'a> {
    fn new(tensor: &TensorView<'a>, q: &QuantizedRecord) -> Option<Self> {
        let dtype = tensor.float_dtype()?;
        let strides = match q.orientation {
            Orientation::OutIn => (q.columns, 1),
            Orientation::InOut => (1, q.rows),
        };
        (tensor.bytes().len() == q.rows * q.columns * dtype.bytes()).then_some(Self {
            bytes: tensor.bytes(),
            dtype,
            strides,
        })
    }

    fn at(&self, n: usize, k: usize) -> f64 {
        let width = self.dtype.bytes();
        let at = (n * self.strides.0 + k * self.strides.1) * width;
        let mut bits = [0u8; 4];
        // A bfloat16 is the upper half of an f32.
        let place = if self.dtype == FloatDtype::Bf16 { 2 } else { 0 };
        bits[place..place + width].copy_from_slice(&self.bytes[at..at + width]);
        match self.dtype {
            FloatDtype::Bf16 | FloatDtype::F32 => f64::from(f32::from_le_bytes(bits)),
            FloatDtype::F16 => f64::from(self.dtype.widen(&bits[..2])[0]),
        }
    }
}

fn compare(q: &QuantizedRecord, rederived: &Rederived, with_errors: bool, report: &mut impl FnMut(String)) {
    let (stated, found) = (&q.figures, &rederived.figures);
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
