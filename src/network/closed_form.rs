//! Exact scores of a known data law over short canvases: a network without weights.
//!
//! Tests of samplers, engine and server use it, because what they must produce can then be computed.

use super::{Batch, NetworkError, ScoreNetwork, ScoreRows};
use crate::diffusion::{Graph, Token};

/// Share of the data law that is spread over all canvases, so that every canvas has scores: parallel
/// steps can reach canvases outside the list.
const BACKGROUND: f64 = 1e-6;

/// The exact log-scores of a data law that is a list of canvases with probabilities, plus a trace of
/// everything else.
#[derive(Clone, Debug)]
pub struct ClosedForm {
    graph: Graph,
    /// Canvases of one length, and their probabilities.
    law: Vec<(Vec<Token>, f64)>,
    rows: Vec<f32>,
}

impl ClosedForm {
    /// Scores of `law` noised on `graph`. Canvases must share one length.
    pub fn new(graph: Graph, law: Vec<(Vec<Token>, f64)>) -> Self {
        Self {
            graph,
            law,
            rows: Vec::new(),
        }
    }

    /// Every position drawn independently from `token_law`, for canvases of `length`.
    ///
    /// Such a law is the same at every position and length, so it is kept as canvases of length 1.
    pub fn independent(graph: Graph, token_law: &[f64]) -> Self {
        Self::new(
            graph,
            token_law
                .iter()
                .enumerate()
                .map(|(y, p)| (vec![y as Token], *p))
                .collect(),
        )
    }

    /// Appends the row `ln p_sigma(y, rest of canvas) - ln p_sigma(canvas)` over y.
    fn push_row(&mut self, canvas: &[i64], position: usize, sigma: f64) {
        let states = self.graph.states();
        let kernel = Kernel::new(&self.graph, sigma);
        let mut weights = vec![0.0; states];
        let elsewhere: f64 = (0..canvas.len())
            .filter(|&i| i != position)
            .map(|i| kernel.background(canvas[i] as Token))
            .product();
        for (y, weight) in weights.iter_mut().enumerate() {
            *weight = BACKGROUND * elsewhere * kernel.background(y as Token);
        }
        let single = self.law.first().is_some_and(|(tokens, _)| tokens.len() == 1);
        for (tokens, probability) in &self.law {
            let rest: f64 = if single {
                1.0
            } else {
                (0..canvas.len())
                    .filter(|&i| i != position)
                    .map(|i| kernel.reach(tokens[i], canvas[i] as Token))
                    .product()
            };
            let here = if single { tokens[0] } else { tokens[position] };
            for (y, weight) in weights.iter_mut().enumerate() {
                *weight += probability * rest * kernel.reach(here, y as Token);
            }
        }
        let current = weights[canvas[position] as usize];
        self.rows
            .extend(weights.iter().map(|w| (w / current).ln() as f32));
    }
}

/// `p(y | x0)` after noise sigma, without a row per token.
struct Kernel {
    stay: f64,
    moved: f64,
    mask: Option<Token>,
    states: f64,
}

impl Kernel {
    fn new(graph: &Graph, sigma: f64) -> Self {
        Self {
            stay: (-sigma).exp(),
            moved: -(-sigma).exp_m1(),
            mask: graph.mask(),
            states: graph.states() as f64,
        }
    }

    /// `p(y)` after noise sigma when every token was equally likely.
    fn background(&self, y: Token) -> f64 {
        match self.mask {
            Some(mask) if mask == y => self.moved,
            Some(_) => self.stay / (self.states - 1.0),
            None => 1.0 / self.states,
        }
    }

    fn reach(&self, x0: Token, y: Token) -> f64 {
        let stay = if x0 == y { self.stay } else { 0.0 };
        stay + match self.mask {
            Some(mask) if mask == y => self.moved,
            Some(_) => 0.0,
            None => self.moved / self.states,
        }
    }
}

impl ScoreNetwork for ClosedForm {
    fn log_score(
        &mut self,
        batch: &Batch<'_>,
        read: &mut dyn FnMut(ScoreRows<'_>),
    ) -> Result<(), NetworkError> {
        self.rows.clear();
        for &flat in batch.positions {
            let (canvas, position) = (flat as usize / batch.length, flat as usize % batch.length);
            let tokens = &batch.tokens[canvas * batch.length..(canvas + 1) * batch.length];
            self.push_row(tokens, position, f64::from(batch.sigma[canvas]));
        }
        read(ScoreRows::packed(&self.rows, self.graph.states()));
        Ok(())
    }
}
