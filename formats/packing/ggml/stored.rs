//! Blocks of GGML from rows that are packed already. Owns the two block types whose bytes follow from
//! [`lsb-rows`](crate::packing::lsb_rows) without a code standing alone.

use half::f16;

use super::{GgmlType, in_groups};

impl GgmlType {
    /// Whether [`pack_stored`](Self::pack_stored) knows this type.
    pub fn packs_stored(self) -> bool {
        matches!(self, Self::Q8_0 | Self::Q4_0)
    }

    /// Appends the blocks of codes that lie in `bytes` as `lsb-rows`, each group of `group` weights (a multiple of 32) with
    /// its scale. Codes are taken as they are; whoever calls has seen that all of them are allowed.
    ///
    /// # Panics
    ///
    /// Never; of a type that [`packs_stored`](Self::packs_stored) denies, nothing is appended.
    pub fn pack_stored(self, group: usize, bytes: &[u8], scales: &[f16], out: &mut Vec<u8>) {
        let (per_group, scales) = (group / 32, scales.iter().copied());
        match self {
            Self::Q8_0 => in_groups::<32, 34>(per_group, bytes, scales, out, |_, codes, d, block| {
                let (head, quants) = block.split_at_mut(2);
                head.copy_from_slice(&d.to_le_bytes());
                // The two's complement of code - 128.
                quants
                    .iter_mut()
                    .zip(codes)
                    .for_each(|(q, code)| *q = code ^ 0x80);
            }),
            Self::Q4_0 => in_groups::<16, 18>(per_group, bytes, scales, out, |_, codes, d, block| {
                let (head, quants) = block.split_at_mut(2);
                head.copy_from_slice(&d.to_le_bytes());
                // Codes 0 to 15 of a block are low halves, 16 to 31 high ones; here they come in pairs.
                let (low, high) = codes.split_at(8);
                for (pair, (low, high)) in quants.as_chunks_mut::<2>().0.iter_mut().zip(low.iter().zip(high))
                {
                    *pair = [low & 15 | high << 4, low >> 4 | high & 0xf0];
                }
            }),
            _ => (),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packing::{LSB_ROWS, Packing};
    use crate::scheme::AffineScheme;
    use crate::weight::AffineWeight;

    #[test]
    fn stored_rows_give_the_blocks_of_their_codes() {
        let mut checked = 0;
        for (name, k) in [
            ("w8-sym-g32-f16", 64),
            ("w8-sym-row-f16", 96),
            ("w4-sym-g64-f16", 192),
            ("w4-sym-g32-f16", 32),
        ] {
            let scheme = AffineScheme::parse(name).unwrap();
            let ((low, high), kind) = (scheme.code_range(), GgmlType::of(scheme, k).unwrap());
            assert!(kind.packs_stored());
            let n = 3;
            let span = usize::from(high - low) + 1;
            let codes: Vec<u8> = (0..n * k).map(|i| low + (i * 37 % span) as u8).collect();
            let groups = scheme.groups(n, k).unwrap();
            let scales: Vec<f32> = (0..n * groups).map(|g| (g + 1) as f32 / 64.0).collect();
            let halves: Vec<f16> = scales.iter().map(|s| f16::from_f32(*s)).collect();
            let mut bytes = Vec::new();
            LSB_ROWS.pack(scheme.bits(), k, &codes, &mut bytes).unwrap();
            let (mut expected, mut out) = (Vec::new(), Vec::new());
            let weight = AffineWeight::new(scheme, n, k, codes, scales, vec![]).unwrap();
            kind.pack(&weight, &mut expected);
            kind.pack_stored(scheme.grouping().len(k), &bytes, &halves, &mut out);
            assert_eq!(out, expected, "{name}");
            // The picture, for what both share.
            let (_, block) = kind.block();
            for (i, (block, codes)) in out
                .chunks_exact(block)
                .zip(weight.codes().chunks_exact(32))
                .enumerate()
            {
                let d = halves[i * 32 / scheme.grouping().len(k)];
                assert_eq!(block[..2], d.to_le_bytes(), "{name}");
                for (j, code) in codes.iter().enumerate() {
                    let value = match kind {
                        GgmlType::Q8_0 => i32::from(block[2 + j] as i8) + 128,
                        _ => i32::from(block[2 + j % 16] >> (j / 16 * 4) & 15),
                    };
                    assert_eq!(value, i32::from(*code), "{name}");
                }
            }
            checked += out.len();
        }
        assert_eq!(checked, 3 * (68 + 102 + 108 + 18));
    }
}
