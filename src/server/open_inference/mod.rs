//! `inference.GRPCInferenceService`: the Open Inference Protocol of KServe and Triton, in the words of our own services.

mod infer;
mod parameters;
mod tensors;

use tonic::{Request, Response, Status};

use super::Service;
use super::caller::Principal;
use super::model_service::MAX_REFUSED;
use super::status::FieldError;
use crate::diffusion::GraphKind;
use crate::models::ModelState;
use crate::proto::inference as open;
use crate::proto::inference::grpc_inference_service_server::GrpcInferenceService;
use crate::proto::v1;
use crate::proto::v1::model_service_server::ModelService;

/// The model that `name` and `version` mean, which are called `name` and `version` with `prefix` before them.
fn reference(prefix: &str, name: String, version: &str) -> Result<v1::ModelReference, FieldError> {
    let version = if version.is_empty() {
        0
    } else {
        let parsed = version.parse().ok().filter(|version| *version > 0);
        parsed.ok_or_else(|| {
            let problem = format!("is {version:?}, must be empty or a number from 1");
            FieldError::new(format!("{prefix}version"), problem)
        })?
    };
    Ok(v1::ModelReference { name, version })
}

/// Refuses a repository by name: there is one, which has none.
fn only_repository(name: &str) -> Result<(), FieldError> {
    if name.is_empty() {
        return Ok(());
    }
    let problem = format!("is {name:?}, must be empty: there is one repository");
    Err(FieldError::new("repository_name", problem))
}

/// Refuses parameters that are none of `known`.
fn only_known<V>(
    parameters: &std::collections::HashMap<String, V>,
    known: &[&str],
) -> Result<(), FieldError> {
    match parameters.keys().find(|name| !known.contains(&name.as_str())) {
        Some(name) => Err(parameters::unknown("parameters", name, known)),
        None => Ok(()),
    }
}

#[tonic::async_trait]
impl GrpcInferenceService for Service {
    async fn server_live(
        &self,
        _request: Request<open::ServerLiveRequest>,
    ) -> Result<Response<open::ServerLiveResponse>, Status> {
        Ok(Response::new(open::ServerLiveResponse { live: true }))
    }

    async fn server_ready(
        &self,
        _request: Request<open::ServerReadyRequest>,
    ) -> Result<Response<open::ServerReadyResponse>, Status> {
        let ready = *self.ready.borrow();
        Ok(Response::new(open::ServerReadyResponse { ready }))
    }

    async fn model_ready(
        &self,
        request: Request<open::ModelReadyRequest>,
    ) -> Result<Response<open::ModelReadyResponse>, Status> {
        let principal = Principal::of(&request);
        let open::ModelReadyRequest { name, version } = request.into_inner();
        let model = self.model(&principal, Some(reference("", name, &version)?));
        // Of one that is not there the protocol says that it is not ready.
        let ready = model.is_ok_and(|model| self.engine.state(&model) == ModelState::Ready);
        Ok(Response::new(open::ModelReadyResponse { ready }))
    }

    async fn server_metadata(
        &self,
        _request: Request<open::ServerMetadataRequest>,
    ) -> Result<Response<open::ServerMetadataResponse>, Status> {
        let extensions = ["model_repository", "model_repository(unload_dependents)"];
        Ok(Response::new(open::ServerMetadataResponse {
            name: env!("CARGO_PKG_NAME").to_owned(),
            version: self.told.version.clone(),
            extensions: extensions.map(str::to_owned).into(),
        }))
    }

    async fn model_metadata(
        &self,
        request: Request<open::ModelMetadataRequest>,
    ) -> Result<Response<open::ModelMetadataResponse>, Status> {
        let principal = Principal::of(&request);
        let open::ModelMetadataRequest { name, version } = request.into_inner();
        let model = self.model(&principal, Some(reference("", name, &version)?))?;
        let models = self.models.now();
        let versions = models.iter().filter(|other| other.name() == model.name());
        Ok(Response::new(open::ModelMetadataResponse {
            name: model.name().to_owned(),
            versions: versions.map(|other| other.version().to_string()).collect(),
            platform: match model.manifest().graph {
                GraphKind::Absorbing => "denoised_absorbing".to_owned(),
                GraphKind::Uniform => "denoised_uniform".to_owned(),
            },
            inputs: vec![tensors::input_metadata()],
            outputs: tensors::Output::ALL.map(tensors::Output::metadata).into(),
        }))
    }

    async fn model_infer(
        &self,
        request: Request<open::ModelInferRequest>,
    ) -> Result<Response<open::ModelInferResponse>, Status> {
        self.infer(request).await.map(Response::new)
    }

    async fn repository_index(
        &self,
        request: Request<open::RepositoryIndexRequest>,
    ) -> Result<Response<open::RepositoryIndexResponse>, Status> {
        use open::repository_index_response::ModelIndex;
        let principal = Principal::of(&request);
        let open::RepositoryIndexRequest {
            repository_name,
            ready,
        } = request.into_inner();
        only_repository(&repository_name)?;
        let now = self.models.now();
        let served = now.iter().map(|model| {
            let (state, reason) = match self.engine.state(model) {
                ModelState::Unloaded => ("UNAVAILABLE", "loaded when a request asks for it".to_owned()),
                ModelState::Loading => ("LOADING", String::new()),
                ModelState::Ready => ("READY", String::new()),
                ModelState::Failed { reason, .. } => ("UNAVAILABLE", reason),
            };
            (model.name(), model.version(), state, reason)
        });
        let refused = now
            .refused()
            .take(MAX_REFUSED)
            .map(|(name, version, reason)| (name, version, "UNAVAILABLE", reason.to_owned()));
        let mut models: Vec<_> = served
            .chain(refused)
            .filter(|(name, _, state, _)| principal.may_use(name) && (!ready || *state == "READY"))
            .collect();
        models.sort_by_key(|(name, version, _, _)| (*name, *version));
        let models = models
            .into_iter()
            .map(|(name, version, state, reason)| ModelIndex {
                name: name.to_owned(),
                version: version.to_string(),
                state: state.to_owned(),
                reason,
            });
        Ok(Response::new(open::RepositoryIndexResponse {
            models: models.collect(),
        }))
    }

    async fn repository_model_load(
        &self,
        request: Request<open::RepositoryModelLoadRequest>,
    ) -> Result<Response<open::RepositoryModelLoadResponse>, Status> {
        let (metadata, extensions, asked) = request.into_parts();
        only_repository(&asked.repository_name)?;
        only_known(&asked.parameters, &[])?;
        let load = v1::LoadModelRequest {
            model: Some(reference("model_", asked.model_name, "")?),
        };
        self.load_model(Request::from_parts(metadata, extensions, load))
            .await?;
        Ok(Response::new(open::RepositoryModelLoadResponse {}))
    }

    async fn repository_model_unload(
        &self,
        request: Request<open::RepositoryModelUnloadRequest>,
    ) -> Result<Response<open::RepositoryModelUnloadResponse>, Status> {
        let (metadata, extensions, asked) = request.into_parts();
        only_repository(&asked.repository_name)?;
        only_known(&asked.parameters, &["unload_dependents"])?;
        let unload = v1::UnloadModelRequest {
            model: Some(reference("model_", asked.model_name, "")?),
        };
        self.unload_model(Request::from_parts(metadata, extensions, unload))
            .await?;
        Ok(Response::new(open::RepositoryModelUnloadResponse {}))
    }
}
