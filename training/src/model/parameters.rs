//! The parameters of a network: their names and shapes, which are the reference's, their first values, and the fields
//! that they are kept in. Whatever loads, saves or exports weights goes by what stands here.

use burn::Tensor;
use burn::module::Param;
use burn::nn::Linear;
use burn::tensor::{Device, TensorData};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::ddit::{Block, Ddit};
use super::precision::Precision;
use super::shape::{MLP_RATIO, NOISE_FEATURES, NetworkConfig, NetworkError};
use super::state_dict::{HostTensor, StateDict, StateDictError};
use crate::random::unit_f32;

/// The head's matrix, `[states, width]`.
pub(crate) const OUTPUT_WEIGHT: &str = "output_layer.linear.weight";
/// The embedding, `[states, width]`, which stands in for the head's matrix where they are tied.
pub(crate) const EMBEDDING: &str = "vocab_embed.embedding";
/// A buffer of published checkpoints that follows from the head width.
const ROTARY_BUFFER: &str = "rotary_emb.inv_freq";

impl NetworkConfig {
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
                    _ => bound * (2.0 * unit_f32(&mut generator) - 1.0),
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
}
