//! Score entropy, the loss of SEDD (arXiv 2310.16834), one position at a time.
//!
//! With `K(a) = a (ln a - 1)`, scores `s_y` and ratios `r_y = p(y) / p(x)`:
//!
//! - score entropy (eq. 5): `sum_{y != x} Q[x, y] (s_y - r_y ln s_y + K(r_y))`, at least 0, and 0 at `s = r`;
//! - implicit score entropy (eq. 6): the same up to a constant, without the ratios;
//! - denoising score entropy (eq. 7): the ratios are those of the noised `x0`, known in closed form;
//! - diffusion-weighted denoising score entropy (eq. 9): times the noise rate. Its integral over t,
//!   plus the KL of the prior, bounds `-ln p(x0)` from above.

use super::{Graph, Schedule, Token};

/// `K(a) = a (ln a - 1)`, continued by 0 at 0.
pub fn normalizer(a: f64) -> f64 {
    if a == 0.0 { 0.0 } else { a * (a.ln() - 1.0) }
}

/// One term `s - r ln s + K(r)`, at least 0.
fn term(log_score: f64, ratio: f64) -> f64 {
    let observed = if ratio == 0.0 { 0.0 } else { ratio * log_score };
    log_score.exp() - observed + normalizer(ratio)
}

/// Score entropy at `x` with known ratios.
///
/// `rate[y] = Q[x, y]`, `log_score[y]` and `ratio[y]` over tokens y (length V); entries at `x` are not read.
pub fn explicit(x: Token, rate: &[f64], log_score: &[f64], ratio: &[f64]) -> f64 {
    others(x, rate.len())
        .map(|y| rate[y] * term(log_score[y], ratio[y]))
        .sum()
}

/// Implicit score entropy at `x`: `sum_{y != x} Q[x, y] s(x)_y - Q[y, x] ln s(y)_x`.
///
/// `rate_in[y] = Q[x, y]`, `rate_out[y] = Q[y, x]`, `log_score[y] = ln s(x)_y`, and
/// `log_score_back[y] = ln s(y)_x`, over tokens y (length V). Its mean over x drawn from the data
/// differs from the mean of [`explicit`] by a constant.
pub fn implicit(
    x: Token,
    rate_in: &[f64],
    rate_out: &[f64],
    log_score: &[f64],
    log_score_back: &[f64],
) -> f64 {
    others(x, rate_in.len())
        .map(|y| rate_in[y] * log_score[y].exp() - rate_out[y] * log_score_back[y])
        .sum()
}

/// Denoising score entropy of one position: `x` is `x0` after noise `sigma > 0`.
///
/// `log_score[y]` over tokens y (length V); the entry at `x` is not read. Positions of absorbing
/// graphs that are not masked contribute 0.
pub fn denoising(graph: &Graph, log_score: &[f64], x: Token, x0: Token, sigma: f64) -> f64 {
    let mut rate = vec![0.0; graph.states()];
    graph.transp_rate(x, &mut rate);
    others(x, graph.states())
        .filter(|&y| rate[y] > 0.0)
        .map(|y| rate[y] * term(log_score[y], graph.ratio(y as Token, x, x0, sigma)))
        .sum()
}

/// Diffusion-weighted denoising score entropy of one position at time `t`: rate(t) times [`denoising`].
pub fn diffusion_weighted(
    graph: &Graph,
    schedule: &Schedule,
    log_score: &[f64],
    x: Token,
    x0: Token,
    t: f64,
) -> f64 {
    schedule.rate(t) * denoising(graph, log_score, x, x0, schedule.total_noise(t))
}

fn others(x: Token, states: usize) -> impl Iterator<Item = usize> {
    (0..states).filter(move |&y| y != x as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diffusion::GraphKind;
    use proptest::prelude::*;

    const P: [f64; 3] = [0.5, 0.3, 0.2];

    fn true_log_scores(x: usize) -> [f64; 3] {
        P.map(|q| (q / P[x]).ln())
    }

    #[test]
    fn worked_example_score_entropy_is_zero_at_the_true_scores() {
        let total: f64 = (0..3)
            .map(|x| P[x] * explicit(x as Token, &[1.0; 3], &true_log_scores(x), &P.map(|q| q / P[x])))
            .sum();
        assert!(total.abs() < 1e-12, "{total}");
    }

    /// The notes average over the states with equal weight (a batch that holds each state once).
    #[test]
    fn worked_example_implicit_score_entropy() {
        let at = |x: usize| {
            let back: Vec<f64> = (0..3).map(|y| true_log_scores(y)[x]).collect();
            implicit(x as Token, &[1.0; 3], &[1.0; 3], &true_log_scores(x), &back)
        };
        let mean = (0..3).map(at).sum::<f64>() / 3.0;
        assert!((mean - 2.4444).abs() < 5e-5, "{mean}");
    }

    proptest! {
        /// Implicit = explicit + constant: their difference does not depend on the scores.
        #[test]
        fn implicit_differs_from_explicit_by_a_constant(logs in prop::collection::vec(-2.0f64..2.0, 9)) {
            let score = |x: usize| &logs[3 * x..3 * x + 3];
            let mut constant = 0.0;
            let mut difference = 0.0;
            for x in 0..3 {
                let ratio = P.map(|q| q / P[x]);
                let back: Vec<f64> = (0..3).map(|y| score(y)[x]).collect();
                constant += P[x] * (0..3).filter(|&y| y != x).map(|y| normalizer(ratio[y])).sum::<f64>();
                difference += P[x]
                    * (explicit(x as Token, &[1.0; 3], score(x), &ratio)
                        - implicit(x as Token, &[1.0; 3], &[1.0; 3], score(x), &back));
            }
            prop_assert!((difference - constant).abs() < 1e-9, "{difference} {constant}");
        }

        #[test]
        fn denoising_is_zero_at_the_true_ratios_and_never_negative(
            x in 0u32..4, x0 in 0u32..4, sigma in 0.01f64..5.0, push in -1.0f64..1.0,
        ) {
            let graph = Graph::new(GraphKind::Uniform, 4);
            let exact: Vec<f64> = (0..4).map(|y| graph.ratio(y, x, x0, sigma).ln()).collect();
            let pushed: Vec<f64> = exact.iter().map(|l| l + push).collect();
            let zero = denoising(&graph, &exact, x, x0, sigma);
            prop_assert!(zero.abs() < 1e-9 / sigma, "{zero}");
            prop_assert!(denoising(&graph, &pushed, x, x0, sigma) >= zero - 1e-9 / sigma);
        }
    }

    /// Integral of the diffusion-weighted loss at the exact scores of a known data law, plus the KL
    /// of the prior, equals the data's entropy: the bound is tight there.
    #[test]
    fn bound_is_tight_at_the_exact_scores() {
        let graph = Graph::new(GraphKind::Absorbing, 4);
        let schedule = Schedule::LogLinear { eps: 1e-3 };
        let law = [0.6, 0.3, 0.1];
        let steps = 20_000;
        let mut bound = 0.0;
        for k in 0..steps {
            // t = u^2 resolves the steep end near 0.
            let u = (k as f64 + 0.5) / steps as f64;
            let (t, weight) = (u * u, 2.0 * u / steps as f64);
            let sigma = schedule.total_noise(t);
            let log_score: Vec<f64> = law
                .iter()
                .map(|p| (p / sigma.exp_m1()).ln())
                .chain([0.0])
                .collect();
            for (x0, p) in law.iter().enumerate() {
                let masked = -(-sigma).exp_m1();
                bound += weight
                    * p
                    * masked
                    * diffusion_weighted(&graph, &schedule, &log_score, 3, x0 as Token, t);
            }
        }
        let entropy: f64 = -law.iter().map(|p| p * p.ln()).sum::<f64>();
        // What the schedule leaves unmasked at t = 1 is not paid for: a share eps.
        assert!((bound - entropy).abs() < 2e-3, "{bound} {entropy}");
    }
}
