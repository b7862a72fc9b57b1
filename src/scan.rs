//! Finding NaN and infinity in source tensors: where exactly, and (for `--non-finite keep`) which
//! tensors have any, before the plan is made.

use std::collections::BTreeSet;

use qtool_formats::checkpoint::Checkpoint;
use qtool_formats::{FloatDtype, TensorView};
use qtool_kernels::{Isa, absmax, first_non_finite};
use rayon::prelude::*;

use crate::blocks::widen;
use crate::{Result, interrupt};

/// Elements scanned at a time.
const CHUNK: usize = 64 << 10;

/// The first element of `bytes` that is NaN or infinite: its place and value.
pub fn first_bad(isa: Isa, dtype: FloatDtype, bytes: &[u8]) -> Option<(usize, f32)> {
    let mut values = vec![0f32; CHUNK.min(bytes.len() / dtype.bytes())];
    for (i, chunk) in bytes.chunks(CHUNK * dtype.bytes()).enumerate() {
        let values = &mut values[..chunk.len() / dtype.bytes()];
        widen(isa, dtype, chunk, values);
        if !absmax(isa, values).is_finite() {
            return first_non_finite(values).map(|at| (i * CHUNK + at, values[at]));
        }
    }
    None
}

/// The index of flat element `at` in a tensor of this shape.
pub fn unravel(shape: &[usize], mut at: usize) -> Vec<usize> {
    let mut index: Vec<usize> = shape
        .iter()
        .rev()
        .map(|&dim| {
            let i = at % dim.max(1);
            at /= dim.max(1);
            i
        })
        .collect();
    index.reverse();
    index
}

/// Names of the float tensors that hold a NaN or an infinity. Reads every float tensor once.
pub fn tensors_with_non_finite(isa: Isa, checkpoint: &Checkpoint) -> Result<BTreeSet<String>> {
    let tensors = checkpoint.tensors().collect::<Result<Vec<TensorView<'_>>, _>>()?;
    tensors
        .par_iter()
        .filter_map(|tensor| {
            let dtype = tensor.float_dtype()?;
            if let Err(stop) = interrupt::check() {
                return Some(Err(stop));
            }
            first_bad(isa, dtype, tensor.bytes()).map(|_| Ok(tensor.name().to_owned()))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_place() {
        let mut bytes: Vec<u8> = Vec::new();
        (0..70_000).for_each(|i| FloatDtype::Bf16.push(if i == 69_999 { f32::NAN } else { 1.0 }, &mut bytes));
        let (at, value) = first_bad(Isa::best(), FloatDtype::Bf16, &bytes).unwrap();
        assert_eq!(at, 69_999);
        assert!(value.is_nan());
        assert_eq!(unravel(&[7, 100, 100], at), [6, 99, 99]);
        assert_eq!(first_bad(Isa::best(), FloatDtype::F32, &[0; 8]), None);
    }
}
