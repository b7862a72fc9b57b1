//! A served model beside a folder, by a server that does not always behave.

use serde_json::{Value, json};

use super::program::{data, models};
use crate::cli::{assert_error, qtool};
use crate::endpoint::server::{Act, Server};

/// Says 1 to questions on packages, fails for good on services, and babbles about networks.
fn server() -> Server {
    Server::start(|asked| {
        let prompt = asked.body.to_string();
        let last = prompt.rsplit("问题一").next().unwrap_or_default();
        let said = |text: &str| {
            Act::Json(
                json!({"choices": [{"text": text, "index": 0, "finish_reason": "stop"}], "usage": {"total_tokens": 5}}),
            )
        };
        match asked.path.as_str() {
            "/v1/models" => Act::Json(json!({"object": "list", "data": [{"id": "little"}]})),
            _ if asked.body.get("logprobs").is_some() => Act::Status(400, "", "no logprobs here".to_owned()),
            _ if last.contains("服务") => Act::Status(500, "", "broken".to_owned()),
            _ if last.contains("网络") => said("perhaps"),
            _ if last.contains("软件包") => said("{\"result\": 1}"),
            _ => said("{\"result\": 0}"),
        }
    })
}

#[test]
fn every_failure_of_a_server_is_counted() {
    let server = server();
    let m = models();
    let task = format!("question-matching={}", data("pairs.tsv"));
    let asked = [
        "--endpoint",
        &server.url,
        "--model",
        "little",
        "--ask",
        "generate",
        "--retries",
        "0",
        "--timeout",
        "20",
    ];
    let mut args = vec![
        "validate",
        m.base.as_str(),
        "--task",
        &task,
        "--json",
        "--items",
        "--resamples",
        "50",
    ];
    args.extend(asked);
    let output = qtool(&args);
    assert_eq!(
        output.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&report["models"][0]["label"], &report["models"][1]["label"]),
        (&json!("BASE"), &json!("little"))
    );
    let task = &report["tasks"][0];
    // Two pairs on services fail; two on networks are answered by no label; of the eight others the two on
    // packages get 1 (one of them right), six get 0 (three of them right).
    assert_eq!(task["counts"]["no answer: status 500"], json!([0, 2]));
    assert_eq!(task["counts"]["unparsable replies"], json!([0, 2]));
    assert_eq!(task["metrics"][0]["values"][1]["value"], json!(0.5));
    let items = task["items"].as_array().unwrap();
    assert_eq!(items.iter().filter(|i| i["predictions"][1].is_null()).count(), 4);

    let likelihood = format!("question-matching={}", data("pairs.tsv"));
    let refused = qtool(&["validate", "--endpoint", &server.url, "--task", &likelihood]);
    assert_error(&refused, &["question-matching", "--ask generate"]);
    let nobody = ["validate", "--task", likelihood.as_str()];
    assert_eq!(qtool(&nobody).status.code(), Some(2));
}

#[test]
fn predictions_of_a_server_need_a_fallback_where_it_fails() {
    let server = server();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bare.tsv");
    std::fs::write(
        &path,
        "如何查看软件包\t怎样看软件包\n怎样停止服务\t如何停止服务\n",
    )
    .unwrap();
    let task = format!("question-matching={}", path.display());
    let mut args = vec![
        "predict",
        "--endpoint",
        server.url.as_str(),
        "--task",
        &task,
        "--ask",
        "generate",
        "--retries",
        "0",
    ];
    assert_error(
        &qtool(&args),
        &["1 of 2 items got no label", "line 2: status 500", "--fallback"],
    );
    args.extend(["--fallback", "0"]);
    let output = qtool(&args);
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "1\n0\n",
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
}
