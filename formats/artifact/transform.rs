//! How the source was rewritten before it was quantized, as the manifest records it. What is stored decodes
//! without it: it is for those who want to compare with the source.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::manifest::{FileRecord, printable};
use crate::{FormatError, Result};

/// `transform` of a manifest: in this order, what was folded into the weights.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransformRecord {
    /// A rotation of the residual stream and of the values of each head.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rotation: Option<RotationRecord>,
    /// Scales of input channels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scales: Option<ScalesRecord>,
}

/// A rotation. Its matrices follow from sizes and seed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RotationRecord {
    /// Of the signs and of drawn factors.
    pub seed: u64,
    /// Factors of the matrix that turns the residual stream.
    #[serde(deserialize_with = "printable")]
    pub stream: String,
    /// Factors of the matrix that turns the values of a head.
    #[serde(deserialize_with = "printable")]
    pub heads: String,
}

/// Scales of input channels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScalesRecord {
    /// The file of the folder that holds them, in the safetensors form: F32 vectors by the name of the norm whose
    /// gain is divided by them, or of the weight whose columns are multiplied with them.
    #[serde(deserialize_with = "printable")]
    pub file: String,
}

impl TransformRecord {
    /// Whether it says anything.
    pub fn is_empty(&self) -> bool {
        self.rotation.is_none() && self.scales.is_none()
    }

    /// The file of scales must be one of the folder's, with its digest.
    pub(super) fn check(&self, path: &Path, files: &[FileRecord]) -> Result<()> {
        let known = |name: &str| files.iter().any(|f| f.name == name && f.digest.is_some());
        match &self.scales {
            Some(scales) if !known(&scales.file) => Err(FormatError::Manifest {
                path: path.to_owned(),
                what: "scales of the transform".to_owned(),
                expected: "one of its files, with a digest".to_owned(),
                got: crate::error::quoted(&scales.file),
            }),
            _ => Ok(()),
        }
    }
}
