//! Makes models of bundles.

use std::sync::Arc;

use super::StartError;
use crate::bundle::{Bundle, BundleError, demo};
use crate::models::{NetworkSource, ServedModel};
use crate::network::adapted::Adapted;
use crate::network::onnx::{OnnxNetwork, OnnxOptions, Prepared};

/// Version under which the embedded demo model is served.
const DEMO_VERSION: u64 = 1;

/// Where networks run, and how they get there.
#[derive(Clone, Debug)]
pub(super) struct Networks {
    pub(super) devices: Vec<OnnxOptions>,
    /// Prepared ones, where a folder is configured.
    pub(super) prepared: Option<Arc<Prepared>>,
}

/// The model in the binary, if it was built with one.
pub(super) fn demo_model(networks: &Networks) -> Result<Option<ServedModel>, StartError> {
    let model = demo().map(|bundle| served(bundle?, DEMO_VERSION, networks));
    model.transpose().map_err(|source| StartError::Bundle {
        model: "(embedded)".to_owned(),
        source,
    })
}

/// Serves `bundle` as `version`, with a network on each device.
pub(super) fn served(bundle: Bundle, version: u64, networks: &Networks) -> Result<ServedModel, BundleError> {
    let devices = &networks.devices;
    let bundle = Arc::new(bundle);
    let on = |options: OnnxOptions| -> NetworkSource {
        let (source, prepared) = (Arc::clone(&bundle), networks.prepared.clone());
        Box::new(move || {
            let network = match &prepared {
                Some(prepared) => OnnxNetwork::load_prepared(&source, &options, prepared)?,
                None => OnnxNetwork::load(&source, &options)?,
            };
            Ok(Adapted::boxed(network, source.manifest()))
        })
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
