//! How numbers of a report are written, the same in every renderer.

use super::{Delta, Interval, Metric, Report, Unit};

/// Ways of writing a unit's numbers.
impl Unit {
    /// Digits after the point of a number. Shares and perplexities have as many for all models, so that columns
    /// compare; what ranges over powers of ten has three digits that matter, each for itself.
    fn decimals(self, number: f64, difference: bool) -> usize {
        match self {
            Self::Share => 1,
            Self::Perplexity => 2 + usize::from(difference),
            _ if number != 0.0 && number.is_finite() => {
                (2 - number.abs().log10().floor() as i32).clamp(2, 6) as usize
            }
            _ => 2,
        }
    }

    /// What stands behind the metric's name: `%`, `nats per token` ...
    pub fn words(self) -> &'static str {
        match self {
            Self::Share => "%",
            Self::NatsPerToken => "nats per token",
            Self::BitsPerByte => "bits per byte",
            Self::Perplexity | Self::Number => "",
        }
    }

    /// Unit of its differences.
    pub fn delta_words(self) -> &'static str {
        match self {
            Self::Share => "percentage points",
            Self::Perplexity => "ratio to the base",
            other => other.words(),
        }
    }

    fn scale(self) -> f64 {
        if self == Self::Share { 100.0 } else { 1.0 }
    }
}

impl Metric {
    /// The unit to be named beside the metric's name; nothing where the name is the unit.
    pub fn unit_beside_name(&self) -> &'static str {
        let unit = self.unit.words();
        if unit == self.name { "" } else { unit }
    }
}

/// Numbers of one metric as text.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    unit: Unit,
}

impl Style {
    /// Of this metric.
    pub fn of(metric: &Metric) -> Self {
        Self { unit: metric.unit }
    }

    /// A value in its unit, without the unit's name.
    pub fn value(&self, x: f64) -> String {
        format!("{:.*}", self.unit.decimals(x, false), x * self.unit.scale())
    }

    /// `[low, high]` of a value.
    pub fn interval(&self, of: &Interval) -> String {
        format!("[{}, {}]", self.value(of.low), self.value(of.high))
    }

    /// A difference with its sign, or a ratio.
    pub fn difference(&self, x: f64) -> String {
        let (scaled, digits) = (x * self.unit.scale(), self.unit.decimals(x, true));
        if self.unit == Unit::Perplexity {
            return format!("x{scaled:.digits$}");
        }
        let text = format!("{scaled:+.digits$}");
        // Rounded to nothing: no side.
        if text.bytes().all(|b| !b.is_ascii_digit() || b == b'0') {
            text.replace(['+', '-'], "±")
        } else {
            text
        }
    }

    /// `-1.1 [-2.3, +0.2]`.
    pub fn delta(&self, delta: &Delta) -> String {
        let Interval { value, low, high } = delta.interval;
        format!(
            "{} [{}, {}]",
            self.difference(value),
            self.difference(low),
            self.difference(high)
        )
    }

    /// The smallest difference the items would find: without a sign.
    pub fn detectable(&self, x: f64) -> String {
        let text = self.difference(x);
        text.trim_start_matches('+').to_owned()
    }
}

/// `majority 53.1, coin flip 50.0`.
pub fn baselines(metric: &Metric) -> String {
    let style = Style::of(metric);
    let each = |(name, value): &(String, f64)| format!("{} {}", plain(name), style.value(*value));
    metric.baselines.iter().map(each).collect::<Vec<_>>().join(", ")
}

/// The level a model must beat to have looked at the items: the highest baseline.
pub fn chance(metric: &Metric) -> Option<f64> {
    metric.baselines.iter().map(|b| b.1).max_by(f64::total_cmp)
}

/// p as people read it.
pub fn p_value(p: f64) -> String {
    if p < 0.001 {
        "p < 0.001".to_owned()
    } else {
        format!("p = {p:.3}")
    }
}

/// The sentence on a difference for places with room: `-1.1 [-2.3, +0.2], p = 0.031, 0.120 corrected`.
pub fn told(metric: &Metric, model: usize) -> Option<String> {
    let delta = metric.deltas.get(model).copied().flatten()?;
    let p = tested(&delta).map_or_else(String::new, |p| format!(", {p}"));
    Some(Style::of(metric).delta(&delta) + &p)
}

/// `p = 0.031, 0.120 corrected`; nothing where there is no test.
pub fn tested(delta: &Delta) -> Option<String> {
    let p = delta.p?;
    let corrected = delta.p_holm.filter(|c| *c > p && *c >= 0.001);
    let more = corrected.map_or_else(String::new, |c| format!(", {c:.3} corrected"));
    Some(p_value(p) + &more)
}

/// Text that came from outside, fit for one line of a terminal or table: control characters, which could move the
/// cursor or forge a line, and marks that turn the direction of writing become U+FFFD.
pub fn plain(text: &str) -> String {
    let unfit = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{2028}' | '\u{2029}')
    };
    text.chars()
        .map(|c| if unfit(c) { '\u{fffd}' } else { c })
        .collect()
}

/// Bytes as MB or GB.
pub fn bytes(bytes: u64) -> String {
    match bytes as f64 / 1e6 {
        mb if mb < 1000.0 => format!("{mb:.0} MB"),
        mb => format!("{:.2} GB", mb / 1000.0),
    }
}

/// Seconds as `12.3 s`, `4 min 05 s`, `2 h 03 min`.
pub fn seconds(seconds: f64) -> String {
    let whole = seconds.max(0.0).round() as u64;
    match whole {
        0..60 => format!("{seconds:.1} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

/// One line on the machine: mean and peak load, peak memory.
pub fn resources(report: &Report) -> Option<String> {
    let samples = &report.run.resources;
    let peak = samples.iter().map(|s| s.memory_bytes).max()?;
    // Samples may stand for unlike times: each for the time since the one before.
    let mut before = 0.0;
    let (mut time, mut load) = (0.0, 0.0);
    for sample in samples {
        load += sample.cpu_percent * (sample.at - before);
        time += sample.at - before;
        before = sample.at;
    }
    let most = samples.iter().map(|s| s.cpu_percent).fold(0.0, f64::max);
    let mut text = format!(
        "CPU {:.0} % on average, {most:.0} % at most (100 % is one core); memory at most {}",
        if time > 0.0 { load / time } else { most },
        bytes(peak)
    );
    if let Some(gpu) = samples.iter().filter_map(|s| s.gpu_percent).reduce(f64::max) {
        let memory = samples
            .iter()
            .filter_map(|s| s.gpu_memory_bytes)
            .max()
            .unwrap_or(0);
        text += &format!("; GPU {gpu:.0} % at most, with {}", bytes(memory));
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::super::ResourceSample;
    use super::super::example;
    use super::*;

    #[test]
    fn numbers_in_their_units() {
        let report = example::report();
        let accuracy = &report.tasks[0].metrics[0];
        let style = Style::of(accuracy);
        assert_eq!(
            (style.value(0.4836), style.difference(-0.0113)),
            ("48.4".into(), "-1.1".into())
        );
        assert_eq!(style.difference(0.0001), "±0.0");
        let perplexity = Metric {
            unit: Unit::Perplexity,
            ..accuracy.clone()
        };
        assert_eq!(Style::of(&perplexity).difference(1.0123), "x1.012");
        let mut kl = Metric {
            unit: Unit::NatsPerToken,
            ..accuracy.clone()
        };
        kl.values = vec![
            None,
            Some(Interval {
                value: 0.0123,
                low: 0.0,
                high: 1.0,
            }),
        ];
        assert_eq!(
            [0.0123, 0.000_456_7, 1.5].map(|x| Style::of(&kl).value(x)),
            ["0.0123", "0.000457", "1.50"]
        );
        assert_eq!(
            (accuracy.unit_beside_name(), kl.unit_beside_name()),
            ("%", "nats per token")
        );
        kl.name = "nats per token".to_owned();
        assert_eq!(kl.unit_beside_name(), "", "said once");
        let delta = accuracy.deltas[3].unwrap();
        assert_eq!(
            tested(&Delta {
                p: Some(0.02),
                p_holm: Some(0.14),
                ..delta
            })
            .unwrap(),
            "p = 0.020, 0.140 corrected"
        );
        assert_eq!(
            tested(&Delta {
                p: Some(1e-9),
                p_holm: Some(1e-8),
                ..delta
            })
            .unwrap(),
            "p < 0.001"
        );
    }

    #[test]
    fn hostile_text_is_one_plain_line() {
        assert_eq!(
            plain("a\u{1b}[2Jb\nc\u{202e}d"),
            "a\u{fffd}[2Jb\u{fffd}c\u{fffd}d"
        );
        assert_eq!(plain("否定 DuQM"), "否定 DuQM");
    }

    #[test]
    fn times_and_sizes() {
        assert_eq!(
            [4.26, 65.0, 7380.0].map(seconds),
            ["4.3 s", "1 min 05 s", "2 h 03 min"]
        );
        assert_eq!([270_000_000, 1_234_000_000].map(bytes), ["270 MB", "1.23 GB"]);
        assert_eq!([0.0004, 0.04].map(p_value), ["p < 0.001", "p = 0.040"]);
    }

    #[test]
    fn a_mean_over_unlike_times() {
        let mut report = example::report();
        let sample = |at, cpu_percent| ResourceSample {
            at,
            cpu_percent,
            memory_bytes: 5_000_000,
            gpu_percent: None,
            gpu_memory_bytes: None,
        };
        report.run.resources = vec![sample(1.0, 200.0), sample(4.0, 100.0)];
        let said = resources(&report).unwrap();
        assert_eq!(
            said,
            "CPU 125 % on average, 200 % at most (100 % is one core); memory at most 5 MB"
        );
        report.run.resources.clear();
        assert_eq!(resources(&report), None);
    }
}
