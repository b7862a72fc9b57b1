//! Pipeline page: an artifact, or a model that others quantized, becomes another ecosystem's folder.

use std::path::Path;

use qtool_formats::artifact::{Artifact, RankIndex, Stored};
use qtool_formats::export::foreign::Given;
use qtool_formats::export::{Exporter, OnBytes};
use qtool_formats::import::{self, Foreign};
use qtool_formats::replace::Staging;

use crate::progress::Progress;
use crate::tokenizer;
use crate::{Error, Result, interrupt};

/// Exports the artifact or model in `folder` to `target` and returns the bytes of tensor data written.
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
    if let Some(first) = RankIndex::folders(folder)?
        .as_ref()
        .and_then(|ranks| ranks.first())
    {
        return Err(Error::Source {
            path: folder.to_owned(),
            reason: format!(
                "holds one artifact per rank of tensor parallelism, which are exported one by one; name one of them, such as {}",
                first.display()
            ),
        });
    }
    if !Artifact::is_artifact(folder)
        && let Some(model) = import::open(folder)?
    {
        return foreign(&model, exporter, target, force, max_shard_bytes, show_progress);
    }
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
    if let Some((first, rest)) = refusals.split_first() {
        let more = match rest.len() {
            0 => String::new(),
            more => format!(" (and {more} more tensors like it)"),
        };
        return Err(Error::Source {
            path: folder.to_owned(),
            reason: format!("{first}{more}"),
        });
    }
    exporter.check(&artifact)?;
    apart(folder, target)?;
    let bytes = exporter.planned_bytes(&artifact);
    written(target, force, show_progress, bytes, |staging, on_bytes| {
        exporter.export(&artifact, staging, max_shard_bytes, on_bytes)
    })
}

/// Has `write` fill a folder beside the target, which takes its name when it is complete; `bytes` are what it will write.
fn written(
    target: &Path,
    force: bool,
    show_progress: bool,
    bytes: u64,
    write: impl FnOnce(&Staging, OnBytes<'_>) -> qtool_formats::Result<()>,
) -> Result<u64> {
    let staging = Staging::begin(target, force)?;
    let progress = Progress::new(show_progress, "exporting", bytes);
    let outcome = write(&staging, &|done| {
        progress.set(done);
        !interrupt::requested()
    });
    progress.clear();
    interrupt::check()?;
    outcome?;
    staging.commit()?;
    Ok(bytes)
}

/// Fails when the target holds what is exported.
fn apart(from: &Path, target: &Path) -> Result<()> {
    match (from.canonicalize(), target.canonicalize()) {
        (Ok(from), Ok(to)) if from.starts_with(&to) => Err(Error::Source {
            path: target.to_owned(),
            reason: "the output folder is, or holds, the folder that is exported; choose another one"
                .to_owned(),
        }),
        _ => Ok(()),
    }
}

/// The same of a model that others quantized.
fn foreign(
    model: &Foreign,
    exporter: &dyn Exporter,
    target: &Path,
    force: bool,
    max_shard_bytes: u64,
    show_progress: bool,
) -> Result<u64> {
    let path = model.files().root();
    let files = match import::gguf::file_of(path)? {
        Some(file) => tokenizer::files_of_gguf(&file)?,
        None => Vec::new(),
    };
    let given = Given { model, files };
    let planned = exporter.plan_foreign(&given)?;
    apart(path, target)?;
    written(
        target,
        force,
        show_progress,
        planned.tensor_bytes,
        |staging, on_bytes| (planned.write)(staging, max_shard_bytes, on_bytes),
    )
}
