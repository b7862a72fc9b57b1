//! The 256 levels of bitsandbytes' dynamic 8-bit type, which quantizes scales: numbers whose exponent of ten takes as many
//! bits as it needs, and whose fraction has the rest.
//!
//! Above zero, for `e` from 0 to 6, lie the middles of `2^e` equal steps from `0.1 * 10^(e - 6)` to `10^(e - 6)`; below
//! zero their mirror images; and then there are zero and one. The constants are the library's own results in f32.
//!
//! Source: 8-Bit Approximations for Parallelism in Deep Learning (arXiv 1511.04561); `create_dynamic_map` of
//! bitsandbytes' `functional.py`.

/// The code of zero.
pub const ZERO: u8 = 127;

/// The levels, ascending.
#[expect(
    clippy::indexing_slicing,
    reason = "worked out by the compiler, which refuses an index that is out of bounds"
)]
pub const MAP: [f32; 256] = {
    let mut map = [0.0; 256];
    let mut i = 0;
    while i < ABOVE.len() {
        map[128 + i] = ABOVE[i];
        map[126 - i] = -ABOVE[i];
        i += 1;
    }
    map[255] = 1.0;
    map
};

/// Those between zero and one.
const ABOVE: [f32; 127] = [
    5.500_000_4e-7,
    3.250_000_2e-6,
    7.75e-6,
    2.124_999_8e-5,
    4.375e-5,
    6.625e-5,
    8.875e-5,
    0.000_156_250_01,
    0.000_268_750_04,
    0.000_381_250_02,
    0.000_493_750_03,
    0.000_606_250_1,
    0.000_718_750_06,
    0.000_831_25,
    0.000_943_750_1,
    0.001_281_249_9,
    0.001_843_75,
    0.002_406_25,
    0.002_968_75,
    0.003_531_249_7,
    0.004_093_75,
    0.004_656_249_7,
    0.005_218_750_3,
    0.005_781_25,
    0.006_343_75,
    0.006_906_25,
    0.007_468_75,
    0.008_031_25,
    0.008_593_75,
    0.009_156_249,
    0.009_718_75,
    0.011_406_25,
    0.014_218_75,
    0.017_031_25,
    0.019_843_752,
    0.022_656_25,
    0.025_468_75,
    0.028_281_251,
    0.031_093_75,
    0.033_906_25,
    0.036_718_752,
    0.039_531_25,
    0.042_343_747,
    0.045_156_25,
    0.047_968_75,
    0.050_781_25,
    0.053_593_75,
    0.056_406_25,
    0.059_218_753,
    0.062_031_25,
    0.064_843_75,
    0.067_656_256,
    0.070_468_746,
    0.073_281_25,
    0.076_093_75,
    0.078_906_25,
    0.081_718_76,
    0.084_531_25,
    0.087_343_75,
    0.090_156_25,
    0.092_968_754,
    0.095_781_26,
    0.098_593_75,
    0.107_031_256,
    0.121_093_75,
    0.135_156_24,
    0.149_218_75,
    0.163_281_25,
    0.177_343_76,
    0.191_406_25,
    0.205_468_74,
    0.219_531_25,
    0.233_593_75,
    0.247_656_24,
    0.261_718_75,
    0.275_781_27,
    0.289_843_74,
    0.303_906_26,
    0.317_968_73,
    0.332_031_25,
    0.346_093_74,
    0.360_156_24,
    0.374_218_76,
    0.388_281_23,
    0.402_343_75,
    0.416_406_24,
    0.430_468_74,
    0.444_531_26,
    0.458_593_73,
    0.472_656_25,
    0.486_718_7,
    0.500_781_24,
    0.514_843_7,
    0.528_906_2,
    0.542_968_75,
    0.557_031_3,
    0.571_093_8,
    0.585_156_26,
    0.599_218_7,
    0.613_281_25,
    0.627_343_8,
    0.641_406_3,
    0.655_468_76,
    0.669_531_2,
    0.683_593_75,
    0.697_656_3,
    0.711_718_8,
    0.725_781_26,
    0.739_843_7,
    0.753_906_25,
    0.767_968_8,
    0.782_031_24,
    0.796_093_76,
    0.810_156_2,
    0.824_218_75,
    0.838_281_3,
    0.852_343_74,
    0.866_406_26,
    0.880_468_7,
    0.894_531_25,
    0.908_593_8,
    0.922_656_24,
    0.936_718_76,
    0.950_781_2,
    0.964_843_75,
    0.978_906_3,
    0.992_968_74,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_the_middles_of_the_text() {
        let mut above = Vec::new();
        for e in 0..7 {
            let steps = f64::from(1u32 << e);
            let middle = |i: u32| (0.1 + 0.9 * (f64::from(i) + 0.5) / steps) * 10f64.powi(e - 6);
            above.extend((0..1u32 << e).map(middle));
        }
        for (level, exact) in ABOVE.iter().zip(&above) {
            assert!(
                (f64::from(*level) - exact).abs() < exact * 3e-7,
                "{level} {exact}"
            );
        }
        assert_eq!(above.len(), ABOVE.len());
        assert!(MAP.windows(2).all(|w| w[0] < w[1]));
        assert_eq!(
            (MAP[usize::from(ZERO)], MAP[255], MAP[0]),
            (0.0, 1.0, -ABOVE[126])
        );
    }
}
