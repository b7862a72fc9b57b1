//! `classification`: which class is a text of? Files are
//!
//! ```text
//! text<TAB>label          items; without a label (`qtool predict`), one column
//! label.txt               beside them, or --labels FILE: one class a line, or class<TAB>word
//! ```
//!
//! The word is how a class is said to a causal model (`news_agriculture<TAB>农业`); without one it is the class's
//! name. Numbers: accuracy; macro precision, recall and F1; the same per class with support; the confusion matrix.

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::choice::{Choice, Item, Items, Kind};
use super::data::TextFile;
use super::decide::Decisions;
use super::figures::Labelled;
use super::setup::{Ask, Setup};
use super::{Prepared, Reporting, Task};
use crate::report::TaskReport;
use crate::scorer::{Pair, Scorer};
use crate::{Error, Result};

/// See the module's text.
pub struct Classification;

const KIND: Kind = Kind {
    name: "classification",
    version: 1,
    ways: &[Ask::Loglik, Ask::Generate, Ask::Head],
    report,
};

/// Name of the file of classes beside the data.
const LABEL_FILE: &str = "label.txt";

impl Task for Classification {
    fn name(&self) -> &'static str {
        KIND.name
    }

    fn version(&self) -> u32 {
        KIND.version
    }

    fn summary(&self) -> &'static str {
        "which class is a text of: accuracy, macro precision, recall and F1, confusion"
    }

    fn data(&self) -> &'static str {
        "a TSV text, label with a label.txt beside it; --labels, --ask, --prompt, --shots"
    }

    fn prepare(&self, setup: &Setup, base: &dyn Scorer) -> Result<Box<dyn Prepared>> {
        let classes = Classes::read(setup)?;
        Choice::prepare(KIND, setup, base, &|path, labelled| classes.items(path, labelled))
    }
}

struct Classes {
    file: TextFile,
    names: Vec<String>,
    words: Vec<String>,
}

impl Classes {
    fn read(setup: &Setup) -> Result<Self> {
        let path = setup.labels.clone().unwrap_or_else(|| {
            let folder = setup.data.parent().unwrap_or(Path::new(""));
            PathBuf::from(folder).join(LABEL_FILE)
        });
        if !path.is_file() {
            return Err(Error::Task {
                task: KIND.name.to_owned(),
                reason: format!(
                    "{}: no such file; pass --labels FILE with one class a line",
                    path.display()
                ),
            });
        }
        let file = TextFile::read(&path)?;
        let mut names: Vec<String> = Vec::new();
        let mut words: Vec<String> = Vec::new();
        for (line, row) in file.columns(&[1, 2], "class, word")? {
            let word = row.get(1).unwrap_or(&row[0]);
            for (known, new) in [(&mut names, row[0]), (&mut words, word)] {
                if let Some(first) = known.iter().position(|k| k == new) {
                    return Err(file.fault(
                        Some(line),
                        format!("{new:?} stands in line {} already", first + 1),
                    ));
                }
                known.push(new.to_owned());
            }
        }
        if names.len() < 2 {
            return Err(file.fault(None, "names one class, expected at least two"));
        }
        Ok(Self { file, names, words })
    }

    fn items(&self, path: &Path, labelled: bool) -> Result<Items> {
        let file = TextFile::read(path)?;
        let rows = if labelled {
            file.columns(&[2], "text, label")?
        } else {
            file.columns(&[1], "text")?
        };
        let results: Vec<Value> = self.names.iter().map(|n| json!(n)).collect();
        let one = |(line, row): (usize, Vec<&str>)| {
            let gold = match row.get(1) {
                None => None,
                Some(label) => Some(self.names.iter().position(|n| n == label).ok_or_else(|| {
                    let shown: Vec<&str> = self.names.iter().take(20).map(String::as_str).collect();
                    file.fault(
                        Some(line),
                        format!(
                            "label {label:?} is none of the {} classes in {}: {}",
                            self.names.len(),
                            self.file.path.display(),
                            shown.join(", ")
                        ),
                    )
                })?),
            };
            let fields = json!({"text": row[0], "labels": self.names, "words": self.words});
            Ok(Item {
                fields: fields.as_object().cloned().unwrap_or_default(),
                content: &["text"],
                pair: Pair {
                    a: row[0].to_owned(),
                    b: None,
                },
                words: self.words.clone(),
                results: results.clone(),
                group: 0,
                gold,
                line,
            })
        };
        let items: Vec<Item> = rows.into_iter().map(one).collect::<Result<_>>()?;
        Ok(Items {
            files: vec![file.entry(items.len()), self.file.entry(self.names.len())],
            items,
            groups: vec!["all".to_owned()],
            labels: self.names.clone(),
            warnings: Vec::new(),
        })
    }
}

fn report(choice: &Choice, decisions: &[Decisions], how: &Reporting) -> TaskReport {
    let labelled = Labelled::new(choice, decisions);
    let labels = &choice.data.labels;
    let (mut metrics, warnings) = labelled.accuracy(how, labels.len());
    metrics.extend(labelled.macro_scores(how));
    let mut tables = Vec::new();
    for (model, confusion) in labelled.confusion(None).iter().enumerate() {
        tables.push(confusion.per_class(model, labels));
        tables.push(confusion.table(model, labels));
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
    use std::fs;

    #[test]
    fn classes_and_their_faults() {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("a.txt");
        let setup = Setup::new(&data);
        let message = Classes::read(&setup).err().unwrap().to_string();
        assert!(
            message.contains("label.txt: no such file; pass --labels"),
            "{message}"
        );
        for (labels, text, expected) in [
            ("car\nfood\ncar\n", "", "line 3: \"car\" stands in line 1 already"),
            ("car\n", "", "names one class"),
            ("car\t车\nfood\t车\n", "", "line 2: \"车\" stands in line 1"),
            (
                "car\nfood\n",
                "x\tcar\ny\tboat\n",
                "line 2: label \"boat\" is none of the 2 classes",
            ),
            (
                "car\nfood\n",
                "x\tcar\ny\n",
                "line 2: expected 2 columns between tabs (text, label), got 1",
            ),
        ] {
            fs::write(dir.path().join(LABEL_FILE), labels).unwrap();
            fs::write(&data, text).unwrap();
            let outcome = Classes::read(&setup).and_then(|c| c.items(&data, true));
            let message = outcome.unwrap_err().to_string();
            assert!(message.contains(expected), "{message}");
        }
        fs::write(dir.path().join(LABEL_FILE), "car\t车\nfood\t吃\n").unwrap();
        fs::write(&data, "x\tfood\n").unwrap();
        let items = Classes::read(&setup).unwrap().items(&data, true).unwrap();
        assert_eq!(
            (items.items[0].gold, items.items[0].words[1].as_str()),
            (Some(1), "吃")
        );
    }
}
