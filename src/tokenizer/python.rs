//! Python's `json.dumps` and `strftime`, whose output chat templates were written against, byte for byte.

use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::Value;

/// Options of `json.dumps`.
#[derive(Debug, Default)]
pub struct Dumps {
    /// One level of it; without, everything stands on one line.
    pub indent: Option<String>,
    /// Between items, and between key and value.
    pub separators: Option<(String, String)>,
    /// Escapes everything beyond ASCII.
    pub ensure_ascii: bool,
    /// Orders keys.
    pub sort_keys: bool,
}

impl Dumps {
    /// The JSON text.
    pub fn write(&self, value: &Value) -> String {
        let mut out = String::new();
        self.value(value, 0, &mut out);
        out
    }

    fn value(&self, value: &Value, depth: usize, out: &mut String) {
        match value {
            Value::Null => out.push_str("null"),
            Value::Bool(b) => out.push_str(if *b { "true" } else { "false" }),
            Value::Number(n) => match n.as_f64().filter(|_| n.is_f64()) {
                Some(f) => out.push_str(&float(f)),
                None => out.push_str(&n.to_string()),
            },
            Value::String(s) => self.string(s, out),
            Value::Array(items) => self.list(('[', ']'), depth, out, items.iter(), |item, out| {
                self.value(item, depth + 1, out);
            }),
            Value::Object(map) => {
                let mut items: Vec<(&String, &Value)> = map.iter().collect();
                if self.sort_keys {
                    items.sort_by_key(|(key, _)| *key);
                }
                let colon = self.separators.as_ref().map_or(": ", |(_, colon)| colon);
                self.list(('{', '}'), depth, out, items.into_iter(), |(key, item), out| {
                    self.string(key, out);
                    out.push_str(colon);
                    self.value(item, depth + 1, out);
                });
            }
        }
    }

    fn list<T>(
        &self,
        (open, close): (char, char),
        depth: usize,
        out: &mut String,
        items: impl ExactSizeIterator<Item = T>,
        mut each: impl FnMut(T, &mut String),
    ) {
        let empty = items.len() == 0;
        let plain = if self.indent.is_some() { "," } else { ", " };
        let comma = self.separators.as_ref().map_or(plain, |(comma, _)| comma);
        let line = |depth: usize, out: &mut String| {
            if let Some(indent) = self.indent.as_ref().filter(|_| !empty) {
                out.push('\n');
                (0..depth).for_each(|_| out.push_str(indent));
            }
        };
        out.push(open);
        for (i, item) in items.enumerate() {
            if i > 0 {
                out.push_str(comma);
            }
            line(depth + 1, out);
            each(item, out);
        }
        line(depth, out);
        out.push(close);
    }

    fn string(&self, text: &str, out: &mut String) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !(' '..='~').contains(&c)) => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(out, "\\u{unit:04x}");
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// `repr` of a float: the shortest digits, an exponent of two digits from 1e16 and below 1e-4.
fn float(f: f64) -> String {
    let size = f.abs();
    if size != 0.0 && !(1e-4..1e16).contains(&size) {
        let text = format!("{f:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let (sign, exponent) = match exponent.strip_prefix('-') {
            Some(rest) => ('-', rest),
            None => ('+', exponent),
        };
        return format!("{digits}e{sign}{exponent:0>2}");
    }
    format!("{f:?}")
}

const DAYS: [&str; 7] = [
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

/// A UTC time in the C locale. Fails on a directive that chat templates do not use.
pub fn strftime(format: &str, now: SystemTime) -> Result<String, String> {
    let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    // 1970-01-01 was a Thursday.
    let weekday = ((days + 3) % 7) as usize;
    let first = (1..month).map(|m| month_days(year, m)).sum::<u64>();
    let month_name = MONTHS[month as usize - 1];
    let hour12 = (hour + 11) % 12 + 1;
    let mut out = String::new();
    let mut rest = format.chars();
    while let Some(c) = rest.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = rest.next();
        // GNU's flag for numbers without padding.
        let bare = directive == Some('-');
        if bare {
            directive = rest.next();
        }
        let number = |value: u64, width: usize| {
            let width = if bare { 0 } else { width };
            format!("{value:0width$}")
        };
        let text = match directive {
            Some('Y') => number(year, 4),
            Some('y') => number(year % 100, 2),
            Some('m') => number(month, 2),
            Some('d') => number(day, 2),
            Some('e') => {
                if bare {
                    day.to_string()
                } else {
                    format!("{day:2}")
                }
            }
            Some('H') => number(hour, 2),
            Some('I') => number(hour12, 2),
            Some('M') => number(minute, 2),
            Some('S') => number(second, 2),
            Some('j') => number(first + day, 3),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('A') => DAYS[weekday].to_owned(),
            Some('a') => DAYS[weekday][..3].to_owned(),
            Some('B') => month_name.to_owned(),
            Some('b' | 'h') => month_name[..3].to_owned(),
            Some('F') => format!("{year:04}-{month:02}-{day:02}"),
            Some('D') => format!("{month:02}/{day:02}/{:02}", year % 100),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('R') => format!("{hour:02}:{minute:02}"),
            Some('%') => "%".to_owned(),
            _ => {
                return Err(format!(
                    "the date format {format:?} has a directive that is not known here"
                ));
            }
        };
        out.push_str(&text);
    }
    Ok(out)
}

fn leap(year: u64) -> bool {
    (year.is_multiple_of(4) && !year.is_multiple_of(100)) || year.is_multiple_of(400)
}

fn month_days(year: u64, month: u64) -> u64 {
    match month {
        4 | 6 | 9 | 11 => 30,
        2 if leap(year) => 29,
        2 => 28,
        _ => 31,
    }
}

/// Year, month and day of a day counted from 1970-01-01, in the Gregorian calendar.
fn civil(days: u64) -> (u64, u64, u64) {
    // 146097 days make 400 years, whatever the year they begin with.
    let (mut year, mut left) = (1970 + days / 146_097 * 400, days % 146_097);
    while left >= 365 + u64::from(leap(year)) {
        left -= 365 + u64::from(leap(year));
        year += 1;
    }
    let mut month = 1;
    while left >= month_days(year, month) {
        left -= month_days(year, month);
        month += 1;
    }
    (year, month, left + 1)
}
