//! `qtool device`: the device that would be used and why, and with --check, --compare and --bench, what it is worth.

use std::path::PathBuf;

use clap::ValueEnum;
use console::style;
use qtool_kernels::CudaBackend;
use serde_json::{Map, json};

use super::device::DeviceArgs;
use super::{FOUND, print, print_json, size};
use crate::device::check::{self, Size};
use crate::device::{Chosen, Device, bench, compare};
use crate::table::Table;

/// Least share of tokens whose likeliest continuation is the same on both devices.
const LEAST_SAME: f64 = 0.999;
/// Most nats a token between them.
const MOST_KL: f64 = 1e-4;

/// What was typed.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Without options it says which device `--device auto` takes, and why.

Examples:
  qtool device
  qtool device --check                     every operation against the processor, at the sizes of real models
  qtool device --compare MODEL OUT         the same predictions on both devices?
  qtool device --bench                     copies, products and second moments, timed by the device

Exit status: 0 done, 1 a check or a comparison does not hold, 2 error.")]
pub struct Args {
    #[command(flatten)]
    device: DeviceArgs,
    /// Compare every operation with the processor's
    #[arg(long)]
    check: bool,
    /// Compare what these models and artifacts predict with what they predict on the processor
    #[arg(long, value_name = "MODEL", num_args = 1..)]
    compare: Vec<PathBuf>,
    /// Tokens of --compare
    #[arg(long, value_name = "N", default_value_t = 2000)]
    tokens: usize,
    /// Time copies and kernels
    #[arg(long)]
    bench: bool,
    /// Sizes of --check and --bench
    #[arg(long, value_enum, default_value_t = SizeArg::Real)]
    size: SizeArg,
    /// Print the outcome as JSON
    #[arg(long)]
    json: bool,
}

/// `--size`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum SizeArg {
    /// Those of real models
    Real,
    /// Small ones, for a driver library that runs kernels on the processor: figures mean nothing
    Toy,
}

impl Args {
    /// Finds the device and puts it to the test.
    pub fn run(&self) -> anyhow::Result<i32> {
        let chosen = self.device.choose()?;
        let asked = self.check || self.bench || !self.compare.is_empty();
        let gpu = match &chosen.device {
            Device::Cuda(gpu) => gpu,
            Device::Cpu(_) if asked => anyhow::bail!(
                "--check, --compare and --bench need a GPU: {}",
                chosen.reason.as_deref().unwrap_or("--device cpu was passed")
            ),
            Device::Cpu(_) => {
                self.tell(&chosen, Map::new(), "")?;
                return Ok(0);
            }
        };
        let size = match self.size {
            SizeArg::Real => Size::Real,
            SizeArg::Toy => Size::Toy,
        };
        let (mut found, mut text, mut held) = (Map::new(), String::new(), true);
        if self.check {
            let checks = crate::quantize::with_threads(0, || check::run(gpu, size))?;
            held &= checks.iter().all(|check| check.passed);
            text += &check_table(&checks);
            found.insert("checks".to_owned(), json!(checks));
        }
        if !self.compare.is_empty() {
            let run = |folder: &PathBuf| compare::run(gpu, folder, self.tokens);
            let all = crate::quantize::with_threads(0, || {
                self.compare.iter().map(run).collect::<crate::Result<Vec<_>>>()
            })?;
            held &= all
                .iter()
                .all(|c| c.compared > 0 && c.same >= LEAST_SAME && c.mean_kl < MOST_KL);
            text += &comparison_table(&all);
            found.insert("comparisons".to_owned(), json!(all));
        }
        if self.bench {
            let figures = crate::quantize::with_threads(0, || bench::run(gpu, size))?;
            text += &bench_table(&figures);
            found.insert("bench".to_owned(), json!(figures));
        }
        found.insert("toy".to_owned(), json!(size == Size::Toy));
        self.tell(&chosen, found, &text)?;
        Ok(if held { 0 } else { FOUND })
    }

    fn tell(
        &self,
        chosen: &Chosen,
        mut found: Map<String, serde_json::Value>,
        text: &str,
    ) -> anyhow::Result<()> {
        let gpu = match &chosen.device {
            Device::Cuda(gpu) => Some(gpu),
            Device::Cpu(_) => None,
        };
        let memory = gpu.map(|gpu| gpu.device().memory());
        if self.json {
            found.insert("device".to_owned(), json!(chosen.device.name()));
            found.insert("device_reason".to_owned(), json!(chosen.reason));
            found.insert("budget_bytes".to_owned(), json!(memory.map(|m| m.budget)));
            found.insert("most_bytes".to_owned(), json!(memory.map(|m| m.most)));
            if let Some(gpu) = gpu {
                found.insert("bf16_products".to_owned(), json!(products(gpu)));
                found.insert("warpgroups".to_owned(), json!(warpgroups(gpu)));
            }
            return print_json(&found);
        }
        let reason = chosen
            .reason
            .as_ref()
            .map_or(String::new(), |why| format!(": {why}"));
        let budget = memory.map_or(String::new(), |m| {
            format!(", may use {}", size::bytes(m.budget as u64))
        });
        let by = gpu.map_or(String::new(), |gpu| {
            format!(
                "Plain BF16 products with --device-precision bf16: {}\nProducts with bf16-warpgroups: {}\n",
                products(gpu),
                warpgroups(gpu)
            )
        });
        print(&format!(
            "{}{budget}{reason}\n{by}{text}",
            style(chosen.device.name()).bold()
        ))
    }
}

/// What multiplies by plain BF16 weights on tensor cores.
fn products(gpu: &CudaBackend) -> String {
    match gpu.library() {
        Ok(library) => library,
        Err(why) => format!("own kernel; {why}"),
    }
}

/// Whether products of warpgroups can be used.
fn warpgroups(gpu: &CudaBackend) -> String {
    match gpu.warpgroups() {
        Ok(()) => "usable".to_owned(),
        Err(why) => format!("not used; {why}"),
    }
}

fn word(holds: bool) -> String {
    if holds { "holds" } else { "FAILS" }.to_owned()
}

fn check_table(checks: &[check::Check]) -> String {
    let mut table = Table::new(&["operation", ">largest difference", ">bound", "outcome"]);
    for check in checks {
        table.row([
            check.what.clone(),
            format!("{:.1e}", check.error),
            format!("{:.0e}", check.bound),
            word(check.passed),
        ]);
    }
    table.render() + "\n"
}

fn comparison_table(all: &[compare::Comparison]) -> String {
    let mut table = Table::new(&[
        "model",
        ">compared",
        ">mean KL",
        ">largest KL",
        ">same prediction",
        "outcome",
    ]);
    for c in all {
        table.row([
            c.model.clone(),
            c.compared.to_string(),
            format!("{:.1e}", c.mean_kl),
            format!("{:.1e}", c.largest_kl),
            format!("{:.3} %", c.same * 100.0),
            word(c.compared > 0 && c.same >= LEAST_SAME && c.mean_kl < MOST_KL),
        ]);
    }
    table.render() + "\n"
}

fn bench_table(figures: &[bench::Figure]) -> String {
    let mut table = Table::new(&["what", ">time", ">rate", ">of the yardstick"]);
    for figure in figures {
        table.row([
            figure.what.clone(),
            format!("{:.1} us", figure.seconds * 1e6),
            format!("{:.3} T{}", figure.rate / 1e12, figure.unit),
            figure
                .share
                .map_or("-".to_owned(), |share| format!("{:.0} %", share * 100.0)),
        ]);
    }
    table.render() + "\n"
}
