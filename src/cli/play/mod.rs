//! `denoised play`: a canvas that is edited, noised and denoised again, as often as one likes.

mod session;

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use clap::Args;
use futures_util::stream::StreamExt;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use tokio::sync::mpsc;

use super::asked::Asked;
use super::canvas::Snapshot;
use super::connect::{Connection, Target};
use super::pieces::Pieces;
use super::{Failed, view};
use crate::client::states::States;
use crate::client::{self, Event};
use crate::proto::v1::frame::Content;
use crate::proto::v1::{FramePolicy, frame_policy};
use session::{Session, Wanted, is_interrupt};

/// How long one waits for a key before one looks whether the session is over.
const LOOK: Duration = Duration::from_millis(100);

/// Keys that wait, at most.
const KEYS: usize = 64;

/// Options of `denoised play`.
#[derive(Debug, Args)]
pub(super) struct Play {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    asked: Asked,
    /// Milliseconds that each state is shown for; 0 to 60000.
    #[arg(long, value_name = "MS", default_value_t = view::PACE, value_parser = clap::value_parser!(u32).range(..=60_000))]
    pace: u32,
    /// What to begin with: a prompt, or a template as `denoised infill` takes it.
    #[arg(value_name = "TEXT", default_value = "In the beginning[[30]].")]
    text: String,
}

impl Play {
    pub(super) async fn run(self) -> Result<(), Failed> {
        if !io::stdin().is_terminal() || !view::can_draw() {
            return Err(Failed::usage("play needs a terminal; generate and infill do not"));
        }
        let connection = self.target.connect().await?;
        let mut session = Session::default();
        let mut terminal = ratatui::try_init().map_err(Failed::software)?;
        let played = self.play(&connection, &mut session, &mut terminal).await;
        ratatui::restore();
        let text = Failed::unless_closed(writeln!(io::stdout(), "{}", session.text()));
        played.and(text).and(connection.close().await)
    }

    async fn play(
        &self,
        connection: &Connection,
        session: &mut Session,
        terminal: &mut DefaultTerminal,
    ) -> Result<(), Failed> {
        let mut keys = keys();
        let mut wanted = Wanted::Begin(self.text.clone());
        loop {
            let request = match wanted {
                Wanted::Nothing => None,
                Wanted::Quit => return Ok(()),
                Wanted::Begin(text) => session.said(self.beginning(&text)),
                Wanted::Denoise => match session.template() {
                    Some(template) => session.said(self.asked.filling_parts(template, frames())),
                    None => {
                        "mark something first: g makes a gap, n noises again".clone_into(&mut session.told);
                        None
                    }
                },
            };
            if let Some(request) = request {
                self.denoise(connection, session, terminal, &mut keys, request)
                    .await?;
            }
            terminal
                .draw(|frame| session.draw(frame))
                .map_err(Failed::software)?;
            let Some(key) = keys.recv().await else {
                return Ok(());
            };
            wanted = session.press(key);
        }
    }

    /// The request that `text` stands for, as a prompt or as a template.
    fn beginning(&self, text: &str) -> Result<client::Request, Failed> {
        if text.contains("[[") {
            Ok(self.asked.filling(text, frames())?.into())
        } else {
            Ok(self.asked.continuing(text.to_owned(), frames())?.into())
        }
    }

    /// Shows what comes of `request`; Escape ends it, and what stands there then stays.
    async fn denoise(
        &self,
        connection: &Connection,
        session: &mut Session,
        terminal: &mut DefaultTerminal,
        keys: &mut mpsc::Receiver<KeyEvent>,
        request: client::Request,
    ) -> Result<(), Failed> {
        session.remember();
        let mut pieces = Pieces::new(connection.server.clone());
        let mut states = States::default();
        let started = Instant::now();
        let mut events = connection.client.clone().run(request).into_stream();
        loop {
            let event = tokio::select! {
                key = keys.recv() => match key {
                    Some(key) if is_stop(key) => {
                        "stopped; enter goes on with what is masked".clone_into(&mut session.told);
                        return Ok(());
                    }
                    Some(_) => continue,
                    None => return Ok(()),
                },
                event = events.next() => event,
            };
            match event {
                None => return Ok(()),
                Some(Err(status)) => {
                    session.told = Failed::from(status).message;
                    return Ok(());
                }
                Some(Ok(Event::Accepted(accepted))) => pieces.are_of(accepted.model.clone()),
                Some(Ok(Event::Frame(frame))) => {
                    pieces.learn(&frame).await;
                    states.frame(frame.clone());
                    if let Some(newest) = states.newest(frame.canvas)
                        && let Some(Content::Keyframe(key)) = &newest.content
                        && let Some(snapshot) = Snapshot::of(newest, &pieces, started.elapsed().as_secs_f64())
                    {
                        session.take(&key.tokens, snapshot);
                    }
                    terminal
                        .draw(|frame| session.draw(frame))
                        .map_err(Failed::software)?;
                    tokio::time::sleep(Duration::from_millis(self.pace.into())).await;
                }
                Some(Ok(Event::Result(result))) => {
                    session.told = format!("{} evaluations, seed {}", result.nfe, result.seed);
                }
                Some(Ok(Event::Resumed(_))) => {}
            }
        }
    }
}

/// Every state, of a single canvas, as tokens.
fn frames() -> FramePolicy {
    FramePolicy {
        when: frame_policy::When::OnChange.into(),
        min_interval_ms: Some(0),
        text: frame_policy::Text::None.into(),
        ..FramePolicy::default()
    }
}

/// Keys as they are pressed.
fn keys() -> mpsc::Receiver<KeyEvent> {
    let (sender, receiver) = mpsc::channel(KEYS);
    // Reading blocks: a thread of its own, which ends with the session.
    std::thread::spawn(move || {
        while !sender.is_closed() {
            let key = match event::poll(LOOK) {
                Ok(true) => event::read(),
                Ok(false) => continue,
                Err(error) => Err(error),
            };
            let sent = match key {
                Ok(event::Event::Key(key)) if key.kind == KeyEventKind::Press => sender.blocking_send(key),
                // Nothing is asked for, but what is there is drawn again.
                Ok(_) => sender.blocking_send(KeyEvent::new(KeyCode::Null, KeyModifiers::NONE)),
                Err(_) => return,
            };
            if sent.is_err() {
                return;
            }
        }
    });
    receiver
}

fn is_stop(key: KeyEvent) -> bool {
    key.code == KeyCode::Esc || is_interrupt(key)
}
