//! The reference network: a transformer whose blocks are modulated by the noise level (DDiT).
//!
//! Tokens and total noise in, log-scores out: `s(x, sigma)[y]` estimates `log p(y) / p(x)` for every
//! position and token `y`. Fields and names follow the reference implementation, so that its weights
//! load as they are. Activations are kept as `[batch * length, width]` rows.

use std::f64::consts::LN_10;

use burn::Tensor;
use burn::module::{Module, Param, ParamId};
use burn::nn::{Linear, LinearConfig};
use burn::tensor::{Device, Int, TensorData, activation};
use denoised::diffusion::Token;
use rand_chacha::ChaCha8Rng;

use super::kernels::{self, RotaryAttention};
use super::precision::Precision;
use super::shape::{MLP_RATIO, NOISE_FEATURES, NetworkConfig};
use crate::random::unit_f32;

/// One transformer block.
#[derive(Module, Debug)]
pub(super) struct Block {
    pub(super) norm1: Param<Tensor<1>>,
    pub(super) attn_qkv: Linear,
    pub(super) attn_out: Linear,
    pub(super) norm2: Param<Tensor<1>>,
    pub(super) mlp_0: Linear,
    pub(super) mlp_2: Linear,
    pub(super) modulation: Linear,
}

/// Where random bits of dropout come from; none outside training.
pub type DropoutSource<'a> = Option<&'a mut ChaCha8Rng>;

/// The network.
#[derive(Module, Debug)]
pub struct Ddit {
    pub(super) embedding: Param<Tensor<2>>,
    pub(super) sigma_0: Linear,
    pub(super) sigma_2: Linear,
    pub(super) blocks: Vec<Block>,
    pub(super) norm_final: Param<Tensor<1>>,
    pub(super) modulation_final: Linear,
    /// None where the embedding stands in for it.
    pub(super) output_weight: Option<Param<Tensor<2>>>,
    pub(super) output_bias: Param<Tensor<1>>,
    #[module(skip)]
    pub(super) config: NetworkConfig,
    #[module(skip)]
    pub(super) precision: Precision,
}

/// A vector or a matrix that has no values yet.
fn parameter<const D: usize>(shape: [usize; D], device: &Device) -> Param<Tensor<D>> {
    let zeros = move |device: &Device, _: bool| Tensor::zeros(shape, device);
    Param::uninitialized(ParamId::new(), zeros, device.clone(), true, shape.into())
}

impl Block {
    fn without_weights(config: &NetworkConfig, device: &Device) -> Self {
        let width = config.hidden_size;
        Self {
            norm1: parameter([width], device),
            attn_qkv: LinearConfig::new(width, 3 * width).with_bias(false).init(device),
            attn_out: LinearConfig::new(width, width).with_bias(false).init(device),
            norm2: parameter([width], device),
            mlp_0: LinearConfig::new(width, MLP_RATIO * width).init(device),
            mlp_2: LinearConfig::new(MLP_RATIO * width, width).init(device),
            modulation: LinearConfig::new(config.cond_dim, 6 * width).init(device),
        }
    }
}

impl Ddit {
    /// A network of this shape, whose parameters take no memory until they get their values.
    pub(super) fn without_weights(config: &NetworkConfig, device: &Device) -> Self {
        let (width, condition) = (config.hidden_size, config.cond_dim);
        Self {
            embedding: parameter([config.states, width], device),
            sigma_0: LinearConfig::new(NOISE_FEATURES, condition).init(device),
            sigma_2: LinearConfig::new(condition, condition).init(device),
            blocks: (0..config.blocks)
                .map(|_| Block::without_weights(config, device))
                .collect(),
            norm_final: parameter([width], device),
            modulation_final: LinearConfig::new(condition, 2 * width).init(device),
            output_weight: (!config.tie_embeddings).then(|| parameter([width, config.states], device)),
            output_bias: parameter([config.states], device),
            config: *config,
            precision: Precision::default(),
        }
    }

    /// The shape of this network.
    pub fn config(&self) -> &NetworkConfig {
        &self.config
    }

    /// The same network with its matrices multiplied in `precision`.
    #[must_use]
    pub fn multiplied_in(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    /// Where this network's tensors live, and whether gradients are recorded there.
    pub fn device(&self) -> Device {
        self.embedding.val().device()
    }

    /// Log-scores `[batch, length, states]` of `tokens` `[batch, length]` under total noise `sigma`
    /// `[batch]`, without the offset of [`finish_log_scores`](super::finish_log_scores) and with the current token's entry as
    /// the head gives it; logits of the clean token, mask included, where that is what the network is for.
    pub fn forward(&self, tokens: Tensor<2, Int>, sigma: Tensor<1>) -> Tensor<3> {
        let [batch, length] = tokens.dims();
        self.forward_rows(tokens, sigma, None, None)
            .reshape([batch, length, self.config.states])
    }

    /// As [`Ddit::forward`], for the rows of `[batch * length]` that `rows` names (all without it):
    /// `[rows, states]`. The output head is run for these rows only.
    pub fn forward_rows(
        &self,
        tokens: Tensor<2, Int>,
        sigma: Tensor<1>,
        rows: Option<Tensor<1, Int>>,
        mut dropout: DropoutSource<'_>,
    ) -> Tensor<2> {
        let [batch, length] = tokens.dims();
        let width = self.config.hidden_size;
        let attention = RotaryAttention {
            length,
            heads: self.config.heads,
            rotation: RotaryAttention::rotation(length, width / self.config.heads),
        };
        let sigma = if self.config.time_conditioned {
            sigma
        } else {
            sigma.zeros_like()
        };
        let condition = self.condition(sigma);
        let embedded = burn::tensor::module::embedding(self.embedding.val(), tokens);
        let mut x: Tensor<2> = embedded.reshape([batch * length, width]); // [batch * length, width]
        for block in &self.blocks {
            x = self.block(block, x, condition.clone(), &attention, dropout.as_deref_mut());
        }
        let [shift, scale] = chunks(self.affine(condition, &self.modulation_final));
        let x = modulated(x, &self.norm_final, shift, scale);
        let x = match rows {
            Some(rows) => x.select(0, rows),
            None => x,
        };
        let weight = match &self.output_weight {
            Some(weight) => weight.val(),
            None => self.embedding.val().transpose(),
        };
        self.precision.matmul(x, weight) + self.output_bias.val().unsqueeze::<2>()
    }

    /// Noise features through their MLP, after SiLU: `[batch, cond_dim]`. In f32 whatever the precision, as in the
    /// reference, where it lies outside of autocast: little of the time, and felt by every row.
    fn condition(&self, sigma: Tensor<1>) -> Tensor<2> {
        let half = NOISE_FEATURES / 2;
        let frequencies: Vec<f32> = (0..half)
            .map(|k| (-4.0 * LN_10 * k as f64 / half as f64).exp() as f32)
            .collect();
        let frequencies = Tensor::from_data(TensorData::new(frequencies, [1, half]), &sigma.device());
        let angles = sigma.unsqueeze_dim::<2>(1).mul(frequencies); // [batch, half]
        let features = Tensor::cat(vec![angles.clone().cos(), angles.sin()], 1);
        let hidden = activation::silu(affine(Precision::F32, features, &self.sigma_0));
        activation::silu(affine(Precision::F32, hidden, &self.sigma_2))
    }

    fn block(
        &self,
        block: &Block,
        x: Tensor<2>,
        condition: Tensor<2>,
        attention: &RotaryAttention,
        mut dropout: DropoutSource<'_>,
    ) -> Tensor<2> {
        let [
            shift_attention,
            scale_attention,
            gate_attention,
            shift_mlp,
            scale_mlp,
            gate_mlp,
        ] = chunks(self.affine(condition, &block.modulation));

        let y = modulated(x.clone(), &block.norm1, shift_attention, scale_attention);
        let y = kernels::rotary_attention(attention, self.precision, self.affine(y, &block.attn_qkv));
        let y = self.drop(self.affine(y, &block.attn_out), dropout.as_deref_mut());
        let x = kernels::gated_residual(x, y, gate_attention);

        let y = modulated(x.clone(), &block.norm2, shift_mlp, scale_mlp);
        let y = self.precision.matmul(y, block.mlp_0.weight.val()); // [batch * length, 4 * width]
        let y = match &block.mlp_0.bias {
            Some(bias) => kernels::gelu(y, bias.val()),
            None => activation::gelu_approximate(y),
        };
        let y = self.drop(self.affine(y, &block.mlp_2), dropout);
        kernels::gated_residual(x, y, gate_mlp)
    }

    fn affine(&self, x: Tensor<2>, layer: &Linear) -> Tensor<2> {
        affine(self.precision, x, layer)
    }

    /// Zeroes entries at the configured rate and scales up the rest.
    fn drop(&self, x: Tensor<2>, source: DropoutSource<'_>) -> Tensor<2> {
        let rate = self.config.dropout as f32;
        let Some(generator) = source.filter(|_| rate > 0.0) else {
            return x;
        };
        let [rows, width] = x.dims();
        let kept = 1.0 / (1.0 - rate);
        let mask: Vec<f32> = (0..rows * width)
            .map(|_| if unit_f32(generator) < rate { 0.0 } else { kept })
            .collect();
        let mask = Tensor::from_data(TensorData::new(mask, [rows, width]), &x.device());
        x * mask
    }
}

/// `x W + b` over rows.
fn affine(precision: Precision, x: Tensor<2>, layer: &Linear) -> Tensor<2> {
    let y = precision.matmul(x, layer.weight.val());
    match &layer.bias {
        Some(bias) => y + bias.val().unsqueeze::<2>(),
        None => y,
    }
}

fn modulated(x: Tensor<2>, weight: &Param<Tensor<1>>, shift: Tensor<2>, scale: Tensor<2>) -> Tensor<2> {
    kernels::modulated_norm(x, weight.val(), shift, scale)
}

/// `N` equal parts of the columns.
#[expect(clippy::needless_pass_by_value, reason = "callers are done with it")]
fn chunks<const N: usize>(x: Tensor<2>) -> [Tensor<2>; N] {
    let width = x.dims()[1] / N;
    std::array::from_fn(|part| x.clone().narrow(1, part * width, width))
}

/// Tokens as the network takes them, `[batch, length]`.
pub fn token_tensor(tokens: &[Token], length: usize, device: &Device) -> Tensor<2, Int> {
    let ids: Vec<i64> = tokens.iter().map(|&token| i64::from(token)).collect();
    let batch = ids.len() / length;
    Tensor::from_data(TensorData::new(ids, [batch, length]), device)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use rand_chacha::rand_core::SeedableRng;

    use super::*;
    use crate::model::inference_device;

    #[test]
    fn entries_are_dropped_at_the_configured_rate_and_the_rest_scaled() {
        let config = |dropout| NetworkConfig {
            dropout,
            scale_by_sigma: false,
            ..NetworkConfig::tiny()
        };
        for rate in [0.1, 0.3, 0.8] {
            let network = config(rate).init(1, 0.0, &inference_device()).unwrap();
            let ones = Tensor::<2>::ones([500, 40], &inference_device());
            let generator = &mut ChaCha8Rng::seed_from_u64(2);
            let left: Vec<f32> = network
                .drop(ones.clone(), Some(generator))
                .into_data()
                .iter()
                .collect();
            let dropped = left.iter().filter(|x| **x == 0.0).count() as f64 / left.len() as f64;
            // Five standard deviations.
            let tolerance = 5.0 * (rate * (1.0 - rate) / left.len() as f64).sqrt();
            assert!((dropped - rate).abs() < tolerance, "{dropped}, not {rate}");
            let scaled = (1.0 / (1.0 - rate)) as f32;
            assert!(left.iter().all(|x| *x == 0.0 || (x - scaled).abs() < 1e-6));
            // Outside of training nothing is.
            let whole: Vec<f32> = network.drop(ones, None).into_data().iter().collect();
            assert!(whole.iter().all(|x| *x == 1.0));
        }
    }
}
