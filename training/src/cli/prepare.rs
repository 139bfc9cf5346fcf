//! `training prepare`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use training::data::tokenizer::END_OF_DOCUMENT;
use training::data::{self, Statistics};

use super::corpus::CorpusArguments;

/// Packs documents into train.tokens and validation.tokens.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    corpus: CorpusArguments,
    /// tokenizer.json.
    #[arg(long, value_name = "FILE")]
    tokenizer: PathBuf,
    /// The token of the tokenizer that ends documents: </s>, [SEP] or whatever it has for that.
    #[arg(long, value_name = "TOKEN", default_value = END_OF_DOCUMENT)]
    end_token: String,
    /// Folder for the token files and the texts they encode.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
}

pub(crate) fn run(arguments: Arguments) -> Result<()> {
    let Arguments {
        corpus,
        tokenizer,
        end_token,
        out,
    } = arguments;
    print(&data::prepare(&corpus.into(), &tokenizer, &end_token, &out)?.statistics);
    Ok(())
}

fn print(statistics: &Statistics) {
    for (name, side) in [
        ("train", &statistics.train),
        ("validation", &statistics.validation),
    ] {
        println!(
            "{name}: {} documents, {} bytes, {} tokens, {:.3} bytes per token, {:.3} % unknown, longest document \
             {} tokens",
            side.documents,
            side.bytes,
            side.tokens,
            side.bytes_per_token(),
            100.0 * side.unknown_share(),
            side.longest
        );
    }
    println!(
        "{} files, {} of them left out in part or whole, {} blank documents left out, {:.1} s, {:.1} MB/s",
        statistics.files,
        statistics.bad,
        statistics.blank,
        statistics.elapsed.as_secs_f64(),
        statistics.megabytes_per_second()
    );
    if statistics.validation.documents == 0 {
        eprintln!(
            "no document is held out: documents are too few for this --validation-fraction, or a --separator is \
             missing"
        );
    }
}
