//! How often each code occurs. Owns one loop, the same on every machine: counting is bound by stores, and
//! vectors do not help it.

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
        let mut tables = [[0u32; 256]; TABLES];
        let (words, tail) = chunk.as_chunks::<TABLES>();
        for word in words {
            let word = u64::from_le_bytes(*word);
            for (i, table) in tables.iter_mut().enumerate() {
                table[usize::from((word >> (8 * i)) as u8)] += 1;
            }
        }
        for &code in tail {
            tables[0][usize::from(code)] += 1;
        }
        for (code, count) in counts.iter_mut().enumerate() {
            for table in &tables {
                *count += u64::from(table[code]);
            }
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
