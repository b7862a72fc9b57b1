//! Which instruction set an operation runs on. Owns detection and the single `match` that enters a loop;
//! the loops themselves are elsewhere. An [`Isa`] carries the proof that this machine has what it names, so
//! it can be passed around freely and used without further checks.

use super::simd::{Kernel, Vector, portable::Portable};
#[cfg(target_arch = "x86_64")]
use super::simd::{avx2::Avx2, avx512::Avx512};
use std::fmt;

/// The name of an instruction set, whether or not this machine has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum IsaKind {
    /// Plain Rust over arrays of 16; always there.
    Portable,
    /// x86-64 with AVX2, FMA and F16C: a vector is two registers of 8.
    Avx2,
    /// x86-64 with AVX-512 F, BW, DQ and VL, and FMA: a vector is one register of 16.
    Avx512,
}

impl IsaKind {
    /// Every kind, slowest first.
    pub const ALL: [IsaKind; 3] = [IsaKind::Portable, IsaKind::Avx2, IsaKind::Avx512];

    /// Lower-case name for reports: `portable`, `avx2`, `avx512`.
    pub fn name(self) -> &'static str {
        match self {
            IsaKind::Portable => "portable",
            IsaKind::Avx2 => "avx2",
            IsaKind::Avx512 => "avx512",
        }
    }
}

/// An instruction set that this machine has been seen to have.
///
/// Made only by [`Isa::new`], [`Isa::best`] and [`Isa::available`]. Quantization gives the same bits on all of
/// them, so there the choice is one of speed alone; the forward pass of models differs by rounding.
#[derive(Clone, Copy)]
pub struct Isa(Proof);

#[derive(Clone, Copy)]
enum Proof {
    Portable(Portable),
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512),
}

impl Isa {
    /// The given instruction set, or `None` if this machine or this build lacks it.
    pub fn new(kind: IsaKind) -> Option<Isa> {
        match kind {
            IsaKind::Portable => Some(Isa(Proof::Portable(Portable))),
            #[cfg(target_arch = "x86_64")]
            IsaKind::Avx2 => Avx2::detect().map(|token| Isa(Proof::Avx2(token))),
            #[cfg(target_arch = "x86_64")]
            IsaKind::Avx512 => Avx512::detect().map(|token| Isa(Proof::Avx512(token))),
            #[cfg(not(target_arch = "x86_64"))]
            IsaKind::Avx2 | IsaKind::Avx512 => None,
        }
    }

    /// The fastest instruction set of this machine. Detection is done once per process.
    pub fn best() -> Isa {
        let wide = Isa::new(IsaKind::Avx512).or_else(|| Isa::new(IsaKind::Avx2));
        wide.unwrap_or(Isa(Proof::Portable(Portable)))
    }

    /// Every instruction set of this machine, slowest first; never empty.
    pub fn available() -> Vec<Isa> {
        IsaKind::ALL.into_iter().filter_map(Isa::new).collect()
    }

    /// Which one this is.
    pub fn kind(self) -> IsaKind {
        match self.0 {
            Proof::Portable(_) => IsaKind::Portable,
            #[cfg(target_arch = "x86_64")]
            Proof::Avx2(_) => IsaKind::Avx2,
            #[cfg(target_arch = "x86_64")]
            Proof::Avx512(_) => IsaKind::Avx512,
        }
    }

    /// Runs one loop compiled for this instruction set.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self.0 {
            Proof::Portable(token) => token.enter(kernel),
            #[cfg(target_arch = "x86_64")]
            Proof::Avx2(token) => token.enter(kernel),
            #[cfg(target_arch = "x86_64")]
            Proof::Avx512(token) => token.enter(kernel),
        }
    }
}

impl PartialEq for Isa {
    fn eq(&self, other: &Isa) -> bool {
        self.kind() == other.kind()
    }
}

impl Eq for Isa {}

impl fmt::Debug for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Isa({})", self.kind().name())
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind().name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn portable_is_always_there_and_best_is_the_last_available() {
        let available = Isa::available();
        assert_eq!(available[0].kind(), IsaKind::Portable);
        assert_eq!(available.last(), Some(&Isa::best()));
        for isa in available {
            assert_eq!(Isa::new(isa.kind()), Some(isa));
        }
    }
}
