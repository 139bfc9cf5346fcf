//! A running request to score as a stream of events.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use tokio::time::{Instant, timeout_at};
use tonic::Status;

use super::Events;
use super::read::Document;
use crate::engine::{Failure, ScoringRun, TextScore};
use crate::proto::v1;
use crate::proto::v1::score_response::Event;

/// Time between two messages that say no more than how far the request is.
const PROGRESS: Duration = Duration::from_millis(100);

/// A text of the request, and which of the engine's it is made of.
struct Text {
    sequences: Range<usize>,
    bytes: Option<u64>,
    told: Option<v1::TextScore>,
}

/// What is told, one after another.
struct Teller {
    run: ScoringRun,
    texts: Vec<Text>,
    waiting: VecDeque<Event>,
    told_done: u64,
    progress_at: Instant,
    ended: bool,
}

/// The events of a request. Dropping the stream drops the run, which ends what is left of it.
pub(super) fn events(accepted: v1::ScoreAccepted, run: ScoringRun, documents: Vec<Document>) -> Events {
    let mut next = 0;
    let texts = documents.into_iter().map(|document| {
        let first = next;
        next += document.sequences.len();
        Text {
            sequences: first..next,
            bytes: document.bytes,
            told: None,
        }
    });
    let teller = Teller {
        run,
        texts: texts.collect(),
        waiting: [Event::Accepted(accepted)].into(),
        told_done: 0,
        progress_at: Instant::now() + PROGRESS,
        ended: false,
    };
    stream::unfold(teller, |mut teller| async move {
        let event = teller.next().await?;
        Some((event, teller))
    })
    .boxed()
}

impl Teller {
    async fn next(&mut self) -> Option<Result<Event, Status>> {
        loop {
            if let Some(event) = self.waiting.pop_front() {
                return Some(Ok(event));
            }
            if self.ended {
                return None;
            }
            let (done, total) = match self.look() {
                Ok(seen) => seen,
                Err(failure) => {
                    self.ended = true;
                    return Some(Err(failure.into()));
                }
            };
            if !self.waiting.is_empty() {
                continue;
            }
            if Instant::now() >= self.progress_at && done > self.told_done {
                self.told_done = done;
                self.progress_at = Instant::now() + PROGRESS;
                return Some(Ok(Event::Progress(v1::ScoreProgress { done, total })));
            }
            let changed = self.run.scores.changed();
            let changed = if done > self.told_done {
                timeout_at(self.progress_at, changed).await.unwrap_or(Ok(()))
            } else {
                changed.await
            };
            if changed.is_err()
                && self.run.scores.borrow().failure.is_none()
                && !self.run.scores.borrow().is_done()
            {
                self.ended = true;
                return Some(Err(Failure::ShutDown.into()));
            }
        }
    }

    /// Takes note of texts that are done; says how far the request is.
    fn look(&mut self) -> Result<(u64, u64), Failure> {
        let scores = self.run.scores.borrow_and_update();
        if let Some(failure) = &scores.failure {
            return Err(failure.clone());
        }
        for (index, text) in self.texts.iter_mut().enumerate() {
            if text.told.is_some() {
                continue;
            }
            let parts: Option<Vec<_>> = scores.texts[text.sequences.clone()].iter().cloned().collect();
            if let Some(parts) = parts {
                let score = text_score(index, text.bytes, &parts);
                text.told = Some(v1::TextScore {
                    log_probabilities: Vec::new(),
                    ..score.clone()
                });
                self.waiting.push_back(Event::Score(score));
            }
        }
        let seen = (scores.done, scores.total);
        if scores.is_done() {
            let told: Vec<&v1::TextScore> = self.texts.iter().filter_map(|text| text.told.as_ref()).collect();
            self.waiting.push_back(Event::Total(total(&told)));
            self.ended = true;
        }
        Ok(seen)
    }
}

/// The score of a text, given those of the sequences that it was cut into.
fn text_score(index: usize, bytes: Option<u64>, sequences: &[Arc<TextScore>]) -> v1::TextScore {
    let variance: f64 = sequences
        .iter()
        .map(|sequence| sequence.estimate.standard_error.powi(2))
        .sum();
    v1::TextScore {
        text: index as u32,
        nats: sequences.iter().map(|sequence| sequence.estimate.nats).sum(),
        standard_error: variance.sqrt(),
        tokens: sequences.iter().map(|sequence| sequence.scored).sum(),
        bytes,
        log_probabilities: sequences
            .iter()
            .flat_map(|sequence| sequence.log_probabilities.iter().copied())
            .collect(),
        sequences: sequences.len() as u32,
        nfe: sequences
            .iter()
            .map(|sequence| u64::from(sequence.evaluations))
            .sum(),
    }
}

/// All texts together. The error is that of a ratio of sums over texts.
fn total(texts: &[&v1::TextScore]) -> v1::ScoreTotal {
    let tokens: u64 = texts.iter().map(|text| u64::from(text.tokens)).sum();
    let nats: f64 = texts.iter().map(|text| text.nats).sum();
    let bytes: Option<u64> = texts.iter().map(|text| text.bytes).sum();
    let nats_per_token = nats / tokens.max(1) as f64;
    let count = texts.len() as f64;
    let variance = match texts {
        [one] => one.standard_error.powi(2),
        texts => {
            let off = |text: &&v1::TextScore| text.nats - nats_per_token * f64::from(text.tokens);
            let squares: f64 = texts.iter().map(|text| off(text).powi(2)).sum();
            count / (count - 1.0) * squares
        }
    };
    v1::ScoreTotal {
        tokens,
        bytes,
        nats,
        nats_per_token,
        // Of a text that cannot be, the rest says nothing either.
        standard_error: if nats.is_finite() {
            variance.sqrt() / tokens.max(1) as f64
        } else {
            f64::INFINITY
        },
        bits_per_byte: bytes
            .filter(|bytes| *bytes > 0)
            .map(|bytes| nats / std::f64::consts::LN_2 / bytes as f64),
        perplexity: nats_per_token.exp(),
    }
}

/// The scores of all texts, once they are done.
pub(super) async fn all(run: &mut ScoringRun) -> Result<Vec<Arc<TextScore>>, Status> {
    let ended = run
        .scores
        .wait_for(|scores| scores.is_done() || scores.failure.is_some());
    let scores = ended.await.map_err(|_| Status::from(Failure::ShutDown))?;
    match &scores.failure {
        Some(failure) => Err(failure.clone().into()),
        None => Ok(scores.texts.iter().flatten().cloned().collect()),
    }
}
