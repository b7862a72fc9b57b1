//! A report as Markdown (tables of GitHub's flavour), for pull requests and model cards.

use super::text::{number, outcome_word};
use super::words::{Style, baselines, bytes, plain, resources, seconds, told};
use super::{Metric, Report, TaskReport, Unit};

/// The whole report, the verdict first.
pub fn render(report: &Report) -> String {
    let mut text = "# Validation\n\n".to_owned();
    if let Some(verdict) = &report.verdict {
        text += &format!("**{}**\n\n", outcome_word(verdict.outcome));
        for check in &verdict.checks {
            text += &format!("- **{}** {}\n", outcome_word(check.outcome), safe(&check.reason));
        }
        text.push('\n');
    }
    text += "| model | what | size | bits per weight | path |\n|---|---|---:|---:|---|\n";
    for model in &report.models {
        text += &format!(
            "| {} | {} | {} | {} | {} |\n",
            safe(&model.label),
            safe(&model.kind),
            model.bytes.map_or_else(String::new, bytes),
            model
                .bits_per_weight
                .map_or_else(String::new, |b| format!("{b:.2}")),
            safe(&model.path)
        );
    }
    for task in &report.tasks {
        text += &self::task(report, task);
    }
    text += &run(report);
    text
}

fn task(report: &Report, task: &TaskReport) -> String {
    let mut text = format!("\n## {}\n\n", safe(&task.task));
    for data in &task.data {
        text += &format!(
            "- data {}: {} items, BLAKE3 {}\n",
            safe(&data.path),
            data.items,
            safe(&data.digest)
        );
    }
    let settings: Vec<String> = task
        .settings
        .iter()
        .map(|(k, v)| format!("{} = {}", safe(k), safe(&v.to_string())))
        .collect();
    text += &format!(
        "- version {}{}{}\n",
        task.version,
        if settings.is_empty() { "" } else { "; " },
        settings.join(", ")
    );
    for warning in &task.warnings {
        text += &format!("- **warning** {}\n", safe(warning));
    }
    let labels: Vec<String> = report.models.iter().map(|m| safe(&m.label)).collect();
    let mut rest = task.metrics.as_slice();
    while let Some(first) = rest.first() {
        let same = rest
            .iter()
            .take_while(|m| m.name == first.name && m.unit == first.unit)
            .count();
        text += &format!("\n### {}{}\n\n", safe(&first.name), heading_unit(first));
        text += &format!(
            "| | items | without looking | detects | {} |\n",
            labels.join(" | ")
        );
        text += &format!("|---|---:|---|---:|{}\n", "---:|".repeat(labels.len()));
        rest[..same]
            .iter()
            .for_each(|metric| text += &row(metric, labels.len()));
        rest = &rest[same..];
    }
    text += "\n*value [95 % interval], below it the difference from the base with its own; ~ within noise; **bold** better \
             than every other; detects: the smallest true difference found in 8 of 10 runs*\n";
    for table in &task.tables {
        let label = labels.get(table.model).map_or("", String::as_str);
        let heads: Vec<String> = table.columns.iter().map(|c| safe(c)).collect();
        text += &format!(
            "\n<details><summary>{}, {label}</summary>\n\n| | {} |\n",
            safe(&table.name),
            heads.join(" | ")
        );
        text += &format!("|---|{}\n", "---:|".repeat(heads.len()));
        for (name, cells) in &table.rows {
            let cells: Vec<String> = cells
                .iter()
                .map(|c| c.map_or_else(|| "-".to_owned(), number))
                .collect();
            text += &format!("| {} | {} |\n", safe(name), cells.join(" | "));
        }
        text += "\n</details>\n";
    }
    for (what, counts) in task.counts.iter().filter(|(_, c)| c.iter().any(|n| *n > 0)) {
        let each: Vec<String> = labels
            .iter()
            .zip(counts)
            .map(|(l, n)| format!("{l} {n}"))
            .collect();
        text += &format!("\n{}: {}\n", safe(what), each.join(", "));
    }
    text
}

fn heading_unit(metric: &Metric) -> String {
    let unit = metric.unit_beside_name();
    if unit.is_empty() {
        String::new()
    } else {
        format!(", {unit}")
    }
}

fn row(metric: &Metric, models: usize) -> String {
    let style = Style::of(metric);
    let cell = |model: usize| {
        let Some(value) = metric.values.get(model).copied().flatten() else {
            return "-".to_owned();
        };
        let shown = style.value(value.value);
        let best = metric.best == Some(model);
        let mut text = format!(
            "{} {}",
            if best { format!("**{shown}**") } else { shown },
            style.interval(&value)
        );
        if let Some(told) = told(metric, model) {
            let noise = metric.deltas[model].is_some_and(|d| d.noise);
            text += &format!("<br>{}{told}", if noise { "\\~ " } else { "" });
        }
        text
    };
    let unit = if metric.unit == Unit::Share { " points" } else { "" };
    format!(
        "| {} | {} | {} | {} | {} |\n",
        safe(&metric.group),
        metric.items,
        safe(&baselines(metric)),
        metric
            .detectable
            .map_or_else(String::new, |d| style.detectable(d) + unit),
        (0..models).map(cell).collect::<Vec<_>>().join(" | ")
    )
}

fn run(report: &Report) -> String {
    let run = &report.run;
    let mut text = format!(
        "\n## Run\n\n- {}, started {}, took {}{}\n- {}, {} threads, seed {}\n",
        safe(&report.tool),
        safe(&run.started),
        seconds(run.seconds),
        if run.resumed {
            ", gone on after an interruption"
        } else {
            ""
        },
        safe(&run.device),
        run.threads,
        run.seed
    );
    if let Some(reason) = &run.device_reason {
        text += &format!("- {}\n", safe(reason));
    }
    if let Some(line) = resources(report) {
        text += &format!("- {line}\n");
    }
    for model in &report.models {
        let digest = |d: &Option<String>| d.as_deref().map_or_else(|| "unknown".to_owned(), safe);
        let (own, tokenizer) = (digest(&model.digest), digest(&model.tokenizer_digest));
        text += &format!("- {}: digest {own}, tokenizer {tokenizer}\n", safe(&model.label));
    }
    text
}

/// Text from outside as Markdown that shows it letter by letter, on one line, within a table's cell.
fn safe(text: &str) -> String {
    let mut escaped = String::new();
    for c in plain(text).chars() {
        match c {
            '<' => escaped += "&lt;",
            '>' => escaped += "&gt;",
            '&' => escaped += "&amp;",
            '\\' | '|' | '*' | '_' | '[' | ']' | '`' | '#' | '~' | '!' | '$' | '@' => {
                escaped.push('\\');
                escaped.push(c);
            }
            _ => escaped.push(c),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::super::example;
    use super::*;

    #[test]
    fn tables_have_one_shape_and_everything_is_there() {
        let text = render(&example::report());
        let mut tables = 0;
        let mut columns = None;
        for line in text.lines() {
            if line.starts_with('|') {
                let here = line.replace("\\|", "").matches('|').count();
                tables += usize::from(columns.is_none());
                assert_eq!(*columns.get_or_insert(here), here, "{line}");
            } else {
                columns = None;
            }
        }
        example::leave("example-report.md", &text);
        assert_eq!(tables, 1 + 3 + 4);
        assert!(
            text.contains("DuQM\\_discourse\\_particle(complex)") && text.contains("**FAILED**"),
            "{text}"
        );
    }

    #[test]
    fn names_are_shown_not_obeyed() {
        let mut report = example::report();
        report.models[1].label = "a|b\n# <img src=x> [x](javascript:1) `c`".into();
        let text = render(&report);
        assert!(
            !text.contains("<img") && !text.contains("\n# <") && !text.contains("[x](java"),
            "{text}"
        );
        assert!(
            text.contains("a\\|b\u{fffd}\\# &lt;img src=x&gt; \\[x\\](javascript:1) \\`c\\`"),
            "{text}"
        );
    }
}
