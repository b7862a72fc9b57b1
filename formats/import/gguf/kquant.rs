//! Blocks of Q4_K and Q2_K as weights of the schemes `q4-k` and `q2-k`: the same codes, scales and minima of few bits, and two
//! F16 numbers a block, so that nothing is decoded to floats.

use half::f16;

use super::blocks::{Runs, run, scale_and_minimum};
use crate::import::Decoded;
use crate::scheme::KQuant;
use crate::weight::kquant::KScales;
use crate::weight::{KWeight, QuantizedWeight};
use crate::{FormatError, Result};

/// Decodes `n` rows of `k` weights. Fails when a number of a block is not finite.
pub(super) fn decode(kind: KQuant, n: usize, k: usize, bytes: &[u8]) -> Result<Decoded> {
    let mut runs = Runs::with_capacity(n * k, 0);
    let mut numbers = KScales::default();
    let length = match kind {
        KQuant::Q4 => 144,
        KQuant::Q2 => 84,
    };
    for block in bytes.chunks_exact(length) {
        let halves = match kind {
            KQuant::Q4 => {
                for j in 0..8 {
                    let (scale, minimum) = scale_and_minimum(run(block, 4, 12), j);
                    numbers.scales.push(scale);
                    numbers.mins.push(minimum);
                }
                run(block, 16, 128)
                    .chunks_exact(32)
                    .for_each(|bytes| runs.nibbles(bytes));
                run(block, 0, 4)
            }
            KQuant::Q2 => {
                for byte in run(block, 0, 16) {
                    numbers.scales.push(byte & 15);
                    numbers.mins.push(byte >> 4);
                }
                runs.pairs(run(block, 16, 64));
                run(block, 80, 4)
            }
        };
        for (half, into) in halves
            .as_chunks::<2>()
            .0
            .iter()
            .zip([&mut numbers.super_scales, &mut numbers.super_mins])
        {
            into.push(f16::from_le_bytes(*half));
        }
    }
    let halves = numbers.super_scales.iter().chain(&numbers.super_mins);
    if let Some(bad) = halves.copied().find(|half| !half.is_finite()) {
        return Err(FormatError::Weight {
            what: "scale of a block",
            expected: "a finite number".to_owned(),
            got: bad.to_string(),
        });
    }
    let weight = KWeight::new(kind, n, k, runs.codes, numbers)?;
    Ok(Decoded::Weight(QuantizedWeight::K(weight)))
}
