//! `qtool validate` and `qtool predict` from end to end: the pipeline on scripted models, the program on a sample
//! model and its artifacts, what is refused, and how a broken run goes on.

mod program;
mod refusals;
mod served;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use qtool::Error;
use qtool::scorer::{Miss, Scorer};
use qtool::tasks::setup::Setup;
use qtool::validate::{self, Place, Plan};

use crate::scripted::{Scripted, likely, text};

/// Pairs of which a third is labelled 1.
fn pairs(folder: &Path, count: usize) -> PathBuf {
    let path = folder.join("pairs.tsv");
    let line = |i: usize| {
        format!(
            "how do I install package {i}\thow is package {i} set up\t{}\n",
            usize::from(i.is_multiple_of(3))
        )
    };
    fs::write(&path, (0..count).map(line).collect::<String>()).unwrap();
    path
}

fn plan(data: &Path, work: Option<PathBuf>, resume: bool) -> Plan {
    let served = |name: &str| Place::Served {
        url: "script".to_owned(),
        name: name.to_owned(),
    };
    Plan {
        models: vec![served("one"), served("two")],
        tasks: vec![("question-matching".to_owned(), Setup::new(data))],
        seed: 1,
        resamples: 300,
        items: true,
        unverified: false,
        work,
        resume,
        show_progress: false,
        device: "script".to_owned(),
        device_reason: None,
        device_identity: "script".to_owned(),
    }
}

/// Says "yes" by the number of the package; everything after `most` answers is an error of the whole run.
fn scripted(skew: f64, asked: &Arc<AtomicUsize>, most: usize) -> Box<dyn Scorer> {
    let asked = Arc::clone(asked);
    Box::new(Scripted {
        likelihoods: Some(Box::new(move |q| {
            let before = asked.fetch_add(1, Ordering::SeqCst);
            assert!(before < most, "the machine was switched off");
            let prompt = text(&q.prompt);
            let number: f64 = prompt
                .rsplit("package ")
                .next()
                .unwrap()
                .split(' ')
                .next()
                .unwrap()
                .parse()
                .unwrap();
            likely(&[-1.0 - skew, -1.0 - (number * 0.7).sin() / 3.0])
        })),
        ..Scripted::default()
    })
}

/// Runs with models that die after `most` answers.
fn run(plan: &Plan, most: usize) -> (Result<validate::Outcome, Error>, usize) {
    let asked = Arc::new(AtomicUsize::new(0));
    let open = |place: &Place| {
        let skew = if place.name().starts_with("one") { 0.0 } else { 0.1 };
        Ok(scripted(skew, &asked, most))
    };
    let outcome = validate::run(plan, &open);
    (outcome, asked.load(Ordering::SeqCst))
}

#[test]
fn a_broken_run_goes_on_with_the_same_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let data = pairs(dir.path(), 40);
    let (whole, asked) = run(&plan(&data, None, false), usize::MAX);
    let whole = whole.unwrap().report;
    assert_eq!(asked, 80);

    let work = dir.path().join("work");
    let broken = std::panic::catch_unwind(|| run(&plan(&data, Some(work.clone()), false), 50));
    assert!(broken.is_err(), "the script ends the first run");
    let refused = run(&plan(&data, Some(work.clone()), false), 0)
        .0
        .err()
        .unwrap()
        .to_string();
    assert!(refused.contains("pass --resume"), "{refused}");

    let (resumed, asked) = run(&plan(&data, Some(work.clone()), true), usize::MAX);
    let resumed = resumed.unwrap();
    assert_eq!(asked, 30, "what was answered is not asked again");
    assert!(resumed.report.run.resumed && resumed.journal.is_some());
    let (a, b) = (&whole.tasks[0], &resumed.report.tasks[0]);
    assert_eq!(a.metrics, b.metrics);
    assert_eq!(a.tables, b.tables);
    assert_eq!(a.items, b.items);
    assert_eq!(b.speed[0].items + b.speed[1].items, 30);
    drop(resumed);

    let (again, asked) = run(&plan(&data, Some(work.clone()), true), 0);
    assert_eq!(
        (again.unwrap().report.tasks[0].metrics == a.metrics, asked),
        (true, 0)
    );

    let mut other = plan(&data, Some(work.clone()), true);
    other.tasks[0].1.calibrate = true;
    let refused = run(&other, 0).0.err().unwrap().to_string();
    assert!(refused.contains("settings of question-matching"), "{refused}");
    let mut text = fs::read_to_string(&data).unwrap();
    text = text.replacen("package 3\t", "package 5\t", 1);
    fs::write(&data, text).unwrap();
    let refused = run(&plan(&data, Some(work), true), 0)
        .0
        .err()
        .unwrap()
        .to_string();
    assert!(refused.contains("data of question-matching differ"), "{refused}");
}

#[test]
fn every_miss_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let data = pairs(dir.path(), 12);
    let open = |_: &Place| -> qtool::Result<Box<dyn Scorer>> {
        Ok(Box::new(Scripted {
            likelihoods: Some(Box::new(|q| {
                if text(&q.prompt).contains("package 7") {
                    return Err(Miss {
                        kind: "status 500".to_owned(),
                        detail: "x".to_owned(),
                    });
                }
                if text(&q.prompt).contains("package 8") {
                    return likely(&[f64::NAN, -1.0]);
                }
                likely(&[-1.0, -2.0])
            })),
            ..Scripted::default()
        }))
    };
    let report = validate::run(&plan(&data, None, false), &open).unwrap().report;
    let task = &report.tasks[0];
    assert_eq!(task.counts["no answer: status 500"], [1, 1]);
    assert_eq!(task.counts["no answer: non-finite"], [1, 1]);
    assert!(
        task.warnings
            .iter()
            .any(|w| w.contains("no answer to 2 of 12 items")),
        "{:?}",
        task.warnings
    );
    assert!(
        task.warnings.iter().any(|w| w.contains("says 0 to every item")),
        "{:?}",
        task.warnings
    );
    let plan = Plan {
        models: vec![Place::Served {
            url: "script".to_owned(),
            name: "one".to_owned(),
        }],
        ..plan(&data, None, false)
    };
    let predicted = validate::predict(&plan, &open).unwrap();
    assert_eq!(predicted[0], Ok("0".to_owned()));
    assert!(predicted[7].as_ref().unwrap_err().contains("line 8: status 500"));
}
