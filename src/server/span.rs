//! The span of a call, for collectors of traces: part of the caller's trace, where he sends its context (W3C
//! `traceparent`).

use std::time::{Instant, SystemTime};

use http::HeaderMap;
use opentelemetry::global::{self, BoxedSpan};
use opentelemetry::propagation::Extractor;
use opentelemetry::trace::{Span as _, SpanKind, Status, Tracer as _};
use opentelemetry::{KeyValue, Value};
use tonic::Code;

/// A call's span. It costs nothing where there is no collector.
#[derive(Debug)]
pub(super) struct Span(BoxedSpan);

impl Span {
    /// The span of a call of `path` that begins with `headers`.
    pub(super) fn begin(path: &str, headers: &HeaderMap) -> Self {
        let caller = global::get_text_map_propagator(|propagator| propagator.extract(&Headers(headers)));
        let method = path.trim_start_matches('/');
        let mut attributes = Vec::new();
        if path.starts_with("/v1/") {
            attributes.push(KeyValue::new("url.path", path.to_owned()));
        } else if let Some((service, method)) = method.rsplit_once('/') {
            attributes.push(KeyValue::new("rpc.system", "grpc"));
            attributes.push(KeyValue::new("rpc.service", service.to_owned()));
            attributes.push(KeyValue::new("rpc.method", method.to_owned()));
        }
        let tracer = global::tracer("denoised");
        let span = tracer
            .span_builder(method.to_owned())
            .with_kind(SpanKind::Server)
            .with_attributes(attributes)
            .start_with_context(&tracer, &caller);
        Self(span)
    }

    /// The trace that it is part of, in hexadecimal, where a collector is told.
    pub(super) fn trace(&self) -> Option<String> {
        self.0
            .is_recording()
            .then(|| self.0.span_context().trace_id().to_string())
    }

    /// Whether anybody will see it.
    pub(super) fn is_recording(&self) -> bool {
        self.0.is_recording()
    }

    /// Adds what is known of the call.
    pub(super) fn tell(&mut self, key: &'static str, value: impl Into<Value>) {
        self.0.set_attribute(KeyValue::new(key, value));
    }

    /// So many evaluations had been committed at `at`.
    pub(super) fn evaluations(&mut self, evaluations: u64, at: Instant) {
        let count = i64::try_from(evaluations).unwrap_or(i64::MAX);
        self.0.add_event_with_timestamp(
            "evaluations",
            SystemTime::now()
                .checked_sub(at.elapsed())
                .unwrap_or(SystemTime::UNIX_EPOCH),
            vec![KeyValue::new("denoised.evaluations", count)],
        );
    }

    /// The call has ended.
    pub(super) fn end(&mut self, code: Code) {
        self.tell("rpc.grpc.status_code", i64::from(code as i32));
        match code {
            // The server's fault, as OpenTelemetry's conventions have it for servers.
            Code::Unknown
            | Code::DeadlineExceeded
            | Code::Unimplemented
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss => self.0.set_status(Status::error(code.description())),
            Code::Ok
            | Code::Cancelled
            | Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::ResourceExhausted
            | Code::FailedPrecondition
            | Code::Aborted
            | Code::OutOfRange
            | Code::Unauthenticated => {}
        }
        if code == Code::Unimplemented {
            // Whatever strangers make up is nobody's list of names.
            self.0.update_name("unknown");
        }
        self.0.end();
    }
}

struct Headers<'a>(&'a HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(http::HeaderName::as_str).collect()
    }
}
