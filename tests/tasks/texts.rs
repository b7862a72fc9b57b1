//! Replies and running text, by hand.

use qtool::scorer::Reply;
use qtool::tasks;
use qtool::tasks::setup::Setup;

use super::{close, metric, run, value, write};
use crate::scripted::{Scripted, text};

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
            let first = text(&r.prompt).contains("Question: where");
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
