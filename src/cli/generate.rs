//! `denoised generate` and `denoised infill`.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use futures_util::stream::{BoxStream, StreamExt};
use tonic::Status;

use super::asked::Asked;
use super::connect::{Connection, Target};
use super::view::View;
use super::{Failed, INTERRUPTED, input, json};
use crate::client::{self, Event, Retry};
use crate::proto::v1::{CanvasResult, FramePolicy, frame_policy};

/// Milliseconds between two drawings of a canvas on a terminal: what eyes can follow.
const REDRAW_MS: u32 = 40;

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
    /// On a terminal, show every state for so many milliseconds, however fast the server is; 0 to 60000.
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u32).range(..=60_000))]
    pace: Option<u32>,
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
        let when = if self.json || !matches!(view, View::Off) {
            frame_policy::When::OnChange
        } else {
            frame_policy::When::Never
        };
        FramePolicy {
            when: when.into(),
            min_interval_ms: Some(match view {
                View::Terminal(_) if self.pace.is_none() => REDRAW_MS,
                View::Terminal(_) | View::Blocks { .. } | View::Off => 0,
            }),
            ..FramePolicy::default()
        }
    }

    fn view(&self) -> View {
        let terminal = io::stdout().is_terminal();
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
        let mut view = self.view();
        let retry = Retry {
            times: self.retries,
            ..Retry::default()
        };
        let client = connection.client.clone();
        let events = client.with_retry(retry).run(request).into_stream().boxed();
        let shown = tokio::select! {
            shown = self.show(events, &mut view) => shown,
            // The stream is dropped, which cancels the request.
            _ = tokio::signal::ctrl_c() => Err(Failed { code: INTERRUPTED, message: String::new() }),
        };
        let cleared = Failed::unless_closed(view.clear(&mut io::stdout()));
        let closed = connection.close().await;
        shown.and(cleared).and(closed)
    }

    async fn show(&self, events: Events, view: &mut View) -> Result<(), Failed> {
        let pace = match (self.pace, &view) {
            (Some(pace), View::Terminal(_)) => Duration::from_millis(pace.into()),
            _ => Duration::ZERO,
        };
        let mut events = if pace.is_zero() {
            events
        } else {
            read_ahead(events)
        };
        let mut out = io::stdout();
        let mut finished = BTreeMap::new();
        let mut ended = Ok(());
        while let Some(event) = events.next().await {
            let is_frame = matches!(event, Ok(Event::Frame(_)));
            let shown = match event {
                Ok(event) if self.json => print_line(&event, &mut finished, &mut out),
                Ok(Event::Frame(frame)) => view.show(&frame, &mut out),
                Ok(Event::Result(result)) => {
                    finished.insert(result.canvas, result);
                    Ok(())
                }
                Ok(Event::Accepted(_)) => Ok(()),
                // A line beneath a drawing would move it.
                Ok(Event::Resumed(_)) if matches!(view, View::Terminal(_)) => Ok(()),
                Ok(Event::Resumed(resumed)) => {
                    let told = Failed::from(resumed.after).message;
                    writeln!(
                        io::stderr(),
                        "denoised: {told}; going on ({} of {})",
                        resumed.attempt,
                        resumed.of
                    )
                }
                Err(status) => {
                    ended = Err(status.into());
                    break;
                }
            };
            match shown.and_then(|()| out.flush()) {
                Ok(()) if is_frame && !pace.is_zero() => tokio::time::sleep(pace).await,
                Ok(()) => {}
                // Nobody reads any more, so nothing more is asked for.
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                Err(error) => return Err(Failed::software(error)),
            }
        }
        if ended.is_ok() && finished.is_empty() {
            ended = Err(Failed::software("the server ended the answer without a result"));
        }
        if self.json {
            return ended;
        }
        // What is finished is shown even when the rest failed.
        let printed = view
            .clear(&mut out)
            .and_then(|()| self.print(&finished, &mut out));
        ended.and(Failed::unless_closed(printed))
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

/// States that are kept to be shown later, at most; a server shows a slow reader the newest state only.
const AHEAD: usize = 4096;

/// The same events, read as fast as the server sends them.
fn read_ahead(mut events: Events) -> Events {
    let (sender, receiver) = tokio::sync::mpsc::channel(AHEAD);
    tokio::spawn(async move {
        while let Some(event) = events.next().await {
            if sender.send(event).await.is_err() {
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

fn print_line(
    event: &Event,
    finished: &mut BTreeMap<u32, CanvasResult>,
    out: &mut impl Write,
) -> io::Result<()> {
    let line: json::Line<'_> = match event {
        Event::Accepted(accepted) => accepted.as_ref().into(),
        Event::Resumed(resumed) => resumed.into(),
        Event::Frame(frame) => frame.into(),
        Event::Result(result) => {
            finished.insert(result.canvas, result.clone());
            result.into()
        }
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
