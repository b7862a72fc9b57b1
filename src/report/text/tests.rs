//! The terminal's tables of the example: every width, every model, hostile names.

use super::super::example;
use super::*;

#[test]
fn fits_and_says_everything() {
    let report = example::report();
    for width in [80, 100, 200] {
        let text = render(&report, Look { width, colour: false });
        let table: Vec<&str> = text
            .lines()
            .filter(|l| l.starts_with("  DuQM") || l.starts_with("    n "))
            .collect();
        assert!(table.len() >= 2 * 13, "{text}");
        assert!(table.iter().all(|l| l.width() <= width), "{width}\n{text}");
        for label in ["BASE", "INT8", "INT4", "INT2"] {
            assert!(text.contains(label));
        }
        for kind in example::KINDS {
            assert!(text.contains(kind.0), "{}", kind.0);
        }
    }
    let text = render(&report, Look::default());
    for said in [
        "without looking: majority",
        "in 8 of 10 runs",
        "~ within noise",
        "verdict: FAILED",
        "warning: INT2 has no answer to 1 of 910",
    ] {
        assert!(text.contains(said), "{said}\n{text}");
    }
    assert!(!text.contains('\u{1b}'));
    example::leave("example-report.txt", &text);
    assert!(
        render(
            &report,
            Look {
                width: 100,
                colour: true
            }
        )
        .contains('\u{1b}')
    );
}

#[test]
fn every_model_once_in_every_table_row() {
    let report = example::report();
    let text = render(
        &report,
        Look {
            width: 60,
            colour: false,
        },
    );
    // Each candidate in a table of its own, the base in each.
    let heads: Vec<&str> = text
        .lines()
        .filter(|l| l.trim_start().starts_with("BASE  ") && !l.contains("models/"))
        .collect();
    assert!(heads.len() >= 3, "{text}");
    for label in ["INT8", "INT4", "INT2"] {
        assert!(heads.iter().any(|h| h.contains(label)), "{label}\n{text}");
    }
}

#[test]
fn a_name_cannot_forge_a_line() {
    let mut report = example::report();
    report.models[1].label = "INT8\n\u{1b}[2Jverdict: PASSED".into();
    report.tasks[0].metrics[1].group = "x\rverdict: PASSED".into();
    let text = render(&report, Look::default());
    assert!(!text.contains('\u{1b}') && !text.contains('\r'));
    assert_eq!(text.lines().filter(|l| l.starts_with("verdict:")).count(), 1);
}

#[test]
fn one_model_or_no_rows() {
    let mut report = example::report();
    report.models.truncate(1);
    report.tasks[1].metrics.clear();
    let text = render(&report, Look::default());
    assert!(text.contains("BASE") && !text.contains("INT8  "), "{text}");
}
