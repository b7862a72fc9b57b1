//! A report as one HTML page that needs nothing else: no script, no font, no address. Light and dark, wide and narrow.
//!
//! The template escapes everything it is given; names of models, labels and paths are shown, never obeyed. A content
//! security policy in the page forbids all loading, should anything slip through.

mod axis;
mod plots;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Value, context};
use plots::{Plot, class, forests, value_and_told};
use serde::Serialize;

use super::text::{number, outcome_word};
use super::words::{Style, baselines, bytes, chance, plain, resources, seconds, tested};
use super::{DetailTable, Metric, Outcome, Report, TaskReport, Unit};

const PAGE: &str = include_str!("page.html");
/// Columns of a table that is drawn with shades; it must be square, truth down and prediction across.
const CONFUSION: &str = "confusion";

/// The page.
pub fn render(report: &Report) -> String {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build();
    environment.set_syntax(syntax.expect("the standard marks with blocks on lines of their own"));
    // The name's ending switches escaping on.
    let page = environment.template_from_named_str("page.html", PAGE);
    let page = page.and_then(|page| page.render(contents(report)));
    page.expect("the template is part of the program and a test renders it")
}

fn contents(report: &Report) -> Value {
    let labels: Vec<String> = report.models.iter().map(|m| plain(&m.label)).collect();
    let tasks: Vec<Task> = report.tasks.iter().map(|t| Task::of(t, &labels)).collect();
    let models: Vec<Value> = report
        .models
        .iter()
        .map(|m| {
            context! {
                label => plain(&m.label), path => plain(&m.path), kind => plain(&m.kind),
                size => m.bytes.map(bytes), bits => m.bits_per_weight.map(|b| format!("{b:.2}")),
                digest => m.digest.as_deref().map(plain), tokenizer => m.tokenizer_digest.as_deref().map(plain),
            }
        })
        .collect();
    context! {
        tool => plain(&report.tool), verdict => verdict(report, &labels), labels => labels.clone(), tasks => Value::from(Serde(tasks)), models,
        summary => summary(report, &labels),
        sqnr => Value::from(Serde(report.models.iter().filter_map(plots::sqnr).collect::<Vec<Plot>>())),
        traces => Value::from(Serde(plots::resources(&report.run.resources))),
        machine => resources(report),
        run => context! {
            device => plain(&report.run.device), reason => report.run.device_reason.as_deref().map(plain),
            threads => report.run.threads, seed => report.run.seed, took => seconds(report.run.seconds),
            started => plain(&report.run.started), resumed => report.run.resumed,
        },
    }
}

fn outcome_class(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Passed => "passed",
        Outcome::Failed => "failed",
        Outcome::Inconclusive => "inconclusive",
    }
}

/// The verdict in plain words: of all, and of each candidate.
fn verdict(report: &Report, labels: &[String]) -> Option<Value> {
    let verdict = report.verdict.as_ref()?;
    let of = |wanted: Outcome| -> Vec<&str> {
        let worst = |m: usize| {
            verdict
                .checks
                .iter()
                .filter(|c| c.model == m)
                .map(|c| c.outcome)
                .max()
        };
        (1..labels.len())
            .filter(|&m| worst(m) == Some(wanted))
            .map(|m| labels[m].as_str())
            .collect()
    };
    let mut words = Vec::new();
    for (outcome, said) in [
        (
            Outcome::Passed,
            "within every limit, with the whole 95 % interval",
        ),
        (Outcome::Failed, "beyond a limit, with the whole 95 % interval"),
        (
            Outcome::Inconclusive,
            "undecided: a limit lies within the interval, so these items cannot tell",
        ),
    ] {
        let who = of(outcome);
        if !who.is_empty() {
            words.push(format!("{}: {said}.", who.join(", ")));
        }
    }
    let checks: Vec<Value> = verdict
        .checks
        .iter()
        .map(|c| {
            context! { class => outcome_class(c.outcome), word => outcome_word(c.outcome), limit => plain(&c.limit),
            reason => plain(&c.reason) }
        })
        .collect();
    Some(
        context! { class => outcome_class(verdict.outcome), word => outcome_word(verdict.outcome), words, checks },
    )
}

/// One line for each candidate and task: the first row of the first metric.
fn summary(report: &Report, labels: &[String]) -> Vec<Value> {
    let mut lines = Vec::new();
    for task in &report.tasks {
        let Some(metric) = task.metrics.first() else {
            continue;
        };
        for (model, label) in labels.iter().enumerate().skip(1) {
            if let Some((value, told)) = value_and_told(metric, model) {
                let class = class(metric, model);
                let judged = match class {
                    "noise" => "within noise",
                    "worse" => "worse than the base",
                    "better" => "better than the base",
                    "changed" => "different from the base",
                    _ => "",
                };
                let what = format!("{} ({})", plain(&metric.name), plain(&metric.group));
                lines.push(context! { label, task => plain(&task.task), what, value, told, class, judged });
            }
        }
    }
    lines
}

#[derive(Serialize)]
struct Task {
    name: String,
    version: u32,
    data: Vec<[String; 3]>,
    settings: Vec<[String; 2]>,
    warnings: Vec<String>,
    sections: Vec<Section>,
    histograms: Vec<Plot>,
    matrices: Vec<Shaded>,
    tables: Vec<Shaded>,
    counts: Vec<(String, Vec<u64>)>,
    speed: Vec<String>,
}

#[derive(Serialize)]
struct Section {
    title: String,
    note: String,
    rows: Vec<Row>,
    forests: Vec<Plot>,
}

#[derive(Serialize)]
struct Row {
    name: String,
    below: String,
    cells: Vec<Cell>,
}

#[derive(Serialize)]
struct Cell {
    value: String,
    interval: String,
    delta: Option<String>,
    tested: Option<String>,
    class: &'static str,
    best: bool,
}

#[derive(Serialize)]
struct Shaded {
    title: String,
    columns: Vec<String>,
    rows: Vec<(String, Vec<(String, String)>)>,
}

impl Task {
    fn of(task: &TaskReport, labels: &[String]) -> Self {
        let label = |m: usize| labels.get(m).cloned().unwrap_or_default();
        let mut sections = Vec::new();
        let mut rest = task.metrics.as_slice();
        while let Some(first) = rest.first() {
            let same = rest
                .iter()
                .take_while(|m| m.name == first.name && m.unit == first.unit)
                .count();
            sections.push(Section::of(&rest[..same], labels));
            rest = &rest[same..];
        }
        let shaded = |wanted: bool| {
            let of = task.tables.iter().filter(|t| (t.name == CONFUSION) == wanted);
            of.map(|t| Shaded::of(t, &label(t.model), wanted)).collect()
        };
        let speed = task
            .speed
            .iter()
            .enumerate()
            .filter(|(_, s)| s.seconds > 0.0 && s.items > 0);
        Self {
            name: plain(&task.task),
            version: task.version,
            data: task
                .data
                .iter()
                .map(|d| [plain(&d.path), d.items.to_string(), plain(&d.digest)])
                .collect(),
            settings: task
                .settings
                .iter()
                .map(|(k, v)| [plain(k), plain(&v.to_string())])
                .collect(),
            warnings: task.warnings.iter().map(|w| plain(w)).collect(),
            sections,
            histograms: task
                .histograms
                .iter()
                .map(|h| plots::histogram(h, &label(h.model)))
                .collect(),
            matrices: shaded(true),
            tables: shaded(false),
            counts: task
                .counts
                .iter()
                .filter(|c| c.1.iter().any(|n| *n > 0))
                .map(|(k, v)| (plain(k), v.clone()))
                .collect(),
            speed: speed
                .map(|(m, s)| {
                    format!(
                        "{} {:.1} ms an item, {:.0} tokens a second",
                        label(m),
                        s.seconds * 1e3 / s.items as f64,
                        s.tokens as f64 / s.seconds
                    )
                })
                .collect(),
        }
    }
}

impl Section {
    fn of(rows: &[Metric], labels: &[String]) -> Self {
        let first = &rows[0];
        let style = Style::of(first);
        let better = match first.higher_is_better {
            Some(true) => "higher is better",
            Some(false) => "lower is better",
            None => "",
        };
        let title = [
            plain(&first.name),
            first.unit_beside_name().to_owned(),
            better.to_owned(),
        ];
        let mut note = Vec::new();
        if !first.baselines.is_empty() {
            note.push(format!("Without looking at the items: {}.", baselines(first)));
        }
        if let Some(found) = first.detectable {
            let unit = if first.unit == Unit::Share { " points" } else { "" };
            note.push(format!(
                "A true difference of {}{unit} in {} would be found in 8 of 10 such runs; smaller ones often go unseen.",
                style.detectable(found),
                plain(&first.group)
            ));
        }
        Self {
            title: title
                .into_iter()
                .filter(|t| !t.is_empty())
                .collect::<Vec<_>>()
                .join(", "),
            note: note.join(" "),
            rows: rows.iter().map(|m| Row::of(m, labels.len())).collect(),
            forests: forests(rows, labels),
        }
    }
}

impl Row {
    fn of(metric: &Metric, models: usize) -> Self {
        let style = Style::of(metric);
        let mut below = vec![format!("{} items", metric.items)];
        below.extend(chance(metric).map(|c| format!("chance {}", style.value(c))));
        below.extend(
            metric
                .detectable
                .map(|d| format!("detects {}", style.detectable(d))),
        );
        let cell = |model: usize| {
            let value = metric.values.get(model).copied().flatten();
            let delta = metric.deltas.get(model).copied().flatten();
            Cell {
                value: value.map_or_else(|| "-".to_owned(), |v| style.value(v.value)),
                interval: value.map_or_else(String::new, |v| style.interval(&v)),
                delta: delta.map(|d| style.delta(&d)),
                tested: delta.and_then(|d| tested(&d)),
                class: class(metric, model),
                best: metric.best == Some(model),
            }
        };
        Self {
            name: plain(&metric.group),
            below: below.join(", "),
            cells: (0..models).map(cell).collect(),
        }
    }
}

impl Shaded {
    fn of(table: &DetailTable, label: &str, shade: bool) -> Self {
        let row = |(name, cells): &(String, Vec<Option<f64>>)| {
            let sum: f64 = cells.iter().flatten().sum();
            let cell = |c: &Option<f64>| {
                let text = c.map_or_else(|| "-".to_owned(), number);
                // Share of the row, so that rare classes are seen too.
                let share = c.filter(|_| shade && sum > 0.0).map_or(0.0, |c| c / sum);
                (text, format!("{share:.2}"))
            };
            (plain(name), cells.iter().map(cell).collect())
        };
        Self {
            title: format!("{label}: {}", plain(&table.name)),
            columns: table.columns.iter().map(|c| plain(c)).collect(),
            rows: table.rows.iter().map(row).collect(),
        }
    }
}

#[cfg(test)]
mod tests;
