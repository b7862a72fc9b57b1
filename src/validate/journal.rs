//! Answers as they come, one JSON line each, so that an interrupted run goes on where it was with the same numbers.
//!
//! ```text
//! FOLDER/run.json                     what the answers depend on: data, settings, models; locked while a run lives
//! FOLDER/TASK.M.jsonl                 answers of model M (0 is the base): {"slot": 3, "said": {..}}
//! ```
//!
//! A line is written whole before its answer counts. The last line of a run that was killed may lack its end; it is
//! taken away and its question asked again. Numbers come back from JSON bit for bit.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use qtool_formats::FormatError;
use serde::{Deserialize, Serialize};

use crate::tasks::answers::Said;
use crate::{Error, Result};

/// What answers depend on, by a name a person knows it by.
pub type Fingerprint = BTreeMap<String, String>;

const RUN_FILE: &str = "run.json";

/// A folder of answers.
#[derive(Debug)]
pub struct Journal {
    folder: PathBuf,
    _lock: File,
    resumed: bool,
}

#[derive(Serialize, Deserialize)]
struct Line {
    slot: usize,
    said: Said,
}

impl Journal {
    /// Begins a folder, or goes on with it when `resume` is set.
    ///
    /// Fails when the folder holds answers and `resume` is not set, when what they depend on has changed (naming it),
    /// when another run holds it, or when it cannot be written.
    pub fn open(folder: &Path, fingerprint: &Fingerprint, resume: bool) -> Result<Self> {
        let fault = |reason: String| Error::WorkFolder {
            folder: folder.to_owned(),
            reason,
        };
        fs::create_dir_all(folder).map_err(FormatError::io(folder, "create"))?;
        let path = folder.join(RUN_FILE);
        let known = path.exists();
        if !known
            && fs::read_dir(folder)
                .map_err(FormatError::io(folder, "read"))?
                .next()
                .is_some()
        {
            return Err(fault(
                "holds files that are no answers; give an empty or new folder as --work".to_owned(),
            ));
        }
        if known && !resume {
            return Err(fault(
                "holds the answers of an interrupted run; pass --resume to go on with them, or remove the folder"
                    .to_owned(),
            ));
        }
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(FormatError::io(&path, "open"))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(fault("is in use by another run".to_owned())),
            Err(TryLockError::Error(e)) => return Err(FormatError::io(&path, "lock")(e).into()),
        }
        let text = fs::read_to_string(&path).map_err(FormatError::io(&path, "read"))?;
        // A run that was killed before it wrote a whole record has kept no answer either.
        if text.ends_with('\n') {
            let before: Fingerprint = serde_json::from_str(&text).map_err(|e| {
                fault(format!(
                    "{RUN_FILE} is damaged ({e}); remove the folder to start anew"
                ))
            })?;
            let changed = changed(&before, fingerprint);
            if !changed.is_empty() {
                return Err(fault(format!(
                    "holds answers of a run whose {} differ; repeat that run as it was, or remove the folder to start anew",
                    changed.join(", ")
                )));
            }
        } else {
            file.set_len(0).map_err(FormatError::io(&path, "write"))?;
            let json = serde_json::to_string_pretty(fingerprint).unwrap_or_default() + "\n";
            file.write_all(json.as_bytes())
                .and_then(|()| file.sync_all())
                .map_err(FormatError::io(&path, "write"))?;
        }
        Ok(Self {
            folder: folder.to_owned(),
            _lock: file,
            resumed: known,
        })
    }

    /// Whether there was a run before.
    pub fn resumed(&self) -> bool {
        self.resumed
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Answers of one model to one task, and where more of them go. Fails at a damaged line.
    pub fn part(&self, task: &str, model: usize) -> Result<(Vec<(usize, Said)>, Part)> {
        let path = self.folder.join(format!("{task}.{model}.jsonl"));
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .open(&path)
            .map_err(FormatError::io(&path, "open"))?;
        let bytes = fs::read(&path).map_err(FormatError::io(&path, "read"))?;
        let whole = bytes.iter().rposition(|b| *b == b'\n').map_or(0, |end| end + 1);
        if whole < bytes.len() {
            file.set_len(whole as u64)
                .map_err(FormatError::io(&path, "write"))?;
            file.flush().map_err(FormatError::io(&path, "write"))?;
        }
        let mut answers = Vec::new();
        for (number, line) in bytes[..whole].split(|b| *b == b'\n').enumerate() {
            if line.is_empty() {
                continue;
            }
            let line: Line = serde_json::from_slice(line).map_err(|e| Error::WorkFolder {
                folder: path.clone(),
                reason: format!(
                    "line {} is no answer ({e}); remove the file to ask its questions again",
                    number + 1
                ),
            })?;
            answers.push((line.slot, line.said));
        }
        Ok((answers, Part { path, file }))
    }

    /// Takes the folder away: its answers are in a report.
    pub fn remove(self) -> Result<()> {
        let folder = self.folder.clone();
        drop(self);
        fs::remove_dir_all(&folder).map_err(FormatError::io(&folder, "remove"))?;
        Ok(())
    }
}

/// One model's answers to one task.
#[derive(Debug)]
pub struct Part {
    path: PathBuf,
    file: File,
}

impl Part {
    /// Keeps an answer.
    pub fn keep(&mut self, slot: usize, said: &Said) -> Result<()> {
        let line = Line {
            slot,
            said: said.clone(),
        };
        let mut text = serde_json::to_string(&line).unwrap_or_default();
        text.push('\n');
        self.file
            .write_all(text.as_bytes())
            .map_err(FormatError::io(&self.path, "write"))?;
        Ok(())
    }
}

/// Names whose values differ or that only one has.
fn changed(before: &Fingerprint, now: &Fingerprint) -> Vec<String> {
    let mut names: Vec<&String> = before.keys().chain(now.keys()).collect();
    names.sort();
    names.dedup();
    names
        .into_iter()
        .filter(|n| before.get(*n) != now.get(*n))
        .cloned()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn print(data: &str) -> Fingerprint {
        Fingerprint::from([
            ("data of qa".to_owned(), data.to_owned()),
            ("models".to_owned(), "m".to_owned()),
        ])
    }

    #[test]
    fn answers_survive_a_kill_in_the_middle_of_a_line() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("work");
        let journal = Journal::open(&folder, &print("a"), false).unwrap();
        assert!(!journal.resumed());
        let (before, mut part) = journal.part("qa", 1).unwrap();
        assert!(before.is_empty());
        part.keep(4, &Said::Cosine(0.1 + 0.2)).unwrap();
        part.keep(2, &Said::Cosine(-1.0)).unwrap();
        drop((journal, part));
        let path = folder.join("qa.1.jsonl");
        let mut text = fs::read_to_string(&path).unwrap();
        text += "{\"slot\": 5, \"sai";
        fs::write(&path, text).unwrap();

        let refused = Journal::open(&folder, &print("a"), false)
            .unwrap_err()
            .to_string();
        assert!(refused.contains("--resume"), "{refused}");
        let refused = Journal::open(&folder, &print("b"), true).unwrap_err().to_string();
        assert!(refused.contains("whose data of qa differ"), "{refused}");

        let journal = Journal::open(&folder, &print("a"), true).unwrap();
        assert!(journal.resumed());
        let busy = Journal::open(&folder, &print("a"), true).unwrap_err().to_string();
        assert!(busy.contains("in use"), "{busy}");
        let (before, mut part) = journal.part("qa", 1).unwrap();
        assert_eq!(before, [(4, Said::Cosine(0.1 + 0.2)), (2, Said::Cosine(-1.0))]);
        part.keep(5, &Said::Cosine(0.5)).unwrap();
        drop(part);
        assert_eq!(journal.part("qa", 1).unwrap().0.len(), 3, "the half line is gone");
        fs::write(&path, "{}\n").unwrap();
        let damaged = journal.part("qa", 1).unwrap_err().to_string();
        assert!(damaged.contains("qa.1.jsonl: line 1 is no answer"), "{damaged}");
        journal.remove().unwrap();
        assert!(!folder.exists());
    }

    #[test]
    fn folders_of_other_things_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("thesis.tex"), "x").unwrap();
        let refused = Journal::open(dir.path(), &print("a"), true)
            .unwrap_err()
            .to_string();
        assert!(refused.contains("no answers"), "{refused}");
    }
}
