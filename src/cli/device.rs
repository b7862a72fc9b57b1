//! `--device`, as several commands take it, and the line that says where work was done.

use clap::ValueEnum;
use console::style;
use qtool_kernels::cuda::{MemoryUse, Precision};

use super::size;
use crate::device::{self, Chosen, Device, Wanted};

/// `--device-precision`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PrecisionArg {
    /// As on the processor
    F32,
    /// Factors rounded to bf16, sums in f32
    Bf16,
    /// The same by instructions that compute capability 9.0 alone has; no GPU has run these yet
    Bf16Warpgroups,
}

/// What was typed.
#[derive(Debug, Clone, clap::Args)]
pub struct DeviceArgs {
    /// Where models run: auto (a GPU if one can be used), cpu, or cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value_t = Wanted::Auto, help_heading = "Device")]
    device: Wanted,
    /// Most GPU memory to use, such as 8GiB; weights that do not fit are brought in when they are used [default: nine tenths of what is free]
    #[arg(long, value_name = "SIZE", value_parser = size::parse, help_heading = "Device")]
    device_memory: Option<u64>,
    /// How a GPU multiplies many rows: f32, or bf16 on tensor cores, which is faster and moves scores a little
    #[arg(long, value_enum, default_value_t = PrecisionArg::F32, value_name = "TYPE", help_heading = "Device")]
    device_precision: PrecisionArg,
}

impl DeviceArgs {
    /// Finds the device. Fails when a GPU was asked for by name and cannot be used.
    pub fn choose(&self) -> crate::Result<Chosen> {
        device::choose(
            self.device,
            self.device_memory,
            match self.device_precision {
                PrecisionArg::F32 => Precision::F32,
                PrecisionArg::Bf16 => Precision::Bf16,
                PrecisionArg::Bf16Warpgroups => Precision::Bf16Warpgroups,
            },
        )
    }

    /// The device for a command that may not need one: without use for it, only a GPU asked for by name is looked for.
    pub fn choose_if(&self, needed: bool) -> crate::Result<Chosen> {
        if needed || matches!(self.device, Wanted::Cuda(_)) {
            self.choose()
        } else {
            Ok(Chosen::default())
        }
    }
}

/// A line for people: the device, why it is this one, and what of its memory was used.
pub fn line(chosen: &Chosen) -> String {
    let reason = chosen
        .reason
        .as_ref()
        .map_or(String::new(), |why| format!(": {why}"));
    let memory = match &chosen.device {
        Device::Cpu(_) => String::new(),
        Device::Cuda(gpu) => used(&gpu.device().memory()),
    };
    format!(
        "{} {}{memory}{reason}\n",
        style("Ran on").green().bold(),
        chosen.device.name()
    )
}

fn used(memory: &MemoryUse) -> String {
    let fetched = match memory.fetched {
        0 => String::new(),
        times => format!("; not all weights fit, {times} times one was brought in"),
    };
    format!(
        ", {} of the {} of GPU memory it may use{fetched}",
        size::bytes(memory.most as u64),
        size::bytes(memory.budget as u64)
    )
}
