//! `denoised generate` and `denoised infill`.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use futures_util::stream::{BoxStream, StreamExt};
use tonic::Status;

use super::asked::Asked;
use super::canvas::Snapshot;
use super::connect::{Connection, Target};
use super::pieces::Pieces;
use super::record::Recorder;
use super::view::{self, View};
use super::{Failed, INTERRUPTED, input, json};
use crate::client::states::States;
use crate::client::{self, Event, Retry};
use crate::proto::v1::{CanvasResult, FramePolicy, frame_policy};

/// Options of both commands.
#[derive(Debug, Args)]
pub(super) struct Generate {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    asked: Asked,
    /// Times in a row that the request goes on by itself when the server goes away; 5 by default.
    #[arg(long, value_name = "N", default_value_t = 5, hide_default_value = true)]
    retries: u32,
    /// Print one JSON object per event and line.
    #[arg(long, conflicts_with = "live")]
    json: bool,
    /// Show intermediate states.
    #[arg(long, value_enum, value_name = "WHEN", default_value = "auto")]
    live: Live,
    /// On a terminal, show every state for so many milliseconds, however fast the server is; 0 to 60000, 40 by default.
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u32).range(..=60_000))]
    pace: Option<u32>,
    /// Write every state to a file, which `denoised replay` shows again and turns into an animated SVG.
    #[arg(long, value_name = "FILE")]
    record: Option<PathBuf>,
    /// The prompt; for infill the template, where [[N]] is a gap of N tokens, [[N| yes| no]] one that is filled from
    /// these, [[~some text]] a draft to begin with, \[ a bracket that opens no gap and \\ a backslash. With - it is
    /// read from standard input.
    #[arg(value_name = "TEXT", default_value = "")]
    text: String,
    /// Read the prompt or template from a file; - is standard input.
    #[arg(long, value_name = "FILE", conflicts_with = "text")]
    file: Option<PathBuf>,
}

/// When intermediate states are shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Live {
    /// On a terminal.
    Auto,
    /// In pipes too, as a few blocks of text.
    Always,
    /// Never.
    Never,
}

/// Fill the gaps of a template.
#[derive(Debug, Args)]
pub(super) struct Infill {
    #[command(flatten)]
    options: Generate,
}

type Events = BoxStream<'static, Result<Event, Status>>;

impl Generate {
    pub(super) async fn run(self) -> Result<(), Failed> {
        let request = self.asked.continuing(self.text()?, self.frames())?;
        let connection = self.target.connect().await?;
        self.finish(connection, request.into()).await
    }

    /// The prompt or template, wherever it is.
    fn text(&self) -> Result<String, Failed> {
        match &self.file {
            Some(file) => input::read(file),
            None if self.text == "-" => input::read(Path::new("-")),
            None => Ok(self.text.clone()),
        }
    }

    fn frames(&self) -> FramePolicy {
        let view = self.view();
        let when = if self.json || self.record.is_some() || !matches!(view, View::Off) {
            frame_policy::When::OnChange
        } else {
            frame_policy::When::Never
        };
        FramePolicy {
            when: when.into(),
            // Every state, however slowly it is shown.
            min_interval_ms: Some(0),
            ..FramePolicy::default()
        }
    }

    fn view(&self) -> View {
        let terminal = view::can_draw();
        match self.live {
            _ if self.json => View::Off,
            Live::Auto | Live::Always if terminal => View::terminal(),
            Live::Always => View::blocks(self.many()),
            Live::Auto | Live::Never => View::Off,
        }
    }

    fn many(&self) -> bool {
        self.asked.num_samples.unwrap_or(1) > 1
    }

    /// Shows the events and leaves terminal and server in order, whatever happened.
    async fn finish(&self, connection: Connection, request: client::Request) -> Result<(), Failed> {
        let mut seen = Seen {
            view: self.view(),
            recorder: self.record.as_deref().map(Recorder::create).transpose()?,
            pieces: Pieces::new(connection.server.clone()),
            states: States::default(),
            finished: BTreeMap::new(),
            started: Instant::now(),
        };
        let retry = Retry {
            times: self.retries,
            ..Retry::default()
        };
        let client = connection.client.clone();
        let events = client.with_retry(retry).run(request).into_stream().boxed();
        let mut out = io::stdout();
        let shown = tokio::select! {
            shown = self.show(events, &mut seen) => shown,
            // The stream is dropped, which cancels the request; what stands there stays.
            _ = tokio::signal::ctrl_c() => Err(Failed { code: INTERRUPTED, message: String::new() }),
        };
        let left = match &shown {
            Err(Failed {
                code: INTERRUPTED, ..
            }) => seen.view.leave(&mut out),
            _ => seen.view.clear(&mut out),
        };
        // What is finished is shown even when the rest failed.
        let printed = match (left, self.json) {
            (Ok(()), false) => self.print(&seen.finished, &mut out),
            (left, _) => left,
        };
        let recorded = seen.recorder.map_or(Ok(()), Recorder::end);
        drop(seen.pieces);
        let closed = connection.close().await;
        shown
            .and(Failed::unless_closed(printed))
            .and(recorded)
            .and(closed)
    }

    async fn show(&self, events: Events, seen: &mut Seen) -> Result<(), Failed> {
        let pace = match &seen.view {
            View::Terminal(_) => Duration::from_millis(self.pace.unwrap_or(view::PACE).into()),
            View::Off | View::Blocks { .. } => Duration::ZERO,
        };
        let started = seen.started;
        let mut events = if pace.is_zero() {
            // Whoever reads slowly is sent the newest states.
            let timed = move |event| (event, started.elapsed().as_secs_f64());
            events.map(timed).boxed()
        } else {
            read_ahead(events, started)
        };
        let mut out = io::stdout();
        while let Some((event, seconds)) = events.next().await {
            let is_frame = matches!(event, Ok(Event::Frame(_)));
            let event = event?;
            if let Event::Result(result) = &event {
                seen.finished.insert(result.canvas, result.clone());
            }
            let shown = if self.json {
                print_line(&event, &mut out)
            } else {
                tell(&event, &mut seen.view, &mut out)
            };
            let drawn = match seen.snapshot(&event, seconds).await? {
                Some(snapshot) => seen.view.draw(snapshot, &mut out),
                None => Ok(()),
            };
            match shown.and(drawn).and_then(|()| out.flush()) {
                Ok(()) if is_frame && !pace.is_zero() => tokio::time::sleep(pace).await,
                Ok(()) => {}
                // Nobody reads any more, so nothing more is asked for.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                Err(error) => return Err(Failed::software(error)),
            }
        }
        if seen.finished.is_empty() {
            return Err(Failed::software("the server ended the answer without a result"));
        }
        Ok(())
    }

    fn print(&self, finished: &BTreeMap<u32, CanvasResult>, out: &mut impl Write) -> io::Result<()> {
        for (canvas, result) in finished {
            if self.many() {
                writeln!(out, "=== sample {canvas} of seed {}", result.seed)?;
            }
            match &result.text {
                Some(text) => writeln!(out, "{text}")?,
                // A model without a tokenizer.
                None => writeln!(out, "{:?}", result.tokens)?,
            }
        }
        out.flush()
    }
}

/// What has been seen of a request, and where it is shown.
struct Seen {
    view: View,
    recorder: Option<Recorder>,
    pieces: Pieces,
    states: States,
    finished: BTreeMap<u32, CanvasResult>,
    started: Instant,
}

impl Seen {
    /// The state that `event` tells, where somebody draws or records it.
    async fn snapshot(&mut self, event: &Event, seconds: f64) -> Result<Option<Snapshot>, Failed> {
        if self.recorder.is_none() && !matches!(self.view, View::Terminal(_)) {
            return Ok(None);
        }
        let frame = match event {
            Event::Accepted(accepted) => {
                self.pieces.are_of(accepted.model.clone());
                return Ok(None);
            }
            Event::Frame(frame) => frame,
            Event::Result(_) | Event::Resumed(_) => return Ok(None),
        };
        self.pieces.learn(frame).await;
        self.states.frame(frame.clone());
        let newest = self.states.newest(frame.canvas);
        let snapshot = newest.and_then(|newest| Snapshot::of(newest, &self.pieces, seconds));
        if let (Some(recorder), Some(snapshot)) = (&mut self.recorder, &snapshot) {
            recorder.take(snapshot)?;
        }
        Ok(snapshot)
    }
}

/// States that are kept to be shown later, at most; a server shows a slow reader the newest state only.
const AHEAD: usize = 4096;

/// The same events, read as fast as the server sends them, with the seconds after which they came.
fn read_ahead(mut events: Events, started: Instant) -> BoxStream<'static, (Result<Event, Status>, f64)> {
    let (sender, receiver) = tokio::sync::mpsc::channel(AHEAD);
    tokio::spawn(async move {
        loop {
            // Whoever has stopped listening wants no more of the server either.
            let event = tokio::select! {
                event = events.next() => event,
                () = sender.closed() => return,
            };
            let Some(event) = event else { return };
            if sender
                .send((event, started.elapsed().as_secs_f64()))
                .await
                .is_err()
            {
                return;
            }
        }
    });
    let next = |mut receiver: tokio::sync::mpsc::Receiver<_>| async move {
        let event = receiver.recv().await?;
        Some((event, receiver))
    };
    futures_util::stream::unfold(receiver, next).boxed()
}

/// Tells people of an event, outside of a drawing.
fn tell(event: &Event, view: &mut View, out: &mut impl Write) -> io::Result<()> {
    match event {
        Event::Frame(frame) => view.show(frame, out),
        Event::Result(_) | Event::Accepted(_) => Ok(()),
        // A line beneath a drawing would move it.
        Event::Resumed(_) if matches!(view, View::Terminal(_)) => Ok(()),
        Event::Resumed(resumed) => {
            let told = Failed::from(resumed.after.clone()).message;
            let (attempt, of) = (resumed.attempt, resumed.of);
            writeln!(io::stderr(), "denoised: {told}; going on ({attempt} of {of})")
        }
    }
}

fn print_line(event: &Event, out: &mut impl Write) -> io::Result<()> {
    let line: json::Line<'_> = match event {
        Event::Accepted(accepted) => accepted.as_ref().into(),
        Event::Resumed(resumed) => resumed.into(),
        Event::Frame(frame) => frame.into(),
        Event::Result(result) => result.into(),
    };
    writeln!(out, "{}", serde_json::to_string(&line)?)
}

impl Infill {
    pub(super) async fn run(self) -> Result<(), Failed> {
        let options = self.options;
        let request = options.asked.filling(&options.text()?, options.frames())?;
        let connection = options.target.connect().await?;
        options.finish(connection, request.into()).await
    }
}
