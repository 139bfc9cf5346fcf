//! `denoised.v1.ModelService`: what is served, with its limits.

use std::sync::Arc;
use std::time::Instant;

use tonic::{Request, Response, Status};

use super::caller::Principal;
use super::following::Wish;
use super::repository::ControlError;
use super::{Service, sampler, status};
use crate::diffusion::{GraphKind, Schedule};
use crate::engine::AdmitError;
use crate::models::{ModelState, Models, ServedModel};
use crate::proto::v1;
use crate::proto::v1::model_service_server::ModelService;

/// Versions that ListModels tells the refusal of; operators look at the log for more.
pub(super) const MAX_REFUSED: usize = 100;

impl Service {
    fn describe(&self, principal: &Principal, model: &Arc<ServedModel>, models: &Models) -> v1::Model {
        let manifest = model.manifest();
        let schedule = match manifest.schedule {
            Schedule::LogLinear { eps } => v1::schedule::Schedule::LogLinear(v1::LogLinear { eps }),
            Schedule::Geometric { sigma_min, sigma_max } => {
                v1::schedule::Schedule::Geometric(v1::Geometric { sigma_min, sigma_max })
            }
        };
        let graph = match manifest.graph {
            GraphKind::Absorbing => v1::Graph::Absorbing,
            GraphKind::Uniform => v1::Graph::Uniform,
        };
        let default = models.default_model();
        let (state, state_reason) = match self.engine.state(model) {
            ModelState::Unloaded => (v1::ModelState::Unloaded, String::new()),
            ModelState::Loading => (v1::ModelState::Loading, String::new()),
            ModelState::Ready => (v1::ModelState::Ready, String::new()),
            ModelState::Failed { reason, .. } => (v1::ModelState::Failed, reason),
        };
        v1::Model {
            name: model.name().to_owned(),
            version: model.version(),
            is_default: default.is_some_and(|d| Arc::ptr_eq(&d, model)),
            graph: graph.into(),
            schedule: Some(v1::Schedule {
                schedule: Some(schedule),
            }),
            vocab_size: manifest.vocab_size as u32,
            mask_token: manifest.mask_token,
            end_of_document: manifest.end_of_document,
            has_tokenizer: model.tokenizer().is_some(),
            limits: Some(v1::Limits {
                max_length: manifest.max_length as u32,
                ..self.limits_of(principal)
            }),
            state: state.into(),
            state_reason,
            provenance_json: manifest.provenance.to_string(),
            defaults: manifest.defaults.map(|defaults| v1::SamplingDefaults {
                sampling: Some(v1::Sampling {
                    sampler: defaults.sampler.map(|sampler| sampler::told(sampler, false)),
                    steps: defaults.steps,
                    temperature: defaults.temperature,
                    top_p: defaults.top_p,
                    ..v1::Sampling::default()
                }),
                length: defaults.length.map(|length| length as u32),
            }),
            excluded_tokens: manifest.excluded_tokens.clone(),
            samplers: sampler::that_fit(manifest.graph).map(str::to_owned).collect(),
        }
    }

    /// What is told of a version that `principal` asks for by its number, where it is refused.
    fn refused(&self, principal: &Principal, asked: Option<&v1::ModelReference>) -> Option<v1::Model> {
        let v1::ModelReference { name, version } = asked?;
        let models = self.models.now();
        let reason = models.refusal(name, *version)?;
        principal.may_use(name).then(|| refused(name, *version, reason))
    }

    /// Has `wish` done with the model that is `asked` for, where `principal` may.
    async fn order(
        &self,
        principal: &Principal,
        wish: Wish,
        asked: Option<v1::ModelReference>,
    ) -> Result<Vec<Arc<ServedModel>>, Status> {
        let Some(control) = &self.control else {
            return Err(status::denied("server.model_control is off"));
        };
        let v1::ModelReference { name, version } = asked.unwrap_or_default();
        if name.is_empty() {
            return Err(status::FieldError::new("model.name", "is empty, must be that of a model").into());
        }
        if !principal.may_use(&name) {
            return Err(ControlError::Unknown(name).into());
        }
        let ordered = control.order(wish, name, (version > 0).then_some(version)).await;
        // Who carries orders out goes first.
        if self.engine.is_draining() && matches!(ordered, Err(ControlError::NoRepository)) {
            return Err(AdmitError::Draining.into());
        }
        Ok(ordered?)
    }

    /// Waits until a model is loaded; whoever does not want to wait any more ends the call.
    async fn loaded(&self, model: &Arc<ServedModel>) -> Result<(), Status> {
        let mut changes = self.engine.changes();
        loop {
            changes.mark_unchanged();
            match self.engine.state(model) {
                ModelState::Ready => return Ok(()),
                ModelState::Failed { reason, retry_at } => {
                    let after = retry_at.saturating_duration_since(Instant::now());
                    let message = format!("{model} cannot be loaded: {reason}");
                    return Err(status::model_failed(message, model.to_string(), after));
                }
                // Again, where it had to make room meanwhile.
                ModelState::Unloaded if model.is_retired() => {
                    return Err(ControlError::Unknown(model.to_string()).into());
                }
                ModelState::Unloaded => self.engine.prepare(model),
                ModelState::Loading => {}
            }
            if changes.changed().await.is_err() {
                return Err(ControlError::NoRepository.into());
            }
        }
    }
}

fn refused(name: &str, version: u64, reason: &str) -> v1::Model {
    v1::Model {
        name: name.to_owned(),
        version,
        state: v1::ModelState::Refused.into(),
        state_reason: reason.to_owned(),
        ..v1::Model::default()
    }
}

#[tonic::async_trait]
impl ModelService for Service {
    async fn list_models(
        &self,
        request: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        let now = self.models.now();
        let principal = Principal::of(&request);
        let own = now.iter().filter(|model| principal.may_use(model.name()));
        let models = own.map(|model| self.describe(&principal, model, &now)).collect();
        let refused = now
            .refused()
            .filter(|(name, _, _)| principal.may_use(name))
            .map(|(name, version, reason)| refused(name, version, reason))
            .take(MAX_REFUSED)
            .collect();
        Ok(Response::new(v1::ListModelsResponse { models, refused }))
    }

    async fn get_model(
        &self,
        request: Request<v1::GetModelRequest>,
    ) -> Result<Response<v1::GetModelResponse>, Status> {
        let principal = Principal::of(&request);
        let asked = request.into_inner().model;
        let model = match self.refused(&principal, asked.as_ref()) {
            Some(refused) => refused,
            None => self.describe(&principal, &self.model(&principal, asked)?, &self.models.now()),
        };
        Ok(Response::new(v1::GetModelResponse { model: Some(model) }))
    }

    async fn load_model(
        &self,
        request: Request<v1::LoadModelRequest>,
    ) -> Result<Response<v1::LoadModelResponse>, Status> {
        let principal = Principal::of(&request);
        let loaded = self
            .order(&principal, Wish::Load, request.into_inner().model)
            .await?;
        let mut model = None;
        for loaded in &loaded {
            self.loaded(loaded).await?;
            model = Some(self.describe(&principal, loaded, &self.models.now()));
        }
        Ok(Response::new(v1::LoadModelResponse { model }))
    }

    async fn unload_model(
        &self,
        request: Request<v1::UnloadModelRequest>,
    ) -> Result<Response<v1::UnloadModelResponse>, Status> {
        let principal = Principal::of(&request);
        let unloaded = self
            .order(&principal, Wish::Unload, request.into_inner().model)
            .await?;
        let unloaded = unloaded.iter().map(|model| v1::ModelReference {
            name: model.name().to_owned(),
            version: model.version(),
        });
        Ok(Response::new(v1::UnloadModelResponse {
            unloaded: unloaded.collect(),
        }))
    }
}
