//! GGUF files: blocks against ggml's and gguf-py's decoding, a model that llama.cpp quantized against llama.cpp's logits and
//! tokens, our own exports read back, and files that lie.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qtool::model::{Batch, Model};
use qtool::source::Source;
use qtool::tokenizer::Tokenizer;
use qtool::{inspect, verify};
use qtool_formats::artifact::{Artifact, Stored};
use qtool_formats::export::find;
use qtool_formats::import::gguf::blocks::Type;
use qtool_formats::import::gguf::header::parse;
use qtool_formats::import::gguf::model::checkpoint_name;
use qtool_formats::import::{self, Decoded};
use qtool_formats::{FloatDtype, QuantizedWeight};
use qtool_kernels::{Backend, CpuBackend, Isa};
use serde_json::json;

use super::values_of;
use crate::flow::{quantize, with_recipe};
use crate::model::{Tensor, read_model, sample};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/imports/gguf")
        .join(name)
}

fn tensors(name: &str) -> BTreeMap<String, Tensor> {
    read_model(&golden(name)).into_iter().collect()
}

fn integers(tensor: &Tensor) -> Vec<u32> {
    tensor
        .bytes
        .as_chunks()
        .0
        .iter()
        .map(|b| u32::from_le_bytes(*b))
        .collect()
}

#[test]
fn every_type_decodes_as_ggml_does() {
    let all = tensors("blocks.safetensors");
    let mut names = Vec::new();
    for number in 0..64 {
        let Some(Type::Blocks(kind)) = Type::of(number) else {
            continue;
        };
        let name = Type::Blocks(kind).name();
        let (blocks, values) = (&all[&format!("{name}/blocks")], &all[&format!("{name}/values")]);
        let (n, k) = (values.shape[0], values.shape[1]);
        assert_eq!(Type::Blocks(kind).row_bytes(k), Some(blocks.shape[1]), "{name}");
        let (ours, packed) = match kind.decode(n, k, &blocks.bytes).unwrap() {
            Decoded::Weight(weight) => (values_of(&weight), true),
            Decoded::Floats { dtype, bytes } => (dtype.widen(&bytes), false),
        };
        assert_eq!(
            packed,
            ["Q4_0", "Q5_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q6_K"].contains(&name),
            "{name}"
        );
        assert_eq!(ours, FloatDtype::F32.widen(&values.bytes), "{name}");
        names.push(name);
    }
    assert_eq!(names.len(), 11, "{names:?}");
    assert_eq!(all.len(), 22);
}

/// Rows of a head in pairs, as halves again.
fn halves(values: &[f32], k: usize, head: usize) -> Vec<f32> {
    let row = |r: usize| &values[r * k..(r + 1) * k];
    let rows = values.len() / k;
    let from = |r: usize| r / head * head + 2 * (r % head % (head / 2)) + r % head / (head / 2);
    (0..rows).flat_map(|r| row(from(r)).to_vec()).collect()
}

#[test]
fn a_model_of_llama_cpp_is_read() {
    let path = golden("model.gguf");
    let model = import::open(&path).unwrap().unwrap();
    let mut compared = 0;
    for (key, theirs) in tensors("model.safetensors") {
        let Some(name) = key.strip_prefix("values/") else {
            continue;
        };
        let tensor = model.tensor(&checkpoint_name(name).unwrap()).unwrap();
        assert_eq!(tensor.shape[1..], theirs.shape[1..], "{name}");
        let theirs = FloatDtype::F32.widen(&theirs.bytes);
        let expected = match name {
            "blk.0.attn_q.weight" | "blk.0.attn_k.weight" => halves(&theirs, 256, 64),
            _ => theirs,
        };
        assert_eq!(
            model.values(tensor).unwrap()[..expected.len()],
            expected,
            "{name}"
        );
        compared += 1;
    }
    assert_eq!((compared, model.tensors().len()), (11, 11));
    let config = model.config();
    assert_eq!(config["model_type"], json!("llama"));
    assert_eq!(
        (&config["vocab_size"], &config["tie_word_embeddings"]),
        (&json!(320), &json!(true))
    );
    assert_eq!(config["eos_token_id"], json!([2]));
    let found = verify::run(&path, None, false).unwrap();
    assert_eq!((found.findings, found.notes), (vec![], vec![]));
    let lines = inspect::open(&path).unwrap().lines().unwrap();
    let q4_k = lines.iter().filter(|line| line.stored_as == "Q4_K").count();
    assert!(
        q4_k >= 3 && lines.iter().any(|line| line.stored_as == "Q6_K"),
        "{lines:?}"
    );
}

#[test]
fn logits_are_those_of_llama_cpp() {
    let all = tensors("model.safetensors");
    let model = Model::open(
        CpuBackend::new(Isa::best()),
        Arc::new(Source::open(&golden("model.gguf")).unwrap()),
    );
    let model = model.unwrap().load().unwrap();
    let got = model.forward(&Batch::at(&integers(&all["ids"]), 0)).unwrap();
    let got = model.backend().download(&got);
    let theirs = FloatDtype::F32.widen(&all["logits"].bytes);
    assert_eq!(got.len(), theirs.len());
    let most = got
        .iter()
        .zip(&theirs)
        .map(|(a, b)| (a - b).abs())
        .fold(0f32, f32::max);
    // llama.cpp keeps keys and values as F16.
    assert!(most < 0.02, "logits differ by {most}");
}

#[test]
fn embedded_tokenizers_cut_as_llama_cpp_does() {
    for name in ["model", "pieces"] {
        let all = tensors(&format!("{name}.safetensors"));
        let text = String::from_utf8(all["text"].bytes.clone()).unwrap();
        let tokenizer = Tokenizer::open(&golden(&format!("{name}.gguf"))).unwrap();
        assert_eq!(
            tokenizer.encode(&text, true).unwrap(),
            integers(&all["tokens"]),
            "{name}"
        );
        let ids = tokenizer.encode(&text, false).unwrap();
        assert_eq!(
            tokenizer.decode(&ids, true).unwrap().trim_start(),
            text.trim_start(),
            "{name}"
        );
        assert_eq!(
            (tokenizer.ids().bos, tokenizer.ids().eos),
            (Some(1), Some(2)),
            "{name}"
        );
    }
    let tokenizer = Tokenizer::open(&golden("model.gguf")).unwrap();
    let said = tokenizer
        .chat(&json!([{"role": "user", "content": "hello"}]), false)
        .unwrap();
    assert_eq!(said, "user: hello</s>");
}

/// What is exported to GGUF is read back: codes and scales of quantized weights, values of all others, the tokenizer.
#[test]
fn our_exports_are_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let base = sample("tiny-ernie45");
    let mut compared = 0;
    let recipes = [
        "bits:8,scale:f16",
        "bits:4,group:32,scale:f16",
        "bits:4,group:32,grid:zp,scale:f16,scale-bits:7",
    ];
    for (i, recipe) in recipes.iter().enumerate() {
        let (folder, out) = (dir.path().join(format!("a{i}")), dir.path().join(format!("g{i}")));
        quantize(&base, &with_recipe(&folder, recipe, &[], &[]));
        qtool::export::run(&folder, find("gguf").unwrap(), &out, false, 5_000_000_000, false).unwrap();
        let (artifact, model) = (
            Artifact::open(&folder).unwrap(),
            import::open(&out).unwrap().unwrap(),
        );
        for record in &artifact.manifest().tensors {
            let tensor = model.tensor(&record.name).unwrap();
            assert_eq!(tensor.shape, record.shape, "{}", record.name);
            let expected = match &record.stored {
                Stored::Quantized(q) => {
                    let weight = artifact.weight_rows(q, 0, q.rows).unwrap();
                    let Some(Decoded::Weight(QuantizedWeight::Affine(read))) = model.decode(tensor).unwrap()
                    else {
                        panic!("{} is packed", record.name)
                    };
                    assert_eq!(read.codes(), weight.codes(), "{}", record.name);
                    assert_eq!(read.zeros().is_empty(), !recipe.contains("zp"), "{}", record.name);
                    values_of(&weight)
                }
                Stored::Kept { .. } => {
                    let view = artifact.stored(&record.name).unwrap();
                    view.float_dtype().unwrap().widen(view.bytes())
                }
            };
            assert_eq!(model.values(tensor).unwrap(), expected, "{}", record.name);
            compared += 1;
        }
        let found = verify::run(&out, Some(&base), false).unwrap();
        assert_eq!((found.findings, found.notes), (vec![], vec![]), "{recipe}");
        let (ours, theirs) = (Tokenizer::open(&out).unwrap(), Tokenizer::open(&base).unwrap());
        for text in ["The scale of a group.", "层 12345 it's  two\n\n"] {
            assert_eq!(
                ours.encode(text, false).unwrap(),
                theirs.encode(text, false).unwrap()
            );
        }
    }
    assert!(compared > 120, "{compared}");
}

/// Where the numbers of the head of `model.gguf` stand, and lies in their place.
#[test]
fn each_lie_gets_its_sentence() {
    let path = Path::new("m.gguf");
    let file = fs::read(golden("model.gguf")).unwrap();
    let head = parse(path, &file).unwrap();
    assert_eq!(head.tensors.len(), 11);
    let at = |needle: &[u8]| file.windows(needle.len()).position(|w| w == needle).unwrap();
    // A tensor's name is followed by dimensions (u32), sizes (u64 each), type (u32) and offset (u64).
    let name = at(b"blk.0.ffn_up.weight") + "blk.0.ffn_up.weight".len();
    let architecture = at(b"general.architecture");
    let lies: Vec<(&str, usize, Vec<u8>)> = vec![
        ("does not begin with GGUF", 0, b"GGML".to_vec()),
        ("of version 1, expected 2 or 3", 4, 1u32.to_le_bytes().to_vec()),
        ("big-endian", 4, 3u32.to_be_bytes().to_vec()),
        (
            "claims 18446744073709551615 tensors",
            8,
            u64::MAX.to_le_bytes().to_vec(),
        ),
        (
            "claims 1099511627776 keys",
            16,
            (1u64 << 40).to_le_bytes().to_vec(),
        ),
        ("bytes of a key", 24, u64::MAX.to_le_bytes().to_vec()),
        (
            "which GGUF does not have",
            architecture + 20,
            77u32.to_le_bytes().to_vec(),
        ),
        ("9 dimensions; expected 1 to 4", name, 9u32.to_le_bytes().to_vec()),
        ("0 dimensions; expected 1 to 4", name, 0u32.to_le_bytes().to_vec()),
        ("or its size overflows", name + 4, u64::MAX.to_le_bytes().to_vec()),
        (
            "no whole number of Q4_K's blocks",
            name + 4,
            255u64.to_le_bytes().to_vec(),
        ),
        ("or its size overflows", name + 4, 0u64.to_le_bytes().to_vec()),
        (
            "GGML's type 99, which is not read; those read are F32",
            name + 20,
            99u32.to_le_bytes().to_vec(),
        ),
        (
            "at a multiple of 32, got offset 7",
            name + 24,
            7u64.to_le_bytes().to_vec(),
        ),
        ("it is cut off", name + 24, (1u64 << 40).to_le_bytes().to_vec()),
        ("the offset", name + 24, (u64::MAX - 31).to_le_bytes().to_vec()),
        ("within another tensor's", name + 24, 32u64.to_le_bytes().to_vec()),
    ];
    let count = lies.len();
    for (expected, at, bytes) in lies {
        let mut lie = file.clone();
        lie[at..at + bytes.len()].copy_from_slice(&bytes);
        let message = parse(path, &lie).unwrap_err().to_string();
        assert!(message.contains(expected), "{expected}: {message}");
        assert!(
            message.starts_with("m.gguf: ") && message.lines().count() == 1,
            "{message}"
        );
    }
    assert_eq!(count, 17);
    // Cut anywhere, it is refused and nothing panics.
    for cut in (0..file.len()).step_by(97).chain([file.len() - 1]) {
        let message = parse(path, &file[..cut]).unwrap_err().to_string();
        assert!(message.starts_with("m.gguf: "), "{cut}: {message}");
    }
    // Every byte of the head changed: whatever comes of it, no panic.
    let data = head.tensors[0].range.start;
    for at in (0..data).step_by(3) {
        let mut lie = file[..].to_vec();
        lie[at] ^= 0xff;
        let _ = parse(path, &lie);
    }
}

#[test]
fn wrong_numbers_and_folders_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let file = fs::read(golden("model.gguf")).unwrap();
    let head = parse(Path::new("m"), &file).unwrap();
    let up = head
        .tensors
        .iter()
        .find(|t| t.name == "blk.0.ffn_up.weight")
        .unwrap();
    let mut bad = file.clone();
    bad[up.range.start..up.range.start + 2].copy_from_slice(&half::f16::INFINITY.to_le_bytes());
    let path = dir.path().join("bad.gguf");
    fs::write(&path, &bad).unwrap();
    let found = verify::run(&path, None, false).unwrap();
    let problems: Vec<&str> = found.findings.iter().map(|f| f.problem.as_str()).collect();
    assert!(
        problems[0].contains("scale of a block: expected a finite number, got inf"),
        "{problems:?}"
    );

    let mut renamed = file.clone();
    let norm = file.windows(18).position(|w| w == b"output_norm.weight").unwrap();
    renamed[norm..norm + 18].copy_from_slice(b"output_gone.weight");
    fs::write(&path, &renamed).unwrap();
    let found = verify::run(&path, None, false).unwrap();
    assert!(
        found.findings[0].problem.contains("model.norm.weight is missing"),
        "{:?}",
        found.findings
    );

    fs::write(dir.path().join("other.gguf"), &file).unwrap();
    let message = Source::open(dir.path()).map(|_| ()).unwrap_err().to_string();
    assert!(
        message.contains("holds 2 GGUF files; name one of them"),
        "{message}"
    );
    fs::write(&path, b"no model").unwrap();
    let message = Source::open(&path).map(|_| ()).unwrap_err().to_string();
    assert!(message.contains("does not begin with GGUF"), "{message}");
}
