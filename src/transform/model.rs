//! The transformed model as a place that holds weights: everything that runs a model runs this one too. A matrix
//! is transformed when its bytes are first asked for, so what is never multiplied with (the head, in calibration)
//! costs nothing.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use qtool_formats::FloatDtype;
use qtool_formats::checkpoint::Checkpoint;
use qtool_formats::piece::Piece;
use qtool_kernels::Isa;
use qtool_kernels::backend::{Form, HostWeight, Storage};
use serde_json::Value;

use super::Transform;
use super::weights::Weights;
use crate::source::{Source, WeightSource};
use crate::{Error, Result};

/// See the module's text.
pub struct Transformed {
    source: Source,
    checkpoint: Arc<Checkpoint>,
    transform: Arc<Transform>,
    config: Value,
}

impl Transformed {
    /// The model of `checkpoint` through `transform`.
    pub fn new(checkpoint: Arc<Checkpoint>, transform: Arc<Transform>) -> Result<Self> {
        let source = Source::of_checkpoint(Arc::clone(&checkpoint))?;
        let mut config = source.config().clone();
        transform.adjust_config(&mut config);
        Ok(Self {
            source,
            checkpoint,
            transform,
            config,
        })
    }

    /// Where the tensor `name` comes from, as a whole.
    fn piece(&self, name: &str, origin: &str) -> Result<Piece> {
        let view = self.checkpoint.tensor(origin)?;
        let dtype = view.float_dtype().ok_or_else(|| Error::ModelTensor {
            path: self.source.path().to_owned(),
            tensor: name.to_owned(),
            expected: "a float tensor".to_owned(),
            got: view.dtype().to_string(),
        })?;
        Ok(Piece::of(
            &view,
            dtype,
            self.checkpoint.naming().orientation(origin),
        ))
    }

    fn origin<'a>(&'a self, name: &'a str) -> &'a str {
        self.transform
            .made()
            .filter(|made| made.name == name)
            .map_or(name, |made| &made.origin)
    }
}

/// A transformed matrix as little-endian f32, made when it is first read.
struct Late {
    checkpoint: Arc<Checkpoint>,
    transform: Arc<Transform>,
    target: String,
    piece: Piece,
    bytes: OnceLock<Vec<u8>>,
}

impl Storage for Late {
    fn bytes(&self) -> &[u8] {
        self.bytes.get_or_init(|| {
            let weights = Weights::new(&self.checkpoint, Some(&self.transform));
            let made = self
                .transform
                .folding(&self.target, &self.piece.tensor)
                .map(|folding| weights.make(&self.piece, folding));
            match made {
                Some(Ok(values)) => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
                // Weights that are not finite: NaN goes through the model, whose runner names the layer.
                _ => f32::NAN
                    .to_le_bytes()
                    .repeat(self.piece.dims.0 * self.piece.dims.1),
            }
        })
    }
}

impl WeightSource for Transformed {
    fn config(&self) -> &Value {
        &self.config
    }

    fn path(&self) -> &Path {
        self.source.path()
    }

    fn contains(&self, name: &str) -> bool {
        self.transform.made().is_some_and(|made| made.name == name) || self.source.contains(name)
    }

    fn matrix(&self, name: &str, n: usize, k: usize) -> Result<HostWeight> {
        let origin = self.origin(name);
        // The original checks type and dimensions.
        let original = self.source.matrix(origin, n, k)?;
        if self.transform.folding(name, origin).is_none() {
            return Ok(original);
        }
        let bytes = Late {
            checkpoint: Arc::clone(&self.checkpoint),
            transform: Arc::clone(&self.transform),
            target: name.to_owned(),
            piece: self.piece(name, origin)?,
            bytes: OnceLock::new(),
        };
        Ok(HostWeight {
            n,
            k,
            form: Form::Dense {
                dtype: FloatDtype::F32,
                bytes: Arc::new(bytes),
            },
        })
    }

    fn vector(&self, name: &str, len: usize) -> Result<Vec<f32>> {
        let original = self.source.vector(name, len)?;
        if self.transform.folding(name, name).is_none() {
            return Ok(original);
        }
        let mut values = Vec::new();
        Weights::new(&self.checkpoint, Some(&self.transform)).rows(
            Isa::best(),
            name,
            &[self.piece(name, name)?],
            0..1,
            &mut values,
        )?;
        Ok(values)
    }
}
