//! The one place that knows gRPC codes: domain errors to `Status` with google.rpc details.

use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::engine::{AdmitError, Failure};

/// The `ErrorInfo` domain of all our errors.
const DOMAIN: &str = "denoised.v1";

/// What is wrong with a request: the path of a field, and what would be right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct FieldError {
    /// Path in the request, such as `sampling.steps`.
    pub field: String,
    /// What is wrong and what would be right.
    pub problem: String,
}

impl FieldError {
    /// An error about `field`.
    pub fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            problem: problem.into(),
        }
    }
}

impl From<FieldError> for Status {
    fn from(error: FieldError) -> Self {
        let mut details = ErrorDetails::with_bad_request_violation(&error.field, &error.problem);
        details.set_error_info("BAD_FIELD", DOMAIN, [("field".to_owned(), error.field.clone())]);
        Self::with_error_details(Code::InvalidArgument, error.to_string(), details)
    }
}

impl From<AdmitError> for Status {
    fn from(error: AdmitError) -> Self {
        let message = error.to_string();
        match error {
            AdmitError::Full(full) => {
                let mut details = ErrorDetails::with_retry_info(Some(full.retry_after));
                let numbers = [
                    ("queued".to_owned(), full.queued.to_string()),
                    ("limit".to_owned(), full.limit.to_string()),
                ];
                details.set_error_info("QUEUE_FULL", DOMAIN, numbers);
                Self::with_error_details(Code::ResourceExhausted, message, details)
            }
            AdmitError::Exists(id) => {
                let details =
                    ErrorDetails::with_resource_info("request", id, "", "choose another request_id");
                Self::with_error_details(Code::AlreadyExists, message, details)
            }
            AdmitError::Draining => unavailable(message),
        }
    }
}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Self {
        let message = failure.to_string();
        match failure {
            Failure::Cancelled => Self::cancelled(message),
            Failure::ShutDown => unavailable(message),
            Failure::Worker { request } => {
                let details =
                    ErrorDetails::with_error_info("WORKER_FAILED", DOMAIN, [("request".to_owned(), request)]);
                Self::with_error_details(Code::Internal, message, details)
            }
        }
    }
}

/// The server goes away; another one may answer.
fn unavailable(message: String) -> Status {
    let mut details = ErrorDetails::with_retry_info(Some(Duration::from_secs(1)));
    details.set_error_info("SHUTTING_DOWN", DOMAIN, [] as [(String, String); 0]);
    Status::with_error_details(Code::Unavailable, message, details)
}

/// Something that was named does not exist.
pub(super) fn not_found(kind: &str, name: &str, hint: &str) -> Status {
    let details = ErrorDetails::with_resource_info(kind, name, "", hint);
    Status::with_error_details(
        Code::NotFound,
        format!("{kind} {name:?} is not known; {hint}"),
        details,
    )
}

/// Text was asked of a model that has no tokenizer.
pub(super) fn no_tokenizer(model: &str) -> Status {
    let info = [("model".to_owned(), model.to_owned())];
    let details = ErrorDetails::with_error_info("NO_TOKENIZER", DOMAIN, info);
    let message = format!("model {model} has no tokenizer: send and read tokens instead of text");
    Status::with_error_details(Code::FailedPrecondition, message, details)
}
