//! What networks that do not see the noise make of it: the same for every canvas, so that numbers take the place of
//! matrices.

use crate::model::state_dict::{HostTensor, StateDict, StateDictError};
use crate::model::{NOISE_FEATURES, NetworkConfig};

/// The condition, which is that of no noise.
pub(super) fn condition(weights: &StateDict) -> Result<Vec<f64>, StateDictError> {
    let half = NOISE_FEATURES / 2;
    let features: Vec<f64> = (0..NOISE_FEATURES)
        .map(|k| f64::from(u8::from(k < half)))
        .collect();
    let silu = |x: f64| x / (1.0 + (-x).exp());
    let hidden = affine(weights, &features, "sigma_map.mlp.0")?;
    let hidden: Vec<f64> = hidden.into_iter().map(silu).collect();
    let condition = affine(weights, &hidden, "sigma_map.mlp.2")?;
    Ok(condition.into_iter().map(silu).collect())
}

/// `W x + b`, with the layer's weight, `[out, in]`, and bias.
pub(super) fn affine(weights: &StateDict, x: &[f64], layer: &str) -> Result<Vec<f64>, StateDictError> {
    let (weight, bias) = (
        tensor(weights, &format!("{layer}.weight"))?,
        tensor(weights, &format!("{layer}.bias"))?,
    );
    let rows = weight.data.chunks_exact(x.len());
    let product = |row: &[f32]| -> f64 { row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum() };
    Ok(rows
        .zip(&bias.data)
        .map(|(row, b)| product(row) + f64::from(*b))
        .collect())
}

fn tensor<'a>(weights: &'a StateDict, name: &str) -> Result<&'a HostTensor, StateDictError> {
    weights.get(name).ok_or_else(|| StateDictError::Missing {
        name: name.to_owned(),
        expected: Vec::new(),
    })
}

/// The layers that norms and gates are modulated by.
pub(super) fn modulations(config: &NetworkConfig) -> impl Iterator<Item = String> {
    let blocks = (0..config.blocks).map(|block| format!("blocks.{block}."));
    blocks
        .chain(["output_layer.".to_owned()])
        .map(|place| format!("{place}adaLN_modulation"))
}
