//! Rewritten models: the same function before quantization, artifacts that verify against the original, statistics
//! that are those of the rewritten model.

mod artifacts;
mod refusals;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use qtool::calibrate::balance;
use qtool::calibrate::corpus::{Corpus, CorpusOptions};
use qtool::calibrate::coverage::{EvidenceSource, Observed};
use qtool::calibrate::pipeline::{self, Calibration};
use qtool::calibrate::recorder::{BlockStatistics, Recorder};
use qtool::model::{Batch, Model};
use qtool::quantize::{self, Options};
use qtool::source::{Source, WeightSource};
use qtool::tokenizer::Tokenizer;
use qtool::transform::evidence::TransformedEvidence;
use qtool::transform::layout::Layout;
use qtool::transform::model::Transformed;
use qtool::transform::scales::ChannelScales;
use qtool::transform::{Transform, rotation};
use qtool_calib::Evidence;
use qtool_formats::FloatDtype;
use qtool_formats::artifact::transform::TransformRecord;
use qtool_formats::artifact::{Manifest, Stored};
use qtool_formats::checkpoint::Checkpoint;
use qtool_kernels::backend::Form;
use qtool_kernels::{Backend, CpuBackend, Isa};

use crate::calibrate::ids_file;
use crate::flow::with_recipe;
use crate::forward::{distance, golden, read_golden};
use crate::model::{SAMPLES, sample};

/// Largest change of a logit by a rewriting alone, as a share of the largest logit. Asked for is 1e-3; f32
/// arithmetic on other numbers leaves about 1e-6.
const SAME: f32 = 2e-5;

fn rotated(folder: &Path, seed: u64) -> qtool::Result<(Arc<Checkpoint>, Arc<Transform>)> {
    let checkpoint = Arc::new(Checkpoint::open(folder)?);
    let source = Source::of_checkpoint(Arc::clone(&checkpoint))?;
    let record = TransformRecord {
        rotation: Some(rotation::record(&source, seed)?),
        scales: None,
    };
    let transform = Arc::new(Transform::new(&source, record, None)?);
    Ok((checkpoint, transform))
}

fn model(source: Arc<dyn WeightSource>) -> Model<CpuBackend> {
    Model::open(CpuBackend::new(Isa::best()), source)
        .and_then(Model::load)
        .unwrap()
}

fn logits(model: &Model<CpuBackend>, ids: &[Vec<u32>]) -> Vec<f32> {
    model
        .backend()
        .download(&model.forward(&Batch::new(ids)).unwrap())
}

#[test]
fn a_rotated_model_computes_the_same() {
    for folder in golden() {
        let expected = read_golden(&folder);
        for seed in [0, 77] {
            let (checkpoint, transform) = rotated(&folder, seed).unwrap();
            let model = model(Arc::new(Transformed::new(checkpoint, transform).unwrap()));
            let found = logits(&model, &expected.ids);
            let far = distance(&found, &expected.logits.concat());
            assert!(far < SAME * 2.0, "{}: {far}", folder.display());
        }
    }
}

/// Some scales between 1/8 and 8 for everything that can be scaled.
fn some_scales(source: &Source) -> ChannelScales {
    let layout = Layout::of(source).unwrap();
    let mut all = ChannelScales::default();
    let mut add = |key: &str, len: usize| {
        let scale = |i: usize| 2f32.powf(((i * 37 + key.len() * 11) % 61) as f32 / 10.0 - 3.0);
        all.0.insert(key.to_owned(), (0..len).map(scale).collect());
    };
    layout
        .norms
        .iter()
        .for_each(|norm| add(&norm.gain, layout.hidden));
    for pair in layout.values.iter().chain(&layout.mlps) {
        add(&pair.reader, pair.rows.len());
    }
    all
}

fn scaled(folder: &Path, rotate: bool) -> (Arc<Checkpoint>, Arc<Transform>) {
    let checkpoint = Arc::new(Checkpoint::open(folder).unwrap());
    let source = Source::of_checkpoint(Arc::clone(&checkpoint)).unwrap();
    let record = TransformRecord {
        rotation: rotate.then(|| rotation::record(&source, 1).unwrap()),
        scales: Some(ChannelScales::record()),
    };
    let scales = some_scales(&source);
    let transform = Arc::new(Transform::new(&source, record, Some(scales)).unwrap());
    (checkpoint, transform)
}

#[test]
fn a_scaled_model_computes_the_same() {
    for folder in golden() {
        let expected = read_golden(&folder);
        for rotate in [false, true] {
            let (checkpoint, transform) = scaled(&folder, rotate);
            let model = model(Arc::new(Transformed::new(checkpoint, transform).unwrap()));
            let far = distance(&logits(&model, &expected.ids), &expected.logits.concat());
            assert!(far < SAME * 2.0, "{} {rotate}: {far}", folder.display());
        }
    }
}

/// What is stored multiplies to the original: a gain is divided by its scale without a rounding.
#[test]
fn fitted_scales_leave_gains_exact() {
    let folder = sample("tiny-ernie45");
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let source = Source::open(&folder).unwrap();
    let layout = Layout::of(&source).unwrap();
    for rotated in [false, true] {
        let rough = some_scales(&source);
        let fitted = rough.clone().fitted(&checkpoint, &layout, rotated).unwrap();
        assert_ne!(rough, fitted);
        for norm in &layout.norms {
            let gains = source.vector(&norm.gain, layout.hidden).unwrap();
            let scales = fitted.0[&norm.gain].iter().zip(&rough.0[&norm.gain]);
            for ((s, near), gain) in scales.zip(gains) {
                let gain = if rotated { 1.0 } else { gain };
                let mut stored = Vec::new();
                FloatDtype::Bf16.push((f64::from(gain) / f64::from(*s)) as f32, &mut stored);
                let product = f64::from(FloatDtype::Bf16.widen(&stored)[0]) * f64::from(*s);
                assert!((product / f64::from(gain) - 1.0).abs() < 1e-7, "{product} {gain}");
                assert!((s / near - 1.0).abs() < 0.005);
            }
        }
    }
}

#[test]
fn scales_are_found_and_pay() {
    for name in SAMPLES {
        let dir = tempfile::tempdir().unwrap();
        let base = sample(name);
        let run = |folder: &str, recipe: &str, rotate: bool, awq: bool, sequential: bool, threads: usize| {
            let out = dir.path().join(folder);
            let mut options = with_recipe(&out, recipe, &[], &[]);
            options.threads = threads;
            let checkpoint = Arc::new(Checkpoint::open(&base).unwrap());
            let rows = corpus(&base, dir.path());
            let mut calibration = match sequential {
                true => Calibration::Sequential(rows),
                false => Calibration::OnePass(rows),
            };
            let mut plan = quantize::plan(&checkpoint, &options).unwrap();
            if rotate {
                let transform = rotated(&base, 3).unwrap().1;
                plan = plan.transformed(&checkpoint, &options.recipe, transform).unwrap();
            }
            let mut scratch = None;
            if awq {
                let done = balance::run(&checkpoint, plan, &options, calibration, 8).unwrap();
                (plan, calibration, scratch) = (done.plan, done.calibration, done.scratch);
            }
            let manifest = pipeline::run(&checkpoint, &mut [plan], &options, &calibration, 8)
                .unwrap()
                .swap_remove(0);
            drop(scratch);
            assert_eq!(findings(&out, &base), Vec::<String>::new(), "{name} {folder}");
            let proxies = manifest.tensors.iter().filter_map(|t| match &t.stored {
                Stored::Quantized(q) => q.proxy_error,
                Stored::Kept { .. } => None,
            });
            let proxies: Vec<f64> = proxies.collect();
            assert!(proxies.len() > 10);
            (out, proxies.iter().sum::<f64>() / proxies.len() as f64)
        };
        let plain = run("plain", "bits:4,group:32,clip:none", false, false, false, 2).1;
        let (out, scaled) = run("scaled", "bits:4,group:32,clip:none", false, true, false, 2);
        assert!(scaled < plain * 0.95, "{name}: {scaled} against {plain}");
        let (again, _) = run("again", "bits:4,group:32,clip:none", false, true, false, 1);
        assert!(contents(&out) == contents(&again), "{name}: threads change bytes");
        run("both", "bits:4,group:32,method:gptq", true, true, true, 2);
        // The file of scales is part of the artifact.
        let path = out.join(qtool::transform::scales::FILE);
        let mut bytes = std::fs::read(&path).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let found = findings(&out, &base).join("\n");
        assert!(found.contains("qtool.scales: digest"), "{found}");
    }
}

#[test]
fn rotated_weights_are_other_weights() {
    let mut looked = 0;
    for folder in golden() {
        let (checkpoint, transform) = rotated(&folder, 0).unwrap();
        let model = Transformed::new(Arc::clone(&checkpoint), transform).unwrap();
        let name = "model.layers.0.self_attn.o_proj.weight";
        let view = checkpoint.tensor(name).unwrap();
        let (n, k) = view.matrix_dims();
        let before = view.float_dtype().unwrap().widen(view.bytes());
        let Form::Dense { bytes, .. } = model.matrix(name, n, k).unwrap().form else {
            panic!("dense")
        };
        let after = FloatDtype::F32.widen(bytes.bytes());
        let energy = |x: &[f32]| x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>();
        assert!((energy(&before) - energy(&after)).abs() < 1e-5 * energy(&before));
        assert!(distance(&after, &before) > 0.1, "{}", folder.display());
        let ones = model
            .vector("model.layers.0.input_layernorm.weight", model_width(&model))
            .unwrap();
        assert!(ones.iter().all(|v| *v == 1.0));
        looked += 1;
    }
    assert!(looked >= 6);
}

fn model_width(source: &dyn WeightSource) -> usize {
    source.config()["hidden_size"].as_u64().unwrap() as usize
}

/// Quantizes the rotated model.
fn quantized(folder: &Path, options: &Options, calibration: Option<&Calibration>) -> qtool::Result<Manifest> {
    let (checkpoint, transform) = rotated(folder, 3)?;
    let plan = quantize::plan(&checkpoint, options)?.transformed(&checkpoint, &options.recipe, transform)?;
    let mut manifests = match calibration {
        None => quantize::run_ranks(&checkpoint, &[plan], options)?,
        Some(calibration) => pipeline::run(&checkpoint, &mut [plan], options, calibration, 8)?,
    };
    Ok(manifests.swap_remove(0))
}

fn findings(folder: &Path, base: &Path) -> Vec<String> {
    let outcome = qtool::verify::run(folder, Some(base), false).unwrap();
    let text = |f: &qtool::verify::Finding| format!("{}: {}", f.subject, f.problem);
    outcome.findings.iter().map(text).collect()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| {
        a.iter()
            .zip(b)
            .map(|(a, b)| f64::from(*a) * f64::from(*b))
            .sum::<f64>()
    };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

fn contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    let all: BTreeMap<String, Vec<u8>> = entries
        .map(|p| {
            (
                p.file_name().unwrap().to_string_lossy().into_owned(),
                std::fs::read(p).unwrap(),
            )
        })
        .collect();
    assert!(all.len() > 2);
    all
}

fn corpus(model: &Path, dir: &Path) -> Corpus {
    let options = CorpusOptions {
        files: vec![ids_file(dir)],
        rows: 12,
        length: 64,
        seed: 1,
    };
    Corpus::read(&options, &Tokenizer::open(model).unwrap(), 4096).unwrap()
}

/// What each block of a model sees of these rows.
fn observed(model: &Model<CpuBackend>, corpus: &Corpus) -> Vec<BlockStatistics> {
    let batch = Batch::new(corpus.rows());
    let mut x = model.embed(&batch).unwrap();
    let place = model.place(&batch);
    (0..model.decoder().blocks)
        .map(|number| {
            let block = model.block(number).unwrap();
            let mut recorder = Recorder::new(model.backend(), Evidence::Full);
            model.run(&block, &mut x, &place, Some(&mut recorder));
            recorder.finish(Path::new("model")).unwrap()
        })
        .collect()
}

#[test]
fn statistics_are_those_of_the_rotated_model() {
    for name in SAMPLES {
        let dir = tempfile::tempdir().unwrap();
        let base = sample(name);
        let corpus = corpus(&base, dir.path());
        for (checkpoint, transform) in [
            rotated(&base, 5).unwrap(),
            scaled(&base, true),
            scaled(&base, false),
        ] {
            let plain = model(Arc::new(Source::open(&base).unwrap()));
            let turned = model(Arc::new(
                Transformed::new(checkpoint, Arc::clone(&transform)).unwrap(),
            ));
            let mut looked = 0;
            for (original, direct) in observed(&plain, &corpus)
                .into_iter()
                .zip(observed(&turned, &corpus))
            {
                let (original, direct) = (Observed::new(original, 0), direct);
                let derived = TransformedEvidence::new(&original, &transform);
                for input in &direct.inputs {
                    // A router's choice may flip between experts that are as good as equal.
                    if input.stats.rows() == 0 {
                        continue;
                    }
                    let found = derived.evidence(&input.tensors[0]).unwrap().unwrap().stats;
                    assert_eq!(found.rows(), input.stats.rows(), "{name} {:?}", input.tensors);
                    let (a, b) = (found.hessian().unwrap(), input.stats.hessian().unwrap());
                    let scale = b.iter().fold(0f64, |t, v| t.max(v.abs()));
                    let far = a.iter().zip(&b).fold(0f64, |t, (a, b)| t.max((a - b).abs()));
                    assert!(far < 1e-4 * scale, "{name} {:?}: {far} of {scale}", input.tensors);
                    assert!(
                        found
                            .absmax()
                            .iter()
                            .zip(input.stats.absmax())
                            .all(|(bound, top)| *bound >= top * 0.999)
                    );
                    looked += 1;
                }
            }
            assert!(looked >= 8, "{looked}");
        }
    }
}

#[test]
fn calibrated_and_rotated_either_way() {
    let dir = tempfile::tempdir().unwrap();
    let base = sample("tiny-ernie45-moe");
    for (way, calibration) in [
        ("sequential", Calibration::Sequential(corpus(&base, dir.path()))),
        ("one-pass", Calibration::OnePass(corpus(&base, dir.path()))),
    ] {
        let out = dir.path().join(way);
        let options = with_recipe(&out, "bits:4,group:32,method:gptq", &[], &[]);
        let manifest = quantized(&base, &options, Some(&calibration)).unwrap();
        assert_eq!(findings(&out, &base), Vec::<String>::new(), "{way}");
        let proxies: Vec<f64> = manifest
            .tensors
            .iter()
            .filter_map(|t| match &t.stored {
                Stored::Quantized(q) => q.proxy_error,
                Stored::Kept { .. } => None,
            })
            .collect();
        assert!(
            proxies.len() > 10 && proxies.iter().all(|p| *p < 0.05),
            "{way}: {proxies:?}"
        );
    }
}
