//! Checkpoints of RADD (arXiv 2406.03736), whose network does not see the noise: norms have a bias, and nothing is
//! modulated. As a network of ours the biases are shifts, and gates are 1.

use crate::model::state_dict::{HostTensor, StateDict};
use crate::model::{MLP_RATIO, NetworkConfig};

/// A tensor that networks which see the noise do not have.
const MARK: &str = "blocks.0.norm1.bias";

/// Whether `weights` are those of such a network.
pub(super) fn is_one(weights: &StateDict) -> bool {
    weights.get(MARK).is_some()
}

/// Name and shape of every parameter, in the order in which the authors' network has them.
pub(super) fn parameters(network: &NetworkConfig) -> Vec<(String, Vec<usize>)> {
    let (states, width) = (network.states, network.hidden_size);
    let inner = MLP_RATIO * width;
    let mut list = vec![("vocab_embed.embedding".to_owned(), vec![states, width])];
    for block in 0..network.blocks {
        let shapes: [(&str, &[usize]); 10] = [
            ("norm1.weight", &[width]),
            ("norm1.bias", &[width]),
            ("attn_qkv.weight", &[3 * width, width]),
            ("attn_out.weight", &[width, width]),
            ("norm2.weight", &[width]),
            ("norm2.bias", &[width]),
            ("mlp.0.weight", &[inner, width]),
            ("mlp.0.bias", &[inner]),
            ("mlp.2.weight", &[width, inner]),
            ("mlp.2.bias", &[width]),
        ];
        let named = |(name, shape): (&str, &[usize])| (format!("blocks.{block}.{name}"), shape.to_vec());
        list.extend(shapes.map(named));
    }
    let shapes: [(&str, &[usize]); 4] = [
        ("norm_final.weight", &[width]),
        ("norm_final.bias", &[width]),
        ("linear.weight", &[states, width]),
        ("linear.bias", &[states]),
    ];
    list.extend(shapes.map(|(name, shape)| (format!("output_layer.{name}"), shape.to_vec())));
    list
}

/// The same network with what ours has beside it: shifts in place of the biases, gates that let all through, and noise
/// that nothing follows from.
pub(super) fn converted(mut weights: StateDict, network: &NetworkConfig) -> StateDict {
    let width = network.hidden_size;
    let mut bias = |name: &str| {
        let bias = weights.0.remove(&format!("{name}.bias"));
        bias.map_or_else(|| vec![0.0; width], |HostTensor { data, .. }| data)
    };
    let zeros = vec![0.0; width];
    let ones = vec![1.0; width];
    let mut modulations: Vec<(String, Vec<f32>)> = (0..network.blocks)
        .map(|block| {
            let [attention, mlp] = ["norm1", "norm2"].map(|norm| bias(&format!("blocks.{block}.{norm}")));
            // Shift, scale and gate of the attention, then of the MLP.
            let parts = [
                attention,
                zeros.clone(),
                ones.clone(),
                mlp,
                zeros.clone(),
                ones.clone(),
            ];
            (format!("blocks.{block}.adaLN_modulation.bias"), parts.concat())
        })
        .collect();
    let last = [bias("output_layer.norm_final"), zeros].concat();
    modulations.push(("output_layer.adaLN_modulation.bias".to_owned(), last));
    for (name, data) in modulations {
        weights.insert(name, vec![data.len()], data);
    }
    for (name, shape) in network.parameters() {
        if weights.get(&name).is_none() && (name.starts_with("sigma_map") || name.contains("adaLN")) {
            let entries = shape.iter().product();
            weights.insert(name, shape, vec![0.0; entries]);
        }
    }
    weights
}
