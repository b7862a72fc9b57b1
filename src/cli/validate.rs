//! `qtool validate`: what was typed, and what is printed and written of the report.

use std::path::{Path, PathBuf};

use console::{Term, style};

use super::device::DeviceArgs;
use super::server::ServerArgs;
use super::tasks::{AskArgs, table, task_and_data};
use super::{print, print_json, size, wants_progress};
use crate::device::Chosen;
use crate::report::text::{self, Look};
use crate::report::{Report, html, json, markdown};
use crate::statistics::resample::RESAMPLES;
use crate::validate::{self, Place, Plan, outputs, rehearsal};
use crate::verdict;
use crate::verdict::policy::{self, Limit};

fn after() -> String {
    table()
        + "
Every answer is kept as it comes, in --work or beside the first --report; after an interruption the same
command with --resume goes on. The folder beside a report is removed when the report is written.

Examples:
  qtool validate MODEL INT8 INT4 --task question-matching=test.tsv --report r.html
  qtool validate MODEL VENDOR-GPTQ VENDOR.gguf --task perplexity=text.txt
  qtool validate MODEL INT4 --task perplexity=text.txt --task divergence=text.txt --max-kl 0.05
  qtool validate MODEL INT4 --task question-matching=DuQM/ --shots dev.tsv --max-drop question-matching=1
  qtool validate MODEL INT4 --task classification=test.txt --ask generate --bad-cases bad_case.txt
  qtool validate --endpoint http://127.0.0.1:8000 --model ernie --task qa=qa.jsonl --chat

Exit status: 0 done or within the limits, 1 a limit does not hold, 3 the items do not decide, 2 error."
}

/// What was typed.
#[derive(Debug, clap::Args)]
#[command(after_help = after())]
pub struct Args {
    /// The base, then the models to compare with it: checkpoints, artifacts, or models that others quantized
    #[arg(required_unless_present = "endpoint", value_name = "BASE OUT")]
    pub models: Vec<PathBuf>,
    /// What to evaluate, and its data
    #[arg(long = "task", value_name = "TASK=DATA", required = true)]
    pub tasks: Vec<String>,
    #[command(flatten)]
    ask: AskArgs,
    #[command(flatten)]
    server: ServerArgs,
    #[command(flatten)]
    device: DeviceArgs,
    /// Most points a task's first metric may drop, such as question-matching=1
    #[arg(long, value_name = "TASK=POINTS", help_heading = "Limits")]
    pub max_drop: Vec<String>,
    /// Most nats a token that a candidate may diverge from the base
    #[arg(long, value_name = "NATS", help_heading = "Limits")]
    pub max_kl: Option<f64>,
    /// Least share of tokens (0 to 1) where base and candidate find the same one the likeliest
    #[arg(long, value_name = "SHARE", help_heading = "Limits")]
    pub min_agreement: Option<f64>,
    /// File of limits (TOML; see docs/validating.md)
    #[arg(long, value_name = "FILE", help_heading = "Limits")]
    pub policy: Option<PathBuf>,
    /// Write the report: .html, .md or .json
    #[arg(long = "report", value_name = "FILE")]
    pub reports: Vec<PathBuf>,
    /// Print the report as JSON
    #[arg(long)]
    pub json: bool,
    /// Put every item's predictions into JSON
    #[arg(long)]
    pub items: bool,
    /// Write the items each model got wrong: text, label, prediction, score
    #[arg(long, value_name = "FILE")]
    pub bad_cases: Option<PathBuf>,
    /// Folder to keep answers in
    #[arg(long, value_name = "DIR")]
    pub work: Option<PathBuf>,
    /// Go on with the answers of an interrupted run
    #[arg(long)]
    pub resume: bool,
    /// Take artifacts and others' models without checking their digests and codes first
    #[arg(long)]
    pub unverified: bool,
    /// Resamples of each bootstrap
    #[arg(long, value_name = "N", default_value_t = RESAMPLES)]
    pub resamples: usize,
    /// Say how many items and tokens there are and how long it will take, from a few items really asked
    #[arg(long)]
    pub dry_run: bool,
    /// Worker threads; 0 means one per core
    #[arg(short = 'j', long, default_value_t = 0)]
    pub threads: usize,
    /// No progress line
    #[arg(short, long)]
    pub quiet: bool,
}

impl Args {
    fn plan(&self, chosen: &Chosen) -> anyhow::Result<Plan> {
        let mut tasks = Vec::new();
        for text in &self.tasks {
            let (name, data) = task_and_data(text)?;
            tasks.push((name.to_owned(), self.ask.setup(name, data, true)?));
        }
        for report in &self.reports {
            ending(report)?;
        }
        if self.resume && self.work.is_none() && self.reports.is_empty() {
            anyhow::bail!(
                "--resume: answers are kept only with --work DIR or --report FILE; pass what the first run had"
            );
        }
        Ok(Plan {
            models: self
                .models
                .iter()
                .cloned()
                .map(Place::Folder)
                .chain(self.server.places())
                .collect(),
            tasks,
            seed: self.ask.seed,
            resamples: self.resamples,
            items: self.items,
            unverified: self.unverified,
            work: self.work.clone().or_else(|| validate::work_beside(&self.reports)),
            resume: self.resume,
            show_progress: wants_progress(self.json, self.quiet),
            device: chosen.device.name(),
            device_reason: chosen.reason.clone(),
            device_identity: chosen.device.identity(),
        })
    }

    fn limits(&self, plan: &Plan) -> anyhow::Result<Vec<Limit>> {
        let mut limits = Vec::new();
        for text in &self.max_drop {
            limits.push(Limit::max_drop(text)?);
        }
        limits.extend(self.max_kl.map(Limit::max_kl).transpose()?);
        limits.extend(self.min_agreement.map(Limit::min_agreement).transpose()?);
        if let Some(path) = &self.policy {
            limits.extend(policy::read(path)?);
        }
        let running: Vec<&str> = plan.tasks.iter().map(|(name, _)| name.as_str()).collect();
        policy::check_tasks(&limits, &running)?;
        if !limits.is_empty() && plan.models.len() < 2 {
            anyhow::bail!(
                "limits are held against candidates, and there is only a base; give a model after it"
            );
        }
        Ok(limits)
    }

    /// Runs the tasks.
    pub fn run(&self) -> anyhow::Result<i32> {
        let chosen = self.device.choose_if(!self.models.is_empty())?;
        let plan = self.plan(&chosen)?;
        let limits = self.limits(&plan)?;
        if self.dry_run {
            return self.rehearse(&plan, &chosen);
        }
        let outcome = crate::quantize::with_threads(self.threads, || {
            validate::run(&plan, &|place| {
                self.server.open(place, &chosen.device, self.ask.seed)
            })
        })?;
        let mut report = outcome.report;
        let labels: Vec<String> = report.models.iter().map(|m| m.label.clone()).collect();
        report.verdict = verdict::judge(&limits, &labels, &report.tasks)?;
        for path in &self.reports {
            outputs::write(path, rendered(&report, path)?.as_bytes())?;
        }
        if let Some(path) = &self.bad_cases {
            let several = plan.tasks.len() > 1;
            for (task, label, cases) in &outcome.bad_cases {
                let path = outputs::bad_case_path(path, several.then_some(task), label);
                outputs::bad_cases(&path, cases)?;
            }
        }
        if self.json {
            print(&json::render(&report))?;
        } else {
            print(&text::render(&report, look()))?;
            for path in &self.reports {
                print(&format!("{} {}\n", style("wrote").green().bold(), path.display()))?;
            }
        }
        // Given folders stay: their answers serve another run with other limits.
        if let Some(journal) = outcome.journal.filter(|_| self.work.is_none()) {
            journal.remove()?;
        }
        Ok(report.verdict.map_or(0, |v| v.outcome.exit_status()))
    }

    fn rehearse(&self, plan: &Plan, chosen: &Chosen) -> anyhow::Result<i32> {
        let found = crate::quantize::with_threads(self.threads, || {
            rehearsal::run(plan, &|place| {
                self.server.open(place, &chosen.device, self.ask.seed)
            })
        })?;
        if self.json {
            print_json(&found)?;
            return Ok(0);
        }
        let mut all = 0.0;
        for task in &found {
            let tokens = task
                .tokens
                .map_or(String::new(), |t| format!(", {} tokens", size::count(t)));
            let times: Vec<String> = task
                .seconds
                .iter()
                .map(|(label, s)| {
                    format!(
                        "{label} {}",
                        size::seconds(std::time::Duration::from_secs_f64(*s))
                    )
                })
                .collect();
            all += task.seconds.iter().map(|(_, s)| s).sum::<f64>();
            print(&format!(
                "{}: {} items, {} questions a model{tokens}; about {}\n",
                style(&task.task).bold(),
                size::count(task.items as u64),
                size::count(task.questions as u64),
                times.join(", ")
            ))?;
        }
        print(&super::device::line(chosen))?;
        let all = size::seconds(std::time::Duration::from_secs_f64(all));
        print(&format!(
            "about {all} in all, from {} questions of each task asked of each model; nothing was written\n",
            rehearsal::SAMPLE
        ))?;
        Ok(0)
    }
}

/// Form of a report, by its file's ending.
fn ending(path: &Path) -> anyhow::Result<&'static str> {
    let ending = path.extension().map(|e| e.to_string_lossy().to_lowercase());
    match ending.as_deref() {
        Some("html") => Ok("html"),
        Some("md") => Ok("md"),
        Some("json") => Ok("json"),
        _ => anyhow::bail!(
            "--report {}: expected a file that ends in .html, .md or .json",
            path.display()
        ),
    }
}

fn rendered(report: &Report, path: &Path) -> anyhow::Result<String> {
    Ok(match ending(path)? {
        "html" => html::render(report),
        "md" => markdown::render(report),
        _ => json::render(report),
    })
}

/// As wide as the terminal; 100 columns in a file or pipe.
fn look() -> Look {
    let width = Term::stdout()
        .size_checked()
        .map(|(_, columns)| usize::from(columns));
    Look {
        width: width.unwrap_or_else(|| Look::default().width),
        colour: console::colors_enabled(),
    }
}
