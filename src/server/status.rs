//! The one place that knows gRPC codes: domain errors to `Status` with google.rpc details.

use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use super::repository::ControlError;
use super::tokens::Unknown;
use crate::engine::{AdmitError, Failure, NoRoom, Room};

/// The `ErrorInfo` domain of all our errors.
const DOMAIN: &str = "denoised.v1";

/// Characters of a name that are told to whoever sent it.
const MAX_TOLD: usize = 128;

/// A field that cannot be accepted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct FieldError {
    /// Path in the request, such as `sampling.steps`.
    pub field: String,
    /// The problem, and the values that are allowed.
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

/// The refusal of a call that is nobody's.
pub(super) fn unauthenticated(unknown: Unknown) -> Status {
    let mut details = ErrorDetails::new();
    details.set_error_info("TOKEN_NEEDED", DOMAIN, [] as [(String, String); 0]);
    Status::with_error_details(Code::Unauthenticated, unknown.to_string(), details)
}

/// Whoever asks may not.
pub(super) fn denied(why: &str) -> Status {
    let nothing = [] as [(String, String); 0];
    let details = ErrorDetails::with_error_info("NOT_ALLOWED", DOMAIN, nothing);
    Status::with_error_details(Code::PermissionDenied, why, details)
}

impl From<ControlError> for Status {
    fn from(error: ControlError) -> Self {
        let message = error.to_string();
        let reason = match error {
            ControlError::Unknown(model) => {
                return not_found("model", &model, "it is not in the repository");
            }
            ControlError::Refused { .. } => "BUNDLE_REFUSED",
            ControlError::Default(_) => "MODEL_IS_DEFAULT",
            ControlError::Unreadable(_) => "REPOSITORY_UNREADABLE",
            ControlError::NoRepository => "NO_REPOSITORY",
        };
        let nothing = [] as [(String, String); 0];
        let details = ErrorDetails::with_error_info(reason, DOMAIN, nothing);
        Self::with_error_details(Code::FailedPrecondition, message, details)
    }
}

impl From<AdmitError> for Status {
    fn from(error: AdmitError) -> Self {
        let message = error.to_string();
        match error {
            AdmitError::NoRoom(NoRoom::Server(room)) => {
                let mut details = ErrorDetails::with_retry_info(Some(room.retry_after));
                details.set_error_info("QUEUE_FULL", DOMAIN, seconds(&room));
                Self::with_error_details(Code::ResourceExhausted, message, details)
            }
            AdmitError::NoRoom(NoRoom::Caller(room)) => {
                let mut details = ErrorDetails::with_retry_info(Some(room.retry_after));
                details.set_error_info("CALLER_SHARE_USED", DOMAIN, seconds(&room));
                details.add_quota_failure_violation("caller", &message);
                Self::with_error_details(Code::ResourceExhausted, message, details)
            }
            // Steps and canvases are both within their limits, their product is not: waiting is of no use.
            AdmitError::NoRoom(NoRoom::Request(_)) => {
                FieldError::new("sampling", format!("{message}; ask for fewer steps or canvases")).into()
            }
            AdmitError::Running { .. } => {
                let mut details = ErrorDetails::with_retry_info(Some(Duration::from_secs(1)));
                details.set_error_info("TOO_MANY_REQUESTS", DOMAIN, [] as [(String, String); 0]);
                Self::with_error_details(Code::ResourceExhausted, message, details)
            }
            AdmitError::Model {
                model, retry_after, ..
            } => model_failed(message, model, retry_after),
            AdmitError::State { .. } => FieldError::new("resume.frames", message).into(),
            AdmitError::Deadline { left, predicted, .. } => {
                let numbers = [
                    ("left_seconds".to_owned(), format!("{:.3}", left.as_secs_f64())),
                    (
                        "predicted_seconds".to_owned(),
                        format!("{:.3}", predicted.as_secs_f64()),
                    ),
                ];
                let details = ErrorDetails::with_error_info("DEADLINE_TOO_NEAR", DOMAIN, numbers);
                Self::with_error_details(Code::DeadlineExceeded, message, details)
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
            Failure::Cancelled | Failure::Abandoned => Self::cancelled(message),
            Failure::Model { model, .. } => model_failed(message, model, Duration::from_secs(1)),
            Failure::Deadline => {
                let nothing = [] as [(String, String); 0];
                let details = ErrorDetails::with_error_info("DEADLINE_PASSED", DOMAIN, nothing);
                Self::with_error_details(Code::DeadlineExceeded, message, details)
            }
            Failure::NothingAllowed => {
                let nothing = [] as [(String, String); 0];
                let details = ErrorDetails::with_error_info("NOTHING_ALLOWED", DOMAIN, nothing);
                Self::with_error_details(Code::FailedPrecondition, message, details)
            }
            Failure::ShutDown => unavailable(message),
            Failure::Worker { request } => {
                let details =
                    ErrorDetails::with_error_info("WORKER_FAILED", DOMAIN, [("request".to_owned(), request)]);
                Self::with_error_details(Code::Internal, message, details)
            }
        }
    }
}

fn seconds(room: &Room) -> [(String, String); 2] {
    let text = |time: Duration| format!("{:.3}", time.as_secs_f64());
    [
        ("waiting_seconds".to_owned(), text(room.waiting)),
        ("limit_seconds".to_owned(), text(room.limit)),
    ]
}

/// The model cannot be run now; it is tried again.
pub(super) fn model_failed(message: String, model: String, retry_after: Duration) -> Status {
    let mut details = ErrorDetails::with_retry_info(Some(retry_after));
    details.set_error_info("MODEL_FAILED", DOMAIN, [("model".to_owned(), model)]);
    Status::with_error_details(Code::Unavailable, message, details)
}

/// The server goes away; another one may answer.
fn unavailable(message: String) -> Status {
    let mut details = ErrorDetails::with_retry_info(Some(Duration::from_secs(1)));
    details.set_error_info("SHUTTING_DOWN", DOMAIN, [] as [(String, String); 0]);
    Status::with_error_details(Code::Unavailable, message, details)
}

/// Something that was named does not exist.
pub(super) fn not_found(kind: &str, name: &str, hint: &str) -> Status {
    // What comes in need not go out again whole.
    let name: String = name.chars().take(MAX_TOLD).collect();
    let details = ErrorDetails::with_resource_info(kind, &name, "", hint);
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
