//! Requests that go on from what their client has seen: checked like any other input, trusted nowhere.

use super::request::Resolved;
use super::status::FieldError;
use super::template::Template;
use crate::engine::{CanvasState, Resume};
use crate::models::ServedModel;
use crate::proto::{bits, v1};

/// The request that `accepted` tells of, in the words of a new one.
#[derive(Debug)]
pub(super) struct Repeated {
    pub(super) model: v1::ModelReference,
    pub(super) template: Vec<v1::TemplatePart>,
    pub(super) sampling: v1::Sampling,
    pub(super) token_sets: Vec<v1::TokenSet>,
    pub(super) keep_after_end: bool,
    pub(super) request_id: String,
    /// Positions that the canvases had.
    pub(super) length: u32,
    pub(super) states: States,
}

/// States of canvases, as they came.
#[derive(Debug)]
pub(super) struct States {
    frames: Vec<v1::Frame>,
    finished: Vec<u32>,
}

/// The request to go on with, if there is one; nothing that it decides may be `said` beside it.
pub(super) fn repeated(
    resume: Option<v1::Resume>,
    said: &[(&str, bool)],
) -> Result<Option<Repeated>, FieldError> {
    let Some(resume) = resume else { return Ok(None) };
    if let Some((field, _)) = said.iter().find(|(_, said)| *said) {
        let problem = "must be absent beside resume, which decides it";
        return Err(FieldError::new(*field, problem));
    }
    let absent = |field: &str| FieldError::new(format!("resume.accepted{field}"), "is absent");
    let accepted = resume.accepted.ok_or_else(|| absent(""))?;
    let model = accepted.model.ok_or_else(|| absent(".model"))?;
    if model.name.is_empty() || model.version == 0 {
        let problem = "must name a model and its version";
        return Err(FieldError::new("resume.accepted.model", problem));
    }
    let sampling = accepted.sampling.ok_or_else(|| absent(".sampling"))?;
    if sampling.seed.is_none() || sampling.sampler.is_none() {
        let problem = "must have a seed and a sampler, as the server told them";
        return Err(FieldError::new("resume.accepted.sampling", problem));
    }
    Ok(Some(Repeated {
        model,
        template: accepted.template,
        sampling,
        token_sets: accepted.token_sets,
        keep_after_end: accepted.keep_after_end,
        request_id: accepted.request_id,
        length: accepted.length,
        states: States {
            frames: resume.frames,
            finished: resume.finished,
        },
    }))
}

impl States {
    /// Checks the states of the canvases of a request, as far as their form goes; whether they can be, the engine says.
    pub(super) fn check(
        self,
        template: &Template,
        resolved: &Resolved,
        model: &ServedModel,
    ) -> Result<Resume, FieldError> {
        let mut resume = Resume::default();
        for (index, canvas) in self.finished.into_iter().enumerate() {
            if canvas >= resolved.samples || !resume.finished.insert(canvas) {
                return Err(no_canvas(format!("resume.finished[{index}]"), canvas, resolved));
            }
        }
        let mask = model.graph().mask();
        for (index, frame) in self.frames.into_iter().enumerate() {
            let field = |name: &str| format!("resume.frames[{index}]{name}");
            let canvas = frame.canvas;
            let is_new = !resume.states.contains_key(&canvas) && !resume.finished.contains(&canvas);
            if canvas >= resolved.samples || !is_new {
                return Err(no_canvas(field(".canvas"), canvas, resolved));
            }
            let Some(v1::frame::Content::Keyframe(key)) = frame.content else {
                return Err(FieldError::new(field(""), "holds no keyframe"));
            };
            let masked = bits(key.tokens.iter().map(|token| Some(*token) == mask));
            let clamped = bits(template.canvas().iter().map(Option::is_some));
            for (name, told, right) in [
                (".masked", &key.masked, masked),
                (".clamped", &key.clamped, clamped),
            ] {
                if *told != right {
                    let problem = "does not agree with the tokens and the template";
                    return Err(FieldError::new(field(&format!(".keyframe{name}")), problem));
                }
            }
            let state = CanvasState {
                tokens: key.tokens,
                committed_at: key.committed_at,
                log_probabilities: key.log_probabilities,
                step: frame.step,
                nfe: frame.nfe,
            };
            resume.states.insert(canvas, state);
        }
        Ok(resume)
    }
}

fn no_canvas(field: String, canvas: u32, resolved: &Resolved) -> FieldError {
    let problem = format!("is {canvas}, must be below {} and named once", resolved.samples);
    FieldError::new(field, problem)
}
