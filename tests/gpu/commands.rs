//! The program itself, as built, with a GPU: the same predictions, figures and artifacts as on the processor. Runs against
//! a real driver, or against the library of `kernels/cuda/host/build`, which is slow: inputs are tiny.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use qtool::calibrate::statistics::Statistics;
use qtool_calib::LayerStats;
use qtool_calib::stats::Moment;
use qtool_formats::artifact::Artifact;
use serde_json::Value;

use super::gpu;
use crate::model::{Tensor, read_model, sample, write_file};

/// What answers may differ by: nats of an answer, and nats a token of divergence.
const CLOSE: f64 = 2e-3;

/// Columns of the query heads, and of the MLP, that are kept: enough for groups of 64.
const HEADS: usize = 128;
const MIDDLE: usize = 128;

/// The first rows and columns of a matrix.
fn cut(tensor: &Tensor, rows: usize, columns: usize) -> Tensor {
    let (n, k) = (tensor.shape[0].min(rows), tensor.shape[1].min(columns));
    let width = tensor.dtype.bitsize() / 8;
    let lines = tensor.bytes.chunks_exact(tensor.shape[1] * width).take(n);
    Tensor {
        dtype: tensor.dtype,
        shape: vec![n, k],
        bytes: lines.flat_map(|line| line[..k * width].to_vec()).collect(),
    }
}

/// A model and data for the commands: a corner of the sample model's first blocks, and a few short texts.
pub struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    /// The first `blocks` blocks of the sample model, with two of its six query heads and part of its MLP.
    pub fn new(blocks: usize) -> Self {
        let this = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        let (from, model) = (sample("tiny-ernie45"), this.at("model"));
        fs::create_dir(&model).unwrap();
        for entry in fs::read_dir(&from).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, model.join(path.file_name().unwrap())).unwrap();
        }
        let mut config: Value =
            serde_json::from_str(&fs::read_to_string(from.join("config.json")).unwrap()).unwrap();
        config["num_hidden_layers"] = blocks.into();
        config["num_attention_heads"] = 2.into();
        config["intermediate_size"] = MIDDLE.into();
        fs::write(model.join("config.json"), config.to_string()).unwrap();
        let beyond = |name: &str| {
            let number = name.split('.').find_map(|part| part.parse::<usize>().ok());
            number.is_some_and(|n| n >= blocks)
        };
        let mut tensors = read_model(&from);
        tensors.retain(|(name, _)| !beyond(name));
        assert!(tensors.len() > 5 * blocks);
        for (name, tensor) in &mut tensors {
            match name.split('.').rev().nth(1) {
                Some("q_proj") => *tensor = cut(tensor, HEADS, usize::MAX),
                Some("o_proj") => *tensor = cut(tensor, usize::MAX, HEADS),
                Some("gate_proj" | "up_proj") => *tensor = cut(tensor, MIDDLE, usize::MAX),
                Some("down_proj") => *tensor = cut(tensor, usize::MAX, MIDDLE),
                _ => {}
            }
        }
        write_file(&model.join("model.safetensors"), &tensors);
        let write = |name: &str, text: &str| fs::write(this.at(name), text).unwrap();
        write(
            "pairs.tsv",
            "disk\tdrive\t1\nmail\tuser\t0\nkernel\tmodule\t0\npackage\tpackages\t1\n",
        );
        write("bare.tsv", "disk\tdrive\nmail\tuser\n");
        write(
            "prompt.jinja",
            "{%- set answers = [\"no\", \"yes\"] -%}\n{{ text_a }} {{ text_b }}:",
        );
        let row = |i: u32| {
            format!(
                "{:?}",
                Vec::from_iter((0..4).map(|j| 3 + (i * 37 + j * j * 11) % 4000))
            )
        };
        write("ids.jsonl", &Vec::from_iter((0..8).map(row)).join("\n"));
        this
    }

    /// A path in its folder.
    pub fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The program with these arguments, in its folder, with these variables set.
    pub fn run(&self, line: &str, settings: &[(&str, String)]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_qtool"))
            .args(line.split_whitespace())
            .envs(settings.iter().map(|(name, value)| (name, value)))
            .current_dir(self.folder.path())
            .output()
            .unwrap()
    }

    /// What it prints when it must succeed.
    #[track_caller]
    pub fn json(&self, line: &str) -> Value {
        let output = self.run(line, &[]);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(0), "{line}: {said}");
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }
}

/// Names and bytes of a folder's files.
pub fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    let mut all: Vec<(String, Vec<u8>)> = entries
        .map(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, fs::read(path).unwrap())
        })
        .collect();
    all.sort();
    assert!(!all.is_empty());
    all
}

fn sums(stats: &LayerStats) -> &[f64] {
    match stats.moment() {
        Moment::Full(sums) | Moment::Diagonal(sums) => sums,
    }
}

fn items(report: &Value, task: usize) -> &[Value] {
    let items = report["tasks"][task]["items"].as_array().unwrap();
    assert!(!items.is_empty());
    items
}

/// Every number of `left` within [`CLOSE`] of that at the same place in `right`; everything else equal.
#[track_caller]
fn assert_alike(left: &Value, right: &Value, at: &str) {
    match (left, right) {
        (Value::Number(l), Value::Number(r)) => {
            let (l, r) = (l.as_f64().unwrap(), r.as_f64().unwrap());
            assert!(
                (l - r).abs() <= CLOSE * r.abs().max(1.0),
                "{at}: {l}, expected {r}"
            );
        }
        (Value::Array(l), Value::Array(r)) => {
            assert_eq!(l.len(), r.len(), "{at}");
            for (i, (l, r)) in l.iter().zip(r).enumerate() {
                assert_alike(l, r, &format!("{at}[{i}]"));
            }
        }
        (Value::Object(l), Value::Object(r)) => {
            assert!(l.keys().eq(r.keys()), "{at}");
            for (key, l) in l {
                assert_alike(l, &r[key], &format!("{at}.{key}"));
            }
        }
        _ => assert_eq!(left, right, "{at}"),
    }
}

#[test]
fn validate_gives_the_processors_predictions() {
    let Some(gpu) = gpu("gpu::commands::validate_gives_the_processors_predictions") else {
        return;
    };
    let bench = Bench::new(2);
    bench.json("quantize model -o int4 --bits 4 --json");
    let line = "validate model int4 --task question-matching=pairs.tsv --prompt question-matching=prompt.jinja \
                --items --resamples 100 --json --seed 1";
    let on = |device: &str| bench.json(&format!("{line} --device {device}"));
    let (here, there, found) = (on("cpu"), on("cuda"), on("auto"));
    let name = format!("cuda:0 ({})", gpu.device().name());
    for report in [&there, &found] {
        assert_eq!(report["run"]["device"], name.as_str());
        assert!(report["run"]["device_reason"].is_null());
        assert_eq!(items(report, 0).len(), 4);
        assert_alike(&report["tasks"][0]["items"], &here["tasks"][0]["items"], "items");
    }
    assert_eq!(there["tasks"][0]["items"], found["tasks"][0]["items"]);
    let labels = |report: &Value| {
        items(report, 0)
            .iter()
            .map(|item| item["predictions"].clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(labels(&there), labels(&here));
    // Labels of unlabelled items, by a reply that grows token by token.
    let predict = "predict int4 --task question-matching=bare.tsv --prompt question-matching=prompt.jinja \
                   --ask generate";
    for device in ["cpu", "cuda"] {
        bench.json(&format!("{predict} --device {device} -o {device}.txt"));
    }
    assert_eq!(
        fs::read(bench.at("cuda.txt")).unwrap(),
        fs::read(bench.at("cpu.txt")).unwrap()
    );
}

#[test]
fn divergences_are_the_processors() {
    let Some(_) = gpu("gpu::commands::divergences_are_the_processors") else {
        return;
    };
    let bench = Bench::new(2);
    bench.json("quantize model -o int4 --bits 4 --json");
    let ids = |i: u32| Vec::from_iter((0..7).map(|j| 3 + (i * 91 + j * j * 17) % 4000));
    let lines = Vec::from_iter((0..4).map(|i| format!("{{\"ids\": {:?}}}", ids(i))));
    fs::write(bench.at("windows.jsonl"), lines.join("\n")).unwrap();
    let line = "validate model int4 --task divergence=windows.jsonl --window 8 --items --resamples 50 --json --seed 1";
    let on = |device: &str| bench.json(&format!("{line} --device {device}"));
    let (here, there) = (on("cpu"), on("cuda"));
    let task = |report: &Value| report["tasks"][0].clone();
    for part in ["items", "metrics", "tables", "counts"] {
        assert_alike(&task(&there)[part], &task(&here)[part], part);
    }
    // The candidate is another model than the base, and the floor is not zero.
    let numbers = |report: &Value, model: usize| -> Vec<f64> {
        let kl = items(report, 0)
            .iter()
            .flat_map(|item| item["models"][model]["kl"].as_array().unwrap().clone());
        kl.map(|kl| kl.as_f64().unwrap()).collect()
    };
    for model in [0, 1] {
        let (here, there) = (numbers(&here, model), numbers(&there, model));
        assert_eq!((here.len(), there.len()), (24, 24));
        assert!(
            here.iter().all(|kl| *kl >= 0.0) && here.iter().sum::<f64>() > 0.0,
            "{here:?}"
        );
        for (here, there) in here.iter().zip(there) {
            assert!(
                (here - there).abs() < 1e-3 * here + 1e-5,
                "model {model}: {there}, expected {here}"
            );
        }
    }
}

#[test]
fn statistics_and_artifacts_are_those_of_the_processor() {
    let Some(_) = gpu("gpu::commands::statistics_and_artifacts_are_those_of_the_processor") else {
        return;
    };
    let bench = Bench::new(1);
    let rows = "--rows 8 --length 4";
    for device in ["cpu", "cuda"] {
        let said = bench.json(&format!(
            "calibrate model --data ids.jsonl -o stats-{device} {rows} --device {device} --json"
        ));
        assert!(said["device"].as_str().unwrap().starts_with(device), "{said}");
    }
    let open = |device: &str| Statistics::open(&bench.at(&format!("stats-{device}"))).unwrap();
    let (here, there) = (open("cpu"), open("cuda"));
    assert_eq!(here.index().blocks.len(), there.index().blocks.len());
    assert!(there.index().device.as_deref().unwrap().starts_with("cuda ("));
    let mut compared = 0;
    for (block, index) in here.index().blocks.iter().enumerate() {
        for input in 0..index.inputs.len() {
            let (l, r) = (
                there.load(block, input, None).unwrap(),
                here.load(block, input, None).unwrap(),
            );
            assert_eq!(l.rows(), r.rows());
            let (l, r) = (sums(&l), sums(&r));
            let top = r.iter().fold(1e-30, |top: f64, x| top.max(x.abs()));
            for (l, r) in l.iter().zip(r) {
                assert!(
                    (l - r).abs() <= 1e-5 * top,
                    "block {block}, input {input}: {l}, expected {r}"
                );
                compared += 1;
            }
        }
    }
    assert!(compared > 1000, "{compared}");
    // From the same statistics, the same bytes; and also from the weights alone.
    for (name, options) in [
        ("gptq", "--bits 4 --calib stats-cpu"),
        ("plain", "--bits 2 --effort fast"),
        ("clipped", "--bits 4 --clip mse --calib stats-cpu"),
        ("informed", "--bits 2 --effort fast --calib stats-cpu"),
    ] {
        let mut said = Value::Null;
        for device in ["cpu", "cuda"] {
            said = bench.json(&format!(
                "quantize model -o {name}-{device} {options} --device {device} --json"
            ));
        }
        // Rounding, clip search and WINT2 are done there, GPTQ is not.
        assert_eq!(
            said["encoded_on_device"].as_u64().unwrap() > 0,
            name != "gptq",
            "{said}"
        );
        let of = |device: &str| files(&bench.at(&format!("{name}-{device}")));
        assert_eq!(of("cuda"), of("cpu"), "{name}");
    }
    // Block by block, behind a forward pass on the GPU: the same artifact but for codes that last bits decide.
    for device in ["cpu", "cuda"] {
        let said = bench.json(&format!(
            "quantize model -o seq-{device} --bits 4 --calib ids.jsonl {rows} --device {device} --json"
        ));
        assert!(said["device"].as_str().unwrap().starts_with(device), "{said}");
    }
    let artifact = |device: &str| Artifact::open(&bench.at(&format!("seq-{device}"))).unwrap();
    let (here, there) = (artifact("cpu"), artifact("cuda"));
    assert_eq!(here.manifest().source, there.manifest().source);
    let (mut bytes, mut differ) = (0, 0);
    for name in here.files().names() {
        let (l, r) = (
            there.files().tensor(name).unwrap(),
            here.files().tensor(name).unwrap(),
        );
        bytes += r.bytes().len();
        differ += l.bytes().iter().zip(r.bytes()).filter(|(l, r)| l != r).count();
    }
    assert!(
        bytes > 100_000 && differ * 100 < bytes,
        "{differ} of {bytes} bytes differ"
    );
}
