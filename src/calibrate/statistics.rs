//! A folder of statistics: one safetensors file a block, and `stats.json`, written last. Owns its layout.
//!
//! ```text
//! stats.json                what was measured on what: see [`Index`]
//! block-00007.safetensors   for input i of block 7:
//!   i.moment     F32 (K (K + 1) / 2): sums of x_r x_c, r <= c, row by row; (K) when only the diagonal was asked for
//!   i.absmax     F32 (K)
//!   keys, values F32 (kv heads * D): largest magnitudes, keys after the rotary embedding
//! ```
//!
//! A part made by `calibrate --shard` holds `i.moment.s` in F64 for each of its slices s instead, so that merging
//! adds in the order of a single run and gives its very bits.

use std::collections::{BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use qtool_calib::stats::{LayerStats, Moment};
use qtool_formats::checkpoint::Checkpoint;
use qtool_formats::checkpoint::shards::read_json;
use qtool_formats::replace::{STATISTICS_FILE, Staging, write_file};
use qtool_formats::{FloatDtype, FormatError};
use safetensors::tensor::{Dtype, TensorView};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::recorder::{BlockStatistics, Input, KeyValueMagnitudes};
use crate::{Error, Result, TOOL};

/// Name of the index.
pub const INDEX_FILE: &str = STATISTICS_FILE;
/// Value of its `format`.
pub const FORMAT: &str = "qtool-statistics";
/// Value of its `version`.
pub const VERSION: u32 = 1;

/// `stats.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Index {
    /// [`FORMAT`].
    pub format: String,
    /// [`VERSION`].
    pub version: u32,
    /// Program and version that measured.
    pub tool: String,
    /// Name of the model's folder.
    pub model: String,
    /// Digest of the model's tensors.
    pub model_digest: String,
    /// What the model ran on: `cpu`, or `cuda` with the GPU's model. Its sums differ in their last bits from those of
    /// another device. Merged parts of several devices name them all; folders of earlier versions name none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Files, options and digests of the rows.
    pub corpus: Value,
    /// Whether whole second moments are there, or diagonals alone.
    pub full: bool,
    /// Slices of the corpus that were measured, first and one past the last.
    pub slices: [usize; 2],
    /// Whether sums are per slice and still to be merged.
    pub part: bool,
    /// One entry a block.
    pub blocks: Vec<BlockIndex>,
}

/// One block of the index.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct BlockIndex {
    /// Its file.
    pub file: String,
    /// Digest of the file.
    pub digest: String,
    /// Its inputs, in order.
    pub inputs: Vec<InputIndex>,
    /// Whether `keys` and `values` are there.
    pub keys_and_values: bool,
}

/// One input of a block.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InputIndex {
    /// Tensors it enters.
    pub tensors: Vec<String>,
    /// K.
    pub columns: usize,
    /// Rows seen; in a part, by slice.
    pub rows: Vec<u64>,
}

/// Writes a folder of statistics, block after block.
pub struct StatisticsWriter {
    staging: Staging,
    index: Index,
}

impl StatisticsWriter {
    /// Starts a folder. `index` says everything but the blocks.
    pub fn begin(target: &Path, force: bool, index: Index) -> Result<Self> {
        let staging = Staging::begin(target, force)?;
        Ok(Self { staging, index })
    }

    /// A folder to make scratch files in.
    pub fn scratch(&self) -> &Path {
        self.staging.folder()
    }

    /// Writes the next block: its statistics by slice for a part, in one otherwise.
    pub fn block(&mut self, slices: &[BlockStatistics]) -> Result<()> {
        let Some(first) = slices.first() else {
            return Ok(());
        };
        let name = format!("block-{:05}.safetensors", self.index.blocks.len());
        let mut tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
        for (i, input) in first.inputs.iter().enumerate() {
            let mut tops = vec![0f32; input.stats.columns()];
            for (s, slice) in slices.iter().enumerate() {
                let stats = &slice.inputs[i].stats;
                tops.iter_mut()
                    .zip(stats.absmax())
                    .for_each(|(a, b)| *a = a.max(*b));
                let sums = triangle(stats);
                if self.index.part {
                    let bytes = sums.iter().flat_map(|s| s.to_le_bytes()).collect();
                    let slice = self.index.slices[0] + s;
                    tensors.push((format!("{i}.moment.{slice}"), Dtype::F64, vec![sums.len()], bytes));
                } else {
                    tensors.push((
                        format!("{i}.moment"),
                        Dtype::F32,
                        vec![sums.len()],
                        f32_bytes(sums.iter().map(|s| *s as f32)),
                    ));
                }
            }
            tensors.push((
                format!("{i}.absmax"),
                Dtype::F32,
                vec![tops.len()],
                f32_bytes(tops),
            ));
        }
        let mut together = BlockStatistics::default();
        for slice in slices {
            let magnitudes = BlockStatistics {
                inputs: vec![],
                magnitudes: slice.magnitudes.clone(),
            };
            together.merge(&magnitudes).map_err(Error::Option)?;
        }
        if let Some(tops) = together.magnitudes {
            tensors.push((
                "keys".to_owned(),
                Dtype::F32,
                vec![tops.keys.len()],
                f32_bytes(tops.keys),
            ));
            tensors.push((
                "values".to_owned(),
                Dtype::F32,
                vec![tops.values.len()],
                f32_bytes(tops.values),
            ));
        }
        let views = tensors
            .iter()
            .map(|(name, dtype, shape, bytes)| {
                Ok((name.as_str(), TensorView::new(*dtype, shape.clone(), bytes)?))
            })
            .collect::<std::result::Result<Vec<_>, safetensors::SafeTensorError>>();
        let path = self.staging.folder().join(&name);
        let fault = |e: safetensors::SafeTensorError| Error::Statistics {
            path: path.clone(),
            reason: e.to_string(),
        };
        let bytes = safetensors::serialize(views.map_err(fault)?, None).map_err(fault)?;
        write_file(self.staging.folder(), &name, &bytes)?;
        self.index.blocks.push(BlockIndex {
            file: name,
            digest: format!("blake3:{}", blake3::hash(&bytes).to_hex()),
            inputs: (0..first.inputs.len())
                .map(|i| InputIndex {
                    tensors: first.inputs[i].tensors.clone(),
                    columns: first.inputs[i].stats.columns(),
                    rows: slices.iter().map(|s| s.inputs[i].stats.rows()).collect(),
                })
                .collect(),
            keys_and_values: first.magnitudes.is_some(),
        });
        Ok(())
    }

    /// Writes the index and moves the folder into place.
    pub fn finish(self) -> Result<Index> {
        let json = serde_json::to_string_pretty(&self.index).unwrap_or_default() + "\n";
        self.staging.write_file(INDEX_FILE, json.as_bytes())?;
        crate::interrupt::check()?;
        self.staging.commit()?;
        Ok(self.index)
    }
}

/// Sums as stored: the upper triangle row by row, or the diagonal.
fn triangle(stats: &LayerStats) -> Vec<f64> {
    match stats.moment() {
        Moment::Diagonal(sums) => sums.clone(),
        Moment::Full(sums) => {
            let k = stats.columns();
            (0..k)
                .flat_map(|r| sums[r * k + r..(r + 1) * k].iter().copied())
                .collect()
        }
    }
}

/// The whole matrix of a stored triangle.
fn mirror(triangle: &[f64], k: usize) -> Vec<f64> {
    let mut full = vec![0.0; k * k];
    let mut rest = triangle.iter();
    for r in 0..k {
        for c in r..k {
            let value = rest.next().copied().unwrap_or_default();
            full[r * k + c] = value;
            full[c * k + r] = value;
        }
    }
    full
}

fn f32_bytes(values: impl IntoIterator<Item = f32>) -> Vec<u8> {
    values.into_iter().flat_map(f32::to_le_bytes).collect()
}

/// An open folder of statistics.
pub struct Statistics {
    folder: PathBuf,
    index: Index,
    files: Vec<Checkpoint>,
    /// Tensor name to block and input.
    by_tensor: HashMap<String, (usize, usize)>,
}

impl Statistics {
    /// Whether `path` is such a folder.
    pub fn is_statistics(path: &Path) -> bool {
        path.join(INDEX_FILE).is_file()
    }

    /// Opens one. Fails when the index is damaged or a file is missing; tensors are checked when read.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = folder.join(INDEX_FILE);
        let index: Index = read_json(&path)?;
        let bad = |reason: String| {
            Err(Error::Statistics {
                path: path.clone(),
                reason,
            })
        };
        if index.format != FORMAT || index.version != VERSION {
            return bad(format!(
                "expected {FORMAT} version {VERSION}, got {} version {}; measure again with `qtool calibrate`",
                index.format, index.version
            ));
        }
        let mut by_tensor = HashMap::new();
        let mut files = Vec::new();
        for (b, block) in index.blocks.iter().enumerate() {
            if block.file.contains(['/', '\\']) {
                return bad(format!("{:?} is no name of a file in the folder", block.file));
            }
            files.push(Checkpoint::open(&folder.join(&block.file))?);
            for (i, input) in block.inputs.iter().enumerate() {
                let slices = if index.part {
                    index.slices[1].saturating_sub(index.slices[0])
                } else {
                    1
                };
                if input.rows.len() != slices {
                    return bad(format!(
                        "input {i} of block {b} has counts of {} slices, expected {slices}",
                        input.rows.len()
                    ));
                }
                by_tensor.extend(input.tensors.iter().map(|t| (t.clone(), (b, i))));
            }
        }
        Ok(Self {
            folder: folder.to_owned(),
            index,
            files,
            by_tensor,
        })
    }

    /// What it says of itself.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// Where the input of `tensor` is found: block and number.
    pub fn find(&self, tensor: &str) -> Option<(usize, usize)> {
        self.by_tensor.get(tensor).copied()
    }

    /// Reads one stored tensor of the block as numbers.
    fn numbers(&self, block: usize, name: &str, wide: bool) -> Result<Vec<f64>> {
        let view = self.files[block].tensor(name)?;
        if wide {
            let bytes = view.bytes();
            return Ok(bytes
                .as_chunks()
                .0
                .iter()
                .map(|b| f64::from_le_bytes(*b))
                .collect());
        }
        if view.float_dtype() != Some(FloatDtype::F32) {
            return Err(self.damaged(block, &format!("tensor {name} is {}, expected F32", view.dtype())));
        }
        Ok(FloatDtype::F32
            .widen(view.bytes())
            .into_iter()
            .map(f64::from)
            .collect())
    }

    fn damaged(&self, block: usize, reason: &str) -> Error {
        Error::Statistics {
            path: self.folder.join(&self.index.blocks[block].file),
            reason: format!("{reason}; measure again with `qtool calibrate`"),
        }
    }

    /// Statistics of input `input` of block `block`; of one slice, for a part.
    pub fn load(&self, block: usize, input: usize, slice: Option<usize>) -> Result<LayerStats> {
        let entry = &self.index.blocks[block].inputs[input];
        let k = entry.columns;
        let (name, at) = match slice {
            Some(s) => (format!("{input}.moment.{s}"), s - self.index.slices[0]),
            None => (format!("{input}.moment"), 0),
        };
        let sums = self.numbers(block, &name, slice.is_some())?;
        let expected = if self.index.full { k * (k + 1) / 2 } else { k };
        if sums.len() != expected {
            return Err(self.damaged(
                block,
                &format!("tensor {name} has {} numbers, expected {expected}", sums.len()),
            ));
        }
        let moment = if self.index.full {
            Moment::Full(mirror(&sums, k))
        } else {
            Moment::Diagonal(sums)
        };
        let tops = self.numbers(block, &format!("{input}.absmax"), false)?;
        LayerStats::new(
            k,
            entry.rows[at],
            moment,
            tops.into_iter().map(|t| t as f32).collect(),
        )
        .map_err(|e| self.damaged(block, &e.to_string()))
    }

    /// The whole block, of one slice for a part.
    pub fn block(&self, block: usize, slice: Option<usize>) -> Result<BlockStatistics> {
        let entry = &self.index.blocks[block];
        let inputs = entry.inputs.iter().enumerate().map(|(i, input)| {
            Ok(Input {
                tensors: input.tensors.clone(),
                stats: self.load(block, i, slice)?,
            })
        });
        let inputs = inputs.collect::<Result<_>>()?;
        Ok(BlockStatistics {
            inputs,
            magnitudes: self.magnitudes(block)?,
        })
    }

    /// Largest magnitudes of the block's keys and values.
    pub fn magnitudes(&self, block: usize) -> Result<Option<KeyValueMagnitudes>> {
        if !self.index.blocks.get(block).is_some_and(|b| b.keys_and_values) {
            return Ok(None);
        }
        let read = |name| -> Result<Vec<f32>> {
            Ok(self
                .numbers(block, name, false)?
                .into_iter()
                .map(|v| v as f32)
                .collect())
        };
        Ok(Some(KeyValueMagnitudes {
            keys: read("keys")?,
            values: read("values")?,
        }))
    }

    /// Checks the digest of every file.
    pub fn verify(&self) -> Result<()> {
        for (b, block) in self.index.blocks.iter().enumerate() {
            let path = self.folder.join(&block.file);
            let bytes = std::fs::read(&path).map_err(FormatError::io(&path, "read"))?;
            if format!("blake3:{}", blake3::hash(&bytes).to_hex()) != block.digest {
                return Err(self.damaged(b, "its bytes are not those that were written"));
            }
        }
        Ok(())
    }
}

/// Merges parts, in the order of their slices, into the folder a single run would have made.
///
/// Fails when parts are missing, measured twice, or are of different models, texts or options.
pub fn merge(parts: &[PathBuf], target: &Path, force: bool) -> Result<Index> {
    let mut open = parts
        .iter()
        .map(|p| Statistics::open(p))
        .collect::<Result<Vec<_>>>()?;
    open.sort_by_key(|s| s.index.slices);
    let Some(first) = open.first() else {
        return Err(Error::Statistics {
            path: target.to_owned(),
            reason: "no parts were given".to_owned(),
        });
    };
    let mut expected = 0;
    for part in &open {
        part.verify()?;
        let bad = |reason: String| {
            Err(Error::Statistics {
                path: part.folder.clone(),
                reason,
            })
        };
        if !part.index.part {
            return bad("is whole already, expected a part made with `calibrate --shard`".to_owned());
        }
        if part.index.slices[0] != expected {
            return bad(format!(
                "begins at slice {}, expected {expected}: a part is missing or given twice",
                part.index.slices[0]
            ));
        }
        expected = part.index.slices[1];
        let identity = |i: &Index| (i.model_digest.clone(), i.corpus.clone(), i.full, i.blocks.len());
        if identity(&part.index) != identity(&first.index) {
            return bad(format!(
                "was measured on another model, text or with other options than {}",
                first.folder.display()
            ));
        }
    }
    if expected != super::corpus::SLICES {
        return Err(Error::Statistics {
            path: target.to_owned(),
            reason: format!(
                "the parts end at slice {expected} of {}: one is missing",
                super::corpus::SLICES
            ),
        });
    }
    let devices: BTreeSet<&str> = open
        .iter()
        .filter_map(|part| part.index.device.as_deref())
        .collect();
    let devices = Vec::from_iter(devices).join(", ");
    let index = Index {
        device: (!devices.is_empty()).then_some(devices),
        tool: TOOL.to_owned(),
        slices: [0, expected],
        part: false,
        blocks: Vec::new(),
        ..first.index.clone()
    };
    let mut writer = StatisticsWriter::begin(target, force, index)?;
    for block in 0..first.index.blocks.len() {
        crate::interrupt::check()?;
        let mut whole = BlockStatistics::default();
        for part in &open {
            for slice in part.index.slices[0]..part.index.slices[1] {
                whole
                    .merge(&part.block(block, Some(slice))?)
                    .map_err(Error::Option)?;
            }
        }
        writer.block(&[whole])?;
    }
    writer.finish()
}
