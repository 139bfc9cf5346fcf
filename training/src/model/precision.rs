//! In which numbers matrices are multiplied while training.

use burn::Tensor;
use burn::tensor::FloatDType;
use serde::{Deserialize, Serialize};

/// In which numbers the network's matrices are multiplied, forward and backward. Weights as they are kept, moments,
/// averages, norms, softmax, the embedding of the noise and the loss are f32 always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 24 bits of mantissa.
    #[default]
    F32,
    /// Factors and products are rounded to 8 bits of mantissa, as under the reference's autocast: so are logits, the
    /// scores of attention, and the gradient that a product gives its weights before it is added up in f32. For GPUs
    /// with bf16 matrix units; a CPU rounds the same way, but has to compute in f32: slower there, never faster.
    Bf16,
}

impl Precision {
    /// `a b` as f32.
    pub(crate) fn matmul<const D: usize>(self, a: Tensor<D>, b: Tensor<D>) -> Tensor<D> {
        match self {
            Self::F32 => a.matmul(b),
            Self::Bf16 => a
                .cast(FloatDType::BF16)
                .matmul(b.cast(FloatDType::BF16))
                .cast(FloatDType::F32),
        }
    }
}
