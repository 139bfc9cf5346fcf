//! What comes of a request, across the servers that worked on it.

use std::time::{Duration, Instant};

use futures_util::stream::{BoxStream, Stream, StreamExt};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use super::states::States;
use super::{Client, Request};
use crate::proto::v1;
use crate::proto::v1::diffusion_service_client::DiffusionServiceClient;

/// An event of a request.
#[derive(Clone, Debug)]
pub enum Event {
    /// The request as the server understood it; first and once.
    Accepted(Box<v1::Accepted>),
    /// An intermediate state.
    Frame(v1::Frame),
    /// A finished canvas; once for each.
    Result(v1::CanvasResult),
    /// The server has gone away, and the request goes on.
    Resumed(Resumed),
}

/// A request that goes on.
#[derive(Clone, Debug)]
pub struct Resumed {
    /// Times in a row without anything new, from 1.
    pub attempt: u32,
    /// Times that there are at most.
    pub of: u32,
    /// How the stream before ended.
    pub after: Status,
}

type Answers = BoxStream<'static, Result<Option<v1::event::Event>, Status>>;

/// The events of one request. Dropping them ends it.
pub struct Events {
    client: Client,
    request: Request,
    states: States,
    deadline: Option<Instant>,
    answers: Option<Answers>,
    /// Whether news may still come.
    open: bool,
    /// How the last stream ended, until the next one is asked for.
    broken: Option<Status>,
    attempt: u32,
    turn: usize,
}

impl std::fmt::Debug for Events {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Events")
            .field("states", &self.states)
            .field("attempt", &self.attempt)
            .finish_non_exhaustive()
    }
}

impl Events {
    pub(super) fn new(client: Client, mut request: Request) -> Self {
        let within = request.deadline_mut().and_then(|deadline| deadline.ms);
        Self {
            client,
            request,
            states: States::default(),
            deadline: within.and_then(|ms| Instant::now().checked_add(Duration::from_millis(ms))),
            answers: None,
            open: true,
            broken: None,
            attempt: 0,
            turn: 0,
        }
    }

    /// The next event; `None` after the last result, and after an error.
    pub async fn next(&mut self) -> Option<Result<Event, Status>> {
        while self.open {
            let Some(answers) = &mut self.answers else {
                if let Some(after) = self.broken.take() {
                    let asked = after.get_details_retry_info().and_then(|info| info.retry_delay);
                    tokio::time::sleep(self.client.retry.wait(self.attempt, asked)).await;
                }
                match self.ask().await {
                    Ok(answers) => self.answers = Some(answers),
                    Err(status) => return Some(self.ended(status)),
                }
                continue;
            };
            match answers.next().await {
                Some(Ok(Some(event))) => {
                    if let Some(news) = self.take(event) {
                        return Some(Ok(news));
                    }
                }
                // An event of a later protocol.
                Some(Ok(None)) => {}
                Some(Err(status)) => return Some(self.ended(status)),
                None if self.states.is_whole() => self.open = false,
                None => {
                    return Some(self.ended(Status::unavailable(
                        "the server ended the answer before it was whole",
                    )));
                }
            }
        }
        None
    }

    /// The same as a stream.
    pub fn into_stream(self) -> impl Stream<Item = Result<Event, Status>> + Send + Unpin {
        let next = |mut events: Self| async move {
            let event = events.next().await?;
            Some((event, events))
        };
        futures_util::stream::unfold(self, next).boxed()
    }

    /// Takes note of an event; what is known already is no news.
    fn take(&mut self, event: v1::event::Event) -> Option<Event> {
        match event {
            v1::event::Event::Accepted(accepted) => {
                let is_news = self.states.accepted(&accepted);
                is_news.then(|| Event::Accepted(Box::new(accepted)))
            }
            v1::event::Event::Frame(frame) => {
                let is_news = self.states.frame(frame.clone());
                self.attempt = if is_news { 0 } else { self.attempt };
                is_news.then_some(Event::Frame(frame))
            }
            v1::event::Event::Result(result) => {
                let is_news = self.states.result(&result);
                self.attempt = if is_news { 0 } else { self.attempt };
                is_news.then_some(Event::Result(result))
            }
        }
    }

    /// A stream has ended with `status`: the request goes on where that can help, and ends where it cannot.
    fn ended(&mut self, status: Status) -> Result<Event, Status> {
        self.answers = None;
        if self.attempt >= self.client.retry.times || !self.may_help(&status) {
            self.open = false;
            return Err(status);
        }
        self.attempt += 1;
        self.turn += 1;
        self.broken = Some(status.clone());
        Ok(Event::Resumed(Resumed {
            attempt: self.attempt,
            of: self.client.retry.times,
            after: status,
        }))
    }

    /// Whether asking again can help: the server has gone away, or it has not noticed yet that we have.
    fn may_help(&self, status: &Status) -> bool {
        // A connection that breaks off has a code of tonic's making, and a cause.
        let broken_off = std::error::Error::source(status).is_some();
        let is_still_known = status.code() == Code::AlreadyExists && self.attempt > 0;
        // UNKNOWN is of nobody's saying but tonic's, of an answer that a proxy has ended without a last word.
        let is_gone = matches!(status.code(), Code::Unavailable | Code::Unknown) || broken_off;
        let in_time = self.deadline.is_none_or(|deadline| Instant::now() < deadline);
        (is_gone || is_still_known) && in_time
    }

    async fn ask(&mut self) -> Result<Answers, Status> {
        let Some(server) = self.client.server(self.turn) else {
            return Err(Status::failed_precondition("the client was given no server"));
        };
        let mut request = match self.states.resume() {
            Some(resume) => self.request.resumed(resume),
            None => self.request.clone(),
        };
        if let (Some(at), Some(deadline)) = (self.deadline, request.deadline_mut()) {
            let left = at.saturating_duration_since(Instant::now()).as_millis();
            deadline.ms = Some(u64::try_from(left).unwrap_or(u64::MAX).max(1));
        }
        let mut client = DiffusionServiceClient::new(server);
        let event = |event: Option<v1::Event>| event.and_then(|event| event.event);
        Ok(match request {
            Request::Generate(request) => {
                let answers = client.generate(request).await?.into_inner();
                answers.map(move |answer| Ok(event(answer?.event))).boxed()
            }
            Request::Infill(request) => {
                let answers = client.infill(request).await?.into_inner();
                answers.map(move |answer| Ok(event(answer?.event))).boxed()
            }
        })
    }
}
