//! A worker: one thread that takes work, runs a pass of it, tells what came of it and puts it back.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use super::pass::{Pass, Passed};
use super::queue::Limits;
use super::work::Work;
use super::{Failure, Shared, put_into};
use crate::diffusion::sampler::row::RowError;
use crate::network::NetworkError;

/// Passes that may fail in a row with a canvas alone, before it is given up.
const MAX_ATTEMPTS: u32 = 3;

/// Takes work until the queue closes, or the watchdog has given up on a pass.
pub(super) fn run(shared: &Arc<Shared>, index: usize) {
    // What a panic takes with it is told by the work that it drops; the thread goes on.
    while catch_unwind(AssertUnwindSafe(|| work(shared, index))).is_err() {
        tracing::error!(worker = index, "a worker panicked outside of a pass");
    }
}

fn work(shared: &Arc<Shared>, index: usize) {
    let mut pass = Pass::default();
    let put = put_into(shared);
    while let Some(taken) = shared.queue.take(limits(shared), &shared.costs) {
        let batch = those_who_go_on(taken);
        let Some(model) = batch.first().map(|work| Arc::clone(work.job.model())) else {
            continue;
        };
        let sessions = shared.loader.sessions(&model);
        let Some((mut session, mut batch)) = sessions.check_out(batch, &shared.loader) else {
            continue;
        };
        let pass_time = predicted(shared, &batch);
        batch.iter_mut().for_each(|work| work.taken(pass_time));
        let watch = shared.watchdog.watch(session.network(), &model, &batch);
        // A panic leaves every canvas either before or after its step: tokens move at once.
        let result = catch_unwind(AssertUnwindSafe(|| {
            pass.run(session.network(), &mut batch, shared.options.threads)
        }))
        .unwrap_or_else(|_| Err(NetworkError::Run("the pass panicked".to_owned())));
        if !watch.end() {
            // Another has this thread's place, and the canvases have been ended.
            tracing::warn!(worker = index, %model, "a pass that was given up has come back");
            return;
        }
        match result {
            Ok(Passed {
                verdicts,
                per_evaluation,
                times,
                rows,
            }) => {
                shared.counters.count_pass(batch.len(), rows, times);
                let length = batch.first().map_or(0, |work| work.job.tokens().len());
                shared.costs.measured(&model, length, batch.len(), per_evaluation);
                shared.budget.went_well();
                sessions.check_in(session, &shared.loader, &put);
                let mut back = Vec::with_capacity(batch.len());
                for (work, verdict) in batch.into_iter().zip(verdicts) {
                    match verdict {
                        Ok(()) => back.extend(work.publish()),
                        Err(RowError::NothingAllowed) => work.end(Failure::NothingAllowed),
                        Err(error @ RowError::Scores) => {
                            tracing::error!(request = %work.origin.id, canvas = work.index, %error, "a canvas is given up");
                            give_up(work);
                        }
                    }
                }
                shared.put(back);
            }
            Err(error @ NetworkError::Run(_)) => {
                shared.counters.count_failed_pass(&error);
                tracing::error!(worker = index, %model, %error, canvases = batch.len(), "a pass failed; its canvases run one by one");
                sessions.lost(session, &shared.loader);
                let with_others = batch.len() > 1;
                shared.put(
                    batch
                        .into_iter()
                        .filter_map(|work| retry(work, with_others))
                        .collect(),
                );
            }
            Err(error @ NetworkError::Memory(_)) => {
                shared.counters.count_failed_pass(&error);
                let tokens: usize = batch.iter().map(|work| work.job.tokens().len()).sum();
                let lowered = shared.budget.lower(tokens);
                tracing::error!(worker = index, %model, %error, tokens, lowered, "there is no memory for a pass; the next ones are smaller");
                sessions.check_in(session, &shared.loader, &put);
                let with_others = batch.len() > 1;
                let again = |work| {
                    if with_others {
                        Some(work)
                    } else {
                        retry(work, false)
                    }
                };
                shared.put(batch.into_iter().filter_map(again).collect());
            }
            // What cannot heal by trying again is the model's, not the canvases'.
            Err(
                error @ (NetworkError::Runtime(_)
                | NetworkError::Load(_)
                | NetworkError::Room { .. }
                | NetworkError::Contract(_)),
            ) => {
                shared.counters.count_failed_pass(&error);
                sessions.fail(Some(session), &error, &shared.loader);
                sessions.end(batch);
            }
        }
    }
}

/// How long the next pass of `batch` will take.
fn predicted(shared: &Shared, batch: &[Work]) -> Duration {
    let Some(first) = batch.first() else {
        return Duration::ZERO;
    };
    let cost = shared
        .costs
        .predicted(first.job.model(), first.job.tokens().len());
    let rounds = batch
        .iter()
        .map(|work| work.job.evaluations(&work.evaluation))
        .max();
    Duration::from_nanos(cost.saturating_mul(batch.len() as u64)) * rounds.unwrap_or(1)
}

fn limits(shared: &Shared) -> Limits {
    Limits {
        tokens: shared.budget.tokens(),
        output_bytes: shared.options.output_bytes,
    }
}

/// Ends what nobody wants any more.
fn those_who_go_on(taken: Vec<Work>) -> Vec<Work> {
    let goes_on = |work: Work| match work.is_over() {
        Some(failure) => {
            work.end(failure);
            None
        }
        None => Some(work),
    };
    taken.into_iter().filter_map(goes_on).collect()
}

/// Gives back what may be tried again, alone: its neighbours must not fail with it, nor it with them.
fn retry(mut work: Work, with_others: bool) -> Option<Work> {
    if !with_others {
        work.attempts += 1;
    }
    work.set_alone(true);
    if work.attempts < MAX_ATTEMPTS {
        return Some(work);
    }
    tracing::error!(request = %work.origin.id, canvas = work.index, "a canvas failed {MAX_ATTEMPTS} times alone and is given up");
    give_up(work);
    None
}

fn give_up(work: Work) {
    let request = work.origin.id.clone();
    work.end(Failure::Worker { request });
}
