//! Tokenizers and chat templates against the libraries they imitate (`tests/golden/tokenizers`).

use std::fs;
use std::path::{Path, PathBuf};

use qtool::tokenizer::Tokenizer;
use serde_json::{Value, json};

use crate::model::sample;

fn golden() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizers/golden.json");
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    let ids = value.as_array().unwrap();
    ids.iter()
        .map(|id| u32::try_from(id.as_u64().unwrap()).unwrap())
        .collect()
}

/// The sample's tokenizer in a folder of its own, with this `tokenizer_config.json`.
fn folder(config: &Value) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    fs::copy(
        sample("tiny-ernie45").join("tokenizer.json"),
        path.join("tokenizer.json"),
    )
    .unwrap();
    fs::write(path.join("tokenizer_config.json"), config.to_string()).unwrap();
    (dir, path)
}

#[test]
fn ids_are_the_reference_librarys() {
    let tokenizer = Tokenizer::open(&sample("tiny-ernie45")).unwrap();
    let golden = golden();
    let texts = golden["ids"].as_array().unwrap();
    assert!(texts.len() >= 40);
    for item in texts {
        let text = item["text"].as_str().unwrap();
        let plain = tokenizer.encode(text, false).unwrap();
        assert_eq!(plain, ids(&item["plain"]), "{text:?}");
        assert_eq!(
            tokenizer.encode(text, true).unwrap(),
            ids(&item["special"]),
            "{text:?}"
        );
        assert_eq!(
            tokenizer.decode(&plain, false).unwrap(),
            item["decoded"].as_str().unwrap()
        );
        assert!(plain.iter().all(|id| (*id as usize) < tokenizer.vocabulary()));
    }
    assert!(tokenizer.digest().starts_with("blake3:"));
}

#[test]
fn conversations_become_the_reference_librarys_text() {
    let golden = golden();
    let talks = golden["talks"].as_array().unwrap();
    assert!(talks.len() >= 12);
    for talk in talks {
        let config =
            json!({"chat_template": talk["template"], "bos_token": "<s>", "eos_token": {"content": "</s>"}});
        let (_dir, path) = folder(&config);
        let tokenizer = Tokenizer::open(&path).unwrap();
        let text = tokenizer
            .chat(&talk["messages"], talk["prompt"].as_bool().unwrap())
            .unwrap();
        assert_eq!(text, talk["text"].as_str().unwrap(), "{}", talk["name"]);
    }
}

/// 1,700,000,000 seconds after 1970 is the 14th of November 2023, 22:13:20 UTC.
#[test]
fn templates_may_print_the_date() {
    let template = "{{ strftime_now('%d %b %Y') }} {{ strftime_now('%Y-%m-%d %H:%M:%S') }}";
    let (_dir, path) = folder(&json!({"chat_template": template}));
    let then = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_700_000_000);
    let tokenizer = Tokenizer::open(&path).unwrap();
    let text = tokenizer
        .chat_at(&json!([{"role": "user", "content": "x"}]), false, then)
        .unwrap();
    assert_eq!(text, "14 Nov 2023 2023-11-14 22:13:20");
}

#[test]
fn what_cannot_be_read_is_one_sentence() {
    let empty = tempfile::tempdir().unwrap();
    let message = |path: &Path| Tokenizer::open(path).unwrap_err().to_string();
    assert!(message(empty.path()).contains("tokenizer.json"));
    let (_dir, path) = folder(&json!({}));
    let none = Tokenizer::open(&path)
        .unwrap()
        .chat(&json!([]), false)
        .unwrap_err()
        .to_string();
    assert!(none.contains("no chat template"), "{none}");
    let bytes = fs::read(path.join("tokenizer.json")).unwrap();
    for cut in [0, 1, 100, bytes.len() / 2, bytes.len() - 2] {
        fs::write(path.join("tokenizer.json"), &bytes[..cut]).unwrap();
        assert!(message(&path).contains("tokenizer.json"), "{cut}");
    }
    for (template, expected) in [
        ("{% for %}", "line 1"),
        ("{{ raise_exception('no system') }}", "no system"),
    ] {
        let (_dir, path) = folder(&json!({"chat_template": template}));
        let outcome = Tokenizer::open(&path).and_then(|t| t.chat(&json!([]), false));
        let message = outcome.unwrap_err().to_string();
        assert!(message.contains(expected), "{message}");
    }
}
