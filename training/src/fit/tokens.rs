//! The token files of a run, and what they must have in common.

use std::fs;

use anyhow::{Context, Result, anyhow, ensure};
use tokenizers::Tokenizer;

use super::record::Provenance;
use crate::config::{MixturePart, RunConfig};
use crate::data::TokenFile;

/// Hashes of all tokens to train on.
pub(super) fn learned_from(provenance: &Provenance) -> Vec<String> {
    let files = std::iter::once(&provenance.train).chain(&provenance.mixture);
    files.map(|file| file.sha256.clone()).collect()
}

/// The token files that are mixed in, whose tokens must be those of `train`.
pub(super) fn mixed(config: &RunConfig, train: &TokenFile) -> Result<Vec<TokenFile>> {
    let open = |part: &MixturePart| {
        let file = TokenFile::open(&part.tokens)?;
        let made_with = |file: &TokenFile| (file.tokenizer_sha256().to_owned(), file.end_of_document());
        ensure!(
            made_with(&file) == made_with(train),
            "data.mixture: {} was made with another tokenizer, or another end of documents, than {}",
            part.tokens.display(),
            config.data.train.display()
        );
        Ok(file)
    };
    config.data.mixture.iter().map(open).collect()
}

/// The run's tokenizer, which must be the one that made its token files.
pub(super) fn matching_tokenizer(
    config: &RunConfig,
    train: &TokenFile,
    validation: &TokenFile,
) -> Result<Tokenizer> {
    let data = &config.data;
    validation.check_preparation(train)?;
    let path = data.tokenizer.display();
    let json = fs::read(&data.tokenizer).with_context(|| format!("cannot read data.tokenizer {path}"))?;
    train.check_tokenizer(&data.tokenizer, &json)?;
    let tokenizer = Tokenizer::from_bytes(&json).map_err(|error| anyhow!("{path}: {error}"))?;
    let size = tokenizer.get_vocab_size(true);
    ensure!(
        size == train.vocab_size(),
        "data.tokenizer {path} has {size} tokens, {} was made for {}",
        data.train.display(),
        train.vocab_size()
    );
    Ok(tokenizer)
}
