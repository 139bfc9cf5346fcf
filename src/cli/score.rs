//! `denoised score` and `denoised choose`.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, ValueEnum};
use futures_util::StreamExt;
use tonic::Request;

use super::asked::{deadline_ms, seed};
use super::connect::{Answering, Target};
use super::{Failed, INTERRUPTED, input, json, tokens};
use crate::proto::v1::diffusion_service_client::DiffusionServiceClient;
use crate::proto::v1::score_response::Event;
use crate::proto::v1::text_or_tokens::Content;
use crate::proto::v1::{
    self, Bound, ChooseRequest, Exact, Likelihood, PartToScore, ScoreRequest, TextOrTokens, TextToScore,
    likelihood,
};

/// Marks the place of the candidates.
const SLOT: &str = "[[]]";
/// Characters of a text that are shown beside its score.
const SHOWN: usize = 60;

/// What both commands take.
#[derive(Debug, Args)]
struct Options {
    #[command(flatten)]
    target: Target,
    /// Model to ask for, as NAME or NAME@VERSION.
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// The exact likelihood of filling one position after another in this order, on absorbing graphs.
    #[arg(long, value_enum, value_name = "ORDER")]
    exact: Option<Order>,
    /// The diffusion bound, of so many evaluations with drawn noise; 4 to the server's limit for steps.
    #[arg(long, value_name = "N", conflicts_with = "exact")]
    draws: Option<u32>,
    /// Seed of the noise of a bound; drawn by default.
    #[arg(long, value_name = "N", allow_negative_numbers = true, value_parser = seed)]
    seed: Option<u64>,
    /// Seconds that the answer may take, from 0.001.
    #[arg(long, value_name = "SECONDS", value_parser = deadline_ms)]
    deadline: Option<u64>,
    /// Of your own requests those of higher priority go first; 0 by default.
    #[arg(
        long,
        value_name = "N",
        default_value_t = 0,
        hide_default_value = true,
        allow_negative_numbers = true
    )]
    priority: i32,
    /// Print one JSON object a line.
    #[arg(long)]
    json: bool,
}

/// Orders in which positions are filled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Order {
    /// From left to right.
    LeftToRight,
    /// The position of lowest entropy first.
    SurestFirst,
}

/// Say how likely texts are: by the diffusion bound of 128 evaluations, unless you ask for another.
#[derive(Debug, Args)]
pub(super) struct Score {
    #[command(flatten)]
    options: Options,
    /// What stands before every text, seen by the model and not scored.
    #[arg(long, value_name = "TEXT")]
    given: Option<String>,
    /// The texts, each scored by itself; with - one is read from standard input.
    #[arg(value_name = "TEXT", required_unless_present = "file")]
    texts: Vec<String>,
    /// Read one text from a file; - is standard input.
    #[arg(long, value_name = "FILE", conflicts_with = "texts")]
    file: Option<PathBuf>,
    /// Every line of what is read is a text of its own; empty ones are left out.
    #[arg(long)]
    lines: bool,
}

/// Say how likely each of some texts is at one place of a text: exactly, filled from left to right, unless you ask for
/// another.
#[derive(Debug, Args)]
pub(super) struct Choose {
    #[command(flatten)]
    options: Options,
    /// The text, with [[]] where the candidates go.
    #[arg(value_name = "TEXT")]
    text: String,
    /// The candidates.
    #[arg(value_name = "CANDIDATE", required = true, num_args = 2..)]
    candidates: Vec<String>,
}

impl Options {
    fn likelihood(&self) -> Option<Likelihood> {
        let kind = match (self.exact, self.draws) {
            (Some(order), _) => likelihood::Likelihood::Exact(Exact {
                order: match order {
                    Order::LeftToRight => v1::Order::LeftToRight,
                    Order::SurestFirst => v1::Order::SurestFirst,
                }
                .into(),
            }),
            (None, Some(draws)) => likelihood::Likelihood::Bound(Bound { draws: Some(draws) }),
            (None, None) => return None,
        };
        Some(Likelihood {
            likelihood: Some(kind),
        })
    }

    /// The call, with its deadline.
    fn call<T>(&self, message: T) -> Request<T> {
        let mut call = Request::new(message);
        if let Some(ms) = self.deadline {
            call.set_timeout(Duration::from_millis(ms));
        }
        call
    }
}

fn text(text: &str) -> TextOrTokens {
    TextOrTokens {
        content: Some(Content::Text(text.to_owned())),
    }
}

impl Score {
    pub(super) async fn run(self) -> Result<(), Failed> {
        let texts = self.texts()?;
        let part = |words: &str, context| PartToScore {
            content: Some(text(words)),
            context,
        };
        let given = self.given.as_deref().map(|given| part(given, true));
        let request = ScoreRequest {
            model: tokens::model(self.options.model.as_deref())?,
            texts: texts
                .iter()
                .map(|text| TextToScore {
                    parts: given.clone().into_iter().chain([part(text, false)]).collect(),
                })
                .collect(),
            likelihood: self.options.likelihood(),
            seed: self.options.seed,
            priority: self.options.priority,
            ..ScoreRequest::default()
        };
        let connection = self.options.target.connect().await?;
        let mut client = DiffusionServiceClient::new(connection.server.clone());
        let shown = tokio::select! {
            shown = self.show(&mut client, request, &texts) => shown,
            // The stream is dropped, which cancels the request.
            _ = tokio::signal::ctrl_c() => Err(Failed { code: INTERRUPTED, message: String::new() }),
        };
        drop(client);
        shown.and(connection.close().await)
    }

    fn texts(&self) -> Result<Vec<String>, Failed> {
        let mut texts = Vec::new();
        for text in &self.texts {
            texts.push(if text == "-" {
                input::read(Path::new("-"))?
            } else {
                text.clone()
            });
        }
        if let Some(file) = &self.file {
            texts.push(input::read(file)?);
        }
        if self.lines {
            let lines = texts.iter().flat_map(|text| text.lines());
            texts = lines.filter(|line| !line.is_empty()).map(str::to_owned).collect();
        }
        if texts.is_empty() {
            return Err(Failed::usage("there is no text to score"));
        }
        Ok(texts)
    }

    async fn show(
        &self,
        client: &mut DiffusionServiceClient<Answering>,
        request: ScoreRequest,
        texts: &[String],
    ) -> Result<(), Failed> {
        let mut events = client.score(self.options.call(request)).await?.into_inner();
        let mut progress = Progress::default();
        let (mut out, mut is_whole) = (io::stdout(), false);
        while let Some(message) = events.next().await {
            let message = message.inspect_err(|_| progress.clear())?;
            let Some(event) = message.event else { continue };
            is_whole |= matches!(event, Event::Total(_));
            if let (Event::Progress(now), false) = (&event, self.options.json) {
                progress.show(now);
                continue;
            }
            progress.clear();
            let printed = if self.options.json {
                serde_json::to_string(&json::Line::from(&event))
                    .map_err(io::Error::from)
                    .and_then(|line| writeln!(out, "{line}"))
            } else {
                print(&event, texts, &mut out)
            };
            match printed.and_then(|()| out.flush()) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                Err(error) => return Err(Failed::software(error)),
            }
        }
        if is_whole {
            Ok(())
        } else {
            Err(Failed::software("the server ended the answer without a total"))
        }
    }
}

/// How far the request is, on a terminal.
#[derive(Debug, Default)]
struct Progress {
    is_shown: bool,
}

impl Progress {
    fn show(&mut self, now: &v1::ScoreProgress) {
        let mut err = io::stderr();
        if err.is_terminal() {
            self.is_shown = write!(err, "\r{} of {} evaluations", now.done, now.total)
                .and_then(|()| err.flush())
                .is_ok();
        }
    }

    fn clear(&mut self) {
        if std::mem::take(&mut self.is_shown) {
            let mut err = io::stderr();
            // A terminal that is gone has nothing to clear.
            let _gone = write!(err, "\r\x1b[K").and_then(|()| err.flush());
        }
    }
}

fn print(event: &Event, texts: &[String], out: &mut impl Write) -> io::Result<()> {
    let error = |error: f64| {
        if error > 0.0 {
            format!(" ± {error:.2}")
        } else {
            String::new()
        }
    };
    match event {
        Event::Accepted(_) | Event::Progress(_) => Ok(()),
        Event::Score(score) => {
            let text = texts.get(score.text as usize).map_or("", String::as_str);
            let line = text.lines().next().unwrap_or_default();
            let mut shown: String = line.chars().take(SHOWN).collect();
            if shown.len() < text.trim_end().len() {
                shown.push('…');
            }
            let nats = format!("{:.2}{}", score.nats, error(score.standard_error));
            writeln!(
                out,
                "{nats:>16} nats  {:>8.3} nats/token  {shown}",
                score.nats / f64::from(score.tokens.max(1))
            )
        }
        Event::Total(total) => {
            let bits = total
                .bits_per_byte
                .map_or(String::new(), |bits| format!(", {bits:.3} bits/byte"));
            writeln!(
                out,
                "{} tokens: {:.3}{} nats/token, perplexity {:.2}{bits}",
                total.tokens,
                total.nats_per_token,
                error(total.standard_error),
                total.perplexity
            )
        }
    }
}

impl Choose {
    pub(super) async fn run(self) -> Result<(), Failed> {
        let Some((before, after)) = self
            .text
            .split_once(SLOT)
            .filter(|(_, after)| !after.contains(SLOT))
        else {
            let problem = format!("{:?} must hold {SLOT} once, where the candidates go", self.text);
            return Err(Failed::usage(problem));
        };
        let around = |words: &str| (!words.is_empty()).then(|| text(words));
        let request = ChooseRequest {
            model: tokens::model(self.options.model.as_deref())?,
            before: around(before),
            after: around(after),
            candidates: self.candidates.iter().map(|candidate| text(candidate)).collect(),
            likelihood: self.options.likelihood(),
            seed: self.options.seed,
            priority: self.options.priority,
            ..ChooseRequest::default()
        };
        let connection = self.options.target.connect().await?;
        let mut client = DiffusionServiceClient::new(connection.server.clone());
        let answer = tokio::select! {
            answer = client.choose(self.options.call(request)) => answer.map_err(Failed::from),
            _ = tokio::signal::ctrl_c() => Err(Failed { code: INTERRUPTED, message: String::new() }),
        };
        drop(client);
        let printed = answer.and_then(|answer| {
            let printed = self.print(&answer.into_inner().candidates, &mut io::stdout());
            Failed::unless_closed(printed)
        });
        printed.and(connection.close().await)
    }

    /// The likeliest first.
    fn print(&self, scores: &[v1::CandidateScore], out: &mut impl Write) -> io::Result<()> {
        let mut order: Vec<usize> = (0..scores.len().min(self.candidates.len())).collect();
        order.sort_by(|&a, &b| scores[b].probability.total_cmp(&scores[a].probability));
        for index in order {
            let (candidate, score) = (&self.candidates[index], &scores[index]);
            if self.options.json {
                let line = json::Line::candidate(candidate, index, score);
                writeln!(out, "{}", serde_json::to_string(&line)?)?;
            } else {
                writeln!(
                    out,
                    "{:>7.4}  {:>9.3} nats  {candidate}",
                    score.probability, score.log_probability
                )?;
            }
        }
        out.flush()
    }
}
