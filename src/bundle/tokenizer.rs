//! Text to tokens and back, with whatever tokenizer the bundle holds.

use tokenizers::Tokenizer;

use super::Manifest;
use crate::diffusion::Token;

/// Why text and tokens do not meet.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// Not a tokenizer file, or not one this program can read.
    #[error("cannot be read: {0}")]
    Format(String),
    /// More tokens than the network knows.
    #[error("has {tokens} tokens, the network has room for {room}")]
    Vocabulary {
        /// Tokens in the tokenizer.
        tokens: usize,
        /// States of the network, less the mask.
        room: usize,
    },
    /// The text has something that the vocabulary cannot express.
    #[error("cannot encode the text: {0}")]
    Encode(String),
    /// The tokens are not text.
    #[error("cannot decode the tokens: {0}")]
    Decode(String),
}

/// A bundle's tokenizer.
#[derive(Clone, Debug)]
pub struct TextTokenizer(Box<Tokenizer>);

impl TextTokenizer {
    /// Reads `tokenizer.json` and checks that its vocabulary fits the manifest's.
    pub fn from_json(bytes: &[u8], manifest: &Manifest) -> Result<Self, TokenizerError> {
        let tokenizer = Tokenizer::from_bytes(bytes).map_err(|e| TokenizerError::Format(e.to_string()))?;
        let tokens = tokenizer.get_vocab_size(true);
        let room = manifest.vocab_size - usize::from(manifest.mask_token.is_some());
        if tokens > room {
            return Err(TokenizerError::Vocabulary { tokens, room });
        }
        Ok(Self(Box::new(tokenizer)))
    }

    /// Tokens of `text`, without anything added around it.
    pub fn encode(&self, text: &str) -> Result<Vec<Token>, TokenizerError> {
        let encoding = self
            .0
            .encode_fast(text, false)
            .map_err(|e| TokenizerError::Encode(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Text of `tokens`, special tokens left out. Bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, tokens: &[Token]) -> Result<String, TokenizerError> {
        self.0
            .decode(tokens, true)
            .map_err(|e| TokenizerError::Decode(e.to_string()))
    }
}
