//! One version of a model, as it is served.

use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::bundle::{Bundle, BundleError, Manifest, TextTokenizer};
use crate::diffusion::Graph;
use crate::network::{NetworkError, Output, ScoreNetwork};

/// Makes a worker's own copy of a network.
pub type NetworkSource = Box<dyn Fn() -> Result<Box<dyn ScoreNetwork>, NetworkError> + Send + Sync>;

/// A model as the engine and the server see it.
pub struct ServedModel {
    version: u64,
    manifest: Manifest,
    tokenizer: Option<TextTokenizer>,
    /// One for every device, the first for those that have none.
    networks: Vec<NetworkSource>,
    /// Bytes that a network takes in memory, about.
    bytes: u64,
    /// Shape of outputs; known when a network has been loaded.
    output: OnceLock<Output>,
    /// Whether its networks have their weights in common; known when a network has been loaded.
    shares_weights: AtomicBool,
    /// Whether it is served to nobody new any more.
    retired: AtomicBool,
}

impl ServedModel {
    /// Serves `bundle` as `version`, with networks from `network`, of the first device.
    pub fn new(bundle: &Bundle, version: u64, network: NetworkSource) -> Result<Self, BundleError> {
        let tokenizer = bundle.tokenizer()?;
        Ok(Self {
            version,
            manifest: bundle.manifest().clone(),
            tokenizer,
            networks: vec![network],
            bytes: bundle.weight_bytes(),
            output: OnceLock::new(),
            shares_weights: AtomicBool::new(false),
            retired: AtomicBool::new(false),
        })
    }

    /// Serves a network that has no bundle, for tests of everything around it.
    pub fn without_bundle(manifest: Manifest, version: u64, network: NetworkSource) -> Self {
        Self {
            version,
            manifest,
            tokenizer: None,
            networks: vec![network],
            bytes: 0,
            output: OnceLock::new(),
            shares_weights: AtomicBool::new(false),
            retired: AtomicBool::new(false),
        }
    }

    /// The same with networks of more devices.
    #[must_use]
    pub fn with_devices(mut self, networks: impl IntoIterator<Item = NetworkSource>) -> Self {
        self.networks.extend(networks);
        self
    }

    /// The same with networks that take `bytes` of memory.
    #[must_use]
    pub fn with_bytes(self, bytes: u64) -> Self {
        Self { bytes, ..self }
    }

    /// Name of the model.
    pub fn name(&self) -> &str {
        &self.manifest.name
    }

    /// Version, from 1.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Returns the manifest of its bundle.
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

    /// Bytes that a network takes in memory, about.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether a network takes no memory worth speaking of beside another one on its device.
    pub fn shares_weights(&self) -> bool {
        self.shares_weights.load(Ordering::Acquire)
    }

    pub(super) fn retire(&self) {
        self.retired.store(true, Ordering::Release);
    }

    /// Whether it is served to nobody new any more.
    pub fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Acquire)
    }

    /// Names the model as long as it lives.
    pub fn address(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    /// A network on device number `device`.
    pub fn network(&self, device: usize) -> Result<Box<dyn ScoreNetwork>, NetworkError> {
        let Some(source) = self.networks.get(device).or(self.networks.first()) else {
            return Err(NetworkError::Load("it is on no device".to_owned()));
        };
        let network = source()?;
        self.output.get_or_init(|| network.output());
        self.shares_weights
            .store(network.shares_weights(), Ordering::Release);
        Ok(network)
    }

    /// Returns the shape of outputs; until a network has been loaded that of most.
    pub fn output(&self) -> Output {
        self.output.get().copied().unwrap_or_default()
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
