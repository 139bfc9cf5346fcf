//! A repository in an object store, and the folder that it is mirrored to.
//!
//! Stores have no rename: a version is there when its manifest is. It is fetched into a hidden folder of the cache,
//! every byte hashed on the way, and renamed to its place, so that whoever scans the cache sees whole versions alone,
//! also after a crash. What lies in the cache is served while the store is away.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::ops::{Bound, Range};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use futures_util::{StreamExt, TryStreamExt, stream};
use object_store::path::Path as Place;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt};
use tokio::runtime::Handle;
use url::Url;

use super::repository::Version;
use crate::bundle::{Bundle, BundleError, BundleWriter, MANIFEST, MAX_MANIFEST, Manifest, repository};
use crate::store::{self, PlaceError};

/// Objects of a repository: all their names are kept in memory while it is listed.
const MAX_OBJECTS: usize = 100_000;
/// Bytes that are asked for at once, and how often at the same time.
const PART: u64 = 8 << 20;
const PARTS: usize = 4;
/// How long the store may take to list everything, and for each part.
const LISTING_TIME: Duration = Duration::from_secs(30);
const PART_TIME: Duration = Duration::from_secs(60);
/// How long a store that does not answer is asked again, before another look.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a version that could not be fetched is left alone, doubled each time as long as it is below the last.
const FIRST_PAUSE: Duration = Duration::from_secs(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(600);
/// Held by the server that a cache belongs to.
const LOCK: &str = ".lock";

/// Why a repository in an object store cannot be mirrored.
#[derive(Debug, thiserror::Error)]
pub(super) enum MirrorError {
    /// Its URL cannot be used.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The store does not answer, or not as hoped.
    #[error("{0}")]
    Store(#[from] object_store::Error),
    /// The store does not answer in time.
    #[error("no answer within {} s", .0.as_secs())]
    Slow(Duration),
    /// There is too much of it.
    #[error("it holds more than {MAX_OBJECTS} objects")]
    TooMany,
    /// The URL names a model, or a version, and not the place of all models.
    #[error("it is {0}, must be a place of <model>/<version>")]
    Level(&'static str),
    /// A folder cannot be used: that of the cache, or the store, where that is one.
    #[error("{}: {source}", path.display())]
    Folder {
        /// The folder, or a file in it.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// Another server uses the folder.
    #[error("models.cache {} is used by another server", .0.display())]
    Locked(PathBuf),
}

impl MirrorError {
    /// Whether another time it may work with the same settings.
    pub(super) fn may_pass(&self) -> bool {
        match self {
            Self::Store(_) | Self::Slow(_) | Self::Folder { .. } => true,
            Self::Place(_) | Self::TooMany | Self::Level(_) | Self::Locked(_) => false,
        }
    }
}

/// Why one version is not mirrored.
#[derive(Debug, thiserror::Error)]
enum FetchError {
    /// The store has failed: it is tried again.
    #[error("it cannot be fetched: {0}")]
    Store(#[from] MirrorError),
    /// It is not what its manifest says.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// A file is missing, which may be on its way.
    #[error("{0} is in its manifest and not in the store")]
    Missing(String),
    /// It is larger than all that may be kept.
    #[error("its {0} bytes do not fit into models.cache_megabytes with what comes before it")]
    Room(u64),
}

impl FetchError {
    /// Whether it can be another time that the same objects are fetched.
    fn may_pass(&self) -> bool {
        match self {
            // There is room when others have gone.
            Self::Store(_) | Self::Bundle(BundleError::Io { .. }) | Self::Room(_) => true,
            Self::Bundle(_) | Self::Missing(_) => false,
        }
    }
}

/// A version in the store: its files, and what tells whether they have changed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Listed {
    /// Sizes and tags by file name.
    files: BTreeMap<String, (u64, String)>,
}

impl Listed {
    fn bytes(&self) -> u64 {
        self.files.values().map(|(bytes, _)| bytes).sum()
    }
}

/// A version that was looked at: as it was listed, and why it was refused, if it was.
#[derive(Debug)]
struct Known {
    listed: Listed,
    refused: Option<Refusal>,
}

/// Why a version was not fetched, and when it is tried again, where that may help.
#[derive(Debug)]
struct Refusal {
    error: FetchError,
    pause: Duration,
    again_at: Option<Instant>,
}

/// A repository in an object store and its mirror.
#[derive(Debug)]
pub(super) struct Mirror {
    store: Box<dyn ObjectStore>,
    place: Place,
    /// Where the store is a folder, which must be there: an unmounted one is no empty repository.
    folder: Option<PathBuf>,
    cache: PathBuf,
    /// Bytes that the cache may have, but for a version that is on its way.
    budget: u64,
    /// Versions that stand for their names: they are kept before all others.
    pins: Vec<Version>,
    known: BTreeMap<Version, Known>,
    runtime: Handle,
    _lock: File,
}

impl Mirror {
    /// Mirrors `url` to the folder `cache`, at most `budget` bytes of it; `pins` first.
    pub(super) fn open(
        url: &Url,
        cache: &Path,
        budget: u64,
        pins: &[Version],
        runtime: Handle,
    ) -> Result<Self, MirrorError> {
        let (store, place) = store::open(url, PATIENCE)?;
        fs::create_dir_all(cache).map_err(|source| in_folder(cache, source))?;
        let lock = cache.join(LOCK);
        let file = File::create(&lock).map_err(|source| in_folder(&lock, source))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(MirrorError::Locked(cache.to_owned())),
            Err(TryLockError::Error(source)) => return Err(in_folder(&lock, source)),
        }
        remove_partial(cache)?;
        Ok(Self {
            store,
            place,
            folder: (url.scheme() == "file")
                .then(|| url.to_file_path().ok())
                .flatten(),
            cache: cache.to_owned(),
            budget,
            pins: pins.to_vec(),
            known: BTreeMap::new(),
            runtime,
            _lock: file,
        })
    }

    /// Fetches what is new in the store, forgets what is gone. Blocks until all is fetched. Whether other versions are
    /// refused than before.
    ///
    /// # Errors
    /// [`MirrorError`] where the store cannot be listed, or the cache cannot be written; what lies in the cache stays.
    pub(super) fn sync(&mut self, now: Instant) -> Result<bool, MirrorError> {
        let told = |mirror: &Self| -> Vec<(Version, String)> {
            let refused = mirror.refused();
            refused.map(|(version, why)| (version.clone(), why)).collect()
        };
        let before = told(self);
        let runtime = self.runtime.clone();
        let listed = runtime.block_on(self.list())?;
        let (wanted, left_out) = self.choose(&listed);
        let wanted_versions: BTreeSet<&Version> = wanted.iter().map(|(version, _)| *version).collect();
        let cached = repository::scan(&self.cache).unwrap_or_default();
        for entry in cached {
            if !wanted_versions.contains(&(entry.name, entry.version)) {
                fs::remove_dir_all(&entry.path).map_err(|source| in_folder(&entry.path, source))?;
            }
        }
        self.known.retain(|version, _| listed.contains_key(version));
        for (version, listed) in wanted {
            let known = self.known.get(version);
            let is_left_alone = known.is_some_and(|known| {
                let again_at = known.refused.as_ref().map(|refusal| refusal.again_at);
                known.listed == *listed && again_at.is_none_or(|at| at.is_none_or(|at| now < at))
            });
            if is_left_alone {
                continue;
            }
            match runtime.block_on(self.fetch(version, listed)) {
                Ok(()) => {
                    let listed = listed.clone();
                    let known = Known {
                        listed,
                        refused: None,
                    };
                    self.known.insert(version.clone(), known);
                }
                Err(error) => self.refuse(version, listed, error, now),
            }
        }
        // Last, when it is known which are the newest.
        for (version, listed) in left_out {
            self.refuse(version, listed, FetchError::Room(listed.bytes()), now);
        }
        Ok(before != told(self))
    }

    /// Tries what could not be fetched the next time, however often it was tried.
    pub(super) fn try_all_again(&mut self, now: Instant) {
        for refusal in self.known.values_mut().filter_map(|known| known.refused.as_mut()) {
            if refusal.error.may_pass() {
                (refusal.again_at, refusal.pause) = (Some(now), Duration::ZERO);
            }
        }
    }

    /// The versions that should be in the cache and are not as they are in the store, with the reason. Old ones that
    /// find no room should not.
    pub(super) fn refused(&self) -> impl Iterator<Item = (&Version, String)> {
        self.known.iter().filter_map(|(version, known)| {
            let error = &known.refused.as_ref()?.error;
            let is_missed = !matches!(error, FetchError::Room(_)) || self.is_wanted(version);
            is_missed.then(|| (version, error.to_string()))
        })
    }

    /// Whether a version is what requests for its model get.
    fn is_wanted(&self, version: &Version) -> bool {
        let newer = self
            .known
            .range((Bound::Excluded(version), Bound::Unbounded))
            .next();
        self.pins.contains(version) || newer.is_none_or(|((name, _), _)| *name != version.0)
    }

    /// Remembers that a version is not mirrored; tells it once.
    fn refuse(&mut self, version: &Version, listed: &Listed, error: FetchError, now: Instant) {
        let before = self.known.get(version);
        let before = before.and_then(|known| Some((&known.listed, known.refused.as_ref()?)));
        if before.map(|(_, refusal)| refusal.error.to_string()) != Some(error.to_string()) {
            let (name, number) = version;
            let model = format!("{name}@{number}");
            // That old versions find no room is what the limit is for.
            if matches!(error, FetchError::Room(_)) && !self.is_wanted(version) {
                tracing::info!(%model, %error, "an old version is not fetched");
            } else {
                tracing::error!(%model, %error, "a version is not fetched");
            }
        }
        let pause = match before {
            Some((as_before, refusal)) if as_before == listed => {
                (2 * refusal.pause).clamp(FIRST_PAUSE, LONGEST_PAUSE)
            }
            _ => FIRST_PAUSE,
        };
        // What finds room now is fetched at once.
        let pause = if matches!(error, FetchError::Room(_)) {
            Duration::ZERO
        } else {
            pause
        };
        let again_at = error.may_pass().then(|| now + pause);
        let refused = Some(Refusal {
            error,
            pause,
            again_at,
        });
        let listed = listed.clone();
        self.known.insert(version.clone(), Known { listed, refused });
    }

    /// All versions that have a manifest.
    async fn list(&self) -> Result<BTreeMap<Version, Listed>, MirrorError> {
        if let Some(folder) = &self.folder {
            fs::read_dir(folder).map_err(|source| in_folder(folder, source))?;
        }
        let all = async {
            let mut versions: BTreeMap<Version, Listed> = BTreeMap::new();
            let mut objects = self.store.list(Some(&self.place));
            let mut count = 0;
            while let Some(object) = objects.try_next().await? {
                count += 1;
                if count > MAX_OBJECTS {
                    return Err(MirrorError::TooMany);
                }
                let parts: Vec<String> = match object.location.prefix_match(&self.place) {
                    Some(parts) => parts.map(|part| part.as_ref().to_owned()).collect(),
                    None => continue,
                };
                match &parts[..] {
                    [file] if file == MANIFEST => {
                        return Err(MirrorError::Level("one version of a model"));
                    }
                    [version, file] if file == MANIFEST && repository::parse_version(version).is_some() => {
                        return Err(MirrorError::Level("the place of one model"));
                    }
                    [name, version, file] => {
                        if let Some(version) = repository::parse_version(version)
                            && repository::is_name(name)
                        {
                            let files = &mut versions.entry((name.clone(), version)).or_default().files;
                            files.insert(file.clone(), (object.size, tag(&object)));
                        }
                    }
                    _ => {}
                }
            }
            versions.retain(|_, listed| listed.files.contains_key(MANIFEST));
            Ok(versions)
        };
        in_time(LISTING_TIME, all).await
    }

    /// The versions that fit into the cache, and the others: pinned ones first, then the newest of each model, then
    /// the second newest.
    #[expect(clippy::type_complexity, reason = "two lists of the same")]
    fn choose<'a>(
        &self,
        all: &'a BTreeMap<Version, Listed>,
    ) -> (Vec<(&'a Version, &'a Listed)>, Vec<(&'a Version, &'a Listed)>) {
        let (mut name, mut newer) = (None, 0_usize);
        let mut ranked: Vec<_> = all
            .iter()
            // The newest of a model first.
            .rev()
            .map(|entry| {
                let of = Some(&entry.0.0);
                newer = if name == of { newer + 1 } else { 0 };
                name = of;
                ((!self.pins.contains(entry.0), newer), entry)
            })
            .collect();
        ranked.sort_by_key(|(rank, _)| *rank);
        let mut taken = 0_u64;
        ranked
            .into_iter()
            .map(|(_, entry)| entry)
            .partition(|(_, listed)| {
                let after = taken.saturating_add(listed.bytes());
                let fits = after <= self.budget;
                if fits {
                    taken = after;
                }
                fits
            })
    }

    /// Brings one version to the cache, if it is not there as it is in the store.
    async fn fetch(&self, version: &Version, listed: &Listed) -> Result<(), FetchError> {
        let (name, number) = version;
        let place = self.place.clone().join(name.as_str()).join(number.to_string());
        let (size, _) = listed.files.get(MANIFEST).cloned().unwrap_or_default();
        if size > MAX_MANIFEST {
            let problem = format!("it has {size} bytes, may have {MAX_MANIFEST}");
            return Err(BundleError::Manifest(problem).into());
        }
        let mut json = Vec::new();
        self.download(&place.clone().join(MANIFEST), size, |part| {
            json.extend_from_slice(part);
            Ok(())
        })
        .await?;
        let manifest = Manifest::from_json(&json).map_err(BundleError::Manifest)?;
        let parent = self.cache.join(name);
        let folder = parent.join(number.to_string());
        // Of a server that ran before, say.
        if fs::read(folder.join(MANIFEST)).is_ok_and(|cached| cached == json) && Bundle::open(&folder).is_ok()
        {
            return Ok(());
        }
        let missing = manifest
            .sha256
            .keys()
            .find(|file| !listed.files.contains_key(*file));
        if let Some(missing) = missing {
            return Err(FetchError::Missing(missing.clone()));
        }
        let mut writer = BundleWriter::new(&parent)?;
        for (file, expected) in &manifest.sha256 {
            let size = listed.files.get(file).map_or(0, |(size, _)| *size);
            let mut written = writer.create(file)?;
            let path = folder.join(file);
            self.download(&place.clone().join(file.as_str()), size, |part| {
                written.write_all(part).map_err(|source| BundleError::Io {
                    path: path.clone(),
                    source,
                })?;
                Ok(())
            })
            .await?;
            let found = writer.close(written)?;
            crate::bundle::check_hash(file, expected, found)?;
        }
        writer.write_manifest(&json)?;
        if folder.exists() {
            fs::remove_dir_all(&folder).map_err(|source| BundleError::Io {
                path: folder.clone(),
                source,
            })?;
        }
        writer.commit(&folder)?;
        tracing::info!(model = %format!("{name}@{number}"), bytes = listed.bytes(), "a version was fetched");
        Ok(())
    }

    /// Reads an object of `size` bytes, part by part, several of which are under way at once.
    async fn download(
        &self,
        place: &Place,
        size: u64,
        mut take: impl FnMut(&[u8]) -> Result<(), FetchError>,
    ) -> Result<(), FetchError> {
        let parts = (0..size.div_ceil(PART)).map(|part| part * PART..((part + 1) * PART).min(size));
        let get = |range: Range<u64>| async move {
            let got = async { Ok(self.store.get_range(place, range).await?) };
            in_time(PART_TIME, got).await
        };
        let mut parts = stream::iter(parts.map(get)).buffered(PARTS);
        while let Some(part) = parts.next().await {
            take(&part?)?;
        }
        Ok(())
    }
}

/// What differs when an object was written again.
fn tag(object: &ObjectMeta) -> String {
    let tag = object.e_tag.as_deref().unwrap_or_default();
    format!("{tag} {}", object.last_modified)
}

async fn in_time<T>(
    limit: Duration,
    work: impl Future<Output = Result<T, MirrorError>>,
) -> Result<T, MirrorError> {
    let ended = tokio::time::timeout(limit, work).await;
    ended.unwrap_or(Err(MirrorError::Slow(limit)))
}

fn in_folder(path: &Path, source: io::Error) -> MirrorError {
    MirrorError::Folder {
        path: path.to_owned(),
        source,
    }
}

/// Removes what a server left behind that was ended while it fetched.
fn remove_partial(cache: &Path) -> Result<(), MirrorError> {
    let inside = |folder: &Path| -> Result<Vec<PathBuf>, MirrorError> {
        let entries = fs::read_dir(folder).map_err(|source| in_folder(folder, source))?;
        Ok(entries
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.is_dir())
            .collect())
    };
    for model in inside(cache)? {
        for version in inside(&model)? {
            if BundleWriter::is_partial(&version) {
                fs::remove_dir_all(&version).map_err(|source| in_folder(&version, source))?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests;
