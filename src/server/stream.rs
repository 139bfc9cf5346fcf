//! A running generation as a stream of events: Accepted, frames, results.
//!
//! The stream is pulled: it looks at a canvas when the connection has taken the last event, and then at its
//! newest state. It keeps the last tokens it sent, for deltas, and nothing else. One event waits between here
//! and the connection; what HTTP/2 and the kernel buffer comes on top of it.

use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, BoxStream, SelectAll, StreamExt};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tonic::Status;

use crate::diffusion::Token;
use crate::engine::{Engine, Failure, Generation, Outcome, Phase, State};
use crate::models::ServedModel;
use crate::proto::v1::event::Event;
use crate::proto::{bits, v1};

use super::pace::Pace;
use super::request::{FrameText, Frames, When};
use super::template::{Template, Written};
use super::text::TextThreads;

/// How the canvases of a request are told.
#[derive(Debug)]
pub(super) struct View {
    /// The model, for its tokenizer and mask.
    pub model: Arc<ServedModel>,
    /// The template, for clamped text.
    pub template: Template,
    /// Which frames to send.
    pub frames: Frames,
    /// Whether text goes on after the end of a document.
    pub keep_after_end: bool,
    /// Where text is made.
    pub text: TextThreads,
}

/// The events of a request.
///
/// Dropping the stream drops the generation, which ends its canvases.
pub(super) fn events(
    accepted: v1::Accepted,
    mut generation: Generation,
    view: View,
) -> BoxStream<'static, Result<Event, Status>> {
    let view = Arc::new(view);
    let canvases: SelectAll<_> = std::mem::take(&mut generation.canvases)
        .into_iter()
        .zip(std::mem::take(&mut generation.initial))
        .zip(std::mem::take(&mut generation.numbers))
        .map(|((states, initial), canvas)| {
            canvas_events(Follower {
                canvas,
                initial: Some(initial),
                states,
                view: Arc::clone(&view),
                sent: None,
                pace: Pace::new(view.frames.min_interval),
                written: Written::default(),
            })
        })
        .collect();
    let first = stream::once(async { Ok(Event::Accepted(accepted)) });
    // The generation rides along, so that it lives as long as the stream.
    let rest = stream::unfold(
        (canvases, generation, None),
        |(mut canvases, generation, mut failed)| async move {
            loop {
                match canvases.next().await {
                    Some(Ok(event)) => return Some((Ok(event), (canvases, generation, failed))),
                    // The other canvases still give their results; the error ends the stream after them.
                    Some(Err(status)) => failed = failed.or(Some(status)),
                    None => {
                        let status = failed.take()?;
                        return Some((Err(status), (canvases, generation, None)));
                    }
                }
            }
        },
    );
    first.chain(rest).boxed()
}

/// Hands `events` of a request to its connection, from a task of its own: a client that reads nothing for
/// `unread` ends its request, although its stream is not asked for anything any more. So does its deadline `until`.
pub(super) fn deliver<T: Send + 'static>(
    mut events: BoxStream<'static, Result<T, Status>>,
    request: String,
    unread: Duration,
    until: Option<std::time::Instant>,
    engine: Arc<Engine>,
) -> BoxStream<'static, Result<T, Status>> {
    let (sender, receiver) = mpsc::channel::<Option<Result<T, Status>>>(1);
    tokio::spawn(async move {
        loop {
            // Room first: an event is made when it can go out, and is true then.
            let room = match tokio::time::timeout(unread, sender.reserve()).await {
                Ok(Ok(room)) => room,
                // The call is over.
                Ok(Err(_)) => return,
                Err(_) => {
                    engine.counters().count_unread_stream();
                    tracing::warn!(%request, unread_seconds = unread.as_secs(), "nobody reads the stream; the request is ended");
                    return;
                }
            };
            let too_late = async {
                match until {
                    Some(until) => tokio::time::sleep_until(until.into()).await,
                    None => std::future::pending().await,
                }
            };
            let event = tokio::select! {
                event = events.next() => event,
                () = sender.closed() => return,
                () = too_late => {
                    room.send(Some(Err(Failure::Deadline.into())));
                    return;
                }
            };
            let ended = event.is_none();
            room.send(event);
            if ended {
                return;
            }
        }
    });
    stream::unfold(Some(receiver), move |receiver| async move {
        let mut receiver = receiver?;
        match receiver.recv().await {
            Some(Some(event)) => Some((event, Some(receiver))),
            Some(None) => None,
            None => {
                let problem = format!("the stream was left unread for {} s", unread.as_secs());
                Some((Err(Status::aborted(problem)), None))
            }
        }
    })
    .boxed()
}

fn canvas_events(follower: Follower) -> BoxStream<'static, Result<Event, Status>> {
    stream::unfold(Some(follower), |follower| async move {
        let mut follower = follower?;
        match follower.next().await {
            Ok(event @ Event::Result(_)) => Some((Ok(event), None)),
            Ok(event) => Some((Ok(event), Some(follower))),
            Err(status) => Some((Err(status), None)),
        }
    })
    .boxed()
}

/// Follows one canvas.
struct Follower {
    canvas: u32,
    /// Where the canvas began, until the first frame: noise is always shown.
    initial: Option<State>,
    states: watch::Receiver<State>,
    view: Arc<View>,
    sent: Option<Sent>,
    pace: Pace,
    written: Written,
}

/// The last frame that went out.
struct Sent {
    tokens: Arc<[Token]>,
    committed_at: Arc<[u32]>,
    step: u32,
    last: bool,
}

impl Follower {
    async fn next(&mut self) -> Result<Event, Status> {
        if let Some(initial) = self
            .initial
            .take()
            .filter(|_| self.view.frames.when != When::Never)
        {
            return Ok(Event::Frame(self.frame(&initial, Last::No).await?));
        }
        loop {
            let mut open = true;
            if self.sent.as_ref().is_none_or(|sent| !sent.last) {
                open = self.wait().await;
            }
            let state = self.states.borrow_and_update().clone();
            match &state.phase {
                // The last word of a server that goes away is what there is to go on from.
                Phase::Failed(Failure::ShutDown) if self.sent.as_ref().is_none_or(|sent| !sent.last) => {
                    return Ok(Event::Frame(self.frame(&state, Last::Yes).await?));
                }
                Phase::Failed(failure) => return Err(failure.clone().into()),
                Phase::Done(outcome) => {
                    let last_frame_is_out = self.sent.as_ref().is_some_and(|sent| sent.last);
                    if last_frame_is_out || self.view.frames.when == When::Never {
                        return Ok(Event::Result(self.result(&state, outcome).await?));
                    }
                    return Ok(Event::Frame(self.frame(&state, Last::Yes).await?));
                }
                Phase::Running if self.is_due(&state) => {
                    return Ok(Event::Frame(self.frame(&state, Last::No).await?));
                }
                Phase::Running if open => {}
                Phase::Running => {
                    tracing::error!(canvas = self.canvas, "a canvas was lost");
                    return Err(Status::internal(
                        "the canvas was lost; the server's log has the details",
                    ));
                }
            }
        }
    }

    /// Waits for a new state, and until the interval between two frames is over or the canvas has ended.
    /// Whether another state can follow.
    async fn wait(&mut self) -> bool {
        let open = self.states.changed().await.is_ok();
        if let Some(due) = self.pace.due() {
            let ended = self
                .states
                .wait_for(|state| !matches!(state.phase, Phase::Running));
            let _in_time = tokio::time::timeout_at(due, ended).await.is_ok();
        }
        open
    }

    fn is_due(&self, state: &State) -> bool {
        match (self.view.frames.when, &self.sent) {
            (When::Never, _) => false,
            (_, None) => true,
            (When::OnChange, Some(sent)) => *sent.tokens != *state.tokens,
            (When::EverySteps(steps), Some(sent)) => state.step - sent.step >= steps,
        }
    }

    async fn frame(&mut self, state: &State, last: Last) -> Result<v1::Frame, Status> {
        let content = match &self.sent {
            Some(sent) if last == Last::No && !self.view.frames.keyframes_only => {
                v1::frame::Content::Delta(delta(sent, state))
            }
            _ => v1::frame::Content::Keyframe(v1::Keyframe {
                tokens: state.tokens.to_vec(),
                committed_at: state.committed_at.to_vec(),
                log_probabilities: state.log_probabilities.to_vec(),
                masked: bits(
                    state
                        .tokens
                        .iter()
                        .map(|t| Some(*t) == self.view.model.graph().mask()),
                ),
                clamped: bits(state.clamped.iter().copied()),
            }),
        };
        let is_keyframe = matches!(content, v1::frame::Content::Keyframe(_));
        let text = match self.view.frames.text {
            FrameText::All => true,
            FrameText::Keyframes => is_keyframe,
            FrameText::None => false,
        };
        let text = if text {
            self.text(state, self.view.model.graph().mask(), None).await?
        } else {
            None
        };
        self.pace.sent(Instant::now());
        self.sent = Some(Sent {
            tokens: Arc::clone(&state.tokens),
            committed_at: Arc::clone(&state.committed_at),
            step: state.step,
            last: last == Last::Yes,
        });
        Ok(v1::Frame {
            canvas: self.canvas,
            step: state.step,
            total: state.total,
            t: state.t,
            sigma: state.sigma,
            nfe: state.nfe,
            masked: state.masked,
            text,
            content: Some(content),
        })
    }

    /// The canvas as text, where the model has a tokenizer; made on a thread for it.
    async fn text(
        &mut self,
        state: &State,
        mask: Option<Token>,
        end: Option<Token>,
    ) -> Result<Option<String>, Status> {
        if self.view.model.tokenizer().is_none() {
            return Ok(None);
        }
        let (view, tokens) = (Arc::clone(&self.view), Arc::clone(&state.tokens));
        let mut written = std::mem::take(&mut self.written);
        let write = move || {
            let text = view.model.tokenizer().map(|tokenizer| {
                let text = view.template.text(&tokens, tokenizer, mask, end, &mut written);
                text.map_err(decoding)
            });
            Ok((text.transpose()?, written))
        };
        let text;
        (text, self.written) = self.view.text.run(write).await?;
        Ok(text)
    }

    async fn result(&mut self, state: &State, outcome: &Outcome) -> Result<v1::CanvasResult, Status> {
        let end = self
            .view
            .model
            .manifest()
            .end_of_document
            .filter(|_| !self.view.keep_after_end);
        let text = self.text(state, None, end).await?;
        let ms = |duration: Duration| duration.as_secs_f64() * 1e3;
        let timings = &outcome.timings;
        Ok(v1::CanvasResult {
            canvas: self.canvas,
            tokens: state.tokens.to_vec(),
            text,
            committed_at: state.committed_at.to_vec(),
            log_probabilities: state.log_probabilities.to_vec(),
            nfe: state.nfe,
            seed: outcome.seed,
            timings: Some(v1::Timings {
                queue_ms: ms(timings.queue),
                network_ms: ms(timings.network),
                sampling_ms: ms(timings.sampling),
                total_ms: ms(timings.total),
            }),
            finish_reason: if outcome.early {
                v1::FinishReason::Deadline.into()
            } else {
                v1::FinishReason::Done.into()
            },
        })
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Last {
    Yes,
    No,
}

fn delta(before: &Sent, after: &State) -> v1::Delta {
    let changed: Vec<usize> = (0..after.tokens.len())
        .filter(|&i| (before.tokens[i], before.committed_at[i]) != (after.tokens[i], after.committed_at[i]))
        .collect();
    v1::Delta {
        positions: changed.iter().map(|&i| i as u32).collect(),
        tokens: changed.iter().map(|&i| after.tokens[i]).collect(),
        committed_at: changed.iter().map(|&i| after.committed_at[i]).collect(),
        log_probabilities: changed.iter().map(|&i| after.log_probabilities[i]).collect(),
    }
}

#[expect(clippy::needless_pass_by_value, reason = "made to be handed to map_err")]
fn decoding(error: crate::bundle::TokenizerError) -> Status {
    tracing::error!(%error, "tokens could not be decoded");
    Status::internal("the tokens could not be decoded; the server's log has the details")
}
