//! Who passes: whose token came with a request is found out first, so that the log can tell, and who must have one is
//! turned away last, so that refusals are counted.

use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::caller::Principal;
use super::openai;
use super::status;
use super::tokens::{Tokens, Unknown};
use crate::config::{ServerConfig, Who};

/// What a path asks of whoever comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Needs {
    /// Nothing: probes have no tokens.
    Nothing,
    /// Any token.
    Token,
    /// That of an admin: it tells what others do, or changes what they get.
    Admin,
}

/// Who may ask for what is no request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    pub(super) metrics: Who,
    reflection: Who,
    control: Who,
}

impl Rules {
    /// As configured.
    pub(super) fn of(config: &ServerConfig) -> Self {
        Self {
            metrics: config.metrics,
            reflection: config.reflection,
            control: config.model_control,
        }
    }

    fn needs(self, path: &str) -> Needs {
        let who = match path {
            "/healthz" | "/readyz" => Who::Everybody,
            "/metrics" => self.metrics,
            "/denoised.v1.ModelService/LoadModel"
            | "/denoised.v1.ModelService/UnloadModel"
            | "/inference.GRPCInferenceService/RepositoryModelLoad"
            | "/inference.GRPCInferenceService/RepositoryModelUnload" => self.control,
            "/inference.GRPCInferenceService/ServerLive" | "/inference.GRPCInferenceService/ServerReady" => {
                Who::Everybody
            }
            _ if path.starts_with("/grpc.health.v1.Health/") => Who::Everybody,
            _ if path.starts_with("/grpc.reflection.") => self.reflection,
            _ => Who::Callers,
        };
        match who {
            Who::Everybody => Needs::Nothing,
            Who::Callers => Needs::Token,
            // That it is off is nobody else's to know.
            Who::Admins | Who::Nobody => Needs::Admin,
        }
    }
}

/// Finds out whose token a request has, where there are tokens.
pub(super) async fn identify(
    State(tokens): State<Option<Tokens>>,
    mut request: Request,
    next: Next,
) -> Response {
    if let Some(tokens) = &tokens {
        match tokens.principal(request.headers()) {
            Ok(principal) => drop(request.extensions_mut().insert(principal)),
            Err(unknown) => drop(request.extensions_mut().insert(unknown)),
        }
        // Nothing that follows has any use for it.
        request.headers_mut().remove(header::AUTHORIZATION);
    }
    next.run(request).await
}

/// Turns away who lacks what the path needs.
pub(super) async fn require(State(rules): State<Rules>, request: Request, next: Next) -> Response {
    let needs = rules.needs(request.uri().path());
    let speaks_grpc = request
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
    if needs == Needs::Nothing {
        return next.run(request).await;
    }
    if let Some(unknown) = request.extensions().get::<Unknown>().copied() {
        if speaks_grpc {
            return status::unauthenticated(unknown).into_http();
        }
        if request.uri().path().starts_with("/v1/") {
            return openai::unauthenticated(unknown);
        }
        let mut response = (StatusCode::UNAUTHORIZED, format!("{unknown}\n")).into_response();
        let scheme = HeaderValue::from_static("Bearer");
        response.headers_mut().insert(header::WWW_AUTHENTICATE, scheme);
        return response;
    }
    if needs == Needs::Admin && !Principal::behind(request.extensions()).is_admin() {
        if speaks_grpc {
            return status::denied("this needs the token of an admin").into_http();
        }
        return (StatusCode::FORBIDDEN, "this needs the token of an admin\n").into_response();
    }
    next.run(request).await
}
