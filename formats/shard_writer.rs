//! Writing safetensors shards whose tensors arrive in pieces.
//!
//! All names, dtypes and sizes are known beforehand, so headers are written first and every piece
//! goes straight to its place; nothing is kept in memory. Within a shard, tensors lie in order of
//! falling element size (then as given), so that each begins at a multiple of its element size;
//! the header names them in offset order and leaves no gap, as the strictest readers ask.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::json;

use crate::checkpoint::header;
use crate::checkpoint::shards::{INDEX_FILE, SINGLE_FILE};
use crate::dtype::Dtype;
use crate::error::quoted;
use crate::{FormatError, Result};

/// A tensor to be stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredTensor {
    /// Name in the file.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Dimensions.
    pub shape: Vec<usize>,
    /// Size in bytes; must be that of dtype and shape.
    pub bytes: u64,
    /// Tensors of one group (the parts of a weight) share a shard. Groups must be contiguous.
    pub group: usize,
}

/// What became of one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// File it lies in.
    pub file: String,
    /// Digest of its bytes, `blake3:` and 64 hex digits; empty [without digests](ShardWriter::without_digests).
    pub digest: String,
}

/// What became of all of them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WrittenShards {
    /// One per tensor, in the order given.
    pub tensors: Vec<Written>,
    /// Name and size of each file, index included.
    pub files: Vec<(String, u64)>,
}

struct Slot {
    shard: usize,
    offset: u64,
    bytes: u64,
    written: u64,
    /// Absent where nobody asks for digests.
    hasher: Option<Box<blake3::Hasher>>,
}

struct Shard {
    name: String,
    path: PathBuf,
    header: Vec<u8>,
    data_bytes: u64,
    missing: u64,
    file: Option<File>,
}

/// Bytes after which [`ShardWriter::due_for_sync`] gives a handle.
const SYNC_BYTES: u64 = 64 << 20;

/// See the module's text.
pub struct ShardWriter {
    unsynced: u64,
    folder: PathBuf,
    tensors: Vec<StoredTensor>,
    slots: Vec<Slot>,
    shards: Vec<Shard>,
}

/// The digest of `bytes` as written into manifests.
pub fn digest_text(hasher: &blake3::Hasher) -> String {
    format!("blake3:{}", hasher.finalize().to_hex())
}

impl ShardWriter {
    /// Lays `tensors` out over shards of at most `max_shard_bytes` of tensor data (a larger single
    /// group gets a shard of its own) in `folder`. Creates no file yet.
    ///
    /// Fails when a name is one that no reader accepts or is given twice, as happens when a source
    /// holds both `W` and a tensor of its own named `W.codes`.
    pub fn create(folder: &Path, tensors: Vec<StoredTensor>, max_shard_bytes: u64) -> Result<Self> {
        let mut names = HashSet::new();
        for tensor in &tensors {
            let twice = "two tensors would be stored under this name; keep or rename one of them";
            let fault = header::name_fault(&tensor.name)
                .or_else(|| (!names.insert(&tensor.name)).then(|| twice.to_owned()));
            if let Some(reason) = fault {
                return Err(FormatError::TensorEntry {
                    path: folder.to_owned(),
                    tensor: quoted(&tensor.name),
                    reason,
                });
            }
        }
        drop(names);
        let mut members: Vec<Vec<usize>> = vec![Vec::new()];
        let mut filled = 0u64;
        let mut index = 0;
        while let Some(first) = tensors.get(index) {
            let group: Vec<usize> = (index..tensors.len())
                .take_while(|&i| tensors.get(i).is_some_and(|t| t.group == first.group))
                .collect();
            let bytes: u64 = group
                .iter()
                .filter_map(|&i| tensors.get(i))
                .map(|t| t.bytes)
                .sum();
            if filled > 0 && filled + bytes > max_shard_bytes {
                members.push(Vec::new());
                filled = 0;
            }
            filled += bytes;
            index += group.len();
            if let Some(last) = members.last_mut() {
                last.extend(group);
            }
        }
        let count = members.len();
        let mut slots: BTreeMap<usize, Slot> = BTreeMap::new();
        let mut shards = Vec::with_capacity(count);
        for (number, mut list) in members.into_iter().enumerate() {
            let name = match count {
                1 => SINGLE_FILE.to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
            };
            let path = folder.join(&name);
            list.sort_by_key(|&i| std::cmp::Reverse(tensors.get(i).map_or(0, |t| t.dtype.bitsize())));
            let (header, placed) = lay_out(&path, &tensors, &list)?;
            let data_bytes = placed.iter().map(|(_, _, bytes)| bytes).sum();
            for (i, offset, bytes) in placed {
                let offset = header.len() as u64 + offset;
                let hasher = Some(Box::new(blake3::Hasher::new()));
                slots.insert(
                    i,
                    Slot {
                        shard: number,
                        offset,
                        bytes,
                        written: 0,
                        hasher,
                    },
                );
            }
            shards.push(Shard {
                name,
                path,
                header,
                data_bytes,
                missing: data_bytes,
                file: None,
            });
        }
        Ok(Self {
            unsynced: 0,
            folder: folder.to_owned(),
            tensors,
            slots: slots.into_values().collect(),
            shards,
        })
    }

    /// The same without digests, which then are empty.
    pub fn without_digests(mut self) -> Self {
        self.slots.iter_mut().for_each(|slot| slot.hasher = None);
        self
    }

    /// Appends `bytes` to tensor `index` (its place in the list given to [`create`](Self::create)).
    pub fn append(&mut self, index: usize, bytes: &[u8]) -> Result<()> {
        let (Some(slot), Some(tensor)) = (self.slots.get_mut(index), self.tensors.get(index)) else {
            return Ok(());
        };
        let Some(shard) = self.shards.get_mut(slot.shard) else {
            return Ok(());
        };
        let after = slot.written + bytes.len() as u64;
        if after > slot.bytes {
            return Err(FormatError::TensorSize {
                path: shard.path.clone(),
                tensor: tensor.name.clone(),
                expected: format!("{} bytes", slot.bytes),
                got: after,
            });
        }
        if let Some(hasher) = &mut slot.hasher {
            hasher.update(bytes);
        }
        shard.write_at(slot.offset + slot.written, bytes)?;
        slot.written = after;
        self.unsynced += bytes.len() as u64;
        Ok(())
    }

    /// The folder the shards lie in.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// When much was written since the last call that gave one: a handle of the file tensor `index`
    /// lies in, to be synced by another thread while writing goes on. Whoever takes it must report
    /// its errors; the system tells each only once.
    pub fn due_for_sync(&mut self, index: usize) -> Result<Option<File>> {
        if self.unsynced < SYNC_BYTES {
            return Ok(None);
        }
        let shard = self.slots.get(index).and_then(|slot| self.shards.get(slot.shard));
        let Some((shard, file)) = shard.and_then(|shard| Some((shard, shard.file.as_ref()?))) else {
            return Ok(None);
        };
        self.unsynced = 0;
        file.try_clone()
            .map(Some)
            .map_err(FormatError::io(&shard.path, "sync"))
    }

    /// Checks that every tensor is complete, writes the index when there are several shards, and
    /// returns what was written.
    pub fn finish(mut self) -> Result<WrittenShards> {
        for (slot, tensor) in self.slots.iter().zip(&self.tensors) {
            if slot.written != slot.bytes {
                return Err(FormatError::TensorSize {
                    path: self.folder.clone(),
                    tensor: tensor.name.clone(),
                    expected: format!("{} bytes", slot.bytes),
                    got: slot.written,
                });
            }
        }
        let mut files = Vec::new();
        for shard in &mut self.shards {
            if shard.data_bytes == 0 {
                shard.write_at(shard.header.len() as u64, &[])?;
                shard.close()?;
            }
            files.push((shard.name.clone(), shard.header.len() as u64 + shard.data_bytes));
        }
        let tensors: Vec<Written> = self
            .slots
            .iter()
            .map(|slot| Written {
                file: self
                    .shards
                    .get(slot.shard)
                    .map(|s| s.name.clone())
                    .unwrap_or_default(),
                digest: slot.hasher.as_deref().map(digest_text).unwrap_or_default(),
            })
            .collect();
        if self.shards.len() > 1 {
            files.push(self.write_index(&tensors)?);
        }
        Ok(WrittenShards { tensors, files })
    }

    fn write_index(&self, written: &[Written]) -> Result<(String, u64)> {
        let weight_map: BTreeMap<&str, &str> = self
            .tensors
            .iter()
            .zip(written)
            .map(|(t, w)| (t.name.as_str(), w.file.as_str()))
            .collect();
        let total_size: u64 = self.tensors.iter().map(|t| t.bytes).sum();
        let index = json!({"metadata": {"total_size": total_size}, "weight_map": weight_map});
        let text = format!("{index:#}\n");
        let path = self.folder.join(INDEX_FILE);
        let mut file = File::create(&path).map_err(FormatError::io(&path, "create"))?;
        file.write_all(text.as_bytes())
            .map_err(FormatError::io(&path, "write"))?;
        file.sync_all().map_err(FormatError::io(&path, "sync"))?;
        Ok((INDEX_FILE.to_owned(), text.len() as u64))
    }
}

impl Shard {
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        let file = match &mut self.file {
            Some(file) => file,
            None => {
                let mut file = File::create(&self.path).map_err(FormatError::io(&self.path, "create"))?;
                file.write_all(&self.header)
                    .map_err(FormatError::io(&self.path, "write"))?;
                self.file.insert(file)
            }
        };
        file.seek(SeekFrom::Start(offset))
            .map_err(FormatError::io(&self.path, "write"))?;
        file.write_all(bytes)
            .map_err(FormatError::io(&self.path, "write"))?;
        self.missing = self.missing.saturating_sub(bytes.len() as u64);
        if self.missing == 0 && !bytes.is_empty() {
            self.close()?;
        }
        Ok(())
    }

    fn close(&mut self) -> Result<()> {
        match self.file.take() {
            Some(file) => file.sync_all().map_err(FormatError::io(&self.path, "sync")),
            None => Ok(()),
        }
    }
}

/// The header that a shard of these tensors, in this order, is written with.
pub(crate) fn header_of(path: &Path, tensors: &[StoredTensor]) -> Result<Vec<u8>> {
    let order: Vec<usize> = (0..tensors.len()).collect();
    Ok(lay_out(path, tensors, &order)?.0)
}

/// The header bytes (length, JSON, padding to 8) and each tensor's place in the data.
type Placed = Vec<(usize, u64, u64)>;

fn lay_out(path: &Path, tensors: &[StoredTensor], order: &[usize]) -> Result<(Vec<u8>, Placed)> {
    let mut at = 0u64;
    let mut infos = Vec::new();
    let mut placed = Vec::new();
    for &i in order {
        let Some(tensor) = tensors.get(i) else { continue };
        let (start, end) = (at as usize, (at + tensor.bytes) as usize);
        infos.push((
            tensor.name.clone(),
            TensorInfo {
                dtype: tensor.dtype,
                shape: tensor.shape.clone(),
                data_offsets: (start, end),
            },
        ));
        placed.push((i, at, tensor.bytes));
        at += tensor.bytes;
    }
    let bad = |reason: String| FormatError::Header {
        path: path.to_owned(),
        reason,
    };
    let metadata = Some(std::collections::HashMap::from([(
        "format".to_owned(),
        "pt".to_owned(),
    )]));
    let metadata = Metadata::new(metadata, infos).map_err(|e| bad(e.to_string()))?;
    let mut json = serde_json::to_vec(&metadata).map_err(|e| bad(e.to_string()))?;
    json.resize(json.len().next_multiple_of(8), b' ');
    let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut json);
    Ok((bytes, placed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Checkpoint;

    fn tensor(name: &str, dtype: Dtype, len: usize, group: usize) -> StoredTensor {
        let bytes = (len * dtype.bitsize() / 8) as u64;
        StoredTensor {
            name: name.to_owned(),
            dtype,
            shape: vec![len],
            bytes,
            group,
        }
    }

    #[test]
    fn pieces_land_aligned_and_groups_stay_together() {
        let dir = tempfile::tempdir().unwrap();
        let tensors = vec![
            tensor("a.codes", Dtype::U8, 5, 0),
            tensor("a.scales", Dtype::F32, 2, 0),
            tensor("b.codes", Dtype::U8, 7, 1),
            tensor("b.scales", Dtype::BF16, 3, 1),
        ];
        let mut writer = ShardWriter::create(dir.path(), tensors, 13).unwrap();
        writer.append(0, &[1, 2]).unwrap();
        writer.append(1, &[9; 8]).unwrap();
        writer.append(2, &[7; 7]).unwrap();
        writer.append(0, &[3, 4, 5]).unwrap();
        assert!(writer.append(0, &[6]).is_err(), "more than declared");
        writer.append(3, &[8; 6]).unwrap();
        let written = writer.finish().unwrap();
        assert_eq!(written.files.len(), 3);
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(
            checkpoint.names().collect::<Vec<_>>(),
            ["a.scales", "a.codes", "b.scales", "b.codes"]
        );
        assert_eq!(checkpoint.tensor("a.codes").unwrap().bytes(), [1, 2, 3, 4, 5]);
        let digest = format!("blake3:{}", blake3::hash(&[1, 2, 3, 4, 5]).to_hex());
        assert_eq!(written.tensors[0].digest, digest);
    }

    #[test]
    fn an_incomplete_tensor_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = ShardWriter::create(dir.path(), vec![tensor("a", Dtype::U8, 2, 0)], 100).unwrap();
        writer.append(0, &[1]).unwrap();
        assert!(writer.finish().is_err());
    }
}
