//! Tensors of a folder, made ahead and written in order into shards: the part of an export that is the same whatever is
//! laid out.

use std::borrow::Cow;

use super::ahead::in_order;
use super::{OnBytes, interrupted};
use crate::Result;
use crate::replace::Staging;
use crate::shard_writer::{ShardWriter, StoredTensor};

/// Bytes handed to the system at a time, between two questions whether to stop.
const CHUNK: usize = 1 << 23;

/// Writes `tensors`. `make(i)` for `i` below `count` gives the bytes of the next of them, as many as it likes, whole and in
/// order.
pub(super) fn write<'a>(
    staging: &Staging,
    tensors: Vec<StoredTensor>,
    max_shard_bytes: u64,
    count: usize,
    make: impl Fn(usize) -> Result<Vec<Cow<'a, [u8]>>> + Sync,
    on_bytes: OnBytes<'_>,
) -> Result<()> {
    let writer = ShardWriter::create(staging.folder(), tensors, max_shard_bytes)?;
    let mut writer = writer.without_digests();
    let (mut index, mut done) = (0, 0u64);
    in_order(count, make, |_, tensors| {
        for bytes in tensors {
            for chunk in bytes.chunks(CHUNK) {
                writer.append(index, chunk)?;
                done += chunk.len() as u64;
                if !on_bytes(done) {
                    return Err(interrupted(staging));
                }
            }
            index += 1;
        }
        Ok(())
    })?;
    writer.finish().map(|_| ())
}
