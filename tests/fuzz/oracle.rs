//! What must hold of any bytes at all. Used by the fuzz targets and by the tests of hostile files.

use std::path::Path;

use qtool_formats::artifact::{Manifest, Stored};
use qtool_formats::checkpoint::header::{self, Entry};
use qtool_formats::{FormatError, Result};
use safetensors::SafeTensors;

/// Where the bytes are said to come from; messages must name it.
pub const PATH: &str = "given.safetensors";

/// Parses `file` and holds the answer against the `safetensors` crate: what we accept it accepts,
/// with the same tensors; what only we refuse is one of our documented refusals.
pub fn judge_header(file: &[u8]) -> Result<Vec<Entry>> {
    let ours = header::parse(Path::new(PATH), file);
    if let Err(FormatError::FileSize { expected, .. }) = &ours
        && *expected > u64::MAX / 2
    {
        // The reference adds up such sizes unchecked.
        return ours;
    }
    let theirs = SafeTensors::deserialize(file);
    match (&ours, theirs) {
        (Ok(entries), Ok(theirs)) => {
            assert_eq!(entries.len(), theirs.len(), "number of tensors");
            for entry in entries {
                let Ok(view) = theirs.tensor(&entry.name) else {
                    panic!("the reference has no {:?}", entry.name);
                };
                assert_eq!(entry.dtype, view.dtype(), "dtype of {:?}", entry.name);
                assert_eq!(entry.shape, view.shape(), "shape of {:?}", entry.name);
                assert_eq!(
                    file.get(entry.range.clone()),
                    Some(view.data()),
                    "{:?}",
                    entry.name
                );
            }
        }
        (Ok(_), Err(error)) => panic!("only the reference refuses: {error}"),
        (Err(error), theirs) => {
            let message = error.to_string();
            assert!(message.starts_with(PATH), "{message:?} does not name the file");
            if let Ok(theirs) = theirs {
                let documented = match message.as_str() {
                    m if m.contains("overflows") => theirs.iter().any(|(_, t)| t.shape().contains(&0)),
                    m => ["twice", "control characters", "are accepted"]
                        .iter()
                        .any(|d| m.contains(d)),
                };
                assert!(documented, "only we refuse: {message}");
            }
        }
    }
    ours
}

/// Parses `json` as a manifest; one that is accepted has countable parts and reads back the same
/// from its own text.
pub fn judge_manifest(json: &[u8]) -> Result<Manifest> {
    let manifest = Manifest::parse(Path::new(PATH), json).inspect_err(|error| {
        let message = error.to_string();
        assert!(message.starts_with(PATH), "{message:?} does not name the file");
    })?;
    for tensor in &manifest.tensors {
        if let Stored::Quantized(record) = &tensor.stored {
            let parts = record.scheme.parts(record.rows, record.columns)?;
            let bytes = parts
                .iter()
                .try_fold(0usize, |sum, part| sum.checked_add(part.bytes()));
            assert!(bytes.is_some(), "the parts of {:?} overflow", tensor.name);
        }
    }
    let text = manifest.to_json();
    match Manifest::parse(Path::new(PATH), text.as_bytes()) {
        Ok(again) => assert_eq!(again.to_json(), text),
        Err(error) => panic!("its own text is refused: {error}"),
    }
    Ok(manifest)
}
