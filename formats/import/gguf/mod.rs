//! GGUF files, or folders with one: llama.cpp's models, with blocks of GGML, the model's dimensions and its tokenizer in
//! one file. `header` has the container, `blocks` and `kquant` the codes, `model` what makes a checkpoint of it: names, the config, and
//! which rows lie in another order; `bert` and `experts` are that of encoders and of routed experts.

mod bert;
pub mod blocks;
mod experts;
pub mod header;
mod kquant;
pub mod model;

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use self::blocks::Type;
use self::header::{Head, Info, Metadata, parse};
use self::model::{config, halves};
use super::{Coded, Decoded, Foreign, Place, Reader, Tensor};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::header::Entry;
use crate::checkpoint::mmap::MappedFile;
use crate::checkpoint::shards::{INDEX_FILE, SINGLE_FILE};
use crate::dtype::Dtype;
use crate::tensor::byte_len;
use crate::{FormatError, Result};

/// The reader's only value.
pub const GGUF: Gguf = Gguf;

/// See the module's text.
#[derive(Debug, Clone, Copy)]
pub struct Gguf;

/// The GGUF file that `path` is, or that lies in it where no safetensors do. Fails when there are several.
pub fn file_of(path: &Path) -> Result<Option<PathBuf>> {
    let named = |path: &Path| path.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf"));
    if path.is_file() {
        let mut magic = [0u8; 4];
        let read = fs::File::open(path).and_then(|mut file| file.read_exact(&mut magic));
        return Ok((named(path) || (read.is_ok() && magic == *b"GGUF")).then(|| path.to_owned()));
    }
    if !path.is_dir() || path.join(SINGLE_FILE).is_file() || path.join(INDEX_FILE).is_file() {
        return Ok(None);
    }
    let mut found = Vec::new();
    for item in fs::read_dir(path).map_err(FormatError::io(path, "list"))? {
        let item = item.map_err(FormatError::io(path, "list"))?.path();
        if item.is_file() && named(&item) {
            found.push(item);
        }
    }
    found.sort();
    match found.as_slice() {
        [] => Ok(None),
        [one] => Ok(Some(one.clone())),
        [first, ..] => Err(FormatError::Gguf {
            path: path.to_owned(),
            reason: format!(
                "holds {} GGUF files; name one of them, such as {}",
                found.len(),
                first.display()
            ),
        }),
    }
}

/// The metadata of a GGUF file.
pub fn metadata(path: &Path) -> Result<Metadata> {
    let file = MappedFile::open(path)?;
    Ok(parse(path, file.bytes())?.metadata)
}

impl Reader for Gguf {
    fn name(&self) -> &'static str {
        "gguf"
    }

    fn summary(&self) -> &'static str {
        "files of llama.cpp: F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K to Q6_K, IQ4_NL"
    }

    fn claims(&self, place: &Place) -> bool {
        place.gguf.is_some()
    }

    fn open(&self, place: &Place) -> Result<Foreign> {
        let path = place.gguf.as_deref().unwrap_or(&place.path);
        let file = MappedFile::open(path)?;
        let head = parse(path, file.bytes())?;
        refuse_parts(path, &head.metadata)?;
        let about = config(path, &head)?;
        let stored = about.tensors(path, &head)?;
        let tensors = stored
            .iter()
            .filter(|info| info.name != model::ROPE_FACTORS)
            .map(|info| tensor(info, &about))
            .collect();
        let entries = stored.iter().map(entry).collect();
        let files = Checkpoint::of_entries(path, file, entries);
        Foreign::new(self.name(), about.config, files, tensors)
    }
}

/// One of several files of a model.
fn refuse_parts(path: &Path, metadata: &Metadata) -> Result<()> {
    match metadata.count("split.count") {
        Some(count) if count > 1 => Err(FormatError::Gguf {
            path: path.to_owned(),
            reason: format!("it is one of {count} parts of a model; join them with llama-gguf-split --merge"),
        }),
        _ => Ok(()),
    }
}

/// A tensor as it lies: floats by their type, blocks as rows of bytes.
fn entry(info: &Info) -> Entry {
    let (dtype, shape) = match info.kind {
        Type::Float(dtype) => (dtype.dtype(), info.shape.clone()),
        Type::Blocks(_) => {
            let mut shape = info.shape.clone();
            if let Some(last) = shape.last_mut() {
                *last = info.kind.row_bytes(*last).unwrap_or(0);
            }
            (Dtype::U8, shape)
        }
    };
    debug_assert_eq!(byte_len(dtype, &shape), Some(info.range.len()));
    Entry {
        name: info.name.clone(),
        dtype,
        shape,
        range: info.range.clone(),
    }
}

/// How a tensor that is no plain elements in their own order lies.
#[derive(Debug)]
struct Stored {
    name: String,
    kind: Type,
    n: usize,
    k: usize,
    /// Rows of a head whose pairs become halves again.
    paired: Option<usize>,
}

fn tensor(info: &Info, about: &model::Model) -> Tensor {
    let name = about
        .checkpoint_name(&info.name)
        .unwrap_or_else(|| info.name.clone());
    let paired = about.paired(&info.name, &info.shape);
    let plain = matches!(info.kind, Type::Float(_)) && paired.is_none();
    let (rows, k) = match info.shape.as_slice() {
        // A bias: rows of one element each.
        [rows] if paired.is_some() => (*rows, 1),
        shape => {
            let k = shape.last().copied().unwrap_or(1).max(1);
            (shape.iter().product::<usize>() / k, k)
        }
    };
    Tensor {
        name,
        shape: info.shape.clone(),
        stored_as: info.kind.name().to_owned(),
        parts: vec![info.name.clone()],
        coded: (!plain).then(|| -> Box<dyn Coded> {
            Box::new(Stored {
                name: info.name.clone(),
                kind: info.kind,
                n: rows,
                k,
                paired,
            })
        }),
    }
}

impl Coded for Stored {
    fn decode(&self, files: &Checkpoint) -> Result<Decoded> {
        let view = files.tensor(&self.name)?;
        let row = self.kind.row_bytes(self.k).unwrap_or(0);
        let turned = self.paired.map(|head| halves(view.bytes(), row, head));
        let bytes = turned.as_deref().unwrap_or(view.bytes());
        match self.kind {
            Type::Float(dtype) => Ok(Decoded::Floats {
                dtype,
                bytes: bytes.to_vec(),
            }),
            Type::Blocks(kind) => kind.decode(self.n, self.k, bytes).map_err(|error| match error {
                FormatError::Weight { what, expected, got } => FormatError::TensorEntry {
                    path: files.root().to_owned(),
                    tensor: self.name.clone(),
                    reason: format!("{what}: expected {expected}, got {got}"),
                },
                other => other,
            }),
        }
    }
}

/// What a head says of a whole file, for tests of the parser.
pub fn head(path: &Path, bytes: &[u8]) -> Result<Head> {
    parse(path, bytes)
}
