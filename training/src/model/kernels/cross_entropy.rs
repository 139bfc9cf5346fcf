//! Cross-entropy of the clean token under rows of logits, with its gradient taken in the same pass.

use std::sync::Arc;

use burn::backend::flex::FlexTensor;

use super::{Kernel, entries, exp, scale_rows, sum, tensor, vectorised};

/// What one row adds to the loss, over logits `l`: `-weight * ln softmax(l)[target]`, the softmax over
/// all states but `mask`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CrossEntropyTerm {
    /// The mask, which no clean token is.
    pub mask: usize,
    /// The clean token.
    pub target: usize,
    /// Weight of the row.
    pub weight: f32,
}

/// Logits `[rows, states]` to the terms of the rows, `[rows]`.
#[derive(Debug, Clone)]
pub struct CrossEntropy {
    /// One term per row.
    pub terms: Arc<[CrossEntropyTerm]>,
}

impl Kernel<1> for CrossEntropy {
    /// The gradient of each row by its logits.
    type Saved = FlexTensor;

    fn forward(&self, [logits]: [FlexTensor; 1]) -> (FlexTensor, FlexTensor) {
        let states = logits.layout().shape()[1];
        let source = entries(&logits);
        let mut slopes = vec![0.0; source.len()];
        let mut losses = Vec::with_capacity(self.terms.len());
        vectorised(|| {
            let rows = source.chunks_exact(states).zip(slopes.chunks_exact_mut(states));
            for (term, (row, slopes)) in self.terms.iter().zip(rows) {
                let largest = row
                    .iter()
                    .enumerate()
                    .filter(|(y, _)| *y != term.mask)
                    .fold(f32::NEG_INFINITY, |largest, (_, &logit)| largest.max(logit));
                for (slope, &logit) in slopes.iter_mut().zip(row) {
                    *slope = exp(logit - largest);
                }
                slopes[term.mask] = 0.0;
                let total = sum(states, |y| slopes[y]);
                losses.push(term.weight * (largest + total.ln() - row[term.target]));
                let scale = term.weight / total;
                for slope in slopes.iter_mut() {
                    *slope *= scale;
                }
                slopes[term.target] -= term.weight;
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
