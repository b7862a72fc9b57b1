//! The page of the example: whole, self-contained, and deaf to what names say.

use super::super::example;
use super::*;

#[test]
fn a_whole_page_with_every_plot() {
    let report = example::report();
    let page = render(&report);
    assert!(page.starts_with("<!doctype html>") && page.trim_end().ends_with("</html>"));
    // 3 forests of question matching, 3 distributions, 3 models' tensors, 2 traces.
    assert_eq!(page.matches("<svg").count(), 3 + 3 + 3 + 2);
    assert_eq!(page.matches("<svg").count(), page.matches("</svg>").count());
    for kind in example::KINDS {
        assert!(page.contains(kind.0), "{}", kind.0);
    }
    for said in [
        "FAILED",
        "INT2: beyond a limit",
        "within noise",
        "majority",
        "8 of 10 such runs",
        "confusion",
        "no answer: timeout",
    ] {
        assert!(page.contains(said), "{said}");
    }
    for mark in ["NaN", "inf,", "undefined"] {
        assert!(!page.contains(mark), "{mark}");
    }
    example::leave("example-report.html", &page);
}

#[test]
fn it_asks_for_nothing_from_outside() {
    let page = render(&example::report());
    for address in [
        "http:", "https:", "//", "url(", "src=", "@import", "<script", "<link",
    ] {
        assert!(!page.contains(address), "{address}");
    }
    assert!(page.contains("default-src 'none'"));
}

#[test]
fn names_are_shown_not_obeyed() {
    let mut report = example::report();
    let evil = "\"><script>alert(1)</script><img src=x onerror=y>'{{ 7 * 7 }}";
    for model in &mut report.models {
        model.label = evil.into();
        model.path = evil.into();
        model.kind = evil.into();
        model
            .tensors
            .iter_mut()
            .for_each(|t| t.name = format!("a.1.{evil}"));
    }
    for task in &mut report.tasks {
        task.task = evil.into();
        task.warnings.push(evil.into());
        task.settings.insert(evil.into(), evil.into());
        task.counts.insert(evil.into(), vec![1; 4]);
        task.metrics
            .iter_mut()
            .for_each(|m| (m.group, m.name) = (evil.into(), evil.into()));
        task.tables
            .iter_mut()
            .for_each(|t| t.columns = vec![evil.into(); 2]);
        task.histograms.iter_mut().for_each(|h| h.name = evil.into());
    }
    for check in &mut report.verdict.as_mut().unwrap().checks {
        check.reason = evil.into();
    }
    let page = render(&report);
    assert!(
        !page.contains("<script") && !page.contains("<img") && !page.contains("'49"),
        "obeyed"
    );
    assert!(page.matches("&lt;script&gt;").count() > 50);
}

#[test]
fn an_empty_report_is_a_page_too() {
    let mut report = example::report();
    (report.models, report.tasks, report.verdict) = (vec![], vec![], None);
    report.run.resources.clear();
    let page = render(&report);
    assert!(page.contains("No limits were set") && !page.contains("<svg"));
}
