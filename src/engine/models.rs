//! Models that are served, by name and version.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use crate::bundle::{Bundle, BundleError, Manifest, TextTokenizer};
use crate::diffusion::Graph;
use crate::network::{NetworkError, ScoreNetwork};

/// Makes a worker's own copy of a network.
pub type NetworkSource = Box<dyn Fn() -> Result<Box<dyn ScoreNetwork>, NetworkError> + Send + Sync>;

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

/// A model as the engine and the server see it.
pub struct ServedModel {
    version: u64,
    manifest: Manifest,
    tokenizer: Option<TextTokenizer>,
    network: NetworkSource,
}

impl ServedModel {
    /// Serves `bundle` as `version`, with networks from `network`.
    pub fn new(bundle: &Bundle, version: u64, network: NetworkSource) -> Result<Self, BundleError> {
        let tokenizer = bundle.tokenizer()?;
        Ok(Self {
            version,
            manifest: bundle.manifest().clone(),
            tokenizer,
            network,
        })
    }

    /// Serves a network that has no bundle, for tests of everything around it.
    pub fn without_bundle(manifest: Manifest, version: u64, network: NetworkSource) -> Self {
        Self {
            version,
            manifest,
            tokenizer: None,
            network,
        }
    }

    /// Name of the model.
    pub fn name(&self) -> &str {
        &self.manifest.name
    }

    /// Version, from 1.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// What the bundle says of the network.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The noise process.
    pub fn graph(&self) -> Graph {
        self.manifest.graph()
    }

    /// The tokenizer, if the bundle has one.
    pub fn tokenizer(&self) -> Option<&TextTokenizer> {
        self.tokenizer.as_ref()
    }

    /// A network for one worker.
    pub fn network(&self) -> Result<Box<dyn ScoreNetwork>, NetworkError> {
        (self.network)()
    }
}

impl fmt::Debug for ServedModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServedModel")
            .field("name", &self.name())
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

impl fmt::Display for ServedModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.name(), self.version)
    }
}

/// All served models.
#[derive(Debug, Default)]
pub struct Models {
    by_name: BTreeMap<String, BTreeMap<u64, Arc<ServedModel>>>,
    default: Option<Arc<ServedModel>>,
    /// Whether the default is a version, not whatever is the newest of its name.
    default_is_pinned: bool,
}

impl Models {
    /// Adds a model; the first one becomes the default.
    pub fn insert(&mut self, model: ServedModel) -> Arc<ServedModel> {
        let model = Arc::new(model);
        self.by_name
            .entry(model.name().to_owned())
            .or_default()
            .insert(model.version, Arc::clone(&model));
        self.default.get_or_insert_with(|| Arc::clone(&model));
        model
    }

    /// Makes `name` (at `version`, or its highest) the default; `false` when it is not served.
    pub fn set_default(&mut self, name: &str, version: Option<u64>) -> bool {
        let found = self.find(name, version);
        let known = found.is_some();
        if known {
            self.default_is_pinned = version.is_some();
        }
        self.default = found.or(self.default.take());
        known
    }

    /// The model `name` at `version`, or its highest version.
    pub fn find(&self, name: &str, version: Option<u64>) -> Option<Arc<ServedModel>> {
        let versions = self.by_name.get(name)?;
        match version {
            Some(version) => versions.get(&version).cloned(),
            None => versions.values().next_back().cloned(),
        }
    }

    /// The versions that may stand for what a request asks for, the first choice first: the one that it names, or
    /// all of its model, newest first; without a name those of the default.
    pub fn candidates(&self, name: Option<&str>, version: Option<u64>) -> Vec<Arc<ServedModel>> {
        let name = match (name, &self.default) {
            (Some(name), _) => name,
            (None, Some(default)) if self.default_is_pinned => return vec![Arc::clone(default)],
            (None, Some(default)) => default.name(),
            (None, None) => return Vec::new(),
        };
        let versions = self.by_name.get(name).into_iter().flatten().rev();
        versions
            .filter(|(of, _)| version.is_none_or(|version| **of == version))
            .map(|(_, model)| Arc::clone(model))
            .collect()
    }

    /// What requests get that name no model.
    pub fn default_model(&self) -> Option<Arc<ServedModel>> {
        self.default.clone()
    }

    /// All models, by name and version.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<ServedModel>> {
        self.by_name.values().flat_map(BTreeMap::values)
    }
}
