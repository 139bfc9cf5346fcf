//! Plain HTTP beside gRPC, on the same port: health for those who speak no gRPC, and metrics.

use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::sync::watch;
use tonic::service::Routes;
use tonic_web::GrpcWebLayer;

use super::authentication::{self, Rules};
use super::metrics::{Format, Metrics};
use super::page;
use super::tokens::Tokens;
use crate::config::Who;

/// What is served over plain HTTP.
#[derive(Clone, Debug)]
pub(super) struct Plain {
    /// Whether requests are taken: what gRPC's health says.
    pub(super) ready: watch::Receiver<bool>,
    /// Numbers of the server.
    pub(super) metrics: Arc<Metrics>,
    /// Who may ask for what.
    pub(super) rules: Rules,
    /// Tokens of those who may ask, where not everybody may.
    pub(super) tokens: Option<Tokens>,
    /// OpenAI's API, where it is spoken.
    pub(super) openai: Option<Router>,
    /// Whether there is a page for browsers.
    pub(super) page: bool,
}

impl Plain {
    /// Routes for clients that speak HTTP/1; of gRPC's calls those of browsers, where there is a page for them.
    pub(super) fn http1(self, routes: Routes) -> Router {
        let grpc = if self.page {
            self.grpc(routes).layer(middleware::from_fn(of_browsers))
        } else {
            Router::new()
        };
        self.routes(grpc).fallback(elsewhere)
    }

    /// Routes for clients that speak HTTP/2: gRPC and the same.
    pub(super) fn http2(self, routes: Routes) -> Router {
        let grpc = self.grpc(routes);
        self.routes(grpc)
    }

    /// gRPC, counted, and where there is a page gRPC-Web, which is gRPC inside of what browsers can say. Nothing allows
    /// other origins to use it: a browser asks before it sends them such calls, and gets no answer.
    fn grpc(&self, routes: Routes) -> Router {
        let counted = middleware::from_fn_with_state(Arc::clone(&self.metrics), count);
        let grpc = routes
            .into_axum_router()
            .layer(middleware::from_fn_with_state(
                self.rules,
                authentication::require,
            ))
            .layer(counted);
        if self.page {
            grpc.layer(GrpcWebLayer::new())
        } else {
            grpc
        }
    }

    fn routes(self, router: Router) -> Router {
        let plain = Router::new()
            .route("/healthz", get(|| async { "the server runs\n" }))
            .route("/readyz", get(readiness))
            .route("/metrics", get(metrics))
            .layer(middleware::from_fn_with_state(
                self.rules,
                authentication::require,
            ))
            .with_state(self.clone());
        let counted = middleware::from_fn_with_state(Arc::clone(&self.metrics), count);
        let required = middleware::from_fn_with_state(self.rules, authentication::require);
        let plain = match self.openai {
            Some(openai) => plain.merge(openai.layer(required).layer(counted)),
            None => plain,
        };
        let plain = if self.page {
            plain.merge(page::routes())
        } else {
            plain
        };
        let identify = middleware::from_fn_with_state(self.tokens, authentication::identify);
        router.merge(plain).layer(identify).with_state(())
    }
}

async fn readiness(State(plain): State<Plain>) -> Response {
    if *plain.ready.borrow() {
        "requests are taken\n".into_response()
    } else {
        let why = "no requests are taken: the server is going away, or has no model that can be run\n";
        (StatusCode::SERVICE_UNAVAILABLE, why).into_response()
    }
}

async fn metrics(State(plain): State<Plain>, headers: HeaderMap) -> Response {
    if plain.rules.metrics == Who::Nobody {
        return (StatusCode::NOT_FOUND, "metrics are off (server.metrics)\n").into_response();
    }
    let format = Format::asked(&headers);
    match plain.metrics.text(format) {
        Ok(text) => {
            let mut response = text.into_response();
            let headers = response.headers_mut();
            headers.insert(header::CONTENT_TYPE, format.content_type());
            response
        }
        Err(error) => {
            tracing::error!(%error, "the metrics could not be written");
            StatusCode::INTERNAL_SERVER_ERROR.into_response()
        }
    }
}

async fn elsewhere() -> (StatusCode, &'static str) {
    let hint = "this port speaks gRPC over HTTP/2; over plain HTTP there are /healthz, /readyz, /metrics and, unless they are off, the page for browsers at / and /v1\n";
    (StatusCode::NOT_FOUND, hint)
}

/// gRPC-Web alone passes: gRPC needs HTTP/2.
async fn of_browsers(request: Request, next: Next) -> Response {
    let kind = request.headers().get(header::CONTENT_TYPE);
    if kind.is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc-web")) {
        next.run(request).await
    } else {
        elsewhere().await.into_response()
    }
}

async fn count(State(metrics): State<Arc<Metrics>>, mut request: Request, next: Next) -> Response {
    let call = metrics.call(&mut request);
    call.follow(next.run(request).await)
}
