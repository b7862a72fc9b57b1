//! What `quantize` will do, tensor by tensor, decided before any work: every shape that does not
//! fit is refused here, all at once.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use qtool_calib::{Decision, Quantizer, Recipe, TensorOptions};
use qtool_formats::checkpoint::shards::read_json;
use qtool_formats::checkpoint::{Checkpoint, Orientation};
use qtool_formats::export::fastdeploy::kv_cache::KvCache;
use qtool_formats::piece::{Piece, overlapping};
use qtool_formats::scheme::{Family, Part, Scheme};
use qtool_formats::{Dtype, FloatDtype, TensorView};
use serde_json::Value;

use crate::classes::{class_of, group};
use crate::kv_scales::Measured;
use crate::transform::Transform;
use crate::{Error, Result};

/// What becomes of every tensor, in storage order.
pub struct QuantizePlan {
    /// One entry per tensor of the result.
    pub tensors: Vec<TensorPlan>,
    /// Stored forms of the weights.
    pub family: Family,
    /// Tensors of the source that the result leaves out.
    pub dropped: Vec<String>,
    /// How the model is rewritten on the way, if it is.
    pub transform: Option<Arc<Transform>>,
    /// For a folder of another ecosystem: what its `config.json` and the manifest's options say.
    pub foreign: Option<Foreign>,
}

/// What another ecosystem's folder says about itself.
#[derive(Debug, Clone)]
pub struct Foreign {
    /// Its `config.json`.
    pub config: Value,
    /// Every option with an effect, for the manifest.
    pub options: Value,
    /// Type of the key-value cache its scales are for, if it holds any.
    pub kv_cache: Option<KvCache>,
}

/// What becomes of one tensor.
pub struct TensorPlan {
    /// Its name in the result.
    pub name: String,
    /// Its shape, decoded.
    pub shape: Vec<usize>,
    /// Its element type, decoded.
    pub dtype: Dtype,
    /// Bytes of the source it is made of.
    pub source_bytes: u64,
    /// What happens to it.
    pub action: Action,
}

/// What happens to a tensor.
pub enum Action {
    /// Copied byte for byte.
    Keep {
        /// Why.
        reason: String,
        /// Name in the source.
        source: String,
    },
    /// Not quantized, but assembled, turned or of another type.
    Convert(Conversion),
    /// Quantized.
    Quantize(Box<Quantization>),
    /// Not of the source: measured by calibration.
    Measure(Box<Measured>),
}

/// How a kept tensor is converted.
pub struct Conversion {
    /// Why it is not quantized.
    pub reason: String,
    /// Rows of its matrix as stored.
    pub n: usize,
    /// Columns of its matrix as stored.
    pub k: usize,
    /// Where its rows come from.
    pub pieces: Vec<Piece>,
    /// Type it is stored in.
    pub dtype: FloatDtype,
}

/// How a tensor is quantized.
pub struct Quantization {
    /// Chooses its codes.
    pub quantizer: Box<dyn Quantizer>,
    /// The scheme of the result.
    pub scheme: Scheme,
    /// Output rows.
    pub n: usize,
    /// Input columns.
    pub k: usize,
    /// How the (N, K) matrix lies in the tensor it decodes to.
    pub orientation: Orientation,
    /// Where its rows come from.
    pub pieces: Vec<Piece>,
    /// The stored tensors.
    pub parts: Vec<Part>,
}

impl TensorPlan {
    /// Bytes it will be stored in.
    pub fn stored_bytes(&self) -> u64 {
        match &self.action {
            Action::Keep { .. } => self.source_bytes,
            Action::Measure(_) => (self.shape.iter().product::<usize>() * 4) as u64,
            Action::Convert(c) => (c.n * c.k * c.dtype.bytes()) as u64,
            Action::Quantize(q) => q.parts.iter().map(|part| part.bytes() as u64).sum(),
        }
    }

    /// The scheme's name, or why it is kept.
    pub fn outcome(&self) -> String {
        match &self.action {
            Action::Keep { reason, .. } => format!("kept ({reason})"),
            Action::Convert(c) => format!("kept as {} ({})", c.dtype, c.reason),
            Action::Quantize(q) => q.scheme.to_string(),
            Action::Measure(m) => m.reason.clone(),
        }
    }

    /// The pieces its values are read from, whatever they are called, with its name; none when it is copied.
    pub fn made_of(&self) -> impl Iterator<Item = (&str, &Piece)> {
        let pieces = match &self.action {
            Action::Keep { .. } | Action::Measure(_) => &[],
            Action::Convert(c) => c.pieces.as_slice(),
            Action::Quantize(q) => q.pieces.as_slice(),
        };
        pieces.iter().map(|piece| (self.name.as_str(), piece))
    }

    /// What it is assembled from; empty when it is a tensor of the source as a whole, under its own
    /// name, in its own orientation and, if kept, of its own type.
    pub fn pieces(&self) -> &[Piece] {
        match &self.action {
            Action::Keep { .. } | Action::Measure(_) => &[],
            Action::Convert(c) => &c.pieces,
            Action::Quantize(q) => match q.pieces.as_slice() {
                [piece]
                    if piece.is_whole()
                        && piece.tensor == self.name
                        && piece.orientation == q.orientation =>
                {
                    &[]
                }
                pieces => pieces,
            },
        }
    }

    /// The source bytes that its rows `range` (bytes, when it is copied) are made of. Columns of an
    /// (in, out) source lie all over it: its first rows ask for the whole tensor.
    pub fn source_bytes_of(&self, range: &Range<usize>) -> Vec<(&str, Range<usize>)> {
        let pieces = match &self.action {
            Action::Keep { source, .. } => return vec![(source, range.clone())],
            Action::Convert(Conversion { pieces, .. }) => pieces,
            Action::Quantize(q) => &q.pieces,
            Action::Measure(_) => return Vec::new(),
        };
        let bytes = |(piece, rows): (&Piece, Range<usize>)| match piece.orientation {
            Orientation::OutIn => {
                let row = piece.dims.1 * piece.dtype.bytes();
                let from = piece.rows.start;
                Some((from + rows.start) * row..(from + rows.end) * row)
            }
            Orientation::InOut => (rows.start == 0).then_some(0..usize::MAX),
        };
        overlapping(pieces, range.clone())
            .filter_map(|(piece, rows)| Some((piece.tensor.as_str(), bytes((piece, rows))?)))
            .collect()
    }

    /// Class of its name, see [`class_of`].
    pub fn class(&self) -> String {
        class_of(&self.name)
    }
}

impl QuantizePlan {
    /// Plans the whole checkpoint.
    ///
    /// Fails with every tensor whose shape does not fit the options its recipe gives it, when the
    /// source is quantized already, or when nothing would be quantized.
    pub fn new(checkpoint: &Checkpoint, recipe: &Recipe) -> Result<Self> {
        refuse_quantized(checkpoint)?;
        let mut refusals = Vec::new();
        let mut tensors = Vec::new();
        for tensor in checkpoint.tensors() {
            let tensor = tensor?;
            let action = match plan_tensor(checkpoint, recipe, &tensor) {
                Ok(action) => action,
                Err(reason) => {
                    refusals.push((tensor.name().to_owned(), reason));
                    continue;
                }
            };
            tensors.push(TensorPlan {
                name: tensor.name().to_owned(),
                shape: tensor.shape().to_vec(),
                dtype: tensor.dtype(),
                source_bytes: tensor.bytes().len() as u64,
                action,
            });
        }
        if !refusals.is_empty() {
            return Err(Error::Refused {
                path: checkpoint.root().to_owned(),
                refusals: fold(refusals),
            });
        }
        let this = Self {
            tensors,
            family: Family::Own,
            dropped: Vec::new(),
            transform: None,
            foreign: None,
        };
        if this.quantized().next().is_none() {
            return Err(Error::Source {
                path: checkpoint.root().to_owned(),
                reason: "none of its tensors would be quantized; check --skip and --rule (`qtool inspect` lists the tensors)".to_owned(),
            });
        }
        Ok(this)
    }

    /// The tensors that will be quantized.
    pub fn quantized(&self) -> impl Iterator<Item = (&TensorPlan, &Quantization)> {
        self.tensors.iter().filter_map(|t| match &t.action {
            Action::Quantize(q) => Some((t, q.as_ref())),
            Action::Keep { .. } | Action::Convert(_) | Action::Measure(_) => None,
        })
    }

    /// Bytes of all tensors in the source.
    pub fn source_bytes(&self) -> u64 {
        self.tensors.iter().map(|t| t.source_bytes).sum()
    }

    /// Bytes of all tensors in the artifact.
    pub fn stored_bytes(&self) -> u64 {
        self.tensors.iter().map(TensorPlan::stored_bytes).sum()
    }
}

fn plan_tensor(
    checkpoint: &Checkpoint,
    recipe: &Recipe,
    tensor: &TensorView<'_>,
) -> std::result::Result<Action, String> {
    let keep = |reason| Action::Keep {
        reason,
        source: tensor.name().to_owned(),
    };
    let options = match recipe.decide(tensor.name(), tensor.dtype(), tensor.shape()) {
        Decision::Keep(reason) => return Ok(keep(reason)),
        Decision::Quantize(options) => options,
    };
    let Some(dtype) = tensor.float_dtype() else {
        return Ok(keep(format!("{} is not a float weight", tensor.dtype())));
    };
    let orientation = checkpoint.naming().orientation(tensor.name());
    let (rows, columns) = tensor.matrix_dims();
    let (n, k) = match orientation {
        Orientation::OutIn => (rows, columns),
        Orientation::InOut if tensor.shape().len() == 2 => (columns, rows),
        Orientation::InOut => {
            return Ok(keep("not a matrix".to_owned()));
        }
    };
    let piece = Piece::whole(tensor.name(), dtype, orientation, (n, k));
    Ok(Action::Quantize(Box::new(quantization(&options, piece)?)))
}

/// How the whole of a tensor is quantized. Fails when its shape does not fit the options.
pub(crate) fn quantization(
    options: &TensorOptions,
    piece: Piece,
) -> std::result::Result<Quantization, String> {
    let method = qtool_calib::find(options.method).ok_or_else(|| format!("no method {}", options.method))?;
    let quantizer = (method.build)(options).map_err(|e| e.to_string())?;
    let scheme = quantizer.scheme();
    let (n, k) = piece.dims;
    let parts = scheme.parts(n, k).map_err(|e| e.to_string())?;
    Ok(Quantization {
        quantizer,
        scheme,
        n,
        k,
        orientation: piece.orientation,
        pieces: vec![piece],
        parts,
    })
}

/// One line per class of tensors refused for the same reason: a model's layers rarely differ.
fn fold(refusals: Vec<(String, String)>) -> Vec<String> {
    let groups = group(refusals, |(name, reason)| (class_of(name), reason.clone()));
    let line = |(class, reason, members): (String, String, Vec<(String, String)>)| match members.as_slice() {
        [(name, _)] => format!("{name}: {reason}"),
        _ => format!("{class} ({} tensors): {reason}", members.len()),
    };
    groups.into_iter().map(line).collect()
}

/// Endings of the tensors that quantized checkpoints of other tools hold.
const QUANTIZED_ENDINGS: [&str; 6] = [
    ".qweight",
    ".weight_packed",
    ".quant_weight",
    ".weight_scale",
    ".weight_scale_inv",
    ".quant_map",
];

/// Fails when the source is quantized already: rounding twice would hide the first loss.
pub fn refuse_quantized(checkpoint: &Checkpoint) -> Result<()> {
    let refuse = |reason: String| {
        Err(Error::Source {
            path: checkpoint.root().to_owned(),
            reason,
        })
    };
    let advice = "give the BF16, F16 or F32 original";
    if qtool_formats::artifact::Artifact::is_artifact(checkpoint.root()) {
        return refuse(format!(
            "is an artifact of qtool; {advice}, or decode it with `qtool export --to bf16`"
        ));
    }
    if let Some(name) = checkpoint
        .names()
        .find(|n| QUANTIZED_ENDINGS.iter().any(|ending| n.ends_with(ending)))
    {
        return refuse(format!("is quantized already (it holds {name}); {advice}"));
    }
    if checkpoint.root().is_dir()
        && let Some(config) = read_config(checkpoint.folder())?
        && let Some(block) = config.get("quantization_config").filter(|block| !block.is_null())
    {
        let method = ["quant_method", "quantization"]
            .iter()
            .find_map(|key| block.get(key)?.as_str());
        return refuse(format!(
            "its config.json says it is quantized already ({}); {advice}",
            method.unwrap_or("unnamed method")
        ));
    }
    Ok(())
}

/// `config.json` of a folder, or `None` when there is none.
pub fn read_config(folder: &Path) -> Result<Option<Value>> {
    let path = folder.join("config.json");
    if !path.is_file() {
        return Ok(None);
    }
    let config: Value = read_json(&path)?;
    if !config.is_object() {
        return Err(Error::Source {
            path,
            reason: "expected a JSON object".to_owned(),
        });
    }
    Ok(Some(config))
}
