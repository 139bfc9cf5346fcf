//! `denoised generate` and `denoised infill`.

use std::io::{self, IsTerminal, Write};

use clap::{Args, ValueEnum};
use futures_util::stream::{BoxStream, StreamExt};
use tonic::Status;

use super::connect::{Connection, Target};
use super::view::View;
use super::{Failed, INTERRUPTED, json, template};
use crate::proto::v1::diffusion_service_client::DiffusionServiceClient;
use crate::proto::v1::{
    FramePolicy, GenerateRequest, InfillRequest, ModelReference, Sampler, Sampling, frame_policy,
    generate_response, infill_response,
};

/// Options of both commands.
#[derive(Debug, Args)]
pub(super) struct Generate {
    #[command(flatten)]
    target: Target,
    /// Model to ask for, as NAME or NAME@VERSION.
    #[arg(long)]
    model: Option<String>,
    /// Positions of the whole canvas, prompt included (generate only).
    #[arg(long, value_name = "N")]
    length: Option<u32>,
    /// Denoising steps.
    #[arg(long, value_name = "N")]
    steps: Option<u32>,
    /// tweedie or euler.
    #[arg(long, value_name = "NAME", value_parser = json::sampler)]
    sampler: Option<Sampler>,
    /// Seed of all random choices: the same seed gives the same text.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Independent texts to draw.
    #[arg(long, value_name = "N")]
    num_samples: Option<u32>,
    /// 0 takes the likeliest tokens, 1 follows the model.
    #[arg(long, value_name = "X")]
    temperature: Option<f64>,
    /// Choose among this many likeliest tokens.
    #[arg(long, value_name = "N")]
    top_k: Option<u32>,
    /// Choose among the likeliest tokens that hold this share of the probability.
    #[arg(long, value_name = "X")]
    top_p: Option<f64>,
    /// Print one JSON object per event and line.
    #[arg(long, conflicts_with = "live")]
    json: bool,
    /// Show intermediate states.
    #[arg(long, value_enum, default_value = "auto")]
    live: Live,
    /// The prompt, or for infill the template, whose gaps are written [[N]] (\[[ for brackets).
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
    Accepted(crate::proto::v1::Accepted),
    Frame(crate::proto::v1::Frame),
    Result(crate::proto::v1::Result),
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
            let event = |message: crate::proto::v1::GenerateResponse| match message.event? {
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
        }
    }

    fn frames(&self) -> FramePolicy {
        let wanted =
            self.json || self.live == Live::Always || (self.live == Live::Auto && io::stdout().is_terminal());
        let when = if wanted {
            frame_policy::When::OnChange
        } else {
            frame_policy::When::Never
        };
        FramePolicy {
            when: when.into(),
            ..FramePolicy::default()
        }
    }

    fn view(&self) -> View {
        match self.live {
            _ if self.json => View::Off,
            Live::Never => View::Off,
            Live::Auto | Live::Always if io::stdout().is_terminal() => View::terminal(),
            Live::Always => View::blocks(),
            Live::Auto => View::Off,
        }
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
        view.clear(&mut io::stdout()).map_err(Failed::software)?;
        let closed = connection.close().await;
        shown.and(closed)
    }

    async fn show(&self, mut events: Events, view: &mut View) -> Result<(), Failed> {
        let mut out = io::stdout();
        let many = self.num_samples.unwrap_or(1) > 1;
        while let Some(event) = events.next().await {
            let shown = match event? {
                Some(Event::Accepted(accepted)) if self.json => {
                    writeln!(out, "{}", json::accepted(&accepted))
                }
                Some(Event::Frame(frame)) if self.json => writeln!(out, "{}", json::frame(&frame)),
                Some(Event::Result(result)) if self.json => writeln!(out, "{}", json::result(&result)),
                Some(Event::Frame(frame)) => view.show(&frame, &mut out),
                Some(Event::Result(result)) => view.clear(&mut out).and_then(|()| {
                    if many {
                        writeln!(out, "=== sample {} of seed {}", result.canvas, result.seed)?;
                    }
                    match &result.text {
                        Some(text) => writeln!(out, "{text}"),
                        None => writeln!(out, "{:?}", result.tokens),
                    }
                }),
                Some(Event::Accepted(_)) | None => Ok(()),
            };
            shown.and_then(|()| out.flush()).map_err(Failed::software)?;
        }
        Ok(())
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
            let event = |message: crate::proto::v1::InfillResponse| match message.event? {
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
