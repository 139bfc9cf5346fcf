//! Samplers against the exactly computed law of the discretised reverse chain.
//!
//! Space: two positions over a vocabulary small enough to enumerate, a correlated data law, exact
//! scores. The chain's law after every step is computed by summing over all canvases; drawn canvases
//! must follow it.
//!
//! Null: the draws follow the computed law. Statistic: chi-square over all canvases with expected
//! count at least 5. Significance 1e-3 per test (8 tests), seeds fixed.
#![expect(clippy::unwrap_used, reason = "tests")]

use statrs::distribution::{ChiSquared, ContinuousCDF};

use super::row::{Scratch, draw};
use super::{Discretization, Euler, SamplerKind, TimeGrid, TokenChoice, Tweedie};
use crate::diffusion::{Draws, Graph, GraphKind, Schedule, Token};

const TOKENS: usize = 3;
const LENGTH: usize = 2;
/// p(x0) over pairs of tokens, strongly correlated.
const DATA: [[f64; TOKENS]; TOKENS] = [[0.30, 0.05, 0.02], [0.03, 0.25, 0.05], [0.10, 0.02, 0.18]];

pub(crate) type Canvas = [Token; LENGTH];

pub(crate) struct Chain {
    pub(crate) graph: Graph,
    pub(crate) schedule: Schedule,
    /// p(x0) over pairs of tokens.
    pub(crate) data: [[f64; TOKENS]; TOKENS],
    kind: SamplerKind,
    pub(crate) grid: TimeGrid,
}

impl Chain {
    pub(crate) fn new(kind: GraphKind, sampler: SamplerKind, steps: u32) -> Self {
        let states = TOKENS + usize::from(kind == GraphKind::Absorbing);
        let schedule = match kind {
            GraphKind::Absorbing => Schedule::LogLinear { eps: 1e-3 },
            GraphKind::Uniform => Schedule::Geometric {
                sigma_min: 1e-4,
                sigma_max: 8.0,
            },
        };
        Self {
            graph: Graph::new(kind, states),
            schedule,
            data: DATA,
            kind: sampler,
            grid: TimeGrid::new(steps),
        }
    }

    /// The same of weaker correlation: half of the law, and half of what its positions would be alone.
    pub(crate) fn half_independent(self) -> Self {
        let mut data = self.data;
        for (a, row) in data.iter_mut().enumerate() {
            for (b, p) in row.iter_mut().enumerate() {
                let first: f64 = self.data[a].iter().sum();
                let second: f64 = self.data.iter().map(|row| row[b]).sum();
                *p = f64::midpoint(*p, first * second);
            }
        }
        Self { data, ..self }
    }

    /// The data law, over [`Self::canvases`].
    pub(crate) fn data(&self) -> Vec<f64> {
        let of = |c: &Canvas| self.data.get(c[0] as usize)?.get(c[1] as usize).copied();
        self.canvases().iter().map(|c| of(c).unwrap_or(0.0)).collect()
    }

    pub(crate) fn canvases(&self) -> Vec<Canvas> {
        let states = self.graph.states() as Token;
        (0..states)
            .flat_map(|a| (0..states).map(move |b| [a, b]))
            .collect()
    }

    /// p_t(canvas): the data law after noise `sigma`.
    fn noised(&self, canvas: Canvas, sigma: f64) -> f64 {
        let mut column = vec![0.0; self.graph.states()];
        let mut reach = |from: usize, to: Token| {
            self.graph.transition(from as Token, sigma, &mut column);
            column[to as usize]
        };
        let mut sum = 0.0;
        for (a, row) in self.data.iter().enumerate() {
            for (b, p) in row.iter().enumerate() {
                sum += p * reach(a, canvas[0]) * reach(b, canvas[1]);
            }
        }
        sum
    }

    /// Exact log-scores of one position: ln p_t(y, rest) / p_t(canvas).
    pub(crate) fn log_scores(&self, canvas: Canvas, position: usize, sigma: f64) -> Vec<f32> {
        let here = self.noised(canvas, sigma);
        (0..self.graph.states() as Token)
            .map(|y| {
                let mut there = canvas;
                there[position] = y;
                (self.noised(there, sigma) / here).ln() as f32
            })
            .collect()
    }

    pub(crate) fn can_move(&self, x: Token) -> bool {
        self.graph.mask().is_none_or(|mask| mask == x)
    }

    /// The law of one position's next token, straight from the definition of the step.
    pub(crate) fn step_law(&self, canvas: Canvas, position: usize, step: u32) -> Vec<f64> {
        let (x, t) = (canvas[position], self.grid.time(step));
        let (states, at) = (self.graph.states(), x as usize);
        if !self.can_move(x) {
            return (0..states).map(|y| f64::from(u8::from(y == at))).collect();
        }
        let sigma = self.schedule.total_noise(t);
        let mut score: Vec<f64> = self
            .log_scores(canvas, position, sigma)
            .iter()
            .map(|&l| f64::from(l).exp())
            .collect();
        score[at] = 1.0;
        let mut weights = vec![0.0; states];
        let last = step == self.grid.steps;
        if last || self.kind == SamplerKind::Tweedie {
            let dsigma = if last {
                sigma
            } else {
                sigma - self.schedule.total_noise(t - self.grid.dt())
            };
            let mut from = vec![0.0; states];
            self.graph.staggered_score(&score, dsigma, &mut weights);
            self.graph.transp_transition(x, dsigma, &mut from);
            weights.iter_mut().zip(&from).for_each(|(w, f)| *w *= f);
            if let (true, Some(mask)) = (last, self.graph.mask()) {
                weights[mask as usize] = 0.0;
            }
        } else {
            self.graph.reverse_rate(x, &score, &mut weights);
            weights
                .iter_mut()
                .for_each(|w| *w *= self.grid.dt() * self.schedule.rate(t));
            weights[at] += 1.0;
        }
        weights.iter_mut().for_each(|w| *w = w.max(0.0));
        let total: f64 = weights.iter().sum();
        weights.iter_mut().for_each(|w| *w /= total);
        weights
    }

    /// The exact law of the final canvas, by summing over all canvases step by step.
    pub(crate) fn exact(&self) -> Vec<f64> {
        let canvases = self.canvases();
        let prior = |x: Token| match self.graph.mask() {
            Some(mask) => f64::from(u8::from(x == mask)),
            None => 1.0 / self.graph.states() as f64,
        };
        let mut law: Vec<f64> = canvases.iter().map(|c| prior(c[0]) * prior(c[1])).collect();
        for step in 0..=self.grid.steps {
            let mut next = vec![0.0; canvases.len()];
            for (canvas, p) in canvases.iter().zip(&law).filter(|(_, p)| **p > 0.0) {
                let (first, second) = (self.step_law(*canvas, 0, step), self.step_law(*canvas, 1, step));
                for (to, n) in canvases.iter().zip(&mut next) {
                    *n += p * first[to[0] as usize] * second[to[1] as usize];
                }
            }
            law = next;
        }
        law
    }

    fn sampler(&self) -> &'static dyn Discretization {
        if self.kind == SamplerKind::Euler {
            &Euler
        } else {
            &Tweedie
        }
    }

    /// One canvas, drawn the way the engine draws it.
    fn sample(&self, seed: u64, scores: &mut impl FnMut(Canvas, usize, u32) -> Vec<f32>) -> Canvas {
        let (mut draws, mut scratch) = (Draws::new(seed, 0), Scratch::default());
        let mut canvas = [0, 1].map(|i| self.graph.sample_limit(draws.prior(i)));
        for step in 0..=self.grid.steps {
            let law = self.grid.law(self.sampler(), &self.graph, &self.schedule, step);
            let before = canvas;
            for position in (0..LENGTH).filter(|&i| self.can_move(before[i])) {
                let row = scores(before, position, step);
                let u = draws.at(step, position);
                if let Some(y) = draw(
                    &law,
                    &TokenChoice::default(),
                    before[position],
                    &row,
                    0.0,
                    u,
                    &mut scratch,
                )
                .unwrap()
                {
                    canvas[position] = y;
                }
            }
        }
        canvas
    }
}

/// Counts of canvases follow `law`, by chi-square at significance 1e-3.
pub(crate) fn assert_follows(law: &[f64], counts: &[f64], what: &str) {
    let samples: f64 = counts.iter().sum();
    let (mut statistic, mut cells, mut rare, mut rare_expected) = (0.0, 0u32, 0.0, 0.0);
    for (count, p) in counts.iter().zip(law) {
        let expected = p * samples;
        if expected >= 5.0 {
            statistic += (count - expected).powi(2) / expected;
            cells += 1;
        } else {
            assert!(
                *p > 1e-15 || *count == 0.0,
                "{what}: drew a canvas of probability zero"
            );
            rare += count;
            rare_expected += expected;
        }
    }
    if rare_expected >= 5.0 {
        statistic += (rare - rare_expected).powi(2) / rare_expected;
        cells += 1;
    }
    let p_value = 1.0 - ChiSquared::new(f64::from(cells - 1)).unwrap().cdf(statistic);
    assert!(
        p_value > 1e-3,
        "{what}: chi-square {statistic} over {cells} cells"
    );
}

fn check(kind: GraphKind, sampler: SamplerKind, steps: u32) {
    let chain = Chain::new(kind, sampler, steps);
    let (canvases, law) = (chain.canvases(), chain.exact());
    assert!((law.iter().sum::<f64>() - 1.0).abs() < 1e-9);
    let mut known = std::collections::HashMap::new();
    let mut scores = |canvas: Canvas, position: usize, step: u32| {
        known
            .entry((canvas, position, step))
            .or_insert_with(|| {
                chain.log_scores(
                    canvas,
                    position,
                    chain.schedule.total_noise(chain.grid.time(step)),
                )
            })
            .clone()
    };
    let samples = 20_000u32;
    let mut counts = vec![0.0; canvases.len()];
    for seed in 0..samples {
        let canvas = chain.sample(u64::from(seed), &mut scores);
        counts[canvases.iter().position(|c| *c == canvas).unwrap()] += 1.0;
    }
    assert_follows(&law, &counts, &format!("{kind:?} {sampler:?} {steps} steps"));
    if steps == 64 && sampler == SamplerKind::Tweedie {
        // Enough steps bring the chain itself close to the data.
        let distance: f64 = law
            .iter()
            .zip(chain.data())
            .map(|(p, data)| (p - data).abs() / 2.0)
            .sum();
        assert!(distance < 0.03, "total variation to the data {distance}");
    }
}

macro_rules! laws {
    ($($name:ident: $graph:ident $sampler:ident $steps:literal;)*) => {$(
        #[test]
        fn $name() {
            check(GraphKind::$graph, SamplerKind::$sampler, $steps);
        }
    )*};
}

laws! {
    absorbing_tweedie_2: Absorbing Tweedie 2;
    absorbing_tweedie_64: Absorbing Tweedie 64;
    absorbing_euler_2: Absorbing Euler 2;
    absorbing_euler_64: Absorbing Euler 64;
    uniform_tweedie_2: Uniform Tweedie 2;
    uniform_tweedie_64: Uniform Tweedie 64;
    uniform_euler_2: Uniform Euler 2;
    uniform_euler_64: Uniform Euler 64;
}
