//! Spans for a collector of OpenTelemetry, over OTLP and gRPC.
//!
//! Where the collector is, is a setting; all else is in the variables that OpenTelemetry names, such as
//! `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES` and `OTEL_EXPORTER_OTLP_HEADERS`.

use std::time::Duration;

use opentelemetry::global;
use opentelemetry_otlp::{ExporterBuildError, SpanExporter, WithExportConfig};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{Sampler, SdkTracerProvider};

use crate::config::TracesConfig;

/// Marks that a span has at most: the first evaluation, the second, the fourth and so on.
const MAX_EVENTS: u32 = 64;
/// How long the collector may take for what is left at the end.
const LAST_SPANS: Duration = Duration::from_secs(2);

/// The process's spans, on their way to the collector.
#[must_use = "without `end` the last spans are lost"]
#[derive(Debug)]
pub struct Traces(Option<SdkTracerProvider>);

/// Has spans sent to the configured collector, if there is one. Called where tokio runs, which the connection needs.
/// Spans wait for it in a queue of a few thousand, and those beyond are dropped: no request waits for a collector.
///
/// # Errors
/// When the endpoint cannot be used. That it does not answer is no error: it may come later.
pub fn init(config: &TracesConfig) -> Result<Traces, ExporterBuildError> {
    let Some(endpoint) = &config.endpoint else {
        return Ok(Traces(None));
    };
    let exporter = SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .build()?;
    let mut resource = Resource::builder();
    if std::env::var_os("OTEL_SERVICE_NAME").is_none() {
        resource = resource.with_service_name("denoised");
    }
    let provider = SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        // Who called has decided, where he says so.
        .with_sampler(Sampler::ParentBased(Box::new(Sampler::TraceIdRatioBased(
            config.share,
        ))))
        .with_max_events_per_span(MAX_EVENTS)
        .with_resource(resource.build())
        .build();
    global::set_text_map_propagator(TraceContextPropagator::new());
    global::set_tracer_provider(provider.clone());
    Ok(Traces(Some(provider)))
}

impl Traces {
    /// Sends what is left. Blocks for two seconds at most.
    pub fn end(self) {
        if let Some(provider) = self.0
            && let Err(error) = provider.shutdown_with_timeout(LAST_SPANS)
        {
            tracing::warn!(%error, "the last spans were not taken");
        }
    }
}
