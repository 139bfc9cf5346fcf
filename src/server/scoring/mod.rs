//! `Score` and `Choose`: how likely texts are.

#[cfg(test)]
mod fuzz_test;
mod read;
mod stream;

use std::sync::Arc;
use std::time::Instant;

use futures_util::stream::BoxStream;
use tonic::{Request, Status};

use self::read::Document;
use super::Service;
use super::access::Notes;
use super::diffusion_service::Arrival;
use super::request;
use super::status::FieldError;
use super::stream::deliver;
use crate::config::LimitsConfig;
use crate::diffusion::GraphKind;
use crate::diffusion::likelihood::{Likelihood, Order};
use crate::engine::{AdmitError, Deadline, NoRoom, ScoreRequest, ScoringRun, TextScore};
use crate::models::ServedModel;
use crate::proto::v1;
use crate::proto::v1::score_response::Event;

/// Evaluations of a bound, where none are asked for.
pub(super) const DEFAULT_DRAWS: u32 = 128;
/// Evaluations of a bound, at least: fewer say nothing of its error.
pub(super) const MIN_DRAWS: u32 = 4;

/// The bound, where no number of evaluations is asked for.
fn default_bound(limits: &LimitsConfig) -> Likelihood {
    Likelihood::Bound {
        draws: DEFAULT_DRAWS.min(limits.max_steps).max(MIN_DRAWS),
    }
}

/// Events of a request to score.
pub(super) type Events = BoxStream<'static, Result<Event, Status>>;

/// What both calls say.
struct Words {
    model: Arc<ServedModel>,
    likelihood: Likelihood,
    seed: Option<u64>,
    id: String,
    priority: i32,
    deadline: Option<Deadline>,
    caller: crate::engine::Caller,
    notes: Notes,
}

impl Words {
    /// The request to score `documents`.
    fn request(&self, documents: &[Document]) -> ScoreRequest {
        ScoreRequest {
            id: self.id.clone(),
            caller: self.caller.clone(),
            model: Arc::clone(&self.model),
            texts: documents
                .iter()
                .flat_map(|document| document.sequences.clone())
                .collect(),
            likelihood: self.likelihood,
            seed: self.seed.unwrap_or_default(),
            deadline: self.deadline,
            priority: self.priority,
        }
    }

    fn model_reference(&self) -> v1::ModelReference {
        v1::ModelReference {
            name: self.model.name().to_owned(),
            version: self.model.version(),
        }
    }
}

impl Service {
    #[expect(clippy::too_many_arguments, reason = "the fields that two messages share")]
    fn words(
        &self,
        arrival: Arrival,
        model: Option<v1::ModelReference>,
        likelihood: Option<v1::Likelihood>,
        default: impl Fn(GraphKind) -> Likelihood,
        seed: Option<u64>,
        request_id: String,
        priority: i32,
    ) -> Result<Words, Status> {
        let deadline = arrival.deadline(None)?;
        let model = self.model(&arrival.principal, model)?;
        let graph = model.manifest().graph;
        let likelihood = read::likelihood(likelihood, default(graph), graph, &self.limits)?;
        let seed = match (likelihood, seed) {
            (Likelihood::Bound { .. }, seed) => Some(seed.unwrap_or_else(request::drawn_seed)),
            (Likelihood::Exact(_), None) => None,
            (Likelihood::Exact(_), Some(_)) => {
                let problem = "is for bounds; an exact likelihood draws nothing";
                return Err(FieldError::new("seed", problem).into());
            }
        };
        let id = request::id(request_id)?;
        arrival.notes.asks(&id, &model);
        Ok(Words {
            model,
            likelihood,
            seed,
            id,
            priority,
            deadline,
            caller: arrival.principal.caller().clone(),
            notes: arrival.notes,
        })
    }

    pub(super) async fn score_texts(&self, request: Request<v1::ScoreRequest>) -> Result<Events, Status> {
        let arrival = Arrival::of(&request);
        let asked = request.into_inner();
        let bound = |_| default_bound(&self.limits);
        let words = self.words(
            arrival,
            asked.model,
            asked.likelihood,
            bound,
            asked.seed,
            asked.request_id,
            asked.priority,
        )?;
        let (service, id, until) = (self.clone(), words.id.clone(), words.deadline);
        let start = move || {
            let documents = read::documents(asked.texts, &words.model, &service.limits)?;
            let run = service.admit(&words, &documents, "texts")?;
            Ok(stream::events(accepted(&words, &run), run, documents))
        };
        Ok(deliver(
            self.text.run(start).await?,
            id,
            self.unread,
            until.map(|deadline| deadline.at),
            Arc::clone(&self.engine),
        ))
    }

    pub(super) async fn choose_among(
        &self,
        request: Request<v1::ChooseRequest>,
    ) -> Result<v1::ChooseResponse, Status> {
        let arrival = Arrival::of(&request);
        let asked = request.into_inner();
        let default = |graph| match graph {
            GraphKind::Absorbing => Likelihood::Exact(Order::LeftToRight),
            GraphKind::Uniform => default_bound(&self.limits),
        };
        let words = self.words(
            arrival,
            asked.model,
            asked.likelihood,
            default,
            asked.seed,
            asked.request_id,
            asked.priority,
        )?;
        let service = self.clone();
        let start = move || {
            let candidates = read::candidates(
                asked.before,
                asked.candidates,
                asked.after,
                &words.model,
                &service.limits,
            )?;
            let run = service.admit(&words, &candidates, "candidates")?;
            Ok((run, words))
        };
        let (mut run, words) = self.text.run(start).await?;
        let scores = match words.deadline {
            Some(deadline) => tokio::time::timeout_at(deadline.at.into(), stream::all(&mut run)).await,
            None => Ok(stream::all(&mut run).await),
        };
        let scores = scores.map_err(|_| Status::from(crate::engine::Failure::Deadline))??;
        Ok(v1::ChooseResponse {
            candidates: chosen(&scores),
            model: Some(words.model_reference()),
            likelihood: Some(read::told(words.likelihood)),
            seed: words.seed,
            nfe: scores.iter().map(|score| u64::from(score.evaluations)).sum(),
        })
    }

    fn admit(&self, words: &Words, documents: &[Document], field: &str) -> Result<ScoringRun, Status> {
        let run = self.engine.score(&words.request(documents)).map_err(|refusal| {
            if let AdmitError::NoRoom(room @ NoRoom::Request(_)) = refusal {
                return Status::from(FieldError::new(
                    field,
                    format!("{room}; ask for fewer texts or draws"),
                ));
            }
            Status::from(refusal)
        })?;
        words.notes.spends(&run.spent);
        Ok(run)
    }
}

/// What is told of a request that is admitted.
fn accepted(words: &Words, run: &ScoringRun) -> v1::ScoreAccepted {
    v1::ScoreAccepted {
        request_id: words.id.clone(),
        model: Some(words.model_reference()),
        likelihood: Some(read::told(words.likelihood)),
        seed: words.seed,
        total: run.scores.borrow().total,
        deadline_ms: words.deadline.map(|deadline| {
            let left = deadline.at.saturating_duration_since(Instant::now());
            u64::try_from(left.as_millis()).unwrap_or(u64::MAX)
        }),
        predicted_seconds: run.predicted.as_secs_f64(),
    }
}

/// Candidates by their scores, with their shares of what all of them have together.
fn chosen(scores: &[Arc<TextScore>]) -> Vec<v1::CandidateScore> {
    let least = scores
        .iter()
        .map(|score| score.estimate.nats)
        .fold(f64::INFINITY, f64::min);
    // Where all are impossible none is more so than another.
    let weight = |nats: f64| {
        if least.is_finite() {
            (least - nats).exp()
        } else {
            1.0
        }
    };
    let all: f64 = scores.iter().map(|score| weight(score.estimate.nats)).sum();
    scores
        .iter()
        .map(|score| v1::CandidateScore {
            log_probability: -score.estimate.nats,
            probability: weight(score.estimate.nats) / all,
            standard_error: score.estimate.standard_error,
            tokens: score.scored,
        })
        .collect()
}
