//! The reference network: a transformer whose blocks are modulated by the noise level (DDiT).
//!
//! Tokens and total noise in, log-scores out: `s(x, sigma)[y]` estimates `log p(y) / p(x)` for every
//! position and token `y`. Fields and names follow the reference implementation, so that its weights
//! load as they are. Activations are kept as `[batch * length, width]` rows.

use std::f64::consts::LN_10;

use burn::Tensor;
use burn::module::{Module, Param};
use burn::nn::Linear;
use burn::tensor::{Device, Int, TensorData, activation};
use denoised::diffusion::Parameterization;
use denoised::diffusion::{Token, sigma_offset};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::kernels::{self, RotaryAttention};
use crate::precision::Precision;
use crate::state_dict::{HostTensor, StateDict, StateDictError};

/// Width of an MLP over the width of the network.
pub const MLP_RATIO: usize = 4;
/// Cosines and sines that describe the total noise.
pub const NOISE_FEATURES: usize = 256;
/// The head's matrix, `[states, width]`.
pub(crate) const OUTPUT_WEIGHT: &str = "output_layer.linear.weight";
/// The embedding, `[states, width]`, which stands in for the head's matrix where they are tied.
pub(crate) const EMBEDDING: &str = "vocab_embed.embedding";
/// A buffer of published checkpoints that follows from the head width.
const ROTARY_BUFFER: &str = "rotary_emb.inv_freq";

/// The shape of a network.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkConfig {
    /// Tokens the network tells apart, the mask included (absorbing graphs).
    pub states: usize,
    /// Longest sequence.
    pub length: usize,
    /// Width of the residual stream, a multiple of `2 * heads`.
    pub hidden_size: usize,
    /// Width of the noise condition.
    pub cond_dim: usize,
    /// Transformer blocks.
    pub blocks: usize,
    /// Attention heads per block.
    pub heads: usize,
    /// Chance to drop an entry of a branch while training.
    #[serde(default)]
    pub dropout: f64,
    /// Whether log-scores are offset by `-ln(e^sigma - 1) - ln(states - 1)` (absorbing graphs only).
    pub scale_by_sigma: bool,
    /// What the head's output means: log-scores, or logits of the clean token.
    #[serde(default = "score")]
    pub parameterization: Parameterization,
    /// Whether the network sees the total noise; without, it sees 0 always.
    #[serde(default = "yes")]
    pub time_conditioned: bool,
    /// Whether the head's matrix is the embedding.
    #[serde(default)]
    pub tie_embeddings: bool,
}

fn score() -> Parameterization {
    Parameterization::Score
}

fn yes() -> bool {
    true
}

/// A network's shape that cannot be built.
#[derive(Debug, Error, PartialEq)]
pub enum NetworkError {
    /// A field that must be positive is zero.
    #[error("network.{0} must be at least 1")]
    Zero(&'static str),
    /// A score needs another token to move to.
    #[error("network.states is {0}, at least 2 are needed")]
    States(usize),
    /// Rotary attention halves each head.
    #[error("network.hidden_size {width} is no multiple of 2 * network.heads = {}", 2 * heads)]
    Heads {
        /// Width of the residual stream.
        width: usize,
        /// Attention heads.
        heads: usize,
    },
    /// Not a probability below one.
    #[error("network.dropout is {0}, expected 0 <= dropout < 1")]
    Dropout(f64),
    /// Probabilities know no offset.
    #[error("network.scale_by_sigma is for network.parameterization \"score\"")]
    Offset,
    /// Weights that do not fit.
    #[error(transparent)]
    Weights(#[from] StateDictError),
}

impl NetworkConfig {
    /// Whether a network of this shape can be built.
    pub fn validate(&self) -> Result<(), NetworkError> {
        for (name, value) in [
            ("length", self.length),
            ("hidden_size", self.hidden_size),
            ("cond_dim", self.cond_dim),
            ("blocks", self.blocks),
            ("heads", self.heads),
        ] {
            if value == 0 {
                return Err(NetworkError::Zero(name));
            }
        }
        if self.states < 2 {
            return Err(NetworkError::States(self.states));
        }
        if !self.hidden_size.is_multiple_of(2 * self.heads) {
            return Err(NetworkError::Heads {
                width: self.hidden_size,
                heads: self.heads,
            });
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(NetworkError::Dropout(self.dropout));
        }
        if self.scale_by_sigma && self.parameterization == Parameterization::Mean {
            return Err(NetworkError::Offset);
        }
        Ok(())
    }

    /// Name and shape of every parameter, as the reference lays them out.
    pub fn parameters(&self) -> Vec<(String, Vec<usize>)> {
        let (width, condition) = (self.hidden_size, self.cond_dim);
        let mut list: Vec<(String, Vec<usize>)> = Vec::new();
        let mut add = |name: String, shape: &[usize]| list.push((name, shape.to_vec()));
        add(EMBEDDING.into(), &[self.states, width]);
        add("sigma_map.mlp.0.weight".into(), &[condition, NOISE_FEATURES]);
        add("sigma_map.mlp.0.bias".into(), &[condition]);
        add("sigma_map.mlp.2.weight".into(), &[condition, condition]);
        add("sigma_map.mlp.2.bias".into(), &[condition]);
        for block in 0..self.blocks {
            let mut add = |name: &str, shape: &[usize]| add(format!("blocks.{block}.{name}"), shape);
            add("norm1.weight", &[width]);
            add("attn_qkv.weight", &[3 * width, width]);
            add("attn_out.weight", &[width, width]);
            add("norm2.weight", &[width]);
            add("mlp.0.weight", &[MLP_RATIO * width, width]);
            add("mlp.0.bias", &[MLP_RATIO * width]);
            add("mlp.2.weight", &[width, MLP_RATIO * width]);
            add("mlp.2.bias", &[width]);
            add("adaLN_modulation.weight", &[6 * width, condition]);
            add("adaLN_modulation.bias", &[6 * width]);
        }
        add("output_layer.norm_final.weight".into(), &[width]);
        if !self.tie_embeddings {
            add(OUTPUT_WEIGHT.into(), &[self.states, width]);
        }
        add("output_layer.linear.bias".into(), &[self.states]);
        add(
            "output_layer.adaLN_modulation.weight".into(),
            &[2 * width, condition],
        );
        add("output_layer.adaLN_modulation.bias".into(), &[2 * width]);
        list
    }

    /// Weights to start training from: output zero, so that every score starts as uniform, and
    /// modulations zero but for the gates of the blocks, which start at `initial_gate` (0 in the
    /// reference: every block starts as the identity); the rest uniform within `1 / sqrt(inputs)`.
    pub fn initial_weights(&self, seed: u64, initial_gate: f32) -> StateDict {
        let mut generator = ChaCha8Rng::seed_from_u64(seed);
        let mut weights = StateDict::default();
        let mut inputs = 1;
        for (name, shape) in self.parameters() {
            // A bias follows its weight and shares its bound.
            if let [_, columns] = shape[..] {
                inputs = columns;
            }
            let bound = 1.0 / (inputs as f32).sqrt();
            let zero = name.contains("adaLN_modulation") || name.starts_with("output_layer.linear");
            let norm = name.contains("norm");
            let data = (0..shape.iter().product())
                .map(|_| match (zero, norm) {
                    (true, _) => 0.0,
                    (_, true) => 1.0,
                    _ => bound * (2.0 * unit(&mut generator) - 1.0),
                })
                .collect();
            let mut data: Vec<f32> = data;
            if name.starts_with("blocks") && name.ends_with("adaLN_modulation.bias") {
                // Thirds of each half are shift, scale and gate.
                for (index, entry) in data.iter_mut().enumerate() {
                    if index / self.hidden_size % 3 == 2 {
                        *entry = initial_gate;
                    }
                }
            }
            weights.insert(name, shape, data);
        }
        weights
    }

    /// The network with fresh weights.
    pub fn init(&self, seed: u64, initial_gate: f32, device: &Device) -> Result<Ddit, NetworkError> {
        Ddit::from_weights(self, self.initial_weights(seed, initial_gate), device)
    }
}

/// A uniform draw from [0, 1).
fn unit(generator: &mut ChaCha8Rng) -> f32 {
    (generator.next_u32() >> 8) as f32 / (1_u32 << 24) as f32
}

/// One transformer block.
#[derive(Module, Debug)]
struct Block {
    norm1: Param<Tensor<1>>,
    attn_qkv: Linear,
    attn_out: Linear,
    norm2: Param<Tensor<1>>,
    mlp_0: Linear,
    mlp_2: Linear,
    modulation: Linear,
}

/// Where random bits of dropout come from; none outside training.
pub type DropoutSource<'a> = Option<&'a mut ChaCha8Rng>;

/// The network.
#[derive(Module, Debug)]
pub struct Ddit {
    embedding: Param<Tensor<2>>,
    sigma_0: Linear,
    sigma_2: Linear,
    blocks: Vec<Block>,
    norm_final: Param<Tensor<1>>,
    modulation_final: Linear,
    /// None where the embedding stands in for it.
    output_weight: Option<Param<Tensor<2>>>,
    output_bias: Param<Tensor<1>>,
    #[module(skip)]
    config: NetworkConfig,
    #[module(skip)]
    precision: Precision,
}

/// Takes weights by reference names and hands out Burn's parameters.
struct Loader<'a> {
    weights: StateDict,
    device: &'a Device,
}

impl Loader<'_> {
    fn data(&mut self, name: &str, shape: &[usize]) -> Result<HostTensor, StateDictError> {
        self.weights.take(name, shape)
    }

    fn vector(&mut self, name: &str, length: usize) -> Result<Param<Tensor<1>>, StateDictError> {
        let data = self.data(name, &[length])?;
        Ok(Param::from_tensor(Tensor::from_data(
            TensorData::new(data.data, [length]),
            self.device,
        )))
    }

    fn matrix(&mut self, name: &str, shape: [usize; 2]) -> Result<Param<Tensor<2>>, StateDictError> {
        let data = self.data(name, &shape)?;
        Ok(Param::from_tensor(Tensor::from_data(
            TensorData::new(data.data, shape),
            self.device,
        )))
    }

    /// Burn keeps `[in, out]` where the reference keeps `[out, in]`.
    fn linear(
        &mut self,
        name: &str,
        [inputs, outputs]: [usize; 2],
        bias: bool,
    ) -> Result<Linear, StateDictError> {
        let bias = bias
            .then(|| self.vector(&format!("{name}.bias"), outputs))
            .transpose()?;
        Ok(Linear {
            weight: self.transposed(&format!("{name}.weight"), [inputs, outputs])?,
            bias,
        })
    }

    fn transposed(
        &mut self,
        name: &str,
        [inputs, outputs]: [usize; 2],
    ) -> Result<Param<Tensor<2>>, StateDictError> {
        let weight = self.data(name, &[outputs, inputs])?.transposed();
        Ok(Param::from_tensor(Tensor::from_data(
            TensorData::new(weight.data, [inputs, outputs]),
            self.device,
        )))
    }
}

/// Collects Burn's tensors under reference names.
#[derive(Default)]
struct Saver(StateDict);

impl Saver {
    fn insert<const D: usize>(&mut self, name: &str, tensor: &Tensor<D>) {
        let shape = tensor.dims().to_vec();
        let data = tensor.to_data().iter::<f32>().collect();
        self.0.insert(name, shape, data);
    }

    fn tensor<const D: usize>(&mut self, name: &str, param: &Param<Tensor<D>>, pick: &mut impl Pick) {
        if let Some(value) = pick.pick(param) {
            self.insert(name, &value);
        }
    }

    /// Burn keeps `[in, out]` where the reference keeps `[out, in]`.
    fn linear(&mut self, name: &str, layer: &Linear, pick: &mut impl Pick) {
        if let Some(weight) = pick.pick(&layer.weight) {
            self.insert(&format!("{name}.weight"), &weight.transpose());
        }
        if let Some(bias) = &layer.bias {
            self.tensor(&format!("{name}.bias"), bias, pick);
        }
    }
}

/// Something that exists for each parameter: its value, or its gradient.
pub(crate) trait Pick {
    /// That of `param`, if there is one.
    fn pick<const D: usize>(&mut self, param: &Param<Tensor<D>>) -> Option<Tensor<D>>;
}

struct Values;

impl Pick for Values {
    fn pick<const D: usize>(&mut self, param: &Param<Tensor<D>>) -> Option<Tensor<D>> {
        Some(param.val())
    }
}

impl Ddit {
    /// A network with the given weights; each must be there and fit, and none be left over.
    pub fn from_weights(
        config: &NetworkConfig,
        mut weights: StateDict,
        device: &Device,
    ) -> Result<Self, NetworkError> {
        config.validate()?;
        weights.0.remove(ROTARY_BUFFER);
        let mut loader = Loader { weights, device };
        let (width, condition) = (config.hidden_size, config.cond_dim);
        let network = Self {
            embedding: loader.matrix(EMBEDDING, [config.states, width])?,
            sigma_0: loader.linear("sigma_map.mlp.0", [NOISE_FEATURES, condition], true)?,
            sigma_2: loader.linear("sigma_map.mlp.2", [condition, condition], true)?,
            blocks: (0..config.blocks)
                .map(|index| {
                    let name = |part: &str| format!("blocks.{index}.{part}");
                    Ok(Block {
                        norm1: loader.vector(&name("norm1.weight"), width)?,
                        attn_qkv: loader.linear(&name("attn_qkv"), [width, 3 * width], false)?,
                        attn_out: loader.linear(&name("attn_out"), [width, width], false)?,
                        norm2: loader.vector(&name("norm2.weight"), width)?,
                        mlp_0: loader.linear(&name("mlp.0"), [width, MLP_RATIO * width], true)?,
                        mlp_2: loader.linear(&name("mlp.2"), [MLP_RATIO * width, width], true)?,
                        modulation: loader.linear(&name("adaLN_modulation"), [condition, 6 * width], true)?,
                    })
                })
                .collect::<Result<_, StateDictError>>()?,
            norm_final: loader.vector("output_layer.norm_final.weight", width)?,
            modulation_final: loader.linear("output_layer.adaLN_modulation", [condition, 2 * width], true)?,
            output_weight: (!config.tie_embeddings)
                .then(|| loader.transposed(OUTPUT_WEIGHT, [width, config.states]))
                .transpose()?,
            output_bias: loader.vector("output_layer.linear.bias", config.states)?,
            config: *config,
            precision: Precision::default(),
        };
        match loader.weights.0.into_keys().next() {
            Some(name) => Err(StateDictError::Extra { name }.into()),
            None => Ok(network),
        }
    }

    /// The same network with other weights, on the same device; parameters get new identities.
    pub fn load_state_dict(&self, weights: &StateDict) -> Result<Self, NetworkError> {
        Self::from_weights(&self.config, weights.clone(), &self.device())
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

    /// All weights by reference name.
    pub fn state_dict(&self) -> StateDict {
        self.collect(&mut Values)
    }

    /// What `pick` finds for each parameter, by reference name.
    pub(crate) fn collect(&self, pick: &mut impl Pick) -> StateDict {
        let mut saver = Saver::default();
        saver.tensor(EMBEDDING, &self.embedding, pick);
        saver.linear("sigma_map.mlp.0", &self.sigma_0, pick);
        saver.linear("sigma_map.mlp.2", &self.sigma_2, pick);
        for (index, block) in self.blocks.iter().enumerate() {
            let name = |part: &str| format!("blocks.{index}.{part}");
            saver.tensor(&name("norm1.weight"), &block.norm1, pick);
            saver.linear(&name("attn_qkv"), &block.attn_qkv, pick);
            saver.linear(&name("attn_out"), &block.attn_out, pick);
            saver.tensor(&name("norm2.weight"), &block.norm2, pick);
            saver.linear(&name("mlp.0"), &block.mlp_0, pick);
            saver.linear(&name("mlp.2"), &block.mlp_2, pick);
            saver.linear(&name("adaLN_modulation"), &block.modulation, pick);
        }
        saver.tensor("output_layer.norm_final.weight", &self.norm_final, pick);
        saver.linear("output_layer.adaLN_modulation", &self.modulation_final, pick);
        if let Some(weight) = self.output_weight.as_ref().and_then(|weight| pick.pick(weight)) {
            saver.insert(OUTPUT_WEIGHT, &weight.transpose());
        }
        saver.tensor("output_layer.linear.bias", &self.output_bias, pick);
        saver.0
    }

    /// Log-scores `[batch, length, states]` of `tokens` `[batch, length]` under total noise `sigma`
    /// `[batch]`, without the offset of [`finish_log_scores`] and with the current token's entry as
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
            .map(|_| if unit(generator) < rate { 0.0 } else { kept })
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

/// Completes the log-scores of one sequence, `[length, states]` row by row: adds the offset of its
/// total noise (taken in f64, where `e^sigma - 1` near 0 keeps its digits) and zeroes each current
/// token's entry.
pub fn finish_log_scores(config: &NetworkConfig, log_scores: &mut [f32], tokens: &[Token], sigma: f64) {
    let offset = if config.scale_by_sigma {
        sigma_offset(sigma, config.states)
    } else {
        0.0
    };
    for (row, &token) in log_scores.chunks_exact_mut(config.states).zip(tokens) {
        for log_score in row.iter_mut() {
            *log_score = (f64::from(*log_score) + offset) as f32;
        }
        if let Some(current) = row.get_mut(token as usize) {
            *current = 0.0;
        }
    }
}

/// The CPU device that networks live on, recording gradients.
pub fn training_device() -> Device {
    Device::flex().autodiff()
}

/// The CPU device that networks live on, without gradients.
pub fn inference_device() -> Device {
    Device::flex()
}

/// Tokens as the network takes them, `[batch, length]`.
pub fn token_tensor(tokens: &[Token], length: usize, device: &Device) -> Tensor<2, Int> {
    let ids: Vec<i64> = tokens.iter().map(|&token| i64::from(token)).collect();
    let batch = ids.len() / length;
    Tensor::from_data(TensorData::new(ids, [batch, length]), device)
}
