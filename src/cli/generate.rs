//! `denoised generate` and `denoised infill`.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::time::Duration;

use clap::{Args, ValueEnum};
use futures_util::stream::{BoxStream, StreamExt};
use tonic::Status;

use super::connect::{Connection, Target};
use super::view::View;
use super::{Failed, INTERRUPTED, json, template};
use crate::proto::v1::diffusion_service_client::DiffusionServiceClient;
use crate::proto::v1::{
    Accepted, Frame, FramePolicy, GenerateRequest, GenerateResponse, InfillRequest, InfillResponse,
    ModelReference, Result as Finished, Sampler, Sampling, frame_policy, generate_response, infill_response,
};

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
    /// (the surest tokens first), remask (tokens can be masked again); the model's default or tweedie otherwise.
    #[arg(long, value_name = "SAMPLER", value_parser = sampler)]
    sampler: Option<Sampler>,
    /// Let the noise alone decide when a token leaves the mask: evaluations that change nothing are not run.
    #[arg(long)]
    normalize: bool,
    /// Entropy, in nats, of the tokens that entropy-bounded fills at once; 0.5 by default.
    #[arg(long, value_name = "X")]
    entropy_bound: Option<f64>,
    /// Chance of a token to be masked again in a step of remask; 0.02 by default.
    #[arg(long, value_name = "X")]
    remask_rate: Option<f64>,
    /// Seed of all random choices: the same seed gives the same text. Drawn by default.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Independent texts to draw; 1 by default.
    #[arg(long, value_name = "N")]
    num_samples: Option<u32>,
    /// 0 takes the likeliest tokens, 1 follows the model; the model's default or 1 otherwise.
    #[arg(long, value_name = "X")]
    temperature: Option<f64>,
    /// Choose among this many likeliest tokens; all by default.
    #[arg(long, value_name = "N")]
    top_k: Option<u32>,
    /// Choose among the likeliest tokens that hold this share of the probability; the model's default or 1
    /// otherwise.
    #[arg(long, value_name = "X")]
    top_p: Option<f64>,
    /// Print one JSON object per event and line.
    #[arg(long, conflicts_with = "live")]
    json: bool,
    /// Show intermediate states.
    #[arg(long, value_enum, value_name = "WHEN", default_value = "auto")]
    live: Live,
    /// On a terminal, show every state for so many milliseconds, however fast the server is; 0 to 60000.
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u32).range(..=60_000))]
    pace: Option<u32>,
    /// The prompt; for infill the template, where [[N]] is a gap of N tokens, \[ a bracket that opens
    /// no gap and \\ a backslash.
    #[arg(value_name = "TEXT", default_value = "")]
    text: String,
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

/// Events of either call.
enum Event {
    Accepted(Accepted),
    Frame(Frame),
    Result(Finished),
}

type Events = BoxStream<'static, Result<Option<Event>, Status>>;

impl Generate {
    pub(super) async fn run(self) -> Result<(), Failed> {
        let model = self.model_reference()?;
        let connection = self.target.connect().await?;
        let request = GenerateRequest {
            model,
            prompt: self.text.clone(),
            length: self.length,
            sampling: Some(self.sampling()),
            frames: Some(self.frames()),
            ..GenerateRequest::default()
        };
        let mut client = DiffusionServiceClient::new(connection.channel.clone());
        let events = client.generate(request).await.map(|response| {
            let event = |message: GenerateResponse| match message.event? {
                generate_response::Event::Accepted(accepted) => Some(Event::Accepted(accepted)),
                generate_response::Event::Frame(frame) => Some(Event::Frame(frame)),
                generate_response::Event::Result(result) => Some(Event::Result(result)),
            };
            response
                .into_inner()
                .map(move |message| Ok(event(message?)))
                .boxed()
        });
        drop(client);
        self.finish(connection, events).await
    }

    fn model_reference(&self) -> Result<Option<ModelReference>, Failed> {
        let Some(text) = &self.model else { return Ok(None) };
        let (name, version) = crate::server::models::parse_reference(text)
            .ok_or_else(|| Failed::usage(format!("--model {text}: must be NAME or NAME@VERSION")))?;
        Ok(Some(ModelReference {
            name: name.to_owned(),
            version: version.unwrap_or(0),
        }))
    }

    fn sampling(&self) -> Sampling {
        Sampling {
            steps: self.steps,
            sampler: self.sampler.unwrap_or_default().into(),
            seed: self.seed,
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            num_samples: self.num_samples,
            normalize: self.normalize,
            entropy_bound: self.entropy_bound,
            remask_rate: self.remask_rate,
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
        self.num_samples.unwrap_or(1) > 1
    }

    /// Shows the events and leaves terminal and server in order, whatever happened.
    async fn finish(&self, connection: Connection, events: Result<Events, Status>) -> Result<(), Failed> {
        let mut view = self.view();
        let shown = match events {
            Ok(events) => tokio::select! {
                shown = self.show(events, &mut view) => shown,
                // The stream is dropped, which cancels the request.
                _ = tokio::signal::ctrl_c() => Err(Failed { code: INTERRUPTED, message: String::new() }),
            },
            Err(status) => Err(status.into()),
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
            let is_frame = matches!(event, Ok(Some(Event::Frame(_))));
            let shown = match event {
                Ok(Some(event)) if self.json => print_line(&event, &mut finished, &mut out),
                Ok(Some(Event::Frame(frame))) => view.show(&frame, &mut out),
                Ok(Some(Event::Result(result))) => {
                    finished.insert(result.canvas, result);
                    Ok(())
                }
                Ok(Some(Event::Accepted(_)) | None) => Ok(()),
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

    fn print(&self, finished: &BTreeMap<u32, Finished>, out: &mut impl Write) -> io::Result<()> {
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

fn print_line(event: &Event, finished: &mut BTreeMap<u32, Finished>, out: &mut impl Write) -> io::Result<()> {
    let line: json::Line<'_> = match event {
        Event::Accepted(accepted) => accepted.into(),
        Event::Frame(frame) => frame.into(),
        Event::Result(result) => {
            finished.insert(result.canvas, result.clone());
            result.into()
        }
    };
    writeln!(out, "{}", serde_json::to_string(&line)?)
}

/// The names that [`sampler`] takes; values of the proto follow each other.
fn samplers() -> Vec<String> {
    let known = (1..).map_while(|value| Sampler::try_from(value).ok());
    known
        .map(|sampler| json::plain(sampler.as_str_name(), "SAMPLER_").replace('_', "-"))
        .collect()
}

/// A sampler by its proto name without prefix, so that new ones need no change here.
fn sampler(name: &str) -> Result<Sampler, String> {
    Sampler::from_str_name(&format!("SAMPLER_{}", name.to_uppercase().replace('-', "_")))
        .filter(|sampler| *sampler != Sampler::Unspecified)
        .ok_or_else(|| format!("must be {}", samplers().join(", ")))
}

impl Infill {
    pub(super) async fn run(self) -> Result<(), Failed> {
        let options = self.options;
        if options.length.is_some() {
            return Err(Failed::usage(
                "--length: a template's length follows from its text and gaps",
            ));
        }
        let parts = template::parse(&options.text).map_err(|e| Failed::usage(format!("template: {e}")))?;
        let model = options.model_reference()?;
        let connection = options.target.connect().await?;
        let request = InfillRequest {
            model,
            template: parts,
            sampling: Some(options.sampling()),
            frames: Some(options.frames()),
            ..InfillRequest::default()
        };
        let mut client = DiffusionServiceClient::new(connection.channel.clone());
        let events = client.infill(request).await.map(|response| {
            let event = |message: InfillResponse| match message.event? {
                infill_response::Event::Accepted(accepted) => Some(Event::Accepted(accepted)),
                infill_response::Event::Frame(frame) => Some(Event::Frame(frame)),
                infill_response::Event::Result(result) => Some(Event::Result(result)),
            };
            response
                .into_inner()
                .map(move |message| Ok(event(message?)))
                .boxed()
        });
        drop(client);
        options.finish(connection, events).await
    }
}
