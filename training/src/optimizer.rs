//! What happens between gradients and weights: sum over threads, clipping, learning rate.

use burn::Tensor;
use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::{AdamWConfig, GradientsParams, ModuleOptimizer};

use crate::config::{Decay, OptimizerSection};
use crate::network::Ddit;

impl OptimizerSection {
    /// Burn's AdamW with these settings.
    pub fn adamw(&self) -> ModuleOptimizer {
        AdamWConfig::new()
            .with_beta_1(self.betas[0] as f32)
            .with_beta_2(self.betas[1] as f32)
            .with_epsilon(self.epsilon as f32)
            .with_weight_decay(self.weight_decay as f32)
            .init()
    }

    /// The learning rate of step `step` (from 0) when `progress` in [0, 1] of the run is over.
    pub fn learning_rate(&self, step: u64, progress: f64) -> f64 {
        let warmup = ((step + 1) as f64 / self.warmup_steps.max(1) as f64).min(1.0);
        let decay = match self.decay {
            Decay::Constant => 1.0,
            Decay::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * progress.clamp(0.0, 1.0)).cos()),
        };
        self.lr * warmup * decay
    }
}

/// Sums gradients over `parts`, wherever they are, on the network's device and in their order, so that the same parts give the same bits.
pub fn sum(network: &Ddit, parts: Vec<GradientsParams>) -> GradientsParams {
    let mut total = Sum {
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

struct Sum {
    parts: Vec<GradientsParams>,
    sum: GradientsParams,
}

impl ModuleVisitor for Sum {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let home = param.val().device().inner();
        let gradients = self
            .parts
            .iter_mut()
            .filter_map(|part| part.remove::<D>(param.id))
            .map(|gradient| gradient.to_device(&home));
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
    use crate::network::{NetworkConfig, training_device};

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

    #[test]
    fn parts_are_summed_and_clipped_by_their_common_norm() {
        let config = NetworkConfig {
            states: 5,
            length: 4,
            hidden_size: 8,
            cond_dim: 4,
            blocks: 1,
            heads: 2,
            dropout: 0.0,
            scale_by_sigma: true,
            parameterization: denoised::bundle::Parameterization::Score,
            time_conditioned: true,
            tie_embeddings: false,
        };
        let network = config.init(1, 0.0, &training_device()).unwrap();
        let filled = |value: f64| {
            let mut filled = Filled(GradientsParams::new(), value);
            network.visit(&mut filled);
            filled.0
        };
        let all = (network.num_params() as f64).sqrt();
        for (largest, expected) in [(1.0, 1.0), (1e6, 3.0 * all)] {
            let (clipped, before) = clip(&network, sum(&network, vec![filled(1.0), filled(2.0)]), largest);
            assert!((before / (3.0 * all) - 1.0).abs() < 1e-5);
            let mut norm = Norm(clipped, 0.0);
            network.visit(&mut norm);
            assert!((norm.1.sqrt() / expected - 1.0).abs() < 1e-5);
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
    }
}
