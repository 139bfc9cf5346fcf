//! OpenAI's API of completions, over plain HTTP: what most tools speak.
//!
//! `/v1/models`, `/v1/models/MODEL` and `/v1/completions`, whose `suffix` makes a gap between two texts. What diffusion
//! cannot express is refused by name, and what is ours alone is asked for in fields of our own (`steps`, `frames`, ...).

mod completions;
mod errors;
mod in_order;
mod request;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, Request, State};
use axum::response::Response;
use axum::routing::{any, get, post};
use serde_json::{Value, json};

use super::Service;
use super::caller::Principal;
use super::models::parse_reference;
use super::status::FieldError;
use crate::config::ServerConfig;
use crate::models::ServedModel;
use crate::proto::v1;
use errors::{Refusal, answer};

pub(super) use errors::unauthenticated;

/// What every call knows.
#[derive(Clone, Debug)]
struct Face {
    service: Service,
    /// Bytes of a request, at most.
    max_bytes: usize,
    /// How long a client may take to send one.
    patience: Duration,
}

/// The routes.
pub(super) fn routes(service: Service, config: &ServerConfig) -> Router {
    Router::new()
        .route("/v1/models", get(list_models))
        .route("/v1/models/{*model}", get(get_model))
        .route("/v1/completions", post(completions::complete))
        .route("/v1/{*path}", any(elsewhere))
        .with_state(Arc::new(Face {
            service,
            max_bytes: config.max_message_bytes,
            patience: Duration::from_secs(config.handshake_seconds),
        }))
}

impl Face {
    /// The model that `NAME` or `NAME@VERSION` names; the default one for none.
    fn model(&self, principal: &Principal, asked: &str) -> Result<Arc<ServedModel>, Refusal> {
        let Some((name, version)) = parse_reference(asked) else {
            let problem = format!("is {asked:?}, must be NAME or NAME@VERSION");
            return Err(FieldError::new("model", problem).into());
        };
        let named = (!asked.is_empty()).then(|| v1::ModelReference {
            name: name.to_owned(),
            version: version.unwrap_or(0),
        });
        Ok(self.service.model(principal, named)?)
    }
}

fn described(name: &str) -> Value {
    json!({"id": name, "object": "model", "created": 0, "owned_by": "denoised"})
}

async fn list_models(State(face): State<Arc<Face>>, request: Request) -> Response {
    let principal = Principal::behind(request.extensions());
    let models = face.service.models.now();
    let own = models.iter().map(|model| model.name());
    let mut names: Vec<&str> = own.filter(|name| principal.may_use(name)).collect();
    names.dedup();
    let data: Vec<Value> = names.into_iter().map(described).collect();
    answer(&json!({"object": "list", "data": data}))
}

async fn get_model(
    State(face): State<Arc<Face>>,
    Path(asked): Path<String>,
    request: Request,
) -> Result<Response, Refusal> {
    let principal = Principal::behind(request.extensions());
    face.model(&principal, &asked)?;
    Ok(answer(&described(&asked)))
}

async fn elsewhere(request: Request) -> Refusal {
    let path = request.uri().path();
    Refusal::unknown_path(format!(
        "{path} is not served: there are /v1/models and /v1/completions (models that are no chat models complete text)"
    ))
}
