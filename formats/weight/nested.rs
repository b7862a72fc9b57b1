//! Scales that are quantized a second time, around their mean over the whole weight: what every row of the weight shares,
//! and the codes of some rows' scales. Formula and source: [`crate::scheme::nf4`].

use std::ops::Range;
use std::sync::Arc;

use crate::scheme::dynamic_map::MAP;
use crate::scheme::nf4::NESTED_GROUP;
use crate::{FormatError, Result};

/// What all scales of a weight share.
#[derive(Debug, Clone, PartialEq)]
pub struct Nested {
    /// One for every 256 scales, rows one after the other.
    scales: Vec<f32>,
    offset: f32,
}

impl Nested {
    /// Fails when a nested scale is negative or not finite, or the offset is not finite.
    pub fn new(scales: Vec<f32>, offset: f32) -> Result<Self> {
        let fault = |what, expected: &str, got: f32| {
            Err(FormatError::Weight {
                what,
                expected: expected.to_owned(),
                got: got.to_string(),
            })
        };
        if let Some(scale) = scales.iter().find(|s| !(**s >= 0.0 && s.is_finite())) {
            return fault("nested scale", "a finite value not below zero", *scale);
        }
        if !offset.is_finite() {
            return fault("offset", "a finite value", offset);
        }
        Ok(Self { scales, offset })
    }

    /// One for every 256 scales of the weight.
    pub fn scales(&self) -> &[f32] {
        &self.scales
    }

    /// What is added to every scale.
    pub fn offset(&self) -> f32 {
        self.offset
    }

    /// The value of the code of scale `index` of the weight: a product and a sum, each rounded.
    fn value(&self, index: usize, code: u8) -> f32 {
        let nested = self.scales.get(index / NESTED_GROUP).copied().unwrap_or(0.0);
        MAP.get(usize::from(code)).copied().unwrap_or(0.0) * nested + self.offset
    }
}

/// Quantized scales of a run of rows.
#[derive(Debug, Clone, PartialEq)]
pub struct NestedScales {
    /// Index of the first of them among all scales of the weight.
    first: usize,
    codes: Vec<u8>,
    nested: Arc<Nested>,
}

impl NestedScales {
    /// Codes of the scales from number `first` of the weight on. Fails when there are no nested scales for them.
    pub fn new(first: usize, codes: Vec<u8>, nested: Arc<Nested>) -> Result<Self> {
        let needed = (first + codes.len()).div_ceil(NESTED_GROUP);
        if nested.scales.len() < needed {
            return Err(FormatError::Weight {
                what: "nested scales",
                expected: format!("at least {needed}"),
                got: nested.scales.len().to_string(),
            });
        }
        Ok(Self { first, codes, nested })
    }

    /// Codes, one for each scale.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// What all scales share.
    pub fn nested(&self) -> &Nested {
        &self.nested
    }

    /// The scales.
    pub fn values(&self) -> Result<Vec<f32>> {
        let values = self.codes.iter().enumerate();
        let values: Vec<f32> = values
            .map(|(i, code)| self.nested.value(self.first + i, *code))
            .collect();
        match values.iter().find(|v| !v.is_finite()) {
            None => Ok(values),
            Some(scale) => Err(FormatError::Weight {
                what: "scale",
                expected: "a finite value".to_owned(),
                got: scale.to_string(),
            }),
        }
    }

    /// These of its scales.
    pub fn cut(&self, range: Range<usize>) -> Self {
        Self {
            first: self.first + range.start,
            codes: self.codes.get(range).unwrap_or_default().to_vec(),
            nested: Arc::clone(&self.nested),
        }
    }

    /// Whether `other` goes on where this ends.
    pub(super) fn is_followed_by(&self, other: &Self) -> bool {
        self.first + self.codes.len() == other.first && self.nested == other.nested
    }

    pub(super) fn append(&mut self, other: &Self) {
        self.codes.extend_from_slice(&other.codes);
    }

    /// Bytes of codes, nested scales and offset. Of what belongs to the weight as a whole, the run with its first scale
    /// writes the offset, and each run the nested scales of the blocks that begin in it: runs one after the other give
    /// the whole.
    pub(super) fn encode(&self) -> [Vec<u8>; 3] {
        let begins = |index: usize| index.div_ceil(NESTED_GROUP);
        let blocks = begins(self.first)..begins(self.first + self.codes.len());
        let nested = self.nested.scales.get(blocks).unwrap_or_default();
        let offset = if self.first == 0 {
            self.nested.offset.to_le_bytes().to_vec()
        } else {
            Vec::new()
        };
        [
            self.codes.clone(),
            nested.iter().flat_map(|s| s.to_le_bytes()).collect(),
            offset,
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_by_hand() {
        let nested = Arc::new(Nested::new(vec![0.5, 2.0], 3.0).unwrap());
        let ends = NestedScales::new(254, vec![127, 255, 255, 127, 0], Arc::clone(&nested)).unwrap();
        // Code 127 is zero and 255 one; the second block begins at 256; the lowest level is not quite -1.
        assert_eq!(ends.values().unwrap(), [3.0, 3.5, 5.0, 3.0, 3.0 + 2.0 * MAP[0]]);
        assert!(NestedScales::new(510, vec![0; 3], nested).is_err());
    }

    #[test]
    fn runs_one_after_the_other_write_the_whole() {
        let nested = Arc::new(Nested::new(vec![1.0, 2.0, 4.0], -0.5).unwrap());
        let codes: Vec<u8> = (0..600).map(|i| (i % 256) as u8).collect();
        let whole = NestedScales::new(0, codes, nested).unwrap();
        for step in [1, 9, 255, 256, 599, 600] {
            let mut parts = [Vec::new(), Vec::new(), Vec::new()];
            for from in (0..600).step_by(step) {
                let run = whole.cut(from..600.min(from + step));
                for (part, bytes) in parts.iter_mut().zip(run.encode()) {
                    part.extend(bytes);
                }
            }
            assert_eq!(parts, whole.encode(), "{step}");
            assert_eq!(parts.map(|p| p.len()), [600, 12, 4]);
        }
    }

    #[test]
    fn forbidden_numbers_are_refused() {
        for (scale, offset) in [(-1.0, 0.0), (f32::NAN, 0.0), (1.0, f32::INFINITY)] {
            assert!(Nested::new(vec![scale], offset).is_err(), "{scale} {offset}");
        }
        let huge = Nested::new(vec![f32::MAX], f32::MAX).unwrap();
        let scales = NestedScales::new(0, vec![255], Arc::new(huge)).unwrap();
        assert!(scales.values().is_err());
    }
}
