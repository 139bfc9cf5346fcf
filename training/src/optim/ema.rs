//! The moving average of weights that is evaluated and exported in place of the last ones.

use burn::Tensor;
use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::optim::GradientsParams;

use crate::model::Ddit;

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

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::model::{NetworkConfig, training_device};

    #[test]
    fn averages_forget_the_first_weights_quickly_and_the_last_slowly() {
        let config = NetworkConfig::tiny();
        let first = config.init(1, 0.0, &training_device()).unwrap();
        let bias = |network: &Ddit| network.state_dict().get("sigma_map.mlp.0.bias").unwrap().data[0];
        let start = bias(&first);

        let mut one = Ones;
        let second = first.clone().map(&mut one);
        let mut ema = Ema::new(0.25, &first);
        // Decay 2/11 while that is below 0.25, then 0.25.
        for decay in [2.0_f32 / 11.0, 0.25, 0.25] {
            let before = bias(ema.network());
            ema.update(&second);
            let expected = decay * before + (1.0 - decay);
            assert!((bias(ema.network()) - expected).abs() < 1e-6);
        }
        assert_eq!(ema.updates(), 3);
        assert_eq!(bias(&first), start, "what is averaged stays");
    }

    struct Ones;

    impl ModuleMapper for Ones {
        fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
            param.map(|value| value.detach().ones_like().require_grad())
        }
    }
}
