//! Exports to other ecosystems' formats: the laws every exporter keeps, and what is refused.

mod folders;
mod foreign;
mod golden;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use qtool_formats::artifact::Artifact;
use qtool_formats::checkpoint::Checkpoint;
use qtool_formats::export::linears::{LinearFormat, lay_out};
use qtool_formats::export::{EXPORTERS, Exporter, LINEAR_FORMATS, find};
use qtool_formats::{Dtype, FloatDtype};

use serde_json::json;

use crate::flow::{quantize, with_recipe};
use crate::model::{Normal, Tensor, read_model, sample, write_model};

/// A model of two layers whose shapes every format can hold, with a config and no tied head.
fn model(folder: &Path) {
    let mut normal = Normal::new(5);
    let mut tensors = Vec::new();
    let mut add = |name: &str, shape: &[usize]| {
        let values = normal.take(shape.iter().product(), 0.05);
        tensors.push((name.to_owned(), Tensor::floats(FloatDtype::Bf16, shape, &values)));
    };
    add("model.embed_tokens.weight", &[50, 256]);
    for layer in 0..2 {
        add(&format!("model.layers.{layer}.input_layernorm.weight"), &[256]);
        add(
            &format!("model.layers.{layer}.self_attn.q_proj.weight"),
            &[64, 256],
        );
        add(&format!("model.layers.{layer}.mlp.down_proj.weight"), &[256, 512]);
    }
    write_model(folder, &tensors);
    let config = json!({"model_type": "llama", "hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4,
        "head_dim": 16, "intermediate_size": 512, "num_hidden_layers": 2, "max_position_embeddings": 64, "vocab_size": 50});
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let tokenizer = json!({"pre_tokenizer": {"type": "ByteLevel", "use_regex": true, "add_prefix_space": false},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}});
    fs::write(folder.join("tokenizer.json"), tokenizer.to_string()).unwrap();
}

/// Recipes that cover every grid, width, grouping and scale type there is.
const RECIPES: [&str; 14] = [
    "bits:8",
    "bits:8,scale:f32",
    "bits:8,grid:zp,group:64,scale:f16",
    "bits:4",
    "bits:4,grid:zp,group:128,scale:f16",
    "bits:4,grid:zp,group:32,scale:f16,scale-bits:7",
    "bits:4,grid:narrow,group:row",
    "bits:3,group:32,scale:f16",
    "bits:2,method:mse,group:256,grid:zp,scale:f16",
    "bits:2,effort:fast",
    "bits:4,method:nf4",
    "bits:4,method:nf4-dq",
    "bits:4,method:q4-k",
    "bits:2,method:q2-k",
];

fn run(from: &Path, exporter: &dyn Exporter, to: &Path) -> qtool::Result<u64> {
    qtool::export::run(from, exporter, to, false, 5_000_000_000, false)
}

/// What an exporter accepts it writes, in the size it declared, with unique names, a card and provenance; what it
/// refuses leaves nothing, and the refusal names a scheme and a command.
#[test]
fn exporters_keep_their_word() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("model");
    model(&base);
    let (mut written, mut refused) = (BTreeMap::new(), BTreeMap::new());
    for (i, recipe) in RECIPES.iter().enumerate() {
        let artifact = dir.path().join(format!("a{i}"));
        quantize(&base, &with_recipe(&artifact, recipe, &[], &[]));
        for exporter in EXPORTERS.iter().filter(|e| e.name() != "fastdeploy") {
            let what = format!("{recipe} as {}", exporter.name());
            let out = dir.path().join(format!("{i}-{}", exporter.name()));
            match run(&artifact, *exporter, &out) {
                Ok(bytes) => {
                    assert_sound(&what, *exporter, &out, bytes);
                    *written.entry(exporter.name()).or_insert(0) += 1;
                }
                Err(error) => {
                    let message = error.to_string();
                    assert!(!out.exists(), "{what} wrote something");
                    assert!(
                        message.contains("quantize ") && message.lines().count() == 1,
                        "{what}: {message}"
                    );
                    *refused.entry(exporter.name()).or_insert(0) += 1;
                }
            }
        }
    }
    for exporter in EXPORTERS.iter().filter(|e| e.name() != "fastdeploy") {
        let (some, none) = (written.get(exporter.name()), refused.get(exporter.name()));
        assert!(some.is_some(), "{} wrote nothing", exporter.name());
        assert_eq!(
            some.unwrap_or(&0) + none.unwrap_or(&0),
            RECIPES.len(),
            "{}",
            exporter.name()
        );
    }
    for (name, count) in [
        ("bf16", 14),
        ("compressed-tensors", 9),
        ("compressed-tensors-int8", 2),
        ("gptq", 4),
        ("gptq-v2", 8),
        ("awq", 4),
        ("bnb-nf4", 2),
        ("gguf", 7),
    ] {
        assert_eq!(written[name], count, "{name}");
    }
}

fn assert_sound(what: &str, exporter: &dyn Exporter, out: &Path, bytes: u64) {
    let gguf = exporter.name() == "gguf";
    let files: &[&str] = match gguf {
        true => &["model.gguf", "README.md", "qtool-export.json"],
        false => &["config.json", "README.md", "qtool-export.json", "tokenizer.json"],
    };
    for file in files {
        assert!(out.join(file).is_file(), "{what}: no {file}");
    }
    let card = fs::read_to_string(out.join("README.md")).unwrap();
    assert!(card.starts_with("---\nbase_model: \"model\"\n"), "{what}: {card}");
    assert!(card.contains(exporter.name()), "{what}");
    if gguf {
        let size = fs::metadata(out.join("model.gguf")).unwrap().len();
        assert!(size > bytes && size < bytes + 8192, "{what}: {size} for {bytes}");
        return;
    }
    // Opening checks that names are unique and bytes are those the header declares.
    let checkpoint = Checkpoint::open(out).unwrap();
    assert_eq!(checkpoint.tensor_bytes(), bytes, "{what}: declared size");
}

/// Tensors in the folder are the weights of the artifact, laid out: read back with nothing but [`lay_out`].
#[test]
fn folders_hold_what_laying_out_gives() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("model");
    model(&base);
    let mut compared = 0;
    for (i, recipe) in RECIPES.iter().enumerate() {
        let folder = dir.path().join(format!("a{i}"));
        quantize(&base, &with_recipe(&folder, recipe, &[], &[]));
        let artifact = Artifact::open(&folder).unwrap();
        for format in LINEAR_FORMATS {
            let out = dir.path().join(format!("{i}-{}", format.name()));
            if run(&folder, find(format.name()).unwrap(), &out).is_err() {
                continue;
            }
            compared += assert_laid_out(&artifact, *format, &out);
        }
    }
    assert_eq!(compared, 4 * (9 + 2 + 4 + 8 + 4 + 2));
}

fn assert_laid_out(artifact: &Artifact, format: &dyn LinearFormat, out: &Path) -> usize {
    use qtool_formats::artifact::Stored;
    let checkpoint = Checkpoint::open(out).unwrap();
    let mut compared = 0;
    for record in &artifact.manifest().tensors {
        let Stored::Quantized(q) = &record.stored else {
            let (ours, theirs) = (
                artifact.stored(&record.name).unwrap(),
                checkpoint.tensor(&record.name).unwrap(),
            );
            assert_eq!(ours.bytes(), theirs.bytes(), "{}", record.name);
            continue;
        };
        let weight = artifact.weight_rows(q, 0, q.rows).unwrap();
        let module = record.name.strip_suffix("weight").unwrap();
        for (form, bytes) in lay_out(format, &weight, record.dtype).unwrap() {
            let stored = checkpoint.tensor(&format!("{module}{}", form.suffix)).unwrap();
            assert_eq!((stored.dtype(), stored.shape()), (form.dtype, &form.shape[..]));
            assert!(stored.bytes() == bytes, "{module}{}", form.suffix);
        }
        compared += 1;
    }
    compared
}

/// Every exporter has its page and, where its bytes are not simply decoded values or FastDeploy's (whose
/// layouts have known answers of their own), a golden file.
#[test]
fn every_exporter_is_documented_and_has_golden_files() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut pages = String::new();
    for entry in fs::read_dir(root.join("docs/formats")).unwrap() {
        pages += &fs::read_to_string(entry.unwrap().path()).unwrap();
    }
    let mut goldens = 0;
    for exporter in EXPORTERS {
        let name = exporter.name();
        assert!(
            pages.contains(&format!("--to {name}")),
            "{name} is on no page of docs/formats"
        );
        let file = root.join(format!("tests/golden/exports/{name}.safetensors"));
        if !["bf16", "bf16-gemm", "f32", "fastdeploy"].contains(&name) {
            assert!(file.is_file(), "{name} has no golden file");
            goldens += 1;
        }
    }
    assert!(goldens >= LINEAR_FORMATS.len());
}

fn refusal(artifact: &Path, format: &str) -> String {
    let to: PathBuf = artifact.with_extension("never");
    let message = run(artifact, find(format).unwrap(), &to).unwrap_err().to_string();
    assert!(!to.exists(), "{message}");
    message
}

#[test]
fn refusals_say_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("model");
    model(&base);
    let at = |name: &str| dir.path().join(name);
    let make = |name: &str, recipe: &str, rules: &[&str]| {
        quantize(&base, &with_recipe(&at(name), recipe, &[], rules));
    };
    make("f32", "bits:4,scale:f32", &[]);
    make("mixed", "bits:4,scale:f16", &["down_proj=bits:8"]);
    make("embedding", "bits:4,scale:f16", &["embed_tokens=bits:8"]);
    make("zp", "bits:4,grid:zp,scale:f16", &[]);
    make("zp32", "bits:4,grid:zp,group:32,scale:f16", &[]);
    for (artifact, format, words) in [
        (
            "f32",
            "gptq",
            &["_proj.weight", "no F16 value", "--scale-dtype f16"][..],
        ),
        ("f32", "awq", &["no F16 value", "--scale-dtype f16"]),
        (
            "mixed",
            "gptq",
            &["w8-", "w4-", "one scheme", "--to compressed-tensors"],
        ),
        ("embedding", "compressed-tensors", &["embed_tokens", "--skip"]),
        ("zp", "gptq", &["w4-zp-g64-f16", "w4-sym", "--to gptq-v2"]),
        ("zp", "compressed-tensors-int8", &["w8-sym-row", "--bits 8"]),
        (
            "zp32",
            "gguf",
            &["_proj.weight", "scale times zero point as F16", "--scale-bits 7"],
        ),
    ] {
        let message = refusal(&at(artifact), format);
        assert!(words.iter().all(|w| message.contains(w)), "{message}");
    }
    run(&at("mixed"), find("compressed-tensors").unwrap(), &at("both")).unwrap();
    let config = fs::read_to_string(at("both").join("config.json")).unwrap();
    assert!(config.contains("group_1") && config.contains("model.layers.1.mlp.down_proj"));

    // Scales of BF16 are F16 values unless they are very small: eight bits fit in eleven.
    let mut tensors = read_model(&base);
    for (name, tensor) in &mut tensors {
        if name.ends_with("q_proj.weight") {
            let tiny: Vec<f32> = FloatDtype::Bf16
                .widen(&tensor.bytes)
                .iter()
                .map(|v| v * 1e-5)
                .collect();
            *tensor = Tensor::floats(FloatDtype::Bf16, &tensor.shape.clone(), &tiny);
            assert_eq!(tensor.dtype, Dtype::BF16);
        }
    }
    write_model(&at("tiny"), &tensors);
    make("fits", "bits:4", &[]);
    run(&at("fits"), find("gptq").unwrap(), &at("fits-gptq")).unwrap();
    quantize(&at("tiny"), &with_recipe(&at("tiny-4"), "bits:4", &[], &[]));
    let message = refusal(&at("tiny-4"), "gptq");
    assert!(
        message.contains("q_proj") && message.contains("--scale-dtype"),
        "{message}"
    );
}

/// The sample model, whose head is tied: the head stays out of what loaders convert.
#[test]
fn configs_name_what_is_not_quantized() {
    let dir = tempfile::tempdir().unwrap();
    let artifact = dir.path().join("a");
    let skips = ["layers\\.0\\.mlp"];
    quantize(
        &sample("tiny-ernie45"),
        &with_recipe(&artifact, "bits:4,group:32,scale:f16", &skips, &[]),
    );
    for (format, words) in [
        (
            "compressed-tensors",
            ["\"lm_head\"", "\"model.layers.0.mlp.up_proj\""],
        ),
        (
            "gptq",
            [
                "\"sym\": true",
                "\"-:^model\\\\.layers\\\\.0\\\\.mlp\\\\.up_proj$\"",
            ],
        ),
        ("awq", ["\"version\": \"gemm\"", "\"model.layers.0.mlp.up_proj\""]),
    ] {
        let out = dir.path().join(format);
        run(&artifact, find(format).unwrap(), &out).unwrap();
        let config = fs::read_to_string(out.join("config.json")).unwrap();
        assert!(words.iter().all(|w| config.contains(w)), "{format}: {config}");
    }
}

/// What a config or tokenizer of the artifact's folder may lie about, and how the lie is told.
#[test]
fn damaged_side_files_are_refused_for_gguf() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("model");
    model(&base);
    let artifact = dir.path().join("a");
    quantize(
        &base,
        &with_recipe(&artifact, "bits:4,group:32,scale:f16", &[], &[]),
    );
    let read = |name: &str| -> serde_json::Value {
        serde_json::from_slice(&fs::read(artifact.join(name)).unwrap()).unwrap()
    };
    let (config, tokenizer) = (read("config.json"), read("tokenizer.json"));
    let refused = |file: &str, pointer: &str, value: serde_json::Value| {
        let mut changed = if file == "config.json" {
            config.clone()
        } else {
            tokenizer.clone()
        };
        *changed.pointer_mut(pointer).unwrap() = value;
        let original = fs::read(artifact.join(file)).unwrap();
        fs::write(artifact.join(file), changed.to_string()).unwrap();
        let message = refusal(&artifact, "gguf");
        fs::write(artifact.join(file), original).unwrap();
        message
    };
    for (file, pointer, value, words) in [
        (
            "config.json",
            "/vocab_size",
            json!(4_000_000_000u32),
            "rows of the embedding",
        ),
        ("config.json", "/head_dim", json!(2_000_000_000), "at most 65536"),
        ("config.json", "/head_dim", json!(48), "whole heads of 48"),
        ("config.json", "/model_type", json!("mamba"), "qwen3"),
        (
            "config.json",
            "/num_hidden_layers",
            json!(-1),
            "num_hidden_layers",
        ),
        (
            "tokenizer.json",
            "/model/vocab/b",
            json!(50),
            "beyond the model's vocabulary of 50",
        ),
        (
            "tokenizer.json",
            "/pre_tokenizer/type",
            json!("Whitespace"),
            "Whitespace",
        ),
    ] {
        let message = refused(file, pointer, value);
        assert!(
            message.contains(words) && message.lines().count() == 1,
            "{pointer}: {message}"
        );
    }
    fs::remove_file(artifact.join("tokenizer.json")).unwrap();
    assert!(refusal(&artifact, "gguf").contains("tokenizer.json"));
}
