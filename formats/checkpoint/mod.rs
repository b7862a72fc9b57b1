//! A checkpoint: mapped safetensors files, their index, and the side files beside them.
//!
//! Opening reads headers only; tensor bytes are touched when a view of them is read. Nothing is
//! ever loaded as a whole.

pub mod header;
pub mod mmap;
pub mod naming;
pub mod shards;

use std::collections::HashMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use header::Entry;
use mmap::MappedFile;
pub use naming::{Naming, Orientation};
use shards::ShardList;

use crate::error::quoted;
use crate::shard_writer::{StoredTensor, header_of};
use crate::tensor::TensorView;
use crate::{FormatError, Result};

/// An open checkpoint.
#[derive(Debug)]
pub struct Checkpoint {
    root: PathBuf,
    folder: PathBuf,
    is_folder: bool,
    files: Vec<MappedFile>,
    entries: Vec<(usize, Entry)>,
    by_name: HashMap<String, usize>,
    naming: Naming,
}

impl Checkpoint {
    /// Opens a model folder or a single `.safetensors` file.
    ///
    /// Fails when a file is missing or malformed, when two files hold the same tensor, or when the
    /// index and the files disagree about what is where.
    pub fn open(path: &Path) -> Result<Self> {
        let list = ShardList::find(path)?;
        let mut files = Vec::new();
        let mut entries: Vec<(usize, Entry)> = Vec::new();
        let mut by_name: HashMap<String, usize> = HashMap::new();
        for file_path in &list.files {
            let file = MappedFile::open(file_path)?;
            for entry in header::parse(file_path, file.bytes())? {
                if by_name.insert(entry.name.clone(), entries.len()).is_some() {
                    return Err(FormatError::TensorEntry {
                        path: file_path.clone(),
                        tensor: entry.name,
                        reason: "another file of this checkpoint holds it too".to_owned(),
                    });
                }
                entries.push((files.len(), entry));
            }
            files.push(file);
        }
        let naming = Naming::of(entries.iter().map(|(_, e)| e.name.as_str()));
        let is_folder = path.is_dir();
        let this = Self {
            root: path.to_owned(),
            folder: list.folder,
            is_folder,
            files,
            entries,
            by_name,
            naming,
        };
        if let Some(index) = list.index {
            this.check_index(&index)?;
        }
        if this.entries.is_empty() {
            return Err(FormatError::Header {
                path: path.to_owned(),
                reason: "it holds no tensors; expected a model".to_owned(),
            });
        }
        Ok(this)
    }

    /// A file of another format, seen as a checkpoint: `entries` lie within it and have names of their own.
    pub(crate) fn of_entries(path: &Path, file: MappedFile, entries: Vec<Entry>) -> Self {
        let folder = path.parent().filter(|p| !p.as_os_str().is_empty());
        let by_name = entries
            .iter()
            .enumerate()
            .map(|(i, e)| (e.name.clone(), i))
            .collect();
        Self {
            root: path.to_owned(),
            folder: folder.unwrap_or(Path::new(".")).to_owned(),
            is_folder: false,
            files: vec![file],
            naming: Naming::of(entries.iter().map(|e| e.name.as_str())),
            entries: entries.into_iter().map(|entry| (0, entry)).collect(),
            by_name,
        }
    }

    fn check_index(&self, index: &std::collections::BTreeMap<String, String>) -> Result<()> {
        let index_path = self.folder.join(shards::INDEX_FILE);
        for (name, file) in index {
            let got = self.file_of(name);
            if got.as_deref() != Some(file) {
                let got = got.map_or_else(|| "in none of the files".to_owned(), |g| format!("in {g}"));
                return Err(FormatError::Index {
                    path: index_path,
                    reason: format!(
                        "tensor {} is expected in {file}, found {got}; index and shards are of different versions",
                        quoted(name)
                    ),
                });
            }
        }
        match self.entries.iter().find(|(_, e)| !index.contains_key(&e.name)) {
            Some((_, extra)) => Err(FormatError::Index {
                path: index_path,
                reason: format!(
                    "tensor {} is in a shard but not in weight_map; index and shards are of different versions",
                    extra.name
                ),
            }),
            None => Ok(()),
        }
    }

    /// The path it was opened with.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The folder with the side files (for a bare file: the folder it lies in).
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Name family, from the tensor names.
    pub fn naming(&self) -> Naming {
        self.naming
    }

    /// Tensor names in storage order: file by file, by offset.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.entries.iter().map(|(_, e)| e.name.as_str())
    }

    /// All tensors in storage order.
    pub fn tensors(&self) -> impl Iterator<Item = Result<TensorView<'_>>> {
        self.entries.iter().map(|(file, entry)| self.view(*file, entry))
    }

    /// The tensor of this name.
    pub fn tensor(&self, name: &str) -> Result<TensorView<'_>> {
        match self.by_name.get(name).and_then(|&i| self.entries.get(i)) {
            Some((file, entry)) => self.view(*file, entry),
            None => Err(FormatError::MissingTensor {
                path: self.root.clone(),
                tensor: name.to_owned(),
                advice: "`qtool inspect` lists what is there",
            }),
        }
    }

    /// Name of the file that holds this tensor, or `None` when there is no such tensor.
    pub fn file_of(&self, name: &str) -> Option<String> {
        let (file, _) = self.entries.get(*self.by_name.get(name)?)?;
        Some(file_name(self.files.get(*file)?.path()))
    }

    /// Bytes of all tensors together.
    pub fn tensor_bytes(&self) -> u64 {
        self.entries.iter().map(|(_, e)| e.range.len() as u64).sum()
    }

    /// Weight files whose header is another than the one [`shard_writer`](crate::shard_writer) gives these tensors: a byte
    /// of it was changed that its meaning to this reader does not depend on.
    pub fn foreign_headers(&self) -> Result<Vec<String>> {
        let mut foreign = Vec::new();
        for (index, file) in self.files.iter().enumerate() {
            let own = self.entries.iter().filter(|(of, _)| *of == index);
            let mut entries: Vec<&Entry> = own.map(|(_, entry)| entry).collect();
            entries.sort_by_key(|entry| entry.range.start);
            let tensor = |entry: &Entry| StoredTensor {
                name: entry.name.clone(),
                dtype: entry.dtype,
                shape: entry.shape.clone(),
                bytes: entry.range.len() as u64,
                group: 0,
            };
            let tensors: Vec<StoredTensor> = entries.into_iter().map(tensor).collect();
            if !file.bytes().starts_with(&header_of(file.path(), &tensors)?) {
                foreign.push(file_name(file.path()));
            }
        }
        Ok(foreign)
    }

    /// Names and sizes in bytes of the weight files.
    pub fn files(&self) -> impl ExactSizeIterator<Item = (String, u64)> {
        self.files
            .iter()
            .map(|f| (file_name(f.path()), f.bytes().len() as u64))
    }

    /// Reads these bytes of a tensor ahead, see [`MappedFile::read_ahead`]. A range that reaches beyond
    /// the tensor is cut.
    pub fn read_ahead(&self, name: &str, bytes: Range<usize>) {
        if let Some((file, entry)) = self.by_name.get(name).and_then(|&i| self.entries.get(i))
            && let Some(file) = self.files.get(*file)
        {
            let end = bytes.end.min(entry.range.len());
            let len = end.saturating_sub(bytes.start);
            file.read_ahead(entry.range.start.saturating_add(bytes.start), len);
        }
    }

    /// Fails when any weight file changed since opening.
    pub fn check_unchanged(&self) -> Result<()> {
        self.files.iter().try_for_each(MappedFile::check_unchanged)
    }

    /// Everything beside the weights that belongs to the model: tokenizer, generation config,
    /// licence, remote code. Plain files of the folder, sorted by name, without weights in any
    /// format, indexes, hidden files, names with control characters, and manifests of qtool. Empty
    /// for a bare file.
    pub fn side_files(&self) -> Result<Vec<PathBuf>> {
        if !self.is_folder {
            return Ok(Vec::new());
        }
        let mut files = Vec::new();
        let listing = fs::read_dir(&self.folder).map_err(FormatError::io(&self.folder, "list"))?;
        for item in listing {
            let path = item.map_err(FormatError::io(&self.folder, "list"))?.path();
            if path.is_file() && is_side_file(&file_name(&path)) {
                files.push(path);
            }
        }
        files.sort();
        Ok(files)
    }

    fn view<'a>(&'a self, file: usize, entry: &'a Entry) -> Result<TensorView<'a>> {
        let file = self.files.get(file);
        let bytes = file
            .and_then(|f| f.bytes().get(entry.range.clone()))
            .unwrap_or_default();
        let path = file.map_or(self.root.as_path(), MappedFile::path);
        TensorView::new(path, &entry.name, entry.dtype, &entry.shape, bytes)
    }
}

/// Endings of files that hold weights, in any ecosystem.
const WEIGHT_ENDINGS: [&str; 10] = [
    ".safetensors",
    ".index.json",
    ".bin",
    ".pt",
    ".pth",
    ".gguf",
    ".pdparams",
    ".h5",
    ".msgpack",
    ".onnx",
];

fn is_side_file(name: &str) -> bool {
    !name.starts_with('.')
        && shards::is_plain_name(name)
        && !WEIGHT_ENDINGS.iter().any(|ending| name.ends_with(ending))
        && ![crate::artifact::MANIFEST_FILE, crate::export::PROVENANCE_FILE].contains(&name)
}

/// The last component of a path as text.
pub(crate) fn file_name(path: &Path) -> String {
    path.file_name()
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default()
}
