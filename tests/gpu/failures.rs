//! A device that fails while a command runs: one sentence, status 2, and nothing lost. Needs the library of
//! `kernels/cuda/host/build`, which fails when told to.
//!
//! A command makes hundreds of calls that may fail. Each is made to fail in turn, the ways to fail taking turns, with a library that runs no
//! kernel (all numbers are zeros then); and [`SAMPLED`] of them, spread evenly, with kernels that run, where what is gone on with must give
//! what undisturbed runs give. A device that failed by anything but memory fails from then on, as a real one does.

use std::fs;
use std::path::Path;
use std::process::Output;

use serde_json::Value;

use super::commands::{Bench, files};
use super::gpu;
use crate::gpu::skipped;

/// Calls that are tried with kernels that run.
const SAMPLED: u64 = 11;
/// Calls of a command, at least: finding the device, opening it and translating the kernels alone are more.
const LEAST: u64 = 100;
/// A call that finds no memory may be got around, by memory that is given back: most are not. Any other failure is told, but for those of the last
/// calls, which come too late to matter.
const LATE: u64 = 12;
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

/// Runs the command, with kernels or without.
fn run(bench: &Bench, line: &str, idle: bool, settings: &[(&str, String)]) -> Output {
    let mut all = settings.to_vec();
    all.extend(idle.then(|| ("QTOOL_FAKE_CUDA_IDLE", "1".to_owned())));
    bench.run(line, &all)
}

/// How often the command makes a call that may fail, when none does.
fn calls(bench: &Bench, line: &str, idle: bool) -> u64 {
    let path = bench.at("calls.txt");
    let output = run(
        bench,
        line,
        idle,
        &[("QTOOL_FAKE_CUDA_COUNT", path.display().to_string())],
    );
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{line}: {said}");
    let count = fs::read_to_string(&path).unwrap().trim().parse().unwrap();
    fs::remove_file(path).unwrap();
    assert!(count > LEAST, "{count}");
    count
}

/// Calls to fail, with their codes: `all`, or some of them.
fn tried(count: u64, all: bool) -> impl Iterator<Item = (u64, u64)> {
    let some = if all { count } else { SAMPLED };
    (0..some).map(move |i| (1 + i * count / some, CODES[i as usize % CODES.len()]))
}

/// Runs the command with that call failing. `true` when it said so in one sentence; `false` when the failure came too late
/// to matter.
#[track_caller]
fn fails_cleanly(bench: &Bench, line: &str, idle: bool, (call, code): (u64, u64)) -> (bool, String) {
    let settings = [
        ("QTOOL_FAKE_CUDA_FAIL", call.to_string()),
        ("QTOOL_FAKE_CUDA_CODE", code.to_string()),
    ];
    let output = run(bench, line, idle, &settings);
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

/// Of failures of a command with so many calls, those that it did not tell.
fn spared_for_a_reason(spared: &[(u64, u64)], tried: u64, last: u64) {
    let reason = |&(call, code): &(u64, u64)| code == CODES[0] || call + LATE > last;
    assert!(spared.iter().all(reason), "{spared:?}, of {last} calls");
    assert!((spared.len() as u64) < tried / 2, "{} of {tried}", spared.len());
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
        format!("validate model int8 --unverified {TASK} --items --device cuda --report {name}.json")
    };
    bench.json("quantize model -o int8 --bits 8 --device cpu --json");
    let items = |name: &str| {
        let report: Value =
            serde_json::from_str(&fs::read_to_string(bench.at(&format!("{name}.json"))).unwrap()).unwrap();
        report["tasks"][0]["items"].clone()
    };
    let kept = |said: &str| said.contains("answers are kept");
    // Every call.
    let count = calls(&bench, &report("idle"), true);
    let (mut spared, mut first_kept) = (Vec::new(), None);
    for (call, code) in tried(count, true) {
        let name = format!("idle-{call}");
        let (failed, said) = fails_cleanly(&bench, &report(&name), true, (call, code));
        assert_eq!(
            bench.at(&format!("{name}.json")).exists(),
            !failed,
            "{call}: {said}"
        );
        if !failed {
            spared.push((call, code));
        }
        if kept(&said) {
            first_kept.get_or_insert(call);
        }
    }
    spared_for_a_reason(&spared, count, count);
    // From where answers are kept on, with kernels that run: they are gone on with.
    let whole = report("whole");
    let (count, from) = (
        calls(&bench, &whole, false),
        first_kept.expect("answers that are kept"),
    );
    let mut resumed = 0;
    for (call, code) in tried(count - from, false) {
        let name = format!("run-{call}");
        let (failed, said) = fails_cleanly(&bench, &report(&name), false, (from + call, code));
        if failed && kept(&said) {
            assert!(said.contains("--resume"), "{said}");
            let output = bench.run(&(report(&name) + " --resume"), &[]);
            assert!(succeeded(&output), "{}", String::from_utf8_lossy(&output.stderr));
            resumed += 1;
        }
        if !failed || kept(&said) {
            assert_eq!(items(&name), items("whole"));
        }
    }
    assert!(resumed >= 3, "{resumed}");
    // Answers of one kind of device are not mixed with those of another.
    let line = report("mixed");
    let (failed, said) = fails_cleanly(&bench, &line, false, (count * 9 / 10, 719));
    assert!(failed && kept(&said), "{said}");
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
        // Zeros are no codes, so the last needs its kernels, which are few.
        let ways = if start.contains("ids.jsonl") {
            [(true, true), (false, false)].as_slice()
        } else {
            &[(false, true)]
        };
        for &(idle, all) in ways {
            let count = calls(&bench, &format!("{start} -o whole {ROWS}"), idle);
            let line = format!("{start} -o out {ROWS}");
            nothing_half_done(&bench, &line, more, idle, (count, all));
            fs::remove_dir_all(bench.at("whole")).unwrap();
            let _ = fs::remove_dir_all(bench.at(".out.qtool-blocks"));
        }
    }
}

/// The command with every call failing in turn, or some of them. It may leave `more` behind, and nothing else.
fn nothing_half_done(bench: &Bench, line: &str, more: &str, idle: bool, (last, all): (u64, bool)) {
    let before = names(bench.at("").as_path());
    let failures: Vec<(u64, u64)> = tried(last, all).collect();
    let (count, mut spared) = (failures.len() as u64, Vec::new());
    for (number, failure) in failures.into_iter().enumerate() {
        let (failed, said) = fails_cleanly(bench, line, idle, failure);
        if failed {
            let left = names(bench.at("").as_path());
            let left: Vec<&String> = left.iter().filter(|name| !before.contains(*name)).collect();
            assert!(left.iter().all(|name| *name == more), "{failure:?}: {left:?}");
            let told = ["nothing was written", "are kept in", "--device cuda:0: "];
            assert!(told.iter().any(|part| said.contains(part)), "{said}");
        } else {
            spared.push(failure);
            assert_eq!(files(&bench.at("out")), files(&bench.at("whole")), "{failure:?}");
            fs::remove_dir_all(bench.at("out")).unwrap();
        }
        // What was kept is gone on with, and gives what an undisturbed run gives.
        if number % if all { 40 } else { 5 } == 4 {
            assert!(succeeded(&run(bench, line, idle, &[])));
            assert_eq!(files(&bench.at("out")), files(&bench.at("whole")), "{failure:?}");
            fs::remove_dir_all(bench.at("out")).unwrap();
            assert_eq!(names(bench.at("").as_path()), before);
        }
    }
    spared_for_a_reason(&spared, count, last);
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
