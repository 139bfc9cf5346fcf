//! Makes models of bundles.

use std::sync::Arc;

use super::StartError;
use crate::bundle::{Bundle, BundleError, demo};
use crate::models::{NetworkSource, ServedModel};
use crate::network::adapted::Adapted;
use crate::network::onnx::{OnnxNetwork, OnnxOptions};

/// Version under which the embedded demo model is served.
const DEMO_VERSION: u64 = 1;

/// The model in the binary, if it was built with one.
pub(super) fn demo_model(devices: &[OnnxOptions]) -> Result<Option<ServedModel>, StartError> {
    let model = demo().map(|bundle| served(bundle?, DEMO_VERSION, devices));
    model.transpose().map_err(|source| StartError::Bundle {
        model: "(embedded)".to_owned(),
        source,
    })
}

/// Serves `bundle` as `version`, with a network on each of `devices`.
pub(super) fn served(
    bundle: Bundle,
    version: u64,
    devices: &[OnnxOptions],
) -> Result<ServedModel, BundleError> {
    let bundle = Arc::new(bundle);
    let on = |options: OnnxOptions| -> NetworkSource {
        let source = Arc::clone(&bundle);
        Box::new(move || {
            Ok(Adapted::boxed(
                OnnxNetwork::load(&source, &options)?,
                source.manifest(),
            ))
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
