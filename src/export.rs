//! Pipeline page: an artifact becomes another ecosystem's folder.

use std::path::Path;

use qtool_formats::artifact::{Artifact, Stored};
use qtool_formats::export::Exporter;
use qtool_formats::replace::Staging;

use crate::progress::Progress;
use crate::{Error, Result, interrupt};

/// Exports the artifact in `folder` to `target` and returns the bytes of tensor data written.
///
/// Fails before any byte is written when the format cannot hold one of its schemes.
pub fn run(
    folder: &Path,
    exporter: &dyn Exporter,
    target: &Path,
    force: bool,
    max_shard_bytes: u64,
    show_progress: bool,
) -> Result<u64> {
    let artifact = Artifact::open(folder)?;
    let refusals: Vec<String> = artifact
        .manifest()
        .tensors
        .iter()
        .filter_map(|t| match &t.stored {
            Stored::Quantized(q) => exporter
                .refuses(&q.scheme)
                .map(|reason| format!("{}: {reason}", t.name)),
            Stored::Kept { .. } => None,
        })
        .collect();
    if !refusals.is_empty() {
        return Err(Error::Refused {
            path: folder.to_owned(),
            refusals,
        });
    }
    if let (Ok(from), Ok(to)) = (folder.canonicalize(), target.canonicalize())
        && from.starts_with(&to)
    {
        let reason =
            "the output folder is, or holds, the artifact's own folder; choose another one".to_owned();
        return Err(Error::Source {
            path: target.to_owned(),
            reason,
        });
    }
    let bytes = exporter.planned_bytes(&artifact);
    let staging = Staging::begin(target, force)?;
    let progress = Progress::new(show_progress, "exporting", bytes);
    let outcome = exporter.export(&artifact, &staging, max_shard_bytes, &|done| {
        progress.set(done);
        !interrupt::requested()
    });
    progress.clear();
    interrupt::check()?;
    outcome?;
    staging.commit()?;
    Ok(bytes)
}
