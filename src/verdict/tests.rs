//! Verdicts on made-up rows.

use std::collections::BTreeMap;

use super::policy::parse;
use super::*;
use crate::report::Delta;

fn interval(value: f64, low: f64, high: f64) -> Interval {
    Interval { value, low, high }
}

fn metric(name: &str, group: &str, unit: Unit, higher: Option<bool>) -> Metric {
    Metric {
        group: group.into(),
        name: name.into(),
        unit,
        higher_is_better: higher,
        items: 1000,
        baselines: vec![],
        detectable: None,
        values: vec![None, None],
        deltas: vec![None, None],
        best: None,
        missing: vec![0, 0],
    }
}

fn delta(value: f64, low: f64, high: f64) -> Option<Delta> {
    Some(Delta {
        interval: interval(value, low, high),
        p: None,
        p_holm: None,
        noise: false,
    })
}

fn task(name: &str, metrics: Vec<Metric>) -> TaskReport {
    TaskReport {
        task: name.into(),
        version: 1,
        data: vec![],
        settings: BTreeMap::new(),
        metrics,
        tables: vec![],
        histograms: vec![],
        counts: BTreeMap::new(),
        warnings: vec![],
        speed: vec![],
        items: None,
    }
}

fn accuracy(value: f64, low: f64, high: f64) -> TaskReport {
    let mut all = metric("accuracy", "macro average", Unit::Share, Some(true));
    all.values = vec![
        Some(interval(0.6, 0.57, 0.63)),
        Some(interval(0.6 + value, 0.55, 0.62)),
    ];
    all.deltas[1] = delta(value, low, high);
    task(
        "question-matching",
        vec![all, metric("accuracy", "OPPO", Unit::Share, Some(true))],
    )
}

fn one(limit: &str, task: TaskReport) -> Check {
    let labels = ["BASE".to_owned(), "INT4".to_owned()];
    let verdict = judge(&parse(limit, "p").unwrap(), &labels, &[task])
        .unwrap()
        .unwrap();
    assert_eq!(verdict.checks.len(), 1);
    assert_eq!(verdict.outcome, verdict.checks[0].outcome);
    verdict.checks.into_iter().next().unwrap()
}

const DROP: &str = "[max-drop]\nquestion-matching = 1";

#[test]
fn passed_failed_and_between() {
    let passed = one(DROP, accuracy(-0.002, -0.008, 0.004));
    assert_eq!(passed.outcome, Outcome::Passed);
    assert_eq!(
        passed.reason,
        "INT4: accuracy in question-matching (macro average) drops by 0.200 points (-0.400 to 0.800 with 95 % confidence); the limit of 1 holds"
    );
    let failed = one(DROP, accuracy(-0.04, -0.06, -0.02));
    assert_eq!((failed.outcome, failed.more_items), (Outcome::Failed, None));
    assert!(
        failed.reason.ends_with("the limit of 1 is broken"),
        "{}",
        failed.reason
    );
    // Value 0.5, limit 1, upper end 2.5: four times as narrow takes 16 times the items.
    let between = one(DROP, accuracy(-0.005, -0.025, 0.015));
    assert_eq!(
        (between.outcome, between.more_items),
        (Outcome::Inconclusive, Some(15_000))
    );
    assert!(
        between
            .reason
            .ends_with("the limit of 1 lies within, about 15,000 more items like these would decide")
    );
    assert_eq!(
        [0, 1, 3],
        [Outcome::Passed, Outcome::Failed, Outcome::Inconclusive].map(Outcome::exit_status)
    );
}

#[test]
fn an_end_on_the_limit_holds_and_a_value_on_it_has_no_advice() {
    assert_eq!(one(DROP, accuracy(0.0, -0.01, 0.01)).outcome, Outcome::Passed);
    let on_it = one(DROP, accuracy(-0.01, -0.03, 0.01));
    assert_eq!((on_it.outcome, on_it.more_items), (Outcome::Inconclusive, None));
}

#[test]
fn a_pass_hides_no_missing_answers() {
    let mut found = accuracy(0.0, -0.004, 0.004);
    found.metrics[0].missing = vec![0, 5];
    assert_eq!(
        one(DROP, found.clone()).outcome,
        Outcome::Passed,
        "half a point more is still within"
    );
    found.metrics[0].missing = vec![0, 50];
    let check = one(DROP, found);
    assert_eq!(check.outcome, Outcome::Inconclusive);
    assert!(
        check
            .reason
            .ends_with("but not if the 50 of 1000 items without an answer are wrong"),
        "{}",
        check.reason
    );
    let mut unmeasured = accuracy(0.0, 0.0, 0.0);
    unmeasured.metrics[0].deltas[1] = None;
    let check = one(DROP, unmeasured);
    assert_eq!((check.outcome, check.measured), (Outcome::Inconclusive, None));
    let mut single = accuracy(0.0, 0.0, 0.0);
    single.metrics[0].items = 1;
    assert_eq!(one(DROP, single).outcome, Outcome::Inconclusive);
}

fn divergence() -> TaskReport {
    let mut kl = metric(policy::KL, "all", Unit::NatsPerToken, Some(false));
    kl.values[1] = Some(interval(0.03, 0.02, 0.04));
    let mut agreement = metric(policy::AGREEMENT, "all", Unit::Share, Some(true));
    agreement.values[1] = Some(interval(0.9, 0.88, 0.92));
    let mut found = task("divergence", vec![kl, agreement]);
    found.counts.insert(NON_FINITE.into(), vec![0, 0]);
    found
}

#[test]
fn values_against_ceilings_and_floors() {
    for (limit, outcome) in [
        ("max-kl = 0.05", Outcome::Passed),
        ("max-kl = 0.01", Outcome::Failed),
        ("max-kl = 0.035", Outcome::Inconclusive),
        ("min-agreement = 0.85", Outcome::Passed),
        ("min-agreement = 0.95", Outcome::Failed),
        ("min-agreement = 0.91", Outcome::Inconclusive),
    ] {
        assert_eq!(one(limit, divergence()).outcome, outcome, "{limit}");
    }
    let reason = one("max-kl = 0.05", divergence()).reason;
    assert!(
        reason.contains("KL to base in divergence (all) is 0.0300 nats per token (0.0200 to 0.0400 with"),
        "{reason}"
    );
    let mut damaged = divergence();
    damaged.counts.insert(NON_FINITE.into(), vec![0, 7]);
    assert_eq!(
        one("max-kl = 0.05", damaged.clone()).outcome,
        Outcome::Inconclusive
    );
    assert_eq!(one("max-kl = 0.01", damaged).outcome, Outcome::Failed);
}

#[test]
fn perplexity_rises_in_percent() {
    let mut row = metric("perplexity", "all", Unit::Perplexity, Some(false));
    row.deltas[1] = delta(1.012, 1.008, 1.016);
    let check = one("[max-drop]\nperplexity = 2", task("perplexity", vec![row]));
    assert_eq!(check.outcome, Outcome::Passed);
    assert!(
        check.reason.contains("rises by 1.20 % (0.800 to 1.60 with"),
        "{}",
        check.reason
    );
}

#[test]
fn the_worst_check_decides_and_every_candidate_is_checked() {
    let mut found = accuracy(0.0, -0.004, 0.004);
    found.metrics[0].deltas.push(delta(-0.1, -0.12, -0.08));
    found.metrics[0].missing.push(0);
    let labels = ["BASE", "INT8", "INT2"].map(String::from);
    let verdict = judge(&parse(DROP, "p").unwrap(), &labels, &[found])
        .unwrap()
        .unwrap();
    assert_eq!(verdict.outcome, Outcome::Failed);
    assert_eq!(
        verdict.checks.iter().map(|c| c.outcome).collect::<Vec<_>>(),
        [Outcome::Passed, Outcome::Failed]
    );
    assert_eq!(judge(&[], &labels, &[]).unwrap(), None);
}

#[test]
fn unknown_names_are_answered_with_what_there_is() {
    let labels = ["BASE".to_owned(), "INT4".to_owned()];
    for (limit, expected) in [
        (
            "[max-drop]\nqa = 1",
            "p:2: there is no task \"qa\", expected one of: question-matching",
        ),
        (
            "[[limit]]\ntask = \"question-matching\"\nmetric = \"F1\"\nmin = 0",
            "p:1: there is no metric \"F1\", expected one of: accuracy",
        ),
        (
            "[[limit]]\ntask = \"question-matching\"\ngroup = \"x\"\nmin = 0",
            "p:1: there is no row \"x\", expected one of: macro average, OPPO",
        ),
        (
            "[[limit]]\ntask = \"question-matching\"\nmin = 60",
            "p:1: accuracy is a share of 0 to 1; 95 % is 0.95",
        ),
    ] {
        let limits = parse(limit, "p").unwrap();
        let said = judge(&limits, &labels, &[accuracy(0.0, 0.0, 0.0)])
            .unwrap_err()
            .to_string();
        assert_eq!(said, expected);
    }
    let neither = task("x", vec![metric("threshold", "all", Unit::Number, None)]);
    let said = judge(&parse("[max-drop]\nx = 1", "p").unwrap(), &labels, &[neither])
        .unwrap_err()
        .to_string();
    assert!(said.contains("neither better high nor low"), "{said}");
}

#[test]
fn numbers_for_people() {
    let shown = [0.0, 0.5, -1.234, 12.34, 1234.6, 0.00012345].map(number);
    assert_eq!(shown, ["0.00", "0.500", "-1.23", "12.3", "1235", "0.000123"]);
    assert_eq!(
        [1, 999, 1000, 1_234_567].map(grouped),
        ["1", "999", "1,000", "1,234,567"]
    );
}
