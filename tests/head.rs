//! Calibration of an output head that is not the embedding: it is the last thing a model runs, and counts as a
//! block of its own.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qtool::calibrate::corpus::{Corpus, CorpusOptions, Encode};
use qtool::calibrate::pipeline::{self, Calibration};
use qtool::calibrate::statistics::Statistics;
use qtool::calibrate::{measure, sequential};
use qtool::model::Batch;
use qtool_calib::Evidence;
use qtool_formats::artifact::{Artifact, Stored};
use qtool_formats::checkpoint::Checkpoint;
use qtool_kernels::Backend;
use serde_json::Value;

use crate::flow::with_recipe;

const HEAD: &str = "lm_head.weight";
const EMBEDDING: &str = "model.embed_tokens.weight";

/// The golden model has no tokenizer; its corpus is ids.
struct IdsOnly;

impl Encode for IdsOnly {
    fn text(&self, _: &str) -> qtool::Result<Vec<u32>> {
        unreachable!("the corpus is ids")
    }

    fn messages(&self, _: &Value) -> qtool::Result<Vec<u32>> {
        unreachable!("the corpus is ids")
    }
}

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/models/llama")
}

fn corpus(folder: &Path) -> Corpus {
    let path = folder.join("ids.jsonl");
    let line = |line: u32| {
        format!(
            "{:?}",
            (0..32)
                .map(|i| 3 + (line * 37 + i * i * 11 + i * 5) % 90)
                .collect::<Vec<u32>>()
        )
    };
    fs::write(&path, (0..40).map(line).collect::<Vec<_>>().join("\n")).unwrap();
    let options = CorpusOptions {
        files: vec![path],
        rows: 40,
        length: 32,
        seed: 1,
    };
    Corpus::read(&options, &IdsOnly, 96).unwrap()
}

/// Method and proxy error of a tensor.
fn outcome(folder: &Path, name: &str) -> (String, Option<f64>) {
    let artifact = Artifact::open(folder).unwrap();
    match &artifact.record(name).unwrap().stored {
        Stored::Quantized(q) => (q.method.clone(), q.proxy_error),
        Stored::Kept { reason, .. } => panic!("{name} is kept: {reason}"),
    }
}

#[test]
fn its_statistics_are_those_of_the_final_norm() {
    let dir = tempfile::tempdir().unwrap();
    let corpus = corpus(dir.path());
    let options = measure::Options {
        target: dir.path().join("statistics"),
        force: false,
        evidence: Evidence::Full,
        slices: None,
        threads: 2,
        device: qtool::device::Device::default(),
        show_progress: false,
    };
    measure::run(&Arc::new(Checkpoint::open(&model()).unwrap()), &corpus, &options).unwrap();
    let statistics = Statistics::open(&options.target).unwrap();
    let (block, input) = statistics.find(HEAD).unwrap();
    assert_eq!(block, 2, "after both blocks");
    assert!(statistics.magnitudes(block).unwrap().is_none());
    let seen = statistics.load(block, input, None).unwrap();
    assert_eq!(seen.rows(), 40 * 32);
    let loaded = crate::forward::open(&model());
    let x = loaded.normed(&loaded.hidden(&Batch::new(corpus.rows())).unwrap());
    let x = loaded.backend().download(&x);
    for (column, got) in seen.importance().iter().enumerate() {
        let sum: f64 = x.chunks(64).map(|row| f64::from(row[column]).powi(2)).sum();
        let mean = sum / (40.0 * 32.0);
        assert!(
            (f64::from(*got) - mean).abs() <= 1e-4 * mean,
            "{column}: {got} {mean}"
        );
    }
}

#[test]
fn every_way_of_calibration_reaches_it() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let checkpoint = Arc::new(Checkpoint::open(&model()).unwrap());
    let run = |name: &str, calibration: &Calibration| {
        let rules = [
            "lm_head=bits:4,group:32,method:gptq",
            "embed_tokens=bits:4,group:32,method:gptq",
        ];
        let options = with_recipe(&at(name), "bits:4,group:32,method:gptq", &[], &rules);
        let plan = qtool::quantize::plan(&checkpoint, &options).unwrap();
        pipeline::run(&checkpoint, &mut [plan], &options, calibration, 8).unwrap();
        assert!(
            qtool::verify::run(&at(name), Some(&model()), false)
                .unwrap()
                .findings
                .is_empty()
        );
        let (method, proxy) = outcome(&at(name), HEAD);
        assert!(
            method.contains("gptq") && !method.contains("not observed"),
            "{method}"
        );
        let proxy = proxy.unwrap();
        // Nothing runs through an embedding: the manifest says that it was done without.
        let (method, none) = outcome(&at(name), EMBEDDING);
        assert!(
            method.contains("its input was not observed") && none.is_none(),
            "{method}"
        );
        proxy
    };
    let one_pass = run("one-pass", &Calibration::OnePass(corpus(dir.path())));
    let sequential = run("sequential", &Calibration::Sequential(corpus(dir.path())));
    let plain = {
        let rules = ["lm_head=bits:4,group:32,clip:mse"];
        let options = with_recipe(&at("plain"), "bits:4,group:32,clip:mse", &[], &rules);
        let plan = qtool::quantize::plan(&checkpoint, &options).unwrap();
        let calibration = Calibration::OnePass(corpus(dir.path()));
        pipeline::run(&checkpoint, &mut [plan], &options, &calibration, 8).unwrap();
        outcome(&at("plain"), HEAD).1.unwrap()
    };
    assert!(one_pass < plain, "{one_pass} {plain}");
    assert!(sequential < 1.5 * plain, "{sequential} {plain}");
}

/// A run that was stopped before its head, or after it, gives the bytes of one that was not; and what keys and
/// values looked like is kept with each block.
#[test]
fn a_run_goes_on_before_and_after_the_head() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let checkpoint = Arc::new(Checkpoint::open(&model()).unwrap());
    let rows = corpus(dir.path());
    let rules = ["lm_head=bits:8,group:32,method:gptq"];
    let options = |name: &str| with_recipe(&at(name), "bits:4,group:32,method:gptq", &[], &rules);
    let plan = |name: &str| qtool::quantize::plan(&checkpoint, &options(name)).unwrap();
    let weights = |name: &str| {
        let calibration = Calibration::Sequential(rows.clone());
        let mut plan = [plan(name)];
        pipeline::run(&checkpoint, &mut plan, &options(name), &calibration, 8).unwrap();
        fs::read(at(name).join("model.safetensors")).unwrap()
    };
    let whole = weights("whole");
    for (name, kept) in [("before", 2), ("after", 3)] {
        let options = options(name);
        let wanted = sequential::Options {
            quantize: &options,
            evidence: Evidence::Full,
            min_coverage: 8,
        };
        let decided = sequential::run(&checkpoint, &[plan(name)], &rows, &wanted).unwrap();
        assert_eq!(decided.blocks(), 3, "two blocks and a head");
        for block in 0..3 {
            let seen = decided.magnitudes(block).unwrap();
            // Two key heads of 16 columns.
            assert_eq!(seen.map(|s| s.keys.len()), (block < 2).then_some(32));
        }
        let folder = decided.folder().to_owned();
        drop(decided);
        if kept == 2 {
            fs::remove_file(folder.join("block-00002.json")).unwrap();
        }
        assert!(weights(name) == whole, "{name}");
        assert!(!folder.exists());
    }
}
