//! Text to tokens, just as `tokenizers` does it, and many times as fast where it can be done word by word.
//!
//! A byte-level BPE tokenizer (GPT-2's, and those trained here) encodes every word by itself. Text has few
//! different words, so that most of them are found in a cache. Other tokenizers get documents as a whole.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use denoised::diffusion::Token;
use regex::Regex;
use tokenizers::{AddedToken, ModelWrapper, PreTokenizerWrapper, Tokenizer};

use super::error::DataError;
use super::words::{pattern, words};

/// Most words in the cache, and most bytes of each: some 50 MB at the worst.
const CACHED_WORDS: usize = 1 << 18;
const CACHED_WORD_BYTES: usize = 48;

/// Longer words are cut here: a tokenizer takes some hundred bytes of memory for each of theirs. Text has no
/// such words, but data has.
const LONGEST_WORD: usize = 256 << 10;

/// A tokenizer, and words that it encoded.
#[derive(Debug)]
pub(super) struct Encoder {
    tokenizer: Tokenizer,
    words: Option<Words>,
    pub(super) vocab_size: usize,
    pub(super) end_of_document: Token,
    /// What characters become that the tokenizer does not know.
    pub(super) unknown: Option<Token>,
    pub(super) sha256: String,
}

#[derive(Debug)]
struct Words {
    pattern: Regex,
    cache: HashMap<Box<str>, Box<[Token]>>,
}

impl Encoder {
    /// The tokenizer.json at `path`, whose token `end` ends documents.
    pub(super) fn open(path: &Path, end: &str) -> Result<Self, DataError> {
        let json = fs::read(path).map_err(DataError::read(path))?;
        Tokenizer::from_bytes(&json)
            .map_err(DataError::tokenizer)
            .and_then(|tokenizer| Self::new(tokenizer, end, denoised::bundle::sha256(&json)))
            .map_err(|error| error.of_tokenizer(path))
    }

    fn new(mut tokenizer: Tokenizer, end: &str, sha256: String) -> Result<Self, DataError> {
        // Both are for batches of sentences; of a document nothing may be lost.
        tokenizer.with_truncation(None).map_err(DataError::tokenizer)?;
        tokenizer.with_padding(None);
        // A document that speaks of the end-of-document token does not end there.
        tokenizer.set_encode_special_tokens(true);
        let end_of_document = tokenizer
            .token_to_id(end)
            .ok_or_else(|| no_such_end(&tokenizer, end))?;
        let unknown = match tokenizer.get_model() {
            ModelWrapper::BPE(model) => model.unk_token.as_deref(),
            ModelWrapper::WordPiece(model) => Some(model.unk_token.as_str()),
            ModelWrapper::WordLevel(model) => Some(model.unk_token.as_str()),
            // Its number is private; this is its name wherever SentencePiece made it.
            ModelWrapper::Unigram(_) => Some("<unk>"),
        };
        Ok(Self {
            unknown: unknown.and_then(|unknown| tokenizer.token_to_id(unknown)),
            words: if is_by_word(&tokenizer) {
                Some(Words {
                    pattern: pattern()?,
                    cache: HashMap::new(),
                })
            } else {
                None
            },
            vocab_size: tokenizer.get_vocab_size(true),
            end_of_document,
            sha256,
            tokenizer,
        })
    }

    /// Adds the tokens of `text` to `tokens`.
    pub(super) fn encode(&mut self, text: &str, tokens: &mut Vec<Token>) -> Result<(), DataError> {
        let Some(Words { pattern, cache }) = &mut self.words else {
            return extend(tokens, &self.tokenizer, text);
        };
        for word in words(pattern, text) {
            if let Some(cached) = cache.get(word) {
                tokens.extend(cached);
                continue;
            }
            if word.len() > CACHED_WORD_BYTES {
                for part in parts(word, LONGEST_WORD) {
                    extend(tokens, &self.tokenizer, part)?;
                }
                continue;
            }
            let before = tokens.len();
            extend(tokens, &self.tokenizer, word)?;
            // Frequent words are back at once.
            if cache.len() == CACHED_WORDS {
                cache.clear();
            }
            cache.insert(word.into(), tokens[before..].into());
        }
        Ok(())
    }
}

/// Says that documents cannot end with `end`, and with what they can.
fn no_such_end(tokenizer: &Tokenizer, end: &str) -> DataError {
    let added: BTreeMap<Token, AddedToken> = tokenizer.get_added_tokens_decoder().into_iter().collect();
    let special = added.into_values().filter(|token| token.special);
    let special: Vec<String> = special.map(|token| token.content).take(20).collect();
    let others = if special.is_empty() {
        "it has no special tokens, but any token will do that text does not need".to_owned()
    } else {
        format!("its special tokens are {}", special.join(" "))
    };
    let end = end.to_owned();
    DataError::NoEnd { end, others }
}

fn extend(tokens: &mut Vec<Token>, tokenizer: &Tokenizer, text: &str) -> Result<(), DataError> {
    let encoding = tokenizer.encode_fast(text, false).map_err(DataError::tokenizer)?;
    tokens.extend(encoding.get_ids());
    Ok(())
}

/// Whether a tokenizer cuts text as [`words`] does and encodes every word by itself, always alike.
fn is_by_word(tokenizer: &Tokenizer) -> bool {
    let bytes = matches!(
        tokenizer.get_pre_tokenizer(),
        Some(PreTokenizerWrapper::ByteLevel(bytes)) if bytes.use_regex && !bytes.add_prefix_space
    );
    let merges =
        matches!(tokenizer.get_model(), ModelWrapper::BPE(model) if model.dropout.is_none_or(|p| p == 0.0));
    // Tokens that are not special are found in text before it is cut.
    let added = tokenizer.get_added_tokens_decoder();
    bytes && merges && tokenizer.get_normalizer().is_none() && added.values().all(|token| token.special)
}

/// `text` in parts of at most `size` bytes, of which there are at least four.
fn parts(text: &str, size: usize) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        let (part, after) = rest.split_at(rest.floor_char_boundary(size));
        rest = after;
        (!part.is_empty()).then_some(part)
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::data::tokenizer::END_OF_DOCUMENT;
    use proptest::prelude::*;
    use std::sync::LazyLock;
    use tokenizers::models::bpe::BPE;
    use tokenizers::normalizers::NFC;
    use tokenizers::{AddedToken, pre_tokenizers};

    static SMALL: LazyLock<Tokenizer> = LazyLock::new(|| {
        let text = "the cat's hat that sat on 1234 mats   said it's\n\nfine, isn't it? \u{e9}t\u{e9}! ";
        crate::data::tokenizer::train(&[text.repeat(20)], 330).unwrap()
    });

    fn encode(encoder: &mut Encoder, text: &str) -> Vec<Token> {
        let mut tokens = Vec::new();
        encoder.encode(text, &mut tokens).unwrap();
        tokens
    }

    fn by_word(tokenizer: &Tokenizer) -> bool {
        Encoder::new(tokenizer.clone(), END_OF_DOCUMENT, String::new())
            .unwrap()
            .words
            .is_some()
    }

    #[test]
    fn ends_of_documents_within_text_are_text() {
        let mut encoder = Encoder::new(SMALL.clone(), END_OF_DOCUMENT, String::new()).unwrap();
        let text = "it ends <|endoftext|> not";
        let tokens = encode(&mut encoder, text);
        assert!(!tokens.contains(&encoder.end_of_document));
        assert_eq!(SMALL.decode(&tokens, false).unwrap(), text);
    }

    #[test]
    fn words_are_cached_for_tokenizers_that_cut_alike() {
        assert!(by_word(&SMALL));
        let mut normalizing = SMALL.clone();
        normalizing.with_normalizer(Some(NFC)).unwrap();
        let mut prefixing = SMALL.clone();
        prefixing.with_pre_tokenizer(Some(pre_tokenizers::byte_level::ByteLevel::default()));
        let mut adding = SMALL.clone();
        adding.add_tokens([AddedToken::from("  ", false)]).unwrap();
        let mut dropping = SMALL.clone();
        let ModelWrapper::BPE(mut model) = dropping.get_model().clone() else {
            unreachable!()
        };
        model.dropout = Some(0.5);
        dropping.with_model(model);
        for other in [normalizing, prefixing, adding, dropping] {
            assert!(!by_word(&other));
        }
    }

    #[test]
    fn truncation_and_padding_are_off() {
        let mut tokenizer = SMALL.clone();
        let truncation = tokenizers::TruncationParams {
            max_length: 2,
            ..Default::default()
        };
        tokenizer.with_truncation(Some(truncation)).unwrap();
        tokenizer.with_padding(Some(tokenizers::PaddingParams {
            strategy: tokenizers::PaddingStrategy::Fixed(100),
            ..Default::default()
        }));
        let mut encoder = Encoder::new(tokenizer, END_OF_DOCUMENT, String::new()).unwrap();
        assert_eq!(
            encode(&mut encoder, "the cat"),
            SMALL.encode("the cat", false).unwrap().get_ids()
        );
    }

    #[test]
    fn words_beyond_all_measure_are_cut_and_nothing_is_lost() {
        let mut encoder = Encoder::new(SMALL.clone(), END_OF_DOCUMENT, String::new()).unwrap();
        let text = "\u{e9}".repeat(LONGEST_WORD);
        assert_eq!(SMALL.decode(&encode(&mut encoder, &text), false).unwrap(), text);
    }

    #[test]
    fn unknown_characters_are_known_as_such() {
        let model = BPE::builder()
            .vocab_and_merges(
                [("<unk>", 0), (END_OF_DOCUMENT, 1), ("a", 2)].map(|(token, id)| (token.to_owned(), id)),
                Vec::new(),
            )
            .unk_token("<unk>".to_owned())
            .build()
            .unwrap();
        let mut encoder = Encoder::new(Tokenizer::new(model), END_OF_DOCUMENT, String::new()).unwrap();
        assert_eq!(encoder.unknown, Some(0));
        assert_eq!(encode(&mut encoder, "ab"), [2, 0]);
    }

    proptest! {
        #[test]
        fn tokens_are_those_of_tokenizers(
            texts in prop::collection::vec("([ \n\u{3000}]{0,3}(the|cat|'s|hat|mats|\u{e9}|[0-9]{1,5}|\\PC)){0,12}[ \n]{0,2}", 1..6)
        ) {
            let mut encoder = Encoder::new(SMALL.clone(), END_OF_DOCUMENT, String::new()).unwrap();
            // Twice: from the tokenizer, then from the cache.
            for text in texts.iter().chain(&texts) {
                let expected = SMALL.encode(text.as_str(), false).unwrap();
                prop_assert_eq!(encode(&mut encoder, text), expected.get_ids());
            }
        }
    }
}
