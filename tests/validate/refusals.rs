//! What the program refuses, in one sentence with status 2.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::program::{data, models};
use crate::cli::{assert_error, qtool};

#[test]
fn bad_input_is_one_sentence() {
    let m = models();
    let dir = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &str| {
        let path = dir.path().join(name);
        fs::write(&path, content).unwrap();
        path.to_string_lossy().into_owned()
    };
    file("label.txt", "a\nb\n");
    let cases: [(&str, String, &[&str]); 8] = [
        (
            "question-matching",
            file("missing.tsv", "a\tb\t1\nc\td\n"),
            &["missing.tsv, line 2", "expected 3 columns", "got 2"],
        ),
        (
            "question-matching",
            file("label.tsv", "a\tb\tyes\n"),
            &["label.tsv, line 1", "expected 0 or 1", "\"yes\""],
        ),
        (
            "question-matching",
            file("empty.tsv", ""),
            &["empty.tsv", "is empty"],
        ),
        (
            "question-matching",
            file("five.tsv", "a\tb\t1\tk\tx\n"),
            &["five.tsv, line 1", "3 or 4 columns", "got 5"],
        ),
        (
            "classification",
            file("class.tsv", "a\tb\nc\tz\n"),
            &["class.tsv, line 2", "\"z\"", "a, b"],
        ),
        (
            "multiple-choice",
            file("mc.jsonl", "{\"question\": \"q\", \"choices\": [\"x\", \"y\"]}"),
            &["line 1", "answer"],
        ),
        ("perplexity", file("p.txt", "x"), &["p.txt", "too little text"]),
        ("qa", "no/such/file".to_owned(), &["no/such/file"]),
    ];
    for (task, path, parts) in cases {
        let task = format!("{task}={path}");
        assert_error(&qtool(&["validate", &m.base, "--task", &task]), parts);
    }
    let good = format!("question-matching={}", data("pairs.tsv"));
    for (args, parts) in [
        (
            vec!["--task", "mmlu=x"],
            ["task mmlu: does not exist", "question-matching"],
        ),
        (vec!["--task", "qa"], ["expected TASK=DATA", "qa"]),
        (
            vec!["--task", &good, "--task", &good],
            ["question-matching", "given twice"],
        ),
        (
            vec!["--task", &good, "--ask", "head"],
            ["question-matching", "no classification head"],
        ),
        (
            vec!["--task", &good, "--report", "x.pdf"],
            ["x.pdf", ".html, .md or .json"],
        ),
        (vec!["--task", &good, "--resume"], ["--resume", "--work DIR"]),
        (
            vec!["--task", &good, "--prompt", "no.jinja"],
            ["no.jinja", "read"],
        ),
    ] {
        let mut all = vec!["validate", m.base.as_str()];
        all.extend(args);
        assert_error(&qtool(&all), &parts);
    }
}

/// A copy of a folder.
fn copy(from: &str, to: &Path) -> PathBuf {
    fs::create_dir(to).unwrap();
    let mut copied = 0;
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
        copied += 1;
    }
    assert!(copied > 3);
    to.to_owned()
}

#[test]
fn models_that_cannot_be_compared() {
    let m = models();
    let dir = tempfile::tempdir().unwrap();
    let pairs = format!("question-matching={}", data("pairs.tsv"));
    let text = format!("divergence={}", data("text.txt"));

    let broken = copy(&m.int4, &dir.path().join("broken"));
    let weights = broken.join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&weights, bytes).unwrap();
    let broken = broken.to_string_lossy().into_owned();
    let refused = qtool(&["validate", &m.base, &broken, "--task", &pairs]);
    assert_error(&refused, &["broken: does not verify", "digest", "--unverified"]);
    let taken = qtool(&[
        "validate",
        &m.base,
        &broken,
        "--task",
        &pairs,
        "--unverified",
        "--json",
        "--resamples",
        "50",
    ]);
    assert_eq!(
        taken.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&taken.stderr)
    );

    let other = copy(&m.base, &dir.path().join("other"));
    let config = other.join("tokenizer_config.json");
    let changed = fs::read_to_string(&config).unwrap() + "\n";
    fs::write(&config, changed).unwrap();
    let tokenizer = other.join("tokenizer.json");
    let mut rules: Value = serde_json::from_slice(&fs::read(&tokenizer).unwrap()).unwrap();
    let merges = rules["model"]["merges"].as_array_mut().unwrap();
    assert!(merges.len() > 100);
    merges.truncate(100);
    let other = other.to_string_lossy().into_owned();
    let same = qtool(&["validate", &m.base, &other, "--task", &text, "--json"]);
    let said = String::from_utf8_lossy(&same.stderr);
    assert_eq!(
        same.status.code(),
        Some(0),
        "files may differ where tokens do not: {said}"
    );
    fs::write(&tokenizer, rules.to_string()).unwrap();
    let refused = qtool(&["validate", &m.base, &other, "--task", &text]);
    assert_error(&refused, &["other cannot be compared", "another tokenizer"]);
    let taken = qtool(&[
        "validate",
        &m.base,
        &other,
        "--task",
        &pairs,
        "--json",
        "--resamples",
        "50",
    ]);
    assert_eq!(
        taken.status.code(),
        Some(0),
        "labels may be compared across tokenizers"
    );

    let larger = copy(&m.base, &dir.path().join("larger"));
    let mut config: Value = serde_json::from_slice(&fs::read(larger.join("config.json")).unwrap()).unwrap();
    config["vocab_size"] = json!(4097);
    fs::write(larger.join("config.json"), config.to_string()).unwrap();
    let refused = qtool(&["validate", &m.base, &larger.to_string_lossy(), "--task", &pairs]);
    assert_error(&refused, &["embed_tokens.weight", "4097"]);
}
