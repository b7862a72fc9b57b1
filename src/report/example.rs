//! A report to try renderers on: made-up answers through the real statistics, fourteen kinds and four models.

use std::collections::BTreeMap;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use super::*;
use crate::statistics::baselines;
use crate::statistics::compare::{How, Items, compare, warnings};
use crate::verdict::{judge, policy::parse};

/// The kinds of the question-matching benchmark, and items made up for each.
pub const KINDS: [(&str, usize); 14] = [
    ("OPPO", 300),
    ("DuQM_pos", 60),
    ("DuQM_named_entity", 80),
    ("DuQM_synonym", 40),
    ("DuQM_antonym", 40),
    ("DuQM_negation", 60),
    ("DuQM_temporal", 50),
    ("DuQM_symmetry", 40),
    ("DuQM_asymmetry", 40),
    ("DuQM_neg_asymmetry", 30),
    ("DuQM_voice", 30),
    ("DuQM_misspelling", 60),
    ("DuQM_discourse_particle(simple)", 40),
    ("DuQM_discourse_particle(complex)", 40),
];
const LABELS: [&str; 4] = ["BASE", "INT8", "INT4", "INT2"];

fn uniform(rng: &mut ChaCha8Rng) -> f64 {
    f64::from(rng.next_u32()) / 2_f64.powi(32)
}

/// Leaves a rendering in the build folder, for eyes.
pub fn leave(name: &str, text: &str) {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("target");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join(name), text).unwrap();
}

/// The report: INT8 as good as the base, INT4 a little worse, INT2 much worse.
pub fn report() -> Report {
    let mut rng = ChaCha8Rng::seed_from_u64(11);
    let labels = LABELS.map(str::to_owned);
    let tasks = vec![question_matching(&mut rng, &labels), divergence(&mut rng)];
    let limits = parse("max-kl = 0.05\n[max-drop]\nquestion-matching = 2", "policy.toml").unwrap();
    Report {
        report_version: REPORT_VERSION,
        tool: crate::TOOL.to_owned(),
        models: (0..4).map(|m| model(m, &mut rng)).collect(),
        verdict: judge(&limits, &labels, &tasks).unwrap(),
        tasks,
        run: Run {
            device: "cpu avx2".into(),
            device_reason: None,
            threads: 2,
            seed: 11,
            seconds: 412.5,
            started: "2026-11-25T10:00:00Z".into(),
            resumed: true,
            resources: (0..120)
                .map(|i| ResourceSample {
                    at: 3.4 * f64::from(i + 1),
                    cpu_percent: 150.0 + 45.0 * uniform(&mut rng),
                    memory_bytes: 600_000_000 + if i > 60 { 400_000_000 } else { 6_000_000 * i as u64 },
                    gpu_percent: None,
                    gpu_memory_bytes: None,
                })
                .collect(),
        },
    }
}

fn model(index: usize, rng: &mut ChaCha8Rng) -> ModelEntry {
    let bits = [16.0, 8.0, 4.25, 2.1][index];
    let kinds = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.o_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ];
    let tensor = |i: usize, rng: &mut ChaCha8Rng| TensorFigure {
        name: format!(
            "model.layers.{}.{}.weight",
            i / kinds.len(),
            kinds[i % kinds.len()]
        ),
        scheme: format!("int{bits:.0}"),
        sqnr_db: Some(6.0 * bits - 8.0 + (i % kinds.len()) as f64 * 0.6 + uniform(rng)),
        bits_per_weight: bits,
    };
    ModelEntry {
        label: LABELS[index].into(),
        path: format!("models/ernie-4.5-0.3b{}", ["", "-int8", "-int4", "-int2"][index]),
        kind: if index == 0 {
            "checkpoint BF16".into()
        } else {
            format!("artifact int{bits:.0}")
        },
        bytes: Some((36e7 * bits / 8.0) as u64),
        bits_per_weight: Some(bits),
        digest: Some(format!("{index}f3a").repeat(8)),
        tokenizer_digest: Some("77ab".repeat(8)),
        tensors: if index == 0 {
            vec![]
        } else {
            (0..90).map(|i| tensor(i, rng)).collect()
        },
    }
}

fn question_matching(rng: &mut ChaCha8Rng, labels: &[String]) -> TaskReport {
    let group_of: Vec<usize> = KINDS.iter().enumerate().flat_map(|(g, k)| vec![g; k.1]).collect();
    let classes: Vec<usize> = group_of
        .iter()
        .map(|_| usize::from(uniform(rng) < 0.55))
        .collect();
    let mut scores = vec![Vec::new(); 4];
    for _ in &group_of {
        let base = uniform(rng) < 0.72;
        for (scores, flip) in scores.iter_mut().zip([0.0, 0.015, 0.06, 0.35]) {
            let right = base != (uniform(rng) < flip);
            scores.push(Some(f64::from(u8::from(right))));
        }
    }
    scores[3][5] = None;
    let items = Items {
        groups: KINDS.iter().map(|k| k.0.to_owned()).collect(),
        group_of,
        scores,
        weights: None,
    };
    let given = baselines::of_labels(14, &items.group_of, &classes, 2, true);
    let how = How {
        resamples: 1000,
        ..How::accuracy(given, 11)
    };
    let confusion = |model: usize| {
        let count = |class: usize, right: f64| {
            let of = items.scores[model].iter().zip(&classes);
            Some(of.filter(|(s, c)| **c == class && **s == Some(right)).count() as f64)
        };
        DetailTable {
            name: "confusion".into(),
            model,
            columns: vec!["0".into(), "1".into()],
            rows: vec![
                ("0".into(), vec![count(0, 1.0), count(0, 0.0)]),
                ("1".into(), vec![count(1, 0.0), count(1, 1.0)]),
            ],
        }
    };
    TaskReport {
        task: "question-matching".into(),
        version: 1,
        data: vec![DataFile {
            path: "data/DuQM".into(),
            digest: "c0ffee".repeat(6),
            items: 910,
        }],
        settings: BTreeMap::from([
            ("ask".to_owned(), "loglik".into()),
            ("shots".to_owned(), 0.into()),
        ]),
        metrics: compare(&items, &how),
        tables: (0..4).map(confusion).collect(),
        histograms: vec![],
        counts: BTreeMap::from([("no answer: timeout".to_owned(), vec![0, 0, 0, 1])]),
        warnings: warnings(&items, &how, labels),
        speed: (0..4)
            .map(|m| Speed {
                items: 910,
                tokens: 40_000,
                seconds: 60.0 - 10.0 * f64::from(m),
            })
            .collect(),
        items: None,
    }
}

fn divergence(rng: &mut ChaCha8Rng) -> TaskReport {
    let windows = 60;
    let kl = |scale: f64, rng: &mut ChaCha8Rng| {
        (0..windows)
            .map(|_| Some(scale * (0.5 + uniform(rng))))
            .collect::<Vec<_>>()
    };
    let items = Items {
        groups: vec!["all".into()],
        group_of: vec![0; windows],
        scores: vec![vec![None; windows], kl(0.0004, rng), kl(0.045, rng), kl(0.9, rng)],
        weights: Some(vec![255.0; windows]),
    };
    let how = How {
        resamples: 1000,
        ..How::mean("KL to base", Unit::NatsPerToken, Some(false), 11)
    };
    let mut agreement = items.clone();
    for (scores, share) in agreement.scores.iter_mut().zip([0.0, 0.99, 0.9, 0.6]).skip(1) {
        scores
            .iter_mut()
            .for_each(|s| *s = Some(share + 0.01 * uniform(rng)));
    }
    let of_agreement = How {
        resamples: 1000,
        ..How::mean("top-1 agreement", Unit::Share, Some(true), 11)
    };
    let mut metrics = compare(&items, &how);
    metrics.extend(compare(&agreement, &of_agreement));
    let histogram = |model: usize| Histogram {
        name: "log10 of KL to base in nats, over tokens".into(),
        model,
        edges: (0..=28).map(|i| -6.0 + 0.25 * f64::from(i)).collect(),
        counts: (0..28)
            .map(|i| {
                (3000.0 * (-0.5 * ((f64::from(i) - 4.0 - 6.0 * model as f64) / 4.0).powi(2)).exp()) as u64
            })
            .collect(),
    };
    TaskReport {
        task: "divergence".into(),
        version: 1,
        data: vec![DataFile {
            path: "data/heldout.zh.txt".into(),
            digest: "beef".repeat(8),
            items: windows,
        }],
        settings: BTreeMap::from([("window".to_owned(), 256.into())]),
        metrics,
        tables: vec![],
        histograms: (1..4).map(histogram).collect(),
        counts: BTreeMap::from([("non-finite positions".to_owned(), vec![0; 4])]),
        warnings: vec![],
        speed: vec![],
        items: None,
    }
}
