//! The codewords of WINT2 by integers. The artifact's formula, floor(byte * slope + offset + 0.5) in rounded f32, takes four
//! operations a byte; for nearly every row a factor and an addend of 32 bits give the same codeword for each of the 256 bytes in one. Owns finding
//! them, and rows where there are none.

use std::sync::Arc;

use crate::backend::Storage;

/// Fraction bits of a codeword: the other 15 of a word are what windows are taken from.
const FRACTION: u32 = 17;
/// How far from the nearest factor others are looked at: 2^-13 of a codeword at most, for the last byte.
const BESIDE: i64 = 16;
/// Rows that a warp takes together: where one of them has no numbers, none has.
const ROWS: usize = 16;

/// Numbers (factor, addend) with `byte * factor + addend`, modulo 2^32 and shifted right by 17, equal to the lowest 15 bits of
/// floor(byte * slope + offset + 0.5) for every byte. `None` where a search over factors finds none: about one row in a thousand,
/// as sums near a whole number are rounded to either side.
fn integers(slope: f32, offset: f32) -> Option<(u32, u32)> {
    if !(-1e4..1e4).contains(&slope) || !(-1e6..1e6).contains(&offset) {
        return None;
    }
    let codes: [i64; 256] = std::array::from_fn(|byte| (byte as f32 * slope + offset + 0.5).floor() as i64);
    let near = (f64::from(slope) * f64::from(1u32 << FRACTION)).round() as i64;
    let (mut low, mut high) = (near - BESIDE, near + BESIDE);
    let mut factor = near;
    while low <= high {
        // What each byte leaves for the addend, and which bytes leave least.
        let (mut least, mut most) = ((i64::MIN, 0), (i64::MAX, 0));
        for (byte, code) in (0..).zip(codes) {
            let rest = byte * factor;
            least = least.max(((code << FRACTION) - rest, byte));
            most = most.min((((code + 1) << FRACTION) - rest, byte));
        }
        if least.0 < most.0 {
            // As many bits as there are: codewords are read modulo 2^15.
            let addend = least.0 + (most.0 - least.0) / 2;
            // Zero says that there are none.
            return (factor as u32 != 0).then_some((factor as u32, addend as u32));
        }
        // The room that bytes leave, as the factor grows, first widens and then narrows: a steeper line helps when the byte that
        // wants more lies further out.
        match least.1 > most.1 {
            true => low = factor + 1,
            false => high = factor - 1,
        }
        factor = low + (high - low) / 2;
    }
    None
}

/// `slopes` (N, f32) with N factors and N addends behind them; zeros for rows where there are none.
pub(super) fn with_integers(slopes: &[u8], offsets: &[u8]) -> Arc<dyn Storage> {
    let number = |x: &[u8]| f32::from_le_bytes([x[0], x[1], x[2], x[3]]);
    let lines: Vec<(f32, f32)> = slopes
        .chunks_exact(4)
        .map(number)
        .zip(offsets.chunks_exact(4).map(number))
        .collect();
    let (mut factors, mut addends) = (Vec::new(), Vec::new());
    for rows in lines.chunks(ROWS) {
        let found: Option<Vec<_>> = rows.iter().map(|row| integers(row.0, row.1)).collect();
        for (factor, addend) in found.unwrap_or_else(|| vec![(0, 0); rows.len()]) {
            factors.extend(factor.to_le_bytes());
            addends.extend(addend.to_le_bytes());
        }
    }
    Arc::new([slopes, &factors, &addends].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, low: f32, high: f32) -> Vec<f32> {
        let mut state = 7u64;
        let next = |_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            low + (high - low) * ((state >> 40) as f32 / 16_777_216.0)
        };
        (0..count).map(next).collect()
    }

    #[test]
    fn integers_give_every_codeword() {
        let (mut found, mut count) = (0, 0);
        for (slope, offset) in numbers(4000, -20.0, 127.0)
            .into_iter()
            .zip(numbers(4000, -500.0, 3000.0))
        {
            count += 1;
            let Some((factor, addend)) = integers(slope, offset) else {
                continue;
            };
            found += 1;
            for byte in 0..=255u8 {
                let code = u32::from(byte).wrapping_mul(factor).wrapping_add(addend) >> 17;
                let right = (f32::from(byte) * slope + offset + 0.5).floor() as i32;
                assert_eq!(code, right as u32 & 0x7fff, "{byte} of {slope}, {offset}");
            }
        }
        assert!(found * 100 >= count * 99, "{found} of {count}");
    }

    #[test]
    fn lines_beyond_them_have_none() {
        for (slope, offset) in [(0.0, 0.0), (2e4, 0.0), (f32::NAN, 0.0), (1.0, f32::INFINITY)] {
            assert_eq!(integers(slope, offset), None);
        }
        let bytes = |x: &[f32]| -> Vec<u8> { x.iter().flat_map(|x| x.to_le_bytes()).collect() };
        let mut slopes = vec![100.0f32; 20];
        slopes[3] = f32::NAN;
        let made = with_integers(&bytes(&slopes), &bytes(&[10.0; 20]));
        let words: Vec<u32> = made
            .bytes()
            .chunks_exact(4)
            .map(|x| u32::from_le_bytes([x[0], x[1], x[2], x[3]]))
            .collect();
        assert_eq!(words.len(), 60);
        assert!(words[20..36].iter().all(|factor| *factor == 0));
        assert!(words[36..40].iter().all(|factor| *factor != 0));
    }
}
