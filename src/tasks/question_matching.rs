//! `question-matching`: do two questions ask the same? Files are
//!
//! ```text
//! text_a<TAB>text_b<TAB>label          label 1 (the same) or 0
//! text_a<TAB>text_b<TAB>label<TAB>kind
//! FOLDER/OPPO.tsv, FOLDER/DuQM_pos.tsv ...   one file a kind, its name one of KINDS, .tsv, .txt or no ending
//! ```
//!
//! A first line whose label is `label` is a heading. Items without a label (`qtool predict`) have two columns.
//! Numbers: accuracy per kind and the macro average, and true and false positives and negatives.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use qtool_formats::FormatError;
use serde_json::json;

use super::choice::{Choice, Item, Items, Kind};
use super::data::{TextFile, fault};
use super::decide::Decisions;
use super::figures::Labelled;
use super::setup::{Ask, Setup};
use super::{Prepared, Reporting, Task};
use crate::Result;
use crate::report::{DetailTable, TaskReport};
use crate::scorer::{Pair, Scorer};

/// Kinds of the DuQM evaluation with OPPO's, in the order of its table.
pub const KINDS: [&str; 14] = [
    "OPPO",
    "DuQM_pos",
    "DuQM_named_entity",
    "DuQM_synonym",
    "DuQM_antonym",
    "DuQM_negation",
    "DuQM_temporal",
    "DuQM_symmetry",
    "DuQM_asymmetry",
    "DuQM_neg_asymmetry",
    "DuQM_voice",
    "DuQM_misspelling",
    "DuQM_discourse_particle(simple)",
    "DuQM_discourse_particle(complex)",
];

/// See the module's text.
pub struct QuestionMatching;

const KIND: Kind = Kind {
    name: "question-matching",
    version: 1,
    ways: &[Ask::Loglik, Ask::Generate, Ask::Head, Ask::Cosine],
    report,
};

impl Task for QuestionMatching {
    fn name(&self) -> &'static str {
        KIND.name
    }

    fn version(&self) -> u32 {
        KIND.version
    }

    fn summary(&self) -> &'static str {
        "do two questions ask the same: accuracy per kind and their macro average"
    }

    fn data(&self) -> &'static str {
        "a TSV text_a, text_b, label (0 or 1)[, kind], or a folder with a file a kind; --ask, --prompt, --shots, --dev"
    }

    fn prepare(&self, setup: &Setup, base: &dyn Scorer) -> Result<Box<dyn Prepared>> {
        Choice::prepare(KIND, setup, base, &read)
    }
}

/// Reads a file or a folder.
fn read(path: &Path, labelled: bool) -> Result<Items> {
    let mut items = Items {
        files: Vec::new(),
        items: Vec::new(),
        groups: Vec::new(),
        labels: vec!["0".to_owned(), "1".to_owned()],
        warnings: Vec::new(),
    };
    let mut rows: Vec<(Item, String)> = Vec::new();
    if path.is_dir() {
        let kinds = folder(path)?;
        for (kind, file) in &kinds {
            let file = TextFile::read(file)?;
            let of_file = pairs(&file, labelled)?;
            items.files.push(file.entry(of_file.len()));
            rows.extend(of_file.into_iter().map(|(item, _)| (item, (*kind).to_owned())));
        }
        let missing: Vec<&str> = KINDS
            .iter()
            .copied()
            .filter(|k| kinds.iter().all(|(n, _)| n != k))
            .collect();
        if !missing.is_empty() {
            items.warnings.push(format!(
                "{}: the macro average is over {} of the 14 kinds; there is no file for {}",
                path.display(),
                kinds.len(),
                missing.join(", ")
            ));
        }
    } else {
        let file = TextFile::read(path)?;
        rows = pairs(&file, labelled)?;
        items.files.push(file.entry(rows.len()));
    }
    // Known kinds in the order of the table, others after them as they come.
    let mut seen: Vec<&str> = Vec::new();
    for (_, kind) in &rows {
        if !seen.contains(&kind.as_str()) {
            seen.push(kind);
        }
    }
    let place = |kind: &str| KINDS.iter().position(|k| *k == kind).unwrap_or(KINDS.len());
    seen.sort_by_key(|kind| place(kind));
    items.groups = seen.iter().map(|k| (*k).to_owned()).collect();
    for (mut item, kind) in rows {
        item.group = items.groups.iter().position(|g| *g == kind).unwrap_or(0);
        items.items.push(item);
    }
    Ok(items)
}

/// Kinds and their files, in the order of the table. Fails at a file that is of no kind, or when there is none.
fn folder(path: &Path) -> Result<Vec<(&'static str, PathBuf)>> {
    let mut found: BTreeMap<usize, PathBuf> = BTreeMap::new();
    for entry in fs::read_dir(path).map_err(FormatError::io(path, "read"))? {
        let file = entry.map_err(FormatError::io(path, "read"))?.path();
        let name = file
            .file_name()
            .map(|n| n.to_string_lossy().into_owned())
            .unwrap_or_default();
        if name.starts_with('.') {
            continue;
        }
        let stem = name
            .strip_suffix(".tsv")
            .or_else(|| name.strip_suffix(".txt"))
            .unwrap_or(&name);
        let Some(kind) = KINDS.iter().position(|k| *k == stem) else {
            let reason = format!(
                "is no file of a kind; expected NAME.tsv with NAME one of {}",
                KINDS.join(", ")
            );
            return Err(fault(&file, None, reason));
        };
        if let Some(other) = found.insert(kind, file.clone()) {
            let reason = format!("is a second file of {stem}, beside {}", other.display());
            return Err(fault(&file, None, reason));
        }
    }
    if found.is_empty() {
        return Err(fault(
            path,
            None,
            "is an empty folder, expected a file a kind, such as OPPO.tsv",
        ));
    }
    Ok(found.into_iter().map(|(k, f)| (KINDS[k], f)).collect())
}

/// Pairs of a file with their kinds.
fn pairs(file: &TextFile, labelled: bool) -> Result<Vec<(Item, String)>> {
    let columns = if labelled {
        file.columns(&[3, 4], "text_a, text_b, label, kind")?
    } else {
        file.columns(&[2], "text_a, text_b")?
    };
    let heading = |row: &[&str]| row.get(2) == Some(&"label");
    let skip = usize::from(columns.first().is_some_and(|(_, row)| heading(row)));
    if columns.len() == skip {
        return Err(file.fault(None, "holds a heading and no item"));
    }
    let one = |(line, row): (usize, Vec<&str>)| {
        let gold = match row.get(2) {
            None => None,
            Some(&"0") => Some(0),
            Some(&"1") => Some(1),
            Some(other) => {
                return Err(file.fault(Some(line), format!("label: expected 0 or 1, got {other:?}")));
            }
        };
        let fields = json!({"text_a": row[0], "text_b": row[1]});
        let item = Item {
            fields: fields.as_object().cloned().unwrap_or_default(),
            content: &["text_a", "text_b"],
            pair: Pair {
                a: row[0].to_owned(),
                b: Some(row[1].to_owned()),
            },
            words: vec!["0".to_owned(), "1".to_owned()],
            results: vec![json!(0), json!(1)],
            group: 0,
            gold,
            line,
        };
        Ok((item, row.get(3).map_or("all", |k| *k).to_owned()))
    };
    columns.into_iter().skip(skip).map(one).collect()
}

fn report(choice: &Choice, decisions: &[Decisions], how: &Reporting) -> TaskReport {
    let labelled = Labelled::new(choice, decisions);
    let (metrics, warnings) = labelled.accuracy(how, 2);
    let mut tables: Vec<DetailTable> = Vec::new();
    let groups = &choice.data.groups;
    for (model, decided) in decisions.iter().enumerate() {
        let cells = |group: Option<usize>| {
            let c = &labelled.confusion(group)[model];
            [(1, 1), (0, 0), (0, 1), (1, 0)]
                .map(|(t, p)| Some(c.count(t, p) as f64))
                .to_vec()
        };
        let mut rows = vec![("all".to_owned(), cells(None))];
        if groups.len() > 1 {
            rows.extend(
                groups
                    .iter()
                    .enumerate()
                    .map(|(g, name)| (name.clone(), cells(Some(g)))),
            );
        }
        tables.push(DetailTable {
            name: "right and wrong".to_owned(),
            model,
            columns: ["TP", "TN", "FP", "FN"].map(str::to_owned).to_vec(),
            rows,
        });
        tables.push(labelled.confusion(None)[model].table(model, &choice.data.labels));
        if let Some((threshold, share)) = decided.threshold {
            tables.push(DetailTable {
                name: "cosine threshold".to_owned(),
                model,
                columns: vec!["threshold".to_owned(), "accuracy on --dev".to_owned()],
                rows: vec![("chosen".to_owned(), vec![Some(threshold), Some(share)])],
            });
        }
    }
    TaskReport {
        task: KIND.name.to_owned(),
        version: KIND.version,
        metrics,
        tables,
        warnings,
        ..TaskReport::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(folder: &Path, name: &str, content: &str) -> PathBuf {
        let path = folder.join(name);
        fs::write(&path, content).unwrap();
        path
    }

    #[test]
    fn three_shapes_of_data() {
        let dir = tempfile::tempdir().unwrap();
        let plain = write(dir.path(), "a.tsv", "text_a\ttext_b\tlabel\na\tb\t1\nc\td\t0\n");
        let read_plain = read(&plain, true).unwrap();
        assert_eq!((read_plain.items.len(), read_plain.items[0].line), (2, 2));
        assert_eq!(read_plain.groups, ["all"]);
        let kinds = write(
            dir.path(),
            "b.tsv",
            "a\tb\t1\tmine\nc\td\t0\tDuQM_voice\ne\tf\t0\tOPPO\n",
        );
        let read_kinds = read(&kinds, true).unwrap();
        assert_eq!(read_kinds.groups, ["OPPO", "DuQM_voice", "mine"]);
        assert_eq!(
            read_kinds.items.iter().map(|i| i.group).collect::<Vec<_>>(),
            [2, 1, 0]
        );
        let folder = dir.path().join("f");
        fs::create_dir(&folder).unwrap();
        write(&folder, "DuQM_discourse_particle(simple).tsv", "a\tb\t1\n");
        write(&folder, "OPPO.txt", "c\td\t0\nc\te\t1\n");
        let read_folder = read(&folder, true).unwrap();
        assert_eq!(read_folder.groups, ["OPPO", "DuQM_discourse_particle(simple)"]);
        assert_eq!(read_folder.items.len(), 3);
        assert!(
            read_folder.warnings[0].contains("over 2 of the 14 kinds"),
            "{:?}",
            read_folder.warnings
        );
        let bare = write(dir.path(), "c.tsv", "a\tb\n");
        assert_eq!(read(&bare, false).unwrap().items[0].gold, None);
    }

    #[test]
    fn faults_say_where() {
        let dir = tempfile::tempdir().unwrap();
        for (content, labelled, expected) in [
            (
                "a\tb\t1\na\tb\t2\n",
                true,
                "line 2: label: expected 0 or 1, got \"2\"",
            ),
            ("a\tb\t1\na\tb\n", true, "line 2: expected 3 columns"),
            ("a\tb\n", true, "line 1: expected 3 or 4 columns"),
            ("a\tb\t1\n", false, "line 1: expected 2 columns"),
            ("text_a\ttext_b\tlabel\n", true, "holds a heading and no item"),
        ] {
            let path = write(dir.path(), "x.tsv", content);
            let message = read(&path, labelled).unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
        let folder = dir.path().join("f");
        fs::create_dir(&folder).unwrap();
        assert!(
            read(&folder, true)
                .unwrap_err()
                .to_string()
                .contains("empty folder")
        );
        write(&folder, "LCQMC.tsv", "a\tb\t1\n");
        let message = read(&folder, true).unwrap_err().to_string();
        assert!(message.contains("LCQMC.tsv: is no file of a kind"), "{message}");
    }
}
