//! A report for programs: everything, as JSON, one field for each of the data model's.

use super::{REPORT_VERSION, Report};

/// The report as indented JSON with a last newline. Numbers that JSON cannot hold (NaN, infinity) become `null`, which
/// no part of a report is made to hold.
pub fn render(report: &Report) -> String {
    // Only a map with keys that are no text, or a failing writer, could fail here; a report has neither.
    serde_json::to_string_pretty(report)
        .map_or_else(|e| format!("{{\"error\": \"{e}\"}}\n"), |text| text + "\n")
}

/// A report as [`render`] wrote it, or why it is none.
pub fn parse(text: &str) -> Result<Report, String> {
    let report: Report =
        serde_json::from_str(text).map_err(|e| format!("is no report of a validation: {e}"))?;
    if report.report_version != REPORT_VERSION {
        return Err(format!(
            "is a report of version {}, this program reads version {REPORT_VERSION}",
            report.report_version
        ));
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::super::example;
    use super::*;

    #[test]
    fn comes_back_as_it_went() {
        let report = example::report();
        assert_eq!(parse(&render(&report)).unwrap(), report);
        let value: serde_json::Value = serde_json::from_str(&render(&report)).unwrap();
        assert_eq!(value["report_version"], 1);
        assert_eq!(value["tasks"][0]["metrics"][0]["unit"], "share");
        assert_eq!(value["verdict"]["outcome"], "failed");
    }

    #[test]
    fn other_files_are_refused() {
        assert!(
            parse("{}")
                .unwrap_err()
                .starts_with("is no report of a validation: missing field")
        );
        let newer = render(&example::report()).replacen("\"report_version\": 1", "\"report_version\": 9", 1);
        assert_eq!(
            parse(&newer).unwrap_err(),
            "is a report of version 9, this program reads version 1"
        );
    }
}
