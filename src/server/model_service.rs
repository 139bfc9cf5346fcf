//! `denoised.v1.ModelService`: what is served, with its limits.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use super::caller::Principal;
use super::{Service, sampler};
use crate::diffusion::{GraphKind, Schedule};
use crate::models::{ModelState, Models, ServedModel};
use crate::proto::v1;
use crate::proto::v1::model_service_server::ModelService;

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
        Ok(Response::new(v1::ListModelsResponse { models }))
    }

    async fn get_model(
        &self,
        request: Request<v1::GetModelRequest>,
    ) -> Result<Response<v1::GetModelResponse>, Status> {
        let principal = Principal::of(&request);
        let model = self.model(&principal, request.into_inner().model)?;
        Ok(Response::new(v1::GetModelResponse {
            model: Some(self.describe(&principal, &model, &self.models.now())),
        }))
    }
}
