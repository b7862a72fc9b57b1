//! Where numbers lie on a plot: a scale with round ticks.

use serde::Serialize;

/// A tick: its place in the plot's units, and its text.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Tick {
    /// Place.
    pub at: f64,
    /// Text.
    pub text: String,
}

/// A straight scale from numbers to places; `from` may be larger than `to` (upwards in a picture).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Axis {
    low: f64,
    high: f64,
    from: f64,
    to: f64,
}

impl Axis {
    /// An axis that shows all of `numbers`, with a little room; NaN and infinity are not shown.
    pub fn around(numbers: impl IntoIterator<Item = f64>, from: f64, to: f64) -> Self {
        let finite = numbers.into_iter().filter(|n| n.is_finite());
        let (low, high) = finite.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), n| {
            (l.min(n), h.max(n))
        });
        let (low, high) = if low <= high { (low, high) } else { (0.0, 1.0) };
        let room = if high > low {
            (high - low) * 0.04
        } else {
            high.abs().max(1.0) * 0.1
        };
        Self {
            low: low - room,
            high: high + room,
            from,
            to,
        }
    }

    /// Exactly from `low` to `high`.
    pub fn exact(low: f64, high: f64, from: f64, to: f64) -> Self {
        Self {
            low,
            high: if high > low { high } else { low + 1.0 },
            from,
            to,
        }
    }

    /// Place of a number, rounded to a tenth, which is less than a pixel.
    pub fn at(&self, number: f64) -> f64 {
        let share = ((number - self.low) / (self.high - self.low)).clamp(-0.5, 1.5);
        ((self.from + share * (self.to - self.from)) * 10.0).round() / 10.0
    }

    /// Round numbers on it, about `count` of them: steps of 1, 2 or 5 times a power of ten.
    pub fn ticks(&self, count: usize, text: impl Fn(f64) -> String) -> Vec<Tick> {
        let rough = (self.high - self.low) / count.max(1) as f64;
        let power = 10_f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0]
            .into_iter()
            .map(|s| s * power)
            .find(|s| *s >= rough)
            .unwrap_or(rough);
        let first = (self.low / step).ceil() as i64;
        let last = (self.high / step).floor() as i64;
        (first..=last)
            .map(|i| i as f64 * step)
            .map(|n| Tick {
                at: self.at(n),
                text: text(n),
            })
            .collect()
    }
}

/// A tick's number, short: as many digits as its step needs.
pub fn short(n: f64) -> String {
    let text = format!("{n:.4}");
    let text = if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.')
    } else {
        &text
    };
    if text == "-0" {
        "0".to_owned()
    } else {
        text.to_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_ticks() {
        let axis = Axis::exact(-2.3, 4.1, 0.0, 64.0);
        let ticks: Vec<String> = axis.ticks(4, short).into_iter().map(|t| t.text).collect();
        assert_eq!(ticks, ["-2", "0", "2", "4"]);
        assert_eq!((axis.at(-2.3), axis.at(4.1)), (0.0, 64.0));
        assert_eq!(Axis::exact(0.0, 10.0, 100.0, 0.0).at(5.0), 50.0);
    }

    #[test]
    fn nothing_and_one_number() {
        assert!(Axis::around([], 0.0, 10.0).ticks(3, short).len() >= 2);
        let one = Axis::around([7.0, f64::NAN], 0.0, 10.0);
        assert_eq!(one.at(7.0), 5.0);
        assert_eq!([0.0, -0.0, 0.05, 1200.0].map(short), ["0", "0", "0.05", "1200"]);
    }
}
