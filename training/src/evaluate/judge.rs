//! A language model that reads samples: SmolLM2 of any size as a GGUF file, on the CPU.
//!
//! A text costs `-ln p(token_1 ... token_n | beginning of text)` under the judge: the beginning-of-text token
//! that the file names is put before it and costs nothing, every token after that counts, and no end is
//! asked for. Samples begin in the middle of a sentence, which makes their first tokens dear; so do the
//! sequences of held-out text that they are compared with. Text beyond the judge's context is not read.
//!
//! What the number means, and why it means little without the entropy beside it, is told in
//! [`crate::evaluate::quality`].

use std::fs::File;
use std::io::{BufReader, Cursor, Read, Seek};
use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Content};
use candle_core::quantized::tokenizer::TokenizerFromGguf;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use candle_transformers::models::quantized_llama::{MAX_SEQ_LEN, ModelWeights};
use thiserror::Error;
use tokenizers::Tokenizer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;

use crate::evaluate::quality::Verdict;

/// The only way of splitting text into words that this judge was checked with.
const WORDS: &str = "smollm";

/// Why a file does not judge.
#[derive(Debug, Error)]
#[error("the judge {}", path.display())]
pub struct JudgeError {
    /// The file.
    path: PathBuf,
    source: Problem,
}

/// What is the matter with a judge.
#[derive(Debug, Error)]
enum Problem {
    #[error(transparent)]
    Read(#[from] std::io::Error),
    #[error("cannot be read as GGUF")]
    Content(#[source] candle_core::Error),
    #[error("has no field {0:?}")]
    NoField(&'static str),
    #[error("is a network of architecture {0:?}, must be \"llama\"")]
    Architecture(String),
    #[error("splits words as {0:?} (tokenizer.ggml.pre), must be {WORDS:?}")]
    Words(String),
    #[error("holds no network that can be loaded")]
    Model(#[source] candle_core::Error),
    #[error("holds no tokenizer that can be read")]
    Tokenizer(#[source] candle_core::Error),
    #[error("cannot encode a text: {0}")]
    Encode(tokenizers::Error),
    #[error(transparent)]
    Network(#[from] candle_core::Error),
    #[error("its tokenizer has token {token}, its network {tokens}")]
    Token { token: u32, tokens: usize },
    #[error("its network gave numbers that are not finite")]
    NotFinite,
}

/// A loaded judge.
#[derive(Debug)]
pub struct Judge {
    path: PathBuf,
    model: ModelWeights,
    tokenizer: Tokenizer,
    beginning: u32,
    context: usize,
}

impl Judge {
    /// Loads a GGUF file of the llama architecture with SmolLM2's tokenizer.
    pub fn load(path: &Path) -> Result<Self, JudgeError> {
        Self::parse(path).map_err(|source| JudgeError {
            path: path.to_owned(),
            source,
        })
    }

    fn parse(path: &Path) -> Result<Self, Problem> {
        let mut file = BufReader::new(File::open(path)?);
        let content = Content::read(&mut file).map_err(Problem::Content)?;
        let field = |name: &'static str| content.metadata.get(name).ok_or(Problem::NoField(name));
        let architecture = field("general.architecture")?.to_string()?;
        if architecture != "llama" {
            return Err(Problem::Architecture(architecture.clone()));
        }
        let context = field("llama.context_length")?.to_u32()? as usize;
        let beginning = field("tokenizer.ggml.bos_token_id")?.to_u32()?;
        let words = field("tokenizer.ggml.pre")?.to_string()?;
        if words != WORDS {
            return Err(Problem::Words(words.clone()));
        }
        let tokenizer = tokenizer(&content)?;
        let model = model(&content, &mut file).map_err(Problem::Model)?;
        Ok(Self {
            path: path.to_owned(),
            model,
            tokenizer,
            beginning,
            context: context.min(MAX_SEQ_LEN),
        })
    }

    /// Reads `text` as far as the context goes.
    pub fn read(&mut self, text: &str) -> Result<Verdict, JudgeError> {
        self.score(text).map_err(|source| JudgeError {
            path: self.path.clone(),
            source,
        })
    }

    fn score(&mut self, text: &str) -> Result<Verdict, Problem> {
        let encoding = self.tokenizer.encode_fast(text, false).map_err(Problem::Encode)?;
        let mut verdict = Verdict {
            nats: 0.0,
            bytes: 0,
            tokens: 0,
        };
        let mut before = self.beginning;
        // A token at a time: the network gives the last row alone.
        for (position, &token) in encoding.get_ids().iter().take(self.context).enumerate() {
            let input = Tensor::new(&[[before]], &Device::Cpu)?;
            let logits = self.model.forward(&input, position)?.flatten_all()?.to_vec1()?;
            verdict.nats += nats(&logits, token)?;
            verdict.tokens += 1;
            // Byte-level tokens are written with a character for each byte.
            verdict.bytes += self
                .tokenizer
                .id_to_token(token)
                .map_or(0, |name| name.chars().count());
            before = token;
        }
        self.model.clear_kv_cache();
        Ok(verdict)
    }
}

/// The network, with 4-bit matrices written as 8-bit ones: candle multiplies those several times faster,
/// and what 4 bits express hardly changes in 8.
fn model<R: Read + Seek>(content: &Content, file: &mut R) -> candle_core::Result<ModelWeights> {
    let device = &Device::Cpu;
    let mut tensors: Vec<(&str, QTensor)> = Vec::new();
    for name in content.tensor_infos.keys() {
        let mut tensor = content.tensor(file, name, device)?;
        if matches!(tensor.dtype(), GgmlDType::Q4_0 | GgmlDType::Q4_1) {
            tensor = QTensor::quantize(&tensor.dequantize(device)?, GgmlDType::Q8_0)?;
        }
        tensors.push((name, tensor));
    }
    let metadata: Vec<_> = content
        .metadata
        .iter()
        .filter(|(name, _)| !name.starts_with("tokenizer."))
        .map(|(name, value)| (name.as_str(), value))
        .collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let mut rewritten = Cursor::new(Vec::new());
    gguf_file::write(&mut rewritten, &metadata, &tensors)?;
    drop(tensors);
    rewritten.set_position(0);
    let content = Content::read(&mut rewritten)?;
    ModelWeights::from_gguf(content, &mut rewritten, device)
}

/// The tokenizer of SmolLM2: digits stand alone, no space is put before the text, and text that looks
/// like a special token is text.
fn tokenizer(content: &Content) -> Result<Tokenizer, Problem> {
    let mut tokenizer = Tokenizer::from_gguf(content).map_err(Problem::Tokenizer)?;
    let bytes = ByteLevel::default().add_prefix_space(false);
    tokenizer.with_pre_tokenizer(Some(Sequence::new(vec![Digits::new(true).into(), bytes.into()])));
    tokenizer.set_encode_special_tokens(true);
    Ok(tokenizer)
}

/// `-ln p` of `token` under a row of logits.
fn nats(logits: &[f32], token: u32) -> Result<f64, Problem> {
    let tokens = logits.len();
    let logit = logits
        .get(token as usize)
        .ok_or(Problem::Token { token, tokens })?;
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - top).exp()).sum();
    let nats = sum.ln() + f64::from(top) - f64::from(*logit);
    if nats.is_finite() {
        Ok(nats)
    } else {
        Err(Problem::NotFinite)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::evaluate::quality::bits_per_byte;

    const ENGLISH: &str = "The sun rises in the east and sets in the west. Every morning the children walk to \
        school along the river, and in the evening they come home again to have dinner with their parents.";
    const SHUFFLED: &str = "in along parents east the and every dinner rises to walk again. have school their \
        home morning west with the sun, they the the the river children and the sets come evening. to in in";
    const NOISE: &str =
        "xq7 Vz!p kR0 #wjd fQ bn;2 Lx yH9 zzT pq& oGv mJ1 uXc %dr 8sK iWb eN4 hY? tfA 6lP cMq";

    #[test]
    fn a_token_costs_what_the_softmax_says() {
        // Weights 1, 2 and 5.
        let logits = [1.0_f32, 2.0, 5.0].map(|weight| weight.ln() + 90.0);
        assert!((nats(&logits, 1).unwrap() - 4.0_f64.ln()).abs() < 1e-5);
        assert!(nats(&logits, 3).is_err());
        assert!(nats(&[f32::NAN, 0.0], 1).is_err());
    }

    #[test]
    fn what_is_no_judge_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("not.gguf");
        for bytes in [None, Some(&b""[..]), Some(b"no network at all")] {
            if let Some(bytes) = bytes {
                std::fs::write(&path, bytes).unwrap();
            }
            let error = format!("{:#}", Judge::load(&path).unwrap_err());
            assert!(error.contains("not.gguf"), "{error}");
        }
    }

    #[test]
    #[ignore = "needs the model: `make judge`, then TEST_JUDGE=.tools/judge/SmolLM2-135M-Instruct.Q4_1.gguf"]
    fn english_is_cheaper_than_shuffled_words_and_those_than_noise() {
        let path = std::env::var_os("TEST_JUDGE").unwrap();
        let mut judge = Judge::load(Path::new(&path)).unwrap();
        let mut bits = |text: &str| {
            let verdict = judge.read(text).unwrap();
            assert_eq!(verdict.bytes, text.len(), "every byte counts once");
            bits_per_byte(&[verdict]).unwrap().mean
        };
        let [english, shuffled, noise] = [ENGLISH, SHUFFLED, NOISE].map(&mut bits);
        assert!(english < 1.0, "{english}");
        assert!(shuffled > english + 0.8, "{shuffled}");
        assert!(noise > shuffled + 1.0, "{noise}");
        assert_eq!(bits(ENGLISH), english, "nothing is remembered from text to text");
        // What a tokenizer for chats would swallow is text like any other, and so is what is not ASCII.
        bits("<|im_start|> 12345 naïve \u{fffd} 日本");
        assert_eq!(
            judge.read("").unwrap(),
            Verdict {
                nats: 0.0,
                bytes: 0,
                tokens: 0
            }
        );
        judge.context = 3;
        assert!(
            judge.read(ENGLISH).unwrap().bytes < 20,
            "the context bounds what is read"
        );
    }
}
