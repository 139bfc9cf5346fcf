//! A pass: one step of a batch, and its buffers. A step is one evaluation of the network, of some samplers two.

use std::time::{Duration, Instant};

use super::drawing::{self, Between, Moves, Task};
use super::work::Work;
use crate::diffusion::Token;
use crate::diffusion::sampler::Second;
use crate::diffusion::sampler::row::RowError;
use crate::network::{Batch, NetworkError, ScoreNetwork, ScoreRows};

/// Buffers of a pass, reused from pass to pass.
#[derive(Debug, Default)]
pub(super) struct Pass {
    inputs: Inputs,
    /// Rows of first evaluations that second ones need, canvas by canvas. Never kept beyond the pass.
    kept: Vec<f32>,
}

/// Inputs of a network.
#[derive(Debug, Default)]
struct Inputs {
    tokens: Vec<i64>,
    sigma: Vec<f32>,
    positions: Vec<i64>,
}

/// Outcome of a pass for one canvas.
pub(super) type Verdict = Result<(), RowError>;

/// Outcome of a pass.
#[derive(Debug)]
pub(super) struct Passed {
    /// Canvas by canvas.
    pub(super) verdicts: Vec<Verdict>,
    /// How long an evaluation took, drawing included.
    pub(super) per_evaluation: Duration,
    /// Time in the network, and drawing.
    pub(super) times: [Duration; 2],
    /// Rows that were asked for, of first evaluations.
    pub(super) rows: usize,
}

impl Pass {
    /// Evaluates the network for `batch` and moves every canvas with usable scores one step on; says which these
    /// are. On an error no canvas has moved.
    pub(super) fn run(
        &mut self,
        network: &mut dyn ScoreNetwork,
        batch: &mut [Work],
        threads: usize,
    ) -> Result<Passed, NetworkError> {
        let started = Instant::now();
        let asked: Vec<Task<'_>> = batch
            .iter()
            .map(|work| Task {
                job: &work.job,
                evaluation: &work.evaluation,
                between: None,
            })
            .collect();
        let (kept, mut seconds) = (&mut self.kept, Vec::new());
        kept.clear();
        let mut clock = Clock::default();
        let mut outcomes = self
            .inputs
            .evaluate(network, &asked, threads, &mut clock, |rows, drawn| {
                seconds = keep(&asked, drawn, rows, kept);
            })?;
        let again: Vec<(usize, &Second)> = seconds
            .iter()
            .enumerate()
            .filter_map(|(index, second)| Some((index, second.as_ref()?)))
            .collect();
        let rounds = 1 + u32::from(!again.is_empty());
        if !again.is_empty() {
            let rows: usize = again
                .iter()
                .map(|(_, second)| second.evaluation.positions.len())
                .sum();
            let vocab = self.kept.len() / rows.max(1);
            let mut first = 0;
            let asked: Vec<Task<'_>> = again
                .iter()
                .map(|&(index, second)| {
                    let end = first + second.evaluation.positions.len() * vocab;
                    let between = Between {
                        tokens: &second.tokens,
                        rows: &self.kept[first..end],
                        offset: asked[index].job.offset(asked[index].evaluation),
                    };
                    first = end;
                    Task {
                        job: asked[index].job,
                        evaluation: &second.evaluation,
                        between: Some(between),
                    }
                })
                .collect();
            let drawn = self
                .inputs
                .evaluate(network, &asked, threads, &mut clock, |_, _| {})?;
            for (&(index, _), drawn) in again.iter().zip(drawn) {
                drawing::add(&mut outcomes[index], drawn);
            }
        }
        let rows = asked.iter().map(|asked| asked.evaluation.positions.len()).sum();
        drop(again);
        drop(asked);
        let verdicts = batch
            .iter_mut()
            .zip(outcomes)
            .enumerate()
            .map(|(index, (work, outcome))| {
                work.count_pass(started, clock.network, clock.sampling);
                let spent = 1 + u32::from(seconds.get(index).is_some_and(Option::is_some));
                outcome.map(|moves| work.job.commit(&work.evaluation, moves, spent))
            })
            .collect();
        Ok(Passed {
            verdicts,
            per_evaluation: started.elapsed() / rounds,
            times: [clock.network, clock.sampling],
            rows,
        })
    }
}

/// Where the time of a pass went.
#[derive(Debug, Default)]
struct Clock {
    network: Duration,
    sampling: Duration,
}

impl Inputs {
    /// Evaluates the network once for all that is `asked`; what `also` does with the rows and what was drawn
    /// from them is done before they are gone.
    fn evaluate(
        &mut self,
        network: &mut dyn ScoreNetwork,
        asked: &[Task<'_>],
        threads: usize,
        clock: &mut Clock,
        mut also: impl FnMut(&ScoreRows<'_>, &[Result<Moves, RowError>]),
    ) -> Result<Vec<Result<Moves, RowError>>, NetworkError> {
        let started = Instant::now();
        self.gather(asked);
        let inputs = Batch {
            tokens: &self.tokens,
            length: asked.first().map_or(0, |asked| asked.job.tokens().len()),
            sigma: &self.sigma,
            positions: &self.positions,
        };
        let (mut evaluated, mut outcomes) = (started, None);
        network.log_score(&inputs, &mut |rows| {
            evaluated = Instant::now();
            let drawn = drawing::draw(asked, &rows, threads);
            also(&rows, &drawn);
            outcomes = Some(drawn);
        })?;
        let Some(outcomes) = outcomes else {
            return Err(NetworkError::Run("the network gave no scores".to_owned()));
        };
        clock.network += evaluated - started;
        clock.sampling += evaluated.elapsed();
        Ok(outcomes)
    }

    fn gather(&mut self, asked: &[Task<'_>]) {
        self.tokens.clear();
        self.sigma.clear();
        self.positions.clear();
        for Task {
            job,
            evaluation,
            between,
        } in asked
        {
            let first = self.tokens.len() as i64;
            let positions = evaluation.positions.iter();
            self.positions.extend(positions.map(|&i| first + i as i64));
            let tokens: &[Token] = between.as_ref().map_or(job.tokens(), |between| between.tokens);
            self.tokens.extend(tokens.iter().map(|&t| i64::from(t)));
            self.sigma.push(evaluation.sigma as f32);
        }
    }
}

/// Returns the second evaluation of every canvas that has one; copies the rows that it needs to `kept`.
fn keep(
    asked: &[Task<'_>],
    drawn: &[Result<Moves, RowError>],
    rows: &ScoreRows<'_>,
    kept: &mut Vec<f32>,
) -> Vec<Option<Second>> {
    let mut first = 0;
    let second = |(asked, drawn): (&Task<'_>, &Result<Moves, RowError>)| {
        let (job, evaluation) = (asked.job, asked.evaluation);
        let second = drawn
            .as_ref()
            .ok()
            .and_then(|moves| job.second(evaluation, moves));
        for position in second.iter().flat_map(|second| &second.evaluation.positions) {
            if let Ok(at) = evaluation.positions.binary_search(position) {
                let start = kept.len();
                kept.extend_from_slice(&rows.row(first + at));
                // What a row says of its own token is not defined.
                kept[start + job.tokens()[*position] as usize] = f32::NEG_INFINITY;
            }
        }
        first += evaluation.positions.len();
        second
    };
    asked.iter().zip(drawn).map(second).collect()
}
