//! `denoised bench`: puts a server under load, and says how long it took.

mod load;
mod mix;
mod report;

use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde_json::json;

use super::Failed;
use super::asked::Asked;
use super::connect::Target;
use load::{Arrivals, Load};
use mix::Mix;

/// Put a server under load.
///
/// Times are counted from when a request was due, not from when it was sent: a server that holds up its clients is not
/// excused by it.
#[derive(Debug, Args)]
pub(super) struct Bench {
    #[command(flatten)]
    target: Target,
    /// Requests at once; each stream sends its next when the one before it has ended. 1 by default.
    #[arg(long, value_name = "N", conflicts_with = "rate", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    streams: Option<u32>,
    /// Requests a second, at random times (Poisson), however long they take; 0.001 to 10000.
    #[arg(long, value_name = "X", value_parser = rate)]
    rate: Option<f64>,
    /// Seconds that requests are sent and counted for, 1 to 86400.
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    seconds: u64,
    /// Seconds before that, whose requests are sent but not counted, 0 to 3600.
    #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u64).range(..=3600))]
    warm_up: u64,
    /// Requests to choose from, one a line: a weight, then the options and the text of `generate`, or of `infill` after
    /// that word, such as `3 --length 64 --steps 16 "In the"` or `1 infill --steps 8 "In the [[4]] of"`.
    #[arg(long, value_name = "FILE")]
    mix: Option<PathBuf>,
    /// Ask for results alone: no intermediate states are sent, and none is timed.
    #[arg(long)]
    no_frames: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    asked: Asked,
    /// The prompt.
    #[arg(value_name = "TEXT", conflicts_with = "mix")]
    text: Option<String>,
}

impl Bench {
    pub(super) async fn run(self) -> Result<(), Failed> {
        let mix = match &self.mix {
            Some(file) if self.asked == Asked::default() => Mix::read(file, self.no_frames)?,
            Some(_) => {
                let problem = "--mix: its lines have options of their own; leave out those of a request here";
                return Err(Failed::usage(problem));
            }
            None => Mix::of(&self.asked, self.text.unwrap_or_default(), self.no_frames)?,
        };
        let arrivals = match (self.rate, self.streams) {
            (Some(rate), _) => Arrivals::Open { rate },
            (None, streams) => Arrivals::Closed {
                streams: streams.unwrap_or(1),
            },
        };
        let connection = self.target.connect().await?;
        let load = Load {
            arrivals,
            warm_up: Duration::from_secs(self.warm_up),
            measured: Duration::from_secs(self.seconds),
        };
        let outcome = tokio::select! {
            outcome = load.run(connection.client.clone(), mix) => Ok(outcome),
            _ = tokio::signal::ctrl_c() => Err(Failed { code: super::INTERRUPTED, message: String::new() }),
        };
        let printed = outcome.and_then(|outcome| {
            let report = report::Report::new(&load, &outcome);
            let mut out = io::stdout();
            let printed = if self.json {
                serde_json::to_string(&json!({ "bench": report }))
                    .map_err(io::Error::from)
                    .and_then(|line| writeln!(out, "{line}"))
            } else {
                report.print(&mut out)
            };
            Failed::unless_closed(printed)
        });
        printed.and(connection.close().await)
    }
}

/// What `--json` prints of a load that nothing came of.
#[cfg(test)]
pub(super) fn told_of_nothing() -> serde_json::Value {
    let load = Load {
        arrivals: Arrivals::Closed { streams: 1 },
        warm_up: Duration::ZERO,
        measured: Duration::from_secs(1),
    };
    json!({ "bench": report::Report::new(&load, &load::Outcome::default()) })
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        // The less there are, the longer the waits between them, which must be times still.
        Ok(rate) if (0.001..=10_000.0).contains(&rate) => Ok(rate),
        _ => Err("must be a number, 0.001 to 10000".to_owned()),
    }
}
