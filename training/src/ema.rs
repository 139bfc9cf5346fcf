//! The moving average of weights that is evaluated and exported in place of the last ones.

use burn::Tensor;
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::GradientsParams;

use crate::network::Ddit;

/// `shadow <- d * shadow + (1 - d) * weights` with `d = min(decay, (1 + n) / (10 + n))` at the n-th
/// update: early weights, which are far off, are forgotten quickly.
#[derive(Debug, Clone)]
pub struct Ema {
    decay: f64,
    updates: u64,
    shadow: Ddit,
}

impl Ema {
    /// Starts at `network`'s weights.
    pub fn new(decay: f64, network: &Ddit) -> Self {
        Self::resume(decay, 0, network.valid())
    }

    /// Goes on from saved averages.
    pub fn resume(decay: f64, updates: u64, shadow: Ddit) -> Self {
        Self {
            decay,
            updates,
            shadow,
        }
    }

    /// The averaged network, without gradients.
    pub fn network(&self) -> &Ddit {
        &self.shadow
    }

    /// How often it was updated.
    pub fn updates(&self) -> u64 {
        self.updates
    }

    /// Moves towards `network`.
    pub fn update(&mut self, network: &Ddit) {
        self.updates += 1;
        let n = self.updates as f64;
        let decay = self.decay.min((1.0 + n) / (10.0 + n));
        let mut weights = Weights(GradientsParams::new());
        network.visit(&mut weights);
        let mut step = Step {
            weights: weights.0,
            decay,
        };
        self.shadow = self.shadow.clone().map(&mut step);
    }
}

/// Collects values by parameter; Burn's container for gradients is keyed the same way.
struct Weights(GradientsParams);

impl ModuleVisitor for Weights {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        self.0.register(param.id, param.val().inner());
    }
}

struct Step {
    weights: GradientsParams,
    decay: f64,
}

impl ModuleMapper for Step {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(weights) = self.weights.remove::<D>(param.id) else {
            return param;
        };
        let decay = self.decay;
        param.map(|shadow| shadow.mul_scalar(decay) + weights.mul_scalar(1.0 - decay))
    }
}
