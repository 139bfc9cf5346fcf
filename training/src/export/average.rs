//! The mean of several networks' weights, which often tells more of text that none has seen than each of them does ("model
//! soups", arXiv 2203.05482): where one was trained on from another, or both from a third.

use super::{ROTARY_BUFFER, check, constant};
use crate::model::NetworkConfig;
use crate::model::state_dict::{StateDict, StateDictError};

/// The mean of weights of `config`, each counting the same; empty where there are none.
///
/// Of networks that do not see the noise, what they make of it is averaged, as biases behind a condition of zeros: matrices
/// that give the same modulation need not be alike.
///
/// # Errors
/// Weights that do not fit the network.
pub fn mean(config: &NetworkConfig, all: &[&StateDict]) -> Result<StateDict, StateDictError> {
    let all = all.iter().map(|weights| folded(config, weights));
    let all: Vec<StateDict> = all.collect::<Result<_, _>>()?;
    let mut mean = all.first().cloned().unwrap_or_default();
    for (name, tensor) in &mut mean.0 {
        let others: Vec<&[f32]> = all
            .iter()
            .map(|weights| weights.0[name].data.as_slice())
            .collect();
        for (index, entry) in tensor.data.iter_mut().enumerate() {
            let sum: f64 = others.iter().map(|data| f64::from(data[index])).sum();
            *entry = (sum / others.len() as f64) as f32;
        }
    }
    Ok(mean)
}

/// The same network, of which what does not see the noise is in biases.
fn folded(config: &NetworkConfig, weights: &StateDict) -> Result<StateDict, StateDictError> {
    check(config, weights)?;
    let mut folded = weights.clone();
    folded.0.remove(ROTARY_BUFFER);
    if config.time_conditioned {
        return Ok(folded);
    }
    let condition = constant::condition(weights)?;
    for layer in constant::modulations(config) {
        let row = constant::affine(weights, &condition, &layer)?;
        let outputs = row.len();
        let row = row.into_iter().map(|entry| entry as f32).collect();
        folded.insert(format!("{layer}.bias"), vec![outputs], row);
        zero(&mut folded, &format!("{layer}.weight"));
    }
    for layer in ["sigma_map.mlp.0", "sigma_map.mlp.2"] {
        zero(&mut folded, &format!("{layer}.weight"));
        zero(&mut folded, &format!("{layer}.bias"));
    }
    Ok(folded)
}

fn zero(weights: &mut StateDict, name: &str) {
    if let Some(tensor) = weights.0.get_mut(name) {
        tensor.data.fill(0.0);
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use burn::tensor::{Tensor, TensorData};
    use denoised::diffusion::Token;

    use super::*;
    use crate::model::device::inference_device;
    use crate::model::{Ddit, token_tensor};

    fn config(time_conditioned: bool) -> NetworkConfig {
        NetworkConfig {
            time_conditioned,
            ..NetworkConfig::tiny()
        }
    }

    /// Random weights, none of which are zeros.
    fn weights(config: &NetworkConfig, seed: u64) -> StateDict {
        let mut weights = config.initial_weights(seed, 0.7);
        for (number, tensor) in weights.0.values_mut().enumerate() {
            for (index, entry) in tensor.data.iter_mut().enumerate() {
                *entry += 0.05 * ((seed + 1) as f32 * (index + 7 * number) as f32).sin();
            }
        }
        weights
    }

    fn log_scores(config: &NetworkConfig, weights: &StateDict) -> Vec<f32> {
        let device = inference_device();
        let network = Ddit::from_weights(config, weights.clone(), &device).unwrap();
        let tokens: Vec<Token> = (0..config.length as Token)
            .map(|i| i % config.states as Token)
            .collect();
        let sigma = Tensor::from_data(TensorData::from([0.7_f32]), &device);
        let scores = network.forward(token_tensor(&tokens, config.length, &device), sigma);
        scores.into_data().try_to_vec().unwrap()
    }

    fn difference(a: &[f32], b: &[f32]) -> f32 {
        a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    }

    #[test]
    fn the_mean_of_one_is_the_same_network() {
        for time_conditioned in [true, false] {
            let config = config(time_conditioned);
            let one = weights(&config, 1);
            let expected = log_scores(&config, &one);
            for count in [1, 3] {
                let mean = mean(&config, &vec![&one; count]).unwrap();
                let off = difference(&expected, &log_scores(&config, &mean));
                assert!(
                    off < 1e-4,
                    "{off} of {count}, time_conditioned = {time_conditioned}"
                );
            }
        }
    }

    #[test]
    fn entries_and_modulations_are_means() {
        let seen = config(true);
        let (a, b) = (weights(&seen, 1), weights(&seen, 2));
        let of_both = mean(&seen, &[&a, &b]).unwrap();
        for (name, tensor) in &of_both.0 {
            for (index, entry) in tensor.data.iter().enumerate() {
                let expected = f64::midpoint(a.0[name].data[index].into(), b.0[name].data[index].into());
                assert_eq!(*entry, expected as f32, "{name}");
            }
        }
        // What another matrix makes the same of changes nothing.
        let unseen = config(false);
        let (a, b) = (weights(&unseen, 1), weights(&unseen, 2));
        let apart = mean(&unseen, &[&a, &b]).unwrap();
        let folded = super::folded(&unseen, &b).unwrap();
        assert_ne!(folded.0["sigma_map.mlp.0.bias"], b.0["sigma_map.mlp.0.bias"]);
        assert_eq!(apart, mean(&unseen, &[&a, &folded]).unwrap());
    }

    #[test]
    fn weights_of_another_shape_are_named() {
        let seen = config(true);
        let wider = NetworkConfig {
            blocks: seen.blocks + 1,
            ..seen
        };
        let error = mean(&seen, &[&weights(&seen, 1), &weights(&wider, 1)]).unwrap_err();
        assert!(matches!(&error, StateDictError::Extra { .. }), "{error}");
    }
}
