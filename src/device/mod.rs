//! Which device models run on. Owns the choice (what was asked for, what there is, and the sentence that says why),
//! and the names a device goes by in reports and records.
//!
//! | Page | Question |
//! |---|---|
//! | [`check`] | is what a GPU computes right? |
//! | [`compare`] | does a model say the same on both devices? |
//! | [`mod@bench`] | how fast is it? |
//! | [`encoding`] | which codes can be chosen there? |
//!
//! Artifacts do not record the device. Codes chosen from weights alone, or from a folder of statistics, are the same
//! whichever is chosen; what a forward pass gave may differ in its last bits, so a run that is gone on with must stay on
//! its kind of device ([`Device::identity`]).

pub mod bench;
pub mod check;
pub mod compare;
pub mod encoding;

use std::fmt;
use std::str::FromStr;

use qtool_kernels::cuda::{self, Precision, Unavailable};
use qtool_kernels::{CpuBackend, CudaBackend, Isa};

use crate::{Error, Result};

/// What was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Wanted {
    /// The first GPU that can be used, or else the processor.
    #[default]
    Auto,
    /// The processor.
    Cpu,
    /// The GPU of this number, and nothing else.
    Cuda(usize),
}

impl FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|number| number.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| "expected auto, cpu, cuda, or cuda:N with the number of a GPU".to_owned()),
        }
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(number) => write!(f, "cuda:{number}"),
        }
    }
}

/// A device, ready.
#[derive(Debug, Clone)]
pub enum Device {
    /// The processor.
    Cpu(CpuBackend),
    /// A GPU.
    Cuda(CudaBackend),
}

impl Default for Device {
    fn default() -> Self {
        Self::Cpu(CpuBackend::new(Isa::best()))
    }
}

impl Device {
    /// As people read it: `cpu (avx512)`, `cuda:0 (NVIDIA H200)`, `cuda:0 (NVIDIA H200, bf16 products)`.
    pub fn name(&self) -> String {
        match self {
            Self::Cpu(_) => format!("cpu ({})", Isa::best().kind().name()),
            Self::Cuda(gpu) => {
                let device = gpu.device();
                format!("cuda:{} ({}{})", device.ordinal(), device.name(), rounding(gpu))
            }
        }
    }

    /// What must be the same for a run to be gone on with: the processor, or the GPU's model.
    pub fn identity(&self) -> String {
        match self {
            Self::Cpu(_) => "cpu".to_owned(),
            Self::Cuda(gpu) => format!("cuda ({}{})", gpu.device().name(), rounding(gpu)),
        }
    }

    /// Whether it is the processor.
    pub fn is_cpu(&self) -> bool {
        matches!(self, Self::Cpu(_))
    }
}

/// A device, and why it is this one.
#[derive(Debug, Clone, Default)]
pub struct Chosen {
    /// The device.
    pub device: Device,
    /// Why it is the processor, where a GPU was looked for.
    pub reason: Option<String>,
}

/// Finds the device that was asked for; a GPU may use `memory` bytes, or nine tenths of what is free.
///
/// Fails when a GPU was asked for by number and cannot be used; `auto` then takes the processor and says why.
pub fn choose(wanted: Wanted, memory: Option<u64>, precision: Precision) -> Result<Chosen> {
    let number = match wanted {
        Wanted::Cpu => return Ok(Chosen::default()),
        Wanted::Auto => 0,
        Wanted::Cuda(number) => number,
    };
    let budget = memory.map(|bytes| usize::try_from(bytes).unwrap_or(usize::MAX));
    match (cuda::open(number, budget), wanted) {
        (Ok(device), _) => Ok(Chosen {
            device: Device::Cuda(CudaBackend::new(device).with_precision(precision)),
            reason: None,
        }),
        (Err(reason), Wanted::Auto) => Ok(Chosen {
            device: Device::default(),
            reason: Some(why(&reason)),
        }),
        (Err(reason), _) => Err(Error::NoGpu {
            wanted: wanted.to_string(),
            reason,
        }),
    }
}

fn rounding(gpu: &CudaBackend) -> &'static str {
    match gpu.precision() {
        Precision::F32 => "",
        Precision::Bf16 => ", bf16 products",
        Precision::Bf16Warpgroups => ", bf16 products by warpgroups",
    }
}

/// Why `auto` took the processor.
fn why(reason: &Unavailable) -> String {
    format!("no GPU is used: {reason}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_as_typed() {
        for (text, wanted) in [
            ("auto", Wanted::Auto),
            ("cpu", Wanted::Cpu),
            ("cuda", Wanted::Cuda(0)),
            ("cuda:3", Wanted::Cuda(3)),
        ] {
            assert_eq!(text.parse(), Ok(wanted));
            assert_eq!(wanted.to_string().parse(), Ok(wanted));
        }
        for bad in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "CPU"] {
            assert!(bad.parse::<Wanted>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_processor_needs_no_reason() {
        let chosen = choose(Wanted::Cpu, None, Precision::F32).unwrap();
        assert!(chosen.device.is_cpu() && chosen.reason.is_none());
        assert!(
            chosen.device.name().starts_with("cpu ("),
            "{}",
            chosen.device.name()
        );
    }
}
