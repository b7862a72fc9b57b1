//! Folders and index files that lie.

use std::fs;
use std::path::Path;

use qtool_formats::checkpoint::Checkpoint;

use super::assert_says;
use crate::bad_files::{file, folder, good_file, one_tensor};

const INDEX: &str = "model.safetensors.index.json";

/// The sentence with which this path is refused.
#[track_caller]
fn refusal(path: &Path) -> String {
    match Checkpoint::open(path) {
        Ok(checkpoint) => panic!("opened: {checkpoint:?}"),
        Err(error) => error.to_string(),
    }
}

/// Opens a folder of two shards, `one` holding tensor `m.one` and `two` holding `m.two`, with this
/// index.
fn with_index(index: &str) -> Result<usize, String> {
    let dir = folder(&[
        ("one.safetensors", &one_tensor("m.one")),
        ("two.safetensors", &one_tensor("m.two")),
        ("again.safetensors", &one_tensor("m.one")),
        ("config.json", b"{}"),
        (INDEX, index.as_bytes()),
    ]);
    let opened = Checkpoint::open(dir.path());
    opened.map(|c| c.names().len()).map_err(|e| e.to_string())
}

fn map(pairs: &[(&str, &str)]) -> String {
    let pairs: Vec<String> = pairs.iter().map(|(t, f)| format!(r#""{t}":"{f}""#)).collect();
    format!(r#"{{"weight_map":{{{}}}}}"#, pairs.join(","))
}

#[test]
fn index_files_that_lie() {
    let good = [("m.one", "one.safetensors"), ("m.two", "two.safetensors")];
    assert_eq!(with_index(&map(&good)), Ok(2));
    let with = |tensor: &str, file: &str| map(&[good[0], good[1], (tensor, file)]);
    let swapped = map(&[("m.one", "two.safetensors"), ("m.two", "one.safetensors")]);
    let table: [(String, &[&str]); 25] = [
        (
            with("m.three", "gone.safetensors"),
            &["gone.safetensors: cannot open"],
        ),
        (
            with("m.three", "two.safetensors"),
            &["m.three is expected in two.safetensors, found in none"],
        ),
        (
            swapped,
            &["m.one is expected in two.safetensors, found in one.safetensors"],
        ),
        (map(&[good[0]]), &[]),
        (map(&[good[0], ("m.x", "two.safetensors")]), &["m.x is expected"]),
        (
            with("m.1", "again.safetensors"),
            &["tensor m.one", "another file of this checkpoint"],
        ),
        (
            with("m.1", "config.json"),
            &["config.json: ", "expected at least 8 bytes"],
        ),
        (
            with("m.1", "../one.safetensors"),
            &["\"../one.safetensors\"", "plain file name"],
        ),
        (
            with("m.1", "/etc/passwd"),
            &["\"/etc/passwd\"", "plain file name"],
        ),
        (with("m.1", "./one.safetensors"), &["plain file name"]),
        (with("m.1", "one.safetensors/"), &["plain file name"]),
        (with("m.1", "one.safetensors/."), &["plain file name"]),
        (with("m.1", "sub/one.safetensors"), &["plain file name"]),
        (with("m.1", ".."), &["plain file name"]),
        (with("m.1", ""), &["plain file name"]),
        (with("m.1", "a\\u0000b"), &["plain file name"]),
        (with("m.1", "a\\u001b[2Jb"), &["plain file name"]),
        (with("m\\n.1", "one.safetensors"), &["tensor m\\n.1 is expected"]),
        (map(&[]), &["weight_map is empty"]),
        ("{}".to_owned(), &["missing field `weight_map`"]),
        (
            r#"{"weight_map":["one.safetensors"]}"#.to_owned(),
            &["invalid type: sequence"],
        ),
        (r#"{"weight_map":{"m.one":1}}"#.to_owned(), &["expected a string"]),
        (r#"{"weight_map":null}"#.to_owned(), &["invalid type: null"]),
        ("weight_map".to_owned(), &["not the expected JSON"]),
        (String::new(), &["not the expected JSON: EOF"]),
    ];
    let mut cases = 0;
    for (index, says) in &table {
        match with_index(index) {
            // An index may name fewer files than the folder holds.
            Ok(tensors) => assert_eq!((tensors, says.len()), (1, 0), "{index}"),
            Err(message) => {
                assert!(!says.is_empty(), "{index}: {message}");
                assert_says(&message, says);
                let named = [".json: ", ".safetensors: "].iter().any(|f| message.contains(f));
                assert!(named, "{message:?} names no file");
            }
        }
        cases += 1;
    }
    assert_eq!(cases, 25);
}

#[test]
fn an_index_that_leaves_a_tensor_out() {
    let dir = folder(&[
        ("all.safetensors", &good_file()),
        (
            INDEX,
            map(&[("m.a", "all.safetensors"), ("m.b", "all.safetensors")]).as_bytes(),
        ),
    ]);
    let message = refusal(dir.path());
    assert_says(
        &message,
        &[INDEX, "tensor m.c is in a shard but not in weight_map"],
    );
}

#[test]
fn every_truncation_of_an_index_is_refused() {
    let index = map(&[("m.one", "one.safetensors"), ("m.two", "two.safetensors")]);
    let mut refused = 0;
    for length in 0..index.len() {
        let message = with_index(&index[..length]).expect_err("half an index");
        assert_says(&message, &[INDEX, "not the expected JSON"]);
        refused += 1;
    }
    assert_eq!(refused, index.len());
}

#[test]
fn an_index_deeper_or_larger_than_any_real_one() {
    let deep = format!(r#"{{"x":{}"#, "[".repeat(100_000));
    assert_says(
        &with_index(&deep).expect_err("deep"),
        &[INDEX, "not the expected JSON"],
    );
    let dir = folder(&[]);
    let sparse = fs::File::create(dir.path().join(INDEX)).expect("a file");
    sparse.set_len(600_000_000).expect("a sparse file");
    assert_says(
        &refusal(dir.path()),
        &[INDEX, "600000000 bytes; at most 512000000"],
    );
}

#[test]
fn paths_that_hold_no_model() {
    let empty = folder(&[]);
    let root = empty.path();
    assert_says(&refusal(root), &["holds neither model.safetensors nor"]);
    assert_says(
        &refusal(&root.join("gone")),
        &["gone: cannot open", "check the path"],
    );

    let weights = root.join("model.safetensors");
    fs::create_dir(&weights).expect("a folder");
    assert_says(&refusal(root), &["holds neither"]);
    assert_says(&refusal(&weights), &["model.safetensors: holds neither"]);
    fs::remove_dir(&weights).expect("an empty folder");

    fs::create_dir(root.join("sub")).expect("a folder");
    fs::write(root.join(INDEX), map(&[("a", "sub")])).expect("a small file");
    assert_says(&refusal(root), &["sub: ", "not a regular file"]);
    fs::remove_file(root.join(INDEX)).expect("the index");

    for (bytes, says) in [
        (Vec::new(), "the file is empty"),
        (file("{}", 0), "holds no tensors"),
        (file(r#"{"__metadata__":{"format":"pt"}}"#, 0), "holds no tensors"),
        (file("{}", 1), "expected 10 bytes by its header, got 11"),
    ] {
        fs::write(&weights, bytes).expect("a small file");
        assert_says(&refusal(root), &[says]);
        assert_says(&refusal(&weights), &["model.safetensors: ", says]);
    }
}

#[cfg(unix)]
#[test]
fn links_and_pipes() {
    use std::os::unix::fs::symlink;
    let dir = folder(&[("real.bin", &good_file())]);
    let root = dir.path();
    let weights = root.join("model.safetensors");
    symlink("gone", &weights).expect("a link");
    assert_says(&refusal(root), &["holds neither"]);
    assert_says(&refusal(&weights), &["model.safetensors: cannot open"]);
    fs::remove_file(&weights).expect("the link");
    symlink("model.safetensors", &weights).expect("a link to itself");
    assert_says(&refusal(&weights), &["model.safetensors: cannot open"]);
    fs::remove_file(&weights).expect("the link");
    symlink("real.bin", &weights).expect("a link, as download caches make them");
    assert_eq!(Checkpoint::open(root).map(|c| c.names().len()).ok(), Some(3));

    // Opening a pipe would wait for a writer for ever, reading a device would never end.
    let pipe = root.join("pipe");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    assert!(made.is_ok_and(|status| status.success()), "mkfifo");
    symlink("/dev/zero", root.join("zero")).expect("a link");
    for name in ["pipe", "zero"] {
        fs::write(root.join(INDEX), map(&[("a", name)])).expect("a small file");
        assert_says(&refusal(root), &[&format!("{name}: "), "not a regular file"]);
        assert_says(&refusal(&root.join(name)), &["holds neither"]);
    }
}

#[test]
fn every_truncation_of_a_file_on_disk_is_refused() {
    let good = good_file();
    let dir = folder(&[("model.safetensors", &good)]);
    let path = dir.path().join("model.safetensors");
    let handle = fs::File::options().write(true).open(&path).expect("the file");
    assert_eq!(
        Checkpoint::open(dir.path()).map(|c| c.names().len()).ok(),
        Some(3)
    );
    let mut refused = 0;
    for length in (0..good.len()).rev() {
        handle.set_len(length as u64).expect("a shorter file");
        assert_says(&refusal(dir.path()), &["model.safetensors: "]);
        refused += 1;
    }
    assert_eq!(refused, good.len());
}

#[test]
fn views_lie_inside_their_file() {
    let good = good_file();
    let dir = folder(&[("model.safetensors", &good)]);
    let checkpoint = Checkpoint::open(dir.path()).expect("a good file");
    let data: Vec<u8> = checkpoint
        .tensors()
        .flat_map(|view| view.expect("a tensor").bytes().to_vec())
        .collect();
    assert_eq!(data, (1..=34).collect::<Vec<u8>>());
    let message = checkpoint.tensor("m.d").expect_err("no such tensor").to_string();
    assert_says(&message, &["tensor m.d is missing"]);
    let view = checkpoint.tensor("m.a").expect("a tensor");
    assert_eq!((view.row_bytes(2..3).len(), view.row_bytes(2..4).len()), (8, 0));
}
