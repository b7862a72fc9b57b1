//! A report for a terminal: a table a metric, rows of groups, columns of models, each value over its difference from the
//! base. Fits the width it is given by splitting models into several tables, the base in each.

use console::Style as Paint;
use unicode_width::UnicodeWidthStr;

use super::words::{Style, baselines, bytes, chance, plain, resources, seconds};
use super::{DetailTable, Metric, Outcome, Report, TaskReport, Unit};
use crate::table::Table;

/// How it may look.
#[derive(Debug, Clone, Copy)]
pub struct Look {
    /// Columns of the terminal; names and at least one candidate are shown even where that is less than they need.
    pub width: usize,
    /// Whether colours are wanted. What they say is always said by a mark too.
    pub colour: bool,
}

impl Default for Look {
    fn default() -> Self {
        Self {
            width: 100,
            colour: false,
        }
    }
}

impl Look {
    fn paint(self, paint: &Paint, text: &str) -> String {
        if self.colour {
            paint.clone().force_styling(true).apply_to(text).to_string()
        } else {
            text.to_owned()
        }
    }

    fn bold(self, text: &str) -> String {
        self.paint(&Paint::new().bold(), text)
    }
}

/// Rows of a detail table that are still shown in a terminal, and its columns.
const MOST_DETAIL: (usize, usize) = (16, 6);

/// The whole report.
pub fn render(report: &Report, look: Look) -> String {
    let mut text = models(report);
    for task in &report.tasks {
        text += "\n";
        text += &self::task(report, task, look);
    }
    text += "\n";
    text += &run(report);
    text += &verdict(report, look);
    text
}

fn models(report: &Report) -> String {
    let mut table = Table::new(&["model", "path", "what", ">size", ">bits/w"]);
    for model in &report.models {
        table.row([
            plain(&model.label),
            plain(&model.path),
            plain(&model.kind),
            model.bytes.map_or_else(String::new, bytes),
            model
                .bits_per_weight
                .map_or_else(String::new, |b| format!("{b:.2}")),
        ]);
    }
    table.render()
}

fn task(report: &Report, task: &TaskReport, look: Look) -> String {
    let data: Vec<String> = task
        .data
        .iter()
        .map(|d| format!("{} ({} items)", plain(&d.path), d.items))
        .collect();
    let mut text = format!("{}  {}\n", look.bold(&plain(&task.task)), data.join(", "));
    let mut rest = task.metrics.as_slice();
    let mut marks = Marks::default();
    while let Some(first) = rest.first() {
        let same = rest
            .iter()
            .take_while(|m| m.name == first.name && m.unit == first.unit)
            .count();
        text += &metric(report, &rest[..same], look, &mut marks);
        rest = &rest[same..];
    }
    text += &marks.explained();
    text += &details(report, task);
    for (what, counts) in task.counts.iter().filter(|(_, c)| c.iter().any(|n| *n > 0)) {
        let of = |(m, n): (usize, &u64)| format!("{} {n}", label(report, m));
        text += &format!(
            "  {}: {}\n",
            plain(what),
            counts.iter().enumerate().map(of).collect::<Vec<_>>().join(", ")
        );
    }
    for warning in &task.warnings {
        text += &format!(
            "  {} {}\n",
            look.paint(&Paint::new().yellow().bold(), "warning:"),
            plain(warning)
        );
    }
    let speed: Vec<String> = task
        .speed
        .iter()
        .enumerate()
        .filter(|(_, s)| s.seconds > 0.0 && s.items > 0)
        .map(|(m, s)| {
            format!(
                "{} {:.1} ms an item, {:.0} tokens/s",
                label(report, m),
                s.seconds * 1e3 / s.items as f64,
                s.tokens as f64 / s.seconds
            )
        })
        .collect();
    if !speed.is_empty() {
        text += &format!("  speed: {}\n", speed.join("; "));
    }
    text
}

fn label(report: &Report, model: usize) -> String {
    report
        .models
        .get(model)
        .map_or_else(|| format!("model {model}"), |m| plain(&m.label))
}

/// Marks that were used and want a word below the table.
#[derive(Default)]
struct Marks {
    noise: bool,
    best: bool,
}

impl Marks {
    fn explained(&self) -> String {
        let mut said = vec![
            "below each value: 95 % interval of the base; difference of the others with its own".to_owned(),
        ];
        if self.noise {
            said.push("~ within noise".to_owned());
        }
        if self.best {
            said.push("* better than every other".to_owned());
        }
        format!("  {}\n", said.join("; "))
    }
}

/// One metric: a heading, what chance gives and what the items can show, then the table.
fn metric(report: &Report, rows: &[Metric], look: Look, marks: &mut Marks) -> String {
    let Some(first) = rows.first() else {
        return String::new();
    };
    let unit = first.unit_beside_name();
    let better = match first.higher_is_better {
        Some(true) => ", higher is better",
        Some(false) => ", lower is better",
        None => "",
    };
    let joint = if unit.is_empty() { "" } else { ", " };
    let mut text = format!("  {}{joint}{unit}{better}\n", look.bold(&plain(&first.name)));
    let style = Style::of(first);
    let mut about = Vec::new();
    if !first.baselines.is_empty() {
        about.push(format!("without looking: {}", baselines(first)));
    }
    if let Some(found) = first.detectable {
        let unit = if first.unit == Unit::Share { " points" } else { "" };
        about.push(format!(
            "detects {}{unit} in 8 of 10 runs",
            style.detectable(found)
        ));
    }
    if !about.is_empty() {
        text += &format!("  {}: {}\n", plain(&first.group), about.join("; "));
    }
    let names: Vec<[String; 2]> = rows.iter().map(|m| name(m, rows.len() > 1)).collect();
    let columns: Vec<Column> = (0..report.models.len())
        .map(|m| Column::of(report, rows, m, marks))
        .collect();
    let head = names.iter().flatten().map(|n| n.width()).max().unwrap_or(0) + 2;
    let mut next = 1;
    while next < columns.len().max(2) {
        let mut shown: Vec<&Column> = columns.first().into_iter().collect();
        let mut used = head + shown.iter().map(|c| c.width + 2).sum::<usize>();
        while let Some(column) = columns.get(next) {
            if shown.len() > 1 && used + column.width + 2 > look.width {
                break;
            }
            used += column.width + 2;
            shown.push(column);
            next += 1;
        }
        next = next.max(2);
        text += &lines(&names, head, &shown, look);
    }
    text
}

/// Name of a row, and below it how many items it has, what chance gives there and what they would find.
fn name(metric: &Metric, several: bool) -> [String; 2] {
    let mut below = format!("  n {}", metric.items);
    if several {
        let style = Style::of(metric);
        if let Some(chance) = chance(metric) {
            below += &format!(
                ", chance {:.0}",
                chance * if metric.unit == Unit::Share { 100.0 } else { 1.0 }
            );
        }
        if let Some(found) = metric.detectable {
            below += &format!(", finds {}", style.detectable(found));
        }
    }
    [plain(&metric.group), below]
}

/// Cells of one model: value and what stands below it, each row.
struct Column {
    heading: String,
    cells: Vec<[Cell; 2]>,
    width: usize,
}

struct Cell {
    text: String,
    paint: Paint,
}

impl Column {
    fn of(report: &Report, rows: &[Metric], model: usize, marks: &mut Marks) -> Self {
        let cells: Vec<[Cell; 2]> = rows.iter().map(|m| cells(m, model, marks)).collect();
        let heading = label(report, model);
        let width = cells
            .iter()
            .flatten()
            .map(|c| c.text.width())
            .chain([heading.width()])
            .max()
            .unwrap_or(0);
        Self {
            heading,
            cells,
            width,
        }
    }
}

fn cells(metric: &Metric, model: usize, marks: &mut Marks) -> [Cell; 2] {
    let style = Style::of(metric);
    let faint = || Paint::new().dim();
    let value = metric.values.get(model).copied().flatten();
    let best = metric.best == Some(model);
    marks.best |= best;
    let above = Cell {
        text: value.map_or_else(|| "-".to_owned(), |v| style.value(v.value)) + if best { "*" } else { "" },
        paint: if best {
            Paint::new().green().bold()
        } else {
            Paint::new()
        },
    };
    let below = match (metric.deltas.get(model).copied().flatten(), value) {
        (Some(delta), _) => {
            marks.noise |= delta.noise;
            let worse = metric.higher_is_better.is_some_and(|h| {
                let zero = if metric.unit == Unit::Perplexity { 1.0 } else { 0.0 };
                (delta.interval.value < zero) == h
            });
            let paint = match (delta.noise, worse) {
                (true, _) => faint(),
                (false, true) => Paint::new().red(),
                (false, false) => Paint::new().green(),
            };
            Cell {
                text: if delta.noise { "~" } else { "" }.to_owned() + &style.delta(&delta).replace(", ", ","),
                paint,
            }
        }
        (None, Some(value)) => Cell {
            text: style.interval(&value).replace(", ", ","),
            paint: faint(),
        },
        (None, None) => Cell {
            text: String::new(),
            paint: faint(),
        },
    };
    [above, below]
}

fn lines(names: &[[String; 2]], head: usize, columns: &[&Column], look: Look) -> String {
    let mut text = " ".repeat(head);
    for column in columns {
        text += &format!(
            "  {}{}",
            " ".repeat(column.width - column.heading.width()),
            look.bold(&column.heading)
        );
    }
    text.push('\n');
    for (row, names) in names.iter().enumerate() {
        for (half, name) in names.iter().enumerate() {
            let mut line = format!("  {name}{}", " ".repeat(head - 2 - name.width()));
            for column in columns {
                let cell = &column.cells[row][half];
                line += &" ".repeat(2 + column.width - cell.text.width());
                line += &look.paint(&cell.paint, &cell.text);
            }
            text += line.trim_end();
            text.push('\n');
        }
    }
    text
}

/// Small tables beside the metrics; of larger ones a word where they are.
fn details(report: &Report, task: &TaskReport) -> String {
    let small = |t: &&DetailTable| t.rows.len() <= MOST_DETAIL.0 && t.columns.len() <= MOST_DETAIL.1;
    let mut text = String::new();
    for table in task.tables.iter().filter(small) {
        let mut headings = vec![format!("{}, {}", plain(&table.name), label(report, table.model))];
        headings.extend(table.columns.iter().map(|c| format!(">{}", plain(c))));
        let mut shown = Table::new(&headings.iter().map(String::as_str).collect::<Vec<_>>());
        for (name, cells) in &table.rows {
            let number = |c: &Option<f64>| c.map_or_else(|| "-".to_owned(), number);
            shown.row([plain(name)].into_iter().chain(cells.iter().map(number)));
        }
        text += &shown.render();
    }
    let large = task.tables.iter().filter(|t| !small(t)).count();
    if large > 0 {
        text += &format!("  {large} larger tables are in the report (--report FILE.html)\n");
    }
    text
}

/// A number of a detail table: counts whole, shares and the like with four digits that matter.
pub(super) fn number(x: f64) -> String {
    if x.fract() == 0.0 && x.abs() < 1e15 {
        format!("{x:.0}")
    } else if x.abs() < 1e-3 {
        format!("{x:.2e}")
    } else {
        format!("{x:.4}")
    }
}

fn run(report: &Report) -> String {
    let run = &report.run;
    let again = if run.resumed {
        ", gone on after an interruption"
    } else {
        ""
    };
    let threads = if run.threads == 1 {
        "1 thread".to_owned()
    } else {
        format!("{} threads", run.threads)
    };
    let mut text = format!(
        "{} on {}, {threads}, seed {}{again}\n",
        seconds(run.seconds),
        plain(&run.device),
        run.seed
    );
    if let Some(reason) = &run.device_reason {
        text += &format!("{}\n", plain(reason));
    }
    if let Some(line) = resources(report) {
        text += &line;
        text.push('\n');
    }
    text
}

/// Word of an outcome, as a heading.
pub(super) fn outcome_word(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Passed => "PASSED",
        Outcome::Failed => "FAILED",
        Outcome::Inconclusive => "INCONCLUSIVE",
    }
}

fn verdict(report: &Report, look: Look) -> String {
    let Some(verdict) = &report.verdict else {
        return String::new();
    };
    let word = |outcome: Outcome| {
        let paint = match outcome {
            Outcome::Passed => Paint::new().green().bold(),
            Outcome::Failed => Paint::new().red().bold(),
            Outcome::Inconclusive => Paint::new().yellow().bold(),
        };
        look.paint(&paint, outcome_word(outcome))
    };
    let mut text = "\n".to_owned();
    for check in &verdict.checks {
        text += &format!("{}  {}\n", word(check.outcome), plain(&check.reason));
    }
    text + &format!("verdict: {}\n", word(verdict.outcome))
}

#[cfg(test)]
mod tests;
