//! A whole weight in memory, laid out: what the walk over an artifact does block by block.

use super::{Form, LinearFormat, Subject, not_half};
use crate::dtype::Dtype;
use crate::tensor::byte_len;
use crate::weight::QuantizedWeight;
use crate::weight::nested::NestedScales;
use crate::{FormatError, Result};

/// A whole weight of a source of `dtype` as a subject, and the forms it takes; or why it does not fit.
pub(super) fn fitted(
    format: &dyn LinearFormat,
    weight: &QuantizedWeight,
    dtype: Dtype,
) -> std::result::Result<(Subject, Vec<Form>), String> {
    let ((n, k), scheme) = (weight.dims(), weight.scheme());
    let subject = Subject {
        scheme,
        n,
        k,
        dtype,
        offset: nested_of(weight).map_or(0.0, |nested| nested.nested().offset()),
    };
    let not_half = || not_half(scheme, numbers(weight).0).filter(|_| format.keeps_halves());
    if let Some(reason) = format.refuses(&scheme).or_else(not_half) {
        return Err(reason);
    }
    let forms = format.forms(&subject)?;
    Ok((subject, forms))
}

fn nested_of(weight: &QuantizedWeight) -> Option<&NestedScales> {
    match weight {
        QuantizedWeight::Nf4(w) => w.nested(),
        _ => None,
    }
}

/// Scales and zero points.
fn numbers(weight: &QuantizedWeight) -> (&[f32], &[u8]) {
    match weight {
        QuantizedWeight::Affine(w) => (w.scales(), w.zeros()),
        QuantizedWeight::Nf4(w) => (w.scales(), &[]),
        _ => (&[], &[]),
    }
}

/// Every tensor a whole weight of a source of `dtype` becomes, or why it fits not: what the walk does block by block.
pub fn lay_out(
    format: &dyn LinearFormat,
    weight: &QuantizedWeight,
    dtype: Dtype,
) -> Result<Vec<(Form, Vec<u8>)>> {
    let (subject, forms) = fitted(format, weight, dtype).map_err(|reason| {
        let (n, k) = weight.dims();
        FormatError::Scheme {
            got: format!("{} of {n} x {k} as {}", weight.scheme(), format.name()),
            expected: reason,
        }
    })?;
    let first = forms.first().and_then(|f| byte_len(f.dtype, &f.shape));
    let mut codes = vec![0u8; first.unwrap_or(0)];
    format.codes(weight, 0, subject.n, &mut codes)?;
    let (scales, zeros) = numbers(weight);
    let rest = match nested_of(weight) {
        Some(nested) => format.rest_nested(&subject, nested)?,
        None => format.rest(&subject, scales, zeros)?,
    };
    Ok(forms
        .into_iter()
        .zip(std::iter::once(codes).chain(rest))
        .collect())
}
