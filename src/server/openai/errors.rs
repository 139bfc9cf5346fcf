//! Answers and refusals in OpenAI's shape.

use std::time::Duration;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use serde_json::{Value, json};
use tonic::{Code, Status};
use tonic_types::StatusExt;

use crate::server::metrics::Ending;
use crate::server::status::FieldError;
use crate::server::tokens::Unknown;

/// Why there is no answer.
#[derive(Debug)]
pub(super) struct Refusal {
    status: StatusCode,
    /// The same for those who count calls.
    pub(super) code: Code,
    kind: &'static str,
    message: String,
    /// The field that is to blame.
    param: Option<String>,
    retry_after: Option<Duration>,
}

impl Refusal {
    /// A path that nobody serves.
    pub(super) fn unknown_path(message: String) -> Self {
        Self::from(Status::unimplemented(message))
    }

    /// The object that tells of it.
    pub(super) fn body(&self) -> Value {
        json!({"error": {
            "message": self.message,
            "type": self.kind,
            "param": self.param,
            "code": null,
        }})
    }
}

impl From<FieldError> for Refusal {
    fn from(error: FieldError) -> Self {
        Self::from(Status::from(error))
    }
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        let (http, kind) = match status.code() {
            Code::InvalidArgument | Code::OutOfRange | Code::FailedPrecondition | Code::AlreadyExists => {
                (StatusCode::BAD_REQUEST, "invalid_request_error")
            }
            Code::NotFound | Code::Unimplemented => (StatusCode::NOT_FOUND, "invalid_request_error"),
            Code::Unauthenticated => (StatusCode::UNAUTHORIZED, "authentication_error"),
            Code::PermissionDenied => (StatusCode::FORBIDDEN, "permission_error"),
            Code::ResourceExhausted => (StatusCode::TOO_MANY_REQUESTS, "rate_limit_error"),
            Code::DeadlineExceeded => (StatusCode::GATEWAY_TIMEOUT, "timeout_error"),
            Code::Unavailable => (StatusCode::SERVICE_UNAVAILABLE, "server_error"),
            Code::Ok | Code::Cancelled | Code::Unknown | Code::Aborted | Code::Internal | Code::DataLoss => {
                (StatusCode::INTERNAL_SERVER_ERROR, "server_error")
            }
        };
        let violations = status.get_details_bad_request().map(|bad| bad.field_violations);
        let field = violations.and_then(|violations| Some(violations.into_iter().next()?.field));
        let retry = status.get_details_retry_info();
        let strip = |text: &str| text.strip_prefix("sampling.").unwrap_or(text).to_owned();
        Self {
            status: http,
            code: status.code(),
            kind,
            message: strip(status.message()),
            param: field.map(|field| strip(&field)),
            retry_after: retry.and_then(|retry| retry.retry_delay),
        }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let mut response = with_status(self.status, &self.body());
        if let Some(after) = self.retry_after {
            let seconds = after.as_secs_f64().ceil() as u64;
            let headers = response.headers_mut();
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        response.extensions_mut().insert(Ending::at_once(self.code));
        response
    }
}

/// The answer `body`.
pub(super) fn answer(body: &Value) -> Response {
    let mut response = with_status(StatusCode::OK, body);
    response.extensions_mut().insert(Ending::at_once(Code::Ok));
    response
}

/// The refusal of a call that is nobody's.
pub(in crate::server) fn unauthenticated(unknown: Unknown) -> Response {
    Refusal::from(crate::server::status::unauthenticated(unknown)).into_response()
}

fn with_status(status: StatusCode, body: &Value) -> Response {
    let mut response = Response::new(Body::from(body.to_string()));
    *response.status_mut() = status;
    let json = HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}
