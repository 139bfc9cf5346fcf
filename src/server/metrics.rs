//! Numbers for whoever watches over the server, as Prometheus reads them.
//!
//! Labels have few values, whatever callers send: no name of theirs is one.

use std::fmt;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use axum::body::{Body, Bytes, HttpBody};
use axum::response::Response;
use http::header::ACCEPT;
use http::{HeaderMap, HeaderValue};
use http_body::Frame;
use prometheus_client::collector::Collector;
use prometheus_client::encoding;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};
use tonic::Code;

use super::access::Access;
use crate::engine::Engine;
use crate::models::{Catalogue, ModelState};

/// Seconds of calls, from 5 ms to 5 minutes.
const CALL_SECONDS: [f64; 13] = [
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0, 100.0, 300.0,
];

/// How numbers are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// OpenMetrics 1.0.
    OpenMetrics,
    /// Prometheus' own, version 0.0.4.
    Prometheus,
}

impl Format {
    /// The one that a client can read which sent these headers: Prometheus asks for OpenMetrics.
    pub(super) fn asked(headers: &HeaderMap) -> Self {
        let mut accepted = headers.get_all(ACCEPT).iter();
        let reads_open_metrics = |value: &HeaderValue| {
            let value = value.to_str().unwrap_or_default();
            value.contains("application/openmetrics-text")
        };
        if accepted.any(reads_open_metrics) {
            Self::OpenMetrics
        } else {
            Self::Prometheus
        }
    }

    pub(super) fn content_type(self) -> HeaderValue {
        HeaderValue::from_static(match self {
            Self::OpenMetrics => "application/openmetrics-text; version=1.0.0; charset=utf-8",
            Self::Prometheus => "text/plain; version=0.0.4; charset=utf-8",
        })
    }
}

/// A call that has ended.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Ended {
    method: String,
    code: &'static str,
}

/// The method of a call.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Method {
    method: String,
}

type Seconds = Family<Method, Histogram, fn() -> Histogram>;

/// All numbers of a server.
#[derive(Debug)]
pub(super) struct Metrics {
    registry: Registry,
    calls: Family<Ended, Counter>,
    seconds: Seconds,
    first_seconds: Seconds,
}

impl Metrics {
    pub(super) fn new(engine: &Arc<Engine>, models: &Arc<Catalogue>) -> Self {
        let mut registry = Registry::default();
        let histogram: fn() -> Histogram = || Histogram::new(CALL_SECONDS);
        let (calls, seconds) = (Family::default(), Family::new_with_constructor(histogram));
        let first_seconds = Family::new_with_constructor(histogram);
        let own = registry.sub_registry_with_prefix("denoised");
        engine.register_metrics(own);
        own.register("calls", "Calls that have ended, by gRPC code", calls.clone());
        own.register_with_unit(
            "call",
            "Time from a call's arrival to its end",
            Unit::Seconds,
            seconds.clone(),
        );
        own.register_with_unit(
            "call_first_message",
            "Time from a call's arrival to the first message of its answer",
            Unit::Seconds,
            first_seconds.clone(),
        );
        own.register_collector(Box::new(Present {
            engine: Arc::clone(engine),
            models: Arc::clone(models),
        }));
        registry.register_collector(Box::new(Process::new()));
        Self {
            registry,
            calls,
            seconds,
            first_seconds,
        }
    }

    /// All of them, written in `format`.
    pub(super) fn text(&self, format: Format) -> Result<String, fmt::Error> {
        let mut text = String::new();
        match format {
            Format::OpenMetrics => encoding::text::encode(&mut text, &self.registry)?,
            Format::Prometheus => encoding::prometheus_text::encode(&mut text, &self.registry)?,
        }
        Ok(text)
    }

    /// A call that begins now, with its request.
    pub(super) fn call(self: &Arc<Self>, request: &mut axum::extract::Request) -> Call {
        let path = request.uri().path().to_owned();
        let headers = std::mem::take(request.headers_mut());
        let access = Access::begin(&path, &headers, request.extensions_mut());
        *request.headers_mut() = headers;
        let method = path.rsplit_once('/').map_or("", |(_, method)| method);
        Call {
            metrics: Arc::clone(self),
            access,
            method: method.to_owned(),
            arrived: Instant::now(),
            code: None,
            ending: Ending::default(),
            has_answered: false,
        }
    }
}

/// A call until its end, which is when this is dropped.
#[derive(Debug)]
pub(super) struct Call {
    metrics: Arc<Metrics>,
    access: Access,
    method: String,
    arrived: Instant,
    /// The code, once it is told.
    code: Option<Code>,
    ending: Ending,
    has_answered: bool,
}

/// How a call ends that is no gRPC, told by whoever answers it: an extension of the response.
#[derive(Clone, Debug, Default)]
pub(super) struct Ending(Arc<OnceLock<Code>>);

impl Ending {
    /// Of an answer that is whole.
    pub(super) fn at_once(code: Code) -> Self {
        Self(Arc::new(OnceLock::from(code)))
    }

    /// The answer has ended.
    pub(super) fn tell(&self, code: Code) {
        // The first word counts.
        let _is_first = self.0.set(code).is_ok();
    }
}

impl Call {
    /// `response`, followed to its end.
    pub(super) fn follow(mut self, response: Response) -> Response {
        // Errors that come before any message are told in the headers.
        self.code = code_in(response.headers());
        if let Some(ending) = response.extensions().get::<Ending>() {
            self.ending = ending.clone();
        }
        response.map(|body| Body::new(Followed { body, call: self }))
    }
}

fn code_in(headers: &HeaderMap) -> Option<Code> {
    let status = headers.get("grpc-status")?;
    Some(Code::from_bytes(status.as_bytes()))
}

impl Drop for Call {
    fn drop(&mut self) {
        // Whoever goes away before the end has cancelled.
        let told = self.code.or_else(|| self.ending.0.get().copied());
        let code = told.unwrap_or(Code::Cancelled);
        // What nobody has made could have any name.
        let method = if code == Code::Unimplemented {
            "unknown".to_owned()
        } else {
            std::mem::take(&mut self.method)
        };
        let total = self.arrived.elapsed();
        self.access.log(code, name(code), total);
        let seconds = total.as_secs_f64();
        let labels = Method {
            method: method.clone(),
        };
        self.metrics.seconds.get_or_create(&labels).observe(seconds);
        self.metrics
            .calls
            .get_or_create(&Ended {
                method,
                code: name(code),
            })
            .inc();
    }
}

/// The name that the specification of gRPC gives a code.
fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

/// A body whose call is followed.
struct Followed {
    body: Body,
    call: Call,
}

impl HttpBody for Followed {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let polled = Pin::new(&mut self.body).poll_frame(context);
        if let Poll::Ready(Some(Ok(frame))) = &polled {
            if let Some(trailers) = frame.trailers_ref() {
                self.call.code = code_in(trailers).or(self.call.code);
            } else if !std::mem::replace(&mut self.call.has_answered, true) {
                let labels = Method {
                    method: self.call.method.clone(),
                };
                let seconds = self.call.arrived.elapsed().as_secs_f64();
                let first = &self.call.metrics.first_seconds;
                first.get_or_create(&labels).observe(seconds);
            }
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}

/// What is so when it is asked.
#[derive(Debug)]
struct Present {
    engine: Arc<Engine>,
    models: Arc<Catalogue>,
}

/// The state of a model's version.
#[derive(Debug, EncodeLabelSet)]
struct OfModel {
    model: String,
    version: u64,
    state: &'static str,
}

#[derive(Debug, EncodeLabelSet)]
struct OfBuild {
    version: &'static str,
}

impl Collector for Present {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let load = self.engine.load();
        gauge(
            &mut encoder,
            "queued",
            "Predicted time that the workers need for all that waits or runs",
            Some(&Unit::Seconds),
            load.queued.as_secs_f64(),
        )?;
        gauge(
            &mut encoder,
            "running_requests",
            "Requests that wait or run",
            None,
            load.requests as f64,
        )?;
        gauge(
            &mut encoder,
            "waiting_requests",
            "Requests of which nothing has been evaluated yet",
            None,
            load.waiting as f64,
        )?;
        gauge(
            &mut encoder,
            "saturation_ratio",
            "Predicted time of all that waits or runs, of what may (engine.max_queue_seconds): 1 is full",
            None,
            load.saturation,
        )?;
        gauge(
            &mut encoder,
            "running_canvases",
            "Canvases, and parts of texts that are scored, that wait or run",
            None,
            load.canvases as f64,
        )?;
        let models = self.models.now();
        gauge(
            &mut encoder,
            "refused_versions",
            "Versions of the repository that should be served and are no sound bundles or cannot be fetched",
            None,
            models.refused().count() as f64,
        )?;
        let help = "State of every version that is served: 1 of the one that it is in";
        let one = ConstGauge::new(1.0);
        let mut states = encoder.encode_descriptor("model_state", help, None, one_type())?;
        for model in models.iter() {
            let labels = OfModel {
                model: model.name().to_owned(),
                version: model.version(),
                state: match self.engine.state(model) {
                    ModelState::Unloaded => "unloaded",
                    ModelState::Loading => "loading",
                    ModelState::Ready => "ready",
                    ModelState::Failed { .. } => "failed",
                },
            };
            one.encode(states.encode_family(&labels)?)?;
        }
        let build = OfBuild {
            version: env!("CARGO_PKG_VERSION"),
        };
        let mut info = encoder.encode_descriptor("build_info", "The version that runs", None, one_type())?;
        one.encode(info.encode_family(&build)?)
    }
}

fn one_type() -> prometheus_client::metrics::MetricType {
    prometheus_client::metrics::MetricType::Gauge
}

fn gauge(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    unit: Option<&Unit>,
    value: f64,
) -> Result<(), fmt::Error> {
    ConstGauge::new(value).encode(encoder.encode_descriptor(name, help, unit, one_type())?)
}

/// The process, by the names that Prometheus' own clients use.
#[derive(Debug)]
struct Process {
    started: f64,
}

impl Process {
    fn new() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Self {
            started: now.map_or(0.0, |now| now.as_secs_f64()),
        }
    }
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let help = "Time at which the server started, since the epoch";
        let seconds = Some(&Unit::Seconds);
        gauge(&mut encoder, "process_start_time", help, seconds, self.started)?;
        if let Some(bytes) = resident_bytes() {
            let help = "Memory of the process that is in use";
            gauge(
                &mut encoder,
                "process_resident_memory",
                help,
                Some(&Unit::Bytes),
                bytes,
            )?;
        }
        if let Ok(open) = std::fs::read_dir("/proc/self/fd") {
            let help = "Files and sockets that are open";
            gauge(&mut encoder, "process_open_fds", help, None, open.count() as f64)?;
        }
        Ok(())
    }
}

/// Linux says so; elsewhere it is not known.
fn resident_bytes() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes: f64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024.0)
}
