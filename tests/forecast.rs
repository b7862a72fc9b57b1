//! What `quantize --dry-run --calib` foretells, against what then happens; and the memory calibration takes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use qtool_formats::FloatDtype;
use serde_json::{Value, json};

use crate::calibrate::ids_file;
use crate::cli::qtool;
use crate::model::{Normal, SAMPLES, Tensor, sample, write_model};

/// Bytes of the files of a folder of statistics, its index left out.
fn size(folder: &Path) -> u64 {
    let entries = fs::read_dir(folder).unwrap().map(|e| e.unwrap());
    let blocks: Vec<u64> = entries
        .filter(|e| e.file_name().to_string_lossy().starts_with("block-"))
        .map(|e| e.metadata().unwrap().len())
        .collect();
    assert!(blocks.len() >= 4, "{}", blocks.len());
    blocks.iter().sum()
}

#[test]
fn a_dry_run_foretells_the_size_of_statistics() {
    for name in SAMPLES {
        let dir = tempfile::tempdir().unwrap();
        let ids = ids_file(dir.path());
        let model = sample(name);
        let (model, ids) = (model.to_str().unwrap(), ids.to_str().unwrap());
        let statistics = dir.path().join("statistics");
        let out = dir.path().join("out");
        let (to, out) = (statistics.to_str().unwrap(), out.to_str().unwrap());
        let rows = ["--rows", "8", "--length", "64"];
        let run = |args: &[&str]| {
            let output = qtool(args);
            assert!(
                output.status.success(),
                "{}",
                String::from_utf8_lossy(&output.stderr)
            );
            String::from_utf8(output.stdout).unwrap()
        };
        run(&[&["calibrate", model, "-o", to, "--data", ids], &rows[..]].concat());
        let dry = [
            "quantize",
            model,
            "-o",
            out,
            "--bits",
            "4",
            "--dry-run",
            "--calib",
        ];
        let foretold = |args: &[&str]| -> Value {
            let text = run(&[&dry, args, &["--json"]].concat());
            serde_json::from_str::<Value>(&text).unwrap()["calibration"].clone()
        };
        let sequential = foretold(&[&[ids], &rows[..]].concat());
        assert_eq!(
            (&sequential["rows"], &sequential["tokens"]),
            (&json!(8), &json!(512))
        );
        let bytes = sequential["statistics_bytes"].as_u64().unwrap() as f64;
        let share = bytes / size(&statistics) as f64;
        // Headers and the magnitudes of keys and values are not counted.
        assert!((0.9..=1.0).contains(&share), "{name}: {share}");
        let one_pass = foretold(&[&[ids, "--one-pass"], &rows[..]].concat());
        let again = foretold(&[to]);
        let seconds = |forecast: &Value, what: &str| forecast[what].as_f64().unwrap();
        for forecast in [&sequential, &one_pass] {
            assert!(seconds(forecast, "forward_seconds") > 0.0);
        }
        assert_eq!(seconds(&again, "forward_seconds"), 0.0);
        for forecast in [&sequential, &one_pass, &again] {
            assert!(seconds(forecast, "choose_seconds") > 0.0);
        }
        assert_eq!(again["statistics_bytes"], json!(size(&statistics)));
        let text = run(&[&dry, &[ids][..], &rows[..]].concat());
        assert!(text.contains("Calibrating on 8 rows, 512 tokens"), "{text}");
        assert!(!Path::new(out).exists());
    }
}

const HIDDEN: usize = 64;
const INTERMEDIATE: usize = 2048;

/// A decoder of three blocks with one very wide input each, and the sample's tokenizer.
fn wide(folder: &Path) -> PathBuf {
    let mut normal = Normal::new(3);
    let mut tensors = Vec::new();
    let mut add = |name: String, shape: &[usize]| {
        let values = normal.take(shape.iter().product(), 0.05);
        tensors.push((name, Tensor::floats(FloatDtype::Bf16, shape, &values)));
    };
    add("model.embed_tokens.weight".to_owned(), &[4096, HIDDEN]);
    add("model.norm.weight".to_owned(), &[HIDDEN]);
    for layer in 0..3 {
        let at = format!("model.layers.{layer}");
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            add(format!("{at}.{norm}.weight"), &[HIDDEN]);
        }
        for name in ["q_proj", "k_proj", "v_proj", "o_proj"] {
            add(format!("{at}.self_attn.{name}.weight"), &[HIDDEN, HIDDEN]);
        }
        for name in ["gate_proj", "up_proj"] {
            add(format!("{at}.mlp.{name}.weight"), &[INTERMEDIATE, HIDDEN]);
        }
        add(format!("{at}.mlp.down_proj.weight"), &[HIDDEN, INTERMEDIATE]);
    }
    let model = folder.join("model");
    write_model(&model, &tensors);
    let config = json!({
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_hidden_layers": 3,
        "num_attention_heads": 2, "vocab_size": 4096, "tie_word_embeddings": true,
        "max_position_embeddings": 512,
    });
    fs::write(model.join("config.json"), config.to_string()).unwrap();
    let tokenizer = sample("tiny-ernie45").join("tokenizer.json");
    fs::copy(tokenizer, model.join("tokenizer.json")).unwrap();
    model
}

/// The most anonymous memory the program had while it ran, in bytes, looked at every millisecond.
fn peak(args: &[&str]) -> usize {
    let mut child = Command::new(env!("CARGO_BIN_EXE_qtool"))
        .args(args)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let status = format!("/proc/{}/status", child.id());
    let (mut peak, mut looks) = (0, 0);
    let ended = loop {
        if let Some(ended) = child.try_wait().unwrap() {
            break ended;
        }
        let text = fs::read_to_string(&status).unwrap_or_default();
        let line = text.lines().find_map(|l| l.strip_prefix("RssAnon:"));
        if let Some(kib) = line.and_then(|l| l.split_whitespace().next()?.parse::<usize>().ok()) {
            peak = peak.max(kib << 10);
            looks += 1;
        }
        std::thread::sleep(Duration::from_millis(1));
    };
    assert!(ended.success() && looks > 20, "{ended} {looks}");
    peak
}

/// The bounds of `docs/calibration.md`. Holding the statistics of all eight slices of the corpus at once, as an
/// earlier version did, is far beyond them.
#[test]
fn memory_is_bounded_as_stated() {
    let dir = tempfile::tempdir().unwrap();
    let model = wide(dir.path());
    let ids = ids_file(dir.path());
    let at = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
    let (model, ids) = (model.to_str().unwrap(), ids.to_str().unwrap());
    let rows = ["--rows", "32", "--length", "64", "--threads", "2"];
    let square = |k: usize| k * k * 8;
    let block = 3 * square(HIDDEN) + square(INTERMEDIATE);
    let activations = 32 * 64 * HIDDEN * 4;
    let fixed = 64 << 20;
    let measured = peak(
        &[
            &["calibrate", model, "-o", &at("statistics"), "--data", ids],
            &rows[..],
        ]
        .concat(),
    );
    let bound = 3 * block + activations + fixed;
    assert!(
        measured <= bound,
        "calibrate: {} of {} MB",
        measured >> 20,
        bound >> 20
    );
    assert!(
        measured > block,
        "the block's statistics were held at all: {measured}"
    );
    let weights = (4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE) * 4;
    let out = at("out");
    let quantize = ["quantize", model, "-o", &out, "--bits", "4", "--calib", ids];
    let measured = peak(&[&quantize, &rows[..]].concat());
    let bound = 2 * block + 4 * square(INTERMEDIATE) + 3 * weights + activations + fixed;
    assert!(
        measured <= bound,
        "quantize: {} of {} MB",
        measured >> 20,
        bound >> 20
    );
}
