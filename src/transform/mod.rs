//! A model rewritten so that it computes the same and quantizes better. Nothing of it is left at run time: every
//! change is folded into weights, so the result has the tensors, shapes and names it had before (but a tied head
//! becomes a head of its own).
//!
//! ```text
//! x           the residual stream, a row vector            y = x W^T   a linear layer, W (N, K)
//! rotation    x -> x R:  W -> W diag(g) R where a norm of gain g comes before it,  W -> R^T W where it writes to
//!             the stream;  values -> values P head by head, o -> o P;  R, P orthogonal
//! scales      columns of W times s, the norm's gain (or the rows of the layer before it) divided by s
//! ```
//!
//! | Page | Idea |
//! |---|---|
//! | [`layout`] | which tensors of a decoder read and write what |
//! | [`folding`] | what becomes of one tensor, and its arithmetic |
//! | [`rotation`] | the foldings of a rotation |
//! | [`scales`] | those of channel scales, and their file |
//! | `planned` | the plan of a transformed model |
//! | [`weights`] | rows of a checkpoint as transformed |
//! | [`model`] | the transformed model, to be run |
//! | [`evidence`] | statistics of the original as those of the transformed model |
//! | [`second`] | the same values derived again, for `qtool verify` |

pub mod evidence;
pub mod folding;
pub mod layout;
pub mod model;
mod planned;
pub mod rotation;
pub mod scales;
pub mod second;
pub mod weights;

use std::collections::HashMap;

use qtool_formats::artifact::transform::TransformRecord;
use serde_json::Value;

use crate::Result;
use crate::source::{Source, WeightSource};
use folding::Folding;
use layout::Layout;
use scales::ChannelScales;

/// What becomes of every tensor of a model.
#[derive(Debug, Clone)]
pub struct Transform {
    record: TransformRecord,
    foldings: HashMap<String, Folding>,
    made: Option<Made>,
    scales: Option<ChannelScales>,
}

/// A tensor the original has not: the head of a model whose head was its embedding.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Made {
    /// Its name.
    pub name: String,
    /// The tensor it is made of.
    pub origin: String,
}

impl Transform {
    /// The transformation `record` speaks of, for the model of `source`, with the scales of its file if it has one.
    ///
    /// Fails when the architecture cannot be transformed, holds a tensor that is not known to stay valid, or the
    /// record is of another model.
    pub fn new(source: &Source, record: TransformRecord, scales: Option<ChannelScales>) -> Result<Self> {
        let layout = Layout::of(source)?;
        let mut this = Self {
            record,
            foldings: HashMap::new(),
            made: None,
            scales: None,
        };
        if let Some(rotation) = this.record.rotation.clone() {
            layout.refuse_strangers(source)?;
            rotation::fold(&mut this, source as &dyn WeightSource, &layout, rotation.seed)?;
        }
        if let Some(scales) = scales {
            scales::fold(&mut this, source as &dyn WeightSource, &layout, &scales)?;
            this.scales = Some(scales);
        }
        Ok(this)
    }

    /// What the manifest says of it.
    pub fn record(&self) -> &TransformRecord {
        &self.record
    }

    /// What becomes of `source` where it is read as the tensor `target` (its own name, unless it is
    /// [`made`](Self::made) of it); `None` when nothing does.
    pub fn folding(&self, target: &str, source: &str) -> Option<&Folding> {
        let made = self
            .made
            .as_ref()
            .filter(|m| m.name == target && m.origin == source);
        self.foldings.get(made.map_or(source, |m| &m.name))
    }

    /// The tensor the original has not.
    pub fn made(&self) -> Option<&Made> {
        self.made.as_ref()
    }

    /// All that distinguishes it from other transformations of the same model.
    pub fn fingerprint(&self) -> Result<Value> {
        let mut all = serde_json::to_value(&self.record).unwrap_or_default();
        if let Some(bytes) = self.scales.as_ref().map(ChannelScales::to_bytes).transpose()? {
            all["digest"] = blake3::hash(&bytes).to_hex().to_string().into();
        }
        Ok(all)
    }

    /// The scales, if there are any.
    pub fn scales(&self) -> Option<&ChannelScales> {
        self.scales.as_ref()
    }

    /// Says in a `config.json` what has changed.
    pub fn adjust_config(&self, config: &mut Value) {
        if self.made.is_some() {
            config["tie_word_embeddings"] = Value::Bool(false);
        }
    }

    /// The folding of a tensor, to be added to.
    fn entry(&mut self, name: &str) -> &mut Folding {
        self.foldings.entry(name.to_owned()).or_default()
    }
}
