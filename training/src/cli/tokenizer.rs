//! `training tokenizer`.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};
use clap::Args;
use training::data::tokenizer;
use training::data::{Corpus, Partial};

use super::corpus::CorpusArguments;

/// Learns a byte-level BPE tokenizer from the documents to train on, or takes their characters.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    corpus: CorpusArguments,
    /// Tokens to learn, the end of a document included; at least 257.
    #[arg(long, value_name = "N", required_unless_present = "characters")]
    vocab_size: Option<usize>,
    /// One token for each character instead, as of text8.
    #[arg(long, conflicts_with = "vocab_size")]
    characters: bool,
    /// Learn from so many bytes at most, drawn evenly from all over the documents; they are held in memory.
    #[arg(long, value_name = "N", default_value_t = 256 << 20)]
    sample_bytes: u64,
    /// Where to write tokenizer.json.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
}

pub(crate) fn run(arguments: Arguments) -> Result<()> {
    let Arguments {
        corpus,
        vocab_size,
        characters: _,
        sample_bytes,
        out,
    } = arguments;
    let sample = Corpus::from(corpus).sample(sample_bytes)?;
    if let Some(folder) = out.parent() {
        std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
    }
    let tokenizer = match vocab_size {
        Some(vocab_size) => tokenizer::train(&sample, vocab_size)?,
        None => tokenizer::of_characters(&sample)?,
    };
    let json = tokenizer
        .to_string(true)
        .map_err(|e| anyhow!("{}: {e}", out.display()))?;
    let mut file = Partial::create(&out)?;
    file.write_all(json.as_bytes())
        .with_context(|| format!("cannot write {}", out.display()))?;
    file.complete()?;
    println!(
        "{}: {} tokens, learned from {} bytes of text",
        out.display(),
        tokenizer.get_vocab_size(true),
        sample.iter().map(String::len).sum::<usize>()
    );
    Ok(())
}
