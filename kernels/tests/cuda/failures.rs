//! A device that fails: every call of the driver in turn, in a process of its own each. Needs the library of
//! `kernels/cuda/host/build`, which fails when told to.

use std::process::Command;

use qtool_kernels::backend::Activation;
use qtool_kernels::cuda::probe;
use qtool_kernels::{Backend, CudaBackend};

use crate::{both, numbers, skipped};

/// What is said when a failure ends the work as it should.
const CLEAN: &str = "ended cleanly:";

/// Not a test of its own: the work that [`every_failure_is_one_sentence`] lets fail.
#[test]
#[ignore = "run by every_failure_is_one_sentence"]
fn workload() {
    let device = match probe(0) {
        Ok(device) => device,
        Err(reason) => return println!("{CLEAN} {reason}"),
    };
    let gpu = CudaBackend::new(device);
    let x = gpu.upload(&numbers(1, 6 * 8), 8);
    let gain = gpu.upload(&[1.0; 8], 8);
    let mut y = gpu.rms_norm(&x, &gain, 1e-6);
    gpu.activate(&mut y, Activation::Silu);
    gpu.add(&mut y, &x);
    let z = gpu.gather(&y, &[0, 3]);
    let mut moment = vec![0.0; 64];
    gpu.gram(&z, &mut moment);
    let values = gpu.download(&z);
    assert_eq!(values.len(), 16);
    match gpu.fault() {
        Ok(()) => println!("done"),
        Err(fault) => println!("{CLEAN} {fault}"),
    }
}

fn run(settings: &[(&str, String)]) -> (bool, String) {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "failures::workload", "--nocapture"]);
    command.envs(settings.iter().map(|(key, value)| (*key, value)));
    let output = command.output().unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text)
}

fn sentence(text: &str) -> Option<&str> {
    let line = text.lines().find(|line| line.contains(CLEAN))?;
    line.split_once(CLEAN).map(|(_, sentence)| sentence.trim())
}

#[test]
fn every_failure_is_one_sentence() {
    let Some((gpu, _)) = both("every_failure_is_one_sentence") else {
        return;
    };
    if gpu.device().name() != "host shim" {
        skipped(
            "every_failure_is_one_sentence",
            &"a real driver does not fail when told to",
        );
        return;
    }
    let count_file = tempfile::NamedTempFile::new().unwrap();
    let path = count_file.path().display().to_string();
    let (passed, text) = run(&[("QTOOL_FAKE_CUDA_COUNT", path)]);
    assert!(passed && text.contains("done"), "{text}");
    let calls: u64 = std::fs::read_to_string(count_file.path())
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    assert!(calls > 30, "{calls}");
    // Out of memory, a failed launch, a lost device: in turns while kernels are found, of which there are many, and all three
    // of every call after that.
    const CODES: [u32; 3] = [2, 719, 46];
    let at_work = calls.saturating_sub(40);
    let (mut tried, mut told) = (0, 0);
    for call in 1..=calls {
        let turn = (call % 3) as usize;
        let codes = if call > at_work {
            &CODES[..]
        } else {
            &CODES[turn..=turn]
        };
        for code in codes {
            let settings = [
                ("QTOOL_FAKE_CUDA_FAIL", call.to_string()),
                ("QTOOL_FAKE_CUDA_CODE", code.to_string()),
            ];
            let (passed, text) = run(&settings);
            assert!(passed, "call {call}, code {code}: {text}");
            tried += 1;
            match sentence(&text) {
                Some(sentence) => {
                    assert!(
                        sentence.contains("failed to"),
                        "call {call}, code {code}: {sentence}"
                    );
                    told += 1;
                }
                None => assert!(text.contains("done"), "call {call}, code {code}: {text}"),
            }
        }
    }
    // The few calls after the last question, when memory is given back, find nobody to tell.
    assert!(tried >= calls + 80 && told >= tried - 12, "{told} of {tried}");
}

#[test]
fn what_cannot_be_used_is_said() {
    let Some((gpu, _)) = both("what_cannot_be_used_is_said") else {
        return;
    };
    if gpu.device().name() != "host shim" {
        skipped("what_cannot_be_used_is_said", &"a real driver does not pretend");
        return;
    }
    for (key, value, expected) in [
        (
            "QTOOL_FAKE_CUDA_VERSION",
            "11080",
            "knows CUDA 11.8, expected 12.0 or later",
        ),
        ("QTOOL_FAKE_CUDA_DEVICES", "0", "finds no GPU"),
        (
            "QTOOL_FAKE_CUDA_MAJOR",
            "7",
            "compute capability 7.0, expected 8.0 or later",
        ),
    ] {
        let (passed, text) = run(&[(key, value.to_owned())]);
        assert!(passed, "{text}");
        let sentence = sentence(&text).unwrap_or_default();
        assert!(sentence.contains(expected), "{key}={value}: {text}");
    }
}
