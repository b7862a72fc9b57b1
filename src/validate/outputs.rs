//! Files a validation writes besides its report's text. Each appears under its name only when complete.

use std::io::Write;
use std::path::{Path, PathBuf};

use qtool_formats::FormatError;

use crate::Result;
use crate::tasks::BadCase;

/// Writes a file: beside its place, synced, then renamed into it.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    let parent = path
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let place = |e| FormatError::io(path, "write")(e);
    std::fs::create_dir_all(parent).map_err(FormatError::io(parent, "create"))?;
    let mut file = tempfile::Builder::new()
        .prefix(".qtool-")
        .tempfile_in(parent)
        .map_err(place)?;
    file.write_all(bytes).map_err(place)?;
    file.as_file().sync_all().map_err(place)?;
    // Temporary files are for their owner alone; a report is as readable as any new file.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        let mode = std::fs::Permissions::from_mode(0o644);
        file.as_file().set_permissions(mode).map_err(place)?;
    }
    file.persist(path).map_err(|e| place(e.error))?;
    Ok(())
}

/// Where the wrong items of one task and model go: `bad_case.txt` becomes `bad_case.INT4.txt`, and with several tasks
/// `bad_case.TASK.INT4.txt`.
pub fn bad_case_path(path: &Path, task: Option<&str>, label: &str) -> PathBuf {
    let plain = |c: char| {
        if c.is_alphanumeric() || "-_.()".contains(c) {
            c
        } else {
            '_'
        }
    };
    let label: String = label.chars().map(plain).collect();
    let stem = path
        .file_stem()
        .map(|s| s.to_string_lossy().into_owned())
        .unwrap_or_default();
    let task = task.map(|t| format!(".{t}")).unwrap_or_default();
    let ending = path
        .extension()
        .map(|e| format!(".{}", e.to_string_lossy()))
        .unwrap_or_default();
    path.with_file_name(format!("{stem}{task}.{label}{ending}"))
}

/// Writes wrong items.
pub fn bad_cases(path: &Path, cases: &[BadCase]) -> Result<()> {
    let text: String = cases.iter().map(BadCase::line).collect();
    write(path, text.as_bytes())
}

/// The folder of answers that belongs to a report: a hidden sibling.
pub fn work_folder(report: &Path) -> PathBuf {
    let name = report
        .file_name()
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default();
    report.with_file_name(format!(".{name}.qtool-answers"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_outputs() {
        let path = Path::new("out/bad_case.txt");
        assert_eq!(
            bad_case_path(path, None, "INT4"),
            Path::new("out/bad_case.INT4.txt")
        );
        assert_eq!(
            bad_case_path(path, Some("qa"), "a/../b"),
            Path::new("out/bad_case.qa.a_.._b.txt")
        );
        assert_eq!(
            work_folder(Path::new("out/r.html")),
            Path::new("out/.r.html.qtool-answers")
        );
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("new/r.md");
        write(&target, b"1").unwrap();
        write(&target, b"2").unwrap();
        assert_eq!(std::fs::read(&target).unwrap(), b"2");
        assert_eq!(std::fs::read_dir(dir.path().join("new")).unwrap().count(), 1);
    }
}
