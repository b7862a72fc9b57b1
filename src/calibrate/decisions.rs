//! Codes decided block by block, kept on disk until the artifact is written: the memory of a sequential run, and
//! what an interrupted one goes on from. Owns the folder's layout.
//!
//! ```text
//! .OUT.qtool-blocks/
//!   run.json                 fingerprint of model, text and options
//!   block-00003.safetensors  for decided tensor i of block 3, its stored parts in our own forms: i.codes, i.scales ..
//!                            and the largest magnitudes of its keys and values, as F32
//!   block-00003.json         names, shapes, schemes, methods; written after the file above: with it, a block is done
//! ```

use std::collections::HashMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use qtool_formats::checkpoint::Checkpoint;
use qtool_formats::checkpoint::shards::read_json;
use qtool_formats::packing::{LSB_ROWS, Packing};
use qtool_formats::replace::write_file;
use qtool_formats::scheme::Family;
use qtool_formats::{FloatDtype, FormatError, QuantizedWeight, Scheme};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::recorder::KeyValueMagnitudes;
use crate::{Error, Result};

const RUN_FILE: &str = "run.json";

/// One decided tensor, before it is stored.
pub struct Decision {
    /// Rank of its plan.
    pub rank: usize,
    /// Its name in the plan.
    pub name: String,
    /// Its codes.
    pub weight: QuantizedWeight,
    /// What the manifest says of the method.
    pub method: String,
    /// tr(E H E^T) and tr(W H W^T) over all rows.
    pub proxy: Option<(f64, f64)>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Record {
    rank: usize,
    name: String,
    scheme: Scheme,
    rows: usize,
    columns: usize,
    method: String,
    proxy: Option<(f64, f64)>,
}

/// A decided tensor, on disk.
pub struct Decided {
    record: Record,
    file: std::sync::Arc<Checkpoint>,
    number: usize,
    /// What the manifest says of the method.
    pub method: String,
}

impl Decided {
    /// tr(E H E^T) and tr(W H W^T).
    pub fn proxy(&self) -> Option<(f64, f64)> {
        self.record.proxy
    }

    /// Codes of these rows.
    pub fn rows(&self, range: Range<usize>) -> Result<QuantizedWeight> {
        let parts = self.record.scheme.parts(self.record.rows, self.record.columns)?;
        let views = parts
            .iter()
            .map(|part| self.file.tensor(&stored_name(self.number, part.role.suffix())))
            .collect::<qtool_formats::Result<Vec<_>>>()?;
        let slices: Vec<&[u8]> = parts
            .iter()
            .zip(&views)
            .map(|(part, view)| part.bytes_of(view.bytes(), range.clone()))
            .collect();
        let dims = (range.len(), self.record.columns);
        Ok(QuantizedWeight::decode_rows(
            Family::Own,
            self.record.scheme,
            range.start,
            dims,
            &slices,
        )?)
    }
}

fn stored_name(number: usize, suffix: &str) -> String {
    format!("{number}.{suffix}")
}

/// See the module's text.
pub struct Decisions {
    folder: PathBuf,
    by_name: HashMap<(usize, String), (usize, usize)>,
    blocks: Vec<(std::sync::Arc<Checkpoint>, Vec<Record>)>,
}

impl Decisions {
    /// The folder of the run that writes `target`.
    pub fn folder_of(target: &Path) -> PathBuf {
        let name = target
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default();
        target.with_file_name(format!(".{name}.qtool-blocks"))
    }

    /// Starts a run, or goes on with one that was interrupted.
    ///
    /// Fails when the folder holds blocks of a run with another `fingerprint`, naming what differs.
    pub fn begin(target: &Path, fingerprint: &Value) -> Result<Self> {
        let folder = Self::folder_of(target);
        let run = folder.join(RUN_FILE);
        if run.is_file() {
            let known: Value = read_json(&run)?;
            if known != *fingerprint {
                return Err(Error::Resume {
                    changed: difference(&known, fingerprint),
                    folder,
                });
            }
        } else {
            if folder.exists() {
                fs::remove_dir_all(&folder).map_err(FormatError::io(&folder, "clear away"))?;
            }
            fs::create_dir_all(&folder).map_err(FormatError::io(&folder, "create"))?;
            write_file(&folder, RUN_FILE, format!("{fingerprint:#}\n").as_bytes())?;
        }
        let mut this = Self {
            folder,
            by_name: HashMap::new(),
            blocks: Vec::new(),
        };
        while this
            .folder
            .join(format!("block-{:05}.json", this.blocks.len()))
            .is_file()
        {
            this.open_next()?;
        }
        Ok(this)
    }

    /// Blocks decided so far.
    pub fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Where they lie.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Stores the decisions of the next block, and what its keys and values looked like.
    pub fn store(&mut self, decisions: &[Decision], seen: Option<&KeyValueMagnitudes>) -> Result<()> {
        let stem = format!("block-{:05}", self.blocks.len());
        let mut parts: Vec<(String, Vec<u8>)> = Vec::new();
        let mut records = Vec::new();
        for (number, decision) in decisions.iter().enumerate() {
            let scheme = decision.weight.scheme();
            let (rows, columns) = decision.weight.dims();
            let bytes = decision.weight.encode(&|b, k, c, o| LSB_ROWS.pack(b, k, c, o))?;
            let forms = scheme.parts(rows, columns)?;
            parts.extend(
                forms
                    .iter()
                    .zip(bytes)
                    .map(|(form, bytes)| (stored_name(number, form.role.suffix()), bytes)),
            );
            records.push(Record {
                rank: decision.rank,
                name: decision.name.clone(),
                scheme,
                rows,
                columns,
                method: decision.method.clone(),
                proxy: decision.proxy,
            });
        }
        let bytes = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect();
        for (name, values) in seen
            .into_iter()
            .flat_map(|m| [("keys", &m.keys), ("values", &m.values)])
        {
            parts.push((name.to_owned(), bytes(values)));
        }
        if parts.is_empty() {
            // A block whose weights are all kept: the file must hold something.
            parts.push(("none".to_owned(), vec![0]));
        }
        let path = self.folder.join(format!("{stem}.safetensors"));
        let fault = |e: safetensors::SafeTensorError| Error::Statistics {
            path: path.clone(),
            reason: e.to_string(),
        };
        let views = parts
            .iter()
            .map(|(name, bytes)| {
                safetensors::tensor::TensorView::new(safetensors::Dtype::U8, vec![bytes.len()], bytes)
                    .map(|view| (name.as_str(), view))
            })
            .collect::<std::result::Result<Vec<_>, _>>()
            .map_err(fault)?;
        let bytes = safetensors::serialize(views, None).map_err(fault)?;
        write_file(&self.folder, &format!("{stem}.safetensors"), &bytes)?;
        let json = serde_json::to_string(&records).unwrap_or_default();
        // Renamed into place: a half-written record must not count as a finished block.
        let unfinished = format!("{stem}.json.part");
        write_file(&self.folder, &unfinished, json.as_bytes())?;
        let (from, to) = (
            self.folder.join(unfinished),
            self.folder.join(format!("{stem}.json")),
        );
        fs::rename(&from, &to).map_err(FormatError::io(&to, "move into place"))?;
        self.open_next()
    }

    fn open_next(&mut self) -> Result<()> {
        let block = self.blocks.len();
        let stem = format!("block-{block:05}");
        let records: Vec<Record> = read_json(&self.folder.join(format!("{stem}.json")))?;
        let file = Checkpoint::open(&self.folder.join(format!("{stem}.safetensors")))?;
        for (number, record) in records.iter().enumerate() {
            self.by_name
                .insert((record.rank, record.name.clone()), (block, number));
        }
        self.blocks.push((std::sync::Arc::new(file), records));
        Ok(())
    }

    /// The decision on a tensor of the plan of `rank`.
    pub fn find(&self, rank: usize, name: &str) -> Result<Option<Decided>> {
        let Some(&(block, number)) = self.by_name.get(&(rank, name.to_owned())) else {
            return Ok(None);
        };
        let (file, records) = &self.blocks[block];
        let record = records[number].clone();
        Ok(Some(Decided {
            method: record.method.clone(),
            record,
            file: std::sync::Arc::clone(file),
            number,
        }))
    }

    /// Largest magnitudes of a block's keys and values, where there were any.
    pub fn magnitudes(&self, block: usize) -> Result<Option<KeyValueMagnitudes>> {
        let Some((file, _)) = self.blocks.get(block) else {
            return Ok(None);
        };
        if file.file_of("keys").is_none() {
            return Ok(None);
        }
        let read = |name| Ok::<_, Error>(FloatDtype::F32.widen(file.tensor(name)?.bytes()));
        Ok(Some(KeyValueMagnitudes {
            keys: read("keys")?,
            values: read("values")?,
        }))
    }

    /// Removes the folder: the artifact holds everything now.
    pub fn discard(self) {
        let folder = self.folder.clone();
        drop(self);
        let _ = fs::remove_dir_all(folder);
    }
}

/// Top-level keys whose values differ.
fn difference(known: &Value, now: &Value) -> String {
    let empty = serde_json::Map::new();
    let (a, b) = (
        known.as_object().unwrap_or(&empty),
        now.as_object().unwrap_or(&empty),
    );
    let mut keys: Vec<&str> = a
        .keys()
        .chain(b.keys())
        .map(String::as_str)
        .filter(|k| a.get(*k) != b.get(*k))
        .collect();
    keys.sort_unstable();
    keys.dedup();
    keys.join(", ")
}
