//! The program on hostile input: status 2, one sentence, nothing left behind.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use super::assert_says;
use crate::bad_files::{artifact, entry, file, folder, good_file, header, manifest_of, poke, set_manifest};

fn qtool(args: &[&str], paths: &[&Path]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_qtool"))
        .args(args)
        .args(paths)
        .env("NO_COLOR", "1")
        .output()
        .expect("the program starts")
}

/// The sentence of a run that must have ended in an error.
#[track_caller]
fn sentence(run: &Output) -> String {
    let stderr = String::from_utf8_lossy(&run.stderr).into_owned();
    assert_eq!(run.status.code(), Some(2), "{stderr}");
    assert!(run.stdout.is_empty(), "{}", String::from_utf8_lossy(&run.stdout));
    let line = stderr.strip_suffix('\n').unwrap_or(&stderr);
    let line = line
        .strip_prefix("error: ")
        .unwrap_or_else(|| panic!("no error: {stderr}"));
    assert!(!line.contains('\n') && !line.contains("panicked"), "{line}");
    line.to_owned()
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("a folder");
    let mut names: Vec<String> = entries
        .map(|e| e.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// Runs a command that would write OUT into a folder of its own and must leave that folder empty.
#[track_caller]
fn refused(args: &[&str], input: &Path) -> String {
    let parent = folder(&[]);
    let run = qtool(args, &[Path::new("-o"), &parent.path().join("OUT"), input]);
    let message = sentence(&run);
    assert_eq!(names(parent.path()), [""; 0], "left behind after: {message}");
    message
}

/// A model of one file.
fn model(bytes: &[u8]) -> tempfile::TempDir {
    folder(&[("model.safetensors", bytes), ("config.json", b"{}")])
}

/// A model of one BF16 tensor.
fn matrix(name: &str, shape: &str, values: &[u16]) -> Vec<u8> {
    let end = 2 * values.len() as u64;
    let mut bytes = file(header(&[entry(name, "BF16", shape, 0, end)]), 0);
    bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
    bytes
}

/// 64 times 1.0.
const ONES: [u16; 64] = [0x3f80; 64];

#[test]
fn models_that_cannot_be_read() {
    let good = good_file();
    let one = |shape: &str, to: u64| file(header(&[entry("m.a", "BF16", shape, 0, to)]), to as usize);
    let collision = header(&[
        entry("m.layer.weight", "BF16", "[2,32]", 0, 128),
        entry("m.layer.weight.codes", "U8", "[2,16]", 128, 160),
    ]);
    let table: [(Vec<u8>, &[&str]); 11] = [
        (Vec::new(), &["model.safetensors: ", "the file is empty"]),
        (good[..7].to_vec(), &["model.safetensors: ", "at least 8 bytes"]),
        (
            good[..100].to_vec(),
            &["model.safetensors: expected 214 bytes", "download or copy"],
        ),
        (
            good[..good.len() - 1].to_vec(),
            &["model.safetensors: expected 248 bytes", "got 247"],
        ),
        (
            vec![0xff; 64],
            &["model.safetensors: ", "is this a safetensors file?"],
        ),
        (file("{}", 0), &["holds no tensors"]),
        (
            one("[2,16]", 60),
            &["model.safetensors: tensor m.a: expected 64 bytes"],
        ),
        (one("[18446744073709551615,2]", 0), &["tensor m.a", "overflows"]),
        (one("[0,18446744073709551615]", 0), &["tensor m.a", "overflows"]),
        (
            matrix(&"n".repeat(1024), "[2,32]", &ONES),
            &["nnn ...: a name of 1030 bytes"],
        ),
        (
            file(collision, 160),
            &["tensor m.layer.weight.codes: two tensors would be stored"],
        ),
    ];
    let mut cases = 0;
    for (bytes, says) in &table {
        let model = model(bytes);
        for bits in ["8", "4"] {
            let args = ["quantize", "--bits", bits, "--group-size", "row"];
            assert_says(&refused(&args, model.path()), says);
            cases += 1;
        }
    }
    assert_eq!(cases, 22);
    for (bytes, says) in &table[..9] {
        let model = model(bytes);
        assert_says(&sentence(&qtool(&["inspect"], &[model.path()])), says);
        cases += 1;
    }
    assert_eq!(cases, 31);
}

#[test]
fn the_first_reason_is_the_one_that_is_told() {
    let mut values = ONES;
    values[37] = 0x7fc0;
    let model = model(&matrix("m.layer.weight", "[2,32]", &values));
    let message = refused(&["quantize", "--bits", "8"], model.path());
    assert_says(&message, &["tensor m.layer.weight: the element at [1, 5] is NaN"]);
}

#[test]
fn every_truncation_of_a_model_is_refused() {
    let good = good_file();
    let mut refusals = 0;
    for length in (0..good.len()).step_by(7) {
        let model = model(&good[..length]);
        assert_says(
            &refused(&["quantize", "--bits", "8"], model.path()),
            &["model.safetensors: "],
        );
        refusals += 1;
    }
    assert_eq!(refusals, good.len().div_ceil(7));
}

/// Something done to a good artifact.
type Damage<'a> = &'a dyn Fn(&Path);

#[test]
fn artifacts_that_cannot_be_read() {
    let change = |folder: &Path, at: &str, value: serde_json::Value| {
        let mut manifest = manifest_of(folder);
        *manifest.pointer_mut(at).expect("the value") = value;
        set_manifest(folder, &manifest);
    };
    let cut = |folder: &Path, name: &str, keep: usize| {
        let bytes = fs::read(folder.join(name)).expect("the file");
        fs::write(folder.join(name), &bytes[..keep]).expect("a small file");
    };
    let table: [(Damage<'_>, &[&str]); 7] = [
        (&|f| cut(f, "qtool.json", 0), &["qtool.json: not a manifest"]),
        (
            &|f| cut(f, "qtool.json", 1000),
            &["qtool.json: not a manifest: EOF"],
        ),
        (
            &|f| cut(f, "model.safetensors", 300),
            &["model.safetensors: expected"],
        ),
        (
            &|f| change(f, "/version", 9.into()),
            &["qtool.json: ", "use a newer qtool"],
        ),
        (
            &|f| change(f, "/tensors/0/rows", 3.into()),
            &["qtool.json: tensor w.four"],
        ),
        (
            &|f| change(f, "/tensors/2/name", "bias".into()),
            &["tensor bias is missing"],
        ),
        (
            &|f| change(f, "/files/0/name", "../x".into()),
            &["qtool.json: files", "\"../x\""],
        ),
    ];
    let mut cases = 0;
    for (damage, says) in &table {
        let dir = artifact();
        damage(dir.path());
        assert_says(&sentence(&qtool(&["inspect"], &[dir.path()])), says);
        assert_says(&refused(&["export", "--to", "bf16"], dir.path()), says);
        cases += 2;
    }
    assert_eq!(cases, 14);
}

#[test]
fn stored_bytes_outside_their_scheme_end_an_export() {
    let dir = artifact();
    poke(dir.path(), "w.eight.codes", &[0]);
    let message = refused(&["export", "--to", "bf16"], dir.path());
    assert_says(
        &message,
        &["stored tensor w.eight.codes is damaged", "qtool verify"],
    );
    // A manifest that states the digest of these very bytes does not help.
    let (start, got) = message.rsplit_once(", got ").unwrap();
    let stated = start.rsplit_once("expected ").unwrap().1;
    let manifest = dir.path().join("qtool.json");
    let text = fs::read_to_string(&manifest).unwrap();
    fs::write(&manifest, text.replace(stated, got)).unwrap();
    let message = refused(&["export", "--to", "bf16"], dir.path());
    assert_says(
        &message,
        &["model.safetensors: tensor w.eight: code: expected 1 to 255, got 0"],
    );
    let verify = qtool(&["verify"], &[dir.path()]);
    assert_eq!(verify.status.code(), Some(1), "verify found something");
}

#[test]
fn verify_never_calls_a_damaged_artifact_good() {
    let values: Vec<u16> = (0..128).map(|i| 0x3f00 + 37 * i % 256).collect();
    let source = model(&matrix("m.layer.weight", "[2,64]", &values));
    let parent = folder(&[]);
    let good = parent.path().join("OUT");
    let run = qtool(
        &["quantize", "--bits", "4", "--asymmetric", "-o"],
        &[&good, source.path()],
    );
    assert_eq!(
        run.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&run.stderr)
    );
    let run = qtool(&["verify"], &[&good]);
    let text = String::from_utf8_lossy(&run.stdout);
    assert_eq!(run.status.code(), Some(0), "good as long as it is whole: {text}");
    let all = fs::read(good.join("model.safetensors")).expect("the weights");
    let mut found = 0;
    for at in (0..all.len()).step_by(7) {
        let mut bytes = all.clone();
        bytes[at] ^= 0x10;
        fs::write(good.join("model.safetensors"), bytes).expect("a small file");
        let run = qtool(&["verify"], &[&good]);
        let stderr = String::from_utf8_lossy(&run.stderr);
        assert!(
            matches!(run.status.code(), Some(1 | 2)),
            "byte {at}: {:?} {stderr}",
            run.status
        );
        assert!(!stderr.contains("panicked"), "byte {at}: {stderr}");
        found += 1;
    }
    assert_eq!(found, all.len().div_ceil(7));
}

#[test]
fn verify_reads_the_index_too() {
    let entries = header(&[
        entry("m.a.weight", "BF16", "[2,32]", 0, 128),
        entry("m.b.weight", "BF16", "[2,32]", 128, 256),
    ]);
    let mut bytes = file(entries, 256);
    let data = bytes.len() - 256;
    for (at, byte) in bytes[data..].iter_mut().enumerate() {
        *byte = if at % 2 == 0 { (at * 37) as u8 } else { 0x3f };
    }
    let source = model(&bytes);
    let parent = folder(&[]);
    let out = parent.path().join("OUT");
    let quantize = ["quantize", "--bits", "8", "--max-shard-size", "1B", "-o"];
    let run = qtool(&quantize, &[&out, source.path()]);
    assert_eq!(
        run.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&run.stderr)
    );
    let run = qtool(&["verify"], &[&out]);
    assert_eq!(
        run.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&run.stdout)
    );
    let index = out.join("model.safetensors.index.json");
    let text = fs::read_to_string(&index).expect("an index");
    let changed = text.replace("\"total_size\": 1", "\"total_size\": 2");
    assert_ne!(changed, text);
    fs::write(&index, changed).expect("a small file");
    let run = qtool(&["verify"], &[&out]);
    assert_eq!(run.status.code(), Some(1));
    let found = String::from_utf8_lossy(&run.stdout).into_owned();
    assert!(found.contains("model.safetensors.index.json: digest"), "{found}");
}

#[test]
fn odd_but_good_models_pass_through() {
    let named = |name: &str| matrix(name, "[2,32]", &ONES);
    let long = "n".repeat(1024 - 14) + ".weight";
    let empty = header(&[
        entry("m.some.weight", "BF16", "[2,32]", 0, 128),
        entry("m.none.weight", "BF16", "[0,32]", 0, 0),
        entry("m.thin.weight", "BF16", "[32,0]", 0, 0),
        entry("m.far.weight", "BF16", "[0,1099511627776]", 0, 0),
        entry("m.scalar", "BF16", "[]", 128, 130),
        entry("m.nibbles.weight", "F4", "[2,32]", 130, 162),
        entry("m.bytes.weight", "F8_E4M3", "[2,32]", 162, 226),
    ]);
    let mut cases = 0;
    for bytes in [
        named("../../escape.weight"),
        named("/tmp/escape.weight"),
        named(&long),
        named("层.weight"),
        named("a b\\\"c.weight"),
        matrix("m.zero.weight", "[1,64]", &[0; 64]),
        matrix("m.experts.weight", "[2,2,16]", &ONES),
        file(empty, 226),
    ] {
        let model = model(&bytes);
        let parent = folder(&[]);
        let out = parent.path().join("OUT");
        let run = qtool(
            &["quantize", "--bits", "4", "--group-size", "16", "-o"],
            &[&out, model.path()],
        );
        let stderr = String::from_utf8_lossy(&run.stderr);
        assert_eq!(run.status.code(), Some(0), "case {cases}: {stderr}");
        assert_eq!(names(parent.path()), ["OUT"]);
        assert_eq!(names(&out), ["config.json", "model.safetensors", "qtool.json"]);
        let dense = parent.path().join("DENSE");
        let export = qtool(&["export", "--to", "bf16", "-o"], &[&dense, &out]);
        let stderr = String::from_utf8_lossy(&export.stderr);
        assert_eq!(export.status.code(), Some(0), "case {cases}: {stderr}");
        assert_eq!(names(parent.path()), ["DENSE", "OUT"]);
        cases += 1;
    }
    assert_eq!(cases, 8);
}

#[test]
fn side_files_that_lie() {
    let good = matrix("m.layer.weight", "[2,32]", &ONES);
    let mut cases = 0;
    for config in ["", "{", "[]", "null", "\"text\"", "7", "[[[[", "\u{feff}{}"] {
        let model = folder(&[("model.safetensors", &good), ("config.json", config.as_bytes())]);
        assert_says(
            &refused(&["quantize", "--bits", "8"], model.path()),
            &["config.json: "],
        );
        cases += 1;
    }
    assert_eq!(cases, 8);
    // The block we add replaces whatever stood there.
    let odd = r#"{"quantization_config":[1]}"#;
    let model = folder(&[("model.safetensors", &good), ("config.json", odd.as_bytes())]);
    let parent = folder(&[]);
    let run = qtool(
        &["quantize", "--bits", "8", "-o"],
        &[&parent.path().join("OUT"), model.path()],
    );
    assert!(matches!(run.status.code(), Some(0 | 2)));
    assert!(!String::from_utf8_lossy(&run.stderr).contains("panicked"));
}

/// Free text of a manifest reaches the screen without its control characters.
#[test]
fn texts_of_a_manifest_cannot_write_to_the_terminal() {
    let mut cases = 0;
    for at in ["/tool", "/source/name", "/tensors/0/method", "/tensors/2/reason"] {
        let dir = artifact();
        let mut manifest = manifest_of(dir.path());
        manifest["tensors"][0]["faults"] = serde_json::json!(["c\u{1b}[2Jd"]);
        *manifest.pointer_mut(at).expect("the text") = "a\u{1b}[2J\u{9b}2Jb".into();
        set_manifest(dir.path(), &manifest);
        for command in ["inspect", "verify"] {
            let run = qtool(&[command], &[dir.path()]);
            for text in [&run.stdout, &run.stderr] {
                let text = String::from_utf8_lossy(text);
                let raw = text.chars().find(|c| c.is_control() && *c != '\n');
                assert_eq!(raw, None, "{command} with {at}: {text:?}");
            }
            cases += 1;
        }
    }
    assert_eq!(cases, 8);
}
