//! Rows of weights on their way to the device's encoders. Owns the choice of the form in which they go.

use cudarc::driver::{DriverError, LaunchArgs, PushKernelArg};
use qtool_formats::FloatDtype;

use super::device::Device;
use super::temporary::Temporary;
use super::weight::dense;

/// Rows of weights (N, K), row-major.
#[derive(Debug, Clone, Copy)]
pub enum Rows<'a> {
    /// As numbers.
    Values(&'a [f32]),
    /// As they are stored, little-endian.
    Stored(FloatDtype, &'a [u8]),
}

impl Rows<'_> {
    pub(super) fn len(&self) -> usize {
        match self {
            Self::Values(values) => values.len(),
            Self::Stored(dtype, bytes) => bytes.len() / dtype.bytes(),
        }
    }

    pub(super) fn form(&self) -> i32 {
        match self {
            Self::Values(_) => dense(FloatDtype::F32),
            Self::Stored(dtype, _) => dense(*dtype),
        }
    }

    /// The same numbers as BF16, half the way, where all of them are: most checkpoints hold nothing else.
    pub(super) fn shorter(&self) -> Option<Vec<u8>> {
        let Self::Values(values) = self else { return None };
        let exact = |part: &[f32]| part.iter().fold(0, |bits, x| bits | x.to_bits()) & 0xffff == 0;
        // In parts, so that the first number that is none ends it.
        if !values.chunks(4096).all(exact) {
            return None;
        }
        let mut bytes = Vec::with_capacity(2 * values.len());
        bytes.extend(
            values
                .iter()
                .flat_map(|x| ((x.to_bits() >> 16) as u16).to_le_bytes()),
        );
        Some(bytes)
    }

    /// A copy on the device.
    pub(super) fn to(self, device: &Device) -> Result<There, DriverError> {
        Ok(match self {
            Self::Values(values) => There::Values(device.sent(values)?),
            Self::Stored(_, bytes) => There::Stored(device.sent(bytes)?),
        })
    }
}

/// [`Rows`] on the device.
pub(super) enum There {
    Values(Temporary<f32>),
    Stored(Temporary<u8>),
}

impl There {
    pub(super) fn push<'a>(&'a self, call: &mut LaunchArgs<'a>) {
        match self {
            Self::Values(x) => call.arg(&**x),
            Self::Stored(x) => call.arg(&**x),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_bf16_go_as_such() {
        let values = [1.0f32, -0.0, f32::INFINITY, 1.5e-41, -3.0];
        let bytes = Rows::Values(&values[..3]).shorter().unwrap();
        let back: Vec<f32> = FloatDtype::Bf16.widen(&bytes);
        assert_eq!(
            back.iter().map(|x| x.to_bits()).collect::<Vec<_>>(),
            values[..3].iter().map(|x| x.to_bits()).collect::<Vec<_>>()
        );
        assert_eq!(Rows::Values(&[1.0, 1.0 + f32::EPSILON]).shorter(), None);
        assert_eq!(Rows::Stored(FloatDtype::F16, &[0, 1]).shorter(), None);
        // What subnormal numbers there are in BF16 are numbers of it, too.
        assert!(Rows::Values(&[f32::from_bits(0x0001_0000)]).shorter().is_some());
        assert_eq!(
            Rows::Values(&values[3..4]).shorter().is_some(),
            values[3].to_bits() & 0xffff == 0
        );
    }
}
