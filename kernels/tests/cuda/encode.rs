//! The sums behind the codes that a device chooses, bit for bit. Codes alone do not tell in which order errors were added:
//! two candidates are seldom so close that it decides. The sums do, on numbers like these in nearly every group.

use qtool_formats::FloatDtype;
use qtool_kernels::cuda::Encoder;
use qtool_kernels::cuda::encode::{AffineJob, Rows};
use qtool_kernels::{Candidate, Isa, clip_errors, clip_errors_weighted};

use crate::{both, numbers};

/// Squares of errors as the kernel forms them, added in lanes and then in a tree of these steps.
fn summed(x: &[f32], weights: Option<&[f32]>, c: &Candidate, steps: [usize; 4]) -> f32 {
    let mut lanes = [0f32; 16];
    for (k, x) in x.iter().enumerate() {
        let step = (x * c.inv_scale)
            .round_ties_even()
            .clamp(c.lo - c.zero, c.hi - c.zero);
        let error = x - step * c.scale;
        lanes[k % 16] += error * error * weights.map_or(1.0, |w| w[k]);
    }
    for step in steps {
        lanes = std::array::from_fn(|i| lanes[i] + lanes[i ^ step]);
    }
    lanes[0]
}

#[test]
fn errors_are_summed_in_the_processors_order() {
    let Some((gpu, _)) = both("errors_are_summed_in_the_processors_order") else {
        return;
    };
    let encoder = Encoder::new(gpu.shared_device());
    let (coarse, fine) = ([1.0, 0.97, 0.93, 0.86, 0.8], [0.99, 1.01]);
    let (mut compared, mut telling) = (0, 0);
    for len in [1usize, 2, 15, 16, 17, 31, 32, 33, 64, 100, 128, 131, 640] {
        for (zero, range) in [(Some(8), (0, 15)), (None, (0, 15)), (Some(128), (1, 255))] {
            let (n, groups) = (3, 4);
            let k = groups * len;
            let x = numbers(len as u64, n * k);
            let importance: Vec<f32> = numbers(7, k).iter().map(|d| d.abs() * 3.0 + 1e-3).collect();
            for weights in [None, Some(importance.as_slice())] {
                let job = AffineJob {
                    group: len,
                    range,
                    zero,
                    scale: FloatDtype::F32,
                    steps: f32::from(range.1 - zero.unwrap_or(0)),
                    coarse: &coarse,
                    fine: &fine,
                    reach: [1, 1],
                    importance: weights,
                };
                let found = encoder.affine(Rows::Values(&x), n, k, &job).unwrap();
                assert_eq!(found.errors.len(), n * groups);
                for (g, group) in x.chunks_exact(len).enumerate() {
                    let scale = found.scales[g];
                    let candidate = Candidate {
                        scale,
                        inv_scale: 1.0 / scale,
                        zero: f32::from(found.zeros[g]),
                        lo: f32::from(range.0),
                        hi: f32::from(range.1),
                    };
                    let mut error = [0.0];
                    let of_group = weights.map(|w| &w[g % groups * len..][..len]);
                    match of_group {
                        None => clip_errors(Isa::best(), group, &[candidate], &mut error),
                        Some(w) => clip_errors_weighted(Isa::best(), group, w, &[candidate], &mut error),
                    }
                    let what = format!("groups of {len}, group {g}, weighted {}", weights.is_some());
                    assert_eq!(found.errors[g].to_bits(), error[0].to_bits(), "{what}");
                    assert_eq!(
                        error[0],
                        summed(group, of_group, &candidate, [8, 4, 2, 1]),
                        "{what}"
                    );
                    compared += 1;
                    // The same numbers added otherwise: were the device to do so, it would be seen.
                    telling += usize::from(error[0] != summed(group, of_group, &candidate, [1, 2, 4, 8]));
                }
            }
        }
    }
    assert_eq!(compared, 13 * 3 * 2 * 12);
    assert!(
        telling * 4 > compared,
        "{telling} of {compared} tell orders apart"
    );
}
