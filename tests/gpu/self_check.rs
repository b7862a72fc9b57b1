//! `qtool device`: its check, comparison and bench, at toy sizes where the kernels run on the processor.

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
        list("checks").len() > 50 && list("checks").iter().all(|c| c["passed"] == true),
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
        rates.len() > 30 && rates.iter().all(|rate| *rate > 0.0 && rate.is_finite()),
        "{said}"
    );
    // Without the other device's numbers there is nothing to hold against.
    let output = bench.run("device --device cpu --check", &[]);
    assert_eq!(output.status.code(), Some(2));
    let said: Value = bench.json("device --json");
    assert!(said["budget_bytes"].as_u64().unwrap() > 1 << 20, "{said}");
    let products = said["bf16_products"].as_str().unwrap();
    let own = "own kernel; no cuBLASLt 12 is installed (libcublasLt.so was not found)";
    assert!(products == own || products.starts_with("cuBLASLt "), "{products}");
}
