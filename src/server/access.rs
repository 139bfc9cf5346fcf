//! A line in the log for every call that has ended: who asked for what, how it ended, and where its time went.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use http::Extensions;

use super::caller::Principal;
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
}

impl Access {
    /// A call of `path` that begins; its notes go into `extensions`.
    pub(super) fn begin(path: &str, extensions: &mut Extensions) -> Self {
        let notes = Notes::default();
        extensions.insert(notes.clone());
        Self {
            path: path.to_owned(),
            caller: Principal::behind(extensions).caller().clone(),
            notes,
        }
    }

    /// The call has ended with `code`, `total` after it came.
    pub(super) fn log(&self, code: &'static str, total: Duration) {
        let known = &self.notes.0;
        let (request, model) = known.asked.get().map(|(id, model)| (id, model)).unzip();
        let spent = known.spent.get();
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        // Probes come every few seconds.
        if self.path.starts_with("/grpc.") {
            tracing::debug!(path = self.path, caller = %self.caller, code, ms = ms(total), "a call has ended");
            return;
        }
        tracing::info!(
            path = self.path,
            request,
            caller = %self.caller,
            model,
            code,
            canvases = spent.map(|spent| spent.canvases()),
            done = spent.map(|spent| spent.done()),
            evaluations = spent.map(|spent| spent.evaluations()),
            queue_ms = spent.map(|spent| ms(spent.queue())),
            network_ms = spent.map(|spent| ms(spent.network())),
            ms = ms(total),
            "a call has ended"
        );
    }
}
