//! Score entropy of rows of log-scores, with its gradient taken in the same pass.

use std::sync::Arc;

use burn::backend::flex::FlexTensor;

use super::{Kernel, entries, exp, scale_rows, sum, tensor, vectorised};

/// What one row adds to the loss, over log-scores `l`:
/// `exponential * sum_y e^l_y - linear * sum_y l_y - target_weight * l_target + constant`, both sums
/// over y other than `current`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RowTerm {
    /// The current token, whose log-score does not count.
    pub current: usize,
    /// The clean token.
    pub target: usize,
    /// Weight of the scores.
    pub exponential: f32,
    /// Weight of every log-score.
    pub linear: f32,
    /// Weight of the clean token's log-score, on top of `linear`; 0 when it is the current token.
    pub target_weight: f32,
    /// What the network cannot change.
    pub constant: f32,
}

impl RowTerm {
    /// The term over given log-scores.
    pub fn loss(&self, log_scores: &[f32]) -> f64 {
        let others = || {
            let all = log_scores.iter().enumerate();
            all.filter(|(y, _)| *y != self.current)
                .map(|(_, &log_score)| f64::from(log_score))
        };
        let mut loss = f64::from(self.constant);
        loss += f64::from(self.exponential) * others().map(f64::exp).sum::<f64>();
        if self.linear != 0.0 {
            loss -= f64::from(self.linear) * others().sum::<f64>();
        }
        loss - f64::from(self.target_weight) * f64::from(log_scores[self.target])
    }
}

/// Log-scores `[rows, states]` to the terms of the rows, `[rows]`.
#[derive(Debug, Clone)]
pub struct ScoreEntropy {
    /// One term per row.
    pub terms: Arc<[RowTerm]>,
}

impl Kernel<1> for ScoreEntropy {
    /// The gradient of each row by its log-scores.
    type Saved = FlexTensor;

    fn forward(&self, [log_scores]: [FlexTensor; 1]) -> (FlexTensor, FlexTensor) {
        let states = log_scores.layout().shape()[1];
        let source = entries(&log_scores);
        let mut slopes = vec![0.0; source.len()];
        let mut losses = Vec::with_capacity(self.terms.len());
        vectorised(|| {
            let rows = source.chunks_exact(states).zip(slopes.chunks_exact_mut(states));
            for (term, (row, slopes)) in self.terms.iter().zip(rows) {
                for (slope, &log_score) in slopes.iter_mut().zip(row) {
                    *slope = term.exponential * exp(log_score);
                }
                slopes[term.current] = 0.0;
                let mut loss = sum(states, |y| slopes[y]) + term.constant;
                loss -= term.target_weight * row[term.target];
                slopes[term.target] -= term.target_weight;
                if term.linear != 0.0 {
                    loss -= term.linear * (sum(states, |y| row[y]) - row[term.current]);
                    for slope in slopes.iter_mut() {
                        *slope -= term.linear;
                    }
                    slopes[term.current] = 0.0;
                }
                losses.push(loss);
            }
        });
        (
            tensor(losses, [self.terms.len()]),
            tensor(slopes, [self.terms.len(), states]),
        )
    }

    fn backward(&self, slopes: FlexTensor, gradient: FlexTensor) -> [FlexTensor; 1] {
        [scale_rows(slopes, &gradient)]
    }
}
