//! `qtool device`: its check, comparison and bench, at toy sizes where the kernels run on the processor.

use std::process::Command;

use serde_json::Value;

use super::commands::Bench;
use super::gpu;
use crate::forward::golden;

#[test]
fn it_checks_compares_and_times() {
    let Some(found) = gpu("gpu::self_check::it_checks_compares_and_times") else {
        return;
    };
    let bench = Bench::new(1);
    let folders: Vec<String> = golden().iter().map(|f| f.display().to_string()).collect();
    let line = format!(
        "device --device cuda --check --bench --size toy --tokens 60 --json --compare {}",
        folders.join(" ")
    );
    let said = bench.json(&line);
    assert_eq!(said["device"], format!("cuda:0 ({})", found.device().name()));
    assert_eq!(said["toy"], true);
    let list = |name: &str| said[name].as_array().unwrap().clone();
    assert!(
        list("checks").len() > 65 && list("checks").iter().all(|c| c["passed"] == true),
        "{said}"
    );
    assert_eq!(list("comparisons").len(), folders.len());
    for comparison in list("comparisons") {
        assert!(comparison["compared"].as_u64().unwrap() >= 60, "{comparison}");
        assert!(
            comparison["mean_kl"].as_f64().unwrap().abs() < 1e-5 && comparison["same"] == 1.0,
            "{comparison}"
        );
    }
    let rates: Vec<f64> = list("bench")
        .iter()
        .map(|f| f["rate"].as_f64().unwrap())
        .collect();
    assert!(
        rates.len() > 45 && rates.iter().all(|rate| *rate > 0.0 && rate.is_finite()),
        "{said}"
    );
    // A device with the least shared memory there is, as GPUs of workstations have.
    if found.device().name() == "host shim" {
        let less = [
            ("QTOOL_FAKE_CUDA_SHARED", "101376".to_owned()),
            ("QTOOL_FAKE_CUDA_MAJOR", "8".to_owned()),
        ];
        let output = bench.run("device --device cuda --check --size toy", &less);
        assert_eq!(output.status.code(), Some(0), "{output:?}");
    }
    // Without the other device's numbers there is nothing to hold against.
    let output = bench.run("device --device cpu --check", &[]);
    assert_eq!(output.status.code(), Some(2));
    let said: Value = bench.json("device --json");
    assert!(said["budget_bytes"].as_u64().unwrap() > 1 << 20, "{said}");
    let products = said["bf16_products"].as_str().unwrap();
    let own = "own kernel; no cuBLASLt 12 is installed (libcublasLt.so was not found)";
    assert!(products == own || products.starts_with("cuBLASLt "), "{products}");
}

#[test]
fn a_part_that_fails_leaves_the_others_and_their_results() {
    let test = "gpu::self_check::a_part_that_fails_leaves_the_others_and_their_results";
    let Some(found) = gpu(test) else { return };
    if found.device().name() != "host shim" {
        return super::skipped(test, &"a real driver does not fail when told to");
    }
    let out = tempfile::tempdir().unwrap();
    let script = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/gpu/run");
    let run = |parts: &str, more: &[(&str, &str)]| -> (Option<i32>, Value) {
        let output = Command::new("python3")
            .arg(&script)
            .args([env!("CARGO_BIN_EXE_qtool"), "--toy", "--parts", parts, "--out"])
            .arg(out.path())
            .envs(more.iter().copied())
            .env_remove("QTOOL_REQUIRE_CUDA")
            .output()
            .unwrap();
        let files = std::fs::read_dir(out.path()).unwrap().map(|f| f.unwrap().path());
        let json: Vec<_> = files
            .filter(|f| f.extension().is_some_and(|e| e == "json"))
            .collect();
        assert_eq!(json.len(), 1, "{output:?}");
        let text = std::fs::read_to_string(&json[0]).unwrap();
        (output.status.code(), serde_json::from_str(&text).unwrap())
    };
    // A call that only the check comes to: the bench's failure would be another.
    let failing = [("QTOOL_FAKE_CUDA_FAIL", "170"), ("QTOOL_FAKE_CUDA_CODE", "719")];
    let (status, said) = run("check,sanitizer", &failing);
    assert_eq!(status, Some(1), "{said}");
    let failures = said["failures"].as_array().unwrap();
    assert_eq!(failures.len(), 1, "{said}");
    let told = said["parts"]["check"]["lines"].to_string();
    assert!(told.contains("a failure that was asked for"), "{told}");
    assert!(said["parts"]["sanitizer"]["lines"].is_array(), "{said}");
    // A later run of other parts keeps these results, and one of the same part takes their place.
    let (status, said) = run("scores", &[]);
    assert_eq!(status, Some(1), "{said}");
    assert_eq!(said["parts"].as_object().unwrap().len(), 3, "{said}");
    assert_eq!(said["failures"].as_array().unwrap().len(), 1, "{said}");
    let (status, said) = run("check", &[]);
    assert_eq!(
        (status, said["failures"].as_array().map(Vec::len)),
        (Some(0), Some(0)),
        "{said}"
    );
}
