//! What was demanded of the candidates: limits from flags or from a policy file, before anything is measured.
//!
//! ```toml
//! max-kl = 0.05            # as --max-kl: nats per token, mean over tokens
//! min-agreement = 0.95     # as --min-agreement: a share
//!
//! [max-drop]               # as --max-drop, points of each task's first metric
//! question-matching = 1.0
//!
//! [[limit]]                # any other row: exactly one of max-drop, max, min
//! task = "classification"
//! metric = "macro F1"      # without it the first metric
//! group = "macro average"  # without it the first row
//! max-drop = 2.0
//! ```

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use toml::Spanned;

use crate::{Error, Result};

/// Metric of `--max-kl`.
pub const KL: &str = "KL to base";
/// Metric of `--min-agreement`.
pub const AGREEMENT: &str = "top-1 agreement";
/// Task that measures both.
pub const DIVERGENCE: &str = "divergence";
/// Bytes of the longest policy file read: a policy is written by hand.
const LONGEST: u64 = 1 << 20;

/// What must hold.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Bound {
    /// The candidate is worse than the base by at most this: percentage points of a share, percent of a perplexity,
    /// else the metric's own unit.
    MaxDrop(f64),
    /// The candidate's value is at most this, in the metric's unit; shares as 0 to 1.
    Max(f64),
    /// The candidate's value is at least this.
    Min(f64),
}

impl Bound {
    /// Its number.
    pub fn number(self) -> f64 {
        match self {
            Self::MaxDrop(n) | Self::Max(n) | Self::Min(n) => n,
        }
    }
}

/// One limit; it is held against every candidate.
#[derive(Debug, Clone, PartialEq)]
pub struct Limit {
    /// As it was given, short: `max-drop question-matching=1`.
    pub given: String,
    /// Where it was given, for errors: `--max-drop` or `policy.toml:7`.
    pub origin: String,
    /// The task.
    pub task: String,
    /// Name of the metric; its task's first without one.
    pub metric: Option<String>,
    /// Name of the row; the first of that metric without one.
    pub group: Option<String>,
    /// What must hold.
    pub bound: Bound,
}

impl Limit {
    /// `--max-drop TASK=POINTS`.
    pub fn max_drop(text: &str) -> Result<Self> {
        let (task, points) = text
            .rsplit_once('=')
            .filter(|(task, _)| !task.trim().is_empty())
            .ok_or_else(|| {
                wrong(
                    "--max-drop",
                    format!("{text:?} is not TASK=POINTS, such as question-matching=1"),
                )
            })?;
        let points = points.trim().parse().map_err(|_| {
            wrong(
                "--max-drop",
                format!("{points:?} in {text:?} is no number of points, such as question-matching=0.5"),
            )
        })?;
        Self {
            task: task.trim().to_owned(),
            ..Self::plain("--max-drop", Bound::MaxDrop(points))
        }
        .checked()
    }

    /// `--max-kl NATS`.
    pub fn max_kl(nats: f64) -> Result<Self> {
        Self {
            metric: Some(KL.to_owned()),
            ..Self::plain("--max-kl", Bound::Max(nats))
        }
        .checked()
    }

    /// `--min-agreement SHARE`.
    pub fn min_agreement(share: f64) -> Result<Self> {
        let limit = Self {
            metric: Some(AGREEMENT.to_owned()),
            ..Self::plain("--min-agreement", Bound::Min(share))
        };
        if share > 1.0 {
            return Err(wrong(
                &limit.origin,
                format!("{share} is no share of 0 to 1; 95 % is 0.95"),
            ));
        }
        limit.checked()
    }

    fn plain(flag: &str, bound: Bound) -> Self {
        Self {
            given: String::new(),
            origin: flag.to_owned(),
            task: DIVERGENCE.to_owned(),
            metric: None,
            group: None,
            bound,
        }
    }

    fn checked(mut self) -> Result<Self> {
        let number = self.bound.number();
        if !number.is_finite() || number < 0.0 {
            return Err(wrong(
                &self.origin,
                format!("the limit is {number}, expected a number of at least 0"),
            ));
        }
        self.given = match (self.bound, self.metric.as_deref()) {
            (Bound::Max(n), Some(KL)) => format!("max-kl {n}"),
            (Bound::Min(n), Some(AGREEMENT)) => format!("min-agreement {n}"),
            (bound, metric) => {
                let word = match bound {
                    Bound::MaxDrop(_) => "max-drop",
                    Bound::Max(_) => "max",
                    Bound::Min(_) => "min",
                };
                let place = [Some(self.task.as_str()), metric, self.group.as_deref()];
                format!(
                    "{word} {}={number}",
                    place.into_iter().flatten().collect::<Vec<_>>().join("/")
                )
            }
        };
        Ok(self)
    }
}

/// An error about a limit.
pub(super) fn wrong(origin: &str, reason: String) -> Error {
    Error::Limit {
        origin: origin.to_owned(),
        reason,
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct File {
    max_kl: Option<Spanned<f64>>,
    min_agreement: Option<Spanned<f64>>,
    #[serde(default)]
    max_drop: BTreeMap<String, Spanned<f64>>,
    #[serde(default)]
    limit: Vec<Spanned<Entry>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Entry {
    task: String,
    metric: Option<String>,
    group: Option<String>,
    max_drop: Option<f64>,
    max: Option<f64>,
    min: Option<f64>,
}

/// Limits of a policy file, in its order by kind. A file without any is an error: it would pass everything.
pub fn read(path: &Path) -> Result<Vec<Limit>> {
    let unreadable = |reason: String| wrong(&path.display().to_string(), reason);
    let about = std::fs::metadata(path).map_err(|e| unreadable(format!("cannot read the policy: {e}")))?;
    if !about.is_file() || about.len() > LONGEST {
        return Err(unreadable(format!(
            "is no policy file of at most {LONGEST} bytes"
        )));
    }
    let bytes = std::fs::read(path).map_err(|e| unreadable(format!("cannot read the policy: {e}")))?;
    let text = String::from_utf8(bytes).map_err(|_| unreadable("is no UTF-8 text".to_owned()))?;
    parse(&text, &path.display().to_string())
}

/// The same of a text; `name` stands in errors, with the line.
pub fn parse(text: &str, name: &str) -> Result<Vec<Limit>> {
    let line = |byte: usize| 1 + text.bytes().take(byte).filter(|b| *b == b'\n').count();
    let at = |byte: usize| format!("{name}:{}", line(byte));
    let file: File = toml::from_str(text).map_err(|e| {
        let place = e.span().map_or_else(|| name.to_owned(), |span| at(span.start));
        wrong(
            &place,
            format!(
                "{}; see docs/validating.md for the form of a policy",
                e.message().replace('\n', " ")
            ),
        )
    })?;
    let mut limits = Vec::new();
    let mut add = |byte: usize, limit: Result<Limit>| {
        let origin = at(byte);
        let moved = |error| match error {
            Error::Limit { reason, .. } => wrong(&origin, reason),
            other => other,
        };
        limits.push(Limit {
            origin: origin.clone(),
            ..limit.map_err(moved)?
        });
        Ok::<(), Error>(())
    };
    for (task, points) in &file.max_drop {
        let bound = Bound::MaxDrop(*points.get_ref());
        add(
            points.span().start,
            Limit {
                task: task.clone(),
                ..Limit::plain("", bound)
            }
            .checked(),
        )?;
    }
    if let Some(nats) = &file.max_kl {
        add(nats.span().start, Limit::max_kl(*nats.get_ref()))?;
    }
    if let Some(share) = &file.min_agreement {
        add(share.span().start, Limit::min_agreement(*share.get_ref()))?;
    }
    for entry in file.limit {
        add(entry.span().start, entry.into_inner().limit())?;
    }
    if limits.is_empty() {
        return Err(wrong(
            name,
            "sets no limit, so it would pass anything; see docs/validating.md".to_owned(),
        ));
    }
    Ok(limits)
}

impl Entry {
    fn limit(self) -> Result<Limit> {
        let bounds = [
            self.max_drop.map(Bound::MaxDrop),
            self.max.map(Bound::Max),
            self.min.map(Bound::Min),
        ];
        let given: Vec<Bound> = bounds.into_iter().flatten().collect();
        let [bound] = given.as_slice() else {
            return Err(wrong(
                "",
                format!(
                    "a limit has one of max-drop, max and min, this one has {}",
                    given.len()
                ),
            ));
        };
        Limit {
            task: self.task,
            metric: self.metric,
            group: self.group,
            ..Limit::plain("", *bound)
        }
        .checked()
    }
}

/// Refuses limits on tasks that are not among `running`, before hours are spent; names the tasks there are.
pub fn check_tasks(limits: &[Limit], running: &[&str]) -> Result<()> {
    match limits.iter().find(|l| !running.contains(&l.task.as_str())) {
        Some(limit) => Err(wrong(
            &limit.origin,
            format!(
                "limits the task {}, but what runs is {}; add that task, or take the limit out",
                limit.task,
                running.join(", ")
            ),
        )),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POLICY: &str = "\
# What INT4 must keep.
max-kl = 0.05
min-agreement = 0.95

[max-drop]
question-matching = 1

[[limit]]
task = \"classification\"
metric = \"macro F1\"
group = \"macro average\"
max-drop = 2.0

[[limit]]
task = \"perplexity\"
max = 20
";

    #[test]
    fn every_form_of_a_limit() {
        let limits = parse(POLICY, "policy.toml").unwrap();
        let told: Vec<(&str, &str)> = limits
            .iter()
            .map(|l| (l.given.as_str(), l.origin.as_str()))
            .collect();
        assert_eq!(
            told,
            [
                ("max-drop question-matching=1", "policy.toml:6"),
                ("max-kl 0.05", "policy.toml:2"),
                ("min-agreement 0.95", "policy.toml:3"),
                (
                    "max-drop classification/macro F1/macro average=2",
                    "policy.toml:8"
                ),
                ("max perplexity=20", "policy.toml:14"),
            ]
        );
        assert_eq!(
            limits[1],
            Limit {
                origin: "policy.toml:2".into(),
                ..Limit::max_kl(0.05).unwrap()
            }
        );
        assert_eq!(
            Limit::max_drop("question-matching=1").unwrap().given,
            limits[0].given
        );
    }

    #[test]
    fn bad_policies_are_told_with_their_line() {
        for (text, expected) in [
            ("", "p: sets no limit"),
            ("max-kl = \"a\"", "p:1: invalid type"),
            ("\nmax-kl = -1", "p:2: the limit is -1"),
            ("max-kl = nan", "p:1: the limit is NaN"),
            (
                "min-agreement = 95",
                "p:1: 95 is no share of 0 to 1; 95 % is 0.95",
            ),
            ("[max-drop]\nqa = 1\nqa = 2", "p:3: duplicate key"),
            ("max-kll = 1", "p:1: unknown field"),
            (
                "[[limit]]\ntask = \"qa\"",
                "p:1: a limit has one of max-drop, max and min, this one has 0",
            ),
            (
                "[[limit]]\ntask = \"qa\"\nmax = 1\nmin = 0",
                "p:1: a limit has one of max-drop, max and min, this one has 2",
            ),
            ("[[limit]]\nmax = 1", "p:1: missing field"),
            ("max-kl = = 1", "p:1: "),
        ] {
            let said = parse(text, "p").unwrap_err().to_string();
            assert!(
                said.starts_with(expected) && !said.contains('\n'),
                "{text:?}: {said}"
            );
        }
        let said = read(Path::new("/nowhere/policy.toml")).unwrap_err().to_string();
        assert!(
            said.starts_with("/nowhere/policy.toml: cannot read the policy"),
            "{said}"
        );
    }

    #[test]
    fn bad_flags() {
        for text in ["qa", "=1", "qa=", "qa=x", "qa=-1", "qa=inf"] {
            let said = Limit::max_drop(text).unwrap_err().to_string();
            assert!(said.starts_with("--max-drop: "), "{text}: {said}");
        }
        assert!(Limit::max_kl(f64::NAN).is_err() && Limit::min_agreement(2.0).is_err());
    }

    #[test]
    fn a_limit_on_a_task_that_does_not_run() {
        let limits = parse(POLICY, "p").unwrap();
        let said = check_tasks(&limits, &["question-matching", "classification"])
            .unwrap_err()
            .to_string();
        assert!(
            said.contains(
                "p:2: limits the task divergence, but what runs is question-matching, classification"
            ),
            "{said}"
        );
        assert!(check_tasks(&limits[..1], &["question-matching"]).is_ok());
    }
}
