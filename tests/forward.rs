//! Running models, against what Hugging Face transformers computes (`tests/golden/models`).

use std::path::{Path, PathBuf};
use std::sync::Arc;

use qtool::model::{Batch, Model};
use qtool::source::{Overlay, Source, WeightSource};
use qtool_formats::FloatDtype;
use qtool_formats::artifact::{Artifact, Stored};
use qtool_formats::checkpoint::Checkpoint;
use qtool_kernels::{Backend, CpuBackend, Isa};

use crate::flow::{quantize, with_recipe};
use crate::model::{SAMPLES, sample};
use crate::paddle::write_paddle;

/// Largest difference of a logit from the reference's, as a share of the largest logit.
pub const LOGITS: f32 = 1e-4;

/// Folders of the golden models.
pub fn golden() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models");
    let mut found: Vec<PathBuf> = std::fs::read_dir(root)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.join("golden.safetensors").is_file())
        .collect();
    found.sort();
    assert!(found.len() >= 6, "{found:?}");
    found
}

pub fn open(folder: &Path) -> Model<CpuBackend> {
    let source = Arc::new(Source::open(folder).unwrap());
    Model::open(CpuBackend::new(Isa::best()), source)
        .and_then(Model::load)
        .unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
}

fn logits(model: &Model<CpuBackend>, sequences: &[Vec<u32>]) -> Vec<f32> {
    let out = model.forward(&Batch::new(sequences)).unwrap();
    model.backend().download(&out)
}

pub struct Golden {
    pub ids: Vec<Vec<u32>>,
    pub logits: Vec<Vec<f32>>,
    pub padded: Vec<Vec<f32>>,
    pub reply: Vec<u32>,
}

pub fn read_golden(folder: &Path) -> Golden {
    let file = Checkpoint::open(&folder.join("golden.safetensors")).unwrap();
    let ids = |name: &str| -> Vec<u32> {
        let bytes = file.tensor(name).unwrap().bytes();
        bytes
            .as_chunks()
            .0
            .iter()
            .map(|b| i64::from_le_bytes(*b) as u32)
            .collect()
    };
    let floats = |name: String| FloatDtype::F32.widen(file.tensor(&name).unwrap().bytes());
    let count = file.names().filter(|n| n.starts_with("ids.")).count();
    assert!(count >= 4);
    Golden {
        ids: (0..count).map(|i| ids(&format!("ids.{i}"))).collect(),
        logits: (0..count).map(|i| floats(format!("logits.{i}"))).collect(),
        padded: (0..count).map(|i| floats(format!("padded.{i}"))).collect(),
        reply: ids("reply"),
    }
}

/// Largest difference as a share of the largest magnitude.
pub fn distance(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    let top = b.iter().fold(0f32, |top, b| top.max(b.abs()));
    let worst = a
        .iter()
        .zip(b)
        .fold(0f32, |worst, (a, b)| worst.max((a - b).abs()));
    worst / top
}

#[test]
fn logits_are_the_reference_librarys() {
    for folder in golden() {
        let (model, golden) = (open(&folder), read_golden(&folder));
        for ((ids, expected), padded) in golden.ids.iter().zip(&golden.logits).zip(&golden.padded) {
            let alone = logits(&model, std::slice::from_ref(ids));
            let off = distance(&alone, expected).max(distance(&alone, padded));
            assert!(off <= LOGITS, "{}: {off:e}", folder.display());
        }
        let together = logits(&model, &golden.ids);
        let off = distance(&together, &golden.logits.concat());
        assert!(off <= LOGITS, "{} in one batch: {off:e}", folder.display());
    }
}

#[test]
fn a_cache_goes_on_where_the_prompt_ended() {
    for folder in golden() {
        let (model, golden) = (open(&folder), read_golden(&folder));
        let (ids, vocabulary) = (&golden.ids[2], model.decoder().vocabulary);
        let mut cache = model.cache(ids.len());
        let mut from = 0;
        for part in [7, 1, 1, 12, 1] {
            let last = model.extend(&mut cache, &ids[from..from + part]).unwrap();
            from += part;
            let expected = &golden.logits[2][(from - 1) * vocabulary..from * vocabulary];
            let off = distance(&model.backend().download(&last), expected);
            assert!(off <= LOGITS, "{} after {from}: {off:e}", folder.display());
        }
        assert_eq!(cache.len(), from);
        let full = model
            .extend(&mut cache, &[5; 64])
            .map(|_| ())
            .unwrap_err()
            .to_string();
        assert!(full.contains("do not fit"), "{full}");
        let reply = model.generate(&golden.ids[0], golden.reply.len(), &[]).unwrap();
        assert_eq!(reply, golden.reply, "{}", folder.display());
        let stopped = model.generate(&golden.ids[0], 8, &golden.reply[..1]).unwrap();
        assert_eq!(stopped, [0u32; 0]);
    }
}

#[test]
fn both_forms_of_a_sample_run_alike() {
    let texts = [vec![1, 300, 45, 6, 7, 2000, 11], vec![9, 8, 7]];
    for name in SAMPLES {
        let dir = tempfile::tempdir().unwrap();
        let paddle = dir.path().join("paddle");
        write_paddle(&sample(name), &paddle);
        let (a, b) = (
            logits(&open(&sample(name)), &texts),
            logits(&open(&paddle), &texts),
        );
        assert!(a.iter().all(|x| x.is_finite()));
        assert!(distance(&a, &b) < 1e-5, "{name}: {}", distance(&a, &b));
    }
}

#[test]
fn threads_change_no_bit() {
    let model = open(&sample("tiny-ernie45-moe"));
    let texts: Vec<Vec<u32>> = (1..40).map(|n| (0..n * 3 % 50 + 1).collect()).collect();
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| logits(&model, &texts))
    };
    let one = run(1);
    assert!(run(2) == one && run(3) == one);
}

/// An artifact runs on its packed bytes, and gives what its decoded weights give.
#[test]
fn artifacts_run_as_their_decoded_weights() {
    let mut compared = 0;
    for folder in golden() {
        let golden = read_golden(&folder);
        for (default, rules) in [
            ("bits:8", &[][..]),
            ("bits:4,group:32,grid:zp", &[]),
            ("bits:2", &["o_proj=bits:4"]),
            ("bits:2,method:ccq25", &[]),
            ("bits:4,method:nf4", &[]),
            ("bits:4,method:nf4-dq", &[]),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let target = dir.path().join("out");
            quantize(&folder, &with_recipe(&target, default, &[], rules));
            let packed = logits(&open(&target), &golden.ids);
            let artifact = Artifact::open(&target).unwrap();
            let base = Source::open(&folder).unwrap();
            let mut overlay = Overlay::new(&base);
            for record in &artifact.manifest().tensors {
                if let Stored::Quantized(q) = &record.stored {
                    let weight = artifact.weight_rows(q, 0, q.rows).unwrap();
                    let mut values = vec![0f32; q.rows * q.columns];
                    for (n, row) in values.chunks_exact_mut(q.columns).enumerate() {
                        weight.dequantize_row(n, row);
                    }
                    overlay.insert(&record.name, q.columns, &values);
                    compared += 1;
                }
            }
            let model = open(&folder);
            let batch = Batch::new(&golden.ids);
            let mut x = model.embed(&batch).unwrap();
            let place = model.place(&batch);
            for block in 0..model.decoder().blocks {
                let block = model.block_from(block, &overlay).unwrap();
                model.run(&block, &mut x, &place, None);
            }
            let dense = model.backend().download(&model.logits(&x, None));
            let off = distance(&packed, &dense);
            assert!(off < 1e-5, "{} {default}: {off:e}", folder.display());
            let moved = distance(&packed, &golden.logits.concat());
            assert!(
                moved > 1e-4,
                "{} {default}: quantization has an effect",
                folder.display()
            );
        }
    }
    assert!(compared > 6 * 3 * 10, "{compared}");
}

/// A tied model whose file holds a head as well runs on its embedding, as in the reference library.
#[test]
fn a_tied_model_ignores_a_stored_head() {
    let folder = golden().into_iter().find(|f| f.ends_with("qwen2")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(folder.join("config.json"), dir.path().join("config.json")).unwrap();
    let mut tensors = crate::model::read_model(&folder);
    let head = crate::model::Tensor::floats(FloatDtype::F32, &[96, 64], &[7.0; 96 * 64]);
    tensors.push(("lm_head.weight".to_owned(), head));
    crate::model::write_file(&dir.path().join("model.safetensors"), &tensors);
    let ids = read_golden(&folder).ids;
    assert!(logits(&open(dir.path()), &ids) == logits(&open(&folder), &ids));
}

/// Codes that the scheme forbids are refused when the model is opened, not when they are multiplied.
#[test]
fn a_damaged_artifact_is_refused_when_opened() {
    let folder = golden().remove(0);
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("out");
    quantize(&folder, &with_recipe(&target, "bits:8", &[], &[]));
    let file = target.join("model.safetensors");
    let name = "model.layers.0.self_attn.q_proj.weight.codes";
    let mut tensors = crate::model::read_model(&target);
    let codes = tensors.iter_mut().find(|(n, _)| n == name).unwrap();
    // Symmetric INT8 leaves the lowest code out.
    codes.1.bytes[0] = 0;
    crate::model::write_file(&file, &tensors);
    let source = Arc::new(Source::open(&target).unwrap());
    let opened = Model::open(CpuBackend::new(Isa::best()), source).and_then(Model::load);
    let message = opened.map(|_| ()).unwrap_err().to_string();
    assert!(message.contains("q_proj"), "{message}");
}

#[test]
fn models_that_cannot_run_say_why() {
    let folder = &golden()[0];
    let config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap();
    let edited = |edit: &dyn Fn(&mut serde_json::Value)| {
        let dir = tempfile::tempdir().unwrap();
        std::fs::copy(
            folder.join("model.safetensors"),
            dir.path().join("model.safetensors"),
        )
        .unwrap();
        let mut config = config.clone();
        edit(&mut config);
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let source = Arc::new(Source::open(dir.path()).unwrap());
        let opened = Model::open(CpuBackend::new(Isa::best()), source).and_then(Model::load);
        opened.map(|_| ()).unwrap_err().to_string()
    };
    for (expected, edit) in [
        (
            "\"gpt2\" cannot be run",
            ("model_type", serde_json::json!("gpt2")),
        ),
        ("expected [96, 128]", ("hidden_size", serde_json::json!(128))),
        ("\"hidden_size\"", ("hidden_size", serde_json::json!(-1))),
        (
            "\"num_hidden_layers\"",
            ("num_hidden_layers", serde_json::Value::Null),
        ),
        ("layers.2", ("num_hidden_layers", serde_json::json!(3))),
        (
            "do not go together",
            ("num_key_value_heads", serde_json::json!(3)),
        ),
        ("\"tanhshrink\"", ("hidden_act", serde_json::json!("tanhshrink"))),
        (
            "yarn",
            ("rope_parameters", serde_json::json!({"rope_type": "yarn"})),
        ),
    ] {
        let message = edited(&|config| config[edit.0] = edit.1.clone());
        assert!(message.contains(expected), "{expected}: {message}");
    }
    let model = open(folder);
    let message = model
        .forward(&Batch::new(&[[1u32, 96]]))
        .map(|_| ())
        .unwrap_err()
        .to_string();
    assert!(message.contains("96"), "{message}");
    let source = Source::open(folder).unwrap();
    assert!(source.contains("model.norm.weight") && !source.contains("nothing"));
}
