//! Makes small checkpoints and artifacts, whole ones and broken ones. Asserts nothing about them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use qtool_formats::artifact::manifest::{Manifest, QuantizedRecord, SourceRecord, Totals};
use qtool_formats::artifact::{self, Figures, PartRecord, Stored, TensorRecord};
use qtool_formats::checkpoint::{Naming, Orientation};
use qtool_formats::dtype::Dtype;
use qtool_formats::packing::{LSB_ROWS, Packing};
use qtool_formats::scheme::{AffineScheme, Family};
use qtool_formats::shard_writer::{ShardWriter, StoredTensor, digest_text};
use qtool_formats::weight::{AffineWeight, QuantizedWeight};
use serde_json::Value;

/// A safetensors file with this header text and so many zero bytes of data.
pub fn file(header: impl AsRef<[u8]>, data: usize) -> Vec<u8> {
    let header = header.as_ref();
    claimed(header.len() as u64, header, data)
}

/// The same with any claim about the header's length.
pub fn claimed(length: u64, header: &[u8], data: usize) -> Vec<u8> {
    let mut bytes = length.to_le_bytes().to_vec();
    bytes.extend_from_slice(header);
    bytes.resize(bytes.len() + data, 0);
    bytes
}

/// One header entry: `"name":{...}`. The name is put in as it is, unescaped.
pub fn entry(name: &str, dtype: &str, shape: &str, from: u64, to: u64) -> String {
    format!(r#""{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}"#)
}

/// A header of these entries.
pub fn header(entries: &[String]) -> String {
    format!("{{{}}}", entries.join(","))
}

/// A whole, valid file of three tensors and 34 bytes of data that are all different.
pub fn good_file() -> Vec<u8> {
    let entries = [
        r#""__metadata__":{"format":"pt"}"#.to_owned(),
        entry("m.a", "BF16", "[3,4]", 0, 24),
        entry("m.c", "U8", "[2]", 32, 34),
        entry("m.b", "F32", "[2,1]", 24, 32),
    ];
    let mut bytes = file(header(&entries), 0);
    bytes.extend(1..=34u8);
    bytes
}

/// A file of one tensor of this name, two BF16 values.
pub fn one_tensor(name: &str) -> Vec<u8> {
    file(header(&[entry(name, "BF16", "[1,2]", 0, 4)]), 4)
}

/// A folder with these files.
pub fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a temporary folder");
    for (name, bytes) in files {
        fs::write(dir.path().join(name), bytes).expect("a small file");
    }
    dir
}

/// A good weight of `rows` x `columns` in this scheme, with codes and scales that vary.
fn weight(scheme: &str, rows: usize, columns: usize) -> QuantizedWeight {
    let scheme = AffineScheme::parse(scheme).expect("a scheme");
    let groups = rows * scheme.groups(rows, columns).expect("a fitting shape");
    let (low, high) = scheme.code_range();
    let span = usize::from(high - low) + 1;
    let codes = (0..rows * columns).map(|i| low + (i * 7 % span) as u8).collect();
    let scales = (0..groups).map(|g| 0.25 * (g + 1) as f32).collect();
    let zeros = match scheme.fixed_zero() {
        Some(_) => Vec::new(),
        None => vec![low + 1; groups],
    };
    QuantizedWeight::Affine(
        AffineWeight::new(scheme, rows, columns, codes, scales, zeros).expect("a good weight"),
    )
}

/// Writes a small artifact into `folder`: a 4-bit weight with zero points, an INT8 weight that is
/// the transpose of its source, and a kept vector.
pub fn write_artifact(folder: &Path) {
    let figures = Figures::new(&Default::default(), &[1; 256], (0, 15), 4.0);
    let mut stored = Vec::new();
    let mut bytes = Vec::new();
    let mut tensors = Vec::new();
    for (name, scheme, rows, columns, orientation) in [
        ("w.four", "w4-zp-g16-f16", 2, 32, Orientation::OutIn),
        ("w.eight", "w8-sym-row-bf16", 3, 8, Orientation::InOut),
    ] {
        let weight = weight(scheme, rows, columns);
        let parts = weight.scheme().parts(rows, columns).expect("a fitting shape");
        let encoded = weight
            .encode(&|bits, k, codes, out| LSB_ROWS.pack(bits, k, codes, out))
            .expect("a good weight");
        let mut records = Vec::new();
        for (part, part_bytes) in parts.iter().zip(encoded) {
            let mut hasher = blake3::Hasher::new();
            hasher.update(&part_bytes);
            let record = PartRecord::new(
                Family::Own,
                name,
                part,
                "model.safetensors".to_owned(),
                digest_text(&hasher),
            );
            stored.push(StoredTensor {
                name: record.tensor.clone(),
                dtype: part.dtype,
                shape: part.shape.to_vec(),
                bytes: part.bytes() as u64,
                group: tensors.len(),
            });
            records.push(record);
            bytes.push(part_bytes);
        }
        let shape = match orientation {
            Orientation::OutIn => vec![rows, columns],
            Orientation::InOut => vec![columns, rows],
        };
        tensors.push(record(
            name,
            shape,
            Dtype::BF16,
            Stored::Quantized(QuantizedRecord {
                scheme: weight.scheme(),
                method: "absmax".to_owned(),
                rows,
                columns,
                orientation,
                parts: records,
                proxy_error: None,
                figures: figures.clone(),
                faults: Vec::new(),
            }),
            &[],
        ));
    }
    stored.push(StoredTensor {
        name: "norm".to_owned(),
        dtype: Dtype::F32,
        shape: vec![4],
        bytes: 16,
        group: tensors.len(),
    });
    let norm = vec![7; 16];
    let kept = Stored::Kept {
        reason: "a vector".to_owned(),
        file: "model.safetensors".to_owned(),
        digest: None,
    };
    tensors.push(record("norm", vec![4], Dtype::F32, kept, &norm));
    bytes.push(norm);

    let mut writer = ShardWriter::create(folder, stored, u64::MAX).expect("a layout");
    for (index, bytes) in bytes.iter().enumerate() {
        writer.append(index, bytes).expect("room for a small file");
    }
    let written = writer.finish().expect("all bytes given");
    let files = written
        .files
        .into_iter()
        .map(|(name, bytes)| artifact::FileRecord {
            name,
            bytes,
            digest: None,
        });
    let mut manifest = Manifest {
        format: artifact::FORMAT.to_owned(),
        version: artifact::FORMAT_VERSION,
        tool: "test".to_owned(),
        source: SourceRecord {
            name: "made".to_owned(),
            naming: Naming::Hf,
            tensor_bytes: 0,
            files: Vec::new(),
            dropped: Vec::new(),
        },
        options: Value::Null,
        transform: None,
        family: Family::Own,
        layouts: BTreeMap::new(),
        schemes: BTreeMap::new(),
        totals: Totals::default(),
        tensors,
        files: files.collect(),
    };
    manifest.describe(|_| 0);
    fs::write(folder.join(artifact::MANIFEST_FILE), manifest.to_json()).expect("a small file");
}

/// Its source is stated to have been `source`.
fn record(name: &str, shape: Vec<usize>, dtype: Dtype, stored: Stored, source: &[u8]) -> TensorRecord {
    TensorRecord {
        name: name.to_owned(),
        shape,
        dtype,
        source_digest: Some(digest_text(blake3::Hasher::new().update(source))),
        sources: Vec::new(),
        stored,
    }
}

/// A small artifact in a folder of its own.
pub fn artifact() -> tempfile::TempDir {
    let dir = folder(&[]);
    write_artifact(dir.path());
    dir
}

/// The artifact's manifest as a JSON value.
pub fn manifest_of(folder: &Path) -> Value {
    let text = fs::read(folder.join(artifact::MANIFEST_FILE)).expect("a manifest");
    serde_json::from_slice(&text).expect("JSON")
}

/// Writes `manifest` in place of the artifact's own.
pub fn set_manifest(folder: &Path, manifest: &Value) {
    fs::write(folder.join(artifact::MANIFEST_FILE), manifest.to_string()).expect("a small file");
}

/// Overwrites the first bytes of a stored tensor of the artifact.
pub fn poke(folder: &Path, tensor: &str, bytes: &[u8]) {
    let path: PathBuf = folder.join("model.safetensors");
    let mut all = fs::read(&path).expect("the artifact's file");
    let entries = qtool_formats::checkpoint::header::parse(&path, &all).expect("a good header");
    let at = entries
        .iter()
        .find(|e| e.name == tensor)
        .expect("the tensor")
        .range
        .start;
    all[at..at + bytes.len()].copy_from_slice(bytes);
    fs::write(&path, all).expect("a small file");
}
