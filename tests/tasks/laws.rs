//! What holds for every task of the registry.

use std::fs;

use qtool::scorer::Reply;
use qtool::tasks::setup::Setup;
use qtool::tasks::{self, TASKS};

use super::write;
use crate::scripted::{Scripted, likely};

/// Scripts for everything.
fn able() -> Scripted {
    Scripted {
        likelihoods: Some(Box::new(|q| likely(&vec![-1.0; q.answers.len()]))),
        replies: Some(Box::new(|_| {
            Ok(Reply {
                text: String::new(),
                cut: 0,
            })
        })),
        windows: Some(Box::new(|w| vec![-1.0; w.ids.len() - w.context])),
        logits: Some(Box::new(|w| vec![0.0; 2 * (w.ids.len() - w.context)])),
        ..Scripted::default()
    }
}

#[test]
fn laws_of_all_tasks() {
    let mut names = Vec::new();
    for task in TASKS {
        assert!(task.version() >= 1 && !task.summary().is_empty() && !task.data().is_empty());
        assert!(!names.contains(&task.name()), "{}", task.name());
        assert!(task.name().chars().all(|c| c.is_ascii_lowercase() || c == '-'));
        names.push(task.name());
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "label.txt", "a\nb\n");
        for (content, expected) in [
            (b"".as_slice(), "is empty"),
            (b"\xff\xfe", "expected UTF-8"),
            (b"\n\n", "is empty"),
        ] {
            let path = dir.path().join("data.jsonl");
            fs::write(&path, content).unwrap();
            let outcome = task.prepare(&Setup::new(&path), &able());
            let message = outcome
                .err()
                .unwrap_or_else(|| panic!("{} took {content:?}", task.name()))
                .to_string();
            assert!(
                message.contains("data.jsonl") && message.contains(expected),
                "{}: {message}",
                task.name()
            );
        }
        // Lines of no task's form.
        let path = write(dir.path(), "data.jsonl", "{\"ids\": [1, 2]}\n{\"what\": 1}\n");
        let message = task
            .prepare(&Setup::new(&path), &able())
            .err()
            .unwrap()
            .to_string();
        assert!(
            message.contains("line 2") || message.contains("line 1"),
            "{}: {message}",
            task.name()
        );
        let missing = task
            .prepare(&Setup::new(dir.path().join("none")), &able())
            .err()
            .unwrap();
        assert!(missing.to_string().contains("none"), "{missing}");
    }
    assert_eq!(names.len(), 6);
    let message = tasks::find("question").err().unwrap().to_string();
    assert!(message.contains("question-matching, classification"), "{message}");
}
