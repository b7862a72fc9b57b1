//! The program as a person or a pipeline meets it: words printed, exit statuses, files left.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use qtool_formats::FloatDtype;
use serde_json::Value;

use crate::model::{Tensor, small, write_model};

/// The program, without colours or a terminal.
pub fn qtool(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_qtool"))
        .args(args)
        .output()
        .unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// Asserts exit status 2 and one sentence on standard error that holds all of `parts`.
#[track_caller]
pub fn assert_error(output: &Output, parts: &[&str]) {
    let message = text(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{message}");
    assert!(
        message.starts_with("error: ") && !message.contains("panicked"),
        "{message}"
    );
    for part in parts {
        assert!(message.contains(part), "{message:?} should contain {part:?}");
    }
    assert!(output.stdout.is_empty(), "{}", text(&output.stdout));
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .unwrap()
        .map(|f| f.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// A folder with a small model in `model`.
pub fn workshop() -> (tempfile::TempDir, String, String) {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    write_model(&model, &small(1, 2, FloatDtype::Bf16));
    let path = |name: &str| dir.path().join(name).to_string_lossy().into_owned();
    let (model, out) = (path("model"), path("out"));
    (dir, model, out)
}

#[test]
fn the_whole_way_by_command_line() {
    let (dir, model, out) = workshop();
    let run = qtool(&["quantize", &model, "-o", &out, "--bits", "4"]);
    assert_eq!(run.status.code(), Some(0), "{}", text(&run.stderr));
    assert!(run.stderr.is_empty(), "quiet when piped: {}", text(&run.stderr));
    let printed = text(&run.stdout);
    for part in [
        "model.layers.*.mlp.down_proj.weight",
        "w4-sym-g64-bf16",
        "kept (embedding)",
        "bits per weight",
        "Next: qtool verify",
    ] {
        assert!(printed.contains(part), "{printed}");
    }
    assert!(!printed.contains('\u{1b}'), "no colours when piped");
    assert_eq!(
        names(Path::new(&out)),
        ["config.json", "model.safetensors", "qtool.json", "tokenizer.json"]
    );
    assert_eq!(names(dir.path()), ["model", "out"], "nothing else is left");

    let config: Value =
        serde_json::from_str(&fs::read_to_string(format!("{out}/config.json")).unwrap()).unwrap();
    assert_eq!(config["model_type"], "test");
    assert_eq!(config["quantization_config"]["quant_method"], "qtool");

    let run = qtool(&["verify", &out, "--base", &model]);
    assert_eq!(run.status.code(), Some(0), "{}", text(&run.stdout));
    assert!(text(&run.stdout).starts_with("sound: "));

    let run = qtool(&["inspect", &out]);
    assert!(
        text(&run.stdout).contains("Worst by SQNR:"),
        "{}",
        text(&run.stdout)
    );
    let run = qtool(&["inspect", &out, "--tensor", "model.layers.0.mlp.up_proj.weight"]);
    let printed = text(&run.stdout);
    assert!(
        printed.contains("code entropy") && printed.contains("####"),
        "{printed}"
    );
    let run = qtool(&[
        "inspect",
        &model,
        "--tensor",
        "model.layers.0.mlp.up_proj.weight",
        "--json",
    ]);
    let histogram = &serde_json::from_slice::<Value>(&run.stdout).unwrap()["histogram"];
    let counts: u64 = histogram["counts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c.as_u64().unwrap())
        .sum();
    assert_eq!(counts, 192 * 128);

    let dense = dir.path().join("dense");
    let run = qtool(&["export", &out, "--to", "bf16", "-o", dense.to_str().unwrap()]);
    assert_eq!(run.status.code(), Some(0), "{}", text(&run.stderr));
    assert_eq!(
        names(&dense),
        [
            "README.md",
            "config.json",
            "model.safetensors",
            "qtool-export.json",
            "tokenizer.json"
        ]
    );
    let config: Value =
        serde_json::from_str(&fs::read_to_string(dense.join("config.json")).unwrap()).unwrap();
    assert!(config.get("quantization_config").is_none(), "{config}");
}

#[test]
fn machines_get_json() {
    let (_dir, model, out) = workshop();
    let json = |args: &[&str]| -> Value { serde_json::from_slice(&qtool(args).stdout).unwrap() };
    let plan = json(&[
        "quantize",
        &model,
        "-o",
        &out,
        "--bits",
        "8",
        "--dry-run",
        "--json",
    ]);
    assert!(!Path::new(&out).exists(), "a dry run writes nothing");
    let done = json(&["quantize", &model, "-o", &out, "--bits", "8", "--json"]);
    assert_eq!(plan["stored_bytes"], done["stored_bytes"]);
    assert!(plan["estimated_seconds"].as_f64().unwrap() > 0.0);
    let files: u64 = fs::metadata(format!("{out}/model.safetensors")).unwrap().len();
    let stored = done["stored_bytes"].as_u64().unwrap();
    assert!(
        files > stored && files < stored + 8192,
        "the plan's size is the file's, less its header"
    );
    let checked = json(&["verify", &out, "--json"]);
    assert_eq!(checked["sound"], true);
    let listed = json(&["inspect", &out, "--json"]);
    assert_eq!(listed["tensors"].as_array().unwrap().len(), 10);
    assert_eq!(listed["kind"], "artifact");
}

/// Foreseen, recorded, and out of range in a sentence.
#[test]
fn bits_of_scales_are_foreseen_and_recorded() {
    let (_dir, model, out) = workshop();
    let run = |bits: &str, rest: &[&str]| {
        let base = [
            "quantize",
            &model,
            "-o",
            &out,
            "--bits",
            "4",
            "--group-size",
            "32",
        ];
        let ours = ["--asymmetric", "--scale-dtype", "f16", "--scale-bits", bits];
        qtool(&[&base, &ours[..], rest].concat())
    };
    let options = "bits:4,group:32,grid:zp,clip:mse,scale:f16,scale-bits:7";
    let plan: Value = serde_json::from_slice(&run("7", &["--dry-run", "--json"]).stdout).unwrap();
    assert_eq!(plan["options"], options);
    assert!(text(&run("7", &["--dry-run"]).stdout).contains(options));
    assert!(!Path::new(&out).exists(), "a dry run writes nothing");
    for (bits, words) in [
        ("12", "accepted are 4 to 11"),
        ("3", "accepted are 4 to 11"),
        ("x", "4 to 8 for bf16"),
    ] {
        let refused = run(bits, &[]);
        assert_eq!(refused.status.code(), Some(2));
        assert!(text(&refused.stderr).contains(words), "{}", text(&refused.stderr));
        assert!(!Path::new(&out).exists());
    }
    assert_eq!(
        run("7", &["--rule", "down_proj=scale-bits:11"]).status.code(),
        Some(0)
    );
    let manifest: Value = serde_json::from_slice(&fs::read(format!("{out}/qtool.json")).unwrap()).unwrap();
    assert_eq!(manifest["options"]["default"], options);
    let methods = |module: &str| -> Vec<String> {
        let all = manifest["tensors"].as_array().unwrap().iter();
        all.filter(|t| t["name"].as_str().unwrap().contains(module))
            .map(ToString::to_string)
            .collect()
    };
    let (up, down) = (methods("up_proj"), methods("down_proj"));
    assert!(!up.is_empty() && !down.is_empty());
    let coarse = "rtn, clip search, scales of 7 significant bits";
    assert!(
        up.iter()
            .all(|t| t.contains(coarse) && t.contains("w4-zp-g32-f16"))
    );
    assert!(!down.iter().any(|t| t.contains("significant bits")));
}

#[test]
fn a_finding_is_status_one() {
    let (_dir, model, out) = workshop();
    qtool(&["quantize", &model, "-o", &out, "--bits", "8"]);
    let path = format!("{out}/model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&path, bytes).unwrap();
    let run = qtool(&["verify", &out]);
    assert_eq!(run.status.code(), Some(1));
    let printed = text(&run.stdout);
    assert!(
        printed.contains("found: ") && printed.contains("expected blake3:"),
        "{printed}"
    );
    let run = qtool(&["verify", &out, "--json"]);
    assert_eq!(run.status.code(), Some(1));
}

#[test]
fn existing_targets_are_safe() {
    let (dir, model, out) = workshop();
    fs::create_dir(&out).unwrap();
    fs::write(format!("{out}/notes.txt"), "mine").unwrap();
    let args = ["quantize", &model, "-o", &out, "--bits", "8"];
    assert_error(&qtool(&args), &[&out, "exists already", "--force"]);
    let forced = ["quantize", &model, "-o", &out, "--bits", "8", "--force"];
    assert_error(&qtool(&forced), &[&out, "qtool wrote"]);
    assert_error(
        &qtool(&["quantize", &model, "-o", &model, "--bits", "8", "--force"]),
        &["model"],
    );
    assert_eq!(fs::read_to_string(format!("{out}/notes.txt")).unwrap(), "mine");
    fs::remove_dir_all(&out).unwrap();
    assert_eq!(qtool(&args).status.code(), Some(0));
    assert_eq!(
        qtool(&forced).status.code(),
        Some(0),
        "its own output may be replaced"
    );
    let again = qtool(&["quantize", &out, "-o", &format!("{out}2"), "--bits", "4"]);
    assert_error(&again, &["artifact of qtool", "original"]);
    assert_eq!(names(dir.path()), ["model", "out"]);
}

#[test]
fn what_cannot_be_done_is_said_at_once_and_leaves_nothing() {
    let (dir, model, out) = workshop();
    let quantize = |rest: &[&str]| {
        let mut args = vec!["quantize", model.as_str(), "-o", out.as_str()];
        args.extend(rest);
        qtool(&args)
    };
    assert_error(
        &quantize(&["--bits", "4", "--group-size", "128"]),
        &[
            "down_proj.weight (2 tensors)",
            "K = 192 is not a multiple of 128",
            "16, 32, 64, or row",
        ],
    );
    assert_error(&quantize(&["--bits", "5"]), &["--bits", "4 and 8"]);
    assert_error(
        &quantize(&["--bits", "4", "--group-size", "48"]),
        &["48", "accepted are 16, 32"],
    );
    assert_error(
        &quantize(&["--bits", "4", "--rule", "donw_proj=bits:8"]),
        &["donw_proj", "matches no tensor"],
    );
    assert_error(
        &quantize(&["--bits", "4", "--rule", "down_proj=bits:5"]),
        &["4 and 8"],
    );
    assert_error(
        &quantize(&["--bits", "4", "--skip", "("]),
        &["regular expression"],
    );
    assert_error(
        &quantize(&["--bits", "4", "--skip", "weight"]),
        &["none of its tensors"],
    );
    assert_error(&quantize(&["--bits", "4", "--max-shard-size", "lots"]), &["5GB"]);
    assert_error(
        &qtool(&["quantize", "/nowhere/model", "-o", &out, "--bits", "4"]),
        &["/nowhere/model", "cannot open"],
    );
    assert_error(
        &qtool(&["export", &model, "--to", "bf16", "-o", &out]),
        &["qtool.json"],
    );
    assert_error(
        &qtool(&["export", &model, "--to", "gguff", "-o", &out]),
        &["gguff", "did you mean gguf?", "bf16", "f32", "fastdeploy"],
    );
    assert_error(
        &qtool(&["inspect", &model, "--tensor", "nope"]),
        &["nope", "missing"],
    );
    assert_error(&qtool(&["verify", &model]), &["qtool.json"]);
    assert_eq!(names(dir.path()), ["model"]);
}

#[test]
fn non_finite_weights_are_refused_by_index_or_kept() {
    let (dir, model, out) = workshop();
    let mut tensors = small(1, 2, FloatDtype::Bf16);
    let mut values = vec![0.25f32; 192 * 128];
    values[5 * 128 + 7] = f32::NAN;
    let up = tensors
        .iter_mut()
        .find(|(n, _)| n == "model.layers.1.mlp.up_proj.weight")
        .unwrap();
    up.1 = Tensor::floats(FloatDtype::Bf16, &[192, 128], &values);
    write_model(Path::new(&model), &tensors);
    let args = ["quantize", &model, "-o", &out, "--bits", "8"];
    assert_error(
        &qtool(&args),
        &[
            "model.layers.1.mlp.up_proj.weight",
            "[5, 7]",
            "NaN",
            "--non-finite keep",
        ],
    );
    assert_eq!(names(dir.path()), ["model"]);
    let run = qtool(&[args.as_slice(), &["--non-finite", "keep"]].concat());
    assert_eq!(run.status.code(), Some(0), "{}", text(&run.stderr));
    assert!(
        text(&run.stdout).contains("kept (holds NaN or infinity)"),
        "{}",
        text(&run.stdout)
    );
    assert_eq!(qtool(&["verify", &out, "--base", &model]).status.code(), Some(0));
}

#[test]
fn quantized_checkpoints_of_others_are_refused() {
    let (_dir, model, out) = workshop();
    let config = format!("{model}/config.json");
    fs::write(&config, r#"{"quantization_config": {"quant_method": "gptq"}}"#).unwrap();
    assert_error(
        &qtool(&["quantize", &model, "-o", &out, "--bits", "4"]),
        &["gptq", "original"],
    );
    fs::write(&config, "[]").unwrap();
    assert_error(
        &qtool(&["quantize", &model, "-o", &out, "--bits", "4"]),
        &["config.json", "JSON object"],
    );
    fs::write(&config, "{\"cut").unwrap();
    assert_error(
        &qtool(&["quantize", &model, "-o", &out, "--bits", "4"]),
        &["config.json", "JSON"],
    );
    fs::write(&config, "{}").unwrap();
    let mut tensors = small(1, 1, FloatDtype::Bf16);
    tensors[2].0 = "model.layers.0.self_attn.q_proj.qweight".to_owned();
    write_model(Path::new(&model), &tensors);
    assert_error(
        &qtool(&["quantize", &model, "-o", &out, "--bits", "4"]),
        &["q_proj.qweight", "quantized already"],
    );
}

#[test]
fn help_and_completions_speak_of_every_command() {
    let help = text(&qtool(&["--help"]).stdout);
    for command in ["quantize", "inspect", "verify", "export", "completions"] {
        assert!(help.contains(command), "{help}");
        let help = text(&qtool(&[command, "--help"]).stdout);
        assert!(help.contains("Example"), "{command}: {help}");
    }
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = text(&qtool(&["completions", shell]).stdout);
        assert!(
            script.contains("quantize") && script.contains("verify"),
            "{shell}"
        );
    }
}

/// A reader that goes away early is no error.
#[test]
fn a_closed_pipe_is_quiet() {
    let (_dir, model, _) = workshop();
    let script = format!(
        "{} inspect {model} --all | head -n 0; echo done",
        env!("CARGO_BIN_EXE_qtool")
    );
    let run = Command::new("sh").args(["-c", &script]).output().unwrap();
    assert_eq!(
        (text(&run.stdout).as_str(), text(&run.stderr).as_str()),
        ("done\n", "")
    );
}
