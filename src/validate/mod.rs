//! `qtool validate`: models and data in, a report out.
//!
//! | Page | Idea |
//! |---|---|
//! | [`models`] | what is in each folder, and whether the models can be compared |
//! | [`journal`] | answers kept as they come, to go on with |
//! | [`rehearsal`] | how many items and tokens there are, and how long it will take |
//! | [`outputs`] | files besides the report |
//!
//! Every model is opened and every task's data read before the first question, so that what is wrong is said at once.
//! Then, task by task, all models answer the same items; what has been answered is never asked again.

pub mod journal;
pub mod models;
pub mod outputs;
pub mod rehearsal;

use std::path::{Path, PathBuf};
use std::time::{Instant, SystemTime};

use serde_json::{Value, json};

use crate::progress::Progress;
use crate::report::{ModelEntry, REPORT_VERSION, Report, Run, TaskReport};
use crate::resources::Sampler;
use crate::scorer::Scorer;
use crate::tasks::answers::{Answers, Said};
use crate::tasks::setup::Setup;
use crate::tasks::{self, BadCase, Prepared, Reporting, Task};
use crate::tokenizer::python::strftime;
use crate::{Error, Result, TOOL};
use journal::{Fingerprint, Journal, Part};
use models::Asked;

/// Where a model is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// A checkpoint's or an artifact's folder.
    Folder(PathBuf),
    /// A server.
    Served {
        /// Its address.
        url: String,
        /// The model's name there.
        name: String,
    },
}

impl Place {
    /// As it is shown.
    pub fn name(&self) -> String {
        match self {
            Self::Folder(path) => path.display().to_string(),
            Self::Served { url, name } => format!("{name} at {url}"),
        }
    }
}

/// Makes a model ready to be asked.
pub type Open<'a> = &'a dyn Fn(&Place) -> Result<Box<dyn Scorer>>;

/// Everything that is asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    /// The base, then the candidates.
    pub models: Vec<Place>,
    /// Names of tasks with their setups, in order.
    pub tasks: Vec<(String, Setup)>,
    /// Seed of the bootstraps.
    pub seed: u64,
    /// Resamples of each bootstrap.
    pub resamples: usize,
    /// Put every item's prediction into the report.
    pub items: bool,
    /// Take artifacts without checking them.
    pub unverified: bool,
    /// Folder to keep answers in.
    pub work: Option<PathBuf>,
    /// Go on with the answers there.
    pub resume: bool,
    /// Draw progress.
    pub show_progress: bool,
    /// The device's name, for the report.
    pub device: String,
    /// Why it is this one, where another was looked for.
    pub device_reason: Option<String>,
    /// What must be the same for answers to be gone on with.
    pub device_identity: String,
}

/// What a validation gave.
pub struct Outcome {
    /// The report, without a verdict.
    pub report: Report,
    /// Wrong items: task, model's label, items.
    pub bad_cases: Vec<(String, String, Vec<BadCase>)>,
    /// Where answers are kept.
    pub journal: Option<Journal>,
}

/// A task with its questions.
struct Ready {
    task: &'static dyn Task,
    prepared: Box<dyn Prepared>,
}

/// Runs a plan. Fails at bad data, models that cannot be opened, asked or compared, and at ctrl-C.
pub fn run(plan: &Plan, open: Open<'_>) -> Result<Outcome> {
    let (started, clock, sampler) = (SystemTime::now(), Instant::now(), Sampler::start());
    let models = opened(plan, open)?;
    let ready = prepared(plan, &models)?;
    let journal = plan
        .work
        .as_deref()
        .map(|folder| Journal::open(folder, &fingerprint(plan, &models, &ready), plan.resume))
        .transpose()?;
    let how = Reporting {
        seed: plan.seed,
        resamples: plan.resamples,
        items: plan.items,
        models: models.iter().map(|m| m.entry.label.clone()).collect(),
    };
    let mut reports: Vec<TaskReport> = Vec::new();
    let mut bad_cases = Vec::new();
    let mut kept = 0;
    for one in &ready {
        let name = one.task.name();
        let outcome = answer(plan, one, &models, journal.as_ref());
        let answers = outcome.map_err(|(error, answered)| match (&error, &journal) {
            (Error::Interrupted, Some(journal)) => Error::Stopped {
                answers: kept + answered,
                folder: journal.folder().to_owned(),
            },
            (Error::Device(fault), Some(journal)) => Error::DeviceStopped {
                fault: fault.clone(),
                answers: kept + answered,
                folder: journal.folder().to_owned(),
            },
            _ => error,
        })?;
        kept += answers.len();
        reports.push(one.prepared.report(&answers, &how)?);
        for (model, label) in how.models.iter().enumerate() {
            if let Some(cases) = one.prepared.bad_cases(&answers, model) {
                bad_cases.push((name.to_owned(), label.clone(), cases));
            }
        }
    }
    if let Some(first) = reports.first_mut() {
        for model in &models {
            let notes = model.scorer.notes().into_iter();
            first
                .warnings
                .extend(notes.map(|note| format!("{}: {note}", model.entry.label)));
        }
    }
    let report = Report {
        report_version: REPORT_VERSION,
        tool: TOOL.to_owned(),
        models: models.into_iter().map(|m| m.entry).collect(),
        tasks: reports,
        verdict: None,
        run: Run {
            device: plan.device.clone(),
            device_reason: plan.device_reason.clone(),
            threads: rayon::current_num_threads(),
            seed: plan.seed,
            seconds: clock.elapsed().as_secs_f64(),
            started: strftime("%Y-%m-%dT%H:%M:%SZ", started).unwrap_or_default(),
            resumed: journal.as_ref().is_some_and(Journal::resumed),
            resources: sampler.stop(),
        },
    };
    Ok(Outcome {
        report,
        bad_cases,
        journal,
    })
}

/// Opens every model, heads the columns, and refuses what cannot be compared.
fn opened(plan: &Plan, open: Open<'_>) -> Result<Vec<Asked>> {
    let mut models = Vec::new();
    for place in &plan.models {
        let (entry, vocabulary) = match place {
            Place::Folder(folder) => models::describe(folder, !plan.unverified, plan.show_progress)?,
            Place::Served { url, name } => (served(url, name), None),
        };
        let scorer = open(place)?;
        let tokenizer_digest = scorer.tokenizer_digest();
        models.push(Asked {
            entry: ModelEntry {
                tokenizer_digest,
                ..entry
            },
            scorer,
            vocabulary,
        });
    }
    let mut entries: Vec<ModelEntry> = models.iter().map(|m| m.entry.clone()).collect();
    models::label(&mut entries);
    for (model, entry) in models.iter_mut().zip(entries) {
        model.entry = entry;
    }
    models::comparable(&models, false)?;
    Ok(models)
}

fn served(url: &str, name: &str) -> ModelEntry {
    ModelEntry {
        label: if name.is_empty() { "SERVED" } else { name }.to_owned(),
        path: url.to_owned(),
        kind: format!("served {name}").trim_end().to_owned(),
        bytes: None,
        bits_per_weight: None,
        digest: None,
        tokenizer_digest: None,
        tensors: Vec::new(),
    }
}

/// Reads the data of every task and checks that every model can be asked.
fn prepared(plan: &Plan, models: &[Asked]) -> Result<Vec<Ready>> {
    let Some(base) = models.first() else {
        return Ok(Vec::new());
    };
    let mut ready: Vec<Ready> = Vec::new();
    for (name, setup) in &plan.tasks {
        let task = tasks::find(name)?;
        if ready.iter().any(|r| r.task.name() == *name) {
            return Err(Error::Task {
                task: name.clone(),
                reason: "was given twice; a run takes each task once".to_owned(),
            });
        }
        let prepared = task.prepare(setup, base.scorer.as_ref())?;
        for model in models {
            if let Some(reason) = prepared.lacks(&model.scorer.abilities()) {
                return Err(Error::Unsuited {
                    model: model.entry.path.clone(),
                    reason: format!("for {name}: {reason}"),
                });
            }
        }
        if prepared.by_token() {
            models::comparable(models, true)?;
        }
        ready.push(Ready { task, prepared });
    }
    Ok(ready)
}

/// Asks all models what is not answered yet. On failure, also gives how many answers there are.
fn answer<'a>(
    plan: &Plan,
    one: &Ready,
    models: &[Asked],
    journal: Option<&Journal>,
) -> Result<Answers<'a>, (Error, usize)> {
    let name = one.task.name();
    let slots = one.prepared.slots();
    let progress = Progress::items(plan.show_progress, name, (slots * models.len()) as u64);
    let mut parts: Vec<Part> = Vec::new();
    let mut known = Vec::new();
    for model in 0..models.len() {
        if let Some(journal) = journal {
            let (before, part) = journal.part(name, model).map_err(|e| (e, 0))?;
            // What had no answer is asked again: a server may be up by now, and a NaN comes back as it was.
            let answered = before
                .into_iter()
                .filter(|(_, said)| !matches!(said, Said::Miss(_)));
            known.extend(answered.map(|(slot, said)| (model, slot, said)));
            parts.push(part);
        }
    }
    let bar = progress.clone();
    let mut answers = Answers::new(
        models.len(),
        slots,
        Box::new(move |model, slot, said| {
            if let Some(part) = parts.get_mut(model) {
                part.keep(slot, said)?;
            }
            bar.add(1);
            Ok(())
        }),
    );
    for (model, slot, said) in known {
        if !answers.restore(model, slot, said) {
            let folder = journal.map(|j| j.folder().to_owned()).unwrap_or_default();
            let reason =
                format!("holds an answer to question {slot} of {name}, which has {slots}; remove the folder");
            return Err((Error::WorkFolder { folder, reason }, 0));
        }
    }
    progress.begin_at(answers.len() as u64);
    let scorers: Vec<&dyn Scorer> = models.iter().map(|m| m.scorer.as_ref()).collect();
    let outcome = one.prepared.ask(&scorers, &mut answers);
    progress.clear();
    match outcome {
        Ok(()) => Ok(answers),
        Err(error) => Err((error, answers.len())),
    }
}

/// What the answers depend on.
fn fingerprint(plan: &Plan, models: &[Asked], ready: &[Ready]) -> Fingerprint {
    let mut all = Fingerprint::from([("device".to_owned(), plan.device_identity.clone())]);
    let text = |value: Value| value.to_string();
    for (i, model) in models.iter().enumerate() {
        let entry = &model.entry;
        let what = json!([entry.path, entry.kind, entry.digest, entry.tokenizer_digest]);
        all.insert(format!("model {i} ({})", entry.label), text(what));
    }
    for one in ready {
        let name = one.task.name();
        let files = one.prepared.files();
        let digests: Vec<(&str, usize)> = files.iter().map(|f| (f.digest.as_str(), f.items)).collect();
        all.insert(format!("data of {name}"), text(json!(digests)));
        all.insert(
            format!("settings of {name}"),
            text(json!(one.prepared.settings())),
        );
        all.insert(format!("version of {name}"), one.task.version().to_string());
    }
    all
}

/// Labels of unlabelled items, by one model: a label an item, or why there is none.
pub fn predict(plan: &Plan, open: Open<'_>) -> Result<Vec<Result<String, String>>> {
    let models = opened(plan, open)?;
    let ready = prepared(plan, &models)?;
    let Some(one) = ready.first() else {
        return Ok(Vec::new());
    };
    let answers = answer(plan, one, &models, None).map_err(|(error, _)| error)?;
    one.prepared.predictions(&answers).ok_or_else(|| Error::Task {
        task: one.task.name().to_owned(),
        reason: "gives no labels; predict takes question-matching, classification or multiple-choice"
            .to_owned(),
    })
}

/// The folder for answers when none is given: beside the first report.
pub fn work_beside(reports: &[PathBuf]) -> Option<PathBuf> {
    reports
        .first()
        .map(|r: &PathBuf| outputs::work_folder(Path::new(r)))
}
