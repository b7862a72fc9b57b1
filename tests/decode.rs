//! `docs/decode.py`, a reader that has only the folder, against the Rust decoder, bit for bit.
//!
//! It needs a Python with NumPy: `QTOOL_PYTHON` names it (`.ci/run` sets it), else `python3` is
//! tried. Where there is none the test says so and passes; with `QTOOL_PYTHON` or `CI` set it fails.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use qtool_formats::artifact::Artifact;
use qtool_formats::export;

use crate::ernie::Ernie;
use crate::fastdeploy::{make, request};
use crate::flow::{quantize, with_recipe};
use crate::model::{SAMPLES, read_model, sample};
use crate::paddle::write_paddle;

/// An interpreter that can import NumPy.
fn python() -> Option<String> {
    let asked = std::env::var("QTOOL_PYTHON").ok();
    let name = asked.clone().unwrap_or_else(|| "python3".to_owned());
    let works = Command::new(&name)
        .args(["-c", "import numpy"])
        .output()
        .is_ok_and(|o| o.status.success());
    assert!(
        works || asked.is_none(),
        "QTOOL_PYTHON={name} cannot import numpy"
    );
    works.then_some(name)
}

/// Name and SHA-256 of every decoded tensor, as `docs/decode.py` prints them.
fn decoded(python: &str, folder: &Path) -> BTreeMap<String, String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/decode.py");
    let output = Command::new(python).arg(script).arg(folder).output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout).unwrap();
    let line = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        (words[0].to_owned(), (*words.last().unwrap()).to_owned())
    };
    text.lines().map(line).collect()
}

/// SHA-256 by the same Python: no second implementation of the hash is needed here.
fn sha256(python: &str, file: &Path) -> String {
    let code = "import hashlib, sys; print(hashlib.sha256(open(sys.argv[1], 'rb').read()).hexdigest())";
    let output = Command::new(python)
        .args(["-c", code])
        .arg(file)
        .output()
        .unwrap();
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

/// Folders of FastDeploy's family: fused weights, other layouts, turned and converted tensors.
#[test]
fn it_decodes_fastdeploy_folders_too() {
    let Some(python) = python() else {
        eprintln!("SKIPPED: no Python with NumPy; set QTOOL_PYTHON to one");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    Ernie::dense().write(&model);
    for bits in [8, 4] {
        let out = dir.path().join(format!("out{bits}"));
        make(&model, &out, &request(bits));
        assert_decodes(&python, &out, &dir.path().join(format!("dense{bits}")));
    }
    Ernie::moe().write(&dir.path().join("moe"));
    // The small model's experts are too narrow for FastDeploy's 2-bit tiles; the sample's are not.
    for (bits, model) in [(4, dir.path().join("moe")), (2, sample(SAMPLES[1]))] {
        let out = dir.path().join(format!("moe-out{bits}"));
        make(&model, &out, &request(bits));
        assert_decodes(&python, &out, &dir.path().join(format!("moe-dense{bits}")));
    }
}

/// Asserts that the page decodes `out` as the f32 export does; returns the number of tensors.
#[track_caller]
fn assert_decodes(python: &str, out: &Path, dense: &Path) -> usize {
    qtool::export::run(out, export::find("f32").unwrap(), dense, false, 1 << 40, false).unwrap();
    let theirs = decoded(python, out);
    let mut compared = 0;
    for (name, tensor) in read_model(dense) {
        let bytes = match qtool_formats::FloatDtype::from_dtype(tensor.dtype) {
            Some(dtype) => dtype
                .widen(&tensor.bytes)
                .iter()
                .flat_map(|v| v.to_le_bytes())
                .collect(),
            None => tensor.bytes,
        };
        let file = dense.join("tensor");
        std::fs::write(&file, bytes).unwrap();
        assert_eq!(theirs.get(&name), Some(&sha256(python, &file)), "{name}");
        compared += 1;
    }
    let artifact = Artifact::open(out).unwrap();
    assert_eq!(theirs.len(), artifact.manifest().tensors.len());
    compared
}

#[test]
fn a_reader_with_only_the_folder_decodes_every_bit() {
    let Some(python) = python() else {
        eprintln!("SKIPPED: no Python with NumPy; set QTOOL_PYTHON to one");
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let fused = dir.path().join("fused");
    write_paddle(&sample(SAMPLES[0]), &fused);
    let cases = [
        (sample(SAMPLES[0]), "bits:8"),
        (sample(SAMPLES[0]), "bits:4,grid:zp,scale:f16,group:32"),
        (sample(SAMPLES[1]), "bits:4,scale:f32"),
        (sample(SAMPLES[0]), "bits:2,effort:fast"),
        (sample(SAMPLES[0]), "bits:2,method:ccq25"),
        (sample(SAMPLES[0]), "bits:4,method:nf4"),
        (sample(SAMPLES[0]), "bits:4,method:nf4-dq"),
        (sample(SAMPLES[0]), "bits:4,method:q4-k"),
        (sample(SAMPLES[0]), "bits:2,method:q2-k"),
        (fused, "bits:4"),
    ];
    let mut compared = 0;
    for (i, (model, recipe)) in cases.iter().enumerate() {
        let out = dir.path().join(format!("out{i}"));
        // Rows of 704 and 384, which super-blocks of 256 do not divide.
        let rules: &[&str] = if recipe.ends_with("-k") {
            &["(down|o)_proj=bits:8"]
        } else {
            &[]
        };
        quantize(model, &with_recipe(&out, recipe, &[], rules));
        compared += assert_decodes(&python, &out, &dir.path().join(format!("dense{i}")));
    }
    assert!(compared > 150, "{compared}");
}
