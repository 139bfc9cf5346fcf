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

/// The mean with one's own bundle is oneself; that with another run is another network, and what does not fit is named.
#[test]
fn weights_are_averaged_with_those_of_other_places() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    prepared(root);
    let trained = |name: &str, steps: u64| {
        let config = config_file(root, name, steps);
        fit(RunConfig::read(&config).unwrap(), FitOptions::default()).unwrap();
        config
    };
    let (run, other) = (trained("run", 30), trained("other", 20));
    let export = |out: &str, more: &[&str]| {
        let out = root.join(out);
        let output = Command::new(env!("CARGO_BIN_EXE_training"))
            .arg("export")
            .arg(&run)
            .args(["--name", "run", "--measure", "--out"])
            .arg(&out)
            .args(more)
            .output()
            .unwrap();
        (out, output)
    };
    let measured = |(out, output): (std::path::PathBuf, std::process::Output)| {
        assert!(output.status.success(), "{output:?}");
        let provenance = Bundle::open(&out).unwrap().manifest().provenance.clone();
        let bound = provenance["validation"]["bound_bits_per_byte"].as_f64();
        (bound.unwrap(), provenance["averaged_with"].as_u64().unwrap())
    };
    let alone = export("alone", &[]);
    let bundle = alone.0.display().to_string();
    let (bound, others) = measured(alone);
    assert_eq!(others, 0);
    let (same, others) = measured(export("same", &["--average-with", &bundle]));
    assert!(
        (same / bound - 1.0).abs() < 1e-6 && others == 1,
        "{same}, {bound}"
    );
    let other = other.display().to_string();
    let both = &["--average-with", &bundle, "--average-with", &other];
    let (mean, others) = measured(export("mean", both));
    assert!(
        (mean / bound - 1.0).abs() > 1e-4 && others == 2,
        "{mean}, {bound}"
    );

    let config = config_file(root, "wide", 2).display().to_string();
    let wide = Command::new(env!("CARGO_BIN_EXE_training"))
        .args(["fit", &config, "--set", "network.heads=4"])
        .output()
        .unwrap();
    assert!(wide.status.success(), "{wide:?}");
    let wide = root.join("wide").display().to_string();
    let (_, refused) = export("refused", &["--average-with", &wide]);
    let says = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert_eq!(refused.status.code(), Some(1), "{says}");
    assert!(says.contains("network.heads is 4 there and 2 here"), "{says}");
}
