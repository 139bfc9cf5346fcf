//! What lies in the store lies in the cache, whole, and nothing else; a folder is the store here.

use tempfile::TempDir;
use tokio::runtime::Runtime;

use super::*;
use crate::bundle::{MODEL, manifest_tests, sha256};

/// A store, a cache, and what runs the one to the other.
struct Stage {
    root: TempDir,
    runtime: Runtime,
}

impl Stage {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("store")).unwrap();
        Self {
            root,
            runtime: Runtime::new().unwrap(),
        }
    }

    fn store(&self) -> PathBuf {
        self.root.path().join("store")
    }

    fn cache(&self) -> PathBuf {
        self.root.path().join("cache")
    }

    fn open(&self, budget: u64, pins: &[Version]) -> Result<Mirror, MirrorError> {
        let url = Url::from_directory_path(self.store()).unwrap();
        Mirror::open(&url, &self.cache(), budget, pins, self.runtime.handle().clone())
    }

    fn mirror(&self) -> Mirror {
        self.open(u64::MAX, &[]).unwrap()
    }

    /// Puts a version into the store whose network is `model`, which need not be one.
    fn put(&self, name: &str, version: u64, model: &[u8]) -> PathBuf {
        let folder = self.store().join(name).join(version.to_string());
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(MODEL), model).unwrap();
        fs::write(folder.join(MANIFEST), manifest(name, model)).unwrap();
        folder
    }

    /// The versions in the cache.
    fn cached(&self) -> Vec<Version> {
        let entries = repository::scan(&self.cache()).unwrap().into_iter();
        entries.map(|entry| (entry.name, entry.version)).collect()
    }

    fn cached_model(&self, name: &str, version: u64) -> Vec<u8> {
        fs::read(self.cache().join(name).join(version.to_string()).join(MODEL)).unwrap()
    }
}

fn manifest(name: &str, model: &[u8]) -> Vec<u8> {
    let manifest = Manifest {
        name: name.to_owned(),
        sha256: [(MODEL.to_owned(), sha256(model))].into(),
        ..manifest_tests::tiny()
    };
    serde_json::to_vec(&manifest).unwrap()
}

fn versions(all: &[(&str, u64)]) -> Vec<Version> {
    all.iter()
        .map(|(name, version)| ((*name).to_owned(), *version))
        .collect()
}

#[test]
fn versions_come_whole_and_go() {
    let stage = Stage::new();
    // Of several parts, the last one short, in which no two bytes of a part are alike another's.
    let large: Vec<u8> = (0..2 * PART as usize + 77)
        .map(|at| (at % 251) as u8 ^ (at >> 16) as u8)
        .collect();
    stage.put("a", 1, &large);
    stage.put("a", 2, b"small");
    stage.put("b", 1, b"");
    // Neither is a version.
    fs::create_dir_all(stage.store().join("a/.versions")).unwrap();
    fs::write(stage.store().join("a/.versions/3"), "").unwrap();
    fs::create_dir_all(stage.store().join("a/3")).unwrap();
    fs::write(
        stage.store().join("a/3").join(MODEL),
        "its manifest is yet to come",
    )
    .unwrap();
    let mut mirror = stage.mirror();
    mirror.sync(Instant::now()).unwrap();
    assert_eq!(stage.cached(), versions(&[("a", 1), ("a", 2), ("b", 1)]));
    assert!(stage.cached_model("a", 1) == large);
    fs::remove_dir_all(stage.store().join("a/1")).unwrap();
    mirror.sync(Instant::now()).unwrap();
    assert_eq!(stage.cached(), versions(&[("a", 2), ("b", 1)]));
    // Written again: another one.
    stage.put("b", 1, b"others");
    mirror.sync(Instant::now()).unwrap();
    assert_eq!(stage.cached_model("b", 1), b"others");
}

#[test]
fn half_an_upload_is_nothing_until_it_is_whole() {
    let stage = Stage::new();
    let folder = stage.put("a", 1, b"sound");
    let mut mirror = stage.mirror();
    mirror.sync(Instant::now()).unwrap();
    for half in [None, Some("so")] {
        let folder = stage.put("a", 2, b"whole");
        match half {
            None => fs::remove_file(folder.join(MODEL)).unwrap(),
            Some(half) => fs::write(folder.join(MODEL), half).unwrap(),
        }
        mirror.sync(Instant::now()).unwrap();
        assert_eq!(stage.cached(), versions(&[("a", 1)]), "{half:?}");
    }
    stage.put("a", 2, b"whole");
    mirror.sync(Instant::now()).unwrap();
    assert_eq!(stage.cached(), versions(&[("a", 1), ("a", 2)]));
    // What was whole stays, whatever becomes of it in the store.
    fs::write(folder.join(MODEL), "so").unwrap();
    mirror.sync(Instant::now()).unwrap();
    assert_eq!(stage.cached_model("a", 1), b"sound");
    for model in fs::read_dir(stage.cache().join("a")).unwrap() {
        assert!(!BundleWriter::is_partial(&model.unwrap().path()));
    }
}

#[test]
fn the_newest_and_the_pinned_are_kept_and_others_as_they_fit() {
    let stage = Stage::new();
    for version in 1..=4 {
        stage.put("a", version, &[0; 10_000]);
    }
    stage.put("b", 1, &[0; 10_000]);
    // Room for three, with their manifests.
    let keeps = |pins: &[Version]| {
        let mut mirror = stage.open(35_000, pins).unwrap();
        mirror.sync(Instant::now()).unwrap();
        stage.cached()
    };
    assert_eq!(keeps(&[]), versions(&[("a", 3), ("a", 4), ("b", 1)]));
    let pinned = versions(&[("a", 1)]);
    assert_eq!(keeps(&pinned), versions(&[("a", 1), ("a", 4), ("b", 1)]));
    // What was left out comes when another has gone.
    let mut mirror = stage.open(35_000, &[]).unwrap();
    mirror.sync(Instant::now()).unwrap();
    fs::remove_dir_all(stage.store().join("a/4")).unwrap();
    mirror.sync(Instant::now()).unwrap();
    assert_eq!(stage.cached(), versions(&[("a", 2), ("a", 3), ("b", 1)]));
}

#[test]
fn what_is_cached_stays_while_the_store_is_away_and_is_not_fetched_again() {
    let stage = Stage::new();
    stage.put("a", 1, b"sound");
    let mut mirror = stage.mirror();
    mirror.sync(Instant::now()).unwrap();
    let place = stage.cache().join("a/1");
    let written = || fs::metadata(place.join(MANIFEST)).unwrap().modified().unwrap();
    let first = written();
    fs::rename(stage.store(), stage.root.path().join("away")).unwrap();
    assert!(mirror.sync(Instant::now()).unwrap_err().may_pass());
    assert_eq!(stage.cached(), versions(&[("a", 1)]));
    fs::rename(stage.root.path().join("away"), stage.store()).unwrap();
    mirror.sync(Instant::now()).unwrap();
    assert_eq!(written(), first);
}

#[test]
fn a_cache_is_one_servers_and_mended_when_it_starts() {
    let stage = Stage::new();
    // An empty file is an empty network.
    stage.put("a", 1, b"");
    stage.put("a", 2, b"");
    let mut mirror = stage.mirror();
    mirror.sync(Instant::now()).unwrap();
    let second = stage.open(u64::MAX, &[]).unwrap_err();
    assert!(matches!(second, MirrorError::Locked(_)), "{second}");
    drop(mirror);

    fs::write(stage.cache().join("a/1").join(MODEL), "rotten").unwrap();
    let whole = fs::metadata(stage.cache().join("a/2").join(MANIFEST))
        .unwrap()
        .modified()
        .unwrap();
    let left_behind = stage.cache().join("a/.partial-7-0");
    fs::create_dir(&left_behind).unwrap();
    stage.mirror().sync(Instant::now()).unwrap();
    assert_eq!(stage.cached_model("a", 1), b"");
    let after = fs::metadata(stage.cache().join("a/2").join(MANIFEST))
        .unwrap()
        .modified()
        .unwrap();
    assert_eq!(after, whole, "it was fetched again");
    assert!(!left_behind.exists());
}

#[test]
fn a_place_of_one_model_is_named() {
    for (below, says) in [("", "the place of one model"), ("2", "one version of a model")] {
        let stage = Stage::new();
        stage.put("a", 2, b"");
        let url = Url::from_directory_path(stage.store().join("a").join(below)).unwrap();
        let handle = stage.runtime.handle().clone();
        let mut mirror = Mirror::open(&url, &stage.cache(), u64::MAX, &[], handle).unwrap();
        let error = mirror.sync(Instant::now()).unwrap_err();
        assert!(!error.may_pass() && error.to_string().contains(says), "{error}");
    }
}

#[test]
fn manifests_cannot_be_endless_nor_point_elsewhere() {
    let stage = Stage::new();
    let folder = stage.put("a", 1, b"");
    fs::write(folder.join(MANIFEST), vec![b' '; MAX_MANIFEST as usize + 1]).unwrap();
    let folder = stage.put("a", 2, b"");
    let escaping = String::from_utf8(manifest("a", b""))
        .unwrap()
        .replace(MODEL, "../../../model.onnx");
    fs::write(folder.join(MANIFEST), escaping).unwrap();
    let mut mirror = stage.mirror();
    mirror.sync(Instant::now()).unwrap();
    assert!(stage.cached().is_empty());
    let refused = mirror
        .known
        .values()
        .filter_map(|known| known.refused.as_ref())
        .filter(|refusal| matches!(refusal.error, FetchError::Bundle(BundleError::Manifest(_))))
        .count();
    assert_eq!(refused, 2, "{:?}", mirror.known);
}

#[test]
fn what_cannot_be_fetched_is_left_alone_for_longer_each_time_and_told() {
    let stage = Stage::new();
    stage.put("a", 1, b"sound");
    stage.put("a", 2, b"sound too");
    let mut mirror = stage.mirror();
    // Where the version would be put there is a file: as on a disk that cannot be written, it may pass.
    let in_the_way = stage.cache().join("a");
    fs::write(&in_the_way, "").unwrap();
    let start = Instant::now();
    let after = |seconds| start + Duration::from_secs(seconds);
    let mut tried_again = Vec::new();
    for seconds in 0..4000 {
        let pause = |mirror: &Mirror| {
            let known = &mirror.known[&("a".to_owned(), 2)];
            known.refused.as_ref().map(|refusal| refusal.again_at)
        };
        let before = (seconds > 0).then(|| pause(&mirror)).flatten();
        let changed = mirror.sync(after(seconds)).unwrap();
        assert_eq!(changed, seconds == 0, "at {seconds} s");
        if before != pause(&mirror) {
            tried_again.push(seconds);
        }
    }
    assert_eq!(
        tried_again,
        [0, 10, 30, 70, 150, 310, 630, 1230, 1830, 2430, 3030, 3630]
    );
    let told: Vec<Version> = mirror.refused().map(|(version, _)| version.clone()).collect();
    assert_eq!(told, versions(&[("a", 1), ("a", 2)]));
    fs::remove_file(&in_the_way).unwrap();
    assert!(!mirror.sync(after(4000)).unwrap());
    assert!(stage.cached().is_empty());
    // Somebody who wants it now need not wait.
    mirror.try_all_again(after(4001));
    assert!(mirror.sync(after(4001)).unwrap());
    assert_eq!(stage.cached(), versions(&[("a", 1), ("a", 2)]));
    assert_eq!(mirror.refused().count(), 0);
}

#[test]
fn old_versions_without_room_are_not_missed_and_the_newest_is() {
    let stage = Stage::new();
    stage.put("a", 1, &[0; 8_000]);
    stage.put("a", 2, &[0; 12_000]);
    let mut mirror = stage.open(15_000, &[]).unwrap();
    assert!(!mirror.sync(Instant::now()).unwrap());
    assert_eq!(stage.cached(), versions(&[("a", 2)]));
    stage.put("a", 3, &[0; 16_000]);
    assert!(mirror.sync(Instant::now()).unwrap());
    let missed: Vec<Version> = mirror.refused().map(|(version, _)| version.clone()).collect();
    assert_eq!(missed, versions(&[("a", 3)]));
}
