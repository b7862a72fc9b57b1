//! Sizes, times and figures as people read them, and sizes as they type them.

use std::time::Duration;

use indicatif::DecimalBytes;

/// Bytes with a decimal unit.
pub fn bytes(bytes: u64) -> String {
    DecimalBytes(bytes).to_string()
}

/// A count with thousands set apart.
pub fn count(count: u64) -> String {
    indicatif::HumanCount(count).to_string()
}

/// Seconds, with a decimal below ten.
pub fn seconds(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    match seconds {
        s if s < 10.0 => format!("{s:.1} s"),
        s if s < 120.0 => format!("{s:.0} s"),
        s => format!("{:.0} min", s / 60.0),
    }
}

/// A shape as `256 x 704`.
pub fn shape(shape: &[usize]) -> String {
    if shape.is_empty() {
        return "scalar".to_owned();
    }
    shape
        .iter()
        .map(ToString::to_string)
        .collect::<Vec<_>>()
        .join(" x ")
}

/// Decibels, or `exact` where there is no error.
pub fn decibels(value: Option<f64>) -> String {
    value.map_or_else(|| "exact".to_owned(), |v| format!("{v:.1}"))
}

/// Parses `5GB`, `200 MB`, `1000000`; units are decimal, `GiB` and the like binary.
pub fn parse(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let digits = text
        .find(|c: char| !(c.is_ascii_digit() || c == '.'))
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kb" => 1_000,
        "m" | "mb" => 1_000_000,
        "g" | "gb" => 1_000_000_000,
        "t" | "tb" => 1_000_000_000_000,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        _ => return Err(format!("{text:?} is no size; write it like 5GB, 500MB or 4GiB")),
    };
    match number.parse::<f64>() {
        Ok(n) if n > 0.0 && n * factor as f64 >= 1.0 && n * (factor as f64) < 1e18 => {
            Ok((n * factor as f64) as u64)
        }
        _ => Err(format!("{text:?} is no size; write it like 5GB, 500MB or 4GiB")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_back() {
        assert_eq!(parse("5GB"), Ok(5_000_000_000));
        assert_eq!(parse("1.5 MiB"), Ok(1_572_864));
        assert_eq!(parse("1000"), Ok(1000));
        for bad in ["", "GB", "-1GB", "0", "5 parsecs", "1e30GB"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
