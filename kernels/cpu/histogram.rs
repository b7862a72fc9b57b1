//! How often each code occurs. Owns one loop, the same on every machine: counting is bound by stores, and
//! vectors do not help it. Narrow codes are counted in pairs or fours, as one number of eight bits: half as many stores, or
//! a quarter.

/// Sub-tables counted side by side, so that equal neighbours do not wait for each other's store.
const TABLES: usize = 8;

/// Codes counted before the 32-bit counters are added to the 64-bit ones; no counter can overflow.
const CHUNK: usize = 1 << 30;

/// Below this, clearing the sub-tables costs more than they save.
const SHORT: usize = 512;

/// Adds to `counts[c]` the number of codes equal to c.
pub fn code_histogram(codes: &[u8], counts: &mut [u64; 256]) {
    if codes.len() < SHORT {
        for &code in codes {
            counts[usize::from(code)] += 1;
        }
        return;
    }
    for chunk in codes.chunks(CHUNK) {
        let (words, tail) = chunk.as_chunks::<TABLES>();
        let words = words.iter().map(|word| u64::from_le_bytes(*word));
        match chunk.iter().fold(0, |all, code| all | code) {
            0..=3 => {
                let fours = words.map(|w| {
                    let pairs = w | w >> 6;
                    pairs | pairs >> 12
                });
                let tables = counted::<32, 2>(fours);
                spread::<2>(&tables, counts);
            }
            4..=15 => spread::<4>(&counted::<16, 4>(words.map(|w| w | w >> 4)), counts),
            _ => spread::<8>(&counted::<8, TABLES>(words), counts),
        }
        for &code in tail {
            counts[usize::from(code)] += 1;
        }
    }
}

/// Counts the lowest eight of every `APART` bits, `EACH` times a word; a table a place.
fn counted<const APART: usize, const EACH: usize>(words: impl Iterator<Item = u64>) -> [[u32; 256]; EACH] {
    let mut tables = [[0; 256]; EACH];
    for word in words {
        for (i, table) in tables.iter_mut().enumerate() {
            table[usize::from((word >> (APART * i)) as u8)] += 1;
        }
    }
    tables
}

/// Adds what was counted of numbers that are made of codes of `BITS` bits.
fn spread<const BITS: usize>(tables: &[[u32; 256]], counts: &mut [u64; 256]) {
    for number in 0..256 {
        let times: u64 = tables.iter().map(|table| u64::from(table[number])).sum();
        for place in (0..8).step_by(BITS) {
            counts[number >> place & ((1 << BITS) - 1)] += times;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_codes() {
        let mut counts = [0; 256];
        code_histogram(&[7, 255, 7], &mut counts);
        assert_eq!((counts[7], counts[255], counts.iter().sum::<u64>()), (2, 1, 3));
    }
}
