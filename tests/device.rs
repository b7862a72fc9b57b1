//! `--device` on a machine without a usable GPU: an error when one was asked for by name, the processor and the reason
//! otherwise. GPUs that are there are hidden from these programs.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use crate::calibrate::ids_file;
use crate::cli::assert_error;
use crate::model::sample;

/// The program where no GPU can be seen.
fn blind(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_qtool"))
        .args(args)
        .env("CUDA_VISIBLE_DEVICES", "")
        .env("QTOOL_FAKE_CUDA_DEVICES", "0")
        .output()
        .unwrap()
}

/// Each command that runs models, on little data; what it writes goes into `folder`.
fn commands(folder: &Path) -> Vec<Vec<String>> {
    let model = sample("tiny-ernie45").to_string_lossy().into_owned();
    let ids = ids_file(folder).to_string_lossy().into_owned();
    let out = |name: &str| folder.join(name).to_string_lossy().into_owned();
    let pairs = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/validate/pairs.tsv");
    let pairs = format!("question-matching={}", pairs.display());
    let bare = folder.join("bare.tsv");
    std::fs::write(&bare, "a disk\ta drive\na user\ta mail\n").unwrap();
    let bare = format!("question-matching={}", bare.display());
    let rows = ["--rows", "8", "--length", "16"];
    let of = |start: &[&str], rest: &[&str]| -> Vec<String> {
        start.iter().chain(rest).map(ToString::to_string).collect()
    };
    vec![
        of(
            &["validate", &model, "--task", &pairs, "--resamples", "100"],
            &["--limit", "4"],
        ),
        of(&["predict", &model, "--task", &bare, "-o", &out("labels")], &[]),
        of(&["calibrate", &model, "--data", &ids, "-o", &out("stats")], &rows),
        of(
            &[
                "quantize",
                &model,
                "-o",
                &out("artifact"),
                "--bits",
                "4",
                "--calib",
                &ids,
            ],
            &rows,
        ),
    ]
}

fn with<'a>(command: &'a [String], more: &[&'a str]) -> Vec<&'a str> {
    command
        .iter()
        .map(String::as_str)
        .chain(more.iter().copied())
        .collect()
}

#[test]
fn a_gpu_asked_for_by_name_must_be_there() {
    let folder = tempfile::tempdir().unwrap();
    let commands = commands(folder.path());
    assert_eq!(commands.len(), 4);
    let before = std::fs::read_dir(folder.path()).unwrap().count();
    for command in &commands {
        for (device, named) in [("cuda", "--device cuda:0: "), ("cuda:3", "--device cuda:3: ")] {
            let output = blind(&with(command, &["--device", device]));
            assert_error(&output, &[named, "NVIDIA driver", "pass --device cpu"]);
        }
    }
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), before);
    // Also where nothing would run on it.
    let model = sample("tiny-ernie45").to_string_lossy().into_owned();
    let out = folder.path().join("plain").to_string_lossy().into_owned();
    let plain = ["quantize", &model, "-o", &out, "--bits", "8", "--device", "cuda"];
    assert_error(&blind(&plain), &["--device cuda:0: "]);
    let output = blind(&["validate", &model, "--task", "qa=x", "--device", "gpu"]);
    assert_eq!(output.status.code(), Some(2));
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(said.contains("expected auto, cpu, cuda, or cuda:N"), "{said}");
}

#[test]
fn auto_takes_the_processor_and_says_why() {
    let folder = tempfile::tempdir().unwrap();
    for command in &commands(folder.path()) {
        let output = blind(&with(command, &[]));
        assert_eq!(
            output.status.code(),
            Some(0),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(said.contains("cpu ("), "{command:?}: {said}");
        assert!(said.contains("no GPU is used: "), "{command:?}: {said}");
        assert!(said.contains("NVIDIA driver"), "{command:?}: {said}");
    }
    let json: Value = {
        let command = &commands(folder.path())[0];
        let report = folder.path().join("report.md").to_string_lossy().into_owned();
        let output = blind(&with(command, &["--json", "--report", &report]));
        let markdown = std::fs::read_to_string(&report).unwrap();
        assert!(markdown.contains("no GPU is used"), "{markdown}");
        serde_json::from_slice(&output.stdout).unwrap()
    };
    assert!(
        json["run"]["device"].as_str().unwrap().starts_with("cpu ("),
        "{json}"
    );
    let reason = json["run"]["device_reason"].as_str().unwrap();
    assert!(reason.starts_with("no GPU is used: "), "{reason}");
    for (i, device) in [(2, None), (3, None), (2, Some("cpu")), (3, Some("cpu"))] {
        let mut command = commands(folder.path()).swap_remove(i);
        command.extend(["--json", "--force", "--device", device.unwrap_or("auto")].map(str::to_owned));
        let output = blind(&with(&command, &[]));
        let json: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(json["device"].as_str().unwrap().starts_with("cpu ("), "{json}");
        assert_eq!(json["device_reason"].is_null(), device.is_some(), "{json}");
    }
    let index = std::fs::read_to_string(folder.path().join("stats/stats.json")).unwrap();
    assert!(index.contains("\"device\": \"cpu\""), "{index}");
    let manifest = std::fs::read_to_string(folder.path().join("artifact/qtool.json")).unwrap();
    assert!(
        !manifest.contains("device"),
        "an artifact does not depend on the device"
    );
}
