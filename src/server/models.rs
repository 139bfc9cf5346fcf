//! Loads the models that the configuration names.

use std::path::Path;
use std::sync::Arc;

use super::StartError;
use crate::bundle::{Bundle, BundleError, demo, repository};
use crate::config::Config;
use crate::models::{Models, NetworkSource, ServedModel};
use crate::network::ScoreNetwork;
use crate::network::onnx::{self, OnnxNetwork, OnnxOptions};

/// Version under which the embedded demo model is served.
const DEMO_VERSION: u64 = 1;

/// All models of the repository, then the demo model; the default is the configured one, or the first.
pub fn load(config: &Config) -> Result<Models, StartError> {
    // First, so that a missing runtime is told before anything is hashed.
    onnx::runtime()?;
    let engine = &config.engine;
    let devices: Vec<OnnxOptions> = engine
        .devices
        .iter()
        .map(|&device| OnnxOptions {
            device,
            threads: engine.threads(),
        })
        .collect();
    let mut models = Models::default();
    if let Some(root) = &config.models.repository {
        from_repository(&mut models, root, &devices)?;
    }
    if let Some(bundle) = demo().filter(|_| config.models.demo) {
        let failed = |source| StartError::Bundle {
            model: "(embedded)".to_owned(),
            source,
        };
        let bundle = bundle.map_err(failed)?;
        // A repository may hold a version of its own.
        if models.find(&bundle.manifest().name, Some(DEMO_VERSION)).is_none() {
            models.insert(served(bundle, DEMO_VERSION, &devices).map_err(failed)?);
        }
    }
    if let Some(wanted) = &config.models.default {
        let (name, version) = parse_reference(wanted).ok_or_else(|| {
            StartError::Models(format!(
                "models.default is {wanted:?}, must be name or name@version"
            ))
        })?;
        if !models.set_default(name, version) {
            return Err(StartError::Models(format!(
                "models.default is {wanted:?}, which is not served"
            )));
        }
    }
    if models.default_model().is_none() {
        return Err(StartError::Models(
            "there is no model to serve: set models.repository".to_owned(),
        ));
    }
    Ok(models)
}

fn from_repository(models: &mut Models, root: &Path, devices: &[OnnxOptions]) -> Result<(), StartError> {
    let entries = repository::scan(root).map_err(|source| StartError::Bundle {
        model: root.display().to_string(),
        source,
    })?;
    let mut first = None;
    for entry in entries {
        let name = format!("{}@{}", entry.name, entry.version);
        let opened = Bundle::look_at(&entry.path).and_then(|bundle| {
            if bundle.manifest().name == entry.name {
                served(bundle, entry.version, devices)
            } else {
                Err(BundleError::Manifest(format!(
                    "name is {:?}, its folder says {:?}",
                    bundle.manifest().name,
                    entry.name
                )))
            }
        });
        match opened {
            Ok(model) => {
                models.insert(model);
                first.get_or_insert(entry.name);
            }
            // One bad bundle must not keep the others from being served.
            Err(error) => tracing::error!(model = %name, %error, "the bundle is refused"),
        }
    }
    match first {
        // The highest version, not the first one read.
        Some(name) => drop(models.set_default(&name, None)),
        None => tracing::warn!(repository = %root.display(), "the repository holds no usable bundle"),
    }
    Ok(())
}

fn served(bundle: Bundle, version: u64, devices: &[OnnxOptions]) -> Result<ServedModel, BundleError> {
    let bundle = Arc::new(bundle);
    let on = |options: OnnxOptions| -> NetworkSource {
        let source = Arc::clone(&bundle);
        Box::new(move || Ok(Box::new(OnnxNetwork::load(&source, &options)?) as Box<dyn ScoreNetwork>))
    };
    let first = on(devices.first().copied().unwrap_or_default());
    let model = ServedModel::new(&bundle, version, first)?;
    Ok(model.with_devices(devices.iter().skip(1).map(|options| on(*options))))
}

/// Splits `name` or `name@version`.
pub fn parse_reference(text: &str) -> Option<(&str, Option<u64>)> {
    match text.split_once('@') {
        None => Some((text, None)),
        Some((name, version)) => Some((name, Some(version.parse().ok().filter(|v| *v > 0)?))),
    }
}
