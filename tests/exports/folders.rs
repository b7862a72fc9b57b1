//! What exporters find and leave: damaged artifacts, targets that exist, models of every architecture.

use std::fs;
use std::path::Path;

use qtool_formats::export::{EXPORTERS, find};

use super::{model, refusal, run};
use crate::flow::{quantize, with_recipe};
use crate::model::sample;

/// A byte of the artifact that is not what was written: every exporter that would read it says so and writes nothing.
#[test]
fn damaged_artifacts_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("model");
    model(&base);
    let mut refused = 0;
    for (name, recipe) in [
        ("int8", "bits:8"),
        ("int4", "bits:4,group:32,scale:f16"),
        ("nf4", "bits:4,method:nf4-dq"),
        ("k", "bits:4,method:q4-k"),
    ] {
        let artifact = dir.path().join(name);
        quantize(&base, &with_recipe(&artifact, recipe, &[], &[]));
        let shard = artifact.join("model.safetensors");
        let mut bytes = fs::read(&shard).unwrap();
        let last = bytes.len() - 1;
        // The last tensor lies at the end; a code there stays one that the scheme has.
        bytes[last] ^= 0x10;
        fs::write(&shard, bytes).unwrap();
        for exporter in EXPORTERS.iter().filter(|e| e.name() != "fastdeploy") {
            let to = dir.path().join(format!("{name}-{}", exporter.name()));
            let message = run(&artifact, *exporter, &to).unwrap_err().to_string();
            assert!(!to.exists(), "{message}");
            assert_eq!(message.lines().count(), 1, "{message}");
            if !message.contains("quantize ") {
                assert!(
                    message.contains("is damaged")
                        && message.contains("blake3:")
                        && message.contains("qtool verify"),
                    "{message}"
                );
                refused += 1;
            }
        }
    }
    assert!(refused > 4 * 3 + 2 + 3, "{refused}");
}

/// What lies at the target stays; with force an export takes the place of one that qtool wrote.
#[test]
fn targets_that_exist_are_kept() {
    let dir = tempfile::tempdir().unwrap();
    let base = dir.path().join("model");
    model(&base);
    let artifact = dir.path().join("a");
    quantize(
        &base,
        &with_recipe(&artifact, "bits:4,group:32,scale:f16", &[], &[]),
    );
    for exporter in EXPORTERS {
        let to = dir.path().join(format!("to-{}", exporter.name()));
        fs::create_dir(&to).unwrap();
        fs::write(to.join("mine.txt"), "mine").unwrap();
        for force in [false, true] {
            let error = qtool::export::run(&artifact, *exporter, &to, force, 1 << 40, false).unwrap_err();
            assert_eq!(error.to_string().lines().count(), 1, "{error}");
            assert_eq!(fs::read_to_string(to.join("mine.txt")).unwrap(), "mine");
            assert_eq!(fs::read_dir(&to).unwrap().count(), 1);
        }
    }
    let (gguf, to) = (find("gguf").unwrap(), dir.path().join("twice"));
    run(&artifact, gguf, &to).unwrap();
    let before = fs::read(to.join("model.gguf")).unwrap();
    assert!(run(&artifact, gguf, &to).is_err());
    qtool::export::run(&artifact, gguf, &to, true, 1 << 40, false).unwrap();
    assert_eq!(fs::read(to.join("model.gguf")).unwrap(), before);
}

/// Every architecture that gguf is written for, by a model of it; experts of a layer in one tensor.
#[test]
fn architectures_become_gguf() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let dir = tempfile::tempdir().unwrap();
    for (model, name, words) in [
        (sample("tiny-ernie45"), "ernie4_5", &["blk.5.ffn_gate.weight"][..]),
        (
            sample("tiny-ernie45-moe"),
            "ernie4_5-moe",
            &[
                "blk.3.ffn_down_exps.weight",
                "blk.1.exp_probs_b.bias",
                "blk.1.ffn_gate_inp.weight",
                "ernie4_5-moe.expert_used_count",
            ],
        ),
        (
            root.join("tests/golden/encoders/bert"),
            "bert",
            &[
                "token_types.weight",
                "cls.output.bias",
                "blk.1.attn_output_norm.weight",
                "tokenizer.ggml.seperator_token_id",
            ],
        ),
    ] {
        let (artifact, out) = (dir.path().join(name), dir.path().join(format!("{name}-gguf")));
        let skips = ["classifier", "pooler"];
        quantize(
            &model,
            &with_recipe(&artifact, "bits:8,group:32,scale:f16", &skips, &[]),
        );
        let bytes = run(&artifact, find("gguf").unwrap(), &out).unwrap();
        let file = fs::read(out.join("model.gguf")).unwrap();
        assert!(file.len() as u64 > bytes);
        let holds = |word: &str| file.windows(word.len()).any(|w| w == word.as_bytes());
        for word in words.iter().chain(&[name]) {
            assert!(holds(word), "{name}: no {word}");
        }
        assert!(!holds("mlp.experts.") && !holds("bert.encoder"), "{name}");
    }
    // One expert kept: they cannot lie in one tensor.
    let artifact = dir.path().join("mixed");
    let skips = ["layers\\.2\\.mlp\\.experts\\.3\\.up_proj"];
    quantize(
        &sample("tiny-ernie45-moe"),
        &with_recipe(&artifact, "bits:8,group:32,scale:f16", &skips, &[]),
    );
    let message = refusal(&artifact, "gguf");
    assert!(
        message.contains("experts.3.up_proj") && message.contains("alike"),
        "{message}"
    );
}
