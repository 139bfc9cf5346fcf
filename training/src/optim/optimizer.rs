//! What happens between gradients and weights: sum over threads, clipping, learning rate.

use burn::Tensor;
use burn::lr_scheduler::LrSchedulerConfig;
use burn::lr_scheduler::module_lr_scheduler::{ModuleLearningRate, ModuleLrSchedulerConfig};
use burn::module::{Module, ModuleVisitor, Param, ParamGroup};
use burn::optim::decay::WeightDecayConfig;
use burn::optim::momentum::MomentumConfig;
use burn::optim::{AdamWConfig, AdjustLrFn, GradientsParams, ModuleOptimizer, MuonConfig};
use burn::tensor::Device;

use crate::config::{Decay, MuonSection, OptimizerSection};
use crate::model::Ddit;

/// The matrices inside blocks, by their paths in [`Ddit`]: the ones that Muon may move.
fn block_matrices() -> ParamGroup {
    ParamGroup::from_any_predicates(vec![
        "attn_qkv.weight",
        "attn_out.weight",
        "mlp_0.weight",
        "mlp_2.weight",
    ])
}

/// Norms, biases (those of modulations, which hold the gates, too) and the embedding: to pull them
/// towards 0 is no prior of theirs.
fn undecayed() -> ParamGroup {
    ParamGroup::from_any_predicates(vec!["norm", "bias", "embedding"])
}

/// Share of a run in which [`Decay::LinearEnd`] falls.
const LAST_PART: f64 = 0.2;

impl OptimizerSection {
    /// Burn's AdamW with these settings, and its Muon for the matrices inside blocks where that is asked for.
    pub fn build(&self) -> ModuleOptimizer {
        let adamw = AdamWConfig::new()
            .with_beta_1(self.betas[0] as f32)
            .with_beta_2(self.betas[1] as f32)
            .with_epsilon(self.epsilon as f32)
            .with_weight_decay(self.weight_decay as f32);
        let mut optimizer = adamw.init();
        if self.decay_matrices_only {
            optimizer = optimizer.with_group(undecayed(), adamw.with_weight_decay(0.0).build(), None);
        }
        if let Some(muon) = &self.muon {
            optimizer = optimizer.with_group(block_matrices(), muon.config(self.weight_decay).build(), None);
        }
        optimizer
    }

    /// The learning rate of every parameter at `learning_rate`, that of AdamW.
    pub fn learning_rates(&self, learning_rate: f64) -> ModuleLearningRate {
        let Some(muon) = &self.muon else {
            return learning_rate.into();
        };
        let matrices = LrSchedulerConfig::from(learning_rate * muon.lr / self.lr);
        let rates = ModuleLrSchedulerConfig::new(learning_rate.into()).with_group(block_matrices(), matrices);
        // Constants are rates that cannot be refused.
        rates
            .init()
            .map_or_else(|_| learning_rate.into(), |mut rates| rates.step())
    }

    /// The learning rate of step `step` (from 0) when `progress` in [0, 1] of the run is over.
    pub fn learning_rate(&self, step: u64, progress: f64) -> f64 {
        let warmup = ((step + 1) as f64 / self.warmup_steps.max(1) as f64).min(1.0);
        let decay = match self.decay {
            Decay::Constant => 1.0,
            Decay::LinearEnd => ((1.0 - progress) / LAST_PART).clamp(0.0, 1.0),
            Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress.clamp(0.0, 1.0)).cos()),
        };
        warmup * (self.lr * decay).max(self.min_lr)
    }
}

impl MuonSection {
    /// Muon (K. Jordan 2024) with updates as large as AdamW's (section 2.2 of arXiv 2502.16982), so that learning
    /// rate and weight decay mean the same for both.
    fn config(&self, weight_decay: f64) -> MuonConfig {
        let momentum = MomentumConfig {
            momentum: self.momentum,
            dampening: 0.0,
            nesterov: true,
        };
        MuonConfig::new()
            .with_adjust_lr_fn(AdjustLrFn::MatchRmsAdamW)
            .with_momentum(momentum)
            .with_weight_decay((weight_decay > 0.0).then(|| WeightDecayConfig::new(weight_decay as f32)))
    }
}

/// Sums gradients over `parts`, wherever they are, on `place`, or else on the network's device, and in their order, so
/// that the same parts give the same bits.
pub fn sum(network: &Ddit, place: Option<&Device>, parts: Vec<GradientsParams>) -> GradientsParams {
    let mut total = Sum {
        place,
        parts,
        sum: GradientsParams::new(),
    };
    network.visit(&mut total);
    total.sum
}

/// Scales `gradients` down to `largest` if their Euclidean norm over all parameters is more. Returns
/// them with their norm before that.
pub fn clip(network: &Ddit, gradients: GradientsParams, largest: f64) -> (GradientsParams, f64) {
    let mut squares = Squares {
        gradients: &gradients,
        squares: Vec::new(),
    };
    network.visit(&mut squares);
    let squares = squares.squares;
    if squares.is_empty() {
        return (gradients, 0.0);
    }
    // Read at once: every read waits for the device.
    let norm = Tensor::cat(squares, 0)
        .into_data()
        .iter::<f32>()
        .map(f64::from)
        .sum::<f64>()
        .sqrt();
    if norm <= largest {
        return (gradients, norm);
    }
    let mut scaled = Scale {
        gradients,
        factor: largest / norm,
    };
    network.visit(&mut scaled);
    (scaled.gradients, norm)
}

struct Sum<'a> {
    place: Option<&'a Device>,
    parts: Vec<GradientsParams>,
    sum: GradientsParams,
}

impl ModuleVisitor for Sum<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let place = self.place.cloned();
        let place = place.unwrap_or_else(|| param.val().device().inner());
        let gradients = self
            .parts
            .iter_mut()
            .filter_map(|part| part.remove::<D>(param.id))
            .map(|gradient| gradient.to_device(&place));
        if let Some(sum) = gradients.reduce(|sum, part| sum + part) {
            self.sum.register(param.id, sum);
        }
    }
}

struct Squares<'a> {
    gradients: &'a GradientsParams,
    squares: Vec<Tensor<1>>,
}

impl ModuleVisitor for Squares<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.gradients.get::<D>(param.id) {
            self.squares.push(gradient.square().sum());
        }
    }
}

struct Scale {
    gradients: GradientsParams,
    factor: f64,
}

impl ModuleVisitor for Scale {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        if let Some(gradient) = self.gradients.remove::<D>(param.id) {
            self.gradients
                .register(param.id, gradient.mul_scalar(self.factor));
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::model::{NetworkConfig, training_device};

    struct Filled(GradientsParams, f64);

    impl ModuleVisitor for Filled {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            self.0.register(param.id, param.val().inner().full_like(self.1));
        }
    }

    struct Norm(GradientsParams, f64);

    impl ModuleVisitor for Norm {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
            if let Some(gradient) = self.0.remove::<D>(param.id) {
                self.1 += f64::from(gradient.square().sum().into_scalar::<f32>());
            }
        }
    }

    fn shape() -> NetworkConfig {
        NetworkConfig::tiny()
    }

    #[test]
    fn parts_are_summed_and_clipped_by_their_common_norm() {
        let network = shape().init(1, 0.0, &training_device()).unwrap();
        let filled = |value: f64| {
            let mut filled = Filled(GradientsParams::new(), value);
            network.visit(&mut filled);
            filled.0
        };
        let all = (network.num_params() as f64).sqrt();
        for (largest, expected) in [(1.0, 1.0), (1e6, 3.0 * all)] {
            let (clipped, before) = clip(
                &network,
                sum(&network, None, vec![filled(1.0), filled(2.0)]),
                largest,
            );
            assert!((before / (3.0 * all) - 1.0).abs() < 1e-5);
            let mut norm = Norm(clipped, 0.0);
            network.visit(&mut norm);
            assert!((norm.1.sqrt() / expected - 1.0).abs() < 1e-5);
        }
    }

    /// How far a step from weights of 1 with gradients of 1 and -1 by turns takes every parameter: its name,
    /// and the root of its mean square.
    fn moved(settings: &str, steps: usize, saved_after: Option<usize>) -> Vec<(String, f64)> {
        let settings: OptimizerSection = toml::from_str(&format!(
            "lr = 1e-3\nbetas = [0.9, 0.99]\nwarmup_steps = 1\ngradient_clip_norm = 1.0\nema_decay = 0.9\n{settings}"
        ))
        .unwrap();
        let config = shape();
        let start = config.initial_weights(1, 1.0);
        let mut network = config.init(1, 1.0, &training_device()).unwrap();
        let mut optimizer = settings.build();
        for step in 0..steps {
            if saved_after == Some(step) {
                optimizer = settings.build().load_record(optimizer.to_record());
            }
            let mut gradients = Filled(GradientsParams::new(), 1.0);
            network.visit(&mut gradients);
            network = optimizer.step(settings.learning_rates(settings.lr), network, gradients.0);
        }
        let end = network.valid().state_dict();
        start
            .0
            .iter()
            .map(|(name, before)| {
                let after = &end.0[name].data;
                let squares = before
                    .data
                    .iter()
                    .zip(after)
                    .map(|(b, a)| f64::from(a - b).powi(2));
                let root = (squares.sum::<f64>() / after.len() as f64).sqrt();
                (name.clone(), root)
            })
            .collect()
    }

    #[test]
    fn muon_moves_the_matrices_inside_blocks_and_adamw_the_rest() {
        for (name, root) in moved("muon = { lr = 2e-3 }", 1, None) {
            let inside = name.starts_with("blocks.0.") && !name.contains("adaLN");
            let expected = if inside && name.ends_with("weight") && !name.contains("norm") {
                // A gradient of rank one becomes one of norm about 1, times 0.2 * sqrt(longer side).
                let (longer, shorter) = match name.as_str() {
                    "blocks.0.attn_qkv.weight" => (24.0_f64, 8.0_f64),
                    "blocks.0.attn_out.weight" => (8.0, 8.0),
                    _ => (32.0, 8.0),
                };
                2e-3 * 0.2 * longer.sqrt() / (longer * shorter).sqrt()
            } else {
                1e-3
            };
            // Five Newton-Schulz steps bring singular values to 0.7 to 1.2, not to 1.
            assert!(
                (0.6..1.3).contains(&(root / expected)),
                "{name}: {root}, not {expected}"
            );
        }
    }

    #[test]
    fn both_optimizers_go_on_from_what_was_saved() {
        let settings = "muon = { lr = 2e-3 }\nweight_decay = 0.1\ndecay_matrices_only = true";
        assert_eq!(moved(settings, 3, None), moved(settings, 3, Some(2)));
    }

    #[test]
    fn norms_biases_and_embeddings_are_left_out_of_the_decay() {
        let decay = |only: bool| {
            moved(
                &format!("weight_decay = 500.0\ndecay_matrices_only = {only}"),
                1,
                None,
            )
        };
        for ((name, all), (_, matrices)) in decay(false).into_iter().zip(decay(true)) {
            let left_out = ["norm", "bias", "embed"].iter().any(|part| name.contains(part));
            // Decaying by a half moves weights much further than a learning rate of 1e-3, but for those that are 0.
            let moved = name.starts_with("blocks.0.attn") || name.starts_with("sigma_map.mlp");
            if left_out {
                assert!((matrices / 1e-3 - 1.0).abs() < 1e-2, "{name}: {matrices}");
            } else if moved {
                assert!(matrices > 1e-2 && all == matrices, "{name}: {matrices}, {all}");
            }
        }
    }

    #[test]
    fn the_learning_rate_warms_up_and_falls() {
        let settings: OptimizerSection = toml::from_str(
            "lr = 2.0\nbetas = [0.9, 0.99]\nwarmup_steps = 4\ndecay = \"cosine\"\ngradient_clip_norm = 1.0\nema_decay = 0.9",
        )
        .unwrap();
        assert!((settings.learning_rate(0, 0.0) - 0.5).abs() < 1e-12);
        assert!((settings.learning_rate(100, 0.5) - 1.0).abs() < 1e-12);
        assert!(settings.learning_rate(100, 1.0).abs() < 1e-12);
        let floor = OptimizerSection {
            min_lr: 0.2,
            ..settings
        };
        assert!((floor.learning_rate(100, 1.0) - 0.2).abs() < 1e-12);
        assert!((floor.learning_rate(0, 1.0) - 0.05).abs() < 1e-12);
        let settings = OptimizerSection {
            decay: Decay::LinearEnd,
            ..settings
        };
        for (progress, rate) in [(0.0, 2.0), (0.8, 2.0), (0.9, 1.0), (1.0, 0.0)] {
            assert!(
                (settings.learning_rate(100, progress) - rate).abs() < 1e-12,
                "{progress}"
            );
        }
    }
}
