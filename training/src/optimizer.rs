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

/// Sums gradients over `parts` in their order and scales the sum down to `largest` if its Euclidean
/// norm over all parameters is more. Returns it with its norm before scaling.
pub fn combine(network: &Ddit, parts: Vec<GradientsParams>, largest: f64) -> (GradientsParams, f64) {
    let mut total = Sum {
        parts,
        sum: GradientsParams::new(),
        squares: 0.0,
    };
    network.visit(&mut total);
    let norm = total.squares.sqrt();
    if norm <= largest {
        return (total.sum, norm);
    }
    let mut scaled = Scale {
        gradients: total.sum,
        factor: largest / norm,
    };
    network.visit(&mut scaled);
    (scaled.gradients, norm)
}

struct Sum {
    parts: Vec<GradientsParams>,
    sum: GradientsParams,
    squares: f64,
}

impl ModuleVisitor for Sum {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let gradients = self
            .parts
            .iter_mut()
            .filter_map(|part| part.remove::<D>(param.id));
        if let Some(sum) = gradients.reduce(|sum, part| sum + part) {
            self.squares += f64::from(sum.clone().square().sum().into_scalar::<f32>());
            self.sum.register(param.id, sum);
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
