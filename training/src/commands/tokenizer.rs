//! `training tokenizer`.

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};
use clap::Args;
use training::data::Corpus;
use training::tokenizer;

use super::corpus::CorpusArguments;

/// Learns a byte-level BPE tokenizer from the documents to train on.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    corpus: CorpusArguments,
    /// Tokens to learn, the end of a document included; at least 257.
    #[arg(long, value_name = "N")]
    vocab_size: usize,
    /// Where to write tokenizer.json.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

pub(crate) fn run(arguments: Arguments) -> Result<()> {
    let Arguments {
        corpus,
        vocab_size,
        out,
    } = arguments;
    let documents = Corpus::from(corpus).read()?;
    if let Some(folder) = out.parent() {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    let tokenizer = tokenizer::train(&documents.train, vocab_size)?;
    tokenizer
        .save(&out, true)
        .map_err(|e| anyhow!("{}: {e}", out.display()))?;
    println!("{}: {} tokens", out.display(), tokenizer.get_vocab_size(true));
    Ok(())
}
