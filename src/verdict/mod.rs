//! Whether candidates may be deployed: every limit held against every candidate's interval.
//!
//! A limit holds when the whole two-sided 95 % interval keeps it, is broken when the whole interval breaks it, and is
//! inconclusive when it lies inside. "Passed" is thus a non-inferiority test at 2.5 % one-sided, the usual convention
//! (ICH E9), and the interval that decides is the one that is shown. A pass also needs that nothing is hidden: items
//! without an answer or positions that are not finite turn it into inconclusive where they could break the limit.

pub mod policy;

use policy::{Bound, Limit, wrong};

use crate::Result;
use crate::report::{Check, Interval, Metric, Outcome, TaskReport, Unit, Verdict};

/// Key of [`TaskReport::counts`] for positions whose numbers are NaN or infinite.
pub const NON_FINITE: &str = "non-finite positions";
/// More items than this are no advice.
const MOST_ITEMS: f64 = 1e9;

impl Outcome {
    /// The program's exit status.
    pub fn exit_status(self) -> i32 {
        match self {
            Self::Passed => 0,
            Self::Failed => 1,
            Self::Inconclusive => 3,
        }
    }
}

/// Holds `limits` against what was found; `labels` are the models', the base first. `None` without limits. A limit on
/// a task, metric or row that is not there is an error that names those that are.
pub fn judge(limits: &[Limit], labels: &[String], tasks: &[TaskReport]) -> Result<Option<Verdict>> {
    let mut checks = Vec::new();
    for limit in limits {
        let (task, metric) = find(limit, tasks)?;
        for (model, label) in labels.iter().enumerate().skip(1) {
            checks.push(check(limit, task, metric, model, label));
        }
    }
    let worst = checks.iter().map(|c| c.outcome).max();
    Ok(worst.map(|outcome| Verdict { outcome, checks }))
}

fn find<'a>(limit: &Limit, tasks: &'a [TaskReport]) -> Result<(&'a TaskReport, &'a Metric)> {
    let unknown = |what: &str, name: &str, there: Vec<&str>| {
        let mut distinct: Vec<&str> = Vec::new();
        there.into_iter().for_each(|t| {
            if !distinct.contains(&t) {
                distinct.push(t);
            }
        });
        wrong(
            &limit.origin,
            format!(
                "there is no {what} {name:?}, expected one of: {}",
                distinct.join(", ")
            ),
        )
    };
    let task = tasks.iter().find(|t| t.task == limit.task).ok_or_else(|| {
        unknown(
            "task",
            &limit.task,
            tasks.iter().map(|t| t.task.as_str()).collect(),
        )
    })?;
    let named = |m: &&Metric| limit.metric.as_ref().is_none_or(|n| *n == m.name);
    let of_name: Vec<&Metric> = match &limit.metric {
        Some(_) => task.metrics.iter().filter(named).collect(),
        // Without a name: the rows of the first metric.
        None => task
            .metrics
            .iter()
            .filter(|m| task.metrics.first().is_some_and(|f| f.name == m.name))
            .collect(),
    };
    if of_name.is_empty() {
        let name = limit.metric.as_deref().unwrap_or_default();
        return Err(unknown(
            "metric",
            name,
            task.metrics.iter().map(|m| m.name.as_str()).collect(),
        ));
    }
    let metric = of_name
        .iter()
        .find(|m| limit.group.as_ref().is_none_or(|g| *g == m.group))
        .ok_or_else(|| {
            unknown(
                "row",
                limit.group.as_deref().unwrap_or_default(),
                of_name.iter().map(|m| m.group.as_str()).collect(),
            )
        })?;
    if matches!(limit.bound, Bound::MaxDrop(_)) && metric.higher_is_better.is_none() {
        return Err(wrong(
            &limit.origin,
            format!(
                "{} is neither better high nor low, so it cannot drop",
                metric.name
            ),
        ));
    }
    if metric.unit == Unit::Share && !matches!(limit.bound, Bound::MaxDrop(_)) && limit.bound.number() > 1.0 {
        return Err(wrong(
            &limit.origin,
            format!("{} is a share of 0 to 1; 95 % is 0.95", metric.name),
        ));
    }
    Ok((task, metric))
}

/// How much worse the candidate is, in the unit of [`Bound::MaxDrop`].
fn drop(metric: &Metric, model: usize) -> Option<Interval> {
    let delta = metric.deltas.get(model).copied().flatten()?.interval;
    let scaled = |x: f64| match metric.unit {
        Unit::Share => x * 100.0,
        Unit::Perplexity => (x - 1.0) * 100.0,
        _ => x,
    };
    let (value, low, high) = (scaled(delta.value), scaled(delta.low), scaled(delta.high));
    Some(if metric.higher_is_better == Some(true) {
        Interval {
            value: -value,
            low: -high,
            high: -low,
        }
    } else {
        Interval { value, low, high }
    })
}

fn check(limit: &Limit, task: &TaskReport, metric: &Metric, model: usize, label: &str) -> Check {
    let measured = match limit.bound {
        Bound::MaxDrop(_) => drop(metric, model),
        Bound::Max(_) | Bound::Min(_) => metric.values.get(model).copied().flatten(),
    };
    let bound = limit.bound.number();
    let row = format!("{} in {} ({})", metric.name, task.task, metric.group);
    let found = |outcome, more_items, reason| Check {
        limit: limit.given.clone(),
        model,
        outcome,
        measured,
        bound,
        more_items,
        reason,
    };
    let Some(interval) = measured else {
        let reason =
            format!("{label}: {row} could not be measured, so nothing is known about the limit of {bound}");
        return found(Outcome::Inconclusive, None, reason);
    };
    let story = format!("{label}: {}", story(limit.bound, metric, &row, interval));
    if metric.items < 2 {
        let reason = format!("{story}; a single item decides nothing, give more of them");
        return found(Outcome::Inconclusive, None, reason);
    }
    match decide(limit.bound, interval) {
        Outcome::Passed => match hidden(limit.bound, task, metric, model, interval) {
            Some(why) => found(
                Outcome::Inconclusive,
                None,
                format!("{story}; the limit of {bound} would hold, but {why}"),
            ),
            None => found(
                Outcome::Passed,
                None,
                format!("{story}; the limit of {bound} holds"),
            ),
        },
        Outcome::Failed => found(
            Outcome::Failed,
            None,
            format!("{story}; the limit of {bound} is broken"),
        ),
        Outcome::Inconclusive => {
            let more = more_items(interval, bound, metric.items);
            let advice = match more {
                Some(more) => format!("about {} more items like these would decide", grouped(more)),
                None => "the estimate lies on it, and no number of items is sure to decide".to_owned(),
            };
            found(
                Outcome::Inconclusive,
                more,
                format!("{story}; the limit of {bound} lies within, {advice}"),
            )
        }
    }
}

fn decide(bound: Bound, measured: Interval) -> Outcome {
    // "At least" is "at most" of the negative.
    let (low, high, limit) = match bound {
        Bound::MaxDrop(n) | Bound::Max(n) => (measured.low, measured.high, n),
        Bound::Min(n) => (-measured.high, -measured.low, -n),
    };
    if high <= limit {
        Outcome::Passed
    } else if low > limit {
        Outcome::Failed
    } else {
        Outcome::Inconclusive
    }
}

/// Why a pass would hide something.
fn hidden(
    bound: Bound,
    task: &TaskReport,
    metric: &Metric,
    model: usize,
    measured: Interval,
) -> Option<String> {
    let non_finite = task
        .counts
        .get(NON_FINITE)
        .and_then(|c| c.get(model))
        .copied()
        .unwrap_or(0);
    if non_finite > 0 {
        return Some(format!(
            "{non_finite} positions are not finite and are left out of it"
        ));
    }
    let gone = metric.missing.get(model).copied().unwrap_or(0);
    let share = gone as f64 / metric.items as f64;
    let worst = match (bound, metric.unit, metric.higher_is_better) {
        _ if gone == 0 => return None,
        (Bound::MaxDrop(_), Unit::Share, Some(true)) => Interval {
            high: measured.high + share * 100.0,
            ..measured
        },
        (Bound::Min(_), Unit::Share, Some(true)) => Interval {
            low: measured.low * (1.0 - share),
            ..measured
        },
        _ => {
            return Some(format!(
                "{gone} of {} items have no answer, and any value is possible there",
                metric.items
            ));
        }
    };
    (decide(bound, worst) != Outcome::Passed).then(|| {
        format!(
            "not if the {gone} of {} items without an answer are wrong",
            metric.items
        )
    })
}

/// Items to add until the interval, narrowing by the root of their number, lets go of the bound; the estimate is taken
/// to stay where it is.
fn more_items(measured: Interval, bound: f64, items: usize) -> Option<u64> {
    let distance = (bound - measured.value).abs();
    let half = if bound >= measured.value {
        measured.high - measured.value
    } else {
        measured.value - measured.low
    };
    let needed = (items as f64 * ((half / distance).powi(2) - 1.0)).ceil();
    (needed.is_finite() && needed < MOST_ITEMS).then_some(needed.max(1.0) as u64)
}

fn story(bound: Bound, metric: &Metric, row: &str, measured: Interval) -> String {
    let between = |unit: &str| {
        let (low, high) = (number(measured.low), number(measured.high));
        format!(
            "{} {unit} ({low} to {high} with 95 % confidence)",
            number(measured.value)
        )
    };
    match (bound, metric.unit) {
        (Bound::MaxDrop(_), Unit::Share) => format!("{row} drops by {}", between("points")),
        (Bound::MaxDrop(_), Unit::Perplexity) => format!("{row} rises by {}", between("%")),
        (Bound::MaxDrop(_), unit) => format!("{row} gets worse by {}", between(unit_words(unit))),
        (_, unit) => format!("{row} is {}", between(unit_words(unit))).replace("  ", " "),
    }
}

fn unit_words(unit: Unit) -> &'static str {
    match unit {
        Unit::NatsPerToken => "nats per token",
        Unit::BitsPerByte => "bits per byte",
        Unit::Share | Unit::Perplexity | Unit::Number => "",
    }
}

/// Three digits that matter, without an exponent.
fn number(x: f64) -> String {
    let digits = if x == 0.0 {
        2
    } else {
        (2 - x.abs().log10().floor() as i32).clamp(0, 8)
    };
    format!("{x:.*}", digits as usize)
}

/// 12,345.
pub(crate) fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests;
