//! What `/v1/completions` may be asked.

use std::collections::HashMap;

use serde::Deserialize;
use serde_json::Value;
use tonic::Status;

use crate::config::LimitsConfig;
use crate::models::ServedModel;
use crate::proto::v1;
use crate::server::deadline;
use crate::server::request::{before_gap, drawn_seed, encode_within};
use crate::server::sampler;
use crate::server::status::FieldError;
use crate::server::template::{Piece, Template};

/// Positions of a gap before a suffix where none are asked for, as in OpenAI's API.
const DEFAULT_GAP: usize = 16;
/// Texts that may end a completion, as in OpenAI's API.
const MAX_STOPS: usize = 4;
/// Bytes of one of them.
const MAX_STOP_BYTES: usize = 256;
/// Characters of a value that are told to whoever sent it.
const MAX_TOLD: usize = 64;

/// A request as it comes.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    model: Option<String>,
    prompt: Option<OneOrMany>,
    suffix: Option<String>,
    max_tokens: Option<u32>,
    temperature: Option<f64>,
    top_p: Option<f64>,
    n: Option<u32>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    logprobs: Option<u32>,
    echo: Option<bool>,
    stop: Option<OneOrMany>,
    seed: Option<u64>,
    /// Whom the request is for: the log knows callers by their tokens.
    #[serde(rename = "user")]
    _user: Option<String>,
    // Of others only the values that change nothing.
    best_of: Option<u32>,
    presence_penalty: Option<f64>,
    frequency_penalty: Option<f64>,
    logit_bias: Option<HashMap<String, f64>>,
    // Our own.
    steps: Option<u32>,
    sampler: Option<String>,
    top_k: Option<u32>,
    deadline_ms: Option<u64>,
    finish_early: Option<bool>,
    frames: Option<bool>,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
    Other(Value),
}

impl OneOrMany {
    fn texts(self, field: &str) -> Result<Vec<String>, FieldError> {
        match self {
            Self::One(text) => Ok(vec![text]),
            Self::Many(texts) => Ok(texts),
            Self::Other(other) => {
                let told: String = other.to_string().chars().take(MAX_TOLD).collect();
                let problem = "must be a text or a list of texts; tokens are for Infill (denoised.v1)";
                Err(FieldError::new(field, format!("is {told}, {problem}")))
            }
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct StreamOptions {
    include_usage: Option<bool>,
    /// Of no use here: texts do not tell their lengths to listeners more than they do anyway.
    #[serde(rename = "include_obfuscation")]
    _include_obfuscation: Option<bool>,
}

/// A request that can be answered.
#[derive(Clone, Debug)]
pub(super) struct Completion {
    pub(super) model: String,
    pub(super) prompts: Vec<String>,
    pub(super) suffix: Option<String>,
    pub(super) max_tokens: Option<u32>,
    pub(super) sampling: v1::Sampling,
    /// The seed of each prompt's request.
    pub(super) seed: u64,
    /// Choices of each prompt.
    pub(super) samples: u32,
    pub(super) deadline: Option<v1::Deadline>,
    pub(super) stops: Vec<String>,
    pub(super) echo: bool,
    pub(super) told: Told,
}

/// How a completion is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Told {
    /// At once.
    Whole {
        /// With the log-probabilities of the tokens.
        logprobs: bool,
    },
    /// As it comes about.
    Streamed {
        /// With the numbers of tokens at the end.
        include_usage: bool,
        /// With every state of the canvas.
        frames: bool,
    },
}

impl Completion {
    /// Reads `body`, as far as that needs no model.
    pub(super) fn read(body: &[u8], limits: &LimitsConfig) -> Result<Self, FieldError> {
        let asked: Asked =
            serde_json::from_slice(body).map_err(|error| FieldError::new("body", error.to_string()))?;
        let refuse = |field: &str, problem: &str| Err(FieldError::new(field, problem));
        let samples = asked.n.unwrap_or(1);
        if samples == 0 {
            return refuse("n", "is 0, must be at least 1");
        }
        if asked.best_of.is_some_and(|best| best != samples) {
            return refuse("best_of", "must be absent or n: all that is drawn is given");
        }
        if asked.presence_penalty.is_some_and(|penalty| penalty != 0.0) {
            return refuse(
                "presence_penalty",
                "must be 0: text is not drawn from left to right",
            );
        }
        if asked.frequency_penalty.is_some_and(|penalty| penalty != 0.0) {
            return refuse(
                "frequency_penalty",
                "must be 0: text is not drawn from left to right",
            );
        }
        if asked.logit_bias.is_some_and(|bias| !bias.is_empty()) {
            return refuse(
                "logit_bias",
                "must be empty; sets of allowed tokens are for Infill (denoised.v1)",
            );
        }
        let streams = asked.stream.unwrap_or(false);
        if asked.logprobs.is_some_and(|alternatives| alternatives > 0) {
            return refuse(
                "logprobs",
                "must be 0: only the probabilities of the tokens that were drawn are known",
            );
        }
        if asked.logprobs.is_some() && streams {
            return refuse(
                "logprobs",
                "must be absent with stream: they are known when the text is whole",
            );
        }
        if asked.stream_options.is_some() && !streams {
            return refuse("stream_options", "must be absent without stream");
        }
        if asked.frames == Some(true) && !streams {
            return refuse("frames", "needs stream");
        }
        if asked.echo == Some(true) && asked.suffix.is_some() {
            return refuse("echo", "must be false beside suffix");
        }
        let prompts = match asked.prompt {
            Some(prompts) => prompts.texts("prompt")?,
            None => vec![String::new()],
        };
        let most = limits.max_samples as usize;
        if prompts.is_empty() || prompts.len().saturating_mul(samples as usize) > most {
            let problem = format!(
                "has {} texts, n is {samples}: there must be 1 to {most} choices in all",
                prompts.len()
            );
            return Err(FieldError::new("prompt", problem));
        }
        let stops = asked.stop.map_or(Ok(Vec::new()), |stop| stop.texts("stop"))?;
        if stops.len() > MAX_STOPS {
            return Err(FieldError::new(
                "stop",
                format!("has {} texts, at most {MAX_STOPS} are allowed", stops.len()),
            ));
        }
        if stops
            .iter()
            .any(|stop| stop.is_empty() || stop.len() > MAX_STOP_BYTES)
        {
            return Err(FieldError::new(
                "stop",
                format!("must be of texts of 1 to {MAX_STOP_BYTES} bytes"),
            ));
        }
        let seed = asked.seed.unwrap_or_else(drawn_seed);
        let deadline = deadline::asked(asked.deadline_ms, asked.finish_early == Some(true));
        Ok(Self {
            model: asked.model.unwrap_or_default(),
            prompts,
            suffix: asked.suffix,
            max_tokens: asked.max_tokens,
            sampling: v1::Sampling {
                sampler: asked
                    .sampler
                    .map(|asked| sampler::named("sampler", &asked))
                    .transpose()?,
                steps: asked.steps,
                seed: Some(seed),
                temperature: asked.temperature,
                top_k: asked.top_k,
                top_p: asked.top_p,
                num_samples: Some(samples),
                start_time: None,
            },
            seed,
            samples,
            deadline,
            stops,
            echo: asked.echo.unwrap_or(false),
            told: if streams {
                Told::Streamed {
                    include_usage: asked
                        .stream_options
                        .is_some_and(|options| options.include_usage == Some(true)),
                    frames: asked.frames.unwrap_or(false),
                }
            } else {
                Told::Whole {
                    logprobs: asked.logprobs.is_some(),
                }
            },
        })
    }

    /// The template of the completion of `prompt`.
    pub(super) fn template(
        &self,
        prompt: &str,
        model: &ServedModel,
        limits: &LimitsConfig,
    ) -> Result<Template, Status> {
        let before = if prompt.is_empty() {
            Piece::Tokens(Vec::new())
        } else {
            let tokens = encode_within("prompt", prompt, model, limits)?;
            before_gap("prompt", tokens, prompt.to_owned(), model)?
        };
        let after = match &self.suffix {
            Some(suffix) => {
                let tokens = encode_within("suffix", suffix, model, limits)?;
                Piece::Text(suffix.clone(), tokens)
            }
            None => Piece::Tokens(Vec::new()),
        };
        let max = model.manifest().max_length;
        let taken = before.len() + after.len();
        let left = max.saturating_sub(taken);
        let gap = match self.max_tokens {
            Some(asked) => asked as usize,
            None if self.suffix.is_some() => DEFAULT_GAP.min(left),
            None => {
                let own = model.manifest().defaults.and_then(|defaults| defaults.length);
                // A prompt that leaves no room in the default gets the whole canvas.
                let length = own.filter(|own| *own > taken).unwrap_or(max);
                length.saturating_sub(taken)
            }
        };
        if gap == 0 || gap > left {
            let problem = format!(
                "is {gap}, must be 1 to {left}: prompt and suffix take {taken} of the {max} positions of a canvas"
            );
            return Err(FieldError::new("max_tokens", problem).into());
        }
        Ok(Template::new([before, Piece::Gap(gap, None), after]))
    }
}
