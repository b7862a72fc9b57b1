//! Artifacts of rewritten models: they verify against the original, in every form, and run.

use std::path::Path;
use std::sync::Arc;

use qtool::fastdeploy::transformed_plans;
use qtool::quantize;
use qtool::source::Source;
use qtool_formats::checkpoint::Checkpoint;

use super::{contents, cosine, findings, logits, model, quantized, rotated};
use crate::fastdeploy::request;
use crate::flow::with_recipe;
use crate::model::{SAMPLES, read_model, sample, write_model};
use crate::paddle::write_paddle;

#[test]
fn artifacts_verify_against_the_original() {
    for name in SAMPLES {
        let dir = tempfile::tempdir().unwrap();
        let (base, out) = (sample(name), dir.path().join("out"));
        let rules = [
            r"lm_head=bits:8",
            r"layers\.1\..*down_proj=bits:2,effort:fast",
            r"k_proj=keep",
        ];
        let mut options = with_recipe(&out, "bits:4,group:32", &[], &rules);
        let manifest = quantized(&base, &options, None).unwrap();
        assert_eq!(findings(&out, &base), Vec::<String>::new(), "{name}");
        assert_eq!(
            manifest
                .transform
                .as_ref()
                .unwrap()
                .rotation
                .as_ref()
                .unwrap()
                .seed,
            3
        );
        let source = Checkpoint::open(&base).unwrap();
        let digest = |tensor: &str| {
            let record = manifest.tensors.iter().find(|t| t.name == tensor).unwrap();
            record
                .source_digest
                .clone()
                .unwrap_or_else(|| record.sources[0].digest.clone())
        };
        for (tensor, of) in [
            (
                "model.layers.0.self_attn.o_proj.weight",
                "model.layers.0.self_attn.o_proj.weight",
            ),
            ("model.embed_tokens.weight", "model.embed_tokens.weight"),
            ("lm_head.weight", "model.embed_tokens.weight"),
        ] {
            let bytes = source.tensor(of).unwrap().bytes();
            assert_eq!(
                digest(tensor),
                format!("blake3:{}", blake3::hash(bytes).to_hex()),
                "{tensor}"
            );
        }
        // A base with one weight changed is found out, also where that weight is nowhere a row of its own.
        let other = dir.path().join("other");
        let mut tensors = read_model(&base);
        let changed = tensors
            .iter_mut()
            .find(|(name, _)| name == "model.layers.0.mlp.down_proj.weight")
            .unwrap();
        changed.1.bytes[3] ^= 0x40;
        write_model(&other, &tensors);
        std::fs::copy(base.join("config.json"), other.join("config.json")).unwrap();
        let found = findings(&out, &other).join("\n");
        assert!(
            found.contains("down_proj") && found.contains("digest of the source"),
            "{found}"
        );
        assert!(found.contains("relative MSE"), "{found}");
        // Threads change no byte.
        let again = dir.path().join("again");
        (options.target, options.threads) = (again.clone(), 1);
        quantized(&base, &options, None).unwrap();
        assert!(contents(&out) == contents(&again));
        // It runs, untied, near the original.
        let config: serde_json::Value =
            serde_json::from_slice(&std::fs::read(out.join("config.json")).unwrap()).unwrap();
        assert_eq!(config["tie_word_embeddings"], false);
        let ids = vec![(0..24u32).map(|i| 3 + i * i * 7 % 900).collect::<Vec<_>>()];
        let original = logits(&model(Arc::new(Source::open(&base).unwrap())), &ids);
        let found = logits(&model(Arc::new(Source::open(&out).unwrap())), &ids);
        let cosine = cosine(&original, &found);
        assert!(cosine > 0.9, "{name}: {cosine}");
    }
}

/// Every form an ERNIE model comes in and goes to: kept matrices that lie turned, fused weights, an untied head.
#[test]
fn forms_of_ernie_are_rotated_alike() {
    for name in SAMPLES {
        let dir = tempfile::tempdir().unwrap();
        let (hf, paddle) = (sample(name), dir.path().join("paddle"));
        write_paddle(&hf, &paddle);
        let ids = vec![(0..24u32).map(|i| 3 + i * i * 7 % 900).collect::<Vec<_>>()];
        let original = logits(&model(Arc::new(Source::open(&hf).unwrap())), &ids);
        // FastDeploy takes no experts of eight bits.
        let (bits, near) = if name.ends_with("moe") {
            (4, 0.9)
        } else {
            (8, 0.999)
        };
        let mut tried = 0;
        for (base, form) in [(&hf, "hf"), (&paddle, "paddle")] {
            let run = |out: &Path| {
                assert_eq!(
                    findings(out, base),
                    Vec::<String>::new(),
                    "{name} {form} {}",
                    out.display()
                );
                let found = logits(&model(Arc::new(Source::open(out).unwrap())), &ids);
                let cosine = cosine(&original, &found);
                assert!(cosine > near, "{name} {form} {}: {cosine}", out.display());
            };
            let own = dir.path().join(format!("{form}-own"));
            quantized(base, &with_recipe(&own, "bits:8", &[], &["o_proj=keep"]), None).unwrap();
            run(&own);
            let (checkpoint, transform) = rotated(base, 3).unwrap();
            let served = dir.path().join(format!("{form}-served"));
            let plans = transformed_plans(&checkpoint, &request(bits), Some(&transform)).unwrap();
            quantize::run_ranks(&checkpoint, &plans, &with_recipe(&served, "bits:8", &[], &[])).unwrap();
            run(&served);
            tried += 2;
        }
        assert_eq!(tried, 4);
        // The same folder from either form.
        let weights = |form: &str| {
            contents(&dir.path().join(form))
                .remove("model.safetensors")
                .unwrap()
        };
        assert!(weights("hf-served") == weights("paddle-served"), "{name}");
    }
}
