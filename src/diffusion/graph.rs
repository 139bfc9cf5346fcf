//! The forward noise process: a continuous-time Markov chain on single tokens.
//!
//! The chain has the rate matrix `Q` and runs in total noise sigma, so its transition law is
//! `exp(sigma Q)` (eqs. 15 and 16 of arXiv 2310.16834). Two structures make that cheap enough for real
//! vocabularies:
//!
//! - **uniform**: `Q = 1 1^T / V - I`: every token moves to every other at rate `1/V`;
//! - **absorbing**: every token moves to the mask at rate 1, the mask stays.
//!
//! All functions work on one row (a vector over target tokens of length `V`), never on a V x V
//! matrix. A row is named by the current token `x`; "transposed" rows hold `Q[x, y]` resp.
//! `p(x | y)` over `y`, which is what the reverse process needs.

use serde::{Deserialize, Serialize};

use super::Token;

/// The structure of the noise, as a bundle's manifest names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum GraphKind {
    /// Tokens turn into the mask.
    Absorbing,
    /// Tokens turn into any token with equal chance.
    Uniform,
}

/// The noise process on a vocabulary of `states` tokens (the mask included, if there is one).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Graph {
    kind: GraphKind,
    states: usize,
    /// The mask, where there is one.
    absorbing: Token,
}

impl Graph {
    /// A graph over `states` tokens, mask included, which is the last.
    ///
    /// Vocabularies of fewer than two states have nothing to denoise; bundles that claim one are
    /// refused when their manifest is read.
    pub fn new(kind: GraphKind, states: usize) -> Self {
        Self {
            kind,
            states,
            absorbing: states.saturating_sub(1) as Token,
        }
    }

    /// The same with another token for the mask, below `states`, on absorbing graphs.
    #[must_use]
    pub fn with_mask(self, mask: Token) -> Self {
        Self {
            absorbing: mask.min(self.states.saturating_sub(1) as Token),
            ..self
        }
    }

    /// Which structure this is.
    pub fn kind(&self) -> GraphKind {
        self.kind
    }

    /// Number of states V, the mask included.
    pub fn states(&self) -> usize {
        self.states
    }

    /// The mask token, on absorbing graphs.
    pub fn mask(&self) -> Option<Token> {
        match self.kind {
            GraphKind::Absorbing => Some(self.absorbing),
            GraphKind::Uniform => None,
        }
    }

    fn is_mask(&self, x: Token) -> bool {
        self.mask() == Some(x)
    }

    /// Row `x` of the transposed rate: `out[y] = Q[x, y]`, the rate at which `y` turns into `x`.
    pub fn transp_rate(&self, x: Token, out: &mut [f64]) {
        let v = self.states as f64;
        match self.kind {
            GraphKind::Uniform => {
                out.fill(1.0 / v);
                out[x as usize] = 1.0 / v - 1.0;
            }
            GraphKind::Absorbing => {
                out.fill(if self.is_mask(x) { 1.0 } else { 0.0 });
                out[x as usize] -= 1.0;
            }
        }
    }

    /// Row `x` of the reverse rate (eq. 3 of arXiv 2310.16834): `out[y] = Q[x, y] s_y`, diagonal minus the row sum.
    ///
    /// `score[y]` is `p(y) / p(x)`; the entry at `x` is not read.
    pub fn reverse_rate(&self, x: Token, score: &[f64], out: &mut [f64]) {
        self.transp_rate(x, out);
        out[x as usize] = 0.0;
        for (rate, s) in out.iter_mut().zip(score) {
            *rate *= s;
        }
        out[x as usize] = 0.0;
        out[x as usize] = -out.iter().sum::<f64>();
    }

    /// Column `x` of `exp(sigma Q)`, so `out[y] = p(y | x)`: where `x` is after noise `sigma`.
    pub fn transition(&self, x: Token, sigma: f64, out: &mut [f64]) {
        let moved = -(-sigma).exp_m1();
        match self.kind {
            GraphKind::Uniform => out.fill(moved / self.states as f64),
            GraphKind::Absorbing => {
                out.fill(0.0);
                out[self.absorbing as usize] = moved;
            }
        }
        out[x as usize] += (-sigma).exp();
    }

    /// Row `x` of `exp(sigma Q)`, so `out[y] = p(x | y)`: what may have become `x`.
    pub fn transp_transition(&self, x: Token, sigma: f64, out: &mut [f64]) {
        let moved = -(-sigma).exp_m1();
        out.fill(match self.kind {
            GraphKind::Uniform => moved / self.states as f64,
            GraphKind::Absorbing if self.is_mask(x) => moved,
            GraphKind::Absorbing => 0.0,
        });
        out[x as usize] += (-sigma).exp();
    }

    /// The staggered score `exp(-dsigma Q) s` (eq. 19 of arXiv 2310.16834): scores of the law `dsigma` less noisy.
    ///
    /// `score` holds 1 at the current token. In place of `V x V` work: both inverses are affine in
    /// the score and its sum.
    pub fn staggered_score(&self, score: &[f64], dsigma: f64, out: &mut [f64]) {
        let (grow, total) = (dsigma.exp(), score.iter().sum::<f64>());
        for (o, s) in out.iter_mut().zip(score) {
            *o = grow * s;
        }
        match self.kind {
            GraphKind::Uniform => {
                let spread = dsigma.exp_m1() * total / self.states as f64;
                out.iter_mut().for_each(|o| *o -= spread);
            }
            GraphKind::Absorbing => out[self.absorbing as usize] -= dsigma.exp_m1() * total,
        }
    }

    /// The ratio `p(y | x0) / p(x | x0)` after noise `sigma > 0`, for a `y != x` (eq. 7 of arXiv 2310.16834).
    ///
    /// Zero where `y` cannot be reached from `x0`.
    pub fn ratio(&self, y: Token, x: Token, x0: Token, sigma: f64) -> f64 {
        let grown = sigma.exp_m1();
        match self.kind {
            GraphKind::Absorbing if !self.is_mask(x) => 0.0,
            GraphKind::Absorbing if y == x0 => 1.0 / grown,
            GraphKind::Absorbing => 0.0,
            // p(other | x0) / p(x0 | x0) = (e^sigma - 1) / (e^sigma - 1 + V)
            GraphKind::Uniform => {
                let away = grown / (grown + self.states as f64);
                if x == x0 {
                    away
                } else if y == x0 {
                    1.0 / away
                } else {
                    1.0
                }
            }
        }
    }

    /// Noises `x0` by `sigma`: inverse CDF of a uniform `u` in `[0, 1)`.
    pub fn sample_transition(&self, x0: Token, sigma: f64, u: f64) -> Token {
        let moved = -(-sigma).exp_m1();
        if u >= moved {
            return x0;
        }
        match self.kind {
            GraphKind::Absorbing => self.absorbing,
            GraphKind::Uniform => self.nth_state(u / moved),
        }
    }

    /// A token of the limit law that noise tends to: the mask, or any token with equal chance.
    pub fn sample_limit(&self, u: f64) -> Token {
        match self.kind {
            GraphKind::Absorbing => self.absorbing,
            GraphKind::Uniform => self.nth_state(u),
        }
    }

    fn nth_state(&self, u: f64) -> Token {
        ((u * self.states as f64) as usize).min(self.states - 1) as Token
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn graphs() -> impl Strategy<Value = Graph> {
        (
            prop_oneof![Just(GraphKind::Absorbing), Just(GraphKind::Uniform)],
            2usize..40,
            0u32..40,
        )
            .prop_map(|(kind, states, mask)| Graph::new(kind, states).with_mask(mask % states as Token))
    }

    proptest! {
        #[test]
        fn columns_of_the_transition_sum_to_one(graph in graphs(), x in 0u32..40, sigma in 1e-6f64..20.0) {
            let x = x % graph.states() as u32;
            let mut row = vec![0.0; graph.states()];
            graph.transition(x, sigma, &mut row);
            prop_assert!((row.iter().sum::<f64>() - 1.0).abs() < 1e-12);
            prop_assert!(row.iter().all(|p| *p >= 0.0));
        }

        #[test]
        fn columns_of_the_reverse_rate_sum_to_zero(graph in graphs(), x in 0u32..40, s in 0.01f64..5.0) {
            let x = x % graph.states() as u32;
            let (score, mut row) = (vec![s; graph.states()], vec![0.0; graph.states()]);
            graph.reverse_rate(x, &score, &mut row);
            prop_assert!(row.iter().sum::<f64>().abs() < 1e-9);
        }

        /// Noising by sigma and then stepping back with the exact ratios returns the data law.
        #[test]
        fn forward_then_exact_reverse_is_the_data_law(
            graph in graphs(),
            weights in prop::collection::vec(0.01f64..1.0, 40),
            sigma in 0.01f64..3.0,
            part in 0.05f64..1.0,
        ) {
            let v = graph.states();
            let mut data: Vec<f64> = weights[..v].to_vec();
            if let Some(mask) = graph.mask() {
                data[mask as usize] = 0.0;
            }
            let total: f64 = data.iter().sum();
            data.iter_mut().for_each(|p| *p /= total);
            let noised = |sigma: f64| {
                let (mut law, mut column) = (vec![0.0; v], vec![0.0; v]);
                for x in 0..v {
                    graph.transition(x as u32, sigma, &mut column);
                    law.iter_mut().zip(&column).for_each(|(l, c)| *l += data[x] * c);
                }
                law
            };
            let (noisy, dsigma) = (noised(sigma), sigma * part);
            let target = noised(sigma - dsigma);
            let mut back = vec![0.0; v];
            for x in 0..v {
                if noisy[x] == 0.0 {
                    continue;
                }
                let score: Vec<f64> = noisy.iter().map(|p| p / noisy[x]).collect();
                let (mut staggered, mut from) = (vec![0.0; v], vec![0.0; v]);
                graph.staggered_score(&score, dsigma, &mut staggered);
                graph.transp_transition(x as u32, dsigma, &mut from);
                for y in 0..v {
                    back[y] += noisy[x] * staggered[y] * from[y];
                }
            }
            for y in 0..v {
                prop_assert!((back[y] - target[y]).abs() < 1e-9, "{y}: {} {}", back[y], target[y]);
            }
        }

        #[test]
        fn sampled_transitions_stay_in_the_vocabulary(graph in graphs(), x in 0u32..40, sigma in 0.0f64..30.0, u in 0.0f64..1.0) {
            let x = x % graph.states() as u32;
            prop_assert!((graph.sample_transition(x, sigma, u) as usize) < graph.states());
            prop_assert!((graph.sample_limit(u) as usize) < graph.states());
        }
    }

    /// The notes this project grew from: three states, Q = ones - 3 I, p = [0.5, 0.3, 0.2].
    #[test]
    fn worked_example_of_three_states() {
        // The notes do not normalise: their rate is V = 3 times ours.
        let (graph, p) = (Graph::new(GraphKind::Uniform, 3), [0.5, 0.3, 0.2]);
        let mut row = [0.0; 3];
        let mut derivative = [0.0; 3];
        for (x, d) in derivative.iter_mut().enumerate() {
            graph.transp_rate(x as Token, &mut row);
            *d = row.iter().zip(p).map(|(q, p)| 3.0 * q * p).sum();
        }
        for (d, expected) in derivative.iter().zip([-0.5, 0.1, 0.4]) {
            assert!((d - expected).abs() < 1e-12);
        }
        // Rows by target, columns by current token, as the notes print them.
        let printed = [[-1.0, 1.6667, 2.5], [0.6, -2.3333, 1.5], [0.4, 0.6667, -4.0]];
        for x in 0..3 {
            let score = p.map(|q| q / p[x]);
            graph.reverse_rate(x.try_into().unwrap(), &score, &mut row);
            for y in 0..3 {
                assert!((3.0 * row[y] - printed[y][x]).abs() < 5e-5, "{y} {x}");
            }
        }
    }
}
