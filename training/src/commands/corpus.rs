//! Which documents there are, for every command that reads text.

use std::path::PathBuf;

use clap::Args;
use training::data::Corpus;

/// Which documents there are, and which are held out. `tokenizer` and `prepare` must be given the same.
#[derive(Debug, Args)]
pub(super) struct CorpusArguments {
    /// Text files.
    #[arg(required = true, value_name = "FILE")]
    input: Vec<PathBuf>,
    /// What separates documents within a file; without, a file is one document.
    #[arg(long, value_name = "TEXT")]
    separator: Option<String>,
    /// Share of the documents that is held out.
    #[arg(long, value_name = "X", default_value_t = 0.05)]
    validation_fraction: f64,
    /// Chooses which documents those are.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

impl From<CorpusArguments> for Corpus {
    fn from(arguments: CorpusArguments) -> Self {
        let CorpusArguments {
            input,
            separator,
            validation_fraction,
            seed,
        } = arguments;
        Self {
            input,
            separator,
            validation_fraction,
            seed,
        }
    }
}
