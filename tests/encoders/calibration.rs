//! Encoders are calibrated as language models are: layer by layer, in either way.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use qtool::calibrate::corpus::{Corpus, CorpusOptions, Encode};
use qtool::calibrate::measure;
use qtool::calibrate::pipeline::{self, Calibration};
use qtool::calibrate::statistics::Statistics;
use qtool::model::Batch;
use qtool::tokenizer::Tokenizer;
use qtool_calib::{Evidence, Observer};
use qtool_formats::artifact::{Artifact, Stored};
use qtool_formats::checkpoint::Checkpoint;
use qtool_kernels::{Backend, CpuBackend, Isa, Matrix};
use serde_json::Value;

use super::{folder, open};
use crate::cli::{assert_error, qtool};
use crate::flow::with_recipe;

const ROWS: usize = 24;
const LENGTH: usize = 48;

/// The corpus is ids.
struct IdsOnly;

impl Encode for IdsOnly {
    fn text(&self, _: &str) -> qtool::Result<Vec<u32>> {
        unreachable!("the corpus is ids")
    }

    fn messages(&self, _: &Value) -> qtool::Result<Vec<u32>> {
        unreachable!("the corpus is ids")
    }
}

fn corpus(dir: &Path) -> Corpus {
    let path = dir.join("ids.jsonl");
    let id = |line: usize, i: usize| 3 + (line * 37 + i * i * 11 + i * 5) % 90;
    let line = |line| format!("{:?}", (0..LENGTH).map(|i| id(line, i)).collect::<Vec<_>>());
    std::fs::write(&path, (0..ROWS).map(line).collect::<Vec<_>>().join("\n")).unwrap();
    let options = CorpusOptions {
        files: vec![path],
        rows: ROWS,
        length: LENGTH,
        seed: 1,
    };
    Corpus::read(&options, &IdsOnly, 96).unwrap()
}

/// Sums of squares of each column of each input, by every layer that reads it.
#[derive(Default)]
struct Sums(BTreeMap<String, Vec<f64>>);

impl Observer<CpuBackend> for Sums {
    fn linear_input(&mut self, weights: &[&str], x: &Matrix) {
        let backend = CpuBackend::new(Isa::best());
        let (columns, x) = (backend.dims(x).1, backend.download(x));
        for name in weights {
            let sums = self
                .0
                .entry((*name).to_owned())
                .or_insert_with(|| vec![0.0; columns]);
            for row in x.chunks(columns) {
                sums.iter_mut()
                    .zip(row)
                    .for_each(|(sum, x)| *sum += f64::from(*x).powi(2));
            }
        }
    }

    fn keys_and_values(&mut self, _: usize, _: &Matrix, _: &Matrix) {
        unreachable!("an encoder has no cache")
    }
}

#[test]
fn statistics_are_those_of_the_layers_inputs() {
    for name in ["bert", "ernie", "roberta"] {
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
        measure::run(
            &Arc::new(Checkpoint::open(&folder(name)).unwrap()),
            &corpus,
            &options,
        )
        .unwrap();
        let statistics = Statistics::open(&options.target).unwrap();
        assert_eq!(statistics.index().blocks.len(), 2);
        let model = open(&folder(name));
        let batch = Batch::new(corpus.rows());
        let mut x = model.begin(&batch).unwrap();
        let mut seen = Sums::default();
        for layer in 0..2 {
            let layer = model.layer_from(layer, model.source()).unwrap();
            model.run(&layer, &mut x, &batch, Some(&mut seen));
        }
        assert_eq!(seen.0.len(), 12, "{name}");
        for (tensor, sums) in seen.0 {
            let (block, input) = statistics.find(&tensor).unwrap();
            let stats = statistics.load(block, input, None).unwrap();
            assert_eq!(stats.rows(), (ROWS * LENGTH) as u64);
            for (got, sum) in stats.importance().iter().zip(&sums) {
                let mean = sum / (ROWS * LENGTH) as f64;
                assert!(
                    (f64::from(*got) - mean).abs() <= 1e-4 * mean.max(1e-6),
                    "{tensor}"
                );
            }
        }
    }
}

#[test]
fn evidence_lowers_the_error_its_layers_see() {
    for name in ["bert", "bert-bare", "ernie", "roberta"] {
        let dir = tempfile::tempdir().unwrap();
        let checkpoint = Arc::new(Checkpoint::open(&folder(name)).unwrap());
        let run = |to: &str, recipe: &str, calibration: &Calibration| -> f64 {
            let options = with_recipe(&dir.path().join(to), recipe, &[], &[]);
            let plan = qtool::quantize::plan(&checkpoint, &options).unwrap();
            pipeline::run(&checkpoint, &mut [plan], &options, calibration, 8).unwrap();
            let verified = qtool::verify::run(&options.target, Some(&folder(name)), false).unwrap();
            assert!(verified.findings.is_empty(), "{:?}", verified.findings);
            let artifact = Artifact::open(&options.target).unwrap();
            let errors = artifact
                .manifest()
                .tensors
                .iter()
                .filter_map(|t| match &t.stored {
                    Stored::Quantized(q) => Some(q.proxy_error.unwrap()),
                    Stored::Kept { .. } => None,
                });
            let errors: Vec<f64> = errors.collect();
            assert_eq!(errors.len(), 12);
            errors.iter().sum()
        };
        let rows = || corpus(dir.path());
        let plain = run("plain", "bits:4,group:32,clip:mse", &Calibration::OnePass(rows()));
        let informed = "bits:4,group:32,method:gptq";
        let one_pass = run("one-pass", informed, &Calibration::OnePass(rows()));
        let sequential = run("sequential", informed, &Calibration::Sequential(rows()));
        assert!(one_pass < 0.9 * plain, "{name}: {one_pass} {plain}");
        assert!(sequential < plain, "{name}: {sequential} {plain}");
    }
}

/// By the program, from text, with the encoder's own bounds.
#[test]
fn rows_fit_the_encoder() {
    let dir = tempfile::tempdir().unwrap();
    let text = dir.path().join("text.txt");
    std::fs::write(&text, "the cat sat on the mat. cats are playing! ".repeat(40)).unwrap();
    let (model, out) = (folder("bert"), dir.path().join("out"));
    let (model, to, text) = (
        model.to_str().unwrap(),
        out.to_str().unwrap(),
        text.to_str().unwrap(),
    );
    let with = |length: &str| {
        qtool(&[
            "quantize",
            model,
            "-o",
            to,
            "--bits",
            "4",
            "--group-size",
            "32",
            "--calib",
            text,
            "--length",
            length,
            "--rows",
            "6",
        ])
    };
    assert_error(&with("65"), &["--length 65", "64 positions"]);
    assert!(!out.exists());
    let output = with("64");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(Tokenizer::open(&out).is_ok() && super::try_open(&out).is_ok());
}
