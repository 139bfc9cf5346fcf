//! A line in the log for every call that has ended: who asked for what, how it ended, and where its time went.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use http::{Extensions, HeaderMap};
use parking_lot::Mutex;
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
    spent: Mutex<Vec<Arc<Spent>>>,
}

impl Notes {
    /// The notes of the call that came with `extensions`; of nobody's where it came past the log.
    pub(super) fn of(extensions: &Extensions) -> Self {
        extensions.get::<Self>().cloned().unwrap_or_default()
    }

    /// The call is the request `id` to `model`.
    pub(super) fn asks(&self, id: &str, model: &ServedModel) {
        // Of a call that makes several requests the first is told.
        drop(self.0.asked.set((id.to_owned(), model.to_string())));
    }

    /// A request of the call was admitted, and takes `spent`.
    pub(super) fn spends(&self, spent: &Arc<Spent>) {
        self.0.spent.lock().push(Arc::clone(spent));
    }
}

/// What all requests of a call have taken.
#[derive(Clone, Copy, Debug)]
struct Sum {
    canvases: u32,
    done: u32,
    evaluations: u64,
    /// The mean over all canvases, as is what follows.
    queue: Duration,
    network: Duration,
}

impl Sum {
    /// The sum of these; `None` of a call that was no request.
    fn of(spent: &[Arc<Spent>]) -> Option<Self> {
        let canvases: u32 = spent.iter().map(|spent| spent.canvases()).sum();
        let mean = |time: fn(&Spent) -> Duration| {
            let sum: Duration = spent.iter().map(|spent| time(spent) * spent.canvases()).sum();
            sum / canvases.max(1)
        };
        (!spent.is_empty()).then(|| Self {
            canvases,
            done: spent.iter().map(|spent| spent.done()).sum(),
            evaluations: spent.iter().map(|spent| spent.evaluations()).sum(),
            queue: mean(Spent::queue),
            network: mean(Spent::network),
        })
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
        let spent = known.spent.lock().clone();
        let sum = Sum::of(&spent);
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
            canvases = sum.map(|sum| sum.canvases),
            done = sum.map(|sum| sum.done),
            evaluations = sum.map(|sum| sum.evaluations),
            queue_ms = sum.map(|sum| ms(sum.queue)),
            network_ms = sum.map(|sum| ms(sum.network)),
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
            if let Some(sum) = sum {
                span.tell("denoised.canvases", i64::from(sum.canvases));
                span.tell("denoised.done", i64::from(sum.done));
                span.tell(
                    "denoised.evaluations",
                    i64::try_from(sum.evaluations).unwrap_or(i64::MAX),
                );
                span.tell("denoised.queue_seconds", sum.queue.as_secs_f64());
                span.tell("denoised.network_seconds", sum.network.as_secs_f64());
            }
            for (evaluations, at) in spent.iter().flat_map(|spent| spent.marks()) {
                span.evaluations(evaluations, at);
            }
        }
        span.end(code);
    }
}

/// Whether a call is no request: probes come every few seconds.
fn is_probe(path: &str) -> bool {
    path.starts_with("/grpc.")
        || path
            .strip_prefix("/inference.GRPCInferenceService/")
            .is_some_and(|method| ["ServerLive", "ServerReady", "ModelReady"].contains(&method))
}
