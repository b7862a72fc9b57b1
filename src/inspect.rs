//! Pipeline page: what is in a folder. Collects; printing is the command line's work.

use std::path::Path;

use qtool_formats::artifact::{Artifact, Manifest, RankIndex, Stored, TensorRecord};
use qtool_formats::checkpoint::Checkpoint;
use qtool_formats::import::{self, Decoded, Foreign, Tensor};
use qtool_formats::{FormatError, TensorView};
use qtool_kernels::{Isa, code_histogram};
use serde::Serialize;

use crate::blocks::widen;
use crate::{Error, Result};

/// What kind of folder it is, with its contents.
pub enum Subject {
    /// An artifact of qtool.
    Artifact(Box<Artifact>),
    /// A quantized model of another ecosystem.
    Foreign(Box<Foreign>),
    /// Any other folder or file of safetensors.
    Checkpoint(Box<Checkpoint>),
}

/// One line of the tensor list.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Line {
    /// Name in the source.
    pub name: String,
    /// Shape in the source.
    pub shape: Vec<usize>,
    /// Scheme, or element type when not quantized.
    pub stored_as: String,
    /// Bytes it is stored in.
    pub bytes: u64,
    /// Stored bits per element.
    pub bits_per_weight: f64,
    /// Signal to noise in dB; `None` when not quantized or without error.
    pub sqnr_db: Option<f64>,
    /// What is suspicious about it.
    pub faults: Vec<String>,
}

/// A histogram with the statistics it was made with.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Histogram {
    /// What is counted: `codes` or `values`.
    pub of: &'static str,
    /// Lower edge of each bin (the code itself for codes).
    pub edges: Vec<f64>,
    /// Elements in each bin.
    pub counts: Vec<u64>,
    /// Elements that are NaN or infinite, which no bin holds.
    pub non_finite: u64,
}

/// Opens a folder or file as what it is.
pub fn open(path: &Path) -> Result<Subject> {
    if let Some(first) = RankIndex::folders(path)?.as_ref().and_then(|ranks| ranks.first()) {
        return Err(Error::Source {
            path: path.to_owned(),
            reason: format!(
                "holds one artifact per rank of tensor parallelism; name one of them, such as {}",
                first.display()
            ),
        });
    }
    Ok(if Artifact::is_artifact(path) {
        Subject::Artifact(Box::new(Artifact::open(path)?))
    } else if import::is_foreign(path)?
        && let Some(foreign) = import::open(path)?
    {
        Subject::Foreign(Box::new(foreign))
    } else {
        Subject::Checkpoint(Box::new(Checkpoint::open(path)?))
    })
}

impl Subject {
    /// The manifest of an artifact.
    pub fn manifest(&self) -> Option<&Manifest> {
        match self {
            Self::Artifact(artifact) => Some(artifact.manifest()),
            Self::Foreign(_) | Self::Checkpoint(_) => None,
        }
    }

    /// What kind it is: `artifact`, `checkpoint`, or the name of another ecosystem's format.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Artifact(_) => "artifact",
            Self::Foreign(foreign) => foreign.format(),
            Self::Checkpoint(_) => "checkpoint",
        }
    }

    /// The files as they lie.
    pub fn files(&self) -> &Checkpoint {
        match self {
            Self::Artifact(artifact) => artifact.files(),
            Self::Foreign(foreign) => foreign.files(),
            Self::Checkpoint(checkpoint) => checkpoint,
        }
    }

    /// One line per tensor, in storage order.
    pub fn lines(&self) -> Result<Vec<Line>> {
        match self {
            Self::Artifact(artifact) => artifact
                .manifest()
                .tensors
                .iter()
                .map(|record| artifact_line(artifact, record))
                .collect(),
            Self::Foreign(foreign) => {
                let tensors = foreign.tensors().iter();
                tensors.map(|tensor| foreign_line(foreign, tensor)).collect()
            }
            Self::Checkpoint(checkpoint) => checkpoint.tensors().map(|t| Ok(checkpoint_line(&t?))).collect(),
        }
    }

    /// The line of one tensor.
    pub fn line(&self, name: &str) -> Result<Line> {
        match self {
            Self::Artifact(artifact) => artifact_line(artifact, artifact.record(name)?),
            Self::Foreign(foreign) => foreign_line(foreign, foreign.tensor(name)?),
            Self::Checkpoint(checkpoint) => Ok(checkpoint_line(&checkpoint.tensor(name)?)),
        }
    }

    /// Codes of a quantized tensor, values of any other float tensor; `None` for other dtypes.
    pub fn histogram(&self, name: &str, bins: usize) -> Result<Option<Histogram>> {
        match self {
            Self::Artifact(artifact) => match &artifact.record(name)?.stored {
                Stored::Quantized(record) => {
                    let (low, high) = artifact.manifest().schemes[&record.scheme.to_string()].code_range;
                    let mut counts = [0u64; 256];
                    let stride = ((1 << 22) / record.columns.max(1)).max(1);
                    for from in (0..record.rows).step_by(stride) {
                        code_histogram(artifact.weight_rows(record, from, stride)?.codes(), &mut counts);
                    }
                    Ok(Some(Histogram {
                        of: "codes",
                        edges: (low..=high).map(f64::from).collect(),
                        counts: counts[usize::from(low)..=usize::from(high)].to_vec(),
                        non_finite: 0,
                    }))
                }
                Stored::Kept { .. } => Ok(value_histogram(&artifact.stored(name)?, bins)),
            },
            Self::Foreign(foreign) => foreign_histogram(foreign, foreign.tensor(name)?, bins),
            Self::Checkpoint(checkpoint) => Ok(value_histogram(&checkpoint.tensor(name)?, bins)),
        }
    }
}

fn foreign_line(foreign: &Foreign, tensor: &Tensor) -> Result<Line> {
    Ok(line(
        &tensor.name,
        &tensor.shape,
        tensor.stored_as.clone(),
        foreign.stored_bytes(tensor)?,
        None,
        Vec::new(),
    ))
}

fn foreign_histogram(foreign: &Foreign, tensor: &Tensor, bins: usize) -> Result<Option<Histogram>> {
    match foreign.decode(tensor)? {
        None => Ok(value_histogram(
            &foreign.files().tensor(foreign.stored_name(tensor))?,
            bins,
        )),
        Some(Decoded::Floats { dtype, bytes }) => Ok(Some(histogram_of(&dtype.widen(&bytes), bins))),
        Some(Decoded::Weight(weight)) => {
            let mut counts = [0u64; 256];
            code_histogram(weight.codes(), &mut counts);
            let top = ((1u16 << weight.scheme().bits()) - 1) as u8;
            Ok(Some(Histogram {
                of: "codes",
                edges: (0..=top).map(f64::from).collect(),
                counts: counts[..=usize::from(top)].to_vec(),
                non_finite: 0,
            }))
        }
    }
}

fn artifact_line(artifact: &Artifact, record: &TensorRecord) -> Result<Line> {
    let view = |name: &str| -> Result<u64, FormatError> { Ok(artifact.stored(name)?.bytes().len() as u64) };
    let (stored_as, bytes, sqnr_db, faults) = match &record.stored {
        Stored::Kept { .. } => (record.dtype.to_string(), view(&record.name)?, None, Vec::new()),
        Stored::Quantized(q) => {
            let bytes = q
                .parts
                .iter()
                .map(|part| view(&part.tensor))
                .sum::<Result<u64, _>>()?;
            (q.scheme.to_string(), bytes, q.figures.sqnr_db, q.faults.clone())
        }
    };
    Ok(line(
        &record.name,
        &record.shape,
        stored_as,
        bytes,
        sqnr_db,
        faults,
    ))
}

fn checkpoint_line(tensor: &TensorView<'_>) -> Line {
    line(
        tensor.name(),
        tensor.shape(),
        tensor.dtype().to_string(),
        tensor.bytes().len() as u64,
        None,
        Vec::new(),
    )
}

fn line(
    name: &str,
    shape: &[usize],
    stored_as: String,
    bytes: u64,
    sqnr_db: Option<f64>,
    faults: Vec<String>,
) -> Line {
    let elements: usize = shape.iter().product();
    Line {
        name: name.to_owned(),
        shape: shape.to_vec(),
        stored_as,
        bytes,
        bits_per_weight: bytes as f64 * 8.0 / elements.max(1) as f64,
        sqnr_db,
        faults,
    }
}

/// Counts of a float tensor's values in `bins` equal bins between its smallest and largest.
fn value_histogram(tensor: &TensorView<'_>, bins: usize) -> Option<Histogram> {
    let dtype = tensor.float_dtype()?;
    let mut values = vec![0f32; tensor.bytes().len() / dtype.bytes()];
    widen(Isa::best(), dtype, tensor.bytes(), &mut values);
    Some(histogram_of(&values, bins))
}

fn histogram_of(values: &[f32], bins: usize) -> Histogram {
    let finite = || values.iter().copied().filter(|v| v.is_finite()).map(f64::from);
    let (min, max) = finite().fold((f64::INFINITY, f64::NEG_INFINITY), |(a, b), v| {
        (a.min(v), b.max(v))
    });
    let mut counts = vec![0u64; bins.max(1)];
    let width = (max - min) / counts.len() as f64;
    let mut total = 0u64;
    for value in finite() {
        let bin = if width > 0.0 {
            ((value - min) / width) as usize
        } else {
            0
        };
        let last = counts.len() - 1;
        counts[bin.min(last)] += 1;
        total += 1;
    }
    let edges = (0..counts.len())
        .map(|i| if total == 0 { 0.0 } else { min + width * i as f64 })
        .collect();
    Histogram {
        of: "values",
        edges,
        counts,
        non_finite: values.len() as u64 - total,
    }
}
