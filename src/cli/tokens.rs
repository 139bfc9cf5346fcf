//! `denoised tokenize` and `denoised detokenize`.

use std::io::{self, Write};
use std::path::Path;

use clap::Args;

use super::connect::Target;
use super::{Failed, input};
use crate::proto::v1::diffusion_service_client::DiffusionServiceClient;
use crate::proto::v1::{DetokenizeRequest, ModelReference, TokenizeRequest};
use crate::server::models::parse_reference;

/// What both take.
#[derive(Debug, Args)]
pub(super) struct Options {
    #[command(flatten)]
    target: Target,
    /// Model to ask for, as NAME or NAME@VERSION.
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
}

/// Turn text into tokens.
#[derive(Debug, Args)]
pub(super) struct Tokenize {
    #[command(flatten)]
    options: Options,
    /// The text; with - it is read from standard input.
    #[arg(value_name = "TEXT")]
    text: String,
}

/// Turn tokens into text.
#[derive(Debug, Args)]
pub(super) struct Detokenize {
    #[command(flatten)]
    options: Options,
    /// Token ids; with - they are read from standard input.
    #[arg(value_name = "ID", required = true)]
    ids: Vec<String>,
}

/// The model of a command line, if one is named.
pub(super) fn model(named: Option<&str>) -> Result<Option<ModelReference>, Failed> {
    let Some(text) = named else { return Ok(None) };
    let (name, version) = parse_reference(text)
        .ok_or_else(|| Failed::usage(format!("--model {text}: must be NAME or NAME@VERSION")))?;
    Ok(Some(ModelReference {
        name: name.to_owned(),
        version: version.unwrap_or(0),
    }))
}

impl Tokenize {
    pub(super) async fn run(self) -> Result<(), Failed> {
        let text = if self.text == "-" {
            input::read(Path::new("-"))?
        } else {
            self.text
        };
        let model = model(self.options.model.as_deref())?;
        let connection = self.options.target.connect().await?;
        let mut client = DiffusionServiceClient::new(connection.server.clone());
        let answer = client.tokenize(TokenizeRequest { model, text }).await;
        drop(client);
        let printed = answer.map_err(Failed::from).and_then(|answer| {
            let tokens = answer.into_inner().tokens;
            let ids: Vec<String> = tokens.iter().map(ToString::to_string).collect();
            Failed::unless_closed(writeln!(io::stdout(), "{}", ids.join(" ")))
        });
        printed.and(connection.close().await)
    }
}

impl Detokenize {
    pub(super) async fn run(self) -> Result<(), Failed> {
        let words = if self.ids == ["-"] {
            input::read(Path::new("-"))?
        } else {
            self.ids.join(" ")
        };
        let id = |word: &str| {
            word.parse().map_err(|_| {
                Failed::usage(format!(
                    "{word:?} is no token id, which is a whole number, 0 to {}",
                    u32::MAX
                ))
            })
        };
        let tokens = words
            .split_whitespace()
            .map(id)
            .collect::<Result<Vec<u32>, _>>()?;
        let model = model(self.options.model.as_deref())?;
        let connection = self.options.target.connect().await?;
        let mut client = DiffusionServiceClient::new(connection.server.clone());
        let answer = client
            .detokenize(DetokenizeRequest {
                model,
                tokens,
                pieces: false,
            })
            .await;
        drop(client);
        let printed = answer
            .map_err(Failed::from)
            .and_then(|answer| Failed::unless_closed(writeln!(io::stdout(), "{}", answer.into_inner().text)));
        printed.and(connection.close().await)
    }
}
