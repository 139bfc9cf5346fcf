//! `training prepare`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use training::data;

use super::corpus::CorpusArguments;

/// Packs documents into train.tokens and validation.tokens.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    corpus: CorpusArguments,
    /// tokenizer.json.
    #[arg(long, value_name = "FILE")]
    tokenizer: PathBuf,
    /// Folder for the token files and the texts they encode.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

pub(crate) fn run(arguments: Arguments) -> Result<()> {
    let Arguments {
        corpus,
        tokenizer,
        out,
    } = arguments;
    let (train, validation) = data::prepare(&corpus.into(), &tokenizer, &out)?;
    for (name, file) in [("train", &train), ("validation", &validation)] {
        let ratio = file.bytes() as f64 / file.tokens().max(1) as f64;
        println!(
            "{name}: {} tokens, {} bytes, {ratio:.3} bytes per token",
            file.tokens(),
            file.bytes()
        );
    }
    Ok(())
}
