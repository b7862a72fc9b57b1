//! GGUF files of encoders and of models with routed experts: what our exports hold, read back tensor by tensor and run;
//! their tokenizers; and files that lie about their experts, labels and special tokens.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qtool::model::{Batch, Encoder, Model};
use qtool::source::Source;
use qtool::tokenizer::Tokenizer;
use qtool::{inspect, verify};
use qtool_formats::artifact::{Artifact, Stored};
use qtool_formats::checkpoint::Checkpoint;
use qtool_formats::export::find;
use qtool_formats::import;
use qtool_kernels::{Backend, CpuBackend, Isa};
use serde_json::{Value, json};

use super::values_of;
use crate::flow::{quantize, with_recipe};
use crate::model::{read_model, sample, write_file};

fn encoder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/encoders/bert")
}

/// The golden encoder without its head, as sentence-transformers ships such models.
fn bare(folder: &Path) {
    let tensors: Vec<_> = read_model(&encoder())
        .into_iter()
        .filter_map(|(name, tensor)| Some((name.strip_prefix("bert.")?.to_owned(), tensor)))
        .filter(|(name, _)| !name.starts_with("pooler"))
        .collect();
    fs::create_dir_all(folder).unwrap();
    write_file(&folder.join("model.safetensors"), &tensors);
    let mut config: Value =
        serde_json::from_slice(&fs::read(encoder().join("config.json")).unwrap()).unwrap();
    config.as_object_mut().unwrap().shift_remove("id2label");
    fs::write(folder.join("config.json"), config.to_string()).unwrap();
    fs::copy(encoder().join("tokenizer.json"), folder.join("tokenizer.json")).unwrap();
}

/// An artifact of `base` and the GGUF file made of it.
fn exported(dir: &Path, name: &str, base: &Path, skips: &[&str]) -> (PathBuf, PathBuf) {
    let (artifact, out) = (dir.join(name), dir.join(format!("{name}-gguf")));
    quantize(
        base,
        &with_recipe(&artifact, "bits:8,group:32,scale:f16", skips, &[]),
    );
    qtool::export::run(
        &artifact,
        find("gguf").unwrap(),
        &out,
        false,
        5_000_000_000,
        false,
    )
    .unwrap();
    (artifact, out.join("model.gguf"))
}

/// Every tensor of the artifact is in the file, of its shape and values, and nothing else is. How many there are.
fn assert_same_tensors(artifact: &Path, file: &Path) -> usize {
    let artifact = Artifact::open(artifact).unwrap();
    let model = import::open(file).unwrap().unwrap();
    let records = &artifact.manifest().tensors;
    assert_eq!(model.tensors().len(), records.len());
    for record in records {
        let tensor = model.tensor(&record.name).unwrap();
        assert_eq!(tensor.shape, record.shape, "{}", record.name);
        let expected = match &record.stored {
            Stored::Quantized(q) => values_of(&artifact.weight_rows(q, 0, q.rows).unwrap()),
            Stored::Kept { .. } => {
                let view = artifact.stored(&record.name).unwrap();
                view.float_dtype().unwrap().widen(view.bytes())
            }
        };
        assert_eq!(model.values(tensor).unwrap(), expected, "{}", record.name);
    }
    records.len()
}

/// Fields of the base's config that the file's has, too, alike.
fn assert_same_config(base: &Path, file: &Path, fields: &[&str]) {
    let theirs: Value = serde_json::from_slice(&fs::read(base.join("config.json")).unwrap()).unwrap();
    let model = import::open(file).unwrap().unwrap();
    for field in fields {
        assert_eq!(model.config()[field], theirs[field], "{field}");
    }
}

/// Verified against its base: nothing is found, and the whole model can be read.
fn assert_sound(file: &Path, base: &Path) {
    let found = verify::run(file, Some(base), false).unwrap();
    assert_eq!((found.findings, found.notes), (vec![], vec![]));
    assert!(found.figures_rederived > 30);
}

fn logits(path: &Path, ids: &[u32]) -> Vec<f32> {
    let source = Arc::new(Source::open(path).unwrap());
    let model = Model::open(CpuBackend::new(Isa::best()), source).unwrap();
    let model = model.load().unwrap();
    let got = model.forward(&Batch::at(ids, 0)).unwrap();
    model.backend().download(&got)
}

fn encoded(path: &Path, batch: &Batch) -> [Vec<f32>; 2] {
    let source = Arc::new(Source::open(path).unwrap());
    let model = Encoder::open(CpuBackend::new(Isa::best()), source).unwrap();
    let model = model.load().unwrap();
    let down = |x| model.backend().download(&x);
    let labels = match model.labels() {
        0 => Vec::new(),
        _ => down(model.classify(batch).unwrap()),
    };
    [down(model.hidden(batch).unwrap()), labels]
}

#[test]
fn experts_are_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let base = sample("tiny-ernie45-moe");
    let ids: Vec<u32> = (0..48).map(|i| (i * 37 + 11) % 4096).collect();
    for (name, skips) in [("all", &[][..]), ("experts-kept", &["experts\\."])] {
        let (artifact, file) = exported(dir.path(), name, &base, skips);
        assert!(assert_same_tensors(&artifact, &file) > 100);
        assert_same_config(
            &base,
            &file,
            &[
                "architectures",
                "model_type",
                "hidden_size",
                "intermediate_size",
                "head_dim",
                "num_key_value_heads",
                "moe_num_experts",
                "moe_k",
                "moe_intermediate_size",
                "moe_num_shared_experts",
                "moe_layer_start_index",
                "moe_layer_end_index",
                "moe_layer_interval",
                "tie_word_embeddings",
            ],
        );
        assert_eq!(logits(&file, &ids), logits(&artifact, &ids), "{name}");
        assert_sound(&file, &base);
        let lines = inspect::open(&file).unwrap().lines().unwrap();
        let expert = lines
            .iter()
            .find(|line| line.name == "model.layers.3.mlp.experts.7.down_proj.weight")
            .unwrap();
        let kind = if skips.is_empty() { "Q8_0" } else { "BF16" };
        assert_eq!(expert.stored_as, kind);
        let (ours, theirs) = (Tokenizer::open(&file).unwrap(), Tokenizer::open(&base).unwrap());
        for text in ["The scale of a group.", "层 12345"] {
            assert_eq!(
                ours.encode(text, false).unwrap(),
                theirs.encode(text, false).unwrap()
            );
        }
    }
    // And on as a checkpoint, whose tensors are those of the base again.
    let (_, file) = exported(dir.path(), "on", &base, &[]);
    let on = dir.path().join("checkpoint");
    qtool::export::run(&file, find("bf16").unwrap(), &on, false, 5_000_000_000, false).unwrap();
    let shapes = |folder: &Path| -> Vec<(String, Vec<usize>)> {
        let checkpoint = Checkpoint::open(folder).unwrap();
        let mut all: Vec<_> = checkpoint
            .tensors()
            .map(|t| t.unwrap())
            .map(|t| (t.name().to_owned(), t.shape().to_vec()))
            .collect();
        all.sort();
        all
    };
    assert_eq!(shapes(&on), shapes(&base));
}

#[test]
fn encoders_are_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let plain = dir.path().join("bare");
    bare(&plain);
    let rows = fs::read(encoder().join("rows.json")).unwrap();
    let rows: Vec<Value> = serde_json::from_slice(&rows).unwrap();
    assert!(rows.len() >= 200);
    for (name, base, headed) in [("headed", encoder(), true), ("plain", plain, false)] {
        let (artifact, file) = exported(dir.path(), name, &base, &["classifier", "pooler"]);
        let count = assert_same_tensors(&artifact, &file);
        assert!(count >= 37, "{count}");
        let mut fields = vec![
            "model_type",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
            "type_vocab_size",
            "vocab_size",
            "hidden_act",
            "pad_token_id",
        ];
        if headed {
            fields.extend(["architectures", "id2label"]);
        }
        assert_same_config(&base, &file, &fields);
        assert_sound(&file, &base);
        let tokenizer = Tokenizer::open(&file).unwrap();
        for row in &rows {
            let (a, b) = (row["a"].as_str().unwrap(), row["b"].as_str());
            let most = row["most"].as_u64().unwrap() as usize;
            let got = tokenizer.encode_row(a, b, most).unwrap();
            assert_eq!(
                json!([got.ids, got.types]),
                json!([row["ids"], row["types"]]),
                "{a:?} {b:?} {most}"
            );
        }
        let pairs = [("the cat sat", Some("a dog ran")), ("你好, unable!", None)]
            .map(|(a, b)| tokenizer.encode_row(a, b, 64).unwrap());
        let batch = Batch::of_rows(&pairs);
        let (got, expected) = (encoded(&file, &batch), encoded(&artifact, &batch));
        assert!(got == expected && got[1].is_empty() != headed, "{name}");
        assert_eq!(
            tokenizer.decode(&pairs[0].ids, true).unwrap(),
            "the cat sat a dog ran"
        );
    }
}

/// A file with one thing changed: the bytes behind a text.
fn changed(file: &Path, after: &str, skip: usize, bytes: &[u8]) -> PathBuf {
    let mut all = fs::read(file).unwrap();
    let found = all.windows(after.len()).position(|w| w == after.as_bytes());
    let at = found.unwrap() + after.len() + skip;
    all[at..at + bytes.len()].copy_from_slice(bytes);
    let path = file.with_file_name(format!("{after}-{bytes:?}.gguf"));
    fs::write(&path, all).unwrap();
    path
}

/// What opening, or else reading all of it, says.
fn refusal(file: &Path) -> String {
    let message = match verify::run(file, None, false) {
        Err(error) => error.to_string(),
        Ok(found) => match found.findings.first() {
            Some(first) => first.problem.clone(),
            None => panic!("{} passes: {:?}", file.display(), found.notes),
        },
    };
    assert_eq!(message.lines().count(), 1, "{message}");
    message
}

#[test]
fn lies_about_experts_get_their_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let (_, file) = exported(dir.path(), "a", &sample("tiny-ernie45-moe"), &[]);
    // Behind a key stand its type (u32) and its value.
    let number = |key: &str, value: u32| changed(&file, key, 4, &value.to_le_bytes());
    // Behind a tensor's name stand its dimensions (u32) and sizes (u64 each), the experts last.
    let sizes = |name: &str, value: u64| changed(&file, name, 4 + 16, &value.to_le_bytes());
    for (lie, words) in [
        (
            number("ernie4_5-moe.expert_count", 7),
            &[
                "blk.1.",
                "7 experts",
                "ernie4_5-moe.expert_count",
                "got a tensor of [8",
            ][..],
        ),
        (
            number("ernie4_5-moe.expert_count", 0),
            &["no count ernie4_5-moe.expert_count"],
        ),
        (
            number("ernie4_5-moe.expert_count", 4_000_000_000),
            &["at most 65536 experts"],
        ),
        (number("ernie4_5-moe.expert_used_count", 9), &["got 9 of 8"]),
        (
            number("ernie4_5-moe.interleave_moe_layer_step", 2),
            &[
                "interleave_moe_layer_step is 2",
                "expected experts in every layer",
            ],
        ),
        (
            sizes("blk.2.ffn_up_exps.weight", 7),
            &[
                "blk.2.ffn_up_exps.weight",
                "8 experts",
                "got a tensor of [7, 256, 256]",
            ],
        ),
        (
            changed(&file, "blk.2.ffn_up_ex", 0, b"xx"),
            &["model.layers.2.mlp.experts.0.up_proj.weight is missing"],
        ),
        (
            changed(&file, "blk.3.ffn_gate_in", 0, b"x"),
            &["model.layers.3.mlp.gate.weight is missing"],
        ),
    ] {
        let message = refusal(&lie);
        assert!(
            words.iter().all(|word| message.contains(word)),
            "{words:?}: {message}"
        );
    }
}

#[test]
fn lies_about_encoders_get_their_sentence() {
    let dir = tempfile::tempdir().unwrap();
    let (_, file) = exported(dir.path(), "a", &encoder(), &["classifier", "pooler"]);
    let mut told = 0;
    for (after, skip, bytes, words) in [
        (
            "bert.attention.head_coun",
            0,
            &b"x"[..],
            "no count bert.attention.head_count",
        ),
        ("bert.attention.causal", 4, &[1], "bert.attention.causal is set"),
        // Behind the key of an array stand its type, that of its items, their count and the length of the first.
        ("bert.classifier.output_label", 0, b"x", ""),
        ("token_types.weigh", 0, b"x", "token_types.weight is missing"),
        (
            "blk.1.ffn_down.bia",
            0,
            b"x",
            "encoder.layer.1.output.dense.bias is missing",
        ),
        (
            "blk.1.ffn_down.weigh",
            0,
            b"x",
            "encoder.layer.1.output.dense.weight is missing",
        ),
        ("cls.weigh", 0, b"x", "bert.pooler.dense.weight is missing"),
    ] {
        let lie = changed(&file, after, skip, bytes);
        if words.is_empty() {
            // Without names the head still has its rows.
            assert_eq!(
                import::open(&lie).unwrap().unwrap().config()["num_labels"],
                json!(3)
            );
        } else {
            let message = refusal(&lie);
            assert!(message.contains(words), "{words}: {message}");
        }
        told += 1;
    }
    assert_eq!(told, 7);
    for (after, skip, bytes, words) in [
        (
            "tokenizer.ggml.seperator_token_i",
            0,
            &b"x"[..],
            "tokenizer.ggml.seperator_token_id, got none",
        ),
        (
            "tokenizer.ggml.bos_token_id",
            4,
            &[200, 0, 0, 0],
            "one of its 96 tokens as tokenizer.ggml.bos_token_id, got 200",
        ),
        ("\u{2581}dog", 8, "\u{2581}dog".as_bytes(), "is there twice"),
    ] {
        let lie = changed(&file, after, skip, bytes);
        let message = Tokenizer::open(&lie).map(|_| ()).unwrap_err().to_string();
        assert!(
            message.contains(words) && message.lines().count() == 1,
            "{words}: {message}"
        );
    }
}
