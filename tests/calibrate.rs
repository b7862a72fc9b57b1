//! Calibration from end to end: statistics, their parts, sequential runs and how they go on, and what is refused.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use qtool::calibrate::corpus::{Corpus, CorpusOptions};
use qtool::calibrate::decisions::Decisions;
use qtool::calibrate::pipeline::{self, Calibration};
use qtool::calibrate::statistics::{Statistics, merge};
use qtool::calibrate::walk::slices_of;
use qtool::calibrate::{coverage, measure, sequential};
use qtool::tokenizer::Tokenizer;
use qtool_calib::Evidence;
use qtool_formats::artifact::{Artifact, Stored};
use qtool_formats::checkpoint::Checkpoint;

use crate::flow::with_recipe;
use crate::model::{SAMPLES, sample};

/// Token ids that any sample has, as JSON lines: repeating patterns, so that inputs are correlated.
pub fn ids_file(folder: &Path) -> PathBuf {
    let path = folder.join("ids.jsonl");
    let lines: Vec<String> = (0..40u32)
        .map(|line| {
            let ids: Vec<u32> = (0..64)
                .map(|i| 3 + (line * 37 + i * i * 11 + i * 5) % 4000)
                .collect();
            format!("{ids:?}")
        })
        .collect();
    fs::write(&path, lines.join("\n")).unwrap();
    path
}

pub fn corpus(model: &Path, file: &Path, rows: usize) -> Corpus {
    let options = CorpusOptions {
        files: vec![file.to_owned()],
        rows,
        length: 64,
        seed: 5,
    };
    Corpus::read(&options, &Tokenizer::open(model).unwrap(), 4096).unwrap()
}

fn files(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    let all: BTreeMap<String, Vec<u8>> = entries
        .map(|p| {
            (
                p.file_name().unwrap().to_string_lossy().into_owned(),
                fs::read(p).unwrap(),
            )
        })
        .collect();
    assert!(all.len() > 2);
    all
}

pub fn measured(model: &Path, corpus: &Corpus, target: &Path, part: Option<(usize, usize)>, threads: usize) {
    measured_as(Evidence::Full, model, corpus, target, part, threads);
}

fn measured_as(
    evidence: Evidence,
    model: &Path,
    corpus: &Corpus,
    target: &Path,
    part: Option<(usize, usize)>,
    threads: usize,
) {
    let options = measure::Options {
        target: target.to_owned(),
        force: false,
        evidence,
        slices: part.map(|(i, n)| slices_of(i, n).unwrap()),
        threads,
        device: qtool::device::Device::default(),
        show_progress: false,
    };
    measure::run(&Arc::new(Checkpoint::open(model).unwrap()), corpus, &options).unwrap();
}

/// The recipe of sequential runs, with a part in two bits.
const MIXED: &str = "bits:4,method:gptq";
const RULES: &[&str] = &[r"layers\.1\.mlp\..*down_proj=bits:2,effort:fast"];
/// What K types leave of the sample model.
const WHOLE: &[&str] = &["(o_proj|down_proj)=keep"];

/// Quantizes with evidence.
fn calibrated(
    model: &Path,
    target: &Path,
    recipe: &str,
    calibration: &Calibration,
    threads: usize,
) -> qtool::Result<()> {
    let checkpoint = Arc::new(Checkpoint::open(model).unwrap());
    // Rows of 384 and 704 are no whole super-blocks.
    let rules = if recipe.contains("-k") || recipe.contains("method:none") {
        WHOLE
    } else {
        RULES
    };
    let mut options = with_recipe(target, recipe, &[], rules);
    options.threads = threads;
    options.calibration = Some(calibration.describe(8)?);
    let plan = qtool::quantize::plan(&checkpoint, &options)?;
    pipeline::run(&checkpoint, &mut [plan], &options, calibration, 8).map(|_| ())
}

#[test]
fn parts_merge_to_the_bits_of_a_single_run() {
    for name in SAMPLES {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let model = sample(name);
        let corpus = corpus(&model, &ids_file(dir.path()), 20);
        measured(&model, &corpus, &at("whole"), None, 2);
        measured(&model, &corpus, &at("one-thread"), None, 1);
        assert!(
            files(&at("whole")) == files(&at("one-thread")),
            "{name}: threads change no bit"
        );
        let parts: Vec<PathBuf> = (0..4).map(|i| at(&format!("part{i}"))).collect();
        for (i, part) in parts.iter().enumerate() {
            measured(&model, &corpus, part, Some((i, 4)), 2);
        }
        let shuffled: Vec<PathBuf> = [2, 0, 3, 1].map(|i| parts[i].clone()).into();
        merge(&shuffled, &at("merged"), false).unwrap();
        assert!(
            files(&at("whole")) == files(&at("merged")),
            "{name}: merged parts differ"
        );
        let message = |parts: &[PathBuf]| merge(parts, &at("no"), false).unwrap_err().to_string();
        assert!(message(&parts[..3]).contains("one is missing"));
        assert!(message(&[parts[0].clone(), parts[0].clone()]).contains("given twice"));
        assert!(message(&[at("whole")]).contains("whole already"));
        assert!(!at("no").exists());
        let few = measure::Options {
            target: at("no"),
            force: false,
            evidence: Evidence::Full,
            slices: slices_of(0, 4),
            threads: 2,
            device: qtool::device::Device::default(),
            show_progress: false,
        };
        let short = self::corpus(&model, &ids_file(dir.path()), 7);
        let refused = measure::run(&Arc::new(Checkpoint::open(&model).unwrap()), &short, &few);
        assert!(refused.unwrap_err().to_string().contains("at least 8 rows"));
        let statistics = Statistics::open(&at("whole")).unwrap();
        let inputs = statistics.index().blocks.iter().flat_map(|b| &b.inputs);
        let rows = inputs.map(|i| (i.tensors[0].as_str(), i.rows[0]));
        let report = coverage::report(rows, 8);
        assert_eq!(report.len(), if name.contains("moe") { 3 } else { 0 });
        for layer in &report {
            assert!(layer.experts == 8 && layer.most > 0 && layer.fewest <= layer.median);
        }
        let tops = statistics.magnitudes(0).unwrap().unwrap();
        assert!(tops.keys.len() == 128 && tops.keys.iter().all(|k| *k > 0.0));
        let path = at("whole").join("block-00000.safetensors");
        let mut bytes = fs::read(&path).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        fs::write(&path, bytes).unwrap();
        assert!(
            statistics
                .verify()
                .unwrap_err()
                .to_string()
                .contains("not those that were written")
        );
    }
}

#[test]
fn evidence_lowers_the_error_its_layers_see() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let model = sample("tiny-ernie45");
    let corpus = corpus(&model, &ids_file(dir.path()), 30);
    measured(&model, &corpus, &at("stats"), None, 2);
    let mut compared = 0;
    let cases = [
        ("bits:2,effort:fast", None),
        ("bits:4,method:gptq", Some("bits:4,clip:none")),
        ("bits:8,method:gptq", Some("bits:8,clip:none")),
        (
            "bits:3,group:32,grid:zp,method:gptq",
            Some("bits:3,group:32,grid:zp,clip:mse"),
        ),
        ("bits:4,method:q4-k", Some("bits:4,method:none,group:32")),
        ("bits:2,method:q2-k", Some("bits:2,method:none,group:16")),
    ];
    for (number, (recipe, plain)) in cases.into_iter().enumerate() {
        let statistics = Calibration::Statistics(at("stats"));
        let errors = |recipe: &str, name: &str| {
            calibrated(&model, &at(name), recipe, &statistics, 2).unwrap();
            let artifact = Artifact::open(&at(name)).unwrap();
            let of = |t: &qtool_formats::artifact::manifest::TensorRecord| match &t.stored {
                Stored::Quantized(q) => Some((t.name.clone(), q.proxy_error.unwrap(), q.method.clone())),
                Stored::Kept { .. } => None,
            };
            artifact
                .manifest()
                .tensors
                .iter()
                .filter_map(of)
                .collect::<Vec<_>>()
        };
        let informed = errors(recipe, &format!("informed{number}"));
        assert!(
            informed.iter().all(|(_, _, method)| method.contains("damping")),
            "{informed:?}"
        );
        let Some(plain) = plain else {
            assert!(
                informed.iter().all(|(_, error, _)| *error > 0.0 && *error < 0.2),
                "{informed:?}"
            );
            continue;
        };
        let plain = errors(plain, &format!("plain{number}"));
        for (name, with, _) in &informed {
            let (_, without, _) = plain.iter().find(|(of, ..)| of == name).unwrap();
            assert!(
                *with <= without * 1.0001,
                "{recipe} {name}: {with} against {without}"
            );
            compared += 1;
        }
    }
    assert_eq!(compared, 3 * 6 * 7 + 2 * 6 * 5);
    let other = sample("tiny-ernie45-moe");
    let refused = calibrated(
        &other,
        &at("x"),
        "bits:4",
        &Calibration::Statistics(at("stats")),
        2,
    );
    assert!(refused.unwrap_err().to_string().contains("another model"));
    assert!(!at("x").exists());
}

/// Columns are visited group by group, whatever their order within one and among them: codes lie where they lay, and the
/// index that GPTQ's format asks for counts up.
#[test]
fn act_order_by_group_needs_no_index() {
    use qtool_formats::import::{self, Decoded};
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let model = sample("tiny-ernie45");
    let corpus = corpus(&model, &ids_file(dir.path()), 16);
    measured(&model, &corpus, &at("stats"), None, 2);
    let statistics = Calibration::Statistics(at("stats"));
    let checkpoint = Arc::new(Checkpoint::open(&model).unwrap());
    let mut options = with_recipe(&at("a"), "bits:4,method:gptq,group:32,scale:f16", &[], &[]);
    options.calibration = Some(statistics.describe(8).unwrap());
    let plan = qtool::quantize::plan(&checkpoint, &options).unwrap();
    pipeline::run(&checkpoint, &mut [plan], &options, &statistics, 8).unwrap();
    let exporter = qtool_formats::export::find("gptq").unwrap();
    qtool::export::run(&at("a"), exporter, &at("gptq"), false, 1 << 40, false).unwrap();
    let config = fs::read_to_string(at("gptq").join("config.json")).unwrap();
    assert!(config.contains("\"desc_act\": false"), "{config}");
    let (artifact, files) = (
        Artifact::open(&at("a")).unwrap(),
        Checkpoint::open(&at("gptq")).unwrap(),
    );
    let read = import::open(&at("gptq")).unwrap().unwrap();
    let mut compared = 0;
    for record in &artifact.manifest().tensors {
        let Stored::Quantized(q) = &record.stored else {
            continue;
        };
        assert!(q.method.contains("act-order by group"), "{}", q.method);
        let index = files.tensor(&record.name.replace(".weight", ".g_idx")).unwrap();
        let counted = (0..q.columns as u32).flat_map(|k| (k / 32).to_le_bytes());
        assert!(index.bytes().iter().copied().eq(counted), "{}", record.name);
        let weight = artifact.weight_rows(q, 0, q.rows).unwrap();
        let tensor = read.tensor(&record.name).unwrap();
        assert_eq!(
            read.decode(tensor).unwrap(),
            Some(Decoded::Weight(weight)),
            "{}",
            record.name
        );
        compared += 1;
    }
    assert_eq!(compared, 42);
}

#[test]
fn of_diagonals_every_method_makes_what_it_can_and_says_so() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let model = sample("tiny-ernie45");
    let corpus = corpus(&model, &ids_file(dir.path()), 10);
    measured_as(Evidence::Diagonal, &model, &corpus, &at("stats"), None, 2);
    let statistics = Calibration::Statistics(at("stats"));
    let recipes = [
        ("bits:2,effort:fast", 7),
        ("bits:4,method:gptq", 7),
        ("bits:4,method:q4-k", 5),
    ];
    for (number, (recipe, tensors)) in recipes.into_iter().enumerate() {
        let target = at(&format!("out{number}"));
        calibrated(&model, &target, recipe, &statistics, 2).unwrap();
        let artifact = Artifact::open(&target).unwrap();
        let mut seen = 0;
        for tensor in &artifact.manifest().tensors {
            if let Stored::Quantized(q) = &tensor.stored {
                assert!(!q.method.contains("damping"), "{recipe}: {}", q.method);
                let weighted = ["mean squares", "weighted by inputs"];
                assert!(
                    weighted.iter().any(|w| q.method.contains(w)),
                    "{recipe}: {}",
                    q.method
                );
                assert!(q.proxy_error.is_some_and(|error| error > 0.0), "{recipe}");
                seen += 1;
            }
        }
        assert_eq!(seen, 6 * tensors, "{recipe}");
    }
}

#[test]
fn sequential_runs_are_repeatable_and_go_on_after_an_interruption() {
    for name in SAMPLES {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let model = sample(name);
        let rows = corpus(&model, &ids_file(dir.path()), 8);
        let run = |target: &str, threads| {
            let calibration = Calibration::Sequential(rows.clone());
            calibrated(&model, &at(target), MIXED, &calibration, threads).unwrap();
            files(&at(target))
        };
        let whole = run("a", 2);
        assert!(run("b", 1) == whole, "{name}: threads change no bit");
        assert!(
            !Decisions::folder_of(&at("a")).exists(),
            "the blocks are gone when the artifact is there"
        );
        let verified = qtool::verify::run(&at("a"), Some(&model), false).unwrap();
        assert!(verified.findings.is_empty(), "{:?}", verified.findings);
        // The blocks of a run that was stopped before its artifact was written, cut back to one block.
        let checkpoint = Arc::new(Checkpoint::open(&model).unwrap());
        let options = with_recipe(&at("c"), MIXED, &[], RULES);
        let plan = qtool::quantize::plan(&checkpoint, &options).unwrap();
        let wanted = sequential::Options {
            quantize: &options,
            evidence: Evidence::Full,
            min_coverage: 8,
        };
        let decided = sequential::run(&checkpoint, &[plan], &rows, &wanted).unwrap();
        let folder = decided.folder().to_owned();
        assert!(decided.blocks() > 2);
        drop(decided);
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let file = path.file_name().unwrap().to_string_lossy().into_owned();
            if file.starts_with("block-") && !file.starts_with("block-00000") {
                fs::remove_file(path).unwrap();
            }
        }
        // A mark in what is kept of the first block must come back in the manifest: it was not done again.
        let record = folder.join("block-00000.json");
        let text = fs::read_to_string(&record).unwrap();
        assert!(text.contains("gptq, damping"));
        fs::write(&record, text.replace("gptq, damping", "gptq, DAMPING")).unwrap();
        let mut gone_on = run("c", 2);
        let manifest = String::from_utf8(gone_on["qtool.json"].clone()).unwrap();
        assert!(manifest.contains("gptq, DAMPING") && manifest.contains("gptq, damping"));
        let unmarked = manifest.replace("gptq, DAMPING", "gptq, damping");
        gone_on.insert("qtool.json".to_owned(), unmarked.into_bytes());
        assert!(gone_on == whole, "{name}: going on gives the same bytes");
        assert!(!folder.exists());
        // Other rows: the blocks of the former run are not used.
        let again = sequential::run(
            &checkpoint,
            &[qtool::quantize::plan(&checkpoint, &options).unwrap()],
            &rows,
            &wanted,
        );
        drop(again.unwrap());
        let other = Calibration::Sequential(corpus(&model, &ids_file(dir.path()), 7));
        let refused = calibrated(&model, &at("c2"), MIXED, &other, 2);
        assert!(refused.is_ok(), "another target has blocks of its own");
        fs::remove_dir_all(at("c")).unwrap();
        let refused = calibrated(&model, &at("c"), MIXED, &other, 2);
        let message = refused.unwrap_err().to_string();
        assert!(message.contains("corpus differ"), "{message}");
    }
}
