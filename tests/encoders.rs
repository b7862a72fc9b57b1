//! Running encoders, against what Hugging Face transformers computes (`tests/golden/encoders`).

mod calibration;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use qtool::model::{Batch, Encoder, Model};
use qtool::source::{Overlay, Source};
use qtool::tokenizer::Tokenizer;
use qtool_formats::FloatDtype;
use qtool_formats::artifact::{Artifact, Stored};
use qtool_formats::checkpoint::Checkpoint;
use qtool_kernels::{Backend, CpuBackend, Isa};

use crate::flow::{quantize, with_recipe};
use crate::forward::distance;

/// Largest difference as a share of the largest value of the reference.
const CLOSE: f32 = 1e-4;

/// The encoders, and whether each has a classification head.
const CASES: [(&str, usize); 4] = [("bert", 3), ("bert-bare", 0), ("ernie", 5), ("roberta", 2)];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/encoders")
        .join(name)
}

fn try_open(folder: &Path) -> qtool::Result<Encoder<CpuBackend>> {
    let source = Arc::new(Source::open(folder)?);
    Encoder::open(CpuBackend::new(Isa::best()), source)?.load()
}

fn open(folder: &Path) -> Encoder<CpuBackend> {
    try_open(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()))
}

/// Ids, types and tasks of each sequence, and what the reference makes of them.
struct Golden {
    rows: Vec<[Vec<u32>; 3]>,
    file: Checkpoint,
}

impl Golden {
    fn read(name: &str) -> Self {
        let file = Checkpoint::open(&folder(name).join("golden.safetensors")).unwrap();
        let ids = |name: &str| -> Vec<u32> {
            let found = file.file_of(name).map(|_| file.tensor(name).unwrap().bytes());
            let (words, _) = found.unwrap_or_default().as_chunks();
            words.iter().map(|b| i64::from_le_bytes(*b) as u32).collect()
        };
        let rows: Vec<_> = (0..4)
            .map(|i| ["ids", "types", "tasks"].map(|what| ids(&format!("{what}.{i}"))))
            .collect();
        assert!(rows.iter().all(|[ids, ..]| !ids.is_empty()));
        Self { rows, file }
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        FloatDtype::F32.widen(self.file.tensor(name).unwrap().bytes())
    }

    fn batch(&self, rows: &[usize]) -> Batch {
        let of =
            |what: usize| -> Vec<u32> { rows.iter().flat_map(|&r| self.rows[r][what].clone()).collect() };
        let ids: Vec<_> = rows.iter().map(|&r| self.rows[r][0].clone()).collect();
        Batch::new(&ids).with_types(of(1)).with_tasks(of(2))
    }
}

#[test]
fn hidden_states_logits_and_means_are_the_reference_librarys() {
    for (name, labels) in CASES {
        let (model, golden) = (open(&folder(name)), Golden::read(name));
        let down = |x| model.backend().download(&x);
        assert_eq!(model.labels(), labels, "{name}");
        let all = golden.batch(&[0, 1, 2, 3]);
        let near = |got: &[f32], expected: &[f32], what: &str| {
            let off = distance(got, expected);
            assert!(off <= CLOSE, "{name}, {what}: {off:e}");
        };
        let mut hidden = Vec::new();
        for row in 0..4 {
            let expected = golden.floats(&format!("hidden.{row}"));
            let batch = golden.batch(&[row]);
            near(&down(model.hidden(&batch).unwrap()), &expected, "hidden, alone");
            let means = golden.floats("means");
            let mean = &means[row * 64..(row + 1) * 64];
            near(&down(model.embed(&batch).unwrap()), mean, "mean, alone");
            hidden.extend(expected);
            if labels > 0 {
                let logits = golden.floats("logits");
                let expected = &logits[row * labels..(row + 1) * labels];
                near(&down(model.classify(&batch).unwrap()), expected, "logits, alone");
            }
        }
        near(&down(model.hidden(&all).unwrap()), &hidden, "hidden, together");
        for expected in ["means", "padded_means"] {
            let got = down(model.embed(&all).unwrap());
            near(&got, &golden.floats(expected), expected);
        }
        if labels > 0 {
            for expected in ["logits", "padded_logits"] {
                let got = down(model.classify(&all).unwrap());
                near(&got, &golden.floats(expected), expected);
            }
        }
    }
}

/// Types and tasks reach the logits: none given means all are 0, as in the reference library.
#[test]
fn types_and_tasks_matter_where_there_are_any() {
    for (name, what) in [("bert", 1), ("ernie", 1), ("ernie", 2)] {
        let (model, golden) = (open(&folder(name)), Golden::read(name));
        let all = golden.batch(&[0, 1, 2]);
        let zeros = vec![0; all.ids().len()];
        let (without, zeroed) = match what {
            1 => (all.clone().with_types(vec![]), all.clone().with_types(zeros)),
            _ => (all.clone().with_tasks(vec![]), all.clone().with_tasks(zeros)),
        };
        let logits = |batch: &Batch| model.backend().download(&model.classify(batch).unwrap());
        assert!(logits(&without) == logits(&zeroed), "{name} {what}");
        assert!(distance(&logits(&without), &logits(&all)) > 1e-2, "{name} {what}");
    }
}

#[test]
fn threads_change_no_bit() {
    let (model, golden) = (open(&folder("ernie")), Golden::read("ernie"));
    let batch = golden.batch(&[2, 0, 1, 2, 3, 0]);
    let run = |threads| {
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(threads)
            .build()
            .unwrap();
        pool.install(|| model.backend().download(&model.classify(&batch).unwrap()))
    };
    let one = run(1);
    assert!(run(2) == one && run(3) == one);
}

/// An artifact runs on its packed bytes, and gives what its decoded weights give. Tables, norms, pooler and
/// classifier are kept unless a rule says otherwise.
#[test]
fn artifacts_run_as_their_decoded_weights() {
    for (name, labels) in CASES {
        for (default, rules, expected) in [
            ("bits:8", &[][..], 12),
            ("bits:4,group:32,grid:zp", &[], 12),
            ("bits:2", &["word_embeddings=bits:4,group:32"], 13),
        ] {
            let dir = tempfile::tempdir().unwrap();
            let target = dir.path().join("out");
            quantize(&folder(name), &with_recipe(&target, default, &[], rules));
            let artifact = Artifact::open(&target).unwrap();
            let base = Arc::new(Source::open(&folder(name)).unwrap());
            let mut overlay = Overlay::new(base.as_ref());
            let mut quantized = 0;
            for record in &artifact.manifest().tensors {
                if let Stored::Quantized(q) = &record.stored {
                    let weight = artifact.weight_rows(q, 0, q.rows).unwrap();
                    let mut values = vec![0f32; q.rows * q.columns];
                    for (n, row) in values.chunks_exact_mut(q.columns).enumerate() {
                        weight.dequantize_row(n, row);
                    }
                    overlay.insert(&record.name, q.columns, &values);
                    quantized += 1;
                }
            }
            assert_eq!(quantized, expected, "{name} {default}");
            let golden = Golden::read(name);
            let batch = golden.batch(&[0, 1, 2, 3]);
            let packed = open(&target);
            let packed = packed.backend().download(&packed.hidden(&batch).unwrap());
            // Only layers can be read from an overlay: the table's effect is seen in the distance below.
            let dense = open(&folder(name));
            if expected == 12 {
                let mut x = dense.begin(&batch).unwrap();
                for layer in 0..dense.shape().layers {
                    dense.run(&dense.layer_from(layer, &overlay).unwrap(), &mut x, &batch, None);
                }
                let off = distance(&packed, &dense.backend().download(&x));
                assert!(off < 1e-5, "{name} {default}: {off:e}");
            }
            let plain = dense.backend().download(&dense.hidden(&batch).unwrap());
            assert!(distance(&packed, &plain) > 1e-4, "{name} {default} {labels}");
        }
    }
}

#[test]
fn rows_are_cut_as_the_reference_library_cuts_them() {
    let tokenizer = Tokenizer::open(&folder("bert")).unwrap();
    let rows = std::fs::read(folder("bert").join("rows.json")).unwrap();
    let rows: Vec<serde_json::Value> = serde_json::from_slice(&rows).unwrap();
    assert!(rows.len() >= 200);
    let mut cut = 0;
    for row in &rows {
        let (a, b) = (row["a"].as_str().unwrap(), row["b"].as_str());
        let most = row["most"].as_u64().unwrap() as usize;
        let got = tokenizer.encode_row(a, b, most).unwrap();
        assert_eq!(
            serde_json::json!([got.ids, got.types]),
            serde_json::json!([row["ids"], row["types"]]),
            "{a:?} {b:?} {most}"
        );
        let whole = tokenizer.encode_row(a, b, 10_000).unwrap();
        assert_eq!(got.cut, whole.ids.len() - got.ids.len(), "{a:?} {b:?} {most}");
        cut += usize::from(got.cut > 0);
    }
    assert!(cut > 20, "{cut}");
    let message = tokenizer.encode_row("a", Some("b"), 2).unwrap_err().to_string();
    assert!(message.contains("more than 2"), "{message}");
    let rows: Vec<_> = [("the cat", Some("a dog")), ("你好", None)]
        .map(|(a, b)| tokenizer.encode_row(a, b, 64).unwrap())
        .into();
    let model = open(&folder("bert"));
    let logits = model.classify(&Batch::of_rows(&rows)).unwrap();
    assert_eq!(model.backend().dims(&logits), (2, 3));
}

#[test]
fn what_cannot_run_says_why() {
    let edited = |name: &str, key: &str, value: serde_json::Value| {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (folder(name), dir.path());
        std::fs::copy(from.join("model.safetensors"), to.join("model.safetensors")).unwrap();
        let bytes = std::fs::read(from.join("config.json")).unwrap();
        let mut config: serde_json::Value = serde_json::from_slice(&bytes).unwrap();
        config[key] = value;
        std::fs::write(to.join("config.json"), config.to_string()).unwrap();
        try_open(to).map(|_| ()).unwrap_err().to_string()
    };
    for (name, key, value, expected) in [
        (
            "bert",
            "model_type",
            serde_json::json!("deberta"),
            "\"deberta\" cannot be run as an encoder",
        ),
        (
            "bert",
            "position_embedding_type",
            serde_json::json!("relative_key"),
            "relative_key",
        ),
        ("bert", "is_decoder", serde_json::json!(true), "is_decoder"),
        (
            "bert",
            "num_attention_heads",
            serde_json::json!(5),
            "do not divide",
        ),
        ("bert", "hidden_size", serde_json::Value::Null, "\"hidden_size\""),
        ("bert", "num_hidden_layers", serde_json::json!(3), "layer.2"),
        ("bert", "id2label", serde_json::json!({"0": "a"}), "classifier"),
        ("bert", "hidden_act", serde_json::json!("softplus"), "softplus"),
        (
            "ernie",
            "task_type_vocab_size",
            serde_json::json!(4),
            "task_type_embeddings",
        ),
        ("roberta", "pad_token_id", serde_json::json!(90), "pad_token_id"),
    ] {
        let message = edited(name, key, value);
        assert!(message.contains(expected), "{name} {key}: {message}");
        assert_eq!(message.lines().count(), 1, "{message}");
    }
    let (bert, bare) = (open(&folder("bert")), open(&folder("bert-bare")));
    let said = |outcome: qtool::Result<<CpuBackend as Backend>::Tensor>| {
        outcome.map(|_| ()).unwrap_err().to_string()
    };
    let one = Batch::new(&[[5u32, 6]]);
    let message = said(bare.classify(&one));
    assert!(message.contains("no sequence-classification head"), "{message}");
    for (batch, expected) in [
        (Batch::new(&[[5u32, 96]]), "token id 96"),
        (Batch::new(&[vec![5u32], vec![]]), "0 tokens"),
        (Batch::new(&[vec![5u32; 65]]), "65 tokens"),
        (one.clone().with_types(vec![0, 2]), "token type 2"),
        (one.clone().with_types(vec![0]), "1 token types were given for 2"),
    ] {
        let message = said(bert.hidden(&batch));
        assert!(message.contains(expected), "{expected}: {message}");
    }
    let ernie = open(&folder("ernie"));
    let message = said(ernie.embed(&one.with_tasks(vec![0, 3])));
    assert!(message.contains("task type 3"), "{message}");
    // An encoder is no language model.
    let source = Arc::new(Source::open(&folder("bert")).unwrap());
    let opened = Model::open(CpuBackend::new(Isa::best()), source);
    let message = opened.map(|_| ()).unwrap_err().to_string();
    assert!(
        message.contains("the encoder \"bert\" cannot be run as a language model"),
        "{message}"
    );
}
