//! `denoised generate` and `denoised infill`.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use futures_util::stream::{BoxStream, StreamExt};
use tonic::Status;

use super::connect::{Connection, Target};
use super::view::View;
use super::{Failed, INTERRUPTED, input, json, template, tokens};
use crate::client::{self, Event, Retry};
use crate::proto::v1::generate_request::PromptAs;
use crate::proto::v1::sampling::Sampler;
use crate::proto::v1::{
    CanvasResult, Deadline, EntropyBounded, Euler, FramePolicy, GenerateRequest, InfillRequest, OnDeadline,
    Remask, Sampling, Tweedie, frame_policy,
};
use crate::server::sampler;

/// Milliseconds between two drawings of a canvas on a terminal: what eyes can follow.
const REDRAW_MS: u32 = 40;

/// Options of both commands.
#[derive(Debug, Args)]
pub(super) struct Generate {
    #[command(flatten)]
    target: Target,
    /// Model to ask for, as NAME or NAME@VERSION.
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// Tokens of the whole text, prompt included; the model's default or maximum otherwise (generate only).
    #[arg(long, value_name = "N")]
    length: Option<u32>,
    /// Denoising steps; the model's default, or else as many as there are tokens to fill, at most 64.
    #[arg(long, value_name = "N")]
    steps: Option<u32>,
    /// How to take a step: tweedie, euler, first-hitting (one token an evaluation), confidence or entropy-bounded
    /// (the surest tokens first), remask (tokens can be masked again), theta-trapezoidal (two evaluations a step);
    /// the model's default or tweedie otherwise.
    #[arg(long, value_name = "SAMPLER", value_parser = sampler_named)]
    sampler: Option<Sampler>,
    /// For tweedie and euler: let the noise alone decide when a token leaves the mask; evaluations that change
    /// nothing are not run.
    #[arg(long, requires = "sampler")]
    normalize: bool,
    /// For entropy-bounded: entropy, in nats, of the tokens that are filled at once; the model's default or 0.5
    /// otherwise.
    #[arg(long, value_name = "X", requires = "sampler", allow_negative_numbers = true)]
    entropy_bound: Option<f64>,
    /// For remask: chance of a token to be masked again in a step; the model's default or 0.02 otherwise.
    #[arg(long, value_name = "X", requires = "sampler", allow_negative_numbers = true)]
    remask_rate: Option<f64>,
    /// Seed of all random choices: the same seed gives the same text. Drawn by default.
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = seed)]
    seed: Option<u64>,
    /// Independent texts to draw; 1 by default.
    #[arg(long, value_name = "N")]
    num_samples: Option<u32>,
    /// 0 takes the likeliest tokens, 1 follows the model; the model's default or 1 otherwise.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    temperature: Option<f64>,
    /// Choose among this many likeliest tokens; all by default.
    #[arg(long, value_name = "N")]
    top_k: Option<u32>,
    /// Choose among the likeliest tokens that hold this share of the probability; the model's default or 1
    /// otherwise.
    #[arg(long, value_name = "X", allow_negative_numbers = true)]
    top_p: Option<f64>,
    /// For drafts of an infill's template: the time up to which they are noised, about the share of them that is lost;
    /// above 0, at most 1; 0.5 by default.
    #[arg(long, value_name = "T", allow_negative_numbers = true)]
    start_time: Option<f64>,
    /// Seconds that the answer may take, from 0.001.
    #[arg(long, value_name = "SECONDS", value_parser = deadline_ms)]
    deadline: Option<u64>,
    /// With --deadline: take fewer steps where there is no time for all of them, instead of failing.
    #[arg(long, requires = "deadline")]
    finish_early: bool,
    /// Of your own requests those of higher priority go first; 0 by default.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        hide_default_value = true,
        allow_negative_numbers = true
    )]
    priority: i32,
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
        let (model, sampling) = (tokens::model(self.model.as_deref())?, self.sampling()?);
        let prompt = self.text()?;
        let connection = self.target.connect().await?;
        let request = GenerateRequest {
            model,
            prompt_as: Some(PromptAs::Prompt(prompt)),
            length: self.length,
            sampling: Some(sampling),
            frames: Some(self.frames()),
            deadline: self.deadline(),
            priority: self.priority,
            ..GenerateRequest::default()
        };
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

    fn sampling(&self) -> Result<Sampling, Failed> {
        Ok(Sampling {
            sampler: self.sampler()?,
            steps: self.steps,
            seed: self.seed,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            num_samples: self.num_samples,
            start_time: self.start_time,
        })
    }

    /// The sampler with those of the options that are its own.
    fn sampler(&self) -> Result<Option<Sampler>, Failed> {
        let (mut sampler, normalize) = (self.sampler, self.normalize);
        let (mut bound, mut rate, mut normalizes) = (self.entropy_bound, self.remask_rate, normalize);
        match &mut sampler {
            Some(Sampler::Tweedie(Tweedie { normalize }) | Sampler::Euler(Euler { normalize })) => {
                *normalize = std::mem::take(&mut normalizes);
            }
            Some(Sampler::EntropyBounded(EntropyBounded { bound: own })) => *own = bound.take(),
            Some(Sampler::Remask(Remask { rate: own })) => *own = rate.take(),
            Some(Sampler::FirstHitting(_) | Sampler::Confidence(_) | Sampler::ThetaTrapezoidal(_)) | None => {
            }
        }
        for (option, left, of) in [
            ("--normalize", normalizes, "tweedie or euler"),
            ("--entropy-bound", bound.is_some(), "entropy-bounded"),
            ("--remask-rate", rate.is_some(), "remask"),
        ] {
            if left {
                return Err(Failed::usage(format!("{option} is for --sampler {of}")));
            }
        }
        Ok(sampler)
    }

    fn deadline(&self) -> Option<Deadline> {
        self.deadline.map(|ms| Deadline {
            ms: Some(ms),
            on_deadline: if self.finish_early {
                OnDeadline::FinishEarly.into()
            } else {
                OnDeadline::Fail.into()
            },
        })
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
        self.num_samples.unwrap_or(1) > 1
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

pub(super) fn seed(text: &str) -> Result<u64, String> {
    text.parse()
        .map_err(|_| format!("must be a whole number, 0 to {}", u64::MAX))
}

/// Seconds as milliseconds.
pub(super) fn deadline_ms(text: &str) -> Result<u64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.001..=1e9).contains(&seconds) => Ok((seconds * 1e3) as u64),
        _ => Err("must be a number of seconds, 0.001 to 1000000000".to_owned()),
    }
}

/// A sampler by the name of its field in the proto, with dashes.
fn sampler_named(name: &str) -> Result<Sampler, String> {
    let names = sampler::ALL.map(|(known, sampler)| (known.replace('_', "-"), sampler));
    match names.iter().find(|(known, _)| known == name) {
        Some((_, sampler)) => Ok(*sampler),
        None => Err(format!("must be {}", names.map(|(known, _)| known).join(", "))),
    }
}

impl Infill {
    pub(super) async fn run(self) -> Result<(), Failed> {
        let options = self.options;
        if options.length.is_some() {
            return Err(Failed::usage(
                "--length: a template's length follows from its text and gaps",
            ));
        }
        let template =
            template::parse(&options.text()?).map_err(|e| Failed::usage(format!("template: {e}")))?;
        let (model, sampling) = (tokens::model(options.model.as_deref())?, options.sampling()?);
        let connection = options.target.connect().await?;
        let request = InfillRequest {
            model,
            template: template.parts,
            token_sets: template.token_sets,
            sampling: Some(sampling),
            frames: Some(options.frames()),
            deadline: options.deadline(),
            priority: options.priority,
            ..InfillRequest::default()
        };
        options.finish(connection, request.into()).await
    }
}
