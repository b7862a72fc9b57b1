//! Families of stored forms: with the same codes and scales, which byte layouts, shapes and names
//! the stored tensors of a weight have. A plan or a manifest has one family for all its weights;
//! what a code means does not depend on it.

use serde::{Deserialize, Serialize};

use super::Role;

/// A family of stored forms.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// qtool's: every part is N rows, one after the other, named `WEIGHT.codes`, `WEIGHT.scales` ...
    #[default]
    Own,
    /// The forms PaddlePaddle FastDeploy loads: interleaved rows, named `LINEAR.quant_weight`,
    /// `LINEAR.weight_scale` ... where the weight is `LINEAR.weight`.
    FastDeploy,
}

impl Family {
    /// Whether it is [`Family::Own`].
    pub fn is_own(&self) -> bool {
        *self == Self::Own
    }

    /// Only blocks of a multiple of this many rows can be written and read by themselves.
    pub fn row_multiple(self) -> usize {
        match self {
            Self::Own => 1,
            Self::FastDeploy => 16,
        }
    }

    /// Name of the stored tensor with this role of the weight `weight`.
    pub fn tensor_name(self, weight: &str, role: Role) -> String {
        match self {
            Self::Own => format!("{weight}.{}", role.suffix()),
            Self::FastDeploy => {
                let linear = weight.strip_suffix(".weight").unwrap_or(weight);
                let suffix = match role {
                    Role::Codes => "quant_weight",
                    Role::Scales => "weight_scale",
                    Role::ZeroPoints => "weight_zero_point",
                    Role::LocalScales => "weight_scale",
                    Role::SuperScales => "super_scales",
                    Role::CodeScales => "code_scale",
                    Role::CodeZeroPoints => "code_zp",
                    // FastDeploy has no such tensors; no scheme with them has a form in this family.
                    Role::NestedScales | Role::Offset | Role::LocalMins | Role::SuperMins => role.suffix(),
                };
                format!("{linear}.{suffix}")
            }
        }
    }
}
