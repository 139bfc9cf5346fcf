//! Text to tokens and back, with whatever tokenizer the bundle holds.

use std::panic::{AssertUnwindSafe, catch_unwind};

use tokenizers::Tokenizer;

use super::longest_string::longest_string;
use super::{Manifest, brief};
use crate::diffusion::Token;

/// Why text and tokens do not meet.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// Not a tokenizer file, or not one this program can read.
    #[error("cannot be read: {0}")]
    Format(String),
    /// A word that is none.
    #[error("has a string of {bytes} bytes, the limit is {LONGEST_STRING}")]
    Long {
        /// Its bytes.
        bytes: usize,
    },
    /// A token that the network does not know.
    #[error("has the token id {highest}, the network knows ids below {states}")]
    Vocabulary {
        /// Highest id of the tokenizer.
        highest: Token,
        /// States of the network.
        states: usize,
    },
    /// A word of text that is the mask to the network.
    #[error(
        "gives {word:?} the token id {mask}, which is the network's mask: that can be a special token only"
    )]
    Mask {
        /// The word.
        word: String,
        /// The mask.
        mask: Token,
    },
    /// The text has something that the vocabulary cannot express.
    #[error("cannot encode the text: {0}")]
    Encode(String),
    /// The tokens are not text.
    #[error("cannot decode the tokens: {0}")]
    Decode(String),
}

/// Tokens before others that decide how these are written.
const CONTEXT: usize = 4;

/// Bytes of a string in a tokenizer's file, at most. A unigram vocabulary becomes a tree with a level for each byte of
/// its longest word, which is freed by recursion: a thread's stack has room for so many levels.
const LONGEST_STRING: usize = 2048;
/// The one field that is long in sound files: a table of characters, which makes no words.
const LONG_FIELD: &str = "precompiled_charsmap";

/// What `work` gives, or why it gives nothing. The crate panics on some files that are none, and on some texts with
/// them; whoever looks at bundles has others to look at.
fn guarded<T>(work: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(done) => done.map_err(brief),
        Err(_) => Err("the tokenizer panicked".to_owned()),
    }
}

/// A bundle's tokenizer.
#[derive(Clone, Debug)]
pub struct TextTokenizer {
    tokenizer: Box<Tokenizer>,
    /// Bytes of the longest token.
    longest: usize,
}

impl TextTokenizer {
    /// Reads `tokenizer.json` and checks that its vocabulary fits the manifest's.
    pub fn from_json(bytes: &[u8], manifest: &Manifest) -> Result<Self, TokenizerError> {
        let longest = longest_string(bytes, LONG_FIELD).map_err(|e| TokenizerError::Format(brief(e)))?;
        if longest > LONGEST_STRING {
            return Err(TokenizerError::Long { bytes: longest });
        }
        let read = guarded(|| Tokenizer::from_bytes(bytes));
        let mut tokenizer = read.map_err(TokenizerError::Format)?;
        // Made for batches of training: here they would pad prompts and cut them off.
        tokenizer.with_padding(None);
        tokenizer
            .with_truncation(None)
            .map_err(|e| TokenizerError::Format(brief(e)))?;
        let states = manifest.vocab_size;
        let vocabulary = tokenizer.get_vocab(true);
        // Ids can have gaps, so that their number says nothing.
        if let Some(&highest) = vocabulary.values().max().filter(|id| **id as usize >= states) {
            return Err(TokenizerError::Vocabulary { highest, states });
        }
        let added = tokenizer.get_added_tokens_decoder();
        if let Some(mask) = manifest.mask_token
            && !added.get(&mask).is_some_and(|token| token.special)
            && let Some((word, _)) = vocabulary.iter().find(|(_, id)| **id == mask)
        {
            let word = brief(word);
            return Err(TokenizerError::Mask { word, mask });
        }
        let longest = vocabulary.keys().map(String::len).max().unwrap_or(0);
        Ok(Self {
            tokenizer: Box::new(tokenizer),
            longest,
        })
    }

    /// Bytes of text beyond which it takes more than `tokens` tokens, whatever it says; generous, since
    /// tokenizers may drop some of it.
    pub fn max_bytes(&self, tokens: usize) -> usize {
        tokens.saturating_mul(self.longest).saturating_mul(4)
    }

    /// Tokens of `text`, without anything added around it.
    pub fn encode(&self, text: &str) -> Result<Vec<Token>, TokenizerError> {
        let encoding = guarded(|| self.tokenizer.encode_fast(text, false)).map_err(TokenizerError::Encode)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of `tokens`, special tokens left out. Bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, tokens: &[Token]) -> Result<String, TokenizerError> {
        guarded(|| self.tokenizer.decode(tokens, true)).map_err(TokenizerError::Decode)
    }

    /// The end of `before`, which alone decides how what follows is written.
    pub fn context(before: &[Token]) -> &[Token] {
        &before[before.len().saturating_sub(CONTEXT)..]
    }

    /// Text of `tokens` where they follow `before`: many tokenizers write the space between words at the
    /// beginning of a token and leave it out at the beginning of a text.
    pub fn decode_after(&self, before: &[Token], tokens: &[Token]) -> Result<String, TokenizerError> {
        let before = Self::context(before);
        if before.is_empty() {
            return self.decode(tokens);
        }
        let whole = self.decode(&[before, tokens].concat())?;
        match whole.strip_prefix(self.decode(before)?.as_str()) {
            Some(text) => Ok(text.to_owned()),
            // A character whose bytes lie on both sides.
            None => self.decode(tokens),
        }
    }

    /// Text that each of `tokens` adds to those before it; nothing for special tokens and for those that are `skipped`.
    pub fn pieces(&self, tokens: &[Token], skipped: Option<Token>) -> Result<Vec<String>, TokenizerError> {
        let mut before = Vec::with_capacity(tokens.len());
        let mut piece = |&token: &Token| {
            if Some(token) == skipped {
                return Ok(String::new());
            }
            let piece = self.decode_after(&before, &[token])?;
            before.push(token);
            Ok(piece)
        };
        tokens.iter().map(&mut piece).collect()
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
pub(crate) mod tests {
    use super::super::manifest::tests::tiny;
    use super::*;

    /// A tokenizer of whole words that writes spaces at the beginning of tokens, and asks for padding and
    /// truncation, as files of training do.
    pub(crate) fn words(vocabulary: &[(&str, Token)]) -> serde_json::Value {
        let metaspace = serde_json::json!({
            "type": "Metaspace", "replacement": "\u{2581}", "prepend_scheme": "always", "split": true,
        });
        let vocabulary: serde_json::Map<_, _> = vocabulary
            .iter()
            .map(|(word, id)| ((*word).to_owned(), (*id).into()))
            .collect();
        serde_json::json!({
            "version": "1.0",
            "truncation": {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0},
            "padding": {
                "strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": null,
                "pad_id": 0, "pad_type_id": 0, "pad_token": "\u{2581}the",
            },
            "added_tokens": [],
            "normalizer": null,
            "pre_tokenizer": metaspace,
            "post_processor": null,
            "decoder": metaspace,
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
        })
    }

    pub(crate) fn of(vocabulary: &[(&str, Token)]) -> Result<TextTokenizer, TokenizerError> {
        TextTokenizer::from_json(words(vocabulary).to_string().as_bytes(), &tiny())
    }

    pub(crate) const SEA: [(&str, Token); 4] = [
        ("\u{2581}the", 0),
        ("\u{2581}sea", 1),
        ("\u{2581}was", 2),
        ("[UNK]", 3),
    ];

    #[test]
    fn prompts_are_neither_padded_nor_cut() {
        assert_eq!(of(&SEA).unwrap().encode("the sea was").unwrap(), [0, 1, 2]);
    }

    #[test]
    fn words_keep_their_space_where_something_stands_before_them() {
        let tokenizer = of(&SEA).unwrap();
        assert_eq!(tokenizer.decode(&[1, 2]).unwrap(), "sea was");
        assert_eq!(tokenizer.decode_after(&[0], &[1, 2]).unwrap(), " sea was");
        assert_eq!(tokenizer.decode_after(&[], &[1, 2]).unwrap(), "sea was");
        assert_eq!(tokenizer.pieces(&[1, 2], None).unwrap(), ["sea", " was"]);
    }

    /// As GPT-2 has it: a space is a letter of the token that it stands before, and tokens are bytes.
    #[test]
    fn byte_level_tokenizers_give_back_spaces_and_characters() {
        let byte_level = serde_json::json!({
            "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true,
        });
        let mut file = words(&[
            ("the", 0),
            ("\u{120}sea", 1),
            ("\u{c3}", 2),
            ("\u{a9}", 3),
            ("[UNK]", 4),
        ]);
        file["pre_tokenizer"] = byte_level.clone();
        file["decoder"] = byte_level;
        let tokenizer = TextTokenizer::from_json(file.to_string().as_bytes(), &tiny()).unwrap();
        assert_eq!(tokenizer.encode("the sea").unwrap(), [0, 1]);
        assert_eq!(tokenizer.decode(&[0, 1]).unwrap(), "the sea");
        assert_eq!(tokenizer.decode(&[1]).unwrap(), " sea", "it is the token's own");
        assert_eq!(tokenizer.decode_after(&[0], &[1, 0]).unwrap(), " seathe");
        let pieces = tokenizer.pieces(&[0, 8, 1, 1, 2, 3], Some(8)).unwrap();
        assert_eq!(pieces, ["the", "", " sea", " sea", "\u{fffd}", "\u{fffd}"]);
        // The two bytes of one character, together and on both sides of a seam.
        assert_eq!(tokenizer.decode_after(&[0], &[2, 3]).unwrap(), "\u{e9}");
        assert_eq!(tokenizer.decode_after(&[0, 2], &[3, 1]).unwrap(), "\u{fffd} sea");
    }

    /// A longer one is freed by a recursion that ends the process. In debug builds frames are largest, and this
    /// thread's stack is as small as that of those that serve.
    #[test]
    fn the_longest_words_of_a_unigram_vocabulary_fit_the_stack() {
        let read = |bytes: usize| {
            let mut file = words(&SEA);
            let word = "a".repeat(bytes);
            file["model"] =
                serde_json::json!({"type": "Unigram", "vocab": [[word, -1.0], ["[UNK]", -9.0]], "unk_id": 1});
            let file = file.to_string();
            let read = move || TextTokenizer::from_json(file.as_bytes(), &tiny()).map(drop);
            let thread = std::thread::Builder::new().stack_size(2 << 20).spawn(read);
            thread.unwrap().join().unwrap()
        };
        read(LONGEST_STRING).unwrap();
        for bytes in [LONGEST_STRING + 1, 1 << 20] {
            let refused = read(bytes).unwrap_err();
            assert!(
                matches!(refused, TokenizerError::Long { bytes: b } if b == bytes),
                "{refused}"
            );
        }
    }

    #[test]
    fn ids_beyond_the_network_are_refused_whatever_their_number() {
        // Nine states, of which the last is the mask.
        assert!(of(&[("\u{2581}the", 7), ("[UNK]", 3)]).is_ok());
        for id in [9, 1000] {
            let refused = of(&[("\u{2581}the", id), ("[UNK]", 3)]).unwrap_err();
            assert!(
                matches!(refused, TokenizerError::Vocabulary { highest, states: 9 } if highest == id),
                "{refused}"
            );
        }
    }

    #[test]
    fn the_mask_is_a_special_token_or_none() {
        let refused = of(&[("\u{2581}the", 8), ("[UNK]", 3)]).unwrap_err();
        assert!(
            matches!(refused, TokenizerError::Mask { mask: 8, .. }),
            "{refused}"
        );
        let mut file = words(&SEA);
        file["added_tokens"] = serde_json::json!([{
            "id": 8, "content": "[MASK]", "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true,
        }]);
        file["model"]["vocab"]["[MASK]"] = 8.into();
        let tokenizer = TextTokenizer::from_json(file.to_string().as_bytes(), &tiny()).unwrap();
        // Text can say it: whoever clamps text must look.
        assert_eq!(tokenizer.encode("the[MASK]").unwrap(), [0, 8]);
        assert_eq!(tokenizer.decode(&[0, 8, 1]).unwrap(), "the sea");
    }

    #[test]
    fn what_fits_is_within_the_bytes() {
        let tokenizer = of(&SEA).unwrap();
        let text = ["the"; 100].join(" ");
        assert_eq!(tokenizer.encode(&text).unwrap().len(), 100);
        assert!(text.len() <= tokenizer.max_bytes(100));
        assert!(tokenizer.max_bytes(100) < 1 << 12);
    }
}
