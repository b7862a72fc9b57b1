//! The plots of the page as places and texts: each function turns a part of a report into what the template draws. All
//! are 360 units wide, so that two stand side by side on a desk and one fills a phone at a readable size.

use serde::Serialize;

use super::axis::{Axis, Tick, short};
use crate::report::words::{Style, plain, seconds, told};
use crate::report::{Histogram, Metric, ModelEntry, ResourceSample, Unit};

/// Width of every plot.
const WIDTH: f64 = 360.0;
/// Left end of plots with numbers on the left, and of those with names there.
const LEFT: f64 = 38.0;
const LEFT_OF_NAMES: f64 = 128.0;
/// Right end.
const RIGHT: f64 = 350.0;
/// Height of a row of a forest plot.
const ROW: f64 = 20.0;
/// Letters of a name that fit left of a forest plot.
const NAME: usize = 17;
/// Colours there are for kinds of tensors; further kinds share the last.
const COLOURS: usize = 7;

/// A plot: the frame, and one of the contents.
#[derive(Debug, Clone, PartialEq, Serialize, Default)]
pub struct Plot {
    /// Heading.
    pub title: String,
    /// What is on the horizontal axis.
    pub below: String,
    /// Size.
    pub width: f64,
    /// Size.
    pub height: f64,
    /// Ends of the inner part.
    pub left: f64,
    /// See above.
    pub right: f64,
    /// See above.
    pub top: f64,
    /// See above.
    pub bottom: f64,
    /// Vertical grid lines.
    pub across: Vec<Tick>,
    /// Horizontal grid lines.
    pub up: Vec<Tick>,
    /// A vertical line that means "no difference".
    pub zero: Option<f64>,
    /// Differences with intervals.
    pub rows: Vec<Row>,
    /// Bars.
    pub bars: Vec<Bar>,
    /// Dots.
    pub dots: Vec<Dot>,
    /// Lines, as the points of a polyline.
    pub lines: Vec<String>,
    /// Names of colours.
    pub legend: Vec<String>,
}

/// One difference with its interval.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// Height of its line.
    pub y: f64,
    /// Its name, cut to fit.
    pub name: String,
    /// Ends and middle of the interval.
    pub low: f64,
    /// See above.
    pub high: f64,
    /// See above.
    pub at: f64,
    /// `noise`, `worse`, `better` or `changed`.
    pub class: &'static str,
    /// Everything in words.
    pub tip: String,
}

/// A bar.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Bar {
    /// Left, top, width, height.
    pub x: f64,
    /// See above.
    pub y: f64,
    /// See above.
    pub width: f64,
    /// See above.
    pub height: f64,
    /// In words.
    pub tip: String,
}

/// A dot.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Dot {
    /// Place.
    pub x: f64,
    /// Place.
    pub y: f64,
    /// Number of its colour.
    pub colour: usize,
    /// In words.
    pub tip: String,
}

fn frame(title: String, below: &str, left: f64, inner: f64) -> Plot {
    let top = 6.0;
    Plot {
        title,
        below: below.to_owned(),
        width: WIDTH,
        height: top + inner + 32.0,
        left,
        right: RIGHT,
        top,
        bottom: top + inner,
        ..Plot::default()
    }
}

/// Whether a difference is good, bad, or nothing.
pub fn class(metric: &Metric, model: usize) -> &'static str {
    let Some(delta) = metric.deltas.get(model).copied().flatten() else {
        return "";
    };
    let zero = if metric.unit == Unit::Perplexity { 1.0 } else { 0.0 };
    match (delta.noise, metric.higher_is_better) {
        (true, _) => "noise",
        (false, None) => "changed",
        (false, Some(higher)) if (delta.interval.value > zero) == higher => "better",
        (false, Some(_)) => "worse",
    }
}

/// Differences of each candidate from the base, one plot a candidate on one scale, the rows of one metric. None when
/// there is no difference to show.
pub fn forests(rows: &[Metric], labels: &[String]) -> Vec<Plot> {
    let Some(first) = rows.first() else {
        return Vec::new();
    };
    let scale = if first.unit == Unit::Share { 100.0 } else { 1.0 };
    let zero = if first.unit == Unit::Perplexity { 1.0 } else { 0.0 };
    let ends = rows
        .iter()
        .flat_map(|m| m.deltas.iter().flatten())
        .flat_map(|d| [d.interval.low, d.interval.high]);
    let axis = Axis::around(
        ends.map(|x| x * scale).chain([zero * scale]),
        LEFT_OF_NAMES,
        RIGHT,
    );
    let candidate = |(model, label): (usize, &String)| {
        let here: Vec<&Metric> = rows
            .iter()
            .filter(|m| matches!(m.deltas.get(model), Some(Some(_))))
            .collect();
        let title = format!("{} of {label}, difference from the base", plain(&first.name));
        let mut plot = frame(
            title,
            first.unit.delta_words(),
            LEFT_OF_NAMES,
            ROW * here.len() as f64,
        );
        plot.zero = Some(axis.at(zero * scale));
        plot.across = axis.ticks(4, short);
        for (i, metric) in here.iter().enumerate() {
            let Some(delta) = metric.deltas[model] else {
                continue;
            };
            plot.rows.push(Row {
                y: plot.top + ROW * (i as f64 + 0.5),
                name: cut(&plain(&metric.group), NAME),
                low: axis.at(delta.interval.low * scale),
                high: axis.at(delta.interval.high * scale),
                at: axis.at(delta.interval.value * scale),
                class: class(metric, model),
                tip: format!(
                    "{}: {}",
                    plain(&metric.group),
                    told(metric, model).unwrap_or_default()
                ),
            });
        }
        plot
    };
    labels
        .iter()
        .enumerate()
        .skip(1)
        .map(candidate)
        .filter(|p| !p.rows.is_empty())
        .collect()
}

/// A name cut in its middle, where kinds differ least.
fn cut(name: &str, most: usize) -> String {
    let letters: Vec<char> = name.chars().collect();
    if letters.len() <= most {
        return name.to_owned();
    }
    let tail = (most - 1) / 2;
    let head = most - 1 - tail;
    letters[..head]
        .iter()
        .chain(['…'].iter())
        .chain(&letters[letters.len() - tail..])
        .collect()
}

/// One distribution.
pub fn histogram(of: &Histogram, label: &str) -> Plot {
    let mut plot = frame(format!("{label}: {}", plain(&of.name)), "", LEFT, 110.0);
    let (low, high) = (
        of.edges.first().copied().unwrap_or(0.0),
        of.edges.last().copied().unwrap_or(1.0),
    );
    let across = Axis::exact(low, high, plot.left, plot.right);
    let most = of.counts.iter().copied().max().unwrap_or(1).max(1) as f64;
    let up = Axis::exact(0.0, most * 1.05, plot.bottom, plot.top);
    plot.across = across.ticks(6, short);
    plot.up = up.ticks(3, thousands);
    for (edges, count) in of.edges.windows(2).zip(&of.counts) {
        let (left, right, top) = (across.at(edges[0]), across.at(edges[1]), up.at(*count as f64));
        plot.bars.push(Bar {
            x: left,
            y: top,
            width: ((right - left - 0.6).max(0.4) * 10.0).round() / 10.0,
            height: ((plot.bottom - top) * 10.0).round() / 10.0,
            tip: format!("{} to {}: {count}", short(edges[0]), short(edges[1])),
        });
    }
    plot
}

fn thousands(n: f64) -> String {
    if n >= 1000.0 {
        short((n / 100.0).round() / 10.0) + "k"
    } else {
        short(n)
    }
}

/// Signal to noise of a model's tensors by layer, coloured by kind of tensor. `None` without figures.
pub fn sqnr(model: &ModelEntry) -> Option<Plot> {
    let placed: Vec<(u32, String, f64, &str)> = model
        .tensors
        .iter()
        .filter_map(|t| {
            let (layer, kind) = layer_and_kind(&t.name)?;
            Some((layer, kind, t.sqnr_db.filter(|s| s.is_finite())?, t.name.as_str()))
        })
        .collect();
    if placed.is_empty() {
        return None;
    }
    let title = format!(
        "{}: signal to noise of its tensors, dB (higher is better)",
        plain(&model.label)
    );
    let mut plot = frame(title, "layer", LEFT, 150.0);
    let across = Axis::around(placed.iter().map(|p| f64::from(p.0)), plot.left, plot.right);
    let up = Axis::around(placed.iter().map(|p| p.2), plot.bottom, plot.top);
    plot.across = across.ticks(6, short);
    plot.across.retain(|t| !t.text.contains(['.', '-']));
    plot.up = up.ticks(4, short);
    for (layer, kind, decibels, name) in placed {
        let known = plot.legend.iter().position(|k| *k == kind);
        let index = known.unwrap_or_else(|| {
            plot.legend.push(kind);
            plot.legend.len() - 1
        });
        plot.dots.push(Dot {
            x: across.at(f64::from(layer)),
            y: up.at(decibels),
            colour: index.min(COLOURS - 1),
            tip: format!("{}: {decibels:.1} dB", plain(name)),
        });
    }
    if plot.legend.len() > COLOURS {
        plot.legend.truncate(COLOURS - 1);
        plot.legend.push("others".to_owned());
    }
    Some(plot)
}

/// `model.layers.3.mlp.up_proj.weight` is (3, `mlp.up_proj`); a name without a layer has no place.
fn layer_and_kind(name: &str) -> Option<(u32, String)> {
    let parts: Vec<&str> = name.split('.').collect();
    let at = parts
        .iter()
        .position(|p| !p.is_empty() && p.bytes().all(|b| b.is_ascii_digit()))?;
    let rest = parts[at + 1..]
        .iter()
        .filter(|p| **p != "weight" && !p.bytes().all(|b| b.is_ascii_digit()));
    Some((
        parts[at].parse().ok()?,
        plain(&rest.copied().collect::<Vec<_>>().join(".")),
    ))
}

/// What the machine did: load, memory, and the accelerator's load where there is one. Empty for less than two samples.
pub fn resources(samples: &[ResourceSample]) -> Vec<Plot> {
    if samples.len() < 2 {
        return Vec::new();
    }
    let end = samples.last().map_or(1.0, |s| s.at);
    let trace = |title: &str, values: Vec<Option<f64>>| {
        let mut plot = frame(title.to_owned(), "time since the start", LEFT, 90.0);
        let across = Axis::exact(0.0, end, plot.left, plot.right);
        let most = values.iter().flatten().copied().fold(0.0, f64::max);
        let up = Axis::exact(0.0, (most * 1.08).max(1e-3), plot.bottom, plot.top);
        plot.across = across.ticks(4, seconds);
        plot.up = up.ticks(3, short);
        let points = samples
            .iter()
            .zip(&values)
            .filter_map(|(s, v)| Some((s.at, (*v)?)));
        let points: Vec<String> = points
            .map(|(at, v)| format!("{},{}", across.at(at), up.at(v)))
            .collect();
        plot.lines.push(points.join(" "));
        plot
    };
    let mut plots = vec![
        trace(
            "processor, % (100 is one core)",
            samples.iter().map(|s| Some(s.cpu_percent)).collect(),
        ),
        trace(
            "memory, GB",
            samples
                .iter()
                .map(|s| Some(s.memory_bytes as f64 / 1e9))
                .collect(),
        ),
    ];
    if samples.iter().any(|s| s.gpu_percent.is_some()) {
        plots.push(trace(
            "accelerator, %",
            samples.iter().map(|s| s.gpu_percent).collect(),
        ));
    }
    if samples.iter().any(|s| s.gpu_memory_bytes.is_some()) {
        let gigabytes = |s: &ResourceSample| s.gpu_memory_bytes.map(|b| b as f64 / 1e9);
        plots.push(trace(
            "accelerator's memory, GB",
            samples.iter().map(gigabytes).collect(),
        ));
    }
    plots
}

/// The headline of a metric for one model: `47.8 %` and what is said of its difference.
pub fn value_and_told(metric: &Metric, model: usize) -> Option<(String, Option<String>)> {
    let value = metric.values.get(model).copied().flatten()?;
    let unit = metric.unit.words();
    let style = Style::of(metric);
    let space = if unit.is_empty() { "" } else { " " };
    Some((
        format!("{}{space}{unit}", style.value(value.value)),
        told(metric, model),
    ))
}

#[cfg(test)]
mod tests {
    use super::super::super::example;
    use super::*;

    #[test]
    fn forests_share_a_scale_and_stay_inside() {
        let report = example::report();
        let labels: Vec<String> = report.models.iter().map(|m| m.label.clone()).collect();
        let plots = forests(&report.tasks[0].metrics, &labels);
        assert_eq!(plots.len(), 3);
        for plot in &plots {
            assert_eq!(plot.rows.len(), 15);
            assert_eq!(plot.zero, plots[0].zero);
            for row in &plot.rows {
                assert!(
                    LEFT_OF_NAMES <= row.low && row.low <= row.at && row.at <= row.high && row.high <= RIGHT,
                    "{row:?}"
                );
                assert!(plot.top < row.y && row.y < plot.bottom);
            }
        }
        assert!(
            plots[2].rows.iter().any(|r| r.class == "worse")
                && plots[0].rows.iter().all(|r| r.class == "noise")
        );
        assert!(
            forests(&report.tasks[1].metrics, &labels).is_empty(),
            "KL has no differences"
        );
    }

    #[test]
    fn bars_keep_their_counts() {
        let of = Histogram {
            name: "x".into(),
            model: 1,
            edges: vec![0.0, 1.0, 2.0],
            counts: vec![10, 5],
        };
        let plot = histogram(&of, "INT4");
        assert_eq!(plot.bars.len(), 2);
        assert!((plot.bars[0].height / plot.bars[1].height - 2.0).abs() < 0.01);
        assert_eq!(plot.bars[1].tip, "1 to 2: 5");
    }

    #[test]
    fn layers_from_names() {
        let kind = |name: &str| layer_and_kind(name);
        assert_eq!(
            kind("model.layers.3.mlp.up_proj.weight"),
            Some((3, "mlp.up_proj".into()))
        );
        assert_eq!(
            kind("model.layers.3.mlp.experts.7.up_proj.weight"),
            Some((3, "mlp.experts.up_proj".into()))
        );
        assert_eq!(kind("lm_head.weight"), None);
        assert_eq!(kind("layers.99999999999.x"), None);
        let plot = sqnr(&example::report().models[2]).unwrap();
        assert_eq!((plot.dots.len(), plot.legend.len()), (90, 5));
        assert!(
            plot.dots
                .iter()
                .all(|d| (LEFT..=RIGHT).contains(&d.x) && d.y >= plot.top && d.y <= plot.bottom)
        );
        assert_eq!(sqnr(&example::report().models[0]), None);
    }

    #[test]
    fn long_names_keep_both_ends() {
        assert_eq!(
            cut("DuQM_discourse_particle(complex)", 20),
            "DuQM_disco…(complex)"
        );
        assert_eq!(cut("否定", 20), "否定");
    }

    #[test]
    fn traces() {
        assert_eq!(resources(&example::report().run.resources).len(), 2);
        assert!(resources(&[]).is_empty());
    }
}
