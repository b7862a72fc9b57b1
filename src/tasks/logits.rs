//! What BF16 would make of a logit, and what is kept of two models' logits of one window.

use qtool_kernels::backend::Divergence;

use super::answers::WindowDivergence;

impl WindowDivergence {
    /// Of the scored tokens of a window, in their order.
    pub fn of(rows: &[Option<Divergence>]) -> Self {
        let mut all = Self::default();
        for row in rows {
            match row {
                Some(row) => {
                    all.kl.push(row.kl as f32);
                    all.delta_p.push(row.delta_p as f32);
                    all.agreed += u64::from(row.agreed);
                }
                None => all.non_finite += 1,
            }
        }
        all
    }
}

/// The nearest BF16, ties to even.
pub fn bf16(value: f32) -> f32 {
    let bits = value.to_bits();
    if !value.is_finite() {
        return value;
    }
    f32::from_bits((bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff_0000)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_by_hand() {
        let row = |kl, agreed| {
            Some(Divergence {
                kl,
                delta_p: -kl / 2.0,
                agreed,
            })
        };
        let found = WindowDivergence::of(&[row(0.5, true), None, row(0.25, false)]);
        assert_eq!(found.kl, [0.5, 0.25]);
        assert_eq!(found.delta_p, [-0.25, -0.125]);
        assert_eq!((found.agreed, found.non_finite), (1, 1));
        assert_eq!(WindowDivergence::of(&[]), WindowDivergence::default());
    }

    #[test]
    fn bf16_as_the_half_crate_rounds() {
        for value in [
            0.0,
            -1.0,
            1.003_906_2,
            1.011_718_8,
            2.345_6,
            -1e-30,
            3.3e38,
            f32::INFINITY,
        ] {
            let expected = half::bf16::from_f32(value).to_f32();
            assert_eq!(bf16(value), expected, "{value}");
        }
    }
}
