//! Manifests that lie, and stored bytes that are not what their scheme allows.

use std::fs;
use std::path::Path;

use qtool_formats::artifact::{Artifact, Manifest, Stored};
use serde_json::{Value, json};

use super::assert_says;
use crate::bad_files::{artifact, good_file, manifest_of, poke, set_manifest};
use crate::oracle::{PATH, judge_manifest};

/// The sentence with which this folder is refused.
#[track_caller]
fn refusal(folder: &Path) -> String {
    match Artifact::open(folder) {
        Ok(_) => panic!("opened"),
        Err(error) => error.to_string(),
    }
}

/// The sentence with which decoding all weights of this folder ends.
#[track_caller]
fn decoding(folder: &Path) -> String {
    let artifact = Artifact::open(folder).expect("an artifact that opens");
    for tensor in &artifact.manifest().tensors {
        if let Stored::Quantized(record) = &tensor.stored
            && let Err(error) = artifact.weight_rows(record, 0, record.rows)
        {
            return error.to_string();
        }
    }
    panic!("decoded")
}

#[test]
fn the_small_artifact_is_good() {
    let dir = artifact();
    let artifact = Artifact::open(dir.path()).expect("a good artifact");
    assert_eq!(artifact.manifest().tensors.len(), 3);
    assert_eq!(artifact.files().names().len(), 6);
    let mut decoded = 0;
    for tensor in &artifact.manifest().tensors {
        if let Stored::Quantized(record) = &tensor.stored {
            let weight = artifact.weight_rows(record, 0, record.rows).expect("good codes");
            assert_eq!(weight.dims(), (record.rows, record.columns));
            decoded += 1;
        }
    }
    assert_eq!(decoded, 2);
}

#[test]
fn every_truncation_of_a_manifest_is_refused() {
    let dir = artifact();
    let text = fs::read(dir.path().join("qtool.json")).expect("a manifest");
    let end = text.len() - 1;
    let mut refused = 0;
    for length in 0..end {
        let message = judge_manifest(&text[..length])
            .expect_err("half a manifest")
            .to_string();
        assert_says(&message, &[PATH, "not a manifest"]);
        refused += 1;
    }
    assert_eq!(refused, end);
    assert!(
        judge_manifest(&text[..end]).is_ok(),
        "the last line break carries nothing"
    );
}

#[test]
fn no_changed_byte_of_a_manifest_panics() {
    let dir = artifact();
    let text = fs::read(dir.path().join("qtool.json")).expect("a manifest");
    let mut tried = 0;
    for at in 0..text.len() {
        let mut changed = text.clone();
        for byte in [b'0', b'9', b'"', b'-', b' ', b'}', 0xff, text[at] ^ 1] {
            changed[at] = byte;
            let _ = judge_manifest(&changed);
            tried += 1;
        }
    }
    assert_eq!(tried, text.len() * 8);
}

#[test]
fn text_that_is_no_manifest() {
    let table: [(String, &str); 9] = [
        (String::new(), "EOF"),
        ("null".to_owned(), "not a manifest"),
        ("[]".to_owned(), "not a manifest"),
        ("{}".to_owned(), "missing field `format`"),
        ("[".repeat(100_000), "not a manifest"),
        (
            r#"{"format":"qtool","version":1}"#.to_owned(),
            "missing field `tool`",
        ),
        (r#"{"format":"qtool","version":-1}"#.to_owned(), "invalid value"),
        (
            r#"{"format":"gguf","version":1}"#.to_owned(),
            "format gguf version 1; this qtool reads",
        ),
        (
            r#"{"format":"\u001b[2J","version":1}"#.to_owned(),
            "format \\u{1b}[2J version 1",
        ),
    ];
    let mut cases = 0;
    for (text, says) in &table {
        let message = judge_manifest(text.as_bytes())
            .expect_err("no manifest")
            .to_string();
        assert_says(&message, &[PATH, says]);
        cases += 1;
    }
    assert_eq!(cases, 9);
}

/// One value of the manifest replaced: where, by what, and what the refusal says.
type Change = (&'static str, Value, &'static [&'static str]);

#[test]
fn manifests_that_contradict_themselves() {
    let half = 1u64 << 63;
    let unknown: &[&str] = &["tensor w.four", "its scheme described under \"schemes\""];
    let shape: &[&str] = &["tensor w.four", "rows x columns"];
    let part: &[&str] = &["tensor w.four", "expected PartRecord"];
    let table: Vec<Change> = vec![
        ("/version", json!(2), &["version 2", "use a newer qtool"]),
        ("/version", json!(0), &["version 0"]),
        ("/version", json!(1.0), &["not a manifest", "u32"]),
        ("/version", json!(1u64 << 32), &["not a manifest", "u32"]),
        ("/format", json!("qtool2"), &["format qtool2"]),
        ("/tensors", json!({}), &["not a manifest"]),
        (
            "/tensors/0/stored",
            json!("elsewhere"),
            &["unknown variant `elsewhere`"],
        ),
        ("/tensors/0/dtype", json!("Q9"), &["unknown variant `Q9`"]),
        (
            "/tensors/0/name",
            json!("w.other"),
            &["tensor w.other", "w.other.codes"],
        ),
        (
            "/tensors/0/name",
            json!("a\nb"),
            &["printable names", "got a\\nb"],
        ),
        (
            "/tensors/0/name",
            json!("n".repeat(2000)),
            &["printable names", "nnn ..."],
        ),
        (
            "/tensors/0/scheme",
            json!("w5-sym-row-f16"),
            &["no such scheme: w5-sym-row-f16"],
        ),
        ("/tensors/0/scheme", json!("w4-zp-g17-f16"), &["no such scheme"]),
        ("/tensors/0/scheme", json!(""), &["no such scheme"]),
        ("/tensors/0/scheme", json!("w4-zp-g32-f16"), unknown),
        (
            "/tensors/0/scheme",
            json!("w8-sym-row-bf16"),
            &["tensor w.four", "expected 2 parts, got 3"],
        ),
        ("/tensors/0/orientation", json!("in_out"), shape),
        (
            "/tensors/0/orientation",
            json!("upside_down"),
            &["unknown variant `upside_down`"],
        ),
        ("/tensors/0/rows", json!(3), shape),
        ("/tensors/0/rows", json!(0), shape),
        ("/tensors/0/rows", json!(-2), &["usize"]),
        ("/tensors/0/rows", json!(2.0), &["usize"]),
        ("/tensors/0/rows", json!(u64::MAX), shape),
        ("/tensors/0/columns", json!(31), shape),
        ("/tensors/0/columns", json!(half), shape),
        ("/tensors/0/shape", json!([32, 2]), shape),
        ("/tensors/0/shape", json!([64]), shape),
        ("/tensors/0/shape", json!([]), shape),
        ("/tensors/0/shape", json!([u64::MAX, 32]), shape),
        (
            "/tensors/0/parts",
            json!([]),
            &["tensor w.four", "expected 3 parts, got 0"],
        ),
        ("/tensors/0/parts/0/role", json!("scales"), part),
        ("/tensors/0/parts/0/tensor", json!("norm"), part),
        ("/tensors/0/parts/0/layout", json!("msb-rows"), part),
        ("/tensors/0/parts/0/bits", json!(8), part),
        ("/tensors/0/parts/0/dtype", json!("I8"), part),
        ("/tensors/0/parts/0/shape", json!([2, 15]), part),
        ("/tensors/0/parts/0/shape", json!([2, 16, 1]), part),
        ("/tensors/0/parts/0/row_bytes", json!(u64::MAX), part),
        (
            "/tensors/0/parts/0/file",
            json!("../model.safetensors"),
            &["\"../model.safetensors\""],
        ),
        (
            "/tensors/2/file",
            json!("/model.safetensors"),
            &["names of files of this folder"],
        ),
        (
            "/files/0/name",
            json!("../../etc/passwd"),
            &["names of files of this folder"],
        ),
        (
            "/files/0/name",
            json!("a\u{7f}"),
            &["names of files of this folder"],
        ),
        ("/schemes", json!({}), unknown),
        ("/schemes/w4-zp-g16-f16/bits", json!(3), unknown),
        ("/schemes/w4-zp-g16-f16/group", json!(32), unknown),
        ("/schemes/w4-zp-g16-f16/code_range", json!([0, 14]), unknown),
        ("/schemes/w4-zp-g16-f16/code_range", json!([0, 256]), &["u8"]),
        ("/schemes/w4-zp-g16-f16/scale_dtype", json!("BF16"), unknown),
        ("/schemes/w4-zp-g16-f16/value", json!("code"), unknown),
        (
            "/schemes/w8-sym-row-bf16/zero_point",
            json!(127),
            &["tensor w.eight", "its scheme"],
        ),
        (
            "/layouts",
            json!({}),
            &["tensor w.four", "its layout described under \"layouts\""],
        ),
        (
            "/layouts/lsb-rows",
            json!("bit 0"),
            &["its layout described under", "got lsb-rows"],
        ),
        (
            "/layouts/rows",
            json!(""),
            &["its layout described under", "got rows"],
        ),
    ];
    let dir = artifact();
    let good = manifest_of(dir.path());
    let mut cases = 0;
    for (at, value, says) in &table {
        let mut manifest = good.clone();
        *manifest.pointer_mut(at).unwrap_or_else(|| panic!("no {at}")) = value.clone();
        let text = manifest.to_string();
        match judge_manifest(text.as_bytes()) {
            Ok(_) => panic!("{at} = {value} is accepted"),
            Err(error) => assert_says(&error.to_string(), &[&[PATH], *says].concat()),
        }
        cases += 1;
    }
    assert_eq!(cases, 53);
}

/// The weight as its scheme would have it if its matrix had no rows, no columns, or more than can
/// be counted.
#[test]
fn weights_of_no_size_or_of_any() {
    let dir = artifact();
    let good = manifest_of(dir.path());
    let vast = 1u64 << 62;
    let mut cases = 0;
    for (rows, columns, says) in [
        (0, 32, "it is empty"),
        (2, 0, "it is empty"),
        (0, vast, "it is empty"),
        (1, vast, "its size overflows"),
        (vast, 2, "its size overflows"),
        (1, 40, "K = 40 is not a multiple of 16"),
    ] {
        let mut manifest = good.clone();
        let record = &mut manifest["tensors"][0];
        record["rows"] = json!(rows);
        record["columns"] = json!(columns);
        record["shape"] = json!([rows, columns]);
        let message = judge_manifest(manifest.to_string().as_bytes()).expect_err("an impossible weight");
        assert_says(&message.to_string(), &[PATH, "tensor w.four", says]);
        cases += 1;
    }
    assert_eq!(cases, 6);
}

#[test]
fn manifests_that_contradict_the_files() {
    let dir = artifact();
    let good = manifest_of(dir.path());
    let refused = |change: &dyn Fn(&mut Value)| {
        let mut manifest = good.clone();
        change(&mut manifest);
        set_manifest(dir.path(), &manifest);
        refusal(dir.path())
    };
    let push = |record: usize, name: Option<&str>| {
        let name = name.map(str::to_owned);
        move |m: &mut Value| {
            let mut copy = m["tensors"][record].clone();
            if let Some(name) = &name {
                copy["name"] = json!(name);
            }
            m["tensors"].as_array_mut().expect("a list").push(copy);
        }
    };
    let table: [(String, &[&str]); 9] = [
        (
            refused(&push(0, None)),
            &["qtool.json: tensor w.four", "one record, got two"],
        ),
        (refused(&push(2, Some("bias"))), &["tensor bias is missing"]),
        (
            refused(&push(2, Some("w.eight.codes"))),
            &["stored tensor w.eight.codes", "one record of it, got two"],
        ),
        (
            refused(&|m| _ = m["tensors"].as_array_mut().map(|list| list.remove(2))),
            &["stored tensor norm", "a record of it, got none"],
        ),
        (
            refused(&|m| m["tensors"] = json!([])),
            &["stored tensor norm", "a record of it, got none"],
        ),
        (
            refused(&|m| m["tensors"][2]["shape"] = json!([2, 2])),
            &["stored tensor norm: expected F32 [2, 2], got F32 [4]"],
        ),
        (
            refused(&|m| m["tensors"][2]["dtype"] = json!("I32")),
            &["stored tensor norm: expected I32 [4], got F32 [4]"],
        ),
        (
            refused(&|m| m["tensors"][2]["file"] = json!("other.safetensors")),
            &[
                "stored tensor norm",
                "in \"other.safetensors\", got in \"model.safetensors\"",
            ],
        ),
        (
            refused(&|m| m["tensors"][0]["parts"][1]["file"] = json!("qtool.json")),
            &["stored tensor w.four.scales", "in \"qtool.json\""],
        ),
    ];
    let mut cases = 0;
    for (message, says) in &table {
        assert_says(message, says);
        cases += 1;
    }
    assert_eq!(cases, 9);

    set_manifest(dir.path(), &good);
    fs::write(dir.path().join("model.safetensors"), good_file()).expect("a small file");
    assert_says(&refusal(dir.path()), &["tensor w.four.codes is missing"]);
    fs::remove_file(dir.path().join("model.safetensors")).expect("the weights");
    assert_says(&refusal(dir.path()), &["holds neither"]);
    fs::remove_file(dir.path().join("qtool.json")).expect("the manifest");
    assert_says(&refusal(dir.path()), &["qtool.json: cannot open"]);
    fs::create_dir(dir.path().join("qtool.json")).expect("a folder");
    assert_says(&refusal(dir.path()), &["qtool.json: not a regular file"]);
}

#[test]
fn stored_bytes_outside_their_scheme() {
    let mut cases = 0;
    for (tensor, bytes, says) in [
        (
            "w.four.scales",
            &[0x00u8, 0x00][..],
            "scale: expected a positive finite f16 value, got 0",
        ),
        (
            "w.four.scales",
            &[0x00, 0x80],
            "scale: expected a positive finite f16 value, got -0",
        ),
        ("w.four.scales", &[0x00, 0xbc], "got -1"),
        ("w.four.scales", &[0x00, 0x7e], "got NaN"),
        ("w.four.scales", &[0x00, 0x7c], "got inf"),
        (
            "w.eight.scales",
            &[0x80, 0x7f],
            "scale: expected a positive finite bf16 value, got inf",
        ),
        ("w.eight.scales", &[0xc0, 0xff], "got NaN"),
        ("w.eight.codes", &[0], "code: expected 1 to 255, got 0"),
    ] {
        let dir = artifact();
        poke(dir.path(), tensor, bytes);
        let weight = tensor.rsplit_once('.').map_or(tensor, |(weight, _)| weight);
        let named = format!("model.safetensors: tensor {weight}: ");
        assert_says(&decoding(dir.path()), &[&named, says]);
        cases += 1;
    }
    assert_eq!(cases, 8);
}

#[test]
fn rows_outside_a_weight_are_refused() {
    let dir = artifact();
    let artifact = Artifact::open(dir.path()).expect("a good artifact");
    let mut cases = 0;
    for tensor in &artifact.manifest().tensors {
        let Stored::Quantized(record) = &tensor.stored else {
            continue;
        };
        for (from, count) in [
            (record.rows, 1),
            (usize::MAX, 1),
            (usize::MAX, usize::MAX),
            (0, 0),
        ] {
            assert!(
                artifact.weight_rows(record, from, count).is_err(),
                "{from} {count}"
            );
            cases += 1;
        }
        assert!(artifact.weight_rows(record, 1, usize::MAX).is_ok());
    }
    assert_eq!(cases, 8);
}

#[test]
fn the_seeds_of_the_fuzz_targets_are_still_good() {
    let seeds = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/seeds");
    let mut accepted = [0, 0];
    for (kind, count) in ["header", "manifest"].iter().zip(&mut accepted) {
        for seed in fs::read_dir(seeds.join(kind)).expect("seeds") {
            let path = seed.expect("a seed").path();
            let bytes = fs::read(&path).expect("a seed");
            let good = match *kind {
                "header" => crate::oracle::judge_header(&bytes).is_ok(),
                _ => Manifest::parse(&path, &bytes).is_ok(),
            };
            assert!(good, "{} is refused", path.display());
            *count += 1;
        }
    }
    assert_eq!(accepted, [4, 1]);
}
