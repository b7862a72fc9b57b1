//! The writer's side of the pipeline: which tensors the folder will hold, and a thread that puts
//! computed blocks where they belong while the next batch is being computed.

use std::fs::File;
use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use qtool_formats::FormatError;
use qtool_formats::checkpoint::Checkpoint;
use qtool_formats::scheme::Part;
use qtool_formats::shard_writer::{ShardWriter, StoredTensor, WrittenShards};

use crate::blocks::Block;
use crate::plan::{Action, QuantizePlan};
use crate::{Result, interrupt};

/// A computed block on its way to the writer.
pub(crate) enum Output {
    /// Bytes of the source as they are.
    Copied,
    /// Bytes of the tensor's only stored tensor.
    Converted(Vec<u8>),
    /// Bytes of each part.
    Parts(Vec<Vec<u8>>),
}

impl Output {
    /// Bytes of the `i`th stored tensor; none of what is copied.
    fn part(&self, i: usize) -> &[u8] {
        match self {
            Self::Copied => &[],
            Self::Converted(bytes) => bytes,
            Self::Parts(parts) => parts.get(i).map_or(&[], Vec::as_slice),
        }
    }
}

/// A batch of computed blocks, in order.
pub(crate) type Batch = Vec<(Block, Output)>;

/// The stored tensors of the folder, and for each tensor of the plan the index of its first one.
pub(crate) fn stored_tensors(plan: &QuantizePlan) -> (Vec<StoredTensor>, Vec<usize>) {
    let mut stored = Vec::new();
    let mut first = Vec::new();
    for (group, tensor) in plan.tensors.iter().enumerate() {
        first.push(stored.len());
        match &tensor.action {
            Action::Keep { .. } | Action::Convert(_) | Action::Measure(_) => stored.push(StoredTensor {
                name: tensor.name.clone(),
                dtype: tensor.dtype,
                shape: tensor.shape.clone(),
                bytes: tensor.stored_bytes(),
                group,
            }),
            Action::Quantize(q) => stored.extend(q.parts.iter().map(|part| StoredTensor {
                name: plan.family.tensor_name(&tensor.name, part.role),
                dtype: part.dtype,
                shape: part.shape.clone(),
                bytes: part.bytes() as u64,
                group,
            })),
        }
    }
    (stored, first)
}

/// Writes every block that arrives; returns when the last has, and everything is synced. A thread
/// beside syncs what is written already, so that the disk is busy from the start.
pub(crate) fn write(
    checkpoint: &Checkpoint,
    plan: &QuantizePlan,
    writer: ShardWriter,
    first_part: &[usize],
    receive: &Receiver<Batch>,
) -> Result<WrittenShards> {
    let folder = writer.folder().to_owned();
    std::thread::scope(|scope| {
        let (due, files) = sync_channel::<File>(1);
        let syncing = scope.spawn(move || files.iter().try_for_each(|file| file.sync_data()));
        let written = write_blocks(checkpoint, plan, writer, first_part, receive, due);
        let synced = syncing
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        let written = written?;
        synced.map_err(FormatError::io(&folder, "sync"))?;
        Ok(written)
    })
}

fn write_blocks(
    checkpoint: &Checkpoint,
    plan: &QuantizePlan,
    mut writer: ShardWriter,
    first_part: &[usize],
    receive: &Receiver<Batch>,
    due: SyncSender<File>,
) -> Result<WrittenShards> {
    let mut gathered: Vec<Vec<u8>> = Vec::new();
    for batch in receive {
        for blocks in batch.chunk_by(|(one, _), (next, _)| one.tensor == next.tensor) {
            let Some((Block { tensor, .. }, _)) = blocks.first() else {
                continue;
            };
            let first = first_part[*tensor];
            match &plan.tensors[*tensor].action {
                Action::Keep { source, .. } => {
                    let view = checkpoint.tensor(source)?;
                    let bytes = blocks.iter().map(|(block, _)| &view.bytes()[block.range.clone()]);
                    writer.append_all(first, &bytes.collect::<Vec<_>>())?;
                }
                Action::Convert(_) | Action::Measure(_) => {
                    let bytes = blocks.iter().map(|(_, output)| output.part(0));
                    writer.append_all(first, &bytes.collect::<Vec<_>>())?;
                }
                Action::Quantize(q) => {
                    gathered.resize(q.parts.len(), Vec::new());
                    for (i, part) in q.parts.iter().enumerate() {
                        let mut bytes = blocks
                            .iter()
                            .map(|(block, output)| (&block.range, output.part(i)));
                        if part.by_columns {
                            bytes.try_for_each(|(rows, bytes)| {
                                append_by_columns(&mut writer, first + i, part, rows, bytes, &mut gathered[i])
                            })?;
                        } else {
                            writer
                                .append_all(first + i, &bytes.map(|(_, bytes)| bytes).collect::<Vec<_>>())?;
                        }
                    }
                }
            }
            if let Some(file) = writer.due_for_sync(first)? {
                // Still busy with the one before: that one's successor will cover this.
                let _ = due.try_send(file);
            }
        }
    }
    drop(due);
    interrupt::check()?;
    Ok(writer.finish()?)
}

/// Gathers the rows of a part that lies by columns, and writes it when the last of them is there.
fn append_by_columns(
    writer: &mut ShardWriter,
    index: usize,
    part: &Part,
    rows: &Range<usize>,
    bytes: &[u8],
    gathered: &mut Vec<u8>,
) -> Result<()> {
    gathered.extend_from_slice(bytes);
    if rows.end < part.rows {
        return Ok(());
    }
    Ok(writer.append(index, &part.laid_out(std::mem::take(gathered)))?)
}
