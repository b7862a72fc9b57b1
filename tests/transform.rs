//! Rewritten models: the same function before quantization, artifacts that verify against the original, statistics
//! that are those of the rewritten model.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use qtool::calibrate::corpus::{Corpus, CorpusOptions};
use qtool::calibrate::coverage::{EvidenceSource, Observed};
use qtool::calibrate::pipeline::{self, Calibration};
use qtool::calibrate::recorder::{BlockStatistics, Recorder};
use qtool::model::{Batch, Model};
use qtool::quantize::{self, Options};
use qtool::source::{Source, WeightSource};
use qtool::tokenizer::Tokenizer;
use qtool::transform::evidence::TransformedEvidence;
use qtool::transform::model::Transformed;
use qtool::transform::{Transform, rotation};
use qtool_calib::Evidence;
use qtool_formats::artifact::transform::TransformRecord;
use qtool_formats::artifact::{Artifact, Manifest, Stored};
use qtool_formats::checkpoint::Checkpoint;
use qtool_formats::{Dtype, FloatDtype};
use qtool_kernels::backend::Form;
use qtool_kernels::{Backend, CpuBackend, Isa};

use crate::calibrate::ids_file;
use crate::flow::with_recipe;
use crate::forward::{distance, golden, read_golden};
use crate::model::{SAMPLES, Tensor, read_model, sample, write_model};

/// Largest change of a logit by a rewriting alone, as a share of the largest logit. Asked for is 1e-3; f32
/// arithmetic on other numbers leaves about 1e-6.
const SAME: f32 = 2e-5;

fn rotated(folder: &Path, seed: u64) -> qtool::Result<(Arc<Checkpoint>, Arc<Transform>)> {
    let checkpoint = Arc::new(Checkpoint::open(folder)?);
    let source = Source::of_checkpoint(Arc::clone(&checkpoint))?;
    let record = TransformRecord {
        rotation: Some(rotation::record(&source, seed)?),
        scales: None,
    };
    let transform = Arc::new(Transform::new(&source, record)?);
    Ok((checkpoint, transform))
}

fn model(source: Arc<dyn WeightSource>) -> Model<CpuBackend> {
    Model::open(CpuBackend::new(Isa::best()), source)
        .and_then(Model::load)
        .unwrap()
}

fn logits(model: &Model<CpuBackend>, ids: &[Vec<u32>]) -> Vec<f32> {
    model
        .backend()
        .download(&model.forward(&Batch::new(ids)).unwrap())
}

#[test]
fn a_rotated_model_computes_the_same() {
    for folder in golden() {
        let expected = read_golden(&folder);
        for seed in [0, 77] {
            let (checkpoint, transform) = rotated(&folder, seed).unwrap();
            let model = model(Arc::new(Transformed::new(checkpoint, transform).unwrap()));
            let found = logits(&model, &expected.ids);
            let far = distance(&found, &expected.logits.concat());
            assert!(far < SAME * 2.0, "{}: {far}", folder.display());
        }
    }
}

#[test]
fn rotated_weights_are_other_weights() {
    let mut looked = 0;
    for folder in golden() {
        let (checkpoint, transform) = rotated(&folder, 0).unwrap();
        let model = Transformed::new(Arc::clone(&checkpoint), transform).unwrap();
        let name = "model.layers.0.self_attn.o_proj.weight";
        let view = checkpoint.tensor(name).unwrap();
        let (n, k) = view.matrix_dims();
        let before = view.float_dtype().unwrap().widen(view.bytes());
        let Form::Dense { bytes, .. } = model.matrix(name, n, k).unwrap().form else {
            panic!("dense")
        };
        let after = FloatDtype::F32.widen(bytes.bytes());
        let energy = |x: &[f32]| x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
        assert!((energy(&before) - energy(&after)).abs() < 1e-5 * energy(&before));
        assert!(distance(&after, &before) > 0.1, "{}", folder.display());
        let ones = model
            .vector("model.layers.0.input_layernorm.weight", model_width(&model))
            .unwrap();
        assert!(ones.iter().all(|v| *v == 1.0));
        looked += 1;
    }
    assert!(looked >= 6);
}

fn model_width(source: &dyn WeightSource) -> usize {
    source.config()["hidden_size"].as_u64().unwrap() as usize
}

/// Quantizes the rotated model.
fn quantized(folder: &Path, options: &Options, calibration: Option<&Calibration>) -> qtool::Result<Manifest> {
    let (checkpoint, transform) = rotated(folder, 3)?;
    let plan = quantize::plan(&checkpoint, options)?.transformed(&checkpoint, &options.recipe, transform)?;
    let mut manifests = match calibration {
        None => quantize::run_ranks(&checkpoint, &[plan], options)?,
        Some(calibration) => pipeline::run(&checkpoint, &[plan], options, calibration, 8)?,
    };
    Ok(manifests.swap_remove(0))
}

fn findings(folder: &Path, base: &Path) -> Vec<String> {
    let outcome = qtool::verify::run(folder, Some(base), false).unwrap();
    let text = |f: &qtool::verify::Finding| format!("{}: {}", f.subject, f.problem);
    outcome.findings.iter().map(text).collect()
}

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

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| {
        a.iter()
            .zip(b)
            .map(|(a, b)| f64::from(*a) * f64::from(*b))
            .sum::<f64>()
    };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    let all: BTreeMap<String, Vec<u8>> = entries
        .map(|p| {
            (
                p.file_name().unwrap().to_string_lossy().into_owned(),
                std::fs::read(p).unwrap(),
            )
        })
        .collect();
    assert!(all.len() > 2);
    all
}

fn corpus(model: &Path, dir: &Path) -> Corpus {
    let options = CorpusOptions {
        files: vec![ids_file(dir)],
        rows: 12,
        length: 64,
        seed: 1,
    };
    Corpus::read(&options, &Tokenizer::open(model).unwrap(), 4096).unwrap()
}

/// What each block of a model sees of these rows.
fn observed(model: &Model<CpuBackend>, corpus: &Corpus) -> Vec<BlockStatistics> {
    let batch = Batch::new(corpus.rows());
    let mut x = model.embed(&batch).unwrap();
    let place = model.place(&batch);
    (0..model.decoder().blocks)
        .map(|number| {
            let block = model.block(number).unwrap();
            let mut recorder = Recorder::new(model.backend(), Evidence::Full);
            model.run(&block, &mut x, &place, Some(&mut recorder));
            recorder.block
        })
        .collect()
}

#[test]
fn statistics_are_those_of_the_rotated_model() {
    for name in SAMPLES {
        let dir = tempfile::tempdir().unwrap();
        let base = sample(name);
        let corpus = corpus(&base, dir.path());
        let (checkpoint, transform) = rotated(&base, 5).unwrap();
        let plain = model(Arc::new(Source::open(&base).unwrap()));
        let turned = model(Arc::new(
            Transformed::new(checkpoint, Arc::clone(&transform)).unwrap(),
        ));
        let mut looked = 0;
        for (original, direct) in observed(&plain, &corpus)
            .into_iter()
            .zip(observed(&turned, &corpus))
        {
            let (original, direct) = (Observed::new(original, 0), direct);
            let derived = TransformedEvidence::new(&original, &transform);
            for input in &direct.inputs {
                // A router's choice may flip between experts that are as good as equal.
                if input.stats.rows() == 0 {
                    continue;
                }
                let found = derived.evidence(&input.tensors[0]).unwrap().unwrap().stats;
                assert_eq!(found.rows(), input.stats.rows(), "{name} {:?}", input.tensors);
                let (a, b) = (found.hessian().unwrap(), input.stats.hessian().unwrap());
                let scale = b.iter().fold(0f64, |t, v| t.max(v.abs()));
                let far = a.iter().zip(&b).fold(0f64, |t, (a, b)| t.max((a - b).abs()));
                assert!(far < 1e-4 * scale, "{name} {:?}: {far} of {scale}", input.tensors);
                assert!(
                    found
                        .absmax()
                        .iter()
                        .zip(input.stats.absmax())
                        .all(|(bound, top)| *bound >= top * 0.999)
                );
                looked += 1;
            }
        }
        assert!(looked >= 8, "{looked}");
    }
}

#[test]
fn calibrated_and_rotated_either_way() {
    let dir = tempfile::tempdir().unwrap();
    let base = sample("tiny-ernie45-moe");
    for (way, calibration) in [
        ("sequential", Calibration::Sequential(corpus(&base, dir.path()))),
        ("one-pass", Calibration::OnePass(corpus(&base, dir.path()))),
    ] {
        let out = dir.path().join(way);
        let options = with_recipe(&out, "bits:4,group:32,method:gptq", &[], &[]);
        let manifest = quantized(&base, &options, Some(&calibration)).unwrap();
        assert_eq!(findings(&out, &base), Vec::<String>::new(), "{way}");
        let proxies: Vec<f64> = manifest
            .tensors
            .iter()
            .filter_map(|t| match &t.stored {
                Stored::Quantized(q) => q.proxy_error,
                Stored::Kept { .. } => None,
            })
            .collect();
        assert!(
            proxies.len() > 10 && proxies.iter().all(|p| *p < 0.05),
            "{way}: {proxies:?}"
        );
    }
}

#[test]
fn what_cannot_be_rotated_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let base = sample("tiny-ernie45");
    let message = |folder: &Path| rotated(folder, 0).map(|_| ()).unwrap_err().to_string();
    let with = |name: &str, config: &dyn Fn(&mut serde_json::Value), tensor: Option<(&str, Tensor)>| {
        let folder = dir.path().join(name);
        let mut tensors = read_model(&base);
        tensors.extend(tensor.map(|(name, t)| (name.to_owned(), t)));
        write_model(&folder, &tensors);
        let mut json: serde_json::Value =
            serde_json::from_slice(&std::fs::read(base.join("config.json")).unwrap()).unwrap();
        config(&mut json);
        std::fs::write(folder.join("config.json"), json.to_string()).unwrap();
        folder
    };
    let encoder = with("encoder", &|c| c["model_type"] = "bert".into(), None);
    assert!(message(&encoder).contains("RMS norms"), "{}", message(&encoder));
    let extra = Tensor::floats(FloatDtype::F32, &[2, 2], &[1.0; 4]);
    let stranger = with(
        "stranger",
        &|_| {},
        Some(("model.mtp_block.0.mlp.down_proj.weight", extra)),
    );
    let text = message(&stranger);
    assert!(text.contains("mtp_block") && text.contains("--rotate"), "{text}");
    // NaN in a tensor that is made as a whole, and in one that is made by rows.
    for tensor in [
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.self_attn.v_proj.weight",
    ] {
        let mut tensors = read_model(&base);
        let bad = tensors.iter_mut().find(|(name, _)| name == tensor).unwrap();
        assert_eq!(bad.1.dtype, Dtype::BF16);
        let k = bad.1.shape[1];
        bad.1.bytes[(2 * k + 5) * 2..][..2].copy_from_slice(&[0xc0, 0x7f]);
        let folder = dir.path().join(format!("nan-{}", tensor.len()));
        write_model(&folder, &tensors);
        std::fs::copy(base.join("config.json"), folder.join("config.json")).unwrap();
        let out = dir.path().join("out");
        let text = quantized(&folder, &with_recipe(&out, "bits:4", &[], &[]), None)
            .unwrap_err()
            .to_string();
        assert!(text.contains(tensor) && text.contains("[2, 5]"), "{text}");
        assert!(!out.exists());
    }
    // An artifact whose record was tampered with.
    let out = dir.path().join("tampered");
    quantized(&base, &with_recipe(&out, "bits:8", &[], &[]), None).unwrap();
    let path = out.join("qtool.json");
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains("\"seed\": 3"));
    std::fs::write(&path, text.replace("\"seed\": 3", "\"seed\": 4")).unwrap();
    assert!(Artifact::open(&out).is_ok());
    let found = findings(&out, &base);
    assert!(found.iter().any(|f| f.contains("relative MSE")), "{found:?}");
    std::fs::write(&path, text.replace("hadamard", "hadamart")).unwrap();
    let refused = qtool::verify::run(&out, Some(&base), false)
        .unwrap_err()
        .to_string();
    assert!(
        refused.contains("hadamart") && refused.contains("qtool that made it"),
        "{refused}"
    );
}
