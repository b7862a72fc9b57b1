//! The statistics of a comparison, through their entry point: hand-computed rows, corrections, missing answers.

use qtool::report::{Metric, Unit};
use qtool::statistics::baselines::{self, Baselines};
use qtool::statistics::compare::{ALL, How, Items, MACRO, compare, missing, warnings};
use qtool::statistics::proportion::{mcnemar, wilson};

fn accuracy() -> How {
    How {
        resamples: 2000,
        ..How::accuracy(Baselines::default(), 7)
    }
}

/// Scores of one model: right in the first `right` of `n` items, shifted by `shift`.
fn right(n: usize, right: usize, shift: usize) -> Vec<Option<f64>> {
    (0..n)
        .map(|i| Some(f64::from(u8::from((i + n - shift) % n < right))))
        .collect()
}

fn one_group(scores: Vec<Vec<Option<f64>>>) -> Items {
    Items {
        groups: vec!["bustm".into()],
        group_of: vec![0; scores[0].len()],
        scores,
        weights: None,
    }
}

#[test]
fn one_group_gives_one_row() {
    // Base right in items 0..60, candidate in 10..50: 20 lost, none gained.
    let items = one_group(vec![right(100, 60, 0), right(100, 40, 10)]);
    let rows = compare(&items, &accuracy());
    let [row] = rows.as_slice() else {
        panic!("{rows:?}")
    };
    assert_eq!((row.group.as_str(), row.items, row.best), (ALL, 100, Some(0)));
    assert_eq!(row.values[0], wilson(60, 100));
    assert_eq!(row.values[1], wilson(40, 100));
    let delta = row.deltas[1].unwrap();
    assert!((delta.interval.value + 0.2).abs() < 1e-12);
    assert!(
        delta.interval.low < -0.2 && delta.interval.high < 0.0 && !delta.noise,
        "{delta:?}"
    );
    assert_eq!(delta.p, Some(mcnemar(0, 20)));
    assert_eq!(delta.p_holm, delta.p);
    // Discordance 22/102 on 100 items.
    assert!(
        (row.detectable.unwrap() - 0.128).abs() < 0.002,
        "{:?}",
        row.detectable
    );
}

#[test]
fn equal_answers_are_noise_of_some_width() {
    let items = one_group(vec![right(50, 25, 0), right(50, 25, 0)]);
    let rows = compare(&items, &accuracy());
    let delta = rows[0].deltas[1].unwrap();
    assert!(delta.noise && delta.interval.value == 0.0);
    assert!(
        delta.interval.low <= -0.04 && delta.interval.high >= 0.04,
        "{delta:?}"
    );
    assert_eq!(delta.p, Some(1.0));
    assert_eq!(rows[0].best, None);
    assert!(rows[0].detectable.unwrap() > 0.05);
}

fn kinds() -> Items {
    // Three kinds of 40 items; the candidate loses 9 in the first, 1 in the second, gains 1 in the third.
    let mut scores = vec![Vec::new(), Vec::new()];
    for (base, candidate, shift) in [(30, 21, 0), (20, 19, 0), (10, 11, 0)] {
        scores[0].extend(right(40, base, shift));
        scores[1].extend(right(40, candidate, shift));
    }
    Items {
        groups: ["OPPO", "DuQM_pos", "DuQM_voice"].map(String::from).to_vec(),
        group_of: (0..120).map(|i| i / 40).collect(),
        scores,
        weights: None,
    }
}

#[test]
fn macro_average_first_then_kinds_with_holm() {
    let rows = compare(&kinds(), &accuracy());
    let names: Vec<&str> = rows.iter().map(|r| r.group.as_str()).collect();
    assert_eq!(names, [MACRO, "OPPO", "DuQM_pos", "DuQM_voice"]);
    assert_eq!(
        rows.iter().map(|r| r.items).collect::<Vec<_>>(),
        [120, 40, 40, 40]
    );
    assert!((rows[0].values[0].unwrap().value - 0.5).abs() < 1e-12);
    assert!((rows[0].deltas[1].unwrap().interval.value + 9.0 / 120.0).abs() < 1e-12);
    let p: Vec<f64> = rows[1..]
        .iter()
        .map(|r| r.deltas[1].unwrap().p.unwrap())
        .collect();
    assert_eq!(p, [mcnemar(0, 9), mcnemar(0, 1), mcnemar(1, 0)]);
    let holm: Vec<f64> = rows[1..]
        .iter()
        .map(|r| r.deltas[1].unwrap().p_holm.unwrap())
        .collect();
    assert_eq!(holm, [3.0 * p[0], 1.0, 1.0]);
    assert!(!rows[1].deltas[1].unwrap().noise && rows[2].deltas[1].unwrap().noise);
    assert_eq!(rows[1].best, Some(0));
    assert_eq!((rows[2].best, rows[3].best), (None, None));
    // Sign flips over kinds of one size are McNemar over all: 1 gained, 10 lost.
    let all = rows[0].deltas[1].unwrap();
    assert!((all.p.unwrap() - mcnemar(1, 10)).abs() < 0.01, "{all:?}");
}

#[test]
fn a_verdict_on_one_candidate_does_not_depend_on_others() {
    let two = kinds();
    let mut three = two.clone();
    three.scores.push(right(120, 5, 0));
    let (two, three) = (compare(&two, &accuracy()), compare(&three, &accuracy()));
    for (a, b) in two.iter().zip(&three) {
        assert_eq!(a.deltas[1], b.deltas[1]);
        assert_eq!(a.values[..2], b.values[..2]);
    }
}

#[test]
fn micro_average_and_baselines() {
    let items = kinds();
    let labels: Vec<usize> = (0..120).map(|i| usize::from(i % 3 == 0)).collect();
    let given = baselines::of_labels(3, &items.group_of, &labels, 2, false);
    let how = How {
        macro_average: false,
        baselines: given.clone(),
        ..accuracy()
    };
    let rows = compare(&items, &how);
    assert_eq!(rows[0].group, ALL);
    assert_eq!(rows[0].values[0], wilson(60, 120));
    assert_eq!(rows[0].baselines, given.headline);
    assert_eq!(rows[3].baselines, given.groups[2]);
    assert_eq!(rows[0].baselines[0], ("majority".to_owned(), 80.0 / 120.0));
}

#[test]
fn a_missing_answer_is_not_a_wrong_one() {
    let mut scores = vec![right(100, 50, 0), right(100, 50, 0)];
    for (i, score) in scores[1].iter_mut().take(10).enumerate() {
        *score = if i % 2 == 0 { None } else { Some(f64::NAN) };
    }
    let items = one_group(scores);
    assert_eq!(missing(&items), [0, 10]);
    let row = &compare(&items, &accuracy())[0];
    assert_eq!(row.missing, [0, 10]);
    assert_eq!(row.values[0], wilson(50, 100));
    assert_eq!(row.values[1], wilson(40, 90));
    assert_eq!(
        row.deltas[1].unwrap().interval.value,
        0.0,
        "equal on the 90 that both answered"
    );
    let said = warnings(&items, &accuracy(), &["BASE".into(), "INT4".into()]);
    assert_eq!(
        said,
        [
            "INT4 has no answer to 10 of 100 items; its accuracy is of the others, over all items 40.0 % if the missing count as wrong, 50.0 % if as right"
        ]
    );
}

#[test]
fn a_kind_without_answers_has_no_macro_average() {
    let mut items = kinds();
    items.scores[1][40..80].fill(None);
    let rows = compare(&items, &accuracy());
    assert!(rows[0].values[0].is_some() && rows[0].values[1].is_none() && rows[0].deltas[1].is_none());
    assert!(rows[2].values[1].is_none() && rows[1].deltas[1].is_some());
}

#[test]
fn a_base_without_values_leaves_the_candidates_theirs() {
    // KL to the base: the base has none.
    let kl = |scale: f64| {
        (0..60)
            .map(|i| Some(scale * (1.0 + f64::from(i % 7))))
            .collect::<Vec<_>>()
    };
    let items = one_group(vec![vec![None; 60], kl(0.001), kl(0.02)]);
    let how = How {
        resamples: 2000,
        ..How::mean("KL to base", Unit::NatsPerToken, Some(false), 1)
    };
    let row: &Metric = &compare(&items, &how)[0];
    assert!(row.values[0].is_none() && row.deltas.iter().all(Option::is_none));
    let mean = (0..60).map(|i| 1.0 + f64::from(i % 7)).sum::<f64>() / 60.0;
    assert!((row.values[1].unwrap().value - 0.001 * mean).abs() < 1e-12);
    assert_eq!(row.best, Some(1));
    assert_eq!(
        row.missing,
        [0, 0, 0],
        "the base has no such value, which is no missing answer"
    );
}

#[test]
fn perplexity_is_exp_of_a_weighted_mean_and_its_deltas_are_ratios() {
    let base: Vec<Option<f64>> = (0..50).map(|i| Some(3.0 + 0.01 * f64::from(i % 5))).collect();
    let candidate = base.iter().map(|b| b.map(|b| b + 0.1)).collect();
    let mut items = one_group(vec![base.clone(), candidate]);
    let weights: Vec<f64> = (0..50).map(|i| 100.0 + f64::from(i)).collect();
    items.weights = Some(weights.clone());
    let how = How {
        resamples: 2000,
        ..How::mean("perplexity", Unit::Perplexity, Some(false), 1)
    };
    let row = &compare(&items, &how)[0];
    let sum: f64 = base.iter().flatten().zip(&weights).map(|(b, w)| b * w).sum();
    let expected = (sum / weights.iter().sum::<f64>()).exp();
    let value = row.values[0].unwrap();
    assert!((value.value - expected).abs() < 1e-9 && value.low < expected && expected < value.high);
    let ratio = row.deltas[1].unwrap();
    assert!((ratio.interval.value - 0.1_f64.exp()).abs() < 1e-9);
    assert!(!ratio.noise && ratio.interval.low > 1.1);
    assert!(row.detectable.unwrap() >= 1.0);
}

#[test]
fn one_real_valued_item_proves_nothing() {
    let items = one_group(vec![vec![Some(2.0)], vec![Some(3.0)]]);
    let how = How {
        resamples: 500,
        ..How::mean("nats", Unit::NatsPerToken, Some(false), 1)
    };
    let row = &compare(&items, &how)[0];
    assert!(row.deltas[1].unwrap().noise);
    assert_eq!((row.best, row.detectable), (None, None));
}

#[test]
fn no_items_no_values() {
    let rows = compare(&one_group(vec![vec![], vec![]]), &accuracy());
    assert_eq!(rows.len(), 1);
    assert!(rows[0].values.iter().all(Option::is_none) && rows[0].deltas.iter().all(Option::is_none));
}
