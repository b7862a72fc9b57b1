//! Codes, scales and zero points as other formats keep them, put together: a [`QuantizedWeight`] where the scheme is
//! one of ours, floats where it is not (columns in another order than their groups, groups of odd lengths, zero points
//! beyond the code range).

use crate::dtype::FloatDtype;
use crate::import::{Decoded, Faults};
use crate::scheme::{AffineScheme, Grid, Grouping};
use crate::weight::{AffineWeight, QuantizedWeight};
use crate::{FormatError, Result};

/// Which group a column belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Groups {
    /// k / length.
    Every(usize),
    /// Listed, one for each column.
    Listed(Vec<u32>),
}

impl Groups {
    /// From a list, with runs of equal length recognised. `groups` is G. Fails with the first entry that is no
    /// group, as (column, group).
    pub fn listed(list: Vec<u32>, groups: usize) -> std::result::Result<Self, (usize, u32)> {
        if let Some(at) = list.iter().position(|&g| g as usize >= groups) {
            return Err((at, list.get(at).copied().unwrap_or_default()));
        }
        let length = list.iter().take_while(|&&g| g == 0).count();
        let runs = length > 0 && list.iter().enumerate().all(|(k, &g)| k / length == g as usize);
        Ok(if runs {
            Self::Every(length)
        } else {
            Self::Listed(list)
        })
    }
}

/// A matrix (N, K) of codes with what gives them a meaning: value = (code - zero) * scale.
#[derive(Debug, Clone, PartialEq)]
pub struct AffineCodes {
    /// N.
    pub n: usize,
    /// K.
    pub k: usize,
    /// Bits of a code.
    pub bits: u8,
    /// (N, K)
    pub codes: Vec<u8>,
    /// (N, G)
    pub scales: Vec<f32>,
    /// Type they are stored in.
    pub scale_dtype: FloatDtype,
    /// (N, G), `None` for a zero at the middle code.
    pub zeros: Option<Vec<u16>>,
    /// Groups of the columns.
    pub groups: Groups,
}

/// The scheme with these properties, when it is one of ours and its groups are whole in rows of `k`.
pub fn scheme(bits: u8, symmetric: bool, group: usize, k: usize, scale: FloatDtype) -> Option<AffineScheme> {
    let grid = if symmetric {
        Grid::Symmetric
    } else {
        Grid::ZeroPoint
    };
    let grouping = if group == k {
        Grouping::Row
    } else {
        Grouping::Columns(group)
    };
    AffineScheme::new(bits, grid, grouping, scale)
        .ok()
        .filter(|_| group > 0 && k.is_multiple_of(group))
}

/// What such a weight is called: a scheme's name, whether or not the scheme is one of ours.
pub fn label(bits: u8, symmetric: bool, group: usize, k: usize, scale: FloatDtype) -> String {
    let grid = if symmetric { "sym" } else { "zp" };
    let group = if group == k {
        "row".to_owned()
    } else {
        format!("g{group}")
    };
    format!("w{bits}-{grid}-{group}-{scale}")
}

impl AffineCodes {
    /// G, from the scales.
    fn group_count(&self) -> usize {
        self.scales.len() / self.n.max(1)
    }

    /// Whether every zero point is the middle code.
    fn symmetric(&self) -> bool {
        let middle = 1u16 << (self.bits - 1);
        self.zeros.iter().flatten().all(|&zero| zero == middle)
    }

    /// The scheme it would have if its columns lay in the order of their groups, when that is one of ours.
    pub fn scheme(&self) -> Option<AffineScheme> {
        let group = match &self.groups {
            Groups::Every(length) => *length,
            Groups::Listed(_) => {
                let groups = self.group_count();
                (groups > 0 && self.k.is_multiple_of(groups)).then(|| self.k / groups)?
            }
        };
        scheme(self.bits, self.symmetric(), group, self.k, self.scale_dtype)
    }

    /// Decodes. Fails when a scale is not finite; lengths are the caller's business and decide how far rows go.
    pub fn decoded(self) -> Result<Decoded> {
        if let Some(bad) = self.scales.iter().find(|scale| !scale.is_finite()) {
            return Err(FormatError::Weight {
                what: "scale",
                expected: "a finite number".to_owned(),
                got: bad.to_string(),
            });
        }
        let middle = 1u16 << (self.bits - 1);
        let top = (1u16 << self.bits) - 1;
        let symmetric = self.symmetric();
        let fits = self.zeros.iter().flatten().all(|&zero| zero <= top);
        if let (Groups::Every(group), true) = (&self.groups, fits)
            && let Some(scheme) = scheme(self.bits, symmetric, *group, self.k, self.scale_dtype)
        {
            let zeros = self.zeros.filter(|_| !symmetric).unwrap_or_default();
            let zeros = zeros.into_iter().map(|zero| zero as u8).collect();
            return AffineWeight::foreign(scheme, self.n, self.k, self.codes, self.scales, zeros)
                .map(|weight| Decoded::Weight(QuantizedWeight::Affine(weight)));
        }
        let groups = self.group_count();
        let mut bytes = Vec::with_capacity(self.codes.len() * 4);
        for (row, codes) in self.codes.chunks_exact(self.k.max(1)).enumerate() {
            for (column, code) in codes.iter().enumerate() {
                let group = match &self.groups {
                    Groups::Every(length) => column / length.max(&1),
                    Groups::Listed(list) => list.get(column).map_or(0, |&g| g as usize),
                };
                let at = row * groups + group;
                let zero = self.zeros.as_ref().map_or(Some(&middle), |zeros| zeros.get(at));
                let scale = self.scales.get(at).copied().unwrap_or(f32::NAN);
                let zero = zero.copied().unwrap_or(middle);
                let value = (i32::from(*code) - i32::from(zero)) as f32 * scale;
                bytes.extend_from_slice(&value.to_le_bytes());
            }
        }
        Ok(Decoded::Floats {
            dtype: FloatDtype::F32,
            bytes,
        })
    }

    /// What is odd about its scales and zero points.
    pub fn faults(&self) -> Faults {
        let mut faults = Vec::new();
        let total = self.scales.len();
        let mut count = |what: &str, is: &dyn Fn(f32) -> bool| {
            let found = self.scales.iter().filter(|&&scale| is(scale)).count();
            if found > 0 {
                faults.push(format!(
                    "{found} of {total} scales are {what}; expected positive finite numbers"
                ));
            }
        };
        count("not finite", &|scale| !scale.is_finite());
        count("zero", &|scale| scale == 0.0);
        count("negative", &|scale| scale < 0.0);
        let top = (1u16 << self.bits) - 1;
        let beyond = self.zeros.iter().flatten().filter(|&&zero| zero > top).count();
        if beyond > 0 {
            faults.push(format!(
                "{beyond} of {total} zero points are beyond the codes' range of 0 to {top}; readers of this format disagree about them"
            ));
        }
        faults
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn codes(groups: Groups, zeros: Option<Vec<u16>>) -> AffineCodes {
        AffineCodes {
            n: 1,
            k: 32,
            bits: 4,
            codes: (0..32).map(|i| i % 16).collect(),
            scales: vec![0.5, 2.0],
            scale_dtype: FloatDtype::F16,
            zeros,
            groups,
        }
    }

    #[test]
    fn what_fits_is_a_weight() {
        let Decoded::Weight(weight) = codes(Groups::Every(16), Some(vec![8, 8])).decoded().unwrap() else {
            panic!("a weight")
        };
        assert_eq!(weight.scheme().to_string(), "w4-sym-g16-f16");
        let Decoded::Weight(weight) = codes(Groups::Every(16), Some(vec![8, 3])).decoded().unwrap() else {
            panic!("a weight")
        };
        let mut row = [0f32; 32];
        weight.dequantize_row(0, &mut row);
        assert_eq!((row[1], row[17]), (-3.5, -4.0));
    }

    #[test]
    fn what_does_not_fit_is_floats_by_the_same_formula() {
        let mut list = vec![1u32; 32];
        list[3] = 0;
        let listed = Groups::listed(list, 2).unwrap();
        for (odd, at, expected) in [
            (codes(listed, None), 3, -2.5f32),
            (codes(Groups::Every(16), Some(vec![16, 3])), 1, -7.5),
        ] {
            let Decoded::Floats { dtype, bytes } = odd.decoded().unwrap() else {
                panic!("floats")
            };
            assert_eq!(dtype.widen(&bytes)[at], expected);
        }
    }

    #[test]
    fn lists_of_groups() {
        let every = |count: u32, length: u32| (0..count).map(|k| k / length).collect::<Vec<u32>>();
        assert_eq!(Groups::listed(every(64, 16), 4), Ok(Groups::Every(16)));
        assert_eq!(Groups::listed(every(40, 16), 3), Ok(Groups::Every(16)));
        assert_eq!(Groups::listed(every(64, 16), 3), Err((48, 3)));
        assert_eq!(Groups::listed(vec![1, 0], 2), Ok(Groups::Listed(vec![1, 0])));
    }

    #[test]
    fn oddities_are_named() {
        let mut odd = codes(Groups::Every(16), Some(vec![16, 3]));
        odd.scales = vec![0.0, -1.0];
        let faults = odd.faults().join("; ");
        assert!(
            faults.contains("are zero") && faults.contains("negative") && faults.contains("beyond"),
            "{faults}"
        );
        odd.scales[0] = f32::INFINITY;
        assert!(odd.decoded().is_err());
        assert!(codes(Groups::Every(16), None).faults().is_empty());
    }
}
