//! Tensors of a folder, made ahead and written in order into shards: the part of an export that is the same whatever is
//! laid out.

use std::borrow::Cow;
use std::collections::HashMap;

use super::ahead::in_order;
use super::spares::Spares;
use super::{OnBytes, interrupted, syncing};
use crate::Result;
use crate::replace::Staging;
use crate::shard_writer::{ShardWriter, StoredTensor};

/// Bytes handed to the system at a time, between two questions whether to stop.
const CHUNK: usize = 1 << 23;

/// Writes `tensors`. `make(i)` for `i` below `count` gives the next bytes of the tensors of the group `group_of(i)`: of
/// each of them in order, or of the only one.
pub(super) fn write<'a>(
    staging: &Staging,
    tensors: Vec<StoredTensor>,
    max_shard_bytes: u64,
    (count, group_of): (usize, impl Fn(usize) -> usize),
    make: impl Fn(usize, &Spares) -> Result<Vec<Cow<'a, [u8]>>> + Sync,
    on_bytes: OnBytes<'_>,
) -> Result<()> {
    let mut firsts: HashMap<usize, usize> = HashMap::new();
    for (index, tensor) in tensors.iter().enumerate() {
        firsts.entry(tensor.group).or_insert(index);
    }
    let writer = ShardWriter::create(staging.folder(), tensors, max_shard_bytes)?;
    let mut writer = writer.without_digests();
    let spares = Spares::default();
    syncing::beside(staging.folder(), |due| {
        let mut done = 0u64;
        in_order(
            count,
            |i| make(i, &spares),
            |i, tensors| {
                let first = firsts.get(&group_of(i)).copied().unwrap_or(usize::MAX);
                for (index, bytes) in (first..).zip(tensors) {
                    for chunk in bytes.chunks(CHUNK) {
                        writer.append(index, chunk)?;
                        done += chunk.len() as u64;
                        if !on_bytes(done) {
                            return Err(interrupted(staging));
                        }
                        if let Some(file) = writer.due_for_sync(index)? {
                            due.offer(file);
                        }
                    }
                    if let Cow::Owned(bytes) = bytes {
                        spares.give(bytes);
                    }
                }
                Ok(())
            },
        )?;
        drop(due);
        writer.finish().map(|_| ())
    })
}
