//! What `training export --measure` says of a bundle.

use std::path::Path;
use std::process::Command;

use denoised::bundle::Bundle;
use serde_json::Value;
use training::config::RunConfig;
use training::fit::{FitOptions, fit};

use crate::common::{config_file, prepared};

/// Exports the run, and gives what is said of it: on the standard output, and in the manifest.
fn exported(config: &Path, storage: &str, out: &Path) -> (String, Value) {
    let output = Command::new(env!("CARGO_BIN_EXE_training"))
        .arg("export")
        .arg(config)
        .args(["--name", "run", "--measure", "--storage", storage, "--out"])
        .arg(out)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let manifest = Bundle::open(out).unwrap().manifest().clone();
    (
        String::from_utf8(output.stdout).unwrap(),
        manifest.provenance["validation"].clone(),
    )
}

#[test]
fn what_is_measured_is_the_bundle_beside_the_weights_as_they_were() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    prepared(root);
    let config = config_file(root, "run", 40);
    fit(RunConfig::read(&config).unwrap(), FitOptions::default()).unwrap();
    let (says, float32) = exported(&config, "f32", &root.join("f32"));
    assert!(
        says.contains("; held-out text ") && !says.contains("beside f32's"),
        "{says}"
    );
    let of = |measures: &Value, key: &str| measures[key].as_f64();
    let bound = of(&float32, "bound_bits_per_byte").unwrap();
    assert_eq!(of(&float32, "bound_bits_per_byte_of_f32"), None);

    let (says, int8) = exported(&config, "int8", &root.join("int8"));
    assert!(says.contains(" % beside f32's "), "{says}");
    // The same weights with the same noise, through another runtime.
    let before = of(&int8, "bound_bits_per_byte_of_f32").unwrap();
    assert!(
        (before / bound - 1.0).abs() < 1e-4,
        "{before} in Burn, {bound} in ONNX Runtime"
    );
    // Whole numbers cost something, and not much.
    let change = (of(&int8, "bound_bits_per_byte").unwrap() / before - 1.0).abs();
    assert!(change > 1e-6 && change < 5e-3, "{change}");
}
