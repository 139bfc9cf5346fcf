//! Networks that were not made for canvases alone: masked language models with their marks at both ends of a text.

use std::sync::Arc;

use super::{Batch, NetworkError, Output, ScoreNetwork, ScoreRows, Stop};
use crate::bundle::Manifest;
use crate::diffusion::Token;

/// A network whose canvases stand in a frame of tokens, or of whose tokens some are never drawn.
#[derive(Debug)]
pub struct Adapted<N> {
    network: N,
    before: Vec<i64>,
    after: Vec<i64>,
    excluded: Vec<Token>,
    /// Buffers of an evaluation.
    tokens: Vec<i64>,
    positions: Vec<i64>,
}

impl<N: ScoreNetwork + 'static> Adapted<N> {
    /// `network` as its manifest says it is to be used.
    pub fn new(network: N, manifest: &Manifest) -> Self {
        let ids = |tokens: &[Token]| tokens.iter().map(|token| i64::from(*token)).collect();
        Self {
            network,
            before: ids(&manifest.frame.before),
            after: ids(&manifest.frame.after),
            excluded: manifest.excluded_tokens.clone(),
            tokens: Vec::new(),
            positions: Vec::new(),
        }
    }

    /// The same; `network` as it is, where there is nothing to adapt.
    pub fn boxed(network: N, manifest: &Manifest) -> Box<dyn ScoreNetwork> {
        if manifest.frame.is_empty() && manifest.excluded_tokens.is_empty() {
            Box::new(network)
        } else {
            Box::new(Self::new(network, manifest))
        }
    }

    /// Puts every canvas into its frame.
    fn lay_out(&mut self, batch: &Batch<'_>) -> usize {
        let length = self.before.len() + batch.length + self.after.len();
        self.tokens.clear();
        for canvas in batch.tokens.chunks_exact(batch.length.max(1)) {
            self.tokens.extend_from_slice(&self.before);
            self.tokens.extend_from_slice(canvas);
            self.tokens.extend_from_slice(&self.after);
        }
        let (own, first) = (batch.length as i64, self.before.len() as i64);
        let framed = |&flat: &i64| flat / own * length as i64 + first + flat % own;
        self.positions.clear();
        self.positions.extend(batch.positions.iter().map(framed));
        length
    }
}

impl<N: ScoreNetwork + 'static> ScoreNetwork for Adapted<N> {
    fn log_score(
        &mut self,
        batch: &Batch<'_>,
        read: &mut dyn FnMut(ScoreRows<'_>),
    ) -> Result<(), NetworkError> {
        let length = self.lay_out(batch);
        let Self {
            network,
            excluded,
            tokens,
            positions,
            ..
        } = self;
        let framed = Batch {
            tokens,
            length,
            sigma: batch.sigma,
            positions,
        };
        network.log_score(&framed, &mut |rows| read(rows.excluding(excluded)))
    }

    fn output(&self) -> Output {
        self.network.output()
    }

    fn shares_weights(&self) -> bool {
        self.network.shares_weights()
    }

    fn stop_handle(&self) -> Option<Arc<dyn Stop>> {
        self.network.stop_handle()
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::bundle::Frame;
    use crate::bundle::manifest_tests::tiny;

    /// Tells of every wanted row which token stands there, and how long its canvas is.
    #[derive(Debug)]
    struct Echo(Vec<f32>);

    impl ScoreNetwork for Echo {
        fn log_score(
            &mut self,
            batch: &Batch<'_>,
            read: &mut dyn FnMut(ScoreRows<'_>),
        ) -> Result<(), NetworkError> {
            self.0 = batch
                .positions
                .iter()
                .flat_map(|&flat| [batch.tokens[flat as usize] as f32, batch.length as f32, 1.0])
                .collect();
            read(ScoreRows::packed(&self.0, 3));
            Ok(())
        }
    }

    #[test]
    fn canvases_stand_in_their_frame_and_excluded_tokens_have_no_score() {
        let manifest = Manifest {
            frame: Frame {
                before: vec![7, 6],
                after: vec![5],
            },
            excluded_tokens: vec![2],
            ..tiny()
        };
        let mut network = Adapted::boxed(Echo(Vec::new()), &manifest);
        let batch = Batch {
            tokens: &[0, 1, 2, 3],
            length: 2,
            sigma: &[1.0, 1.0],
            positions: &[0, 1, 3],
        };
        let mut seen = Vec::new();
        network
            .log_score(&batch, &mut |rows| {
                let mut buffer = Vec::new();
                for row in 0..3 {
                    assert_eq!(*rows.row(row), *rows.row_in(row, &mut buffer));
                    seen.push(rows.row(row).to_vec());
                }
            })
            .unwrap();
        let row = |token: f32| vec![token, 5.0, f32::NEG_INFINITY];
        assert_eq!(seen, [row(0.0), row(1.0), row(3.0)]);
    }
}
