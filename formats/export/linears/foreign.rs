//! Folders of linear weights written from models that others quantized. Every weight is decoded to codes twice, once to see
//! whether it fits and once to be written, so that memory holds a few of them at a time.
//!
//! Embeddings and heads that are coded, as GGUF files have them, are decoded to F32 where a format has no codes for them:
//! their values stay what they were.

use std::borrow::Cow;

use super::whole::{fitted, lay_out};
use super::{Form, Linear, LinearFormat, Linears, Place, Subject, module, place, takes};
use crate::Result;
use crate::dtype::Dtype;
use crate::export::foreign::{Given, Planned, stored};
use crate::import::Decoded;
use crate::scheme::{AffineScheme, Grid, Scheme};
use crate::weight::{AffineWeight, QuantizedWeight};

/// What becomes of a tensor.
enum Found {
    /// Its elements as they are.
    Kept(Dtype),
    /// Floats in F32.
    Floats,
    /// Codes.
    Codes(Subject),
    /// Codes whose columns are in another order than their groups.
    Listed(Scheme, Vec<Form>),
}

/// What will be written; or why the format cannot hold the model.
pub(super) fn plan<'a>(format: &'a dyn LinearFormat, given: &'a Given<'a>) -> Result<Planned<'a>> {
    let model = given.model;
    let mut config = given.config()?;
    let mut found = Vec::new();
    for tensor in model.tensors() {
        let refused = |reason: String| {
            given.refusal(format!(
                "{} ({}): {reason}; or export this model --to bf16 and quantize that",
                tensor.name, tensor.stored_as
            ))
        };
        let place = place(&tensor.name, &tensor.shape);
        found.push(match given.kept(tensor)? {
            Some(dtype) => Found::Kept(dtype),
            None if !takes(format, place) => Found::Floats,
            None => match model.decode(tensor)? {
                Some(Decoded::Weight(weight)) => {
                    let fitted = fitted(format, &weight, given.dtype());
                    Found::Codes(fitted.map_err(refused)?.0)
                }
                _ => {
                    let coded = tensor.coded.as_ref();
                    let listed = coded.map(|coded| coded.listed(model.files())).transpose()?;
                    let Some(codes) = listed.flatten() else {
                        return Err(refused(format!(
                            "{} has no place for what it is stored as",
                            format.name()
                        )));
                    };
                    let tensors = format.listed(&codes).map_err(refused)?;
                    let scheme = codes
                        .scheme()
                        .ok_or_else(|| refused("its groups are of odd lengths".to_owned()))?;
                    Found::Listed(
                        Scheme::Affine(scheme),
                        tensors.into_iter().map(|(form, _)| form).collect(),
                    )
                }
            },
        });
    }
    let zeros = wants_zero_points(format, &found);
    let mut linears = Linears::default();
    let mut tensors = Vec::new();
    for (group, (tensor, found)) in model.tensors().iter().zip(&mut found).enumerate() {
        let module = module(&tensor.name);
        let scheme = match found {
            Found::Kept(_) | Found::Floats => {
                if place(&tensor.name, &tensor.shape) != Place::Other {
                    linears.kept.push(module.to_owned());
                }
                let dtype = if let Found::Kept(dtype) = found {
                    *dtype
                } else {
                    Dtype::F32
                };
                tensors.push(stored(tensor.name.clone(), dtype, tensor.shape.clone(), group));
                continue;
            }
            Found::Codes(subject) => {
                if zeros {
                    subject.scheme = with_zero_points(subject.scheme);
                }
                let refused = |reason| given.refusal(format!("{}: {reason}", tensor.name));
                if let Some(reason) = format.refuses(&subject.scheme) {
                    return Err(refused(reason));
                }
                let forms = format.forms(subject).map_err(refused)?;
                add(&mut tensors, module, &forms, group);
                subject.scheme
            }
            Found::Listed(scheme, forms) => {
                linears.listed = true;
                add(&mut tensors, module, forms, group);
                *scheme
            }
        };
        linears.quantized.push(Linear {
            module: module.to_owned(),
            scheme,
        });
    }
    let block = format.config(&linears).map_err(|reason| given.refusal(reason))?;
    config.insert("quantization_config".to_owned(), block);
    let make = move |i: usize| -> Result<Vec<Cow<'a, [u8]>>> {
        let (Some(tensor), Some(found)) = (model.tensors().get(i), found.get(i)) else {
            return Ok(Vec::new());
        };
        let refused = |reason: String| given.refusal(format!("{}: {reason}", tensor.name));
        let laid_out = match found {
            Found::Kept(_) => return Ok(vec![given.kept_bytes(tensor)?]),
            Found::Floats => {
                let values = model.values(tensor)?;
                let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                return Ok(vec![Cow::Owned(bytes)]);
            }
            Found::Codes(subject) => match model.decode(tensor)? {
                Some(Decoded::Weight(weight)) => {
                    lay_out(format, &of_scheme(weight, subject.scheme)?, subject.dtype)?
                }
                _ => return Err(refused("it changed while it was read".to_owned())),
            },
            Found::Listed(..) => {
                let coded = tensor.coded.as_ref();
                let listed = coded.map(|coded| coded.listed(model.files())).transpose()?;
                match listed.flatten() {
                    Some(codes) => format.listed(&codes).map_err(refused)?,
                    None => return Err(refused("it changed while it was read".to_owned())),
                }
            }
        };
        Ok(laid_out.into_iter().map(|(_, bytes)| Cow::Owned(bytes)).collect())
    };
    Ok(given.folder(format.name(), tensors, config, Box::new(make)))
}

fn add(tensors: &mut Vec<crate::shard_writer::StoredTensor>, module: &str, forms: &[Form], group: usize) {
    for form in forms {
        tensors.push(stored(
            format!("{module}.{}", form.suffix),
            form.dtype,
            form.shape.clone(),
            group,
        ));
    }
}

/// Whether the format describes one scheme for all weights, and these differ in nothing but that zero points of some happen
/// to be all in the middle: such are read as symmetric, and go on with the others.
fn wants_zero_points(format: &dyn LinearFormat, found: &[Found]) -> bool {
    let schemes = found.iter().filter_map(|found| match found {
        Found::Codes(subject) => Some(subject.scheme),
        _ => None,
    });
    let schemes: Vec<Scheme> = schemes.collect();
    let Some(first) = schemes.first() else {
        return false;
    };
    let all = |with: Scheme| schemes.iter().all(|scheme| with_zero_points(*scheme) == with);
    let linear = |scheme: &Scheme| Linear {
        module: String::new(),
        scheme: *scheme,
    };
    let linears = Linears {
        quantized: schemes.iter().map(linear).collect(),
        ..Linears::default()
    };
    schemes.iter().any(|scheme| scheme != first)
        && all(with_zero_points(*first))
        && format.config(&linears).is_err()
}

/// The same scheme with zero points, where it is symmetric.
fn with_zero_points(scheme: Scheme) -> Scheme {
    match scheme {
        Scheme::Affine(s) if s.grid() == Grid::Symmetric => {
            let with = AffineScheme::new(s.bits(), Grid::ZeroPoint, s.grouping(), s.scale_dtype());
            with.map_or(scheme, Scheme::Affine)
        }
        other => other,
    }
}

/// The weight in this scheme: its own, or its own with zero points.
fn of_scheme(weight: QuantizedWeight, scheme: Scheme) -> Result<QuantizedWeight> {
    match (&weight, scheme) {
        (QuantizedWeight::Affine(affine), Scheme::Affine(wanted)) if affine.scheme() != wanted => {
            let ((n, k), middle) = (affine.dims(), affine.scheme().fixed_zero().unwrap_or(0));
            let zeros = vec![middle; affine.scales().len()];
            let (codes, scales) = (affine.codes().to_vec(), affine.scales().to_vec());
            AffineWeight::foreign(wanted, n, k, codes, scales, zeros).map(QuantizedWeight::Affine)
        }
        _ => Ok(weight),
    }
}
