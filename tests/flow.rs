//! From checkpoint to artifact and back, through the pipelines.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use qtool::quantize::{NonFinite, Options};
use qtool_calib::Recipe;
use qtool_calib::options::PartialOptions;
use qtool_formats::artifact::{Artifact, Manifest, Stored};
use qtool_formats::checkpoint::Checkpoint;
use qtool_formats::{FloatDtype, export};

use crate::model::{SAMPLES, Tensor, read_model, sample, small, write_file, write_model};

/// Default options at 4 bits.
pub fn options(target: &Path) -> Options {
    with_recipe(target, "bits:4", &[], &[])
}

/// Options with this recipe.
pub fn with_recipe(target: &Path, default: &str, skips: &[&str], rules: &[&str]) -> Options {
    let own = |texts: &[&str]| texts.iter().map(ToString::to_string).collect::<Vec<_>>();
    let default = PartialOptions::parse(default).unwrap().complete(4).unwrap();
    Options {
        target: target.to_owned(),
        force: false,
        recipe: Recipe::new(default, &own(skips), &own(rules)).unwrap(),
        non_finite: NonFinite::Refuse,
        max_shard_bytes: 5_000_000_000,
        threads: 2,
        device: qtool::device::Device::default(),
        show_progress: false,
        calibration: None,
    }
}

/// Quantizes by these options.
pub fn quantize(from: &Path, options: &Options) -> Manifest {
    try_quantize(from, options).unwrap()
}

/// The same, with its error.
pub fn try_quantize(from: &Path, options: &Options) -> qtool::Result<Manifest> {
    let checkpoint = Checkpoint::open(from)?;
    let plan = qtool::quantize::plan(&checkpoint, options)?;
    qtool::quantize::run(&checkpoint, &plan, options)
}

fn findings(folder: &Path, base: Option<&Path>) -> Vec<String> {
    let outcome = qtool::verify::run(folder, base, false).unwrap();
    outcome
        .findings
        .iter()
        .map(|f| format!("{}: {}", f.subject, f.problem))
        .collect()
}

fn export_to(format: &str, from: &Path, to: &Path) {
    qtool::export::run(
        from,
        export::find(format).unwrap(),
        to,
        false,
        5_000_000_000,
        false,
    )
    .unwrap();
}

/// All files of a folder.
fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let files = fs::read_dir(folder).unwrap().map(|f| f.unwrap().path());
    files
        .map(|f| {
            (
                f.file_name().unwrap().to_string_lossy().into_owned(),
                fs::read(&f).unwrap(),
            )
        })
        .collect()
}

fn small_model(dtype: FloatDtype) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    write_model(&model, &small(1, 2, dtype));
    (dir, model)
}

#[test]
fn sample_models_quantize_verify_and_export() {
    for name in SAMPLES {
        let dir = tempfile::tempdir().unwrap();
        for (bits, least_sqnr_db) in [(8, 40.0), (4, 18.0)] {
            let out = dir.path().join(format!("q{bits}"));
            let manifest = quantize(
                &sample(name),
                &with_recipe(&out, &format!("bits:{bits}"), &[], &[]),
            );
            let mut quantized = 0;
            for record in &manifest.tensors {
                if let Stored::Quantized(q) = &record.stored {
                    assert!(
                        q.figures.sqnr_db.unwrap() > least_sqnr_db,
                        "{} {:?}",
                        record.name,
                        q.figures
                    );
                    assert!(q.faults.is_empty(), "{} {:?}", record.name, q.faults);
                    quantized += 1;
                }
            }
            assert!(quantized >= 40, "{name}: {quantized}");
            assert_eq!(findings(&out, Some(&sample(name))), Vec::<String>::new());
            let dense = dir.path().join(format!("dense{bits}"));
            export_to("bf16", &out, &dense);
            let (before, after) = (read_model(&sample(name)), read_model(&dense));
            assert_eq!(before.len(), after.len());
            for ((a, x), (b, y)) in before.iter().zip(&after) {
                assert_eq!((a, x.dtype, &x.shape), (b, y.dtype, &y.shape));
            }
        }
    }
}

/// Every scheme and source type: the decoded values are what the figures say they are.
#[test]
fn every_scheme_on_every_source_type() {
    let schemes = [
        "bits:8",
        "bits:8,clip:mse,scale:f32",
        "bits:8,grid:zp,group:64,scale:f16",
        "bits:4",
        "bits:4,clip:none,group:32,scale:f16",
        "bits:4,grid:zp,group:16",
        "bits:4,group:row,scale:f32",
        "bits:2,method:ccq25",
        "bits:4,method:nf4",
        "bits:4,method:nf4-dq",
    ];
    let mut cases = 0;
    for dtype in [FloatDtype::Bf16, FloatDtype::F16, FloatDtype::F32] {
        let (dir, model) = small_model(dtype);
        for scheme in schemes {
            let out = dir.path().join(scheme.replace([':', ','], "-"));
            let manifest = quantize(&model, &with_recipe(&out, scheme, &[], &[]));
            assert_eq!(
                findings(&out, Some(&model)),
                Vec::<String>::new(),
                "{scheme} of {dtype}"
            );
            let dense = out.with_extension("dense");
            export_to("f32", &out, &dense);
            let (sources, decoded) = (read_model(&model), read_model(&dense));
            for record in &manifest.tensors {
                let Stored::Quantized(q) = &record.stored else {
                    continue;
                };
                let find = |list: &[(String, Tensor)]| {
                    list.iter().find(|(n, _)| n == &record.name).unwrap().1.clone()
                };
                let w = dtype.widen(&find(&sources).bytes);
                let d = FloatDtype::F32.widen(&find(&decoded).bytes);
                let sum = |f: &dyn Fn(f64, f64) -> f64| -> f64 {
                    w.iter()
                        .zip(&d)
                        .map(|(&w, &d)| f(f64::from(w), f64::from(d)))
                        .sum()
                };
                let mse = sum(&|w, d| (w - d).powi(2)) / sum(&|w, _| w * w);
                let stated = q.figures.relative_mse.unwrap();
                assert!(
                    (mse - stated).abs() < 1e-5 * stated,
                    "{scheme} {}: {mse} {stated}",
                    record.name
                );
                cases += 1;
            }
        }
    }
    assert_eq!(cases, 3 * schemes.len() * 6);
}

/// The same bytes for any number of threads, manifest included; and again on a second run.
#[test]
fn threads_do_not_change_a_byte() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    // Larger than a batch of blocks, so that threads have something to get wrong.
    let mut tensors = small(3, 3, FloatDtype::Bf16);
    let values = crate::model::Normal::new(9).take(6000 * 3072, 0.02);
    tensors.push((
        "model.layers.3.mlp.up_proj.weight".to_owned(),
        Tensor::floats(FloatDtype::Bf16, &[6000, 3072], &values),
    ));
    write_model(&model, &tensors);
    for recipe in ["bits:4,grid:zp,clip:none", "bits:8"] {
        let mut reference: Option<BTreeMap<String, Vec<u8>>> = None;
        for (run, threads) in [1, 2, 3, 7, 2].into_iter().enumerate() {
            let out = dir.path().join(format!("{run}"));
            let mut options = with_recipe(&out, recipe, &[], &[]);
            options.threads = threads;
            quantize(&model, &options);
            let got = contents(&out);
            assert!(got.len() >= 4);
            match &reference {
                None => reference = Some(got),
                Some(expected) => {
                    for (name, bytes) in expected {
                        assert!(
                            got.get(name) == Some(bytes),
                            "{name} differs with {threads} threads"
                        );
                    }
                }
            }
            fs::remove_dir_all(&out).unwrap();
        }
    }
}

#[test]
fn shards_hold_what_one_file_holds() {
    let (dir, model) = small_model(FloatDtype::Bf16);
    let (whole, split) = (dir.path().join("whole"), dir.path().join("split"));
    quantize(&model, &options(&whole));
    let mut sharded = options(&split);
    sharded.max_shard_bytes = 20_000;
    let manifest = quantize(&model, &sharded);
    let files: Vec<_> = manifest
        .files
        .iter()
        .filter(|f| f.name.ends_with(".safetensors"))
        .collect();
    assert!(
        files.len() > 2 && split.join("model.safetensors.index.json").is_file(),
        "{files:?}"
    );
    assert_eq!(findings(&split, Some(&model)), Vec::<String>::new());
    let (a, b) = (Artifact::open(&whole).unwrap(), Artifact::open(&split).unwrap());
    assert_eq!(a.files().names().len(), b.files().names().len());
    for name in a.files().names() {
        assert_eq!(
            a.stored(name).unwrap().bytes(),
            b.stored(name).unwrap().bytes(),
            "{name}"
        );
    }
}

#[test]
fn rules_and_skips_reach_the_artifact() {
    let (dir, model) = small_model(FloatDtype::Bf16);
    let out = dir.path().join("out");
    let rules = [
        "down_proj=bits:8",
        "embed_tokens=bits:8,group:64",
        r"layers\.0\.self_attn=keep",
    ];
    let manifest = quantize(
        &model,
        &with_recipe(&out, "bits:4", &[r"layers\.1\.self_attn"], &rules),
    );
    let fate: BTreeMap<&str, String> = manifest
        .tensors
        .iter()
        .map(|t| match &t.stored {
            Stored::Kept { reason, .. } => (t.name.as_str(), reason.clone()),
            Stored::Quantized(q) => (t.name.as_str(), q.scheme.to_string()),
        })
        .collect();
    assert_eq!(fate["model.embed_tokens.weight"], "w8-sym-g64-bf16");
    assert_eq!(fate["model.layers.0.mlp.down_proj.weight"], "w8-sym-row-bf16");
    assert_eq!(fate["model.layers.0.mlp.up_proj.weight"], "w4-sym-g64-bf16");
    assert_eq!(fate["model.layers.0.self_attn.q_proj.weight"], "--rule");
    assert_eq!(fate["model.layers.1.self_attn.q_proj.weight"], "--skip");
    assert_eq!(fate["model.layers.1.input_layernorm.weight"], "norm");
    assert_eq!(fate["model.position_ids"], "I64 is not a float weight");
    assert_eq!(findings(&out, Some(&model)), Vec::<String>::new());
}

#[test]
fn a_bare_file_and_stacked_experts_work() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("weights.safetensors");
    let values = crate::model::Normal::new(5).take(4 * 32 * 64, 0.1);
    let experts = Tensor::floats(FloatDtype::Bf16, &[4, 32, 64], &values);
    write_file(
        &file,
        &[("model.layers.0.mlp.experts.gate_up_proj".to_owned(), experts)],
    );
    fs::write(dir.path().join("unrelated.txt"), "not the model's").unwrap();
    let out = dir.path().join("out");
    let manifest = quantize(&file, &options(&out));
    assert_eq!(manifest.totals.quantized_weights, 4 * 32 * 64);
    assert!(
        !out.join("unrelated.txt").exists(),
        "a bare file has no side files"
    );
    assert_eq!(findings(&out, Some(&file)), Vec::<String>::new());
    let dense = dir.path().join("dense");
    export_to("bf16", &out, &dense);
    assert_eq!(read_model(&dense)[0].1.shape, [4, 32, 64]);
}

#[test]
fn every_flipped_byte_is_found() {
    let (dir, model) = small_model(FloatDtype::Bf16);
    let out = dir.path().join("out");
    quantize(&model, &with_recipe(&out, "bits:4,grid:zp", &[], &[]));
    let file = out.join("model.safetensors");
    let good = fs::read(&file).unwrap();
    let artifact = Artifact::open(&out).unwrap();
    let names: Vec<String> = artifact.files().names().map(str::to_owned).collect();
    drop(artifact);
    let data_start = 8 + u64::from_le_bytes(good[..8].try_into().unwrap()) as usize;
    let mut tried = 0;
    for at in (data_start..good.len()).step_by(997) {
        let mut bad = good.clone();
        bad[at] ^= 0x10;
        fs::write(&file, &bad).unwrap();
        let found = findings(&out, None);
        assert!(found.iter().any(|f| f.contains("digest")), "byte {at}: {found:?}");
        assert!(
            names
                .iter()
                .any(|n| found.iter().any(|f| n.starts_with(f.split(':').next().unwrap()))),
            "{found:?}"
        );
        tried += 1;
    }
    assert!(tried > 50, "{tried}");
    fs::write(&file, &good).unwrap();
    fs::write(out.join("tokenizer.json"), "{ }").unwrap();
    let found = findings(&out, None);
    assert!(
        found.iter().any(|f| f.starts_with("tokenizer.json: digest")),
        "{found:?}"
    );
    fs::remove_file(out.join("tokenizer.json")).unwrap();
    assert!(findings(&out, None)[0].contains("cannot be read"));
}

/// A manifest that praises itself is caught: figures are derived again, not believed.
#[test]
fn wrong_figures_and_wrong_bases_are_found() {
    let (dir, model) = small_model(FloatDtype::Bf16);
    let out = dir.path().join("out");
    quantize(&model, &options(&out));
    let other = dir.path().join("other");
    write_model(&other, &small(2, 2, FloatDtype::Bf16));
    let found = findings(&out, Some(&other));
    assert!(
        found.iter().any(|f| f.contains("digest of the source")),
        "{found:?}"
    );
    let path = out.join("qtool.json");
    let text = fs::read_to_string(&path).unwrap();
    for key in [
        "relative_mse",
        "sqnr_db",
        "cosine",
        "max_abs_error",
        "code_entropy_bits",
        "saturated",
        "bits_per_weight",
    ] {
        let mut manifest: serde_json::Value = serde_json::from_str(&text).unwrap();
        let tensors = manifest["tensors"].as_array_mut().unwrap();
        let tensor = tensors.iter_mut().find(|t| t["stored"] == "quantized").unwrap();
        let figure = &mut tensor["figures"][key];
        *figure = serde_json::json!(figure.as_f64().unwrap() * 1.01);
        fs::write(&path, manifest.to_string()).unwrap();
        assert_eq!(findings(&out, Some(&model)).len(), 1, "{key}");
    }
}

#[test]
fn degenerate_weights_are_caught_when_written_and_when_verified() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    let mut tensors = small(4, 1, FloatDtype::Bf16);
    let zero = Tensor::floats(FloatDtype::Bf16, &[64, 128], &vec![0.0; 64 * 128]);
    tensors.push(("model.layers.0.mlp.gate_proj.weight".to_owned(), zero));
    // One huge weight a row takes the whole INT8 grid: everything else rounds to zero.
    let mut spiky = crate::model::Normal::new(8).take(64 * 128, 0.01);
    spiky.iter_mut().step_by(128).for_each(|w| *w = 1e4);
    tensors.push((
        "model.layers.0.mlp.spiky_proj.weight".to_owned(),
        Tensor::floats(FloatDtype::Bf16, &[64, 128], &spiky),
    ));
    write_model(&model, &tensors);
    let out = dir.path().join("out");
    let manifest = quantize(&model, &with_recipe(&out, "bits:8", &[], &[]));
    let faults: BTreeMap<&str, &Vec<String>> = manifest
        .tensors
        .iter()
        .filter_map(|t| match &t.stored {
            Stored::Quantized(q) if !q.faults.is_empty() => Some((t.name.as_str(), &q.faults)),
            _ => None,
        })
        .collect();
    assert_eq!(faults.len(), 2, "{faults:?}");
    assert!(faults["model.layers.0.mlp.gate_proj.weight"][0].contains("constant codes"));
    assert!(faults["model.layers.0.mlp.spiky_proj.weight"][0].contains("share one code"));
    assert_eq!(findings(&out, Some(&model)).len(), 2);
    // The findings do not rest on the writer's own record of faults.
    let path = out.join("qtool.json");
    let mut record: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    for tensor in record["tensors"].as_array_mut().unwrap() {
        tensor.as_object_mut().unwrap().remove("faults");
    }
    fs::write(&path, record.to_string()).unwrap();
    assert_eq!(findings(&out, None).len(), 2);
}
