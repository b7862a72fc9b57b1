//! Is a model that another ecosystem made whole and in order? There is no manifest to hold it against, so it is held
//! against itself and against what running it needs: every tensor is decoded, scales and zero points are looked at, codes
//! counted, floats searched for NaN; then the model is read block by block as for a forward pass, which finds what is
//! missing or of another shape than the config says.
//!
//! With a base, names and shapes are compared and every tensor's error is measured, in `f64`. Some methods change a model
//! before they quantize it (AWQ moves scales into the norms): then a tensor's distance from the base's says nothing, which
//! is recognised by the norms.

use std::path::Path;
use std::sync::Arc;

use qtool_formats::artifact::Figures;
use qtool_formats::artifact::figures::ErrorMoments;
use qtool_formats::checkpoint::{Checkpoint, Naming, Orientation};
use qtool_formats::import::{self, Decoded, Foreign, Tensor};
use qtool_formats::{FormatError, QuantizedWeight};
use qtool_kernels::{CpuBackend, Isa, code_histogram};
use rayon::prelude::*;
use serde_json::Value;

use super::{Finding, TensorFigures, Verification};
use crate::model::architectures::is_encoder;
use crate::model::{Encoder, Model};
use crate::progress::Progress;
use crate::source::{Source, WeightSource};
use crate::{Error, Result, interrupt};

/// Relative squared distance of norms from which a model counts as changed before quantization. Rounding to F16 or BF16
/// gives less than 2e-5.
const CHANGED: f64 = 1e-4;

/// Verifies an open model.
pub fn run(model: Foreign, base: Option<&Path>, show_progress: bool) -> Result<Verification> {
    let base = base.map(Base::open).transpose()?;
    let progress = Progress::new(show_progress, "verifying", model.files().tensor_bytes());
    let checked = |tensor: &Tensor| -> Result<Checked> {
        interrupt::check()?;
        let found = check(&model, base.as_ref(), tensor);
        progress.add(model.stored_bytes(tensor)?);
        Ok(found)
    };
    let checked: Vec<Checked> = model.tensors().par_iter().map(checked).collect::<Result<_>>()?;
    let mut verification = Verification {
        tensors: model.tensors().len(),
        bytes: model.files().tensor_bytes(),
        format: Some(model.format()),
        ..Verification::default()
    };
    for one in checked {
        verification.findings.extend(one.findings);
        verification.figures.extend(one.figures);
    }
    if let Some(base) = &base {
        compare(&model, base, &mut verification);
    }
    // What cannot be decoded would be found a second time.
    if verification.findings.is_empty() {
        whole(Arc::new(model), &mut verification);
    }
    progress.clear();
    Ok(verification)
}

/// What one tensor gave.
struct Checked {
    findings: Vec<Finding>,
    figures: Option<TensorFigures>,
}

fn check(model: &Foreign, base: Option<&Base>, tensor: &Tensor) -> Checked {
    let mut findings = Vec::new();
    let mut report = |problem: String| {
        findings.push(Finding {
            subject: tensor.name.clone(),
            problem,
        });
    };
    let mut figures = None;
    match numbers(model, tensor) {
        Err(error) => report(error.to_string()),
        Ok(None) => {}
        Ok(Some(numbers)) => {
            for fault in numbers.faults {
                report(fault);
            }
            let bits = model.stored_bytes(tensor).unwrap_or(0) as f64 * 8.0;
            let bits_per_weight = bits / numbers.values.len().max(1) as f64;
            if numbers.bits > 0 {
                let range = (0, ((1u16 << numbers.bits) - 1) as u8);
                let none = ErrorMoments::default();
                let found = Figures::new(&none, &numbers.histogram, range, bits_per_weight);
                // Of four codes two are ends.
                let faults = found.faults(numbers.bits).into_iter();
                faults
                    .filter(|fault| numbers.bits > 2 || !fault.contains("ends of the grid"))
                    .for_each(&mut report);
            }
            match base.map(|base| base.values(&tensor.name, &tensor.shape)) {
                Some(Ok(Some(expected))) => {
                    let moments = moments(&expected, &numbers.values);
                    let found = Figures::new(&moments, &numbers.histogram, (0, u8::MAX), bits_per_weight);
                    figures = Some(TensorFigures {
                        name: tensor.name.clone(),
                        stored_as: tensor.stored_as.clone(),
                        bits_per_weight,
                        relative_mse: found.relative_mse,
                        sqnr_db: found.sqnr_db,
                        cosine: found.cosine,
                        max_abs_error: found.max_abs_error,
                    });
                }
                Some(Err(error)) => report(error.to_string()),
                // A bias of zeros is how some writers say that there is none.
                Some(Ok(None)) if !numbers.values.iter().all(|value| *value == 0.0) => {
                    report("is not in the base".to_owned());
                }
                _ => {}
            }
        }
    }
    Checked { findings, figures }
}

/// The numbers of a tensor.
struct Numbers {
    values: Vec<f32>,
    histogram: [u64; 256],
    /// Of a code; 0 without codes.
    bits: u8,
    faults: Vec<String>,
}

/// `None` for tensors that are no weights.
fn numbers(model: &Foreign, tensor: &Tensor) -> Result<Option<Numbers>, FormatError> {
    let mut histogram = [0u64; 256];
    let (values, bits) = match model.decode(tensor)? {
        Some(Decoded::Weight(weight)) => {
            code_histogram(weight.codes(), &mut histogram);
            (decoded(&weight), weight.scheme().bits())
        }
        Some(Decoded::Floats { dtype, bytes }) => (dtype.widen(&bytes), 0),
        None => {
            let view = model.files().tensor(model.stored_name(tensor))?;
            match view.float_dtype() {
                Some(dtype) => (dtype.widen(view.bytes()), 0),
                None => return Ok(None),
            }
        }
    };
    let mut faults = match &tensor.coded {
        Some(coded) => coded.faults(model.files())?,
        None => Vec::new(),
    };
    let bad = values.iter().filter(|value| !value.is_finite()).count();
    if bad > 0 {
        faults.push(format!("{bad} of {} values are NaN or infinite", values.len()));
    }
    if values.len() > 1 && tensor.shape.len() > 1 && values.iter().all(|value| *value == 0.0) {
        faults.push("every value is zero".to_owned());
    }
    Ok(Some(Numbers {
        values,
        histogram,
        bits,
        faults,
    }))
}

fn decoded(weight: &QuantizedWeight) -> Vec<f32> {
    let (n, k) = weight.dims();
    let mut values = vec![0f32; n * k];
    for (row, out) in values.chunks_exact_mut(k.max(1)).enumerate() {
        weight.dequantize_row(row, out);
    }
    values
}

fn moments(expected: &[f32], got: &[f32]) -> ErrorMoments {
    let mut sums = ErrorMoments::default();
    for (&w, &v) in expected.iter().zip(got) {
        let (w, e) = (f64::from(w), f64::from(w) - f64::from(v));
        sums.sum_w2 += w * w;
        sums.sum_e2 += e * e;
        sums.sum_we += w * e;
        sums.max_abs_e = sums.max_abs_e.max(e.abs());
    }
    sums
}

/// A checkpoint, or a model of another ecosystem, to compare with.
enum Base {
    Checkpoint(Box<Checkpoint>),
    Foreign(Box<Foreign>),
}

impl Base {
    fn open(path: &Path) -> Result<Self> {
        Ok(match import::open(path)? {
            Some(foreign) => Self::Foreign(Box::new(foreign)),
            None => Self::Checkpoint(Box::new(Checkpoint::open(path)?)),
        })
    }

    fn names(&self) -> Vec<String> {
        match self {
            Self::Checkpoint(files) => files.names().map(str::to_owned).collect(),
            Self::Foreign(model) => model.tensors().iter().map(|t| t.name.clone()).collect(),
        }
    }

    /// Values of a tensor of this shape. `None` when there is no such tensor; fails when it has another shape.
    fn values(&self, name: &str, shape: &[usize]) -> Result<Option<Vec<f32>>, FormatError> {
        let (path, found, values) = match self {
            Self::Checkpoint(files) => {
                if files.file_of(name).is_none() {
                    return Ok(None);
                }
                let view = files.tensor(name)?;
                let values = view.float_dtype().map(|dtype| dtype.widen(view.bytes()));
                (files.root(), view.shape().to_vec(), values)
            }
            Self::Foreign(model) => {
                let Some(tensor) = model.find(name) else {
                    return Ok(None);
                };
                (
                    model.files().root(),
                    tensor.shape.clone(),
                    Some(model.values(tensor)?),
                )
            }
        };
        match values.filter(|_| found == shape) {
            Some(values) => Ok(Some(values)),
            None => Err(FormatError::TensorEntry {
                path: path.to_owned(),
                tensor: name.to_owned(),
                reason: format!(
                    "expected floats of {shape:?} in the base, got {found:?}; it is the base of another model"
                ),
            }),
        }
    }
}

/// Names of both, and figures that are too bad to be those of this base.
fn compare(model: &Foreign, base: &Base, into: &mut Verification) {
    let tied = model.config().get("tie_word_embeddings").and_then(Value::as_bool);
    let names = base.names();
    if Naming::of(names.iter().map(String::as_str)).orientation("x.weight") == Orientation::InOut {
        into.notes.push(
            "the base has Paddle's names, which this model has not; compare with its Hugging Face form"
                .to_owned(),
        );
        return;
    }
    for name in names {
        let copied = name == crate::model::HEAD && tied != Some(false);
        let buffer = name.ends_with("rotary_emb.inv_freq");
        if model.find(&name).is_none() && !copied && !buffer {
            into.findings.push(Finding {
                subject: name,
                problem: "is in the base but not in this model".to_owned(),
            });
        }
    }
    into.figures_rederived = into.figures.len();
    let lost = |one: &TensorFigures| one.relative_mse.unwrap_or(f64::INFINITY);
    let changed = into
        .figures
        .iter()
        .find(|one| one.name.ends_with("norm.weight") && lost(one) > CHANGED);
    if let Some(norm) = changed {
        into.notes.push(format!(
            "{} is not the base's: the model was changed before it was quantized (scales moved into norms, as AWQ does, a rotation, or training), so errors of single tensors say nothing; compare by `qtool validate`",
            norm.name
        ));
        return;
    }
    for one in &into.figures {
        if lost(one) > 0.5 {
            into.findings.push(Finding {
                subject: one.name.clone(),
                problem: format!(
                    "relative MSE {:.3} against the base: more than half of the weight's energy is lost, or it is the base of another model",
                    lost(one)
                ),
            });
        }
    }
}

/// Reads the model as a forward pass would.
fn whole(model: Arc<Foreign>, into: &mut Verification) {
    let path = model.files().root().display().to_string();
    let source = Source::of_foreign(model);
    let backend = CpuBackend::new(Isa::best());
    let read = || -> Result<()> {
        if is_encoder(&source as &dyn WeightSource) {
            return Encoder::open(backend, Arc::new(source))
                .and_then(Encoder::load)
                .map(|_| ());
        }
        let model = Model::open(backend, Arc::new(source))?;
        (0..model.decoder().blocks).try_for_each(|block| model.block(block).map(|_| ()))
    };
    match read() {
        Ok(()) => {}
        Err(error @ Error::Source { .. }) => into
            .notes
            .push(format!("whether tensors are missing was not checked: {error}")),
        Err(error) => into.findings.push(Finding {
            subject: path,
            problem: error.to_string(),
        }),
    }
}
