//! A worker: one thread, with networks of its own.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::canvas::Canvas;
use super::queue::Work;
use super::{Failure, Publish, ServedModel, Shared, State, drawing};
use crate::network::{Batch, NetworkError, ScoreNetwork};

/// Failed steps in a row after which a canvas is given up.
const MOST_ATTEMPTS: u32 = 3;
/// Pause after a failed step, doubled with every further one in a row.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// The networks that this worker has loaded, with their models; few enough to look through.
type Networks = Vec<(Arc<ServedModel>, Box<dyn ScoreNetwork>)>;

/// Takes work until the queue closes.
pub(super) fn run(shared: &Shared, index: usize) {
    let mut networks = Networks::new();
    let mut step = Step::default();
    let mut pause = FIRST_PAUSE;
    while let Some(taken) = shared.queue.take(shared.options.batch_tokens) {
        let mut batch: Vec<Work> = taken.into_iter().filter(Work::is_wanted).collect();
        if batch.is_empty() {
            continue;
        }
        // A panic leaves every canvas either before or after its step: `apply` moves tokens at once.
        let result = catch_unwind(AssertUnwindSafe(|| {
            step.run(&mut networks, &mut batch, shared.options.threads)
        }))
        .unwrap_or_else(|_| Err(NetworkError::Run("the step panicked".to_owned())));
        match result {
            Ok(took) => {
                shared.admission.measured(took, batch.len());
                pause = FIRST_PAUSE;
                shared.queue.put(batch.into_iter().filter_map(publish));
            }
            Err(error) => {
                tracing::error!(worker = index, %error, canvases = batch.len(), "a step failed; starting over with a new session");
                networks.clear();
                shared.queue.put(batch.into_iter().filter_map(retry));
                std::thread::sleep(pause);
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

/// Tells the listener; gives back what is not finished.
fn publish(mut work: Work) -> Option<Work> {
    work.attempts = 0;
    work.permit.spend();
    if work.canvas.is_done() {
        work.timings.total = work.admitted.elapsed();
        work.progress
            .send_replace(State::done(&work.canvas, work.timings));
        return None;
    }
    if work.publish == Publish::Steps {
        work.progress.send_replace(State::running(&work.canvas));
    }
    work.ready = Instant::now();
    Some(work)
}

/// Gives back what may be tried again.
fn retry(mut work: Work) -> Option<Work> {
    work.attempts += 1;
    if work.canvas.is_done() {
        return publish(work);
    }
    if work.attempts < MOST_ATTEMPTS {
        return Some(work);
    }
    tracing::error!(request = %work.request, "a canvas failed {MOST_ATTEMPTS} times and is given up");
    work.fail(Failure::Worker {
        request: work.request.clone(),
    });
    None
}

/// One step of a batch, and its buffers.
#[derive(Debug, Default)]
struct Step {
    tokens: Vec<i64>,
    sigma: Vec<f32>,
    positions: Vec<i64>,
    /// Wanted positions of every canvas.
    wanted: Vec<Vec<usize>>,
}

impl Step {
    /// Evaluates the network for `batch` and moves every canvas one step on.
    ///
    /// Canvases whose scores are unusable are ended and taken out. Returns the time taken.
    fn run(
        &mut self,
        networks: &mut Networks,
        batch: &mut Vec<Work>,
        threads: usize,
    ) -> Result<Duration, NetworkError> {
        let started = Instant::now();
        let network = network_of(networks, batch)?;
        self.gather(batch);
        let length = batch.first().map_or(0, |work| work.canvas.tokens().len());
        let inputs = Batch {
            tokens: &self.tokens,
            length,
            sigma: &self.sigma,
            positions: &self.positions,
        };
        let canvases: Vec<&Canvas> = batch.iter().map(|work| &work.canvas).collect();
        let (mut evaluated, mut outcomes) = (started, Vec::new());
        network.log_score(&inputs, &mut |rows| {
            evaluated = Instant::now();
            outcomes = drawing::draw(&canvases, &self.wanted[..canvases.len()], &rows, threads);
        })?;
        let (network_time, sampling) = (evaluated - started, evaluated.elapsed());
        let mut outcomes = outcomes.into_iter();
        batch.retain_mut(|work| {
            work.timings.queue += started.saturating_duration_since(work.ready);
            work.timings.network += network_time;
            work.timings.sampling += sampling;
            match outcomes.next() {
                Some(Ok(moves)) => {
                    work.canvas.apply(moves);
                    true
                }
                Some(Err(error)) => {
                    tracing::error!(request = %work.request, %error, "a canvas is given up");
                    work.fail(Failure::Worker {
                        request: work.request.clone(),
                    });
                    false
                }
                None => true,
            }
        });
        Ok(started.elapsed())
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

/// This worker's network for the batch's model, loaded on first use.
fn network_of<'a>(
    networks: &'a mut Networks,
    batch: &[Work],
) -> Result<&'a mut dyn ScoreNetwork, NetworkError> {
    let Some(first) = batch.first() else {
        return Err(NetworkError::Run("the batch is empty".to_owned()));
    };
    let model = first.canvas.model();
    let known = networks.iter().position(|(loaded, _)| Arc::ptr_eq(loaded, model));
    let index = match known {
        Some(index) => index,
        None => {
            networks.push((Arc::clone(model), model.network()?));
            networks.len() - 1
        }
    };
    Ok(networks[index].1.as_mut())
}
