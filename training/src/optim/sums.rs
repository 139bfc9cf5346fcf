//! Gradients of the parts of a batch, on their way to one sum.
//!
//! Threads of a CPU share one memory: their parts are added up in their order, so that the same lanes give the same
//! bits. GPUs add up what is theirs, each where it is, and make one sum of these by [`all_reduce`], once a step.
//!
//! Burn can also reduce every gradient as soon as the backward pass has it (`Tensor::set_distributed`). It waits for all
//! devices to announce the same parameters, for good if one has none: a part of a batch without a mask has no loss and
//! no backward pass.

use burn::Tensor;
use burn::module::{Module, ModuleVisitor, Param};
use burn::optim::GradientsParams;
use burn::tensor::Device;
use burn::tensor::distributed::{CollectiveTensor, ReduceOperation, all_reduce};

use super::optimizer::sum;
use crate::model::Ddit;

/// The sum of gradients so far.
pub struct Sums<'a> {
    network: &'a Ddit,
    /// One for each of the lanes that add up by themselves, or one for all.
    totals: Vec<GradientsParams>,
    /// The lanes that add up by themselves.
    lanes: Vec<Device>,
}

impl std::fmt::Debug for Sums<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Sums")
            .field("lanes", &self.lanes)
            .finish_non_exhaustive()
    }
}

impl<'a> Sums<'a> {
    /// Of the gradients of `network`, on lanes that share its memory.
    pub fn shared(network: &'a Ddit) -> Self {
        Self::apart(network, Vec::new())
    }

    /// Of the gradients of `network`, on several `lanes` with memories of their own, the first of which is home.
    pub fn apart(network: &'a Ddit, lanes: Vec<Device>) -> Self {
        Self {
            network,
            totals: Vec::new(),
            lanes,
        }
    }

    /// Adds what each lane made of its part, in their order.
    pub fn add(&mut self, parts: Vec<GradientsParams>) {
        let totals = std::mem::take(&mut self.totals);
        self.totals = if self.lanes.is_empty() {
            vec![sum(self.network, None, totals.into_iter().chain(parts).collect())]
        } else {
            let mut totals = totals.into_iter();
            let both = self.lanes.iter().zip(parts);
            both.map(|(lane, part)| match totals.next() {
                Some(total) => sum(self.network, Some(lane), vec![total, part]),
                None => part,
            })
            .collect()
        };
    }

    /// All of them, at home.
    pub fn finish(self) -> GradientsParams {
        if self.lanes.is_empty() {
            return self.totals.into_iter().next().unwrap_or_default();
        }
        let mut reduced = Reduced {
            parts: self.totals,
            lanes: &self.lanes,
            sum: GradientsParams::new(),
        };
        self.network.visit(&mut reduced);
        reduced.sum
    }
}

struct Reduced<'a> {
    parts: Vec<GradientsParams>,
    lanes: &'a [Device],
    sum: GradientsParams,
}

impl ModuleVisitor for Reduced<'_> {
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let mine = self.parts.iter_mut().map(|part| part.remove::<D>(param.id));
        let gradients: Vec<Option<Tensor<D>>> = mine.collect();
        if gradients.iter().all(Option::is_none) {
            return;
        }
        let shape = param.shape();
        let under_way: Vec<_> = gradients
            .into_iter()
            .zip(self.lanes)
            .map(|(gradient, lane)| {
                // All of them take part, also those without a loss.
                let gradient = gradient.unwrap_or_else(|| Tensor::zeros(shape.clone(), lane));
                all_reduce(gradient, ReduceOperation::Sum, self.lanes.to_vec())
            })
            .collect();
        // Every lane waits for its own, before its memory is used for something else.
        let sums: Vec<Tensor<D>> = under_way.into_iter().map(CollectiveTensor::resolve).collect();
        if let Some(home) = sums.into_iter().next() {
            self.sum.register(param.id, home);
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::model::{NetworkConfig, inference_device, training_device};

    fn network() -> Ddit {
        NetworkConfig::tiny().init(1, 1.0, &training_device()).unwrap()
    }

    /// For every weight a gradient of that many times the weight.
    fn gradients(network: &Ddit, times: f64) -> GradientsParams {
        struct Times(f64, GradientsParams);
        impl ModuleVisitor for Times {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                self.1.register(param.id, param.val().inner().mul_scalar(self.0));
            }
        }
        let mut times = Times(times, GradientsParams::new());
        network.visit(&mut times);
        times.1
    }

    /// What the gradients say in all: of each weight's sum, how many times the weight it is.
    fn times(network: &Ddit, gradients: &GradientsParams) -> Vec<f32> {
        struct Ratios<'a>(&'a GradientsParams, Vec<f32>);
        impl ModuleVisitor for Ratios<'_> {
            fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
                let size = |x: Tensor<D>| x.abs().sum().into_scalar::<f32>();
                let whole = size(param.val().inner());
                let gradient = self.0.get::<D>(param.id).unwrap();
                if whole > 0.0 {
                    self.1.push(size(gradient) / whole);
                }
            }
        }
        let mut ratios = Ratios(gradients, Vec::new());
        network.visit(&mut ratios);
        ratios.1
    }

    #[test]
    fn every_part_of_every_round_counts_once() {
        let network = network();
        let rounds =
            || [[1.0, 2.0], [4.0, 8.0], [16.0, 32.0]].map(|round| round.map(|x| gradients(&network, x)));
        let is = |sum: &GradientsParams, expected: f32| {
            let found = times(&network, sum);
            assert!(
                found.len() > 10 && found.iter().all(|x| (x / expected - 1.0).abs() < 1e-5),
                "{found:?}"
            );
        };
        let mut shared = Sums::shared(&network);
        let mut apart = Sums::apart(&network, vec![inference_device(); 2]);
        for round in rounds() {
            shared.add(round.into());
        }
        for round in rounds() {
            apart.add(round.into());
        }
        is(&shared.finish(), 63.0);
        is(&apart.totals[0], 21.0);
        is(&apart.totals[1], 42.0);
    }

    #[cfg(feature = "cuda")]
    #[test]
    #[ignore = "needs two NVIDIA GPUs and NCCL"]
    fn gpus_make_one_sum_of_theirs() {
        let lanes = Device::enumerate(burn::tensor::DeviceType::Cuda).into_vec();
        let lanes = lanes[..2].to_vec();
        let home = network().fork(&lanes[0].clone().autodiff());
        let mut apart = Sums::apart(&home, lanes.clone());
        let parts = lanes.iter().zip([1.0, 2.0]).map(|(lane, times)| {
            let there = home.clone().fork(&lane.clone().autodiff());
            gradients(&there, times)
        });
        apart.add(parts.collect());
        let found = times(&home, &apart.finish());
        assert!(found.iter().all(|x| (x / 3.0 - 1.0).abs() < 1e-5), "{found:?}");
    }
}
