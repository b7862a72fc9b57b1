//! The program on a sample model and its artifacts.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use serde_json::{Value, json};

use crate::cli::{assert_error, qtool};
use crate::flow::{quantize, with_recipe};
use crate::model::sample;

/// Hand-made data that ships with the project.
pub(super) fn data(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("examples/validate")
        .join(name);
    path.to_string_lossy().into_owned()
}

pub(super) struct Models {
    _folder: tempfile::TempDir,
    pub(super) base: String,
    pub(super) int8: String,
    pub(super) int4: String,
}

/// The sample model at 8 and 4 bits, made once.
pub(super) fn models() -> &'static Models {
    static MODELS: OnceLock<Models> = OnceLock::new();
    MODELS.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let base = sample("tiny-ernie45");
        let artifact = |name: &str, recipe: &str| {
            let target = folder.path().join(name);
            quantize(&base, &with_recipe(&target, recipe, &[], &[]));
            target.to_string_lossy().into_owned()
        };
        Models {
            int8: artifact("int8", "bits:8"),
            int4: artifact("int4", "bits:4"),
            base: base.to_string_lossy().into_owned(),
            _folder: folder,
        }
    })
}

fn report(args: &[&str]) -> Value {
    let output = qtool(args);
    assert_eq!(
        output.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

fn row<'a>(report: &'a Value, task: usize, name: &str) -> &'a Value {
    let rows = report["tasks"][task]["metrics"].as_array().unwrap();
    rows.iter()
        .find(|r| r["name"] == name)
        .unwrap_or_else(|| panic!("no {name}"))
}

#[test]
fn base_and_two_artifacts_side_by_side() {
    let m = models();
    let (pairs, text) = (
        format!("question-matching={}", data("kinds.tsv")),
        format!("perplexity={}", data("text.txt")),
    );
    let divergence = format!("divergence={}", data("text.txt"));
    let report = report(&[
        "validate",
        &m.base,
        &m.int8,
        &m.int4,
        "--task",
        &pairs,
        "--task",
        &text,
        "--task",
        &divergence,
        "--window",
        "64",
        "--json",
        "--items",
        "--resamples",
        "200",
    ]);
    let labels: Vec<&Value> = report["models"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| &m["label"])
        .collect();
    assert_eq!(labels, ["BASE", "INT8", "INT4"]);
    assert!(report["models"][1]["tensors"].as_array().unwrap().len() > 10);
    let digests: Vec<&Value> = (0..3).map(|i| &report["models"][i]["tokenizer_digest"]).collect();
    assert!(digests[0].is_string() && digests.iter().all(|d| *d == digests[0]));
    let rows = report["tasks"][0]["metrics"].as_array().unwrap();
    assert_eq!(rows[0]["group"], "macro average");
    assert_eq!(rows[1]["group"], "OPPO");
    assert_eq!(rows.len(), 8, "macro average and seven kinds");
    // More bits, less divergence; and all of it above nothing.
    let kl = |model: usize| {
        row(&report, 2, "KL to base")["values"][model]["value"]
            .as_f64()
            .unwrap()
    };
    assert!(kl(1) > 0.0 && kl(2) > 5.0 * kl(1), "{} {}", kl(1), kl(2));
    assert!(row(&report, 2, "KL to base")["values"][0].is_null());
    let floor = row(&report, 2, "KL to base")["baselines"][0][1].as_f64().unwrap();
    assert!(floor > 0.0 && floor < kl(2), "{floor}");
    let nats = |model: usize| {
        row(&report, 1, "nats per token")["values"][model]["value"]
            .as_f64()
            .unwrap()
    };
    assert!(
        nats(0) > 2.0 && nats(0) < 9.0 && (nats(1) - nats(0)).abs() < 0.1,
        "{} {}",
        nats(0),
        nats(1)
    );
    let tokens: u64 = report["tasks"][1]["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|w| w["scored_tokens"].as_u64().unwrap())
        .sum();
    assert!(tokens > 100, "{tokens}");
}

#[test]
fn every_task_runs_and_threads_change_nothing() {
    let m = models();
    let tasks = [
        format!("question-matching={}", data("pairs.tsv")),
        format!("classification={}", data("texts.txt")),
        format!("multiple-choice={}", data("choices.jsonl")),
        format!("qa={}", data("qa.jsonl")),
    ];
    let run = |threads: &str, more: &[&str]| {
        let mut args = vec![
            "validate",
            &m.base,
            &m.int4,
            "--json",
            "--items",
            "--resamples",
            "100",
            "-j",
            threads,
        ];
        for task in &tasks {
            args.extend(["--task", task.as_str()]);
        }
        args.extend(more);
        let mut report = report(&args);
        let tasks = report["tasks"].as_array_mut().unwrap();
        tasks.iter_mut().for_each(|t| t["speed"] = Value::Null);
        report["tasks"].clone()
    };
    let one = run("1", &[]);
    assert_eq!(one, run("3", &[]));
    assert_eq!(one.as_array().unwrap().len(), 4);
    let replies = format!("question-matching={}", data("pairs.tsv"));
    let generated = report(&[
        "validate",
        &m.base,
        "--task",
        &replies,
        "--ask",
        "generate",
        "--json",
        "--items",
        "--resamples",
        "100",
        "--shots",
        &data("kinds.tsv"),
        "--shots-count",
        "2",
    ]);
    let task = &generated["tasks"][0];
    assert_eq!(
        task["counts"]["unparsable replies"],
        json!([0]),
        "masking lets only labels through"
    );
    assert_eq!(task["settings"]["shots"], 2);
    let free = report(&[
        "validate",
        &m.base,
        "--task",
        &replies,
        "--ask",
        "generate",
        "--json",
        "--resamples",
        "100",
        "--unconstrained",
        "--reply-tokens",
        "4",
    ]);
    let unparsable = free["tasks"][0]["counts"]["unparsable replies"][0]
        .as_u64()
        .unwrap();
    assert!(unparsable > 0, "four tokens are no JSON");
    assert!(
        free["tasks"][0]["warnings"]
            .as_array()
            .unwrap()
            .iter()
            .any(|w| w.as_str().unwrap().contains("no "))
    );
}

#[test]
fn predictions_one_a_line_and_wrong_items() {
    let m = models();
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
    let pairs = fs::read_to_string(data("pairs.tsv")).unwrap();
    let bare: String = pairs
        .lines()
        .map(|l| l.rsplit_once('\t').unwrap().0.to_owned() + "\n")
        .collect();
    fs::write(path("bare.tsv"), bare).unwrap();
    let task = format!("question-matching={}", path("bare.tsv"));
    let output = qtool(&["predict", &m.int8, "--task", &task, "-o", &path("out.txt")]);
    assert_eq!(
        output.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let predicted = fs::read_to_string(path("out.txt")).unwrap();
    assert_eq!(predicted.lines().count(), 12);
    assert!(predicted.lines().all(|l| l == "0" || l == "1"), "{predicted}");

    let task = format!("question-matching={}", data("pairs.tsv"));
    let output = qtool(&[
        "validate",
        &m.base,
        &m.int8,
        "--task",
        &task,
        "--bad-cases",
        &path("bad_case.txt"),
        "--report",
        &path("r.json"),
        "--resamples",
        "100",
    ]);
    assert_eq!(
        output.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let report: Value = serde_json::from_slice(&fs::read(path("r.json")).unwrap()).unwrap();
    for (model, label) in ["BASE", "INT8"].into_iter().enumerate() {
        let bad = fs::read_to_string(path(&format!("bad_case.{label}.txt"))).unwrap();
        let accuracy = report["tasks"][0]["metrics"][0]["values"][model]["value"]
            .as_f64()
            .unwrap();
        assert_eq!(bad.lines().count() as f64, (12.0 * (1.0 - accuracy)).round());
        assert!(bad.lines().all(|l| l.split('\t').count() == 5), "{bad}");
        let said: Vec<&str> = predicted.lines().collect();
        if label == "INT8" {
            let wrong = pairs.lines().zip(said).filter(|(l, p)| !l.ends_with(p)).count();
            assert_eq!(bad.lines().count(), wrong, "predict and validate agree");
        }
    }
    let hidden = fs::read_dir(dir.path())
        .unwrap()
        .filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().starts_with('.'));
    assert_eq!(
        hidden.count(),
        0,
        "the answers' folder goes when the report is there"
    );
}

#[test]
fn limits_decide_the_exit_status() {
    let m = models();
    let text = format!("divergence={}", data("text.txt"));
    let pairs = format!("question-matching={}", data("pairs.tsv"));
    let status = |more: &[&str]| {
        let mut args = vec!["validate", &m.base, &m.int4, "--task", &text, "--task", &pairs];
        args.extend(["--window", "32", "--json", "--resamples", "200"]);
        args.extend(more);
        let output = qtool(&args);
        let report: Value = serde_json::from_slice(&output.stdout).unwrap();
        (
            output.status.code().unwrap(),
            report["verdict"]["outcome"].clone(),
        )
    };
    assert_eq!(status(&["--max-kl", "5"]), (0, json!("passed")));
    assert_eq!(status(&["--max-kl", "0.00001"]), (1, json!("failed")));
    assert_eq!(
        status(&["--max-kl", "5", "--max-drop", "question-matching=0.01"]),
        (3, json!("inconclusive")),
        "twelve pairs prove nothing to a hundredth of a point"
    );
    let alone = qtool(&["validate", &m.base, "--task", &text, "--max-kl", "1"]);
    assert_error(&alone, &["only a base"]);
    let other = qtool(&["validate", &m.base, &m.int4, "--task", &pairs, "--max-kl", "1"]);
    assert_error(&other, &["--max-kl", "divergence", "question-matching"]);
}

#[test]
fn what_a_run_will_take() {
    let m = models();
    let task = format!("question-matching={}", data("pairs.tsv"));
    let found = report(&[
        "validate",
        &m.base,
        &m.int4,
        "--task",
        &task,
        "--content-free",
        "--dry-run",
        "--json",
    ]);
    assert_eq!(
        (found[0]["items"].as_u64(), found[0]["questions"].as_u64()),
        (Some(12), Some(13))
    );
    assert!(found[0]["tokens"].as_u64().unwrap() > 12 * 20);
    assert!(found[0]["seconds"][1][1].as_f64().unwrap() > 0.0);
    let limited = report(&[
        "validate",
        &m.base,
        "--task",
        &task,
        "--limit",
        "4",
        "--json",
        "--items",
        "--resamples",
        "50",
    ]);
    let items = limited["tasks"][0]["items"].as_array().unwrap();
    assert_eq!(items.len(), 4);
    assert_eq!(
        items.iter().filter(|i| i["label"] == "1").count(),
        2,
        "labels keep their shares"
    );
}
