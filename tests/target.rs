//! `--target-bpw` from statistics to the artifact: the budget holds with everything stored counted, experts of a
//! layer share a choice, more bits never lose more, and what is out of reach is refused by name.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use qtool::calibrate::coverage::{Stored as StoredEvidence, expert_of};
use qtool::calibrate::pipeline::{self, Calibration};
use qtool::calibrate::statistics::Statistics;
use qtool::calibrate::target::{self, Allocated};
use qtool_calib::ccq::Effort;
use qtool_calib::options::PartialOptions;
use qtool_calib::{Decision, Recipe};
use qtool_formats::artifact::{Artifact, Stored};
use qtool_formats::checkpoint::Checkpoint;
use serde_json::Value;

use crate::calibrate::{corpus, ids_file, measured};
use crate::cli::{assert_error, qtool};
use crate::flow::with_recipe;
use crate::model::{SAMPLES, sample};

const RULES: &[&str] = &[r"layers\.0\.self_attn\.o_proj=bits:8"];

fn allocate(
    model: &Path,
    statistics: &Path,
    target: f64,
    threads: usize,
) -> qtool::Result<(Recipe, Allocated)> {
    let checkpoint = Checkpoint::open(model).unwrap();
    let source = StoredEvidence::new(Statistics::open(statistics).unwrap(), 8);
    let recipe = with_recipe(Path::new("unused"), "bits:4", &[], RULES).recipe;
    let base = PartialOptions {
        effort: Some(Effort::Fast),
        ..PartialOptions::default()
    };
    target::run(&checkpoint, &recipe, (target, base), &source, threads)
}

#[test]
fn budgets_hold_and_experts_stay_together() {
    let mut layers_of_experts = 0;
    for name in SAMPLES {
        let dir = tempfile::tempdir().unwrap();
        let (model, statistics) = (sample(name), dir.path().join("statistics"));
        measured(
            &model,
            &corpus(&model, &ids_file(dir.path()), 20),
            &statistics,
            None,
            2,
        );
        let (_, any) = allocate(&model, &statistics, 5.0, 2).unwrap();
        let [least, most] = any.reachable;
        assert!(least > 2.0 && most > 12.0, "{name}: {least} {most}");
        let mut last: Option<Allocated> = None;
        for step in [1, 4] {
            let bits = least + (most - least) * f64::from(step) / 6.5;
            let (recipe, allocated) = allocate(&model, &statistics, bits, 2).unwrap();
            assert_eq!(
                allocate(&model, &statistics, bits, 1).unwrap().1,
                allocated,
                "{name}: threads"
            );
            assert!(
                allocated.reached <= bits && allocated.reached > bits - 2.0,
                "{name}: {allocated:?}"
            );
            assert!(allocated.bound <= allocated.loss);
            if let Some(last) = last {
                assert!(allocated.bound <= last.loss, "{name}: more bits, more loss");
            }
            assert!(allocated.shares.iter().any(|share| share.options == "--rule"));
            last = Some(allocated);

            let checkpoint = Checkpoint::open(&model).unwrap();
            let mut of_layer: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
            for tensor in checkpoint.tensors().map(Result::unwrap) {
                let decision = recipe.decide(tensor.name(), tensor.dtype(), tensor.shape());
                if tensor.name().contains("layers.0.self_attn.o_proj") {
                    assert!(matches!(decision, Decision::Quantize(o) if o.bits == 8));
                }
                if let Some((layer, ..)) = expert_of(tensor.name()) {
                    of_layer
                        .entry(layer.to_owned())
                        .or_default()
                        .insert(format!("{decision:?}"));
                }
            }
            for (layer, decisions) in of_layer {
                assert_eq!(decisions.len(), 1, "{layer}: {decisions:?}");
                layers_of_experts += 1;
            }
        }
        for target in [least - 0.01, most + 0.01] {
            let refused = allocate(&model, &statistics, target, 2).unwrap_err().to_string();
            let range = format!("from {least:.2} to below {most:.2}");
            assert!(
                refused.contains("out of reach") && refused.contains(&range),
                "{refused}"
            );
        }
    }
    assert!(layers_of_experts >= 2, "{layers_of_experts}");
}

/// What is promised is what lies on disk.
#[test]
fn the_artifact_has_the_bits_that_were_planned() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (sample(SAMPLES[1]), dir.path().join("out"));
    let statistics = dir.path().join("statistics");
    measured(
        &model,
        &corpus(&model, &ids_file(dir.path()), 20),
        &statistics,
        None,
        2,
    );
    let (recipe, allocated) = allocate(&model, &statistics, 5.0, 2).unwrap();
    let checkpoint = Arc::new(Checkpoint::open(&model).unwrap());
    let options = qtool::quantize::Options {
        recipe,
        ..with_recipe(&out, "bits:4", &[], &[])
    };
    let plan = qtool::quantize::plan(&checkpoint, &options).unwrap();
    let calibration = Calibration::Statistics(statistics);
    pipeline::run(&checkpoint, &mut [plan], &options, &calibration, 8).unwrap();
    let artifact = Artifact::open(&out).unwrap();
    let (mut bits, mut weights, mut widths) = (0.0, 0.0, BTreeSet::new());
    for tensor in &artifact.manifest().tensors {
        let count = tensor.shape.iter().product::<usize>() as f64;
        match &tensor.stored {
            Stored::Quantized(q) => {
                bits += q.figures.bits_per_weight * count;
                weights += count;
                widths.insert(q.scheme.bits());
            }
            Stored::Kept { reason, .. } if reason == "--target-bpw" => {
                bits += 8.0
                    * qtool_formats::FloatDtype::from_dtype(tensor.dtype)
                        .unwrap()
                        .bytes() as f64
                    * count;
                weights += count;
            }
            Stored::Kept { .. } => {}
        }
    }
    assert!(
        (bits / weights - allocated.reached).abs() < 1e-6,
        "{} {allocated:?}",
        bits / weights
    );
    assert!(widths.len() > 1, "{widths:?}");
}

#[test]
fn the_command_line_tells_the_plan() {
    let dir = tempfile::tempdir().unwrap();
    let model = sample(SAMPLES[1]);
    let path = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
    let (statistics, out) = (path("statistics"), path("out"));
    measured(
        &model,
        &corpus(&model, &ids_file(dir.path()), 20),
        Path::new(&statistics),
        None,
        2,
    );
    let model = model.to_string_lossy().into_owned();
    let common = [
        "quantize",
        &model,
        "-o",
        &out,
        "--calib",
        &statistics,
        "--min-coverage",
        "8",
        "--effort",
        "fast",
    ];
    let with = |more: &[&str]| qtool(&[&common[..], more].concat());
    let dry = with(&["--target-bpw", "4.5", "--dry-run", "--json"]);
    let plan: Value = serde_json::from_slice(&dry.stdout).unwrap();
    let allocation = &plan["allocation"];
    let reached = allocation["reached"].as_f64().unwrap();
    assert!(reached <= 4.5 && reached > 3.5, "{plan}");
    assert!(!Path::new(&out).exists());
    let words = with(&["--target-bpw", "4.5", "--dry-run"]);
    let words = String::from_utf8(words.stdout).unwrap();
    assert!(
        words.contains(&format!("{reached:.3} bits per weight")),
        "{words}"
    );

    let done = with(&["--target-bpw", "4.5", "--json"]);
    assert_eq!(done.status.code(), Some(0), "{done:?}");
    let manifest: Value =
        serde_json::from_slice(&std::fs::read(Path::new(&out).join("qtool.json")).unwrap()).unwrap();
    assert_eq!(&manifest["options"]["calibration"]["allocation"], allocation);

    std::fs::remove_dir_all(&out).unwrap();
    assert_error(&with(&["--target-bpw", "1"]), &["out of reach", "can take from"]);
    let unclear = with(&["--target-bpw", "3", "--bits", "4"]);
    assert_eq!(unclear.status.code(), Some(2));
    assert_error(
        &with(&["--target-bpw", "3", "--format", "fastdeploy"]),
        &["--w4-until"],
    );
    let alone = qtool(&["quantize", &model, "-o", &out, "--target-bpw", "3"]);
    assert_eq!(alone.status.code(), Some(2));
    assert!(!Path::new(&out).exists());
}
