//! A line in the log for every call that has ended: who asked for what, how it ended, and where its time went.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use http::{Extensions, HeaderMap};
use tonic::Code;

use super::caller::Principal;
use super::span::Span;
use crate::engine::{Caller, Spent};
use crate::models::ServedModel;

/// What is known of a call by those who serve it. It travels with the call, as an extension of its request.
#[derive(Clone, Debug, Default)]
pub(super) struct Notes(Arc<Known>);

#[derive(Debug, Default)]
struct Known {
    asked: OnceLock<(String, String)>,
    spent: OnceLock<Arc<Spent>>,
}

impl Notes {
    /// The notes of the call that came with `extensions`; of nobody's where it came past the log.
    pub(super) fn of(extensions: &Extensions) -> Self {
        extensions.get::<Self>().cloned().unwrap_or_default()
    }

    /// The call is the request `id` to `model`.
    pub(super) fn asks(&self, id: &str, model: &ServedModel) {
        // A call asks once.
        drop(self.0.asked.set((id.to_owned(), model.to_string())));
    }

    /// The request was admitted, and takes `spent`.
    pub(super) fn spends(&self, spent: &Arc<Spent>) {
        drop(self.0.spent.set(Arc::clone(spent)));
    }
}

/// A call, as the log tells it.
#[derive(Debug)]
pub(super) struct Access {
    path: String,
    caller: Caller,
    notes: Notes,
    /// For all but probes.
    span: Option<Span>,
}

impl Access {
    /// A call of `path` that begins with `headers`; its notes go into `extensions`.
    pub(super) fn begin(path: &str, headers: &HeaderMap, extensions: &mut Extensions) -> Self {
        let notes = Notes::default();
        extensions.insert(notes.clone());
        Self {
            path: path.to_owned(),
            caller: Principal::behind(extensions).caller().clone(),
            notes,
            span: (!is_probe(path)).then(|| Span::begin(path, headers)),
        }
    }

    /// The call has ended with `code`, whose name is `name`, `total` after it came.
    pub(super) fn log(&mut self, code: Code, name: &'static str, total: Duration) {
        let known = &self.notes.0;
        let (request, model) = known.asked.get().map(|(id, model)| (id, model)).unzip();
        let spent = known.spent.get();
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let Some(span) = &mut self.span else {
            tracing::debug!(path = self.path, caller = %self.caller, code = name, ms = ms(total), "a call has ended");
            return;
        };
        tracing::info!(
            path = self.path,
            request,
            caller = %self.caller,
            model,
            code = name,
            canvases = spent.map(|spent| spent.canvases()),
            done = spent.map(|spent| spent.done()),
            evaluations = spent.map(|spent| spent.evaluations()),
            queue_ms = spent.map(|spent| ms(spent.queue())),
            network_ms = spent.map(|spent| ms(spent.network())),
            ms = ms(total),
            trace = span.trace(),
            "a call has ended"
        );
        if span.is_recording() {
            span.tell("denoised.caller", self.caller.to_string());
            if let Some((request, model)) = known.asked.get() {
                span.tell("denoised.request", request.clone());
                span.tell("denoised.model", model.clone());
            }
            if let Some(spent) = spent {
                span.tell("denoised.canvases", i64::from(spent.canvases()));
                span.tell("denoised.done", i64::from(spent.done()));
                span.tell(
                    "denoised.evaluations",
                    i64::try_from(spent.evaluations()).unwrap_or(i64::MAX),
                );
                span.tell("denoised.queue_seconds", spent.queue().as_secs_f64());
                span.tell("denoised.network_seconds", spent.network().as_secs_f64());
                for (evaluations, at) in spent.marks() {
                    span.evaluations(evaluations, at);
                }
            }
        }
        span.end(code);
    }
}

/// Whether a call is no request: probes come every few seconds.
fn is_probe(path: &str) -> bool {
    path.starts_with("/grpc.")
}
