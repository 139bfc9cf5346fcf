//! Requests as they come in, checked once and turned into domain types.
//!
//! Every function here names the field it is unhappy with.

use crate::bundle::TextTokenizer;
use crate::config::LimitsConfig;
use crate::diffusion::sampler::choice::MAX_TEMPERATURE;
use crate::diffusion::sampler::{FINAL_TIME, TimeGrid};
use crate::diffusion::{GraphKind, Token, TokenChoice};
use crate::engine::plan::Sampling;
use crate::models::ServedModel;
use crate::proto::v1;
use crate::proto::v1::draft;
use crate::proto::v1::template_part::Part;

use super::sampler;
use super::status::{FieldError, no_tokenizer};
use super::template::{Piece, Template};
use super::token_sets::TokenSets;
use tonic::Status;

/// Steps taken when none are asked for, at most.
pub(crate) const DEFAULT_STEPS: u32 = 64;
/// Time from which drafts are denoised when none is asked for.
pub(crate) const DEFAULT_START_TIME: f64 = 0.5;
/// Longest request id.
pub(super) const MAX_ID: usize = 128;

/// How to denoise, with every default resolved.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Resolved {
    /// Steps, sampler and choice of tokens.
    pub sampling: Sampling,
    /// Given, or drawn.
    pub seed: u64,
    /// Independent canvases.
    pub samples: u32,
}

/// Checks `sampling` for canvases of `template`.
pub(super) fn sampling(
    sampling: Option<v1::Sampling>,
    template: &Template,
    model: &ServedModel,
    limits: &LimitsConfig,
) -> Result<Resolved, FieldError> {
    let asked = sampling.unwrap_or_default();
    let (gaps, defaults) = (template.gaps(), model.manifest().defaults.unwrap_or_default());
    let (sampler, normalize) = sampler::asked(asked.sampler, defaults.sampler)?;
    if asked.steps.is_some() && !sampler.has_steps() {
        let problem = "are not for first_hitting, which takes one for every position to fill";
        return Err(FieldError::new("sampling.steps", problem));
    }
    let steps = within(
        "sampling.steps",
        asked.steps.unwrap_or_else(|| {
            // An exporter knows what its model needs; without, a step a position is enough.
            let steps = defaults.steps.unwrap_or((gaps as u32).clamp(1, DEFAULT_STEPS));
            steps.min(limits.max_steps)
        }),
        limits.max_steps,
    )?;
    let samples = within(
        "sampling.num_samples",
        asked.num_samples.unwrap_or(1),
        limits.max_samples,
    )?;
    let temperature = asked.temperature.or(defaults.temperature).unwrap_or(1.0);
    if !(0.0..=MAX_TEMPERATURE).contains(&temperature) {
        return Err(FieldError::new(
            "sampling.temperature",
            format!("is {temperature}, must be 0 to {MAX_TEMPERATURE}"),
        ));
    }
    if asked.top_k == Some(0) {
        return Err(FieldError::new("sampling.top_k", "is 0, must be at least 1"));
    }
    if let Some(top_p) = asked.top_p.filter(|p| !(*p > 0.0 && *p <= 1.0)) {
        return Err(FieldError::new(
            "sampling.top_p",
            format!("is {top_p}, must be above 0 and at most 1"),
        ));
    }
    let choice = TokenChoice {
        temperature,
        top_k: asked.top_k,
        top_p: asked.top_p.or(defaults.top_p),
    };
    let start = start_time(asked.start_time, template, model)?;
    let resolved = Sampling {
        grid: TimeGrid { steps, start },
        sampler,
        choice,
        normalize,
    };
    if model.manifest().graph != GraphKind::Absorbing {
        let arm = sampler::name(&sampler::told(sampler, normalize));
        if sampler.normalizes() {
            let fitting: Vec<&str> = sampler::that_fit(model.manifest().graph).collect();
            let problem = format!(
                "is for absorbing graphs; this model's is uniform, which takes {}",
                fitting.join(", ")
            );
            return Err(FieldError::new(format!("sampling.{arm}"), problem));
        }
        if normalize {
            let problem = "is for absorbing graphs; this model's is uniform";
            return Err(FieldError::new(format!("sampling.{arm}.normalize"), problem));
        }
    }
    let (length, max) = (template.length(), limits.max_request_tokens);
    if (samples as usize).saturating_mul(length) > max {
        let problem = format!(
            "is {samples}: that many canvases of {length} positions are more than the {max} positions that one request may have"
        );
        return Err(FieldError::new("sampling.num_samples", problem));
    }
    Ok(Resolved {
        sampling: resolved,
        seed: asked.seed.unwrap_or_else(drawn_seed),
        samples,
    })
}

/// The time from which a canvas of `template` is denoised.
fn start_time(asked: Option<f64>, template: &Template, model: &ServedModel) -> Result<f64, FieldError> {
    let refusal = |problem: String| Err(FieldError::new("sampling.start_time", problem));
    if !template.has_draft() {
        return match asked {
            None => Ok(1.0),
            Some(_) => refusal("is for drafts; the template has none".to_owned()),
        };
    }
    let start = asked.unwrap_or(DEFAULT_START_TIME);
    if !(start > FINAL_TIME && start <= 1.0) {
        return refusal(format!("is {start}, must be above {FINAL_TIME} and at most 1"));
    }
    let uniform = model.manifest().graph == GraphKind::Uniform;
    if uniform && start < 1.0 && template.has_gap() {
        let problem =
            "must be 1 where the template has gaps beside its drafts, on this model's uniform graph";
        return refusal(format!("is {start}, {problem}"));
    }
    Ok(start)
}

/// A seed below 2^53: what JSON and JavaScript can tell from its neighbours.
pub(super) fn drawn_seed() -> u64 {
    uuid::Uuid::new_v4().as_u64_pair().0 >> 11
}

fn within(field: &str, value: u32, most: u32) -> Result<u32, FieldError> {
    if (1..=most).contains(&value) {
        return Ok(value);
    }
    Err(FieldError::new(field, format!("is {value}, must be 1 to {most}")))
}

/// The name of a request: given, or drawn.
pub(super) fn id(asked: String) -> Result<String, FieldError> {
    if asked.is_empty() {
        return Ok(uuid::Uuid::new_v4().to_string());
    }
    if asked.len() > MAX_ID || !asked.chars().all(|c| c.is_ascii_graphic()) {
        return Err(FieldError::new(
            "request_id",
            format!("must be up to {MAX_ID} printable ASCII characters"),
        ));
    }
    Ok(asked)
}

/// The template of `Generate`: a prompt and one gap.
pub(super) fn prompt(
    prompt: Option<v1::generate_request::PromptAs>,
    length: Option<u32>,
    allowed: Option<String>,
    sets: &TokenSets,
    model: &ServedModel,
    limits: &LimitsConfig,
) -> Result<Template, Status> {
    sets.check("allowed", allowed.as_deref())?;
    let max = model.manifest().max_length;
    if let Some(length) = length.filter(|length| !(1..=max).contains(&(*length as usize))) {
        let problem = format!("is {length}, must be 1 to {max} (the model's max_length)");
        return Err(FieldError::new("length", problem).into());
    }
    let (field, prompt) = match prompt {
        Some(v1::generate_request::PromptAs::Prompt(text)) if !text.is_empty() => {
            let tokens = encode_within("prompt", &text, model, limits)?;
            ("prompt", before_gap("prompt", tokens, text, model)?)
        }
        Some(v1::generate_request::PromptAs::PromptTokens(list)) => (
            "prompt_tokens",
            Piece::Tokens(tokens("prompt_tokens.ids", list.ids, model)?),
        ),
        Some(v1::generate_request::PromptAs::Prompt(_)) | None => ("prompt", Piece::Tokens(Vec::new())),
    };
    let taken = prompt.len();
    let default = model.manifest().defaults.and_then(|defaults| defaults.length);
    let length = match (length, default) {
        (Some(length), _) => length as usize,
        // A prompt that leaves no room in the default gets the whole canvas.
        (None, Some(default)) if taken < default => default,
        (None, _) => max,
    };
    let Some(gap) = length.checked_sub(taken).filter(|gap| *gap > 0) else {
        let problem = format!("takes {taken} positions, which leaves none of the canvas's {length} to fill");
        return Err(FieldError::new(field, problem).into());
    };
    Ok(Template::new([prompt, Piece::Gap(gap, allowed)]))
}

/// The template of `Infill`.
pub(super) fn template(
    parts: Vec<v1::TemplatePart>,
    sets: &TokenSets,
    model: &ServedModel,
    limits: &LimitsConfig,
) -> Result<Template, Status> {
    let max = model.manifest().max_length;
    if parts.is_empty() {
        return Err(FieldError::new("template", "is empty, at least one gap or draft is needed").into());
    }
    if parts.len() > limits.max_template_parts {
        let problem = format!(
            "has {} parts, at most {} are allowed",
            parts.len(),
            limits.max_template_parts
        );
        return Err(FieldError::new("template", problem).into());
    }
    let text_bytes: usize = parts
        .iter()
        .map(|part| match &part.part {
            Some(Part::Text(text)) => text.len(),
            Some(Part::Draft(v1::Draft {
                content: Some(draft::Content::Text(text)),
            })) => text.len(),
            Some(Part::Draft(_) | Part::Tokens(_) | Part::Gap(_)) | None => 0,
        })
        .sum();
    if text_bytes > limits.max_text_bytes {
        let problem = format!(
            "has {text_bytes} bytes of text, at most {} are allowed",
            limits.max_text_bytes
        );
        return Err(FieldError::new("template", problem).into());
    }
    let (mut pieces, mut length) = (Vec::with_capacity(parts.len()), 0usize);
    let mut parts = parts.into_iter().enumerate().peekable();
    while let Some((index, part)) = parts.next() {
        let field = format!("template[{index}]");
        let gap_follows = parts
            .peek()
            .is_some_and(|(_, next)| matches!(next.part, Some(Part::Gap(_) | Part::Draft(_))));
        let piece = match part.part {
            Some(Part::Text(text)) => {
                let tokens = encode_within(&format!("{field}.text"), &text, model, limits)?;
                if gap_follows {
                    before_gap(&format!("{field}.text"), tokens, text, model)?
                } else {
                    Piece::Text(text, tokens)
                }
            }
            Some(Part::Tokens(list)) => {
                Piece::Tokens(tokens(&format!("{field}.tokens.ids"), list.ids, model)?)
            }
            Some(Part::Gap(v1::Gap { positions: 0, .. })) => {
                let field = format!("{field}.gap.positions");
                return Err(FieldError::new(field, "is 0, must be at least 1").into());
            }
            Some(Part::Gap(v1::Gap { positions, allowed })) => {
                sets.check(&format!("{field}.gap.allowed"), allowed.as_deref())?;
                Piece::Gap(positions as usize, allowed)
            }
            Some(Part::Draft(draft)) => {
                let space_is_open = matches!(pieces.last(), Some(Piece::OpenText(..)));
                self::draft(&field, draft, space_is_open, model, limits)?
            }
            None => return Err(FieldError::new(field, "holds none of text, tokens, gap and draft").into()),
        };
        length += piece.len();
        // Checked as we go, so that no sum of gaps can be absurd.
        if length > max {
            let problem = format!("takes {length} positions or more, the model's max_length is {max}");
            return Err(FieldError::new("template", problem).into());
        }
        pieces.push(piece);
    }
    let template = Template::new(pieces);
    if template.gaps() == 0 {
        let problem = "has no gap and no draft, at least one is needed";
        return Err(FieldError::new("template", problem).into());
    }
    Ok(template)
}

/// A draft; after a text whose space is left open it begins with that space.
fn draft(
    field: &str,
    draft: v1::Draft,
    space_is_open: bool,
    model: &ServedModel,
    limits: &LimitsConfig,
) -> Result<Piece, Status> {
    let (field, piece) = match draft.content {
        Some(draft::Content::Text(text)) => {
            let field = format!("{field}.draft.text");
            let tokens = if space_is_open {
                encode_within(&field, &format!(" {text}"), model, limits)?
            } else {
                encode_within(&field, &text, model, limits)?
            };
            (field, Piece::Draft(Some(text), tokens))
        }
        Some(draft::Content::Tokens(list)) => {
            let field = format!("{field}.draft.tokens.ids");
            let tokens = tokens(&field, list.ids, model)?;
            (field, Piece::Draft(None, tokens))
        }
        None => {
            return Err(FieldError::new(format!("{field}.draft"), "holds neither text nor tokens").into());
        }
    };
    if piece.len() == 0 {
        return Err(FieldError::new(field, "is empty, a draft has at least one token").into());
    }
    Ok(piece)
}

/// `text`, of these `tokens`, before a gap: a space at its end that is a token of its own is left to the gap.
pub(super) fn before_gap(
    field: &str,
    tokens: Vec<Token>,
    text: String,
    model: &ServedModel,
) -> Result<Piece, Status> {
    Ok(match without_space(field, &tokens, &text, model)? {
        Some(without) => Piece::OpenText(text, without),
        None => Piece::Text(text, tokens),
    })
}

/// The `tokens` of `text` but for a space at its end, where that is a token of its own.
pub(super) fn without_space(
    field: &str,
    tokens: &[Token],
    text: &str,
    model: &ServedModel,
) -> Result<Option<Vec<Token>>, Status> {
    let Some(without) = text.strip_suffix(' ') else {
        return Ok(None);
    };
    let without = tokenizer(model)?
        .encode(without)
        .map_err(|e| FieldError::new(field, e.to_string()))?;
    let is_token = matches!(tokens.strip_prefix(without.as_slice()), Some([_space]));
    Ok(is_token.then_some(without))
}

/// Tokens of a text field.
pub(super) fn encode(
    field: &str,
    text: &str,
    model: &ServedModel,
    limits: &LimitsConfig,
) -> Result<Vec<Token>, Status> {
    if text.len() > limits.max_text_bytes {
        let problem = format!(
            "has {} bytes, at most {} are allowed",
            text.len(),
            limits.max_text_bytes
        );
        return Err(FieldError::new(field, problem).into());
    }
    let tokenizer = tokenizer(model)?;
    tokenizer
        .encode(text)
        .map_err(|e| FieldError::new(field, e.to_string()).into())
}

/// Tokens of a text that has to fit into a canvas: what cannot fit is refused before it is read.
pub(super) fn encode_within(
    field: &str,
    text: &str,
    model: &ServedModel,
    limits: &LimitsConfig,
) -> Result<Vec<Token>, Status> {
    let max = model.manifest().max_length;
    let bytes = tokenizer(model)?.max_bytes(max);
    if text.len() > bytes {
        let problem = format!(
            "has {} bytes, which cannot fit into the model's max_length of {max} positions",
            text.len()
        );
        return Err(FieldError::new(field, problem).into());
    }
    let tokens = encode(field, text, model, limits)?;
    if tokens
        .iter()
        .any(|token| Some(*token) == model.manifest().mask_token)
    {
        return Err(FieldError::new(field, "holds the mask; a gap takes its place").into());
    }
    Ok(tokens)
}

/// The model's tokenizer, or why there is none.
pub(super) fn tokenizer(model: &ServedModel) -> Result<&TextTokenizer, Status> {
    model.tokenizer().ok_or_else(|| no_tokenizer(&model.to_string()))
}

/// Checks tokens that a caller sent; masks cannot be clamped.
pub(super) fn tokens(field: &str, ids: Vec<u32>, model: &ServedModel) -> Result<Vec<Token>, FieldError> {
    let (states, mask) = (model.manifest().vocab_size, model.manifest().mask_token);
    let is_wrong = |id: &u32| *id as usize >= states || Some(*id) == mask;
    let Some(at) = ids.iter().position(is_wrong) else {
        return Ok(ids);
    };
    let and = mask.map_or(String::new(), |mask| format!(" and not the mask, {mask}"));
    let problem = format!("is {}, must be below {states}{and}", ids[at]);
    Err(FieldError::new(format!("{field}[{at}]"), problem))
}

/// Which frames to send, with every default resolved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Frames {
    /// When a frame is due.
    pub when: When,
    /// Time between two frames, at least, where one is asked for.
    pub min_interval: Option<std::time::Duration>,
    /// Never send deltas.
    pub keyframes_only: bool,
    /// Which frames carry text.
    pub text: FrameText,
}

/// Which frames carry the canvas as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FrameText {
    /// All of them.
    All,
    /// Keyframes alone.
    Keyframes,
    /// None.
    None,
}

/// When a frame is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum When {
    /// Never.
    Never,
    /// After a token changed.
    OnChange,
    /// After this many steps.
    EverySteps(u32),
}

/// Checks a frame policy.
pub(super) fn frames(policy: Option<v1::FramePolicy>) -> Result<Frames, FieldError> {
    use v1::frame_policy::When as Asked;
    let policy = policy.unwrap_or_default();
    let when = match Asked::try_from(policy.when) {
        Ok(Asked::Unspecified | Asked::OnChange) => When::OnChange,
        Ok(Asked::Never) => When::Never,
        Ok(Asked::EverySteps) => match policy.every_steps.unwrap_or(1) {
            0 => return Err(FieldError::new("frames.every_steps", "is 0, must be at least 1")),
            steps => When::EverySteps(steps),
        },
        Err(_) => {
            return Err(FieldError::new(
                "frames.when",
                format!("{} is no policy this server knows", policy.when),
            ));
        }
    };
    if policy.every_steps.is_some() && !matches!(when, When::EverySteps(_)) {
        let problem = "is for WHEN_EVERY_STEPS alone";
        return Err(FieldError::new("frames.every_steps", problem));
    }
    let text = match v1::frame_policy::Text::try_from(policy.text) {
        Ok(v1::frame_policy::Text::Unspecified | v1::frame_policy::Text::AllFrames) => FrameText::All,
        Ok(v1::frame_policy::Text::Keyframes) => FrameText::Keyframes,
        Ok(v1::frame_policy::Text::None) => FrameText::None,
        Err(_) => {
            let problem = format!("{} is no value this server knows", policy.text);
            return Err(FieldError::new("frames.text", problem));
        }
    };
    Ok(Frames {
        when,
        // Who asks for every so many steps has said how often.
        min_interval: policy
            .min_interval_ms
            .or(matches!(when, When::EverySteps(_)).then_some(0))
            .map(|ms| std::time::Duration::from_millis(ms.into())),
        keyframes_only: policy.keyframes_only,
        text,
    })
}
