//! Tasks, each with a score computed by hand on a scripted model; and laws that hold for all of them.

mod laws;
mod texts;

use std::fs;
use std::path::{Path, PathBuf};

use qtool::report::{Metric, TaskReport};
use qtool::scorer::{Miss, Reply, Scorer};
use qtool::tasks::answers::Answers;
use qtool::tasks::setup::{Ask, Setup};
use qtool::tasks::{self, Reporting};

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
