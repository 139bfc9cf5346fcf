//! The token files of a run, and what they must have in common.

use std::fs;

use tokenizers::Tokenizer;

use super::error::FitError;
use super::record::Provenance;
use crate::config::{MixturePart, RunConfig};
use crate::data::TokenFile;

/// Hashes of all tokens to train on.
pub(super) fn learned_from(provenance: &Provenance) -> Vec<String> {
    let files = std::iter::once(&provenance.train).chain(&provenance.mixture);
    files.map(|file| file.sha256.clone()).collect()
}

/// The token files that are mixed in, whose tokens must be those of `train`.
pub(super) fn mixed(config: &RunConfig, train: &TokenFile) -> Result<Vec<TokenFile>, FitError> {
    let open = |part: &MixturePart| {
        let file = TokenFile::open(&part.tokens)?;
        let made_with = |file: &TokenFile| (file.tokenizer_sha256().to_owned(), file.end_of_document());
        if made_with(&file) != made_with(train) {
            return Err(FitError::Mixture {
                mixed: part.tokens.clone(),
                train: config.data.train.clone(),
            });
        }
        Ok(file)
    };
    config.data.mixture.iter().map(open).collect()
}

/// The run's tokenizer, which must be the one that made its token files.
pub(super) fn matching_tokenizer(
    config: &RunConfig,
    train: &TokenFile,
    validation: &TokenFile,
) -> Result<Tokenizer, FitError> {
    let data = &config.data;
    validation.check_preparation(train)?;
    let unusable = |reason: String| FitError::Tokenizer {
        path: data.tokenizer.clone(),
        reason,
    };
    let json = fs::read(&data.tokenizer).map_err(|error| unusable(error.to_string()))?;
    train.check_tokenizer(&data.tokenizer, &json)?;
    let tokenizer = Tokenizer::from_bytes(&json).map_err(|error| unusable(error.to_string()))?;
    let size = tokenizer.get_vocab_size(true);
    if size != train.vocab_size() {
        return Err(FitError::Vocabulary {
            tokenizer: data.tokenizer.clone(),
            size,
            train: data.train.clone(),
            needed: train.vocab_size(),
        });
    }
    Ok(tokenizer)
}
