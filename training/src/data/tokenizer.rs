//! Makes tokenizers in the Hugging Face format: byte-level BPE (lossless on any UTF-8), or one token for each character.

use std::collections::BTreeSet;

use serde_json::{Value, json};
use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::PostProcessorWrapper;
use tokenizers::{AddedToken, Tokenizer, TokenizerBuilder, TokenizerImpl};

use super::error::DataError;

/// The special token between documents; the first id of every tokenizer trained here.
pub const END_OF_DOCUMENT: &str = "<|endoftext|>";

/// Smallest vocabulary: all bytes and the end of a document.
pub const SMALLEST_VOCABULARY: usize = 257;

/// Learns `vocab_size` tokens (end of document included) from `documents`.
pub fn train(documents: &[String], vocab_size: usize) -> Result<Tokenizer, DataError> {
    if vocab_size < SMALLEST_VOCABULARY {
        return Err(DataError::Vocabulary {
            size: vocab_size,
            least: SMALLEST_VOCABULARY,
        });
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
        .map_err(DataError::tokenizer)?;
    tokenizer
        .train(&mut trainer, documents.iter().map(String::as_str))
        .map_err(DataError::tokenizer)?;
    let json = tokenizer.to_string(true).map_err(DataError::tokenizer)?;
    Tokenizer::from_bytes(json.as_bytes()).map_err(DataError::tokenizer)
}

/// What a character becomes that [`of_characters`] has not seen.
const UNKNOWN: &str = "<unk>";

/// One token for each character of `documents`, after the end of a document and a token for all other characters: for
/// text8 and its like, whose bits per byte are then bits per character.
pub fn of_characters(documents: &[String]) -> Result<Tokenizer, DataError> {
    let characters: BTreeSet<char> = documents.iter().flat_map(|document| document.chars()).collect();
    let characters = characters.into_iter().map(String::from);
    let vocabulary = [END_OF_DOCUMENT.to_owned(), UNKNOWN.to_owned()]
        .into_iter()
        .chain(characters);
    let vocabulary: serde_json::Map<String, Value> = vocabulary.zip((0_u32..).map(Value::from)).collect();
    let json = json!({
        "version": "1.0",
        "added_tokens": [{
            "id": 0,
            "content": END_OF_DOCUMENT,
            "single_word": false,
            "lstrip": false,
            "rstrip": false,
            "normalized": false,
            "special": true,
        }],
        "decoder": { "type": "Fuse" },
        // Without merges, what is left is characters.
        "model": { "type": "BPE", "unk_token": UNKNOWN, "fuse_unk": false, "vocab": vocabulary, "merges": [] },
    });
    Tokenizer::from_bytes(json.to_string()).map_err(DataError::tokenizer)
}

/// Bytes of text that a token stands for, which `tokenizer` writes as `text`.
pub fn bytes_of(tokenizer: &Tokenizer, text: &str) -> usize {
    match tokenizer.get_decoder() {
        // Each character of a byte-level token stands for one byte. Decoded text would not do: where a cut goes
        // through a character, it has a replacement of another length.
        Some(DecoderWrapper::ByteLevel(_)) => text.chars().count(),
        _ => text.len(),
    }
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
    fn characters_are_tokens_and_others_are_unknown() {
        let tokenizer = of_characters(&["caf\u{e9} ".to_owned(), "at\n".to_owned()]).unwrap();
        assert_eq!(tokenizer.get_vocab_size(true), 2 + 7);
        assert_eq!(tokenizer.token_to_id(END_OF_DOCUMENT), Some(0));
        let ids = |text: &str| tokenizer.encode(text, false).unwrap().get_ids().to_vec();
        let text = "a caf\u{e9}\n at";
        assert_eq!(ids(text).len(), text.chars().count());
        assert_eq!(tokenizer.decode(&ids(text), false).unwrap(), text);
        assert_eq!(ids("xa"), [1, tokenizer.token_to_id("a").unwrap()]);
        assert_eq!(bytes_of(&tokenizer, "\u{e9}"), 2);
        assert_eq!(bytes_of(&small(), "\u{120}the"), 4);
        let read = Tokenizer::from_bytes(tokenizer.to_string(true).unwrap()).unwrap();
        assert_eq!(read.encode(text, false).unwrap().get_ids(), ids(text));
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
