//! `denoised.v1.DiffusionService`: translates requests, admits them, streams what happens.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::stream::{BoxStream, StreamExt};
use tonic::{Request, Response, Status};

use super::access::Notes;
use super::caller::Principal;
use super::request;
use super::resume::{self, Repeated, States};
use super::sampler;
use super::status::{FieldError, not_found};
use super::stream::{View, deliver, events};
use super::template::Template;
use super::token_sets::TokenSets;
use super::{Service, deadline};
use crate::config::LimitsConfig;
use crate::engine::{Caller, Deadline, OnDeadline, Publish, Resume};
use crate::models::ServedModel;
use crate::proto::v1;
use crate::proto::v1::diffusion_service_server::DiffusionService;
use crate::proto::v1::event::Event;

/// A call of `Generate` or `Infill`, before its template is read.
struct Call {
    id: String,
    caller: Caller,
    notes: Notes,
    model: Arc<ServedModel>,
    sampling: Option<v1::Sampling>,
    frames: Option<v1::FramePolicy>,
    keep_after_end: bool,
    deadline: Option<Deadline>,
    priority: i32,
    token_sets: Vec<v1::TokenSet>,
    /// States to go on from, and the length that their canvases had.
    resume: Option<(States, u32)>,
}

/// Who calls, when, and how long the call may take.
#[derive(Clone)]
pub(super) struct Arrival {
    pub(super) principal: Principal,
    pub(super) notes: Notes,
    at: Instant,
    timeout: Option<Duration>,
}

impl Arrival {
    pub(super) fn of<T>(request: &Request<T>) -> Self {
        Self {
            principal: Principal::of(request),
            notes: Notes::of(request.extensions()),
            at: Instant::now(),
            timeout: deadline::timeout(request.metadata()),
        }
    }

    pub(super) fn deadline(&self, asked: Option<v1::Deadline>) -> Result<Option<Deadline>, FieldError> {
        deadline::deadline(asked, self.timeout, self.at)
    }
}

/// What both calls say.
struct Words {
    model: Option<v1::ModelReference>,
    sampling: Option<v1::Sampling>,
    frames: Option<v1::FramePolicy>,
    keep_after_end: bool,
    request_id: String,
    deadline: Option<v1::Deadline>,
    priority: i32,
    token_sets: Vec<v1::TokenSet>,
}

/// How a template is filled.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Filling {
    pub(super) sampling: v1::Sampling,
    pub(super) frames: v1::FramePolicy,
    pub(super) keep_after_end: bool,
    pub(super) deadline: Option<v1::Deadline>,
}

/// Events of a request, of either call.
pub(super) type Events = BoxStream<'static, Result<Event, Status>>;

impl Service {
    /// A call in its own words, or in those of the request that it goes on with, whose template comes with it.
    fn call(
        &self,
        arrival: Arrival,
        words: Words,
        resume: Option<Repeated>,
    ) -> Result<(Call, Option<Vec<v1::TemplatePart>>), Status> {
        let deadline = arrival.deadline(words.deadline)?;
        let (words, parts, resume) = match resume {
            None => (words, None, None),
            Some(repeated) => {
                let request_id = if words.request_id.is_empty() {
                    repeated.request_id
                } else {
                    words.request_id
                };
                let words = Words {
                    model: Some(repeated.model),
                    sampling: Some(repeated.sampling),
                    token_sets: repeated.token_sets,
                    keep_after_end: repeated.keep_after_end,
                    request_id,
                    ..words
                };
                (
                    words,
                    Some(repeated.template),
                    Some((repeated.states, repeated.length)),
                )
            }
        };
        let call = Call {
            id: request::id(words.request_id)?,
            caller: arrival.principal.caller().clone(),
            notes: arrival.notes,
            model: self.model(&arrival.principal, words.model)?,
            sampling: words.sampling,
            frames: words.frames,
            keep_after_end: words.keep_after_end,
            deadline,
            priority: words.priority,
            token_sets: words.token_sets,
            resume,
        };
        call.notes.asks(&call.id, &call.model);
        Ok((call, parts))
    }

    /// Fills a template, for requests in another protocol's words.
    pub(super) async fn fill<F>(
        &self,
        arrival: Arrival,
        model: &Arc<ServedModel>,
        filling: Filling,
        template: F,
    ) -> Result<Events, Status>
    where
        F: FnOnce(&TokenSets, &ServedModel, &LimitsConfig) -> Result<Template, Status> + Send + 'static,
    {
        let call = Call {
            id: request::id(String::new())?,
            deadline: arrival.deadline(filling.deadline)?,
            caller: arrival.principal.caller().clone(),
            notes: arrival.notes,
            model: Arc::clone(model),
            sampling: Some(filling.sampling),
            frames: Some(filling.frames),
            keep_after_end: filling.keep_after_end,
            priority: 0,
            token_sets: Vec::new(),
            resume: None,
        };
        call.notes.asks(&call.id, &call.model);
        self.stream(call, template).await
    }

    /// One path for both calls: a prompt is a template with one gap at its end, which `template` makes.
    async fn stream<F>(&self, mut asked: Call, template: F) -> Result<Events, Status>
    where
        F: FnOnce(&TokenSets, &ServedModel, &LimitsConfig) -> Result<Template, Status> + Send + 'static,
    {
        let (service, id) = (self.clone(), asked.id.clone());
        let until = asked
            .deadline
            .filter(|deadline| deadline.then == OnDeadline::Fail);
        // Reading text and laying out canvases take their time.
        let start = move || {
            let sets = std::mem::take(&mut asked.token_sets);
            let sets = TokenSets::read(sets, &asked.model, &service.limits)?;
            let template = template(&sets, &asked.model, &service.limits)?;
            service.start(asked, template, &sets)
        };
        Ok(deliver(
            self.text.run(start).await?,
            id,
            self.unread,
            until.map(|deadline| deadline.at),
            Arc::clone(&self.engine),
        ))
    }

    /// Admits a request.
    fn start(&self, mut asked: Call, template: Template, sets: &TokenSets) -> Result<Events, Status> {
        let allowed = sets.resolve(&template)?;
        let resolved = request::sampling(asked.sampling, &template, &asked.model, &self.limits)?;
        let frames = request::frames(asked.frames)?;
        let resume = match asked.resume.take() {
            Some((_, length)) if length as usize != template.length() => {
                let problem = format!(
                    "is {length}, but its template has {} positions",
                    template.length()
                );
                return Err(FieldError::new("resume.accepted.length", problem).into());
            }
            Some((states, _)) => states.check(&template, &resolved, &asked.model)?,
            None => Resume::default(),
        };
        let mut accepted = accepted(&asked, &resolved, &template);
        let generation = self.engine.admit(crate::engine::Request {
            id: asked.id.clone(),
            caller: asked.caller,
            model: Arc::clone(&asked.model),
            template: template.canvas(),
            draft: template.draft(),
            sampling: resolved.sampling,
            seed: resolved.seed,
            canvases: resolved.samples,
            publish: if frames.when == request::When::Never {
                Publish::End
            } else {
                Publish::Steps
            },
            deadline: asked.deadline,
            priority: asked.priority,
            resume,
            allowed,
        })?;
        asked.notes.spends(&generation.spent);
        accepted.token_sets = sets.told();
        accepted.predicted_seconds = generation.predicted.as_secs_f64();
        tracing::debug!(request = %asked.id, model = %asked.model, length = accepted.length, steps = accepted.total, samples = resolved.samples, "admitted");
        let view = View {
            model: asked.model,
            template,
            frames,
            keep_after_end: asked.keep_after_end,
            text: self.frame_text.clone(),
        };
        Ok(events(accepted, generation, view))
    }
}

/// What is told of a request that is admitted.
fn accepted(asked: &Call, resolved: &request::Resolved, template: &Template) -> v1::Accepted {
    let request::Resolved {
        sampling,
        seed,
        samples,
    } = *resolved;
    v1::Accepted {
        request_id: asked.id.clone(),
        model: Some(v1::ModelReference {
            name: asked.model.name().to_owned(),
            version: asked.model.version(),
        }),
        sampling: Some(v1::Sampling {
            sampler: Some(sampler::told(
                sampling.sampler,
                sampling.is_normalized(&asked.model),
            )),
            steps: sampling.sampler.has_steps().then_some(sampling.grid.steps),
            seed: Some(seed),
            temperature: Some(sampling.choice.temperature),
            top_k: sampling.choice.top_k,
            top_p: sampling.choice.top_p,
            num_samples: Some(samples),
            start_time: template.has_draft().then_some(sampling.grid.start),
        }),
        template: template.parts(),
        keep_after_end: asked.keep_after_end,
        length: template.length() as u32,
        total: sampling.steps(template.gaps(), &asked.model),
        deadline_ms: asked.deadline.map(|deadline| {
            let left = deadline.at.saturating_duration_since(Instant::now());
            u64::try_from(left.as_millis()).unwrap_or(u64::MAX)
        }),
        predicted_seconds: 0.0,
        token_sets: Vec::new(),
    }
}

#[tonic::async_trait]
impl DiffusionService for Service {
    type GenerateStream = BoxStream<'static, Result<v1::GenerateResponse, Status>>;
    type InfillStream = BoxStream<'static, Result<v1::InfillResponse, Status>>;
    type ScoreStream = BoxStream<'static, Result<v1::ScoreResponse, Status>>;

    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        let arrival = Arrival::of(&request);
        let mut asked = request.into_inner();
        let resume = resume::repeated(
            asked.resume.take(),
            &[
                ("model", asked.model.is_some()),
                ("prompt", asked.prompt_as.is_some()),
                ("length", asked.length.is_some()),
                ("sampling", asked.sampling.is_some()),
                ("keep_after_end", asked.keep_after_end),
                ("token_sets", !asked.token_sets.is_empty()),
                ("allowed", asked.allowed.is_some()),
            ],
        )?;
        let (prompt, length, allowed) = (asked.prompt_as, asked.length, asked.allowed);
        let (asked, parts) = self.call(
            arrival,
            Words {
                model: asked.model,
                sampling: asked.sampling,
                frames: asked.frames,
                keep_after_end: asked.keep_after_end,
                request_id: asked.request_id,
                deadline: asked.deadline,
                priority: asked.priority,
                token_sets: asked.token_sets,
            },
            resume,
        )?;
        let template = move |sets: &_, model: &_, limits: &_| match parts {
            Some(parts) => request::template(parts, sets, model, limits),
            None => request::prompt(prompt, length, allowed, sets, model, limits),
        };
        let out = self.stream(asked, template).await?.map(|event| {
            let event = Some(v1::Event { event: Some(event?) });
            Ok(v1::GenerateResponse { event })
        });
        Ok(Response::new(out.boxed()))
    }

    async fn infill(
        &self,
        request: Request<v1::InfillRequest>,
    ) -> Result<Response<Self::InfillStream>, Status> {
        let arrival = Arrival::of(&request);
        let mut asked = request.into_inner();
        let resume = resume::repeated(
            asked.resume.take(),
            &[
                ("model", asked.model.is_some()),
                ("template", !asked.template.is_empty()),
                ("token_sets", !asked.token_sets.is_empty()),
                ("sampling", asked.sampling.is_some()),
            ],
        )?;
        let own_parts = asked.template;
        let (asked, parts) = self.call(
            arrival,
            Words {
                model: asked.model,
                sampling: asked.sampling,
                frames: asked.frames,
                // A template says itself what comes after its gaps.
                keep_after_end: true,
                request_id: asked.request_id,
                deadline: asked.deadline,
                priority: asked.priority,
                token_sets: asked.token_sets,
            },
            resume,
        )?;
        let parts = parts.unwrap_or(own_parts);
        let template = move |sets: &_, model: &_, limits: &_| request::template(parts, sets, model, limits);
        let out = self.stream(asked, template).await?.map(|event| {
            let event = Some(v1::Event { event: Some(event?) });
            Ok(v1::InfillResponse { event })
        });
        Ok(Response::new(out.boxed()))
    }

    async fn score(&self, request: Request<v1::ScoreRequest>) -> Result<Response<Self::ScoreStream>, Status> {
        let out = self.score_texts(request).await?.map(|event| {
            let event = Some(event?);
            Ok(v1::ScoreResponse { event })
        });
        Ok(Response::new(out.boxed()))
    }

    async fn choose(
        &self,
        request: Request<v1::ChooseRequest>,
    ) -> Result<Response<v1::ChooseResponse>, Status> {
        self.choose_among(request).await.map(Response::new)
    }

    async fn cancel(
        &self,
        request: Request<v1::CancelRequest>,
    ) -> Result<Response<v1::CancelResponse>, Status> {
        let principal = Principal::of(&request);
        let id = request.into_inner().request_id;
        if id.is_empty() {
            return Err(FieldError::new("request_id", "is empty").into());
        }
        if self.engine.cancel(principal.caller(), &id) {
            Ok(Response::new(v1::CancelResponse {}))
        } else {
            Err(not_found("request", &id, "it may have ended"))
        }
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        let principal = Principal::of(&request);
        let asked = request.into_inner();
        let model = self.model(&principal, asked.model)?;
        let limits = self.limits.clone();
        let encode = move || request::encode("text", &asked.text, &model, &limits);
        let tokens = self.text.run(encode).await?;
        Ok(Response::new(v1::TokenizeResponse { tokens }))
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        let principal = Principal::of(&request);
        let asked = request.into_inner();
        let model = self.model(&principal, asked.model)?;
        let (tokens, max) = (asked.tokens.len(), self.limits.max_request_tokens);
        if tokens > max {
            let problem = format!("has {tokens} tokens, at most {max} are allowed");
            return Err(FieldError::new("tokens", problem).into());
        }
        let mask = model.manifest().mask_token;
        let is_text = |token: &u32| Some(*token) != mask;
        let text = asked.tokens.iter().copied().filter(is_text).collect();
        let text = request::tokens("tokens", text, &model)?;
        let decode = move || {
            let tokenizer = request::tokenizer(&model)?;
            let pieces = if asked.pieces {
                tokenizer.pieces(&asked.tokens, mask)
            } else {
                Ok(Vec::new())
            };
            let decoded = tokenizer.decode(&text).and_then(|text| Ok((text, pieces?)));
            decoded.map_err(|e| FieldError::new("tokens", e.to_string()).into())
        };
        let (text, pieces) = self.text.run(decode).await?;
        Ok(Response::new(v1::DetokenizeResponse { text, pieces }))
    }
}
