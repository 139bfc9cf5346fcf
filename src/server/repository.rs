//! The model repository while the server runs: versions come and go without a restart.
//!
//! A new version is told at once, loaded beside the one before it, and stands for its name when it is ready; one
//! that cannot be loaded changes nothing but its own state. A version whose folder is gone is served to nobody new.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use super::StartError;
use super::models::{demo_model, parse_reference, served};
use crate::bundle::{Bundle, BundleError, MANIFEST, repository};
use crate::config::Config;
use crate::models::{Models, ServedModel};
use crate::network::onnx::{self, OnnxOptions};

/// A version by its name and number.
type Version = (String, u64);

/// A version that was looked at, with the time of its manifest: a bundle that was written again is another one.
#[derive(Clone, Debug)]
struct Seen {
    written: Option<SystemTime>,
    /// The model, or why it was refused: it may be on its way still.
    model: Result<Arc<ServedModel>, String>,
}

/// All models of a configuration: those of the folder, and the demo model.
#[derive(Debug)]
pub(super) struct Repository {
    root: Option<PathBuf>,
    devices: Vec<OnnxOptions>,
    seen: BTreeMap<Version, Seen>,
    demo: Option<Arc<ServedModel>>,
    /// Name and version of the default, where one is configured.
    default: Option<(String, Option<u64>)>,
    /// Versions that stand for their names.
    pins: Vec<Version>,
    /// Whether the folder could be read when it was looked at last.
    readable: bool,
}

impl Repository {
    /// Looks at the configured models for the first time.
    pub(super) fn open(config: &Config) -> Result<(Self, Models), StartError> {
        // First, so that a missing runtime is told before anything is read.
        onnx::runtime()?;
        let threads = config.engine.threads();
        let devices = config.engine.devices.iter();
        let devices: Vec<OnnxOptions> = devices.map(|&device| OnnxOptions { device, threads }).collect();
        let default = config.models.default.as_deref().map(|wanted| {
            let reference = parse_reference(wanted).map(|(name, version)| (name.to_owned(), version));
            reference.ok_or_else(|| {
                StartError::Models(format!(
                    "models.default is {wanted:?}, must be name or name@version"
                ))
            })
        });
        let mut repository = Self {
            root: config.models.repository.clone(),
            demo: if config.models.demo {
                demo_model(&devices)?.map(Arc::new)
            } else {
                None
            },
            devices,
            seen: BTreeMap::new(),
            default: default.transpose()?,
            pins: pins(&config.models.pin)?,
            readable: true,
        };
        if let Some(root) = &repository.root {
            refuse_wrong_level(root)?;
        }
        repository.look().map_err(|source| StartError::Bundle {
            model: repository
                .root
                .iter()
                .map(|root| root.display().to_string())
                .collect(),
            source,
        })?;
        if let Some(root) = &repository.root
            && repository.seen.values().all(|seen| seen.model.is_err())
        {
            tracing::warn!(repository = %root.display(), "the repository holds no usable bundle");
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

    /// Looks again. The models, where they are others than before.
    pub(super) fn changed(&mut self) -> Option<Models> {
        match self.look() {
            Ok(changed) => {
                self.readable = true;
                changed.then(|| {
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

    /// Opens what is new, forgets what is gone. Whether there was any of it.
    fn look(&mut self) -> Result<bool, BundleError> {
        let Some(root) = &self.root else { return Ok(false) };
        let entries = repository::scan(root)?;
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
            // One bad bundle must not keep the others from being served; it is told once.
            if let Err(error) = &model
                && before.and_then(|seen| seen.model.as_ref().err()) != Some(error)
            {
                let name = format!("{}@{}", entry.name, entry.version);
                tracing::error!(model = %name, %error, "the bundle is refused");
            }
            changed |= model.is_ok() || before.is_some_and(|seen| seen.model.is_ok());
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
        served(bundle, entry.version, &self.devices)
    }

    fn unserved_pin(&self, models: &Models) -> Option<&Version> {
        let is_served = |(name, version): &&Version| models.find(name, Some(*version)).is_some();
        self.pins.iter().find(|pin| !is_served(pin))
    }

    /// The models as they were seen last, and whether the configured default is among them. Without one it is the
    /// first model of the folder, or the demo model.
    fn models(&self) -> (Models, bool) {
        let mut models = Models::default();
        for model in self.seen.values().filter_map(|seen| seen.model.as_ref().ok()) {
            models.share(model);
        }
        // A folder may hold a version of its own.
        if let Some(demo) = &self.demo
            && models.find(demo.name(), Some(demo.version())).is_none()
        {
            models.share(demo);
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
