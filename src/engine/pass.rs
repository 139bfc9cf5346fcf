//! One forward pass of a batch, and its buffers.

use std::time::{Duration, Instant};

use super::canvas::Canvas;
use super::drawing;
use super::work::Work;
use crate::diffusion::sampler::row::BadScores;
use crate::network::{Batch, NetworkError, ScoreNetwork};

/// Buffers of a pass, reused from pass to pass.
#[derive(Debug, Default)]
pub(super) struct Pass {
    tokens: Vec<i64>,
    sigma: Vec<f32>,
    positions: Vec<i64>,
    /// Positions of every canvas whose rows are needed.
    wanted: Vec<Vec<usize>>,
}

/// What a pass has made of a canvas.
pub(super) type Verdict = Result<(), BadScores>;

impl Pass {
    /// Evaluates the network once for `batch` and moves every canvas with usable scores one step on; says
    /// which these are. On an error no canvas has moved.
    pub(super) fn run(
        &mut self,
        network: &mut dyn ScoreNetwork,
        batch: &mut [Work],
        threads: usize,
    ) -> Result<(Vec<Verdict>, Duration), NetworkError> {
        let started = Instant::now();
        self.gather(batch);
        let inputs = Batch {
            tokens: &self.tokens,
            length: batch.first().map_or(0, |work| work.canvas.tokens().len()),
            sigma: &self.sigma,
            positions: &self.positions,
        };
        let canvases: Vec<&Canvas> = batch.iter().map(|work| &work.canvas).collect();
        let (mut evaluated, mut outcomes) = (started, None);
        network.log_score(&inputs, &mut |rows| {
            evaluated = Instant::now();
            outcomes = Some(drawing::draw(
                &canvases,
                &self.wanted[..canvases.len()],
                &rows,
                threads,
            ));
        })?;
        let Some(outcomes) = outcomes else {
            return Err(NetworkError::Run("the network gave no scores".to_owned()));
        };
        let (network_time, sampling) = (evaluated - started, evaluated.elapsed());
        let verdicts = batch
            .iter_mut()
            .zip(outcomes)
            .map(|(work, outcome)| {
                work.timings.queue += started.saturating_duration_since(work.ready);
                work.timings.network += network_time;
                work.timings.sampling += sampling;
                outcome.map(|moves| work.canvas.apply(moves))
            })
            .collect();
        Ok((verdicts, started.elapsed()))
    }

    fn gather(&mut self, batch: &[Work]) {
        self.tokens.clear();
        self.sigma.clear();
        self.positions.clear();
        self.wanted.resize_with(batch.len(), Vec::new);
        for (work, wanted) in batch.iter().zip(&mut self.wanted) {
            let first = self.tokens.len() as i64;
            wanted.clear();
            wanted.extend(work.canvas.wanted());
            self.positions.extend(wanted.iter().map(|&i| first + i as i64));
            self.tokens
                .extend(work.canvas.tokens().iter().map(|&t| i64::from(t)));
            self.sigma.push(work.canvas.next_sigma() as f32);
        }
    }
}
