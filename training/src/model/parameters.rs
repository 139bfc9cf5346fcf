//! The parameters of a network: their names and layouts, which are the reference's, and their first values. Whatever
//! loads, saves, checks or exports weights goes by one table, [`Ddit::table`].

use std::collections::HashMap;

use burn::Tensor;
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::nn::Linear;
use burn::tensor::{Device, TensorData};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::ddit::Ddit;
use super::device::inference_device;
use super::shape::{NetworkConfig, NetworkError};
use super::state_dict::{StateDict, StateDictError};
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
        let entries = Ddit::without_weights(self, &inference_device()).table();
        entries
            .into_iter()
            .map(|entry| (entry.name, entry.shape))
            .collect()
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

/// A parameter of a network.
struct Entry {
    /// Its name in the reference.
    name: String,
    /// Its shape there.
    shape: Vec<usize>,
    /// Whether Burn keeps its transpose: `[in, out]` where the reference keeps `[out, in]`.
    transposed: bool,
    id: ParamId,
}

/// The parameters of a network in the order in which they get their first values.
#[derive(Default)]
struct Table(Vec<Entry>);

impl Table {
    /// A parameter that is kept as in the reference.
    fn add<const D: usize>(&mut self, name: impl Into<String>, param: &Param<Tensor<D>>) {
        self.0.push(Entry {
            name: name.into(),
            shape: param.lazy_shape().to_vec(),
            transposed: false,
            id: param.id,
        });
    }

    fn add_transposed(&mut self, name: impl Into<String>, param: &Param<Tensor<2>>) {
        self.0.push(Entry {
            name: name.into(),
            shape: param.lazy_shape().iter().rev().copied().collect(),
            transposed: true,
            id: param.id,
        });
    }

    fn linear(&mut self, name: &str, layer: &Linear) {
        self.add_transposed(format!("{name}.weight"), &layer.weight);
        if let Some(bias) = &layer.bias {
            self.add(format!("{name}.bias"), bias);
        }
    }
}

impl Ddit {
    /// What each parameter is called: field by field.
    fn table(&self) -> Vec<Entry> {
        let mut table = Table::default();
        table.add(EMBEDDING, &self.embedding);
        table.linear("sigma_map.mlp.0", &self.sigma_0);
        table.linear("sigma_map.mlp.2", &self.sigma_2);
        for (index, block) in self.blocks.iter().enumerate() {
            let name = |part: &str| format!("blocks.{index}.{part}");
            table.add(name("norm1.weight"), &block.norm1);
            table.linear(&name("attn_qkv"), &block.attn_qkv);
            table.linear(&name("attn_out"), &block.attn_out);
            table.add(name("norm2.weight"), &block.norm2);
            table.linear(&name("mlp.0"), &block.mlp_0);
            table.linear(&name("mlp.2"), &block.mlp_2);
            table.linear(&name("adaLN_modulation"), &block.modulation);
        }
        table.add("output_layer.norm_final.weight", &self.norm_final);
        if let Some(weight) = &self.output_weight {
            table.add_transposed(OUTPUT_WEIGHT, weight);
        }
        table.add("output_layer.linear.bias", &self.output_bias);
        table.linear("output_layer.adaLN_modulation", &self.modulation_final);
        table.0
    }
}

/// Gives every parameter the weights of its name.
struct Loader<'a> {
    entries: HashMap<ParamId, Entry>,
    weights: StateDict,
    device: &'a Device,
    misfit: Option<StateDictError>,
}

impl ModuleMapper for Loader<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(entry) = self.entries.get(&param.id) else {
            return param;
        };
        match self.weights.take(&entry.name, &entry.shape) {
            Ok(tensor) => {
                let tensor = if entry.transposed {
                    tensor.transposed()
                } else {
                    tensor
                };
                let data = TensorData::new(tensor.data, tensor.shape);
                Param::from_tensor(Tensor::from_data(data, self.device))
            }
            Err(misfit) => {
                self.misfit.get_or_insert(misfit);
                param
            }
        }
    }
}

/// Collects what there is of each parameter, under its name.
struct Collector<'a, P> {
    entries: HashMap<ParamId, Entry>,
    pick: &'a mut P,
    found: StateDict,
}

impl<P: Pick> ModuleVisitor for Collector<'_, P> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let (Some(entry), Some(tensor)) = (self.entries.remove(&param.id), self.pick.pick(param)) else {
            return;
        };
        let tensor = if entry.transposed {
            tensor.transpose()
        } else {
            tensor
        };
        let data = tensor.into_data().iter::<f32>().collect();
        self.found.insert(entry.name, entry.shape, data);
    }
}

fn by_id(entries: Vec<Entry>) -> HashMap<ParamId, Entry> {
    entries.into_iter().map(|entry| (entry.id, entry)).collect()
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
        let network = Self::without_weights(config, device);
        let mut loader = Loader {
            entries: by_id(network.table()),
            weights,
            device,
            misfit: None,
        };
        let network = network.map(&mut loader);
        let Loader { weights, misfit, .. } = loader;
        let extra = weights.0.into_keys().next();
        match misfit.or_else(|| extra.map(|name| StateDictError::Extra { name })) {
            Some(misfit) => Err(misfit.into()),
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
        let mut collector = Collector {
            entries: by_id(self.table()),
            pick,
            found: StateDict::default(),
        };
        self.visit(&mut collector);
        collector.found
    }
}
