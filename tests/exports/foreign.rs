//! Models that others quantized (tests/golden/imports), exported: what is written holds the values it was made from, what
//! cannot be expressed is refused in a sentence.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use qtool::tokenizer::Tokenizer;
use qtool_formats::FloatDtype;
use qtool_formats::artifact::{Artifact, Stored};
use qtool_formats::checkpoint::Checkpoint;
use qtool_formats::export::{EXPORTERS, find};
use qtool_formats::import::{self, Decoded, Foreign};
use serde_json::{Value, json};

use super::run;
use crate::flow::{quantize, with_recipe};
use crate::model::sample;

/// Folder, and the formats beside `bf16`, `bf16-gemm` and `f32` that hold it.
const FOLDERS: [(&str, &[&str]); 11] = [
    ("bnb-nf4", &["bnb-nf4"]),
    ("bnb-nf4-double", &["bnb-nf4"]),
    ("bnb-fp4-double", &[]),
    ("gptq", &["compressed-tensors", "gptq", "gptq-v2", "awq", "gguf"]),
    ("gptq-act-order", &["gptq", "gptq-v2"]),
    ("gptq-v2-zp", &["compressed-tensors", "gptq-v2", "awq"]),
    ("awq", &["compressed-tensors", "gptq-v2", "awq"]),
    ("ct-w4", &["compressed-tensors", "gptq", "gptq-v2", "awq", "gguf"]),
    ("ct-w4-zp", &["compressed-tensors", "gptq-v2", "awq"]),
    ("ct-w8-zp", &["compressed-tensors", "gptq-v2"]),
    (
        "ct-w8-tensor",
        &[
            "compressed-tensors",
            "compressed-tensors-int8",
            "gptq",
            "gptq-v2",
            "gguf",
        ],
    ),
];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/imports")
        .join(name)
}

/// A golden folder with the tokenizer that GGUF asks for.
fn with_tokenizer(name: &str, to: &Path) {
    fs::create_dir(to).unwrap();
    for file in ["config.json", "model.safetensors"] {
        fs::copy(golden(name).join(file), to.join(file)).unwrap();
    }
    let tokenizer = json!({"pre_tokenizer": {"type": "ByteLevel", "use_regex": true, "add_prefix_space": false},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}});
    fs::write(to.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    fs::write(to.join("quantize_config.json"), "{}").unwrap();
}

/// Every value of a model, by tensor.
fn values(model: &Foreign) -> BTreeMap<String, Vec<f32>> {
    let of = |tensor: &import::Tensor| (tensor.name.clone(), model.values(tensor).unwrap());
    model.tensors().iter().map(of).collect()
}

/// Every value of a folder, whatever it is.
fn values_of(folder: &Path) -> BTreeMap<String, Vec<f32>> {
    if let Some(model) = import::open(folder).unwrap() {
        return values(&model);
    }
    let checkpoint = Checkpoint::open(folder).unwrap();
    let of = |view: qtool_formats::TensorView<'_>| {
        let dtype = view.float_dtype().unwrap();
        (view.name().to_owned(), dtype.widen(view.bytes()))
    };
    checkpoint.tensors().map(|view| of(view.unwrap())).collect()
}

fn config(folder: &Path) -> Value {
    serde_json::from_slice(&fs::read(folder.join("config.json")).unwrap()).unwrap()
}

#[test]
fn what_others_quantized_keeps_its_values() {
    let dir = tempfile::tempdir().unwrap();
    let (mut written, mut refused) = (0, 0);
    for (name, formats) in FOLDERS {
        let from = dir.path().join(name);
        with_tokenizer(name, &from);
        let model = import::open(&from).unwrap().unwrap();
        let expected = values(&model);
        assert_eq!(expected.len(), 11, "{name}");
        for exporter in EXPORTERS {
            let what = format!("{name} as {}", exporter.name());
            let out = dir.path().join(format!("{name}-{}", exporter.name()));
            let dense = ["bf16", "bf16-gemm", "f32"].contains(&exporter.name());
            let bytes = match run(&from, *exporter, &out) {
                Ok(bytes) => bytes,
                Err(error) => {
                    let message = error.to_string();
                    assert!(!dense && !formats.contains(&exporter.name()), "{message}");
                    assert!(!out.exists(), "{what} wrote something");
                    let says = message.contains("--to bf16") || message.contains("quantize ");
                    assert!(says && message.lines().count() == 1, "{what}: {message}");
                    refused += 1;
                    continue;
                }
            };
            assert!(dense || formats.contains(&exporter.name()), "{what} was written");
            let got = values_of(&out);
            assert_eq!(got.len(), expected.len(), "{what}");
            for (tensor, expected) in &expected {
                let coded = model.tensor(tensor).unwrap().coded.is_some();
                let round = |v: f32| match exporter.name() {
                    "bf16" | "bf16-gemm" if coded => FloatDtype::Bf16.round(v),
                    _ => v,
                };
                let expected: Vec<f32> = expected.iter().map(|v| round(*v)).collect();
                assert_eq!(got[tensor], expected, "{what}: {tensor}");
            }
            let card = fs::read_to_string(out.join("README.md")).unwrap();
            assert!(
                card.starts_with(&format!("---\nbase_model: \"{name}\"\n")),
                "{card}"
            );
            assert!(
                card.contains(&format!("in the format {}", model.format())),
                "{card}"
            );
            assert!(out.join("qtool-export.json").is_file(), "{what}");
            if exporter.name() != "gguf" {
                assert!(out.join("tokenizer.json").is_file() && !out.join("quantize_config.json").exists());
                assert_eq!(config(&out).get("quantization_config").is_none(), dense, "{what}");
                assert_eq!(Checkpoint::open(&out).unwrap().tensor_bytes(), bytes, "{what}");
            }
            written += 1;
        }
    }
    assert_eq!(written + refused, FOLDERS.len() * EXPORTERS.len());
    let listed: usize = FOLDERS.iter().map(|(_, formats)| 3 + formats.len()).sum();
    assert_eq!((written, listed), (63, 63), "{refused} refused");
}

/// Columns in another order than their groups: the list that GPTQModel wrote, and all other parts, are written again
/// byte for byte.
#[test]
fn act_order_keeps_its_index() {
    let dir = tempfile::tempdir().unwrap();
    let from = golden("gptq-act-order");
    let out = dir.path().join("gptq");
    run(&from, find("gptq").unwrap(), &out).unwrap();
    assert_eq!(config(&out)["quantization_config"]["desc_act"], json!(true));
    let (theirs, ours) = (Checkpoint::open(&from).unwrap(), Checkpoint::open(&out).unwrap());
    let mut lists = 0;
    for view in theirs.tensors() {
        let view = view.unwrap();
        let got = ours.tensor(view.name()).unwrap();
        assert_eq!(
            (got.dtype(), got.shape()),
            (view.dtype(), view.shape()),
            "{}",
            view.name()
        );
        assert!(got.bytes() == view.bytes(), "{}", view.name());
        lists += usize::from(view.name().ends_with("g_idx"));
    }
    assert_eq!((ours.names().len(), lists), (theirs.names().len(), 7));
    // Formats without a place for the list say so, and one whose readers have given it up says that.
    for (format, why) in [("awq", "has no place"), ("compressed-tensors", "read no more")] {
        let message = run(&from, find(format).unwrap(), &dir.path().join(format))
            .unwrap_err()
            .to_string();
        assert!(
            message.contains("g_idx") && message.contains(why) && message.contains("--to gptq"),
            "{message}"
        );
    }
}

/// A file of llama.cpp becomes a folder that has its values, dimensions and tokenizer.
#[test]
fn gguf_becomes_a_folder() {
    let dir = tempfile::tempdir().unwrap();
    let (from, out) = (golden("gguf/model.gguf"), dir.path().join("model"));
    run(&from, find("f32").unwrap(), &out).unwrap();
    assert_eq!(values(&import::open(&from).unwrap().unwrap()), values_of(&out));
    let config = config(&out);
    assert_eq!(config["architectures"], json!(["LlamaForCausalLM"]));
    assert_eq!(config["torch_dtype"], json!("float32"));
    // A file that is a vocabulary alone, of the other kind.
    let (pieces, beside) = (golden("gguf/pieces.gguf"), dir.path().join("pieces"));
    fs::create_dir(&beside).unwrap();
    for (name, bytes) in qtool::tokenizer::files_of_gguf(&pieces).unwrap() {
        fs::write(beside.join(name), bytes).unwrap();
    }
    for (from, folder, vocabulary) in [
        (&from, &out, "tokenizer.json"),
        (&pieces, &beside, "tokenizer.model"),
    ] {
        assert!(folder.join(vocabulary).is_file(), "{vocabulary}");
        let (theirs, ours) = (Tokenizer::open(from).unwrap(), Tokenizer::open(folder).unwrap());
        for text in [
            "The scale of a group.",
            "it's  two\n\n 12345 层",
            "hello</s>hello",
        ] {
            for special in [false, true] {
                let expected = theirs.encode(text, special).unwrap();
                assert_eq!(
                    ours.encode(text, special).unwrap(),
                    expected,
                    "{vocabulary}: {text}"
                );
            }
        }
        assert_eq!(ours.ids(), theirs.ids(), "{vocabulary}");
    }
    let message = run(
        &golden("gguf/model.gguf"),
        find("gguf").unwrap(),
        &dir.path().join("again"),
    )
    .unwrap_err()
    .to_string();
    assert!(message.contains("a GGUF file already"), "{message}");
    let message = run(
        &golden("gguf/model.gguf"),
        find("gptq").unwrap(),
        &dir.path().join("gptq"),
    )
    .unwrap_err()
    .to_string();
    assert!(
        message.contains("_K") && message.contains("--to bf16"),
        "{message}"
    );
}

/// Through GGUF and back: codes of an artifact, by way of Q4_0 and Q8_0, in the formats of others.
#[test]
fn codes_survive_a_way_through_gguf() {
    let dir = tempfile::tempdir().unwrap();
    let base = sample("tiny-ernie45");
    let at = |name: &str| dir.path().join(name);
    let mut compared = 0;
    for (recipe, formats) in [
        (
            "bits:4,group:32,scale:f16",
            &["compressed-tensors", "gptq", "awq"][..],
        ),
        ("bits:8,group:32,scale:f16", &["compressed-tensors", "gptq-v2"]),
    ] {
        let name = recipe.replace([':', ','], "-");
        let artifact = at(&name);
        quantize(&base, &with_recipe(&artifact, recipe, &[], &[]));
        let file = at(&format!("{name}-gguf"));
        run(&artifact, find("gguf").unwrap(), &file).unwrap();
        let artifact = Artifact::open(&artifact).unwrap();
        for format in formats {
            let out = at(&format!("{name}-{format}"));
            run(&file, find(format).unwrap(), &out).unwrap();
            let model = import::open(&out).unwrap().unwrap();
            for record in &artifact.manifest().tensors {
                let Stored::Quantized(q) = &record.stored else {
                    continue;
                };
                let weight = artifact.weight_rows(q, 0, q.rows).unwrap();
                let Some(Decoded::Weight(read)) = model.decode(model.tensor(&record.name).unwrap()).unwrap()
                else {
                    panic!("{} as {format} is no codes", record.name)
                };
                assert_eq!(read.codes(), weight.codes(), "{} as {format}", record.name);
                compared += 1;
            }
        }
    }
    assert_eq!(compared, 42 * 5);
}

/// What a folder may lack, and how it is said.
#[test]
fn what_is_missing_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("m");
    with_tokenizer("gptq", &from);
    let refused = |format: &str| {
        let to = dir.path().join("never");
        let message = run(&from, find(format).unwrap(), &to).unwrap_err().to_string();
        assert!(!to.exists() && message.lines().count() == 1, "{message}");
        message
    };
    fs::remove_file(from.join("tokenizer.json")).unwrap();
    assert!(refused("gguf").contains("tokenizer.json"));
    assert!(refused("fastdeploy").contains("export this model --to bf16"));
    assert!(refused("bnb-nf4").contains("nf4"));
    let into = run(&from, find("bf16").unwrap(), &from).unwrap_err().to_string();
    assert!(
        into.contains("choose another one") || into.contains("exists already"),
        "{into}"
    );
}
