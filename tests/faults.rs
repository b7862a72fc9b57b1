//! What the machine does to a run: a full disk, a read-only folder, ctrl-C, kill, a second run, an
//! input that changes. Whatever happens, nothing that opens as an artifact is left, and nothing
//! that was there is lost.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use qtool_formats::checkpoint::Checkpoint;
use qtool_formats::{FloatDtype, FormatError};

use crate::cli::{assert_error, qtool, workshop};
use crate::model::{Normal, Tensor, small, write_model};

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|f| f.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// A model that takes some seconds with the slowest options.
fn slow_model(folder: &Path) {
    let mut tensors = small(1, 1, FloatDtype::Bf16);
    let values = Normal::new(3).take(1024 * 1024, 0.02);
    for layer in 0..24 {
        let tensor = Tensor::floats(FloatDtype::Bf16, &[1024, 1024], &values);
        tensors.push((format!("model.layers.{layer}.self_attn.o_proj.weight"), tensor));
    }
    write_model(folder, &tensors);
}

fn start_slow(model: &Path, out: &Path) -> Child {
    let args = [
        "--bits",
        "4",
        "--asymmetric",
        "--group-size",
        "16",
        "--threads",
        "1",
    ];
    Command::new(env!("CARGO_BIN_EXE_qtool"))
        .arg("quantize")
        .arg(model)
        .arg("-o")
        .arg(out)
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Waits until the run has begun to write.
fn wait_for_staging(dir: &Path) {
    let started = Instant::now();
    while !dir.join(".out.qtool-partial").is_dir() {
        assert!(
            started.elapsed() < Duration::from_secs(60),
            "the run never began to write"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn signal(child: &Child, name: &str) {
    let status = Command::new("kill")
        .args([name, &child.id().to_string()])
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
fn ctrl_c_takes_the_unfinished_output_away() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (dir.path().join("model"), dir.path().join("out"));
    slow_model(&model);
    let child = start_slow(&model, &out);
    wait_for_staging(dir.path());
    signal(&child, "-INT");
    let output = child.wait_with_output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(130), "{message}");
    assert!(message.contains("interrupted; nothing was written"), "{message}");
    assert_eq!(names(dir.path()), ["model"]);
}

#[test]
fn a_killed_run_leaves_no_artifact_and_the_next_one_clears_up() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (dir.path().join("model"), dir.path().join("out"));
    slow_model(&model);
    let mut child = start_slow(&model, &out);
    wait_for_staging(dir.path());
    signal(&child, "-KILL");
    child.wait().unwrap();
    assert!(!out.exists());
    let left = dir.path().join(".out.qtool-partial");
    assert!(
        left.is_dir() && !left.join("qtool.json").exists(),
        "what is left has no manifest"
    );
    assert_error(&qtool(&["verify", left.to_str().unwrap()]), &["qtool.json"]);
    let run = qtool(&[
        "quantize",
        model.to_str().unwrap(),
        "-o",
        out.to_str().unwrap(),
        "--bits",
        "8",
    ]);
    assert_eq!(
        run.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&run.stderr)
    );
    assert_eq!(names(dir.path()), ["model", "out"]);
}

#[test]
fn a_second_run_into_the_same_folder_is_refused_and_harms_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (dir.path().join("model"), dir.path().join("out"));
    slow_model(&model);
    let first = start_slow(&model, &out);
    wait_for_staging(dir.path());
    let second = qtool(&[
        "quantize",
        model.to_str().unwrap(),
        "-o",
        out.to_str().unwrap(),
        "--bits",
        "8",
    ]);
    assert_error(&second, &["another qtool run", out.to_str().unwrap()]);
    let output = first.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(qtool(&["verify", out.to_str().unwrap()]).status.code(), Some(0));
    assert_eq!(names(dir.path()), ["model", "out"]);
}

/// A real full disk: a tiny file system in a mount namespace of the test's own. Where the system
/// lets no one have one, the test says so; with CI set, that is a failure.
#[test]
fn a_full_disk_is_one_sentence_and_is_cleaned_up() {
    let (dir, model, _) = workshop();
    let disk = dir.path().join("disk");
    fs::create_dir(&disk).unwrap();
    let script = r#"mount -t tmpfs -o size=64k tmpfs "$1" || exit 99
"$2" quantize "$3" -o "$1/out" --bits 8; echo "status $?"; ls -A "$1"; echo "end""#;
    let run = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount", "sh", "-c", script, "sh"])
        .args([disk.to_str().unwrap(), env!("CARGO_BIN_EXE_qtool"), &model])
        .output();
    let output = match run {
        Ok(output) if output.status.success() => output,
        other => {
            assert!(
                std::env::var_os("CI").is_none(),
                "no mount namespace for the full-disk test: {other:?}"
            );
            eprintln!("SKIPPED: no mount namespace to fill a disk in");
            return;
        }
    };
    let message = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        message.contains("No space left") && message.contains("free some space"),
        "{message}"
    );
    assert!(message.contains("model.safetensors"), "names the file: {message}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "status 2\nend\n");
}

#[test]
fn a_folder_that_cannot_be_written_is_one_sentence() {
    let (dir, model, _) = workshop();
    // A file where a folder should be: refused for root, too, who may write anywhere else.
    let file = dir.path().join("file");
    fs::write(&file, "x").unwrap();
    let inside = file.join("out");
    let run = qtool(&["quantize", &model, "-o", inside.to_str().unwrap(), "--bits", "8"]);
    assert_error(&run, &[file.to_str().unwrap(), "cannot create"]);
    let run = qtool(&[
        "quantize",
        &model,
        "-o",
        file.to_str().unwrap(),
        "--bits",
        "8",
        "--force",
    ]);
    assert_error(&run, &[file.to_str().unwrap()]);
    assert_eq!(fs::read_to_string(&file).unwrap(), "x");
    assert_eq!(names(dir.path()), ["file", "model"]);
}

#[test]
fn an_input_that_changes_is_noticed() {
    let (_dir, model, _) = workshop();
    let path = Path::new(&model).join("model.safetensors");
    let checkpoint = Checkpoint::open(Path::new(&model)).unwrap();
    checkpoint.check_unchanged().unwrap();
    let mut bytes = fs::read(&path).unwrap();
    bytes.push(0);
    fs::write(&path, bytes).unwrap();
    let error = checkpoint.check_unchanged().unwrap_err();
    assert!(matches!(error, FormatError::SourceChanged { .. }), "{error}");
    assert!(error.to_string().contains("model.safetensors"), "{error}");
}

/// A deleted input stays readable while it is mapped: the run ends well.
#[test]
fn an_input_that_vanishes_is_read_to_its_end() {
    let dir = tempfile::tempdir().unwrap();
    let (model, out) = (dir.path().join("model"), dir.path().join("out"));
    slow_model(&model);
    let child = start_slow(&model, &out);
    wait_for_staging(dir.path());
    fs::remove_file(model.join("model.safetensors")).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert_eq!(qtool(&["verify", out.to_str().unwrap()]).status.code(), Some(0));
}
