//! The noise process, and what a network says about undoing it.

use serde::{Deserialize, Serialize};

use super::{Graph, GraphKind, Schedule, sigma_offset};

/// A noise process: a graph and its schedule.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Process {
    /// Where tokens go.
    pub graph: Graph,
    /// Total noise over time.
    pub schedule: Schedule,
}

/// Meaning of a network's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Parameterization {
    /// `log_score[y] = ln p_t(y) / p_t(x)`, as SEDD trains it.
    Score,
    /// `log_score[y] = ln p(x0 = y | x)`, as MDLM and RADD train it; absorbing graphs only.
    Mean,
}

impl Parameterization {
    /// Returns what makes log-scores of the network's output when added to it, at total noise `sigma`, over `states`
    /// states; `scale_by_sigma` says that a network of scores leaves [`sigma_offset`] out.
    pub fn log_score_offset(self, scale_by_sigma: bool, sigma: f64, states: usize) -> f64 {
        match self {
            // s_y = p(x0 = y | x) / (e^sigma - 1)
            Self::Mean => -sigma.exp_m1().ln(),
            Self::Score if scale_by_sigma => sigma_offset(sigma, states),
            Self::Score => 0.0,
        }
    }
}

impl Process {
    /// Total noise at time `t`.
    pub fn total_noise(&self, t: f64) -> f64 {
        self.schedule.total_noise(t)
    }

    /// The share of tokens that noise has masked by time `t`, on absorbing graphs.
    pub fn masked_share(&self, t: f64) -> f64 {
        -(-self.total_noise(t)).exp_m1()
    }

    /// The rate at which the reverse process moves a token to `y` at time `t`, per unit of its score `s_y`.
    pub fn reverse_rate(&self, t: f64) -> f64 {
        match self.graph.kind() {
            GraphKind::Absorbing => self.schedule.rate(t),
            GraphKind::Uniform => self.schedule.rate(t) / self.graph.states() as f64,
        }
    }
}
