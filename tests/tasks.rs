//! Tasks, each with a score computed by hand on a scripted model; and laws that hold for all of them.

use std::fs;
use std::path::{Path, PathBuf};

use qtool::report::{Metric, TaskReport};
use qtool::scorer::{Miss, Reply, Scorer};
use qtool::tasks::answers::Answers;
use qtool::tasks::setup::{Ask, Setup};
use qtool::tasks::{self, Reporting, TASKS};

use crate::scripted::{Scripted, likely, text};

fn write(folder: &Path, name: &str, content: &str) -> PathBuf {
    let path = folder.join(name);
    fs::write(&path, content).unwrap();
    path
}

fn run(task: &str, setup: &Setup, models: &[&Scripted]) -> TaskReport {
    let models: Vec<&dyn Scorer> = models.iter().map(|m| *m as &dyn Scorer).collect();
    let prepared = tasks::find(task).unwrap().prepare(setup, models[0]).unwrap();
    let mut answers = Answers::unkept(models.len(), prepared.slots());
    prepared.ask(&models, &mut answers).unwrap();
    let how = Reporting {
        seed: 0,
        resamples: 200,
        items: true,
        models: (0..models.len()).map(|m| format!("M{m}")).collect(),
    };
    prepared.report(&answers, &how).unwrap()
}

fn metric<'a>(report: &'a TaskReport, group: &str, name: &str) -> &'a Metric {
    let found = report.metrics.iter().find(|m| m.group == group && m.name == name);
    found.unwrap_or_else(|| panic!("no {group} {name}: {:?}", report.metrics))
}

fn value(report: &TaskReport, group: &str, name: &str, model: usize) -> f64 {
    metric(report, group, name).values[model].unwrap().value
}

fn close(got: f64, expected: f64) {
    assert!((got - expected).abs() < 1e-9, "{got}, expected {expected}");
}

/// Says "same" when the prompt's last pair shares its first letter.
fn first_letters() -> Scripted {
    Scripted {
        likelihoods: Some(Box::new(|q| {
            let prompt = text(&q.prompt);
            let letters: Vec<char> = prompt
                .lines()
                .filter_map(|l| l.strip_prefix("Question "))
                .filter_map(|l| l.chars().nth(3))
                .collect();
            let same = letters[letters.len() - 2] == letters[letters.len() - 1];
            if same {
                likely(&[-3.0, -1.0])
            } else {
                likely(&[-1.0, -3.0])
            }
        })),
        ..Scripted::default()
    }
}

#[test]
fn question_matching_by_likelihood() {
    let dir = tempfile::tempdir().unwrap();
    // First letters agree in lines 1, 3, 5: predictions 1 0 1 0 1; labels 1 0 0 1 1. OPPO: 2 of 3, DuQM_voice: 1 of 2.
    let data = write(
        dir.path(),
        "a.tsv",
        "ab\tac\t1\tOPPO\nab\tbc\t0\tOPPO\nxa\txb\t0\tOPPO\nab\tba\t1\tDuQM_voice\nzz\tzy\t1\tDuQM_voice\n",
    );
    let model = first_letters();
    let report = run("question-matching", &Setup::new(&data), &[&model]);
    close(value(&report, "OPPO", "accuracy", 0), 2.0 / 3.0);
    close(value(&report, "DuQM_voice", "accuracy", 0), 0.5);
    close(
        value(&report, "macro average", "accuracy", 0),
        (2.0 / 3.0 + 0.5) / 2.0,
    );
    assert_eq!(
        report.metrics[0].group, "macro average",
        "the headline comes first"
    );
    let table = report
        .tables
        .iter()
        .find(|t| t.name == "right and wrong")
        .unwrap();
    let counts: Vec<f64> = table.rows[0].1.iter().map(|c| c.unwrap()).collect();
    assert_eq!(counts, [2.0, 1.0, 1.0, 1.0], "TP TN FP FN");
    assert_eq!(report.settings["ask"], "loglik");
    let items = report.items.unwrap();
    assert_eq!(items[2]["predictions"][0], "1");
    assert_eq!(items[2]["label"], "0");
    // Softmax over -3 and -1.
    close(
        items[2]["scores"][0].as_f64().unwrap(),
        1.0 / (1.0 + (-2.0_f64).exp()),
    );
}

#[test]
fn calibration_takes_off_what_an_empty_input_gets() {
    let dir = tempfile::tempdir().unwrap();
    let data = write(dir.path(), "a.tsv", "ab\tcd\t1\nef\tgh\t0\n");
    // "yes" is liked less everywhere; relative to the content-free input it is liked in the first item only.
    let model = Scripted {
        likelihoods: Some(Box::new(|q| {
            let prompt = text(&q.prompt);
            if prompt.contains("N/A") {
                likely(&[-1.0, -4.0])
            } else if prompt.contains("ab") {
                likely(&[-1.5, -2.5])
            } else {
                likely(&[-1.0, -4.5])
            }
        })),
        ..Scripted::default()
    };
    let plain = run("question-matching", &Setup::new(&data), &[&model]);
    close(value(&plain, "all", "accuracy", 0), 0.5);
    let asked = model.tokens_run();
    let setup = Setup {
        calibrate: true,
        ..Setup::new(&data)
    };
    let calibrated = run("question-matching", &setup, &[&model]);
    close(value(&calibrated, "all", "accuracy", 0), 1.0);
    assert_eq!(
        model.tokens_run() - asked,
        3,
        "one content-free question for all items"
    );
}

#[test]
fn replies_are_read_and_the_unreadable_are_no_label() {
    let dir = tempfile::tempdir().unwrap();
    let data = write(
        dir.path(),
        "a.tsv",
        "aa\tbb\t1\ncc\tdd\t0\nee\tff\t0\ngg\thh\t1\n",
    );
    let model = Scripted {
        replies: Some(Box::new(|r| {
            assert_eq!(
                r.allowed.as_deref(),
                Some([r#"{"result": 0}"#.to_owned(), r#"{"result": 1}"#.to_owned()].as_slice())
            );
            let prompt = text(&r.prompt);
            let said = |text: &str| {
                Ok(Reply {
                    text: text.to_owned(),
                    cut: 0,
                })
            };
            if prompt.contains("aa") {
                said(r#" {"result": 1}"#)
            } else if prompt.contains("cc") {
                said("I think they differ")
            } else if prompt.contains("ee") {
                Err(Miss {
                    kind: "timeout".to_owned(),
                    detail: "30 s".to_owned(),
                })
            } else {
                said(r#"{"result": "0"}"#)
            }
        })),
        ..Scripted::default()
    };
    let setup = Setup {
        ask: Some(Ask::Generate),
        ..Setup::new(&data)
    };
    let report = run("question-matching", &setup, &[&model]);
    // Of the two labels there are, one is right.
    close(value(&report, "all", "accuracy", 0), 0.5);
    assert_eq!(report.counts["unparsable replies"], [1]);
    assert_eq!(report.counts["no answer: timeout"], [1]);
    assert!(
        report
            .warnings
            .iter()
            .any(|w| w.contains("no answer to 2 of 4 items")),
        "{:?}",
        report.warnings
    );
    let refused = tasks::find("question-matching")
        .unwrap()
        .prepare(&Setup::new(&data), &model);
    let message = refused.err().unwrap().to_string();
    assert!(message.contains("pass --ask generate"), "{message}");
}

#[test]
fn shots_and_chat_reach_the_model() {
    let dir = tempfile::tempdir().unwrap();
    let data = write(dir.path(), "a.tsv", "ab\tac\t1\n");
    let shots = write(
        dir.path(),
        "s.tsv",
        "s1\tt1\t1\ns2\tt2\t0\ns3\tt3\t1\ns4\tt4\t0\n",
    );
    let prompt = write(
        dir.path(),
        "p.jinja",
        "{% set system = 'be brief' %}{% set lead = ' ' %}\
        {% set answers = ['no', 'yes'] %}{% for s in shots %}[{{ s.text_a }}:{{ s.answer }}]{% endfor %}{{ text_a }}",
    );
    let model = Scripted {
        likelihoods: Some(Box::new(|q| {
            let prompt = text(&q.prompt);
            assert!(prompt.starts_with("<system>be brief<user>["), "{prompt}");
            assert_eq!(prompt.matches(":yes]").count(), 1, "{prompt}");
            assert_eq!(prompt.matches(":no]").count(), 1, "{prompt}");
            assert_eq!(q.answers, ["no", "yes"], "nothing leads an answer in a chat");
            likely(&[-2.0, -1.0])
        })),
        ..Scripted::default()
    };
    let setup = Setup {
        shots: Some(shots),
        shots_count: 2,
        prompt: Some(prompt),
        chat: true,
        ..Setup::new(&data)
    };
    let report = run("question-matching", &setup, &[&model]);
    close(value(&report, "all", "accuracy", 0), 1.0);
    assert_eq!(report.settings["shots"], 2);
    assert_eq!(report.data.len(), 2, "the examples' file is part of the data");
}

#[test]
fn encoders_answer_by_head_or_by_cosine() {
    let dir = tempfile::tempdir().unwrap();
    let data = write(dir.path(), "a.tsv", "a\tb\t1\nc\td\t0\n");
    let head = Scripted {
        classify: Some((
            2,
            Box::new(|p| {
                if p.a == "a" {
                    vec![0.0, 1.0]
                } else {
                    vec![0.5, 0.6]
                }
            }),
        )),
        ..Scripted::default()
    };
    let report = run("question-matching", &Setup::new(&data), &[&head]);
    close(value(&report, "all", "accuracy", 0), 0.5);
    assert_eq!(report.settings["ask"], "head");
    // Angles: a-b 0, c-d 90 degrees; dev pairs at cosine 0.8 (same) and 0.6 (not): threshold 0.7.
    let vector = |t: &String| match t.as_str() {
        "a" | "b" | "c" | "p" | "q" => vec![1.0, 0.0],
        "d" => vec![0.0, 1.0],
        "p2" => vec![0.8, 0.6],
        _ => vec![0.6, 0.8],
    };
    let cosine = Scripted {
        embed: Some(Box::new(vector)),
        ..Scripted::default()
    };
    let message = tasks::find("question-matching")
        .unwrap()
        .prepare(&Setup::new(&data), &cosine);
    assert!(message.err().unwrap().to_string().contains("--dev FILE"));
    let setup = Setup {
        dev: Some(write(dir.path(), "dev.tsv", "p\tp2\t1\nq\tq2\t0\n")),
        ..Setup::new(&data)
    };
    let report = run("question-matching", &setup, &[&cosine]);
    close(value(&report, "all", "accuracy", 0), 1.0);
    let table = report
        .tables
        .iter()
        .find(|t| t.name == "cosine threshold")
        .unwrap();
    assert!((table.rows[0].1[0].unwrap() - 0.7).abs() < 1e-7);
    assert_eq!(table.rows[0].1[1], Some(1.0));
}

#[test]
fn classification_by_hand() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), "label.txt", "car\nfood\nnone\n");
    let data = write(
        dir.path(),
        "a.txt",
        "x1\tcar\nx2\tcar\ny1\tfood\ny2\tfood\nz1\tnone\n",
    );
    // x1 car, x2 food, y1 food, y2 food, z1 food: precision 1, 1/2, 0; recall 1/2, 1, 0; F1 2/3, 2/3, 0.
    let model = Scripted {
        likelihoods: Some(Box::new(|q| {
            assert_eq!(q.answers, [" car", " food", " none"]);
            let car = text(&q.prompt).contains("x1");
            likely(if car {
                &[-1.0, -2.0, -3.0]
            } else {
                &[-2.0, -1.0, -3.0]
            })
        })),
        ..Scripted::default()
    };
    let report = run("classification", &Setup::new(&data), &[&model, &model]);
    close(value(&report, "all", "accuracy", 0), 0.6);
    close(value(&report, "macro average", "precision", 0), 0.5);
    close(value(&report, "macro average", "recall", 0), 0.5);
    close(value(&report, "macro average", "F1", 1), 4.0 / 9.0);
    let per_class = report
        .tables
        .iter()
        .find(|t| t.name == "per class" && t.model == 1)
        .unwrap();
    assert_eq!(per_class.rows[1].1[3], Some(2.0), "support");
    assert!(metric(&report, "all", "accuracy").deltas[1].unwrap().noise);
    let scorer: &dyn Scorer = &model;
    let prepared = tasks::find("classification")
        .unwrap()
        .prepare(&Setup::new(&data), scorer)
        .unwrap();
    let mut answers = Answers::unkept(1, prepared.slots());
    prepared.ask(&[scorer], &mut answers).unwrap();
    let bad = prepared.bad_cases(&answers, 0).unwrap();
    assert_eq!(bad.len(), 2);
    let share = 1.0 / (1.0 + (-1.0_f64).exp() + (-2.0_f64).exp());
    assert_eq!(bad[0].line(), format!("x2\tcar\tfood\t{share:.4}\n"));
    let predicted = prepared.predictions(&answers).unwrap();
    assert_eq!(predicted[0], Ok("car".to_owned()));
}

#[test]
fn multiple_choice_by_hand() {
    let dir = tempfile::tempdir().unwrap();
    let data = write(
        dir.path(),
        "q.jsonl",
        "{\"question\": \"q1\", \"choices\": [\"x\", \"y\"], \"answer\": \"B\"}\n\
         {\"question\": \"q2\", \"choices\": [\"x\", \"y\", \"z\", \"w\"], \"answer\": 2}\n",
    );
    let model = Scripted {
        likelihoods: Some(Box::new(|q| match q.answers.len() {
            2 => likely(&[-2.0, -1.0]),
            _ => likely(&[-1.0, -2.0, -2.0, -2.0]),
        })),
        ..Scripted::default()
    };
    let report = run("multiple-choice", &Setup::new(&data), &[&model]);
    close(value(&report, "all", "accuracy", 0), 0.5);
    let coin = report.metrics[0]
        .baselines
        .iter()
        .find(|b| b.0 == "coin flip")
        .unwrap();
    close(coin.1, (0.5 + 0.25) / 2.0);
}

#[test]
fn qa_by_hand() {
    let dir = tempfile::tempdir().unwrap();
    let data = write(
        dir.path(),
        "q.jsonl",
        "{\"context\": \"c\", \"question\": \"where\", \"answers\": [\"Paris\", \"in Paris\"]}\n\
         {\"context\": \"c\", \"question\": \"when\", \"answer\": \"1889\"}\n",
    );
    let model = Scripted {
        replies: Some(Box::new(|r| {
            assert_eq!(r.stop, ["\n"]);
            let first = text(&r.prompt).contains("where");
            Ok(Reply {
                text: if first { " The Paris." } else { "in 1889, they say" }.to_owned(),
                cut: 0,
            })
        })),
        ..Scripted::default()
    };
    let report = run("qa", &Setup::new(&data), &[&model]);
    close(value(&report, "all", "exact match", 0), 0.5);
    // in 1889 they say / 1889: 2 x 1 / 5.
    close(value(&report, "all", "F1 of words", 0), (1.0 + 0.4) / 2.0);
}

#[test]
fn perplexity_by_hand() {
    let dir = tempfile::tempdir().unwrap();
    // 8 bytes, 8 tokens; windows 0-4 and 4-8 score three tokens each.
    let data = write(dir.path(), "t.txt", "abcdefgh");
    let model = |nats: f32| Scripted {
        windows: Some(Box::new(move |w| {
            let mut ln_p = vec![-nats; w.ids.len() - w.context];
            if w.ids[0] == u32::from(b'e') {
                ln_p[0] = f32::NAN;
            }
            ln_p
        })),
        ..Scripted::default()
    };
    let setup = Setup {
        window: 4,
        ..Setup::new(&data)
    };
    let report = run("perplexity", &setup, &[&model(2.0), &model(2.5)]);
    close(value(&report, "all", "nats per token", 0), 2.0);
    close(value(&report, "all", "perplexity", 1), 2.5_f64.exp());
    close(
        value(&report, "all", "bits per byte", 0),
        2.0 / std::f64::consts::LN_2,
    );
    close(
        metric(&report, "all", "nats per token").deltas[1]
            .unwrap()
            .interval
            .value,
        0.5,
    );
    assert_eq!(report.counts["non-finite positions"], [1, 1]);
    assert!(
        report
            .warnings
            .iter()
            .any(|w| w.contains("M1: 1 positions are not finite"))
    );
    let long = Setup {
        window: 5,
        ..Setup::new(&data)
    };
    let short = Scripted {
        context: Some(4),
        ..model(1.0)
    };
    let message = tasks::find("perplexity")
        .unwrap()
        .prepare(&long, &short)
        .err()
        .unwrap()
        .to_string();
    assert!(
        message.contains("do not fit the base's context of 4"),
        "{message}"
    );
}

#[test]
fn divergence_by_hand() {
    let dir = tempfile::tempdir().unwrap();
    let data = write(dir.path(), "t.txt", "abcd");
    // Two tokens in the vocabulary do not cover the text's ids; logits decide by position alone.
    let base = Scripted {
        logits: Some(Box::new(|w| [0.0, 0.0].repeat(w.ids.len() - w.context))),
        ..Scripted::default()
    };
    let candidate = Scripted {
        logits: Some(Box::new(|w| [0.0, 3.0_f32.ln()].repeat(w.ids.len() - w.context))),
        ..Scripted::default()
    };
    let ids = write(dir.path(), "t.jsonl", "{\"ids\": [0, 1, 0, 1]}\n");
    let setup = Setup {
        window: 4,
        ..Setup::new(&ids)
    };
    let report = run("divergence", &setup, &[&base, &candidate]);
    let kl = 0.5 * 2.0_f64.ln() + 0.5 * (2.0_f64 / 3.0).ln();
    assert!((value(&report, "all", "KL to base", 1) - kl).abs() < 1e-7);
    assert!(
        metric(&report, "all", "KL to base").values[0].is_none(),
        "the base is no candidate"
    );
    assert_eq!(
        metric(&report, "all", "KL to base").baselines[0].1,
        0.0,
        "these logits are BF16 already"
    );
    close(value(&report, "all", "top-1 agreement", 1), 0.0);
    let median = value(&report, "all", "KL median", 1);
    assert!((median - kl).abs() < 1e-7);
    assert_eq!(report.histograms[0].counts.iter().sum::<u64>(), 3);
    assert!(data.exists());
}

/// Scripts for everything.
fn able() -> Scripted {
    Scripted {
        likelihoods: Some(Box::new(|q| likely(&vec![-1.0; q.answers.len()]))),
        replies: Some(Box::new(|_| {
            Ok(Reply {
                text: String::new(),
                cut: 0,
            })
        })),
        windows: Some(Box::new(|w| vec![-1.0; w.ids.len() - w.context])),
        logits: Some(Box::new(|w| vec![0.0; 2 * (w.ids.len() - w.context)])),
        ..Scripted::default()
    }
}

#[test]
fn laws_of_all_tasks() {
    let mut names = Vec::new();
    for task in TASKS {
        assert!(task.version() >= 1 && !task.summary().is_empty() && !task.data().is_empty());
        assert!(!names.contains(&task.name()), "{}", task.name());
        assert!(task.name().chars().all(|c| c.is_ascii_lowercase() || c == '-'));
        names.push(task.name());
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "label.txt", "a\nb\n");
        for (content, expected) in [
            (b"".as_slice(), "is empty"),
            (b"\xff\xfe", "expected UTF-8"),
            (b"\n\n", "is empty"),
        ] {
            let path = dir.path().join("data.jsonl");
            fs::write(&path, content).unwrap();
            let outcome = task.prepare(&Setup::new(&path), &able());
            let message = outcome
                .err()
                .unwrap_or_else(|| panic!("{} took {content:?}", task.name()))
                .to_string();
            assert!(
                message.contains("data.jsonl") && message.contains(expected),
                "{}: {message}",
                task.name()
            );
        }
        // Lines of no task's form.
        let path = write(dir.path(), "data.jsonl", "{\"ids\": [1, 2]}\n{\"what\": 1}\n");
        let message = task
            .prepare(&Setup::new(&path), &able())
            .err()
            .unwrap()
            .to_string();
        assert!(
            message.contains("line 2") || message.contains("line 1"),
            "{}: {message}",
            task.name()
        );
        let missing = task
            .prepare(&Setup::new(dir.path().join("none")), &able())
            .err()
            .unwrap();
        assert!(missing.to_string().contains("none"), "{missing}");
    }
    assert_eq!(names.len(), 6);
    let message = tasks::find("question").err().unwrap().to_string();
    assert!(message.contains("question-matching, classification"), "{message}");
}
