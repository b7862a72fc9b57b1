//! Scales of input channels as foldings, and the file of an artifact that holds them.
//!
//! ```text
//! key of a norm's gain g      its readers' columns times s, g / s
//! key of an o_proj            its columns times s, the rows of its values divided by s, head by head
//! key of a down_proj          its columns times s, the rows of its up projection divided by s
//! ```

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use qtool_formats::FormatError;
use qtool_formats::artifact::transform::ScalesRecord;
use qtool_formats::checkpoint::Checkpoint;
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensorError, SafeTensors};

use super::Transform;
use super::folding::Step;
use super::layout::{Layout, Pair};
use super::rotation::bias_of;
use crate::source::WeightSource;
use crate::{Error, Result};

/// Name of the file.
pub const FILE: &str = "qtool.scales";

/// Scales by key, see the module's text. All are positive and finite.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct ChannelScales(pub BTreeMap<String, Vec<f32>>);

impl ChannelScales {
    /// What the manifest says of them.
    pub fn record() -> ScalesRecord {
        ScalesRecord {
            file: FILE.to_owned(),
        }
    }

    /// The same scales moved by a rounding, so that every gain divided by its scale is a number of the gain's own
    /// type: what is stored then multiplies to the original exactly. `rotated` gains are 1 by now.
    pub fn fitted(mut self, checkpoint: &Checkpoint, layout: &Layout, rotated: bool) -> Result<Self> {
        for norm in &layout.norms {
            let Some(scales) = self.0.get_mut(&norm.gain) else {
                continue;
            };
            let view = checkpoint.tensor(&norm.gain)?;
            let Some(dtype) = view.float_dtype() else { continue };
            let gains = dtype.widen(view.bytes());
            for (s, gain) in scales.iter_mut().zip(gains) {
                let gain = if rotated { 1.0 } else { gain };
                let mut stored = Vec::new();
                dtype.push(gain / *s, &mut stored);
                let fitted = gain / dtype.widen(&stored).first().copied().unwrap_or_default();
                if fitted.is_finite() && fitted > 0.0 {
                    *s = fitted;
                }
            }
        }
        Ok(self)
    }

    /// The file's bytes: a safetensors file of F32 vectors.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let bytes: Vec<Vec<u8>> = self
            .0
            .values()
            .map(|s| s.iter().flat_map(|v| v.to_le_bytes()).collect())
            .collect();
        let views = self
            .0
            .iter()
            .zip(&bytes)
            .map(|((name, s), bytes)| Ok((name.as_str(), TensorView::new(Dtype::F32, vec![s.len()], bytes)?)))
            .collect::<std::result::Result<Vec<_>, SafeTensorError>>();
        let fault = |e: SafeTensorError| damaged(Path::new(FILE), &e.to_string());
        safetensors::serialize(views.map_err(fault)?, None).map_err(fault)
    }

    /// Reads the file of an artifact. Fails when it is damaged, or a scale is not a positive number.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(FormatError::io(path, "read"))?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| damaged(path, &e.to_string()))?;
        let mut scales = BTreeMap::new();
        for (name, view) in file.iter() {
            if view.dtype() != Dtype::F32 || view.shape().len() != 1 {
                return Err(damaged(
                    path,
                    &format!(
                        "{name:?} is {:?} {:?}, expected a vector of F32",
                        view.dtype(),
                        view.shape()
                    ),
                ));
            }
            let values: Vec<f32> = view
                .data()
                .as_chunks()
                .0
                .iter()
                .map(|b| f32::from_le_bytes(*b))
                .collect();
            if let Some(at) = values.iter().position(|v| !v.is_finite() || *v <= 0.0) {
                return Err(damaged(
                    path,
                    &format!(
                        "scale {at} of {name:?} is {}, expected a positive number",
                        values[at]
                    ),
                ));
            }
            scales.insert(name.to_owned(), values);
        }
        Ok(Self(scales))
    }
}

fn damaged(path: &Path, reason: &str) -> Error {
    Error::Source {
        path: path.to_owned(),
        reason: format!("is no file of scales: {reason}; make the artifact again"),
    }
}

/// The channel of the writer that each column of a pair's reader belongs to.
pub fn channel_of(pair: &Pair) -> Vec<usize> {
    let width = pair.head.unwrap_or(pair.rows.len()).max(1);
    let columns = pair.rows.len() * pair.repeats;
    (0..columns)
        .map(|c| c / width / pair.repeats.max(1) * width + c % width)
        .collect()
}

/// Adds the foldings. Fails when a key names nothing that could be scaled, or its length is not that of its channels.
pub(super) fn fold(
    transform: &mut Transform,
    source: &dyn WeightSource,
    layout: &Layout,
    scales: &ChannelScales,
) -> Result<()> {
    let inverse = |s: &[f32]| s.iter().map(|&s| 1.0 / f64::from(s)).collect::<Vec<f64>>();
    let wide = |s: &[f32]| s.iter().map(|&s| f64::from(s)).collect::<Arc<[f64]>>();
    let mut folded = 0;
    let expect = |key: &str, found: usize, expected: usize| {
        if found == expected {
            return Ok(());
        }
        Err(Error::Source {
            path: source.path().to_owned(),
            reason: format!(
                "its scales of {key} are {found}, expected {expected} for this model; give the model the artifact was made from"
            ),
        })
    };
    for norm in &layout.norms {
        let Some(s) = scales.0.get(&norm.gain) else {
            continue;
        };
        expect(&norm.gain, s.len(), layout.hidden)?;
        folded += 1;
        transform
            .entry(&norm.gain)
            .columns
            .push(Step::Scale(inverse(s).into()));
        let s = wide(s);
        for reader in &norm.readers {
            transform.entry(reader).columns.push(Step::Scale(Arc::clone(&s)));
        }
    }
    for pair in layout.values.iter().chain(&layout.mlps) {
        let Some(s) = scales.0.get(&pair.reader) else {
            continue;
        };
        expect(&pair.reader, s.len(), pair.rows.len())?;
        folded += 1;
        let columns: Vec<f32> = channel_of(pair).into_iter().map(|channel| s[channel]).collect();
        transform
            .entry(&pair.reader)
            .columns
            .push(Step::Scale(wide(&columns)));
        let mut rows = vec![1.0; pair.writer_rows];
        rows[pair.rows.clone()].copy_from_slice(&inverse(s));
        let rows: Arc<[f64]> = rows.into();
        transform
            .entry(&pair.writer)
            .rows
            .push(Step::Scale(Arc::clone(&rows)));
        if let Some(bias) = bias_of(source, &pair.writer) {
            transform.entry(&bias).columns.push(Step::Scale(rows));
        }
    }
    expect("all layers", folded, scales.0.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn query_heads_share_their_value_heads_channels() {
        let pair = Pair {
            writer: String::new(),
            rows: 8..14,
            writer_rows: 14,
            reader: String::new(),
            repeats: 2,
            head: Some(3),
        };
        assert_eq!(channel_of(&pair), [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]);
        let mlp = Pair {
            repeats: 1,
            head: None,
            ..pair
        };
        assert_eq!(channel_of(&mlp), [0, 1, 2, 3, 4, 5]);
    }

    #[test]
    fn what_is_written_reads_back_and_lies_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let scales = ChannelScales(BTreeMap::from([
            ("a".to_owned(), vec![0.5, 2.0]),
            ("b".to_owned(), vec![1.0]),
        ]));
        std::fs::write(&path, scales.to_bytes().unwrap()).unwrap();
        assert_eq!(ChannelScales::read(&path).unwrap(), scales);
        for bad in [f32::NAN, 0.0, -1.0, f32::INFINITY] {
            let wrong = ChannelScales(BTreeMap::from([("a".to_owned(), vec![1.0, bad])]));
            std::fs::write(&path, wrong.to_bytes().unwrap()).unwrap();
            let text = ChannelScales::read(&path).unwrap_err().to_string();
            assert!(text.contains("scale 1 of \"a\""), "{text}");
        }
        std::fs::write(&path, b"nonsense").unwrap();
        assert!(ChannelScales::read(&path).unwrap_err().to_string().contains(FILE));
    }
}
