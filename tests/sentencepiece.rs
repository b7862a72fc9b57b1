//! SentencePiece models against the `sentencepiece` package (`tests/golden/tokenizers`), and what folders add.

use std::fs;
use std::path::{Path, PathBuf};

use qtool::tokenizer::Tokenizer;
use serde_json::{Value, json};

const MODELS: [&str; 3] = ["bpe-ernie", "bpe-llama", "unigram"];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/tokenizers")
        .join(name)
}

/// A model in a folder of its own, with this `tokenizer_config.json`.
fn folder(name: &str, config: &Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("tokenizer.model");
    fs::copy(golden(name).join("tokenizer.model"), model).unwrap();
    fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    dir
}

fn ids(value: &Value) -> Vec<u32> {
    let ids = value.as_array().unwrap().iter();
    ids.map(|id| id.as_u64().unwrap() as u32).collect()
}

fn texts(path: &Path, least: usize) -> Vec<Value> {
    let texts: Vec<Value> = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    assert!(texts.len() >= least, "{} texts", texts.len());
    texts
}

#[test]
fn ids_and_texts_are_the_reference_packages() {
    for name in MODELS {
        let tokenizer = Tokenizer::open(&golden(name)).unwrap();
        let mut faults = Vec::new();
        for row in texts(&golden(name).join("texts.json"), 200) {
            let text = row["text"].as_str().unwrap();
            let got = tokenizer.encode(text, false).unwrap();
            if got != ids(&row["ids"]) {
                faults.push(format!("{name} {text:?}: {got:?}, expected {}", row["ids"]));
            }
            let decoded = tokenizer.decode(&ids(&row["ids"]), false).unwrap();
            if decoded != row["decoded"].as_str().unwrap() {
                faults.push(format!(
                    "{name} {text:?}: {decoded:?}, expected {}",
                    row["decoded"]
                ));
            }
        }
        assert!(faults.is_empty(), "{}\n{}", faults.len(), faults.join("\n"));
    }
}

#[test]
fn tokens_of_the_folder_are_found_first() {
    for name in ["bpe-ernie", "bpe-llama"] {
        let bytes = fs::read(golden(name).join("specials.json")).unwrap();
        let golden: Value = serde_json::from_slice(&bytes).unwrap();
        let dir = folder(name, &golden["config"]);
        let tokenizer = Tokenizer::open(dir.path()).unwrap();
        assert_eq!(tokenizer.vocabulary(), 1704);
        let texts = golden["texts"].as_array().unwrap();
        assert!(texts.len() >= 16);
        for row in texts {
            let text = row["text"].as_str().unwrap();
            assert_eq!(
                tokenizer.encode(text, false).unwrap(),
                ids(&row["ids"]),
                "{name} {text:?}"
            );
            // ERNIE-4.5 puts nothing around a document.
            assert_eq!(tokenizer.encode(text, true).unwrap(), ids(&row["ids"]));
        }
        let special = tokenizer.encode("a<|end|>extra word", false).unwrap();
        assert_eq!(tokenizer.decode(&special, false).unwrap(), "a<|end|>extra word");
        assert_eq!(tokenizer.decode(&special, true).unwrap(), "aextra word");
        assert_eq!((tokenizer.ids().bos, tokenizer.ids().eos), (Some(1), Some(2)));
        let beyond = tokenizer.decode(&[3000], false).unwrap_err().to_string();
        assert!(beyond.contains("3000") && beyond.contains("1704"), "{beyond}");
    }
}

/// What stands around a document is the folder's business, by its flags or by its class.
#[test]
fn documents_begin_and_end_as_the_folder_says() {
    let names = json!({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"});
    let with = |more: &Value| {
        let mut config = names.clone();
        let fields = more.as_object().unwrap().clone();
        config.as_object_mut().unwrap().extend(fields);
        let dir = folder("bpe-llama", &config);
        Tokenizer::open(dir.path()).unwrap()
    };
    let plain = with(&json!({})).encode("Debian", false).unwrap();
    for (config, before, after) in [
        (json!({}), &[][..], &[][..]),
        (json!({"tokenizer_class": "LlamaTokenizer"}), &[1], &[]),
        (json!({"tokenizer_class": "T5Tokenizer"}), &[], &[2]),
        (json!({"add_bos_token": true, "add_eos_token": true}), &[1], &[2]),
        (
            json!({"tokenizer_class": "LlamaTokenizer", "add_bos_token": false}),
            &[],
            &[],
        ),
    ] {
        let tokenizer = with(&config);
        let whole = [before, &plain, after].concat();
        assert_eq!(tokenizer.encode("Debian", true).unwrap(), whole, "{config}");
        let pair = tokenizer.encode_pair("Debian", "Debian").unwrap();
        assert_eq!(pair.0, [whole.clone(), whole.clone()].concat());
        assert_eq!(pair.1.iter().sum::<u32>() as usize, whole.len());
        let row = tokenizer
            .encode_row("Debian", Some("Debian"), whole.len() * 2 - 1)
            .unwrap();
        assert_eq!((row.ids.len(), row.cut), (whole.len() * 2 - 1, 1));
    }
    // Without the legacy behaviour only the first word of a text gets a space.
    let modern = with(&json!({"legacy": false}));
    let spaced = modern.encode("Debian<s>Debian", false).unwrap();
    assert_eq!(spaced[..plain.len()], plain);
    assert_ne!(spaced[plain.len() + 1..], plain);
    let old = with(&json!({})).encode("Debian<s>Debian", false).unwrap();
    assert_eq!(old[plain.len() + 1..], plain);
}

#[test]
fn what_cannot_be_read_is_one_sentence() {
    let dir = folder("unigram", &json!({}));
    let path = dir.path().join("tokenizer.model");
    let good = fs::read(&path).unwrap();
    let opened = |bytes: &[u8]| {
        fs::write(&path, bytes).unwrap();
        Tokenizer::open(dir.path())
    };
    let mut refused = 0;
    for cut in [0, 1, 7, 100, good.len() / 3, good.len() / 2, good.len() - 1] {
        let message = opened(&good[..cut]).unwrap_err().to_string();
        assert!(
            message.contains("tokenizer.model") && !message.contains('\n'),
            "{message}"
        );
        refused += 1;
    }
    // Damage anywhere is refused or leaves a tokenizer that runs; never a panic.
    for at in (0..good.len()).step_by(good.len() / 400) {
        let mut bytes = good.clone();
        bytes[at] ^= 0xff;
        match opened(&bytes) {
            Ok(tokenizer) => {
                for text in ["Debian ﬁ e\u{301} 你好 1", "ｶﾞ ㍿ <mask:1>"] {
                    let ids = tokenizer.encode(text, true).unwrap();
                    tokenizer.decode(&ids, false).unwrap();
                }
            }
            Err(_) => refused += 1,
        }
    }
    assert!(refused > 20, "{refused}");
    let message = opened(b"IQ== 0\nIg== 1\n").unwrap_err().to_string();
    assert!(message.contains("no usable SentencePiece model"), "{message}");
    let dir = folder("unigram", &json!({"tokenizer_class": "XLMRobertaTokenizer"}));
    let message = Tokenizer::open(dir.path()).unwrap_err().to_string();
    assert!(
        message.contains("XLMRoberta") && message.contains("tokenizer.json"),
        "{message}"
    );
}
