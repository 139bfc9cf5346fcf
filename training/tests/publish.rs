//! Publishing adds versions to a repository, whole, each to its own number.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;

use denoised::bundle::{Bundle, BundleError, MANIFEST, MODEL, repository};
use denoised::diffusion::Parameterization;
use denoised::diffusion::{GraphKind, Schedule};
use serde_json::json;
use training::export::{self, Options, TrainedModel};
use training::model::NetworkConfig;
use training::publish::{PublishError, Same, publish};

/// A bundle of two files outside of any repository.
fn bundle(root: &Path) -> PathBuf {
    let config = NetworkConfig {
        states: 5,
        length: 4,
        hidden_size: 4,
        cond_dim: 4,
        blocks: 1,
        heads: 1,
        dropout: 0.0,
        scale_by_sigma: true,
        parameterization: Parameterization::Score,
        time_conditioned: true,
        tie_embeddings: false,
    };
    let model = TrainedModel {
        name: "tiny",
        config: &config,
        weights: &config.initial_weights(1, 0.0),
        graph: GraphKind::Absorbing,
        schedule: Schedule::LogLinear { eps: 1e-3 },
        tokenizer: None,
        end_of_document: None,
        provenance: json!({}),
    };
    let directory = root.join("exported");
    let options = Options {
        external_above: 0,
        ..Options::default()
    };
    export::bundle_with(&directory, model, &options).unwrap();
    directory
}

fn versions(repository: &Path) -> Vec<u64> {
    let entries = repository::scan(repository).unwrap();
    assert!(entries.iter().all(|entry| entry.name == "tiny"));
    entries.iter().map(|entry| entry.version).collect()
}

#[test]
fn versions_count_up_and_hold_what_was_published() {
    let root = tempfile::tempdir().unwrap();
    let (bundle, repository) = (bundle(root.path()), root.path().join("models"));
    let place = repository.to_str().unwrap();
    assert_eq!(
        publish(&bundle, place, Same::Again).unwrap().to_string(),
        "tiny@1"
    );
    assert_eq!(
        publish(&bundle, &format!("file://{place}"), Same::Again)
            .unwrap()
            .to_string(),
        "tiny@2"
    );
    let [published, original] =
        [repository.join("tiny/2"), bundle].map(|directory| Bundle::open(&directory).unwrap());
    assert_eq!(published.manifest(), original.manifest());
    assert_eq!(versions(&repository), [1, 2]);
    let left: Vec<_> = fs::read_dir(repository.join("tiny")).unwrap().collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[test]
fn what_others_left_unfinished_is_neither_touched_nor_taken() {
    let root = tempfile::tempdir().unwrap();
    let (bundle, repository) = (bundle(root.path()), root.path().join("models"));
    let hidden = repository.join("tiny/.partial-1-0");
    fs::create_dir_all(&hidden).unwrap();
    fs::write(hidden.join(MANIFEST), "{").unwrap();
    // Copied by hand, and not there yet: its manifest comes last.
    let unfinished = repository.join("tiny/7");
    fs::create_dir_all(&unfinished).unwrap();
    fs::write(unfinished.join(MODEL), "half of a netw").unwrap();
    let published = publish(&bundle, repository.to_str().unwrap(), Same::Again).unwrap();
    assert_eq!(published.version, 8);
    assert_eq!(versions(&repository), [8]);
    assert!(hidden.is_dir() && unfinished.is_dir());
}

#[test]
fn what_is_there_is_not_published_twice() {
    let root = tempfile::tempdir().unwrap();
    let (bundle, repository) = (bundle(root.path()), root.path().join("models"));
    let place = repository.to_str().unwrap();
    let publish = |same| publish(&bundle, place, same).unwrap().version;
    assert_eq!([Same::Enough, Same::Enough].map(publish), [1, 1]);
    assert_eq!([Same::Again, Same::Enough].map(publish), [2, 2]);
    // Another network under the same name is the newest.
    let manifest = repository.join("tiny/2").join(MANIFEST);
    let changed =
        fs::read_to_string(&manifest)
            .unwrap()
            .replacen("\"model.onnx\": \"", "\"model.onnx\": \"0", 1);
    fs::write(&manifest, changed).unwrap();
    assert_eq!(publish(Same::Enough), 3);
    assert_eq!(versions(&repository), [1, 2, 3]);
}

#[test]
fn publishers_at_once_get_versions_of_their_own() {
    let root = tempfile::tempdir().unwrap();
    let (bundle, repository) = (bundle(root.path()), root.path().join("models"));
    let place = repository.to_str().unwrap();
    let got: BTreeSet<u64> = thread::scope(|scope| {
        let publishers: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| publish(&bundle, place, Same::Again).unwrap().version))
            .collect();
        publishers.into_iter().map(|p| p.join().unwrap()).collect()
    });
    assert_eq!(got, (1..=8).collect());
    for version in versions(&repository) {
        Bundle::open(&repository.join(format!("tiny/{version}"))).unwrap();
    }
}

#[test]
fn a_damaged_bundle_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let (bundle, repository) = (bundle(root.path()), root.path().join("models"));
    let data = bundle.join("model.onnx.data");
    let mut bytes = fs::read(&data).unwrap();
    bytes[100] ^= 1;
    fs::write(&data, bytes).unwrap();
    let refused = publish(&bundle, repository.to_str().unwrap(), Same::Again).unwrap_err();
    assert!(
        matches!(&refused, PublishError::Bundle(BundleError::Hash { file, .. }) if file == "model.onnx.data"),
        "{refused}"
    );
    assert!(!repository.exists());
}

#[test]
fn places_that_cannot_be_written_to_are_named() {
    let root = tempfile::tempdir().unwrap();
    let bundle = bundle(root.path());
    for place in ["ftp://somewhere/models", "file://models"] {
        let refused = publish(&bundle, place, Same::Again).unwrap_err().to_string();
        assert!(refused.contains(place), "{refused}");
    }
}

mod stores {
    use std::sync::Arc;

    use object_store::memory::InMemory;
    use object_store::path::Path as Place;
    use object_store::{ObjectStore, ObjectStoreExt};
    use training::publish::object_store::publish;

    use super::*;

    #[tokio::test]
    async fn a_version_is_there_when_its_manifest_is() {
        let root = tempfile::tempdir().unwrap();
        let directory = bundle(root.path());
        let opened = Bundle::open(&directory).unwrap();
        let store = InMemory::new();
        let models = Place::from("team/models");
        for version in [1, 2] {
            let published = publish(&opened, &directory, &store, &models, Same::Again)
                .await
                .unwrap();
            assert_eq!(published.version, version);
        }
        // Back in a folder it is a bundle.
        let copy = root.path().join("copy");
        fs::create_dir(&copy).unwrap();
        let place = models.clone().join("tiny").join("2");
        let mut times = Vec::new();
        for object in store.list_with_delimiter(Some(&place)).await.unwrap().objects {
            let bytes = store.get(&object.location).await.unwrap().bytes().await.unwrap();
            let name = object.location.filename().unwrap();
            times.push((object.last_modified, name.to_owned()));
            fs::write(copy.join(name), bytes).unwrap();
        }
        times.sort();
        assert_eq!(times.last().unwrap().1, MANIFEST);
        assert_eq!(Bundle::open(&copy).unwrap().manifest(), opened.manifest());
    }

    /// A job that was killed after it had published is started again.
    #[tokio::test]
    async fn what_is_there_is_not_published_twice() {
        let root = tempfile::tempdir().unwrap();
        let directory = bundle(root.path());
        let opened = Bundle::open(&directory).unwrap();
        let (store, models) = (InMemory::new(), Place::from("models"));
        let publish = async |same| {
            let published = publish(&opened, &directory, &store, &models, same).await;
            published.unwrap().version
        };
        assert_eq!(publish(Same::Enough).await, 1);
        assert_eq!(publish(Same::Enough).await, 1);
        // One that never came to its end is not there.
        let half = Place::from("models/tiny/5/model.onnx");
        store.put(&half, "".into()).await.unwrap();
        assert_eq!(publish(Same::Enough).await, 1);
        assert_eq!(publish(Same::Again).await, 6);
        // Another network under the same name is the newest: the old one counts as new again.
        let other = Place::from("models/tiny/7/manifest.json");
        store
            .put(&other, r#"{"sha256": {"model.onnx": "other"}}"#.into())
            .await
            .unwrap();
        assert_eq!(publish(Same::Enough).await, 8);
    }

    #[tokio::test]
    async fn a_claimed_version_is_never_taken() {
        let root = tempfile::tempdir().unwrap();
        let directory = bundle(root.path());
        let opened = Bundle::open(&directory).unwrap();
        let store = Arc::new(InMemory::new());
        let models = Place::from("models");
        // Somebody has claimed 4 and died, somebody else has copied 2 by hand.
        for place in ["models/tiny/.versions/4", "models/tiny/2/model.onnx"] {
            store.put(&Place::from(place), "".into()).await.unwrap();
        }
        let publishers = (0..6).map(|_| {
            let (store, models) = (Arc::clone(&store), models.clone());
            let (opened, directory) = (opened.clone(), directory.clone());
            tokio::spawn(
                async move { publish(&opened, &directory, store.as_ref(), &models, Same::Again).await },
            )
        });
        let publishers: Vec<_> = publishers.collect();
        let mut got = BTreeSet::new();
        for publisher in publishers {
            got.insert(publisher.await.unwrap().unwrap().version);
        }
        assert_eq!(got, (5..=10).collect());
    }

    #[tokio::test]
    async fn what_fails_half_way_leaves_nothing_to_see() {
        let root = tempfile::tempdir().unwrap();
        let directory = bundle(root.path());
        let opened = Bundle::open(&directory).unwrap();
        fs::write(directory.join(MODEL), "changed since it was opened").unwrap();
        let store = InMemory::new();
        let refused = publish(&opened, &directory, &store, &Place::default(), Same::Again).await;
        assert!(matches!(
            refused,
            Err(PublishError::Bundle(BundleError::Hash { .. }))
        ));
        let listed = store
            .list_with_delimiter(Some(&Place::from("tiny/1")))
            .await
            .unwrap();
        assert!(listed.objects.is_empty());
    }
}
