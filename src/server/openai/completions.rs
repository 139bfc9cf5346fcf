//! `/v1/completions`: every prompt is a request of its own; answered whole, or as server-sent events.

use std::convert::Infallible;
use std::ops::Range;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::response::Response;
use futures_util::stream::{self, SelectAll, StreamExt};
use http::{HeaderValue, header};
use serde_json::{Value, json};
use tonic::{Code, Status};

use super::Face;
use super::errors::{Refusal, answer};
use super::in_order::InOrder;
use super::request::{Completion, Told};
use crate::bundle::TextTokenizer;
use crate::diffusion::{GraphKind, Token};
use crate::models::ServedModel;
use crate::proto::v1;
use crate::proto::v1::event::Event;
use crate::proto::v1::frame::Content;
use crate::proto::v1::sampling::Sampler;
use crate::server::diffusion_service::{Arrival, Events, Filling};
use crate::server::metrics::Ending;
use crate::server::request::tokenizer;
use crate::server::status::FieldError;
use crate::server::template::MASKED;
use crate::server::text::TextThreads;

/// Answers a request for completions.
pub(super) async fn complete(State(face): State<Arc<Face>>, request: Request) -> Result<Response, Refusal> {
    let (parts, body) = request.into_parts();
    let limit = face.max_bytes;
    let too_much = || {
        FieldError::new(
            "body",
            format!("has more than {limit} bytes, or did not come whole"),
        )
    };
    let body = tokio::time::timeout(face.patience, axum::body::to_bytes(body, limit)).await;
    let body =
        body.map_err(|_| FieldError::new("body", "did not come in time (server.handshake_seconds)"))?;
    let asked = Completion::read(&body.map_err(|_| too_much())?, &face.service.limits)?;
    let arrival = Arrival::of(&tonic::Request::from_parts(
        tonic::metadata::MetadataMap::new(),
        parts.extensions,
        (),
    ));
    let model = face.model(&arrival.principal, &asked.model)?;
    tokenizer(&model)?;
    let answer = Answer::new(asked, model);
    let mut running = Vec::with_capacity(answer.asked.prompts.len());
    for prompt in &answer.asked.prompts {
        let (asked, prompt) = (Arc::clone(&answer.asked), prompt.clone());
        let template = move |_: &_, model: &ServedModel, limits: &_| asked.template(&prompt, model, limits);
        let events = face
            .service
            .fill(arrival.clone(), &answer.model, answer.filling(), template);
        running.push(events.await?);
    }
    match answer.asked.told {
        Told::Streamed {
            include_usage,
            frames,
        } => Ok(answer.stream(running, include_usage, frames)),
        Told::Whole { logprobs } => answer.whole(running, logprobs, &face.service.frame_text).await,
    }
}

/// A request that is being answered.
struct Answer {
    asked: Arc<Completion>,
    model: Arc<ServedModel>,
    id: String,
    created: u64,
    /// Tokens of the prompts, as they are told.
    prompt_tokens: u64,
    /// Positions filled, of all choices.
    completion_tokens: u64,
}

/// The text of a choice and why it ended.
struct Choice {
    text: String,
    finish_reason: &'static str,
}

impl Answer {
    fn new(asked: Completion, model: Arc<ServedModel>) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            asked: Arc::new(asked),
            model,
            id: format!("cmpl-{}", uuid::Uuid::new_v4()),
            created: since.map_or(0, |since| since.as_secs()),
            prompt_tokens: 0,
            completion_tokens: 0,
        }
    }

    /// Whether tokens stay once they are there, so that text can be told before all of it is.
    fn settles(&self) -> bool {
        let default = self
            .model
            .manifest()
            .defaults
            .and_then(|defaults| defaults.sampler);
        let takes_back = match self.asked.sampling.sampler {
            Some(sampler) => matches!(sampler, Sampler::Remask(_)),
            None => matches!(default, Some(crate::diffusion::SamplerKind::Remask { .. })),
        };
        self.model.manifest().graph == GraphKind::Absorbing && !takes_back
    }

    fn filling(&self) -> Filling {
        let when = match self.asked.told {
            Told::Streamed { frames, .. } if frames || self.settles() => v1::frame_policy::When::OnChange,
            Told::Streamed { .. } | Told::Whole { .. } => v1::frame_policy::When::Never,
        };
        Filling {
            sampling: self.asked.sampling,
            frames: v1::FramePolicy {
                when: when.into(),
                keyframes_only: true,
                ..v1::FramePolicy::default()
            },
            // A suffix is there whatever stands before it.
            keep_after_end: self.asked.suffix.is_some(),
            deadline: self.asked.deadline,
        }
    }

    /// What `accepted` says of lengths.
    fn count(&mut self, accepted: &v1::Accepted) {
        let gap: u32 = accepted.template.iter().map(positions).sum();
        self.prompt_tokens += u64::from(accepted.length - gap);
        self.completion_tokens += u64::from(gap) * u64::from(self.asked.samples);
    }

    fn usage(&self) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        })
    }

    /// The object with these `choices`.
    fn object(&self, choices: &[Value]) -> Value {
        json!({
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model.name(),
            "seed": self.asked.seed,
            "choices": choices,
        })
    }

    /// The index of a choice of a prompt.
    fn index(&self, prompt: usize, canvas: u32) -> usize {
        prompt * self.asked.samples as usize + canvas as usize
    }

    /// What of the text of a whole canvas of `prompt` completes it.
    fn completion<'a>(&self, prompt: usize, text: &'a str) -> &'a str {
        let prompt = self.asked.prompts.get(prompt).map_or("", String::as_str);
        let text = text.strip_prefix(prompt).unwrap_or(text);
        let suffix = self.asked.suffix.as_deref().unwrap_or_default();
        text.strip_suffix(suffix).unwrap_or(text)
    }

    /// Whether the network has ended the document, of a canvas of these `tokens`. A suffix is there all the same.
    fn has_ended(&self, tokens: &[Token], committed_at: &[u32]) -> bool {
        let end = self.model.manifest().end_of_document;
        let mut drawn = tokens.iter().zip(committed_at).filter(|(_, at)| **at > 0);
        self.asked.suffix.is_none() && drawn.any(|(token, _)| Some(*token) == end)
    }

    /// The choice that `result` is, of which `order` has told the beginning.
    fn choice(&self, prompt: usize, result: &v1::CanvasResult, order: &mut InOrder) -> Choice {
        let text = order.last(self.completion(prompt, result.text.as_deref().unwrap_or_default()));
        let ended = order.has_stopped() || self.has_ended(&result.tokens, &result.committed_at);
        Choice {
            text,
            finish_reason: if ended { "stop" } else { "length" },
        }
    }

    /// Waits for all results.
    async fn whole(
        mut self,
        running: Vec<Events>,
        logprobs: bool,
        texts: &TextThreads,
    ) -> Result<Response, Refusal> {
        let mut events = merged(running);
        let mut choices = Vec::new();
        while let Some((prompt, event)) = events.next().await {
            let result = match event? {
                Event::Accepted(accepted) => {
                    self.count(&accepted);
                    continue;
                }
                Event::Frame(_) => continue,
                Event::Result(result) => result,
            };
            let choice = self.choice(prompt, &result, &mut InOrder::new(self.asked.stops.clone()));
            let index = self.index(prompt, result.canvas);
            let before = if self.asked.echo {
                self.asked.prompts.get(prompt).cloned().unwrap_or_default()
            } else {
                String::new()
            };
            let logprobs = if logprobs {
                let begin = before.chars().count();
                let end = begin + choice.text.chars().count();
                let (model, ends) = (Arc::clone(&self.model), self.asked.suffix.is_none());
                let read = move || self::logprobs(&model, &result, ends, begin..end);
                texts.run(read).await?
            } else {
                Value::Null
            };
            choices.push((
                index,
                json!({
                    "index": index,
                    "text": before + &choice.text,
                    "logprobs": logprobs,
                    "finish_reason": choice.finish_reason,
                }),
            ));
        }
        choices.sort_by_key(|(index, _)| *index);
        let choices: Vec<Value> = choices.into_iter().map(|(_, choice)| choice).collect();
        let mut object = self.object(&choices);
        object["usage"] = self.usage();
        Ok(answer(&object))
    }

    /// Tells what happens as it happens.
    fn stream(self, running: Vec<Events>, include_usage: bool, frames: bool) -> Response {
        let ending = Ending::default();
        let choices = self.asked.prompts.len() * self.asked.samples as usize;
        let order = (0..choices)
            .map(|_| InOrder::new(self.asked.stops.clone()))
            .collect();
        let telling = Telling {
            settles: self.settles(),
            include_usage,
            frames,
            answer: self,
            order,
            ending: ending.clone(),
            events: Some(merged(running)),
        };
        let chunks = stream::unfold(telling, |mut telling| async move {
            let chunk = telling.next().await?;
            Some((Ok::<_, Infallible>(chunk), telling))
        });
        let mut response = Response::new(Body::from_stream(chunks));
        let headers = response.headers_mut();
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("text/event-stream"),
        );
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
        response.extensions_mut().insert(ending);
        response
    }
}

/// Events of the prompts' requests, each with the number of its prompt.
type Merged = SelectAll<stream::BoxStream<'static, (usize, Result<Event, Status>)>>;

fn merged(running: Vec<Events>) -> Merged {
    let numbered = running.into_iter().enumerate();
    numbered
        .map(|(prompt, events)| events.map(move |event| (prompt, event)).boxed())
        .collect()
}

/// An answer that is streamed.
struct Telling {
    answer: Answer,
    settles: bool,
    include_usage: bool,
    frames: bool,
    /// What is told of each choice.
    order: Vec<InOrder>,
    ending: Ending,
    /// Until all is told.
    events: Option<Merged>,
}

impl Telling {
    /// The next chunks.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            let event = self.events.as_mut()?.next().await;
            let told = match event {
                Some((prompt, Ok(event))) => {
                    let changed = self.changed(prompt, event);
                    if changed.is_empty() {
                        continue;
                    }
                    chunk(&self.answer.object(&changed))
                }
                Some((_, Err(status))) => {
                    self.events = None;
                    let refusal = Refusal::from(status);
                    self.ending.tell(refusal.code);
                    chunk(&refusal.body())
                }
                None => {
                    self.events = None;
                    self.ending.tell(Code::Ok);
                    let mut last = String::new();
                    if self.include_usage {
                        let mut object = self.answer.object(&[]);
                        object["usage"] = self.answer.usage();
                        last = chunk(&object);
                    }
                    last + "data: [DONE]\n\n"
                }
            };
            return Some(told.into());
        }
    }

    /// What `event` changes of which choices.
    fn changed(&mut self, prompt: usize, event: Event) -> Vec<Value> {
        let Answer { asked, .. } = &self.answer;
        let told = |index, text: &str, reason: Option<&str>| json!({"index": index, "text": text, "logprobs": null, "finish_reason": reason});
        match event {
            Event::Accepted(accepted) => {
                let text = asked
                    .prompts
                    .get(prompt)
                    .filter(|text| asked.echo && !text.is_empty());
                let choices = text.map(|text| {
                    let all = (0..asked.samples).map(|canvas| self.answer.index(prompt, canvas));
                    all.map(|index| told(index, text, None)).collect()
                });
                self.answer.count(&accepted);
                choices.unwrap_or_default()
            }
            Event::Frame(frame) => {
                let index = self.answer.index(prompt, frame.canvas);
                let text = frame.text.as_deref().unwrap_or_default();
                let completion = self.answer.completion(prompt, text);
                let settled = match completion.find(MASKED) {
                    Some(masked) if self.settles && !self.has_end(&frame) => &completion[..masked],
                    // The result is next.
                    Some(_) | None => "",
                };
                let new = self.order.get_mut(index).map(|order| order.more(settled));
                let mut choice = told(index, &new.unwrap_or_default(), None);
                if self.frames {
                    choice["canvas"] = json!({
                        "text": text,
                        "step": frame.step,
                        "total": frame.total,
                        "masked": frame.masked,
                        "nfe": frame.nfe,
                    });
                } else if choice["text"] == "" {
                    return Vec::new();
                }
                vec![choice]
            }
            Event::Result(result) => {
                let index = self.answer.index(prompt, result.canvas);
                let choice = self
                    .order
                    .get_mut(index)
                    .map(|order| self.answer.choice(prompt, &result, order));
                choice
                    .map(|choice| told(index, &choice.text, Some(choice.finish_reason)))
                    .into_iter()
                    .collect()
            }
        }
    }

    /// Whether the document ends somewhere on the canvas: where its text does, the result tells.
    fn has_end(&self, frame: &v1::Frame) -> bool {
        let Some(Content::Keyframe(keyframe)) = &frame.content else {
            return true;
        };
        self.answer.has_ended(&keyframe.tokens, &keyframe.committed_at)
    }
}

/// The tokens that were drawn, as text, with their log-probabilities and where they stand in the characters of the text, of
/// which `told` are told: what comes after them is left out. `ends`: a document ends where its token says so.
fn logprobs(
    model: &ServedModel,
    result: &v1::CanvasResult,
    ends: bool,
    told: Range<usize>,
) -> Result<Value, Status> {
    let tokenizer: &TextTokenizer = tokenizer(model)?;
    let end_of_document = model.manifest().end_of_document.filter(|_| ends);
    let (mut tokens, mut values, mut offsets) = (Vec::new(), Vec::new(), Vec::new());
    let mut offset = told.start;
    for (at, (token, value)) in result.tokens.iter().zip(&result.log_probabilities).enumerate() {
        if result.committed_at.get(at).is_none_or(|step| *step == 0) {
            continue;
        }
        if Some(*token) == end_of_document || offset >= told.end {
            break;
        }
        let text = one(tokenizer, &result.tokens[..at], *token)?;
        offsets.push(offset);
        offset += text.chars().count();
        tokens.push(text);
        values.push(*value);
    }
    Ok(json!({
        "tokens": tokens,
        "token_logprobs": values,
        "top_logprobs": null,
        "text_offset": offsets,
    }))
}

fn chunk(object: &Value) -> String {
    format!("data: {object}\n\n")
}

/// Positions to fill of a part.
fn positions(part: &v1::TemplatePart) -> u32 {
    match &part.part {
        Some(v1::template_part::Part::Gap(gap)) => gap.positions,
        Some(
            v1::template_part::Part::Text(_)
            | v1::template_part::Part::Tokens(_)
            | v1::template_part::Part::Draft(_),
        )
        | None => 0,
    }
}

/// How `token` reads after those `before` it.
fn one(tokenizer: &TextTokenizer, before: &[Token], token: Token) -> Result<String, Status> {
    tokenizer.decode_after(before, &[token]).map_err(|error| {
        tracing::error!(%error, "tokens could not be decoded");
        Status::internal("the tokens could not be decoded; the server's log has the details")
    })
}
