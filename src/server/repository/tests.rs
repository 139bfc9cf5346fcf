//! What an order has seen on its way is told all the same.

use std::fs;

use tokio::runtime::Runtime;

use super::*;
use crate::bundle::{BundleWriter, MODEL, manifest_tests};

fn publish(root: &Path, name: &str, version: u64) {
    let mut writer = BundleWriter::new(&root.join(name)).unwrap();
    // An empty file is an empty network; nobody loads it here.
    writer.add(MODEL, b"").unwrap();
    let mut manifest = crate::bundle::Manifest {
        name: name.to_owned(),
        ..manifest_tests::tiny()
    };
    writer.describe(&mut manifest).unwrap();
    writer.commit(&root.join(name).join(version.to_string())).unwrap();
}

fn versions(models: &Models) -> Vec<String> {
    models.iter().map(ToString::to_string).collect()
}

#[test]
fn an_order_that_is_refused_keeps_no_other_change_to_itself() {
    let root = tempfile::tempdir().unwrap();
    publish(root.path(), "sound", 1);
    let mut config = Config::default();
    config.models.repository = Some(root.path().to_owned().into());
    config.models.demo = false;
    let runtime = Runtime::new().unwrap();
    let (mut repository, models) = Repository::open(&config, runtime.handle()).unwrap();
    assert_eq!(versions(&models), ["sound@1"]);
    assert!(repository.changed().is_none(), "nothing is new");

    publish(root.path(), "sound", 2);
    fs::create_dir_all(root.path().join("bad/1")).unwrap();
    fs::write(root.path().join("bad/1").join(MANIFEST), "{}").unwrap();
    let refused = repository.load("bad", None, |_| false).unwrap_err();
    assert!(matches!(refused, ControlError::Refused { .. }), "{refused}");
    let models = repository.changed().unwrap();
    assert_eq!(versions(&models), ["sound@1", "sound@2"]);
    assert!(repository.changed().is_none(), "it was told already");
}
