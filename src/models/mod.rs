//! What is served: models by name and version, and their networks in memory.
//!
//! [`Models`] are looked up and never changed; a [`Catalogue`] holds the present ones and swaps them whole, so that
//! a request sees one consistent set and goes on with the version it was admitted with. A [`Loader`] puts networks
//! into memory, on threads of its own and within a budget, and parks what waits for them; a model that nobody has
//! used for longest makes room. It knows what waits as something that can be failed, not what it is.

mod counters;
mod loader;
mod memory;
mod served;
mod sessions;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use arc_swap::ArcSwap;

pub use counters::LoadCounters;
pub use loader::{Loader, Put, Waiting};
pub use served::{NetworkSource, ServedModel};
pub use sessions::{Session, Sessions};

/// Where a model is on its way to being served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ModelState {
    /// Loaded when a request asks for it.
    Unloaded,
    /// Being loaded; requests for it wait.
    Loading,
    /// Served.
    Ready,
    /// It cannot be loaded or run; tried again from time to time.
    Failed {
        /// Why, in one line.
        reason: String,
        /// When it is tried again.
        retry_at: Instant,
    },
}

/// The models of one moment.
#[derive(Debug, Default)]
pub struct Models {
    by_name: BTreeMap<String, BTreeMap<u64, Arc<ServedModel>>>,
    /// Name of the default, and its version unless it is whatever is the newest.
    default: Option<(String, Option<u64>)>,
    /// Versions that stand for their names, in place of the newest.
    pins: BTreeMap<String, u64>,
    /// Why versions are not served that should be.
    refused: BTreeMap<(String, u64), String>,
}

impl Models {
    /// Adds a model; the first one becomes the default.
    pub fn insert(&mut self, model: ServedModel) -> Arc<ServedModel> {
        let model = Arc::new(model);
        self.share(&model);
        model
    }

    /// Adds a model that others serve as well.
    pub fn share(&mut self, model: &Arc<ServedModel>) {
        self.default
            .get_or_insert_with(|| (model.name().to_owned(), None));
        self.by_name
            .entry(model.name().to_owned())
            .or_default()
            .insert(model.version(), Arc::clone(model));
    }

    /// Makes `name` (at `version`, or its highest) the default; `false` when it is not served.
    pub fn set_default(&mut self, name: &str, version: Option<u64>) -> bool {
        let known = self.find(name, version).is_some();
        if known {
            self.default = Some((name.to_owned(), version));
        }
        known
    }

    /// Makes `version` stand for `name` where a request names no version, in place of the newest; `false` when it is
    /// not served.
    pub fn pin(&mut self, name: &str, version: u64) -> bool {
        self.pins.insert(name.to_owned(), version);
        self.find(name, Some(version)).is_some()
    }

    /// Tells why a version is not among the models.
    pub fn refuse(&mut self, name: &str, version: u64, reason: String) {
        self.refused.insert((name.to_owned(), version), reason);
    }

    /// The versions that are not among the models and should be: name, version and reason.
    pub fn refused(&self) -> impl Iterator<Item = (&str, u64, &str)> {
        let refused = self.refused.iter();
        refused.map(|((name, version), reason)| (name.as_str(), *version, reason.as_str()))
    }

    /// Why a version is not among the models, where it should be.
    pub fn refusal(&self, name: &str, version: u64) -> Option<&str> {
        let refused = self.refused.get(&(name.to_owned(), version));
        refused.map(String::as_str)
    }

    /// The model `name` at `version`, or at the one it is pinned to, or at its highest.
    pub fn find(&self, name: &str, version: Option<u64>) -> Option<Arc<ServedModel>> {
        let versions = self.by_name.get(name)?;
        match version.or_else(|| self.pins.get(name).copied()) {
            Some(version) => versions.get(&version).cloned(),
            None => versions.values().next_back().cloned(),
        }
    }

    /// The versions that may stand for what a request asks for, the first choice first: the one that it names, or
    /// all of its model, newest first, unless that is pinned to one; without a name those of the default.
    pub fn candidates(&self, name: Option<&str>, version: Option<u64>) -> Vec<Arc<ServedModel>> {
        let (name, version) = match (name, &self.default) {
            (Some(name), _) => (name, version),
            (None, Some((name, version))) => (name.as_str(), *version),
            (None, None) => return Vec::new(),
        };
        let version = version.or_else(|| self.pins.get(name).copied());
        let versions = self.by_name.get(name).into_iter().flatten().rev();
        versions
            .filter(|(of, _)| version.is_none_or(|version| **of == version))
            .map(|(_, model)| Arc::clone(model))
            .collect()
    }

    /// Returns the model of requests that name none.
    pub fn default_model(&self) -> Option<Arc<ServedModel>> {
        let (name, version) = self.default.as_ref()?;
        self.find(name, *version)
    }

    /// All models, by name and version.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<ServedModel>> {
        self.by_name.values().flat_map(BTreeMap::values)
    }
}

/// The models that are served now.
#[derive(Debug)]
pub struct Catalogue {
    models: ArcSwap<Models>,
}

impl Catalogue {
    /// Serves `models`.
    pub fn new(models: Models) -> Self {
        Self {
            models: ArcSwap::from_pointee(models),
        }
    }

    /// The models of this moment.
    pub fn now(&self) -> Arc<Models> {
        self.models.load_full()
    }

    /// Serves `models` from now on. Returns those that are not among them any more.
    pub fn replace(&self, models: Models) -> Vec<Arc<ServedModel>> {
        let models = Arc::new(models);
        let before = self.models.swap(Arc::clone(&models));
        let stays = |model: &Arc<ServedModel>| models.iter().any(|other| Arc::ptr_eq(model, other));
        before.iter().filter(|model| !stays(model)).cloned().collect()
    }
}
