//! The network, its loss and its gradients against numbers of the authors' implementation.
#![allow(clippy::unwrap_used, clippy::wildcard_enum_match_arm, reason = "tests")]

use std::collections::BTreeMap;
use std::path::PathBuf;

use burn::Tensor;
use burn::module::Param;
use burn::optim::GradientsParams;
use burn::tensor::TensorData;
use denoised::diffusion::{Graph, Token};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

use super::parameters::Pick;
use crate::fit::step::gradients;
use crate::import::{self, Choice};
use crate::loss::Objective;
use crate::model::state_dict::StateDict;
use crate::model::{Ddit, NetworkConfig, finish_log_scores, inference_device, token_tensor, training_device};
use numbers::{Numbers, fixture, numbers};

#[path = "../../tests/common/numbers.rs"]
mod numbers;

struct Fixture {
    config: NetworkConfig,
    objective: Objective,
    weights: StateDict,
    folder: PathBuf,
}

impl Fixture {
    fn read(name: &str) -> Self {
        let folder = fixture(name);
        let checkpoint = import::read(&folder, Choice::Averaged).unwrap();
        // Its numbers were computed without.
        let config = NetworkConfig {
            dropout: 0.0,
            ..checkpoint.network
        };
        Self {
            config,
            objective: Objective {
                graph: Graph::new(checkpoint.graph, config.states),
                schedule: checkpoint.schedule,
                offset: config.scale_by_sigma,
                parameterization: config.parameterization,
            },
            weights: checkpoint.weights,
            folder,
        }
    }

    fn numbers(&self, file: &str) -> BTreeMap<String, Numbers> {
        numbers(&self.folder.join(file))
    }
}

fn check_log_scores(name: &str) {
    let fixture = Fixture::read(name);
    let config = &fixture.config;
    let device = inference_device();
    let network = Ddit::from_weights(config, fixture.weights.clone(), &device).unwrap();
    let numbers = fixture.numbers("io.safetensors");
    let (tokens, sigma): (Vec<Token>, _) = (numbers["tokens"].ids(), &numbers["sigma"].data);
    let noise = Tensor::from_data(TensorData::new(sigma.clone(), [sigma.len()]), &device);
    let log_scores = network.forward(token_tensor(&tokens, config.length, &device), noise);
    let mut log_scores: Vec<f32> = log_scores.into_data().iter().collect();
    let sequences = log_scores.chunks_exact_mut(config.length * config.states);
    for ((sequence, tokens), &sigma) in sequences.zip(tokens.chunks_exact(config.length)).zip(sigma) {
        finish_log_scores(config, sequence, tokens, f64::from(sigma));
    }
    for (ours, theirs) in log_scores.iter().zip(&numbers["log_score"].data) {
        assert!((ours - theirs).abs() < 2e-4, "{ours} is not {theirs}");
    }
}

struct ByParameter(GradientsParams);

impl Pick for ByParameter {
    fn pick<const D: usize>(&mut self, param: &Param<Tensor<D>>) -> Option<Tensor<D>> {
        self.0.remove(param.id)
    }
}

fn check_training(name: &str) {
    let fixture = Fixture::read(name);
    let network = Ddit::from_weights(&fixture.config, fixture.weights.clone(), &training_device()).unwrap();
    let numbers = fixture.numbers("train.safetensors");
    let noise: Vec<[f64; 2]> = numbers["sigma"]
        .data
        .iter()
        .zip(&numbers["rate"].data)
        .map(|(&sigma, &rate)| [f64::from(sigma), f64::from(rate)])
        .collect();
    let clean = numbers["x0"].ids::<Token>();
    let batch = fixture
        .objective
        .terms(&clean, numbers["tokens"].ids(), fixture.config.length, &noise);

    let expected = &numbers["loss_per_sequence"].data;
    for (ours, &theirs) in batch.sequence_losses(&network).iter().zip(expected) {
        assert!(
            (ours / f64::from(theirs) - 1.0).abs() < 1e-4,
            "{ours} is not {theirs}"
        );
    }
    let (loss, found) = gradients(
        &network,
        &batch,
        batch.sequences(),
        &mut ChaCha8Rng::seed_from_u64(0),
    );
    let theirs = f64::from(numbers["loss"].data[0]);
    assert!((loss / theirs - 1.0).abs() < 1e-4, "{loss} is not {theirs}");

    let found = network.collect(&mut ByParameter(found));
    assert_eq!(found.0.len(), fixture.config.parameters().len());
    for (name, ours) in &found.0 {
        let theirs = &numbers[&format!("grad.{name}")];
        assert_eq!(ours.shape, theirs.shape, "{name}");
        let norm = |data: &mut dyn Iterator<Item = f32>| {
            data.map(|x| f64::from(x) * f64::from(x)).sum::<f64>().sqrt()
        };
        let error = norm(&mut ours.data.iter().zip(&theirs.data).map(|(a, b)| a - b));
        let size = norm(&mut theirs.data.iter().copied());
        assert!(
            error <= 1e-3 * size + 1e-6,
            "gradient of {name} is off by {error} of {size}"
        );
    }
}

#[test]
fn absorbing_log_scores_are_the_references() {
    check_log_scores("sedd-tiny-absorb");
}

#[test]
fn uniform_log_scores_are_the_references() {
    check_log_scores("sedd-tiny-uniform");
}

#[test]
fn absorbing_loss_and_gradients_are_the_references() {
    check_training("sedd-tiny-absorb");
}

#[test]
fn uniform_loss_and_gradients_are_the_references() {
    check_training("sedd-tiny-uniform");
}

#[test]
fn weights_come_back_under_their_names() {
    let fixture = Fixture::read("sedd-tiny-absorb");
    let network = Ddit::from_weights(&fixture.config, fixture.weights.clone(), &inference_device()).unwrap();
    let mut expected = fixture.weights.clone();
    expected.0.remove("rotary_emb.inv_freq");
    assert_eq!(network.state_dict(), expected);
}

#[test]
fn weights_that_do_not_fit_are_named() {
    let fixture = Fixture::read("sedd-tiny-absorb");
    let error = |change: &dyn Fn(&mut StateDict)| {
        let mut weights = fixture.weights.clone();
        change(&mut weights);
        Ddit::from_weights(&fixture.config, weights, &inference_device())
            .unwrap_err()
            .to_string()
    };
    let missing = error(&|weights| {
        weights.0.remove("blocks.1.mlp.0.bias");
    });
    assert!(missing.contains("blocks.1.mlp.0.bias is missing"), "{missing}");
    let extra = error(&|weights| weights.insert("blocks.2.mlp.0.bias", vec![1], vec![0.0]));
    assert!(
        extra.contains("blocks.2.mlp.0.bias belongs to no parameter"),
        "{extra}"
    );
    let misshapen = error(&|weights| weights.insert("sigma_map.mlp.0.bias", vec![3], vec![0.0; 3]));
    assert!(
        misshapen.contains("sigma_map.mlp.0.bias has shape [3]"),
        "{misshapen}"
    );
}
