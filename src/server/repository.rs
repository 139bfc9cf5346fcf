//! The model repository while the server runs: versions come and go without a restart.
//!
//! A new version is told at once, loaded beside the one before it, and stands for its name when it is ready; one
//! that cannot be loaded changes nothing but its own state. A version whose folder is gone is served to nobody new, nor
//! is one that somebody unloaded, until it is loaded again.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use tokio::runtime::Handle;

use super::StartError;
use super::mirror::{Mirror, MirrorError};
use super::models::{Networks, demo_model, parse_reference, served};
use crate::bundle::{Bundle, BundleError, MANIFEST, repository};
use crate::config::{Config, RepositoryPlace};
use crate::models::{Models, ServedModel};
use crate::network::onnx::{self, OnnxOptions, Prepared};

/// A version by its name and number.
pub(super) type Version = (String, u64);

/// A version that was looked at, with the time of its manifest: a bundle that was written again is another one.
#[derive(Clone, Debug)]
struct Seen {
    written: Option<SystemTime>,
    /// The model, or why it was refused: it may be on its way still.
    model: Result<Arc<ServedModel>, String>,
}

/// Why an order cannot be carried out.
#[derive(Debug, thiserror::Error)]
pub(super) enum ControlError {
    /// It is in no folder of the repository.
    #[error("{0} is not in the repository")]
    Unknown(String),
    /// It is there, but it is not what it should be.
    #[error("{model} is refused: {reason}")]
    Refused {
        /// Name and version.
        model: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Requests that name no model would find none, or another.
    #[error("{0} is the default model; set models.default to another one first")]
    Default(String),
    /// The folder or the store cannot be read.
    #[error("the repository cannot be read: {0}")]
    Unreadable(#[from] LookError),
    /// The models come from nowhere that could be looked at again.
    #[error("there is no repository that could be looked at, or not any more")]
    NoRepository,
}

/// Why the repository cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub(super) enum LookError {
    /// The folder cannot be read.
    #[error(transparent)]
    Folder(#[from] BundleError),
    /// The store cannot be mirrored.
    #[error(transparent)]
    Store(#[from] MirrorError),
}

/// What is served to nobody, though it is there.
#[derive(Clone, Debug, Default)]
struct Unloaded {
    /// Models of which no version is served, those to come included.
    names: BTreeSet<String>,
    versions: BTreeSet<Version>,
}

impl Unloaded {
    fn has(&self, name: &str, version: u64) -> bool {
        self.names.contains(name) || self.versions.contains(&(name.to_owned(), version))
    }

    fn add(&mut self, name: &str, version: Option<u64>) {
        match version {
            Some(version) => drop(self.versions.insert((name.to_owned(), version))),
            None => {
                self.versions.retain(|(of, _)| of != name);
                self.names.insert(name.to_owned());
            }
        }
    }

    /// Serves the model `name` again, or only `version` of those that are `there`.
    fn remove(&mut self, name: &str, version: Option<u64>, there: impl Iterator<Item = u64>) {
        let was_whole = self.names.remove(name);
        match version {
            None => self.versions.retain(|(of, _)| of != name),
            Some(version) => {
                if was_whole {
                    self.versions.extend(there.map(|other| (name.to_owned(), other)));
                }
                self.versions.remove(&(name.to_owned(), version));
            }
        }
    }
}

/// All models of a configuration: those of the folder, and the demo model.
#[derive(Debug)]
pub(super) struct Repository {
    root: Option<PathBuf>,
    /// Where the folder is the mirror of an object store.
    mirror: Option<Mirror>,
    networks: Networks,
    seen: BTreeMap<Version, Seen>,
    demo: Option<Arc<ServedModel>>,
    unloaded: Unloaded,
    /// Whether something may have been seen that is in no models yet that were given out.
    has_untold: bool,
    /// Name and version of the default, where one is configured.
    default: Option<(String, Option<u64>)>,
    /// Versions that stand for their names.
    pins: Vec<Version>,
    /// Whether the folder could be read when it was looked at last.
    readable: bool,
}

impl Repository {
    /// Looks at the configured models for the first time; `runtime` runs what asks object stores.
    pub(super) fn open(config: &Config, runtime: &Handle) -> Result<(Self, Models), StartError> {
        // First, so that a missing runtime is told before anything is read.
        onnx::runtime()?;
        let threads = config.engine.threads();
        let devices = config.engine.devices.iter();
        let prepared = config.models.prepared.as_ref().map(|folder| {
            let prepared = Prepared::open(folder, config.models.prepared_megabytes << 20);
            prepared.map_err(|error| StartError::Models(format!("models.prepared: {error}")))
        });
        let networks = Networks {
            devices: devices.map(|&device| OnnxOptions { device, threads }).collect(),
            prepared: prepared.transpose()?.map(Arc::new),
        };
        let default = config.models.default.as_deref().map(|wanted| {
            let reference = parse_reference(wanted).map(|(name, version)| (name.to_owned(), version));
            reference.ok_or_else(|| {
                StartError::Models(format!(
                    "models.default is {wanted:?}, must be name or name@version"
                ))
            })
        });
        let pins = pins(&config.models.pin)?;
        let place = config.models.repository.as_ref();
        let unusable =
            |error: &dyn std::fmt::Display| StartError::Models(format!("models.repository: {error}"));
        let (root, mirror) = match (place, &config.models.cache) {
            (Some(RepositoryPlace::Folder(folder)), _) => (Some(folder.clone()), None),
            (Some(RepositoryPlace::Store(url)), Some(cache)) => {
                let budget = config.models.cache_megabytes << 20;
                let mirror = Mirror::open(url, cache, budget, &pins, runtime.clone());
                (
                    Some(cache.clone()),
                    Some(mirror.map_err(|error| unusable(&error))?),
                )
            }
            // The configuration is checked: a store has a cache.
            (Some(RepositoryPlace::Store(_)) | None, _) => (None, None),
        };
        let mut repository = Self {
            root,
            mirror,
            demo: if config.models.demo {
                demo_model(&networks)?.map(Arc::new)
            } else {
                None
            },
            networks,
            seen: BTreeMap::new(),
            unloaded: Unloaded::default(),
            has_untold: false,
            default: default.transpose()?,
            pins,
            readable: true,
        };
        if let Some(RepositoryPlace::Folder(folder)) = place {
            refuse_wrong_level(folder)?;
        }
        match repository.look() {
            Ok(_) => {}
            // What was fetched before is better than nothing; a mistake in the setting is told all the same.
            Err(LookError::Store(error)) if error.may_pass() && !repository.seen.is_empty() => {
                tracing::error!(%error, "the repository cannot be read; what was fetched before is served");
                repository.readable = false;
            }
            Err(error) => return Err(unusable(&error)),
        }
        if let Some(place) = place
            && repository.seen.values().all(|seen| seen.model.is_err())
        {
            tracing::warn!(repository = %place, "the repository holds no usable bundle");
        }
        let (models, default_is_served) = repository.models();
        if let Some((name, version)) = repository.unserved_pin(&models) {
            return Err(StartError::Models(format!(
                "models.pin has {name}@{version}, which is not served"
            )));
        }
        if let (Some(wanted), false) = (&config.models.default, default_is_served) {
            return Err(StartError::Models(format!(
                "models.default is {wanted:?}, which is not served"
            )));
        }
        if models.default_model().is_none() {
            return Err(StartError::Models(
                "there is no model to serve: set models.repository".to_owned(),
            ));
        }
        Ok((repository, models))
    }

    /// Whether there is a folder to look at again.
    pub(super) fn is_watched(&self) -> bool {
        self.root.is_some()
    }

    /// The folder that others write to, where it is one.
    pub(super) fn folder(&self) -> Option<&Path> {
        self.root.as_deref().filter(|_| self.mirror.is_none())
    }

    /// Serves the model `name`, or one version of it, as it is in the repository now; what `has_failed` is opened again.
    /// Returns the version that requests for it get, and all models.
    pub(super) fn load(
        &mut self,
        name: &str,
        version: Option<u64>,
        has_failed: impl Fn(&Arc<ServedModel>) -> bool,
    ) -> Result<(Vec<Arc<ServedModel>>, Models), ControlError> {
        let before = self.unloaded.clone();
        let loaded = self.loaded(name, version, has_failed);
        if loaded.is_err() {
            self.unloaded = before;
            // It may have been seen on the way that others have changed.
            self.has_untold = true;
        }
        loaded
    }

    fn loaded(
        &mut self,
        name: &str,
        version: Option<u64>,
        has_failed: impl Fn(&Arc<ServedModel>) -> bool,
    ) -> Result<(Vec<Arc<ServedModel>>, Models), ControlError> {
        if let Some(mirror) = &mut self.mirror {
            mirror.try_all_again(Instant::now());
        }
        self.fetch()?;
        let entries = match &self.root {
            Some(root) => repository::scan(root).map_err(LookError::from)?,
            None => Vec::new(),
        };
        let mut there: Vec<u64> = entries
            .iter()
            .filter(|e| e.name == name)
            .map(|e| e.version)
            .collect();
        if let Some(demo) = self.demo.as_ref().filter(|demo| demo.name() == name) {
            there.push(demo.version());
        }
        let called = || match version {
            Some(version) => format!("{name}@{version}"),
            None => name.to_owned(),
        };
        if !there
            .iter()
            .any(|other| version.is_none_or(|version| *other == version))
        {
            return Err(ControlError::Unknown(called()));
        }
        self.unloaded.remove(name, version, there.into_iter());
        let is_meant = |model: &Arc<ServedModel>| {
            model.name() == name && version.is_none_or(|version| model.version() == version)
        };
        // As if it had not been seen yet.
        self.seen.retain(|_, seen| {
            let model = seen.model.as_ref().ok();
            !model.is_some_and(|model| is_meant(model) && has_failed(model))
        });
        if self
            .demo
            .as_ref()
            .is_some_and(|demo| is_meant(demo) && has_failed(demo))
        {
            self.open_demo_again();
        }
        self.scan().map_err(LookError::from)?;
        let (models, _) = self.models();
        if let Some(model) = models.find(name, version) {
            return Ok((vec![model], models));
        }
        let seen = self.seen.iter().rev();
        let mut refused =
            seen.filter(|((of, number), _)| of == name && version.is_none_or(|version| *number == version));
        let reason = refused.find_map(|(_, seen)| seen.model.as_ref().err());
        Err(ControlError::Refused {
            model: called(),
            reason: reason
                .cloned()
                .unwrap_or_else(|| "it is pinned to another version".to_owned()),
        })
    }

    /// Serves the model `name`, or one version of it, to nobody new. Returns the versions that were served, and the
    /// models that still are.
    pub(super) fn unload(
        &mut self,
        name: &str,
        version: Option<u64>,
    ) -> Result<(Vec<Arc<ServedModel>>, Models), ControlError> {
        let (models, _) = self.models();
        let default = models.default_model().map(|model| model.name().to_owned());
        let is_meant = |model: &&Arc<ServedModel>| {
            model.name() == name && version.is_none_or(|version| model.version() == version)
        };
        let meant: Vec<Arc<ServedModel>> = models.iter().filter(is_meant).cloned().collect();
        let called = || match version {
            Some(version) => format!("{name}@{version}"),
            None => name.to_owned(),
        };
        let was_unloaded = match version {
            Some(version) => self.unloaded.has(name, version),
            None => self.unloaded.names.contains(name),
        };
        if meant.is_empty() && !was_unloaded {
            return Err(ControlError::Unknown(called()));
        }
        let before = self.unloaded.clone();
        self.unloaded.add(name, version);
        let (models, _) = self.models();
        if models.default_model().map(|model| model.name().to_owned()) != default {
            self.unloaded = before;
            return Err(ControlError::Default(called()));
        }
        self.forget_unloaded();
        Ok((meant, models))
    }

    /// What is loaded again is opened again: the model that was there before is retired for good.
    fn forget_unloaded(&mut self) {
        let unloaded = &self.unloaded;
        self.seen
            .retain(|(name, version), _| !unloaded.has(name, *version));
        let is_unloaded = |demo: &Arc<ServedModel>| unloaded.has(demo.name(), demo.version());
        if self.demo.as_ref().is_some_and(is_unloaded) {
            self.open_demo_again();
        }
    }

    fn open_demo_again(&mut self) {
        match demo_model(&self.networks) {
            Ok(again) => self.demo = again.map(Arc::new),
            // It is in the binary, and was sound before.
            Err(error) => tracing::error!(%error, "the demo model cannot be opened again"),
        }
    }

    /// Looks again. The models, where they are others than before.
    pub(super) fn changed(&mut self) -> Option<Models> {
        match self.look() {
            Ok(changed) => {
                self.readable = true;
                let untold = std::mem::take(&mut self.has_untold);
                (changed || untold).then(|| {
                    let (models, default_is_served) = self.models();
                    if !default_is_served {
                        tracing::error!("models.default is not served any more");
                    }
                    if let Some((name, version)) = self.unserved_pin(&models) {
                        tracing::error!("{name}@{version} of models.pin is not served any more");
                    }
                    models
                })
            }
            Err(error) => {
                // Once, not every few seconds; what is served goes on.
                if std::mem::replace(&mut self.readable, false) {
                    tracing::error!(%error, "the repository cannot be read; what is served stays");
                }
                None
            }
        }
    }

    /// Fetches what is new, and scans the folder. Whether there was anything.
    ///
    /// # Errors
    /// [`LookError`] where the folder or the store cannot be read. What was seen all the same is told another time.
    fn look(&mut self) -> Result<bool, LookError> {
        let fetched = self.fetch();
        let changed = self.scan()?;
        match fetched {
            Ok(refused) => Ok(changed | refused),
            Err(error) => {
                self.has_untold |= changed;
                Err(error)
            }
        }
    }

    /// Brings the folder up to date, where it is a mirror. Whether other versions are refused than before.
    fn fetch(&mut self) -> Result<bool, LookError> {
        let Some(mirror) = &mut self.mirror else {
            return Ok(false);
        };
        Ok(mirror.sync(Instant::now())?)
    }

    /// Opens what is new, forgets what is gone. Whether there was any of it.
    fn scan(&mut self) -> Result<bool, BundleError> {
        let Some(root) = &self.root else { return Ok(false) };
        let mut entries = repository::scan(root)?;
        entries.retain(|entry| !self.unloaded.has(&entry.name, entry.version));
        let there: BTreeSet<Version> = entries.iter().map(|e| (e.name.clone(), e.version)).collect();
        let before = self.seen.len();
        self.seen.retain(|version, _| there.contains(version));
        let mut changed = self.seen.len() != before;
        for entry in entries {
            let written = written(&entry.path);
            let version = (entry.name.clone(), entry.version);
            let before = self.seen.get(&version);
            if before.is_some_and(|seen| seen.model.is_ok() && seen.written == written) {
                continue;
            }
            let model = self
                .opened(&entry)
                .map(Arc::new)
                .map_err(|error| error.to_string());
            changed |= model.is_ok() || before.is_some_and(|seen| seen.model.is_ok());
            // One bad bundle must not keep the others from being served; it is told once.
            if let Err(error) = &model
                && before.and_then(|seen| seen.model.as_ref().err()) != Some(error)
            {
                let name = format!("{}@{}", entry.name, entry.version);
                tracing::error!(model = %name, %error, "the bundle is refused");
                changed = true;
            }
            self.seen.insert(version, Seen { written, model });
        }
        Ok(changed)
    }

    fn opened(&self, entry: &repository::Entry) -> Result<ServedModel, BundleError> {
        let bundle = Bundle::look_at(&entry.path)?;
        if bundle.manifest().name != entry.name {
            return Err(BundleError::Manifest(format!(
                "name is {:?}, its folder says {:?}",
                bundle.manifest().name,
                entry.name
            )));
        }
        served(bundle, entry.version, &self.networks)
    }

    fn unserved_pin(&self, models: &Models) -> Option<&Version> {
        let is_served = |(name, version): &&Version| models.find(name, Some(*version)).is_some();
        self.pins.iter().find(|pin| !is_served(pin))
    }

    /// The models as they were seen last, and whether the configured default is among them. Without one it is the
    /// first model of the folder, or the demo model.
    fn models(&self) -> (Models, bool) {
        let mut models = Models::default();
        let seen = self
            .seen
            .iter()
            .filter(|((name, version), _)| !self.unloaded.has(name, *version));
        for model in seen.filter_map(|(_, seen)| seen.model.as_ref().ok()) {
            models.share(model);
        }
        // A folder may hold a version of its own.
        if let Some(demo) = &self.demo
            && !self.unloaded.has(demo.name(), demo.version())
            && models.find(demo.name(), Some(demo.version())).is_none()
        {
            models.share(demo);
        }
        let not_fetched = self.mirror.iter().flat_map(Mirror::refused);
        let unsound = self.seen.iter().filter_map(|(version, seen)| {
            let reason = seen.model.as_ref().err()?;
            Some((version, reason.clone()))
        });
        for ((name, version), reason) in not_fetched.chain(unsound) {
            // What was fetched before is served.
            if !self.unloaded.has(name, *version) && models.find(name, Some(*version)).is_none() {
                models.refuse(name, *version, reason);
            }
        }
        for (name, version) in &self.pins {
            // Where it is not served, requests for the name are refused: a newer one is not what was wanted.
            let _is_served = models.pin(name, *version);
        }
        let is_served = self
            .default
            .as_ref()
            .is_none_or(|(name, version)| models.set_default(name, *version));
        (models, is_served)
    }
}

/// The versions of `models.pin`, one of each model.
fn pins(wanted: &[String]) -> Result<Vec<Version>, StartError> {
    let mut pins: Vec<Version> = Vec::with_capacity(wanted.len());
    for text in wanted {
        let Some((name, Some(version))) = parse_reference(text) else {
            let problem = format!("models.pin has {text:?}, must be a list of name@version");
            return Err(StartError::Models(problem));
        };
        if pins.iter().any(|(other, _)| other == name) {
            return Err(StartError::Models(format!("models.pin has {name} twice")));
        }
        pins.push((name.to_owned(), version));
    }
    Ok(pins)
}

/// A folder that is a bundle, or holds versions, is not of models: they would be passed over in silence.
fn refuse_wrong_level(root: &Path) -> Result<(), StartError> {
    let problem = |what: &str, meant: Option<&Path>| {
        let meant = meant.map_or("the folder of models".to_owned(), |meant| {
            meant.display().to_string()
        });
        StartError::Models(format!(
            "models.repository {} is {what}, must be a folder of <model>/<version>: {meant}",
            root.display()
        ))
    };
    // So that a relative path has parents too.
    let whole = std::path::absolute(root).unwrap_or_else(|_| root.to_owned());
    if root.join(MANIFEST).is_file() {
        let models = whole.parent().and_then(Path::parent);
        return Err(problem("one version of a model", models));
    }
    let entries = std::fs::read_dir(root).into_iter().flatten().flatten();
    let mut folders = entries.map(|entry| entry.path());
    if folders.any(|folder| is_version(&folder) && folder.join(MANIFEST).is_file()) {
        return Err(problem("the folder of one model", whole.parent()));
    }
    Ok(())
}

fn is_version(folder: &Path) -> bool {
    let name = folder.file_name().and_then(|name| name.to_str());
    name.is_some_and(|name| name.parse::<u64>().is_ok())
}

/// When a bundle was written, as its manifest says, which is written last.
fn written(bundle: &Path) -> Option<SystemTime> {
    bundle.join(MANIFEST).metadata().and_then(|m| m.modified()).ok()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests;
