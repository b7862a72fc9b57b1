//! A device that fails while a command runs: one sentence, status 2, and nothing lost. Needs the library of
//! `kernels/cuda/host/build`, which fails when told to.
//!
//! A command makes hundreds of calls that may fail. Of those that make the device ready the first are tried (finding it, opening it, the
//! first kernels, which the others are like), and of those of its work [`SAMPLED`], spread evenly; the ways to fail take turns. A device that failed by anything but memory fails from then on, as a real one does.

use std::fs;
use std::path::Path;
use std::process::Output;

use serde_json::Value;

use super::commands::{Bench, files};
use super::gpu;
use crate::gpu::skipped;

/// Calls that are tried of those that make the device ready.
const FIRST: u64 = 45;
/// Calls that are tried of those at work.
const SAMPLED: u64 = 11;
/// Out of memory, a failed launch, a lost device.
const CODES: [u64; 3] = [2, 719, 46];

/// Whether the driver is the one that fails when told to.
fn fake(test: &str) -> bool {
    match gpu(test) {
        Some(gpu) if gpu.device().name() == "host shim" => true,
        Some(_) => {
            skipped(test, &"a real driver does not fail when told to");
            false
        }
        None => false,
    }
}

/// How often the command makes a call that may fail, when none does.
fn calls(bench: &Bench, line: &str) -> u64 {
    let path = bench.at("calls.txt");
    let output = bench.run(line, &[("QTOOL_FAKE_CUDA_COUNT", path.display().to_string())]);
    assert_eq!(
        output.status.code(),
        Some(0),
        "{line}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    fs::read_to_string(&path).unwrap().trim().parse().unwrap()
}

/// Calls of a command to fail, with their codes.
fn tried(bench: &Bench, line: &str) -> Vec<(u64, u64)> {
    let (ready, all) = (calls(bench, "device"), calls(bench, line));
    assert!(ready > FIRST && all > ready + SAMPLED, "{ready} of {all}");
    let later = (0..SAMPLED).map(|i| ready + 1 + i * (all - ready) / SAMPLED);
    (1..=FIRST)
        .chain(later)
        .enumerate()
        .map(|(i, call)| (call, CODES[i % CODES.len()]))
        .collect()
}

/// Runs the command with that call failing. `true` when it said so in one sentence; `false` when the failure came too late
/// to matter.
#[track_caller]
fn fails_cleanly(bench: &Bench, line: &str, (call, code): (u64, u64)) -> (bool, String) {
    let output = bench.run(
        line,
        &[
            ("QTOOL_FAKE_CUDA_FAIL", call.to_string()),
            ("QTOOL_FAKE_CUDA_CODE", code.to_string()),
        ],
    );
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let what = format!("call {call}, code {code}: {said}");
    if succeeded(&output) {
        assert!(said.is_empty(), "{what}");
        return (false, said);
    }
    assert_eq!(output.status.code(), Some(2), "{what}");
    assert!(said.starts_with("error: ") && said.lines().count() == 1, "{what}");
    assert!(
        said.contains("host shim") || said.contains("NVIDIA driver"),
        "{what}"
    );
    let reason = if code == 2 {
        "out of GPU memory"
    } else {
        "failure that was asked for"
    };
    assert!(said.contains(reason), "{what}");
    (true, said)
}

fn succeeded(output: &Output) -> bool {
    output.status.code() == Some(0)
}

/// Names in the bench's folder, sorted.
fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

#[test]
fn validate_keeps_its_answers() {
    const TASK: &str =
        "--task question-matching=pairs.tsv --prompt question-matching=prompt.jinja --resamples 50";
    if !fake("gpu::failures::validate_keeps_its_answers") {
        return;
    }
    let bench = Bench::new(1);
    let report = |name: &str| {
        // So little memory that batches are small, and some are answered before others fail.
        format!(
            "validate model int8 --unverified {TASK} --items --device cuda --device-memory 64MiB --report {name}.json"
        )
    };
    bench.json("quantize model -o int8 --bits 8 --device cpu --json");
    let whole = report("whole");
    let count = calls(&bench, &whole);
    let items = |name: &str| {
        let report: Value =
            serde_json::from_str(&fs::read_to_string(bench.at(&format!("{name}.json"))).unwrap()).unwrap();
        report["tasks"][0]["items"].clone()
    };
    let (mut told, mut resumed, mut most) = (0, 0, 0);
    for (number, (call, code)) in tried(&bench, &whole).into_iter().enumerate() {
        let name = format!("run-{number}");
        let (failed, said) = fails_cleanly(&bench, &report(&name), (call, code));
        if !failed {
            assert_eq!(items(&name), items("whole"));
            continue;
        }
        told += 1;
        assert!(!bench.at(&format!("{name}.json")).exists(), "{said}");
        if !said.contains("answers are kept") {
            continue;
        }
        assert!(said.contains("--resume"), "{said}");
        let kept = said.split("; ").nth(1).and_then(|rest| rest.split(' ').next());
        most = most.max(kept.unwrap().parse::<u64>().unwrap());
        let output = bench.run(&(report(&name) + " --resume"), &[]);
        assert!(succeeded(&output), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(items(&name), items("whole"));
        resumed += 1;
    }
    assert!(
        told as u64 >= SAMPLED + FIRST - 4 && resumed >= 3,
        "{told} {resumed}"
    );
    // Answers of one kind of device are not mixed with those of another.
    let line = report("mixed");
    let (failed, said) = fails_cleanly(&bench, &line, (count * 9 / 10, 719));
    assert!(failed && said.contains("answers are kept"), "{said}");
    let output = bench.run(&(line.replace("cuda", "cpu") + " --resume"), &[]);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2));
    assert!(said.contains("whose device differ"), "{said}");
}

#[test]
fn calibrate_and_quantize_leave_nothing_half_done() {
    if !fake("gpu::failures::calibrate_and_quantize_leave_nothing_half_done") {
        return;
    }
    const ROWS: &str = "--rows 8 --length 4 --device cuda --force";
    let bench = Bench::new(1);
    for (start, more) in [
        ("calibrate model --data ids.jsonl", ""),
        ("quantize model --bits 4 --calib ids.jsonl", ".out.qtool-blocks"),
        ("quantize model --bits 8", ""),
    ] {
        let failures = tried(&bench, &format!("{start} -o whole {ROWS}"));
        let line = format!("{start} -o out {ROWS}");
        let before = names(bench.at("").as_path());
        let mut told = 0;
        for (number, failure) in failures.into_iter().enumerate() {
            let (failed, said) = fails_cleanly(&bench, &line, failure);
            if failed {
                told += 1;
                let left = names(bench.at("").as_path());
                let left: Vec<&String> = left.iter().filter(|name| !before.contains(*name)).collect();
                assert!(left.iter().all(|name| *name == more), "{left:?}");
                let told = ["nothing was written", "are kept in", "--device cuda:0: "];
                assert!(told.iter().any(|part| said.contains(part)), "{said}");
            } else {
                assert_eq!(files(&bench.at("out")), files(&bench.at("whole")));
                fs::remove_dir_all(bench.at("out")).unwrap();
            }
            // What was kept is gone on with, and gives what an undisturbed run gives.
            if number % 12 == 11 {
                assert!(succeeded(&bench.run(&line, &[])));
                assert_eq!(files(&bench.at("out")), files(&bench.at("whole")));
                fs::remove_dir_all(bench.at("out")).unwrap();
                assert_eq!(names(bench.at("").as_path()), before);
            }
        }
        assert!(told as u64 >= FIRST + SAMPLED / 2, "{told}");
        fs::remove_dir_all(bench.at("whole")).unwrap();
        let _ = fs::remove_dir_all(bench.at(".out.qtool-blocks"));
    }
}

#[test]
fn auto_takes_the_processor_when_the_gpu_cannot_be_opened() {
    if !fake("gpu::failures::auto_takes_the_processor_when_the_gpu_cannot_be_opened") {
        return;
    }
    let bench = Bench::new(1);
    let line = "calibrate model --data ids.jsonl --rows 8 --length 4 -o out --force --json";
    let cases = [
        ("QTOOL_FAKE_CUDA_VERSION", "11080", "knows CUDA 11.8"),
        ("QTOOL_FAKE_CUDA_DEVICES", "0", "finds no GPU"),
        ("QTOOL_FAKE_CUDA_MAJOR", "7", "compute capability 7.0"),
        ("QTOOL_FAKE_CUDA_FAIL", "1", "out of GPU memory"),
        ("QTOOL_FAKE_CUDA_FAIL", "9", "out of GPU memory"),
    ];
    for (name, value, reason) in cases {
        let settings = [(name, value.to_owned())];
        let output = bench.run(line, &settings);
        let said: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert!(said["device"].as_str().unwrap().starts_with("cpu ("), "{said}");
        let why = said["device_reason"].as_str().unwrap();
        assert!(
            why.starts_with("no GPU is used: ") && why.contains(reason),
            "{why}"
        );
        let output = bench.run(&format!("{line} --device cuda"), &settings);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{said}");
        assert!(
            said.contains(reason) && said.contains("--device cuda:0"),
            "{said}"
        );
    }
}
