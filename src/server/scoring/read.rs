//! Requests to score, checked once and turned into domain types.

use std::collections::HashMap;

use tonic::Status;

use super::super::request::{encode, tokens, without_space};
use super::super::status::FieldError;
use super::MIN_DRAWS;
use crate::config::LimitsConfig;
use crate::diffusion::likelihood::{Likelihood, Order};
use crate::diffusion::{GraphKind, Token};
use crate::engine::TextToScore;
use crate::models::ServedModel;
use crate::proto::v1;
use crate::proto::v1::text_or_tokens::Content;

/// A text to score, as the sequences that it is cut into.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Document {
    pub(super) sequences: Vec<TextToScore>,
    /// Bytes that are scored, where all of that is text.
    pub(super) bytes: Option<u64>,
}

/// Checks what is asked about a text.
pub(super) fn likelihood(
    asked: Option<v1::Likelihood>,
    default: Likelihood,
    graph: GraphKind,
    limits: &LimitsConfig,
) -> Result<Likelihood, FieldError> {
    use v1::likelihood::Likelihood as Asked;
    match asked.and_then(|asked| asked.likelihood) {
        None => Ok(default),
        Some(Asked::Bound(v1::Bound { draws: None })) => Ok(super::default_bound(limits)),
        Some(Asked::Bound(v1::Bound { draws: Some(draws) })) => {
            if (MIN_DRAWS..=limits.max_steps).contains(&draws) {
                return Ok(Likelihood::Bound { draws });
            }
            let problem = format!("is {draws}, must be {MIN_DRAWS} to {}", limits.max_steps);
            Err(FieldError::new("likelihood.bound.draws", problem))
        }
        Some(Asked::Exact(v1::Exact { order })) => {
            if graph == GraphKind::Uniform {
                let problem = "is for absorbing graphs; this model's is uniform, which takes bound";
                return Err(FieldError::new("likelihood.exact", problem));
            }
            match v1::Order::try_from(order) {
                Ok(v1::Order::Unspecified | v1::Order::LeftToRight) => {
                    Ok(Likelihood::Exact(Order::LeftToRight))
                }
                Ok(v1::Order::SurestFirst) => Ok(Likelihood::Exact(Order::SurestFirst)),
                Err(_) => {
                    let problem = format!("{order} is no order this server knows");
                    Err(FieldError::new("likelihood.exact.order", problem))
                }
            }
        }
    }
}

/// What was asked, as a request may ask for it.
pub(super) fn told(likelihood: Likelihood) -> v1::Likelihood {
    use v1::likelihood::Likelihood as Told;
    v1::Likelihood {
        likelihood: Some(match likelihood {
            Likelihood::Bound { draws } => Told::Bound(v1::Bound { draws: Some(draws) }),
            Likelihood::Exact(order) => Told::Exact(v1::Exact {
                order: match order {
                    Order::LeftToRight => v1::Order::LeftToRight,
                    Order::SurestFirst => v1::Order::SurestFirst,
                }
                .into(),
            }),
        }),
    }
}

/// Reads texts from left to right, and counts what they take of a request's limits.
struct Reader<'a> {
    model: &'a ServedModel,
    limits: &'a LimitsConfig,
    text_bytes: usize,
    positions: usize,
    parts: usize,
}

/// A part that was read.
struct Part {
    tokens: Vec<Token>,
    /// Bytes of its text.
    bytes: Option<usize>,
    /// Whether a space at its end is left to the text that follows.
    leaves_space: bool,
}

impl<'a> Reader<'a> {
    fn new(model: &'a ServedModel, limits: &'a LimitsConfig) -> Self {
        Self {
            model,
            limits,
            text_bytes: 0,
            positions: 0,
            parts: 0,
        }
    }

    /// Reads a part, before `text_follows` and behind a space that was left to it.
    fn part(
        &mut self,
        field: &str,
        content: Option<v1::TextOrTokens>,
        [space_before, text_follows]: [bool; 2],
    ) -> Result<Part, Status> {
        self.parts += 1;
        if self.parts > self.limits.max_template_parts {
            let most = self.limits.max_template_parts;
            let problem = format!("is one part too many, at most {most} are allowed");
            return Err(FieldError::new(field, problem).into());
        }
        let part = match content.and_then(|content| content.content) {
            Some(Content::Text(text)) => {
                let field = format!("{field}.text");
                self.text_bytes += text.len();
                if self.text_bytes > self.limits.max_text_bytes {
                    let most = self.limits.max_text_bytes;
                    let problem = format!("makes more bytes of text than one request may have, {most}");
                    return Err(FieldError::new(field, problem).into());
                }
                let bytes = text.len() + usize::from(space_before);
                let text = if space_before { format!(" {text}") } else { text };
                let tokens = encode(&field, &text, self.model, self.limits)?;
                self.no_mask(&field, &tokens)?;
                let without_space = if text_follows {
                    without_space(&field, &tokens, &text, self.model)?
                } else {
                    None
                };
                let leaves_space = without_space.is_some();
                Part {
                    tokens: without_space.unwrap_or(tokens),
                    bytes: Some(bytes - usize::from(leaves_space)),
                    leaves_space,
                }
            }
            Some(Content::Tokens(list)) => Part {
                tokens: tokens(&format!("{field}.tokens.ids"), list.ids, self.model)?,
                bytes: None,
                leaves_space: false,
            },
            None => return Err(FieldError::new(field, "holds neither text nor tokens").into()),
        };
        self.positions += part.tokens.len();
        if self.positions > self.limits.max_request_tokens {
            let most = self.limits.max_request_tokens;
            let problem = format!("makes more positions than the {most} that one request may have");
            return Err(FieldError::new(field, problem).into());
        }
        Ok(part)
    }

    fn no_mask(&self, field: &str, tokens: &[Token]) -> Result<(), FieldError> {
        let mask = self.model.manifest().mask_token;
        if tokens.iter().any(|token| Some(*token) == mask) {
            return Err(FieldError::new(field, "holds the mask, which is no text"));
        }
        Ok(())
    }

    /// Refuses to score tokens that the model never draws.
    fn can_be_drawn(&self, field: &str, tokens: &[Token]) -> Result<(), FieldError> {
        let excluded = &self.model.manifest().excluded_tokens;
        match tokens.iter().find(|token| excluded.contains(token)) {
            Some(token) => {
                let problem = format!("holds token {token}, which this model never draws");
                Err(FieldError::new(field, problem))
            }
            None => Ok(()),
        }
    }
}

/// The texts of `Score`.
pub(super) fn documents(
    texts: Vec<v1::TextToScore>,
    model: &ServedModel,
    limits: &LimitsConfig,
) -> Result<Vec<Document>, Status> {
    if texts.is_empty() || texts.len() > limits.max_template_parts {
        let problem = format!(
            "has {} entries, must have 1 to {}",
            texts.len(),
            limits.max_template_parts
        );
        return Err(FieldError::new("texts", problem).into());
    }
    let mut reader = Reader::new(model, limits);
    texts
        .into_iter()
        .enumerate()
        .map(|(index, text)| document(&format!("texts[{index}]"), text, &mut reader))
        .collect()
}

fn document(field: &str, text: v1::TextToScore, reader: &mut Reader<'_>) -> Result<Document, Status> {
    let (mut all, mut context, mut bytes) = (Vec::new(), Vec::new(), Some(0));
    let mut space = false;
    let mut parts = text.parts.into_iter().enumerate().peekable();
    while let Some((index, part)) = parts.next() {
        let field = format!("{field}.parts[{index}]");
        let follows = |next: &(usize, v1::PartToScore)| {
            let content = next
                .1
                .content
                .as_ref()
                .and_then(|content| content.content.as_ref());
            matches!(content, Some(Content::Text(text)) if !text.is_empty())
        };
        let text_follows = parts.peek().is_some_and(follows);
        let given = part.context;
        let part = reader.part(&format!("{field}.content"), part.content, [space, text_follows])?;
        space = part.leaves_space;
        if !given {
            reader.can_be_drawn(&format!("{field}.content"), &part.tokens)?;
            bytes = bytes.zip(part.bytes).map(|(all, own)| all + own as u64);
        }
        context.resize(all.len() + part.tokens.len(), given);
        all.extend(part.tokens);
    }
    if context.iter().all(|given| *given) {
        return Err(FieldError::new(format!("{field}.parts"), "hold nothing to score").into());
    }
    let max = reader.model.manifest().max_length;
    if all.len() > max && context.iter().any(|given| *given) {
        let problem = format!(
            "take {} positions with their context, the model's max_length is {max}",
            all.len()
        );
        return Err(FieldError::new(format!("{field}.parts"), problem).into());
    }
    let sequences = all.chunks(max).zip(context.chunks(max));
    Ok(Document {
        sequences: sequences
            .map(|(tokens, context)| TextToScore {
                tokens: tokens.to_vec(),
                context: context.to_vec(),
            })
            .collect(),
        bytes,
    })
}

/// The texts of `Choose`, one for every candidate.
pub(super) fn candidates(
    before: Option<v1::TextOrTokens>,
    candidates: Vec<v1::TextOrTokens>,
    after: Option<v1::TextOrTokens>,
    model: &ServedModel,
    limits: &LimitsConfig,
) -> Result<Vec<Document>, Status> {
    if candidates.len() < 2 || candidates.len() > limits.max_template_parts {
        let problem = format!(
            "has {} entries, must have 2 to {}",
            candidates.len(),
            limits.max_template_parts
        );
        return Err(FieldError::new("candidates", problem).into());
    }
    let is_text = |candidate: &v1::TextOrTokens| matches!(&candidate.content, Some(Content::Text(_)));
    let text_follows = candidates.iter().all(is_text);
    let mut reader = Reader::new(model, limits);
    // Their parts are one more each than the candidates, which the limit is about.
    let mut around = Reader::new(model, limits);
    let before = before
        .map(|before| around.part("before", Some(before), [false, text_follows]))
        .transpose()?;
    let after = after
        .map(|after| around.part("after", Some(after), [false, false]))
        .transpose()?;
    let tokens_of = |part: &Option<Part>| part.as_ref().map_or(Vec::new(), |part| part.tokens.clone());
    let space = before.as_ref().is_some_and(|before| before.leaves_space);
    let (before, after) = (tokens_of(&before), tokens_of(&after));
    let mut seen: HashMap<Vec<Token>, usize> = HashMap::new();
    let document = |(index, candidate): (usize, v1::TextOrTokens)| {
        let field = format!("candidates[{index}]");
        let part = reader.part(&field, Some(candidate), [space, false])?;
        reader.can_be_drawn(&field, &part.tokens)?;
        if part.tokens.is_empty() {
            return Err(FieldError::new(field, "is empty").into());
        }
        reader.positions += before.len() + after.len();
        let length = before.len() + part.tokens.len() + after.len();
        let max = model.manifest().max_length;
        if length > max || reader.positions > limits.max_request_tokens {
            let problem = format!(
                "takes {length} positions with what is around it; the model's max_length is {max}, one request may \
                 have {}",
                limits.max_request_tokens
            );
            return Err(FieldError::new(field, problem).into());
        }
        if let Some(same) = seen.insert(part.tokens.clone(), index) {
            let problem = format!("is the same as candidates[{same}]");
            return Err(FieldError::new(field, problem).into());
        }
        let mut context = vec![true; length];
        context[before.len()..before.len() + part.tokens.len()].fill(false);
        Ok(Document {
            sequences: vec![TextToScore {
                tokens: [before.as_slice(), &part.tokens, &after].concat(),
                context,
            }],
            bytes: None,
        })
    };
    candidates.into_iter().enumerate().map(document).collect()
}
