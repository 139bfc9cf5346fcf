//! Trains a byte-level BPE tokenizer (lossless on any UTF-8) in the Hugging Face format.

use anyhow::anyhow;
use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::PostProcessorWrapper;
use tokenizers::{AddedToken, Tokenizer, TokenizerBuilder, TokenizerImpl};

/// The special token between documents; the first id of every tokenizer trained here.
pub const END_OF_DOCUMENT: &str = "<|endoftext|>";

/// Smallest vocabulary: all bytes and the end of a document.
pub const SMALLEST_VOCABULARY: usize = 257;

/// Learns `vocab_size` tokens (end of document included) from `documents`.
pub fn train(documents: &[String], vocab_size: usize) -> anyhow::Result<Tokenizer> {
    if vocab_size < SMALLEST_VOCABULARY {
        return Err(anyhow!(
            "vocabulary size is {vocab_size}, at least {SMALLEST_VOCABULARY} (all bytes) are needed"
        ));
    }
    let mut trainer = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .min_frequency(2)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(vec![AddedToken::from(END_OF_DOCUMENT, true)])
        .build();
    let bytes = ByteLevel::default().add_prefix_space(false);
    let mut tokenizer: TokenizerImpl<
        BPE,
        NormalizerWrapper,
        ByteLevel,
        PostProcessorWrapper,
        ByteLevelDecoder,
    > = TokenizerBuilder::default()
        .with_model(BPE::default())
        .with_normalizer(None)
        .with_pre_tokenizer(Some(bytes))
        .with_post_processor(None)
        .with_decoder(Some(ByteLevelDecoder::default()))
        .build()
        .map_err(|e| anyhow!("tokenizer: {e}"))?;
    tokenizer
        .train(&mut trainer, documents.iter().map(String::as_str))
        .map_err(|e| anyhow!("tokenizer: {e}"))?;
    let json = tokenizer.to_string(true).map_err(|e| anyhow!("tokenizer: {e}"))?;
    Tokenizer::from_bytes(json.as_bytes()).map_err(|e| anyhow!("tokenizer: {e}"))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn small() -> Tokenizer {
        train(
            &["the cat sat on the mat, the hat that the cat had ".repeat(20)],
            300,
        )
        .unwrap()
    }

    #[test]
    fn end_of_document_comes_first_and_merges_are_learned() {
        let tokenizer = small();
        assert_eq!(tokenizer.token_to_id(END_OF_DOCUMENT), Some(0));
        assert!(tokenizer.encode("the cat", false).unwrap().len() < 7);
    }

    #[test]
    fn too_small_a_vocabulary_is_named() {
        assert!(train(&[], 100).unwrap_err().to_string().contains("257"));
    }

    proptest! {
        #[test]
        fn any_text_comes_back(text in any::<String>()) {
            let tokenizer = small();
            let tokens = tokenizer.encode(text.as_str(), false).unwrap();
            prop_assert_eq!(tokenizer.decode(tokens.get_ids(), false).unwrap(), text);
        }
    }
}
