//! Requests, piece by piece. What is not said here, the model and the server decide.

use std::time::Duration;

use crate::proto::v1;
use crate::proto::v1::generate_request::PromptAs;
use crate::proto::v1::sampling::Sampler;
use crate::proto::v1::template_part::Part;

/// Clamped text of a template.
pub fn text(text: impl Into<String>) -> Part {
    Part::Text(text.into())
}

/// Clamped tokens of a template.
pub fn tokens(ids: impl Into<Vec<u32>>) -> Part {
    Part::Tokens(v1::TokenList { ids: ids.into() })
}

/// Positions of a template to fill.
pub fn gap(positions: u32) -> Part {
    Part::Gap(v1::Gap {
        positions,
        allowed: None,
    })
}

/// Positions of a template to fill with tokens of the set of this name.
pub fn gap_of(positions: u32, set: impl Into<String>) -> Part {
    Part::Gap(v1::Gap {
        positions,
        allowed: Some(set.into()),
    })
}

/// Positions of a template that begin with the tokens of `text`, to edit in place: see [`Request::start_time`].
pub fn draft(text: impl Into<String>) -> Part {
    Part::Draft(v1::Draft {
        content: Some(v1::draft::Content::Text(text.into())),
    })
}

/// A request of either kind; whatever has no method here can be set on the message that it is made from.
#[derive(Clone, Debug)]
pub enum Request {
    /// Continues a prompt.
    Generate(v1::GenerateRequest),
    /// Fills the gaps of a template.
    Infill(v1::InfillRequest),
}

impl From<v1::GenerateRequest> for Request {
    fn from(request: v1::GenerateRequest) -> Self {
        Self::Generate(request)
    }
}

impl From<v1::InfillRequest> for Request {
    fn from(request: v1::InfillRequest) -> Self {
        Self::Infill(request)
    }
}

impl Request {
    /// Continues `prompt`.
    pub fn continuing(prompt: impl Into<String>) -> Self {
        Self::Generate(v1::GenerateRequest {
            prompt_as: Some(PromptAs::Prompt(prompt.into())),
            ..v1::GenerateRequest::default()
        })
    }

    /// Fills the gaps between `parts`.
    pub fn filling(parts: impl IntoIterator<Item = Part>) -> Self {
        let part = |part| v1::TemplatePart { part: Some(part) };
        Self::Infill(v1::InfillRequest {
            template: parts.into_iter().map(part).collect(),
            ..v1::InfillRequest::default()
        })
    }

    /// Adds a set of tokens that gaps can name, by the texts that are one token each.
    #[must_use]
    pub fn token_set<T: Into<String>>(
        mut self,
        name: impl Into<String>,
        texts: impl IntoIterator<Item = T>,
    ) -> Self {
        let sets = match &mut self {
            Self::Generate(request) => &mut request.token_sets,
            Self::Infill(request) => &mut request.token_sets,
        };
        sets.push(v1::TokenSet {
            name: name.into(),
            ids: Vec::new(),
            texts: texts.into_iter().map(Into::into).collect(),
        });
        self
    }

    /// Asks for the model of this name, in its highest version or in this one.
    #[must_use]
    pub fn model(mut self, name: impl Into<String>, version: Option<u64>) -> Self {
        *self.model_mut() = Some(v1::ModelReference {
            name: name.into(),
            version: version.unwrap_or(0),
        });
        self
    }

    /// Positions of the whole canvas, the prompt's included; those of a template follow from its parts.
    #[must_use]
    pub fn length(mut self, positions: u32) -> Self {
        if let Self::Generate(request) = &mut self {
            request.length = Some(positions);
        }
        self
    }

    /// How a step is taken.
    #[must_use]
    pub fn sampler(mut self, sampler: Sampler) -> Self {
        self.sampling_mut().sampler = Some(sampler);
        self
    }

    /// Denoising steps.
    #[must_use]
    pub fn steps(mut self, steps: u32) -> Self {
        self.sampling_mut().steps = Some(steps);
        self
    }

    /// Seed of all random choices.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.sampling_mut().seed = Some(seed);
        self
    }

    /// The time up to which drafts are noised, and from which they are denoised; above 0, at most 1.
    #[must_use]
    pub fn start_time(mut self, start_time: f64) -> Self {
        self.sampling_mut().start_time = Some(start_time);
        self
    }

    /// 0 takes the likeliest token, 1 follows the model.
    #[must_use]
    pub fn temperature(mut self, temperature: f64) -> Self {
        self.sampling_mut().temperature = Some(temperature);
        self
    }

    /// Independent canvases.
    #[must_use]
    pub fn samples(mut self, samples: u32) -> Self {
        self.sampling_mut().num_samples = Some(samples);
        self
    }

    /// Which intermediate states are sent.
    #[must_use]
    pub fn frames(mut self, frames: v1::FramePolicy) -> Self {
        *self.frames_mut() = Some(frames);
        self
    }

    /// When the answer must be whole, and what happens when that is too near.
    #[must_use]
    pub fn deadline(mut self, within: Duration, then: v1::OnDeadline) -> Self {
        *self.deadline_mut() = Some(v1::Deadline {
            ms: Some(u64::try_from(within.as_millis()).unwrap_or(u64::MAX)),
            on_deadline: then.into(),
        });
        self
    }

    /// The same request, going on from what has come of it.
    pub(super) fn resumed(&self, resume: v1::Resume) -> Self {
        let resume = Some(resume);
        match self {
            Self::Generate(asked) => Self::Generate(v1::GenerateRequest {
                resume,
                frames: asked.frames,
                request_id: asked.request_id.clone(),
                deadline: asked.deadline,
                priority: asked.priority,
                ..v1::GenerateRequest::default()
            }),
            Self::Infill(asked) => Self::Infill(v1::InfillRequest {
                resume,
                frames: asked.frames,
                request_id: asked.request_id.clone(),
                deadline: asked.deadline,
                priority: asked.priority,
                ..v1::InfillRequest::default()
            }),
        }
    }

    pub(super) fn deadline_mut(&mut self) -> &mut Option<v1::Deadline> {
        match self {
            Self::Generate(request) => &mut request.deadline,
            Self::Infill(request) => &mut request.deadline,
        }
    }

    fn model_mut(&mut self) -> &mut Option<v1::ModelReference> {
        match self {
            Self::Generate(request) => &mut request.model,
            Self::Infill(request) => &mut request.model,
        }
    }

    fn sampling_mut(&mut self) -> &mut v1::Sampling {
        let sampling = match self {
            Self::Generate(request) => &mut request.sampling,
            Self::Infill(request) => &mut request.sampling,
        };
        sampling.get_or_insert_default()
    }

    fn frames_mut(&mut self) -> &mut Option<v1::FramePolicy> {
        match self {
            Self::Generate(request) => &mut request.frames,
            Self::Infill(request) => &mut request.frames,
        }
    }
}
