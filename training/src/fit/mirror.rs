//! Copies of a run's checkpoints elsewhere, so that the run survives its machine.
//!
//! A folder or an object store holds `checkpoints/<step>/` as the run's directory does. Stores have no
//! rename, so that order does the work: `state.json` goes last and is deleted first, and a checkpoint
//! without it is not there. Settings, provenance, metrics and samples go before it: whatever was copied last, the
//! newest checkpoint here finds its past beside it.
//!
//! A mirror belongs to one run, whose name is in every `state.json`: what another run wrote is neither
//! mixed with nor removed.

mod error;

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::time::Duration;

use object_store::local::LocalFileSystem;
use object_store::path::Path as Place;
use object_store::{Error as StoreError, ObjectStore, ObjectStoreExt};
use tokio::runtime::Runtime;
use url::Url;

pub use self::error::{MirrorError, TransferError};
use crate::fit::checkpoint::{self, State};
use crate::fit::file::FileError;
use crate::fit::record::{self, CONFIG, METRICS, PROVENANCE, SAMPLES};
use crate::publish::object_store as store;
use crate::say::say;

const CHECKPOINTS: &str = "checkpoints";
/// How long a store that does not answer is asked again: the run waits meanwhile.
const PATIENCE: Duration = Duration::from_secs(15);

/// The checkpoints of a mirror, by step.
#[derive(Debug, Default)]
struct Copies {
    /// Those that are complete, with the name of the run that wrote each.
    whole: BTreeMap<u64, String>,
    /// Those whose `state.json` is none: which run's they are is not known.
    damaged: Vec<u64>,
}

/// A place for copies.
#[derive(Debug)]
pub struct Mirror {
    store: Box<dyn ObjectStore>,
    root: Place,
    runtime: Runtime,
    name: String,
}

impl Mirror {
    /// At `place`, a folder or a URL.
    pub fn open(place: &str) -> Result<Self, MirrorError> {
        let opened = || -> Result<_, String> {
            let (store, root) = open(place)?;
            let mut runtime = tokio::runtime::Builder::new_current_thread();
            let runtime = runtime.enable_all().build().map_err(|error| error.to_string())?;
            Ok((store, root, runtime))
        };
        let (store, root, runtime) = opened().map_err(|problem| MirrorError::Place {
            place: place.to_owned(),
            problem,
        })?;
        Ok(Self {
            store,
            root,
            runtime,
            name: place.to_owned(),
        })
    }

    fn folder(&self, step: u64) -> Place {
        let steps = self.root.clone().join(CHECKPOINTS);
        steps.join(format!("{step:08}"))
    }

    /// Steps whose checkpoints are complete here, ascending.
    pub fn steps(&self) -> Result<Vec<u64>, MirrorError> {
        Ok(self.copies()?.whole.into_keys().collect())
    }

    fn copies(&self) -> Result<Copies, MirrorError> {
        let all = async {
            let root = self.root.clone().join(CHECKPOINTS);
            let folders = self.store.list_with_delimiter(Some(&root)).await?.common_prefixes;
            let mut copies = Copies::default();
            for folder in folders {
                let Some(step) = folder.filename().and_then(|name| name.parse().ok()) else {
                    continue;
                };
                match self.state(&folder).await {
                    Ok(state) => {
                        copies.whole.insert(step, state.run);
                    }
                    Err(error @ TransferError::State { .. }) => {
                        say(&format!("run.mirror {}: {error} and passed over", self.name));
                        copies.damaged.push(step);
                    }
                    Err(TransferError::Store(StoreError::NotFound { .. })) => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(copies)
        };
        self.runtime.block_on(all).map_err(|source| MirrorError::List {
            name: self.name.clone(),
            source: Box::new(source),
        })
    }

    /// What the checkpoint in `folder` holds besides tensors.
    async fn state(&self, folder: &Place) -> Result<State, TransferError> {
        let place = folder.clone().join(checkpoint::STATE);
        let json = self.store.get(&place).await?.bytes().await?;
        serde_json::from_slice(&json).map_err(|source| TransferError::State {
            place: place.to_string(),
            source,
        })
    }

    /// Refuses to begin a run here where there is one already.
    pub fn check_empty(&self) -> Result<(), MirrorError> {
        let copies = self.copies()?;
        // Somebody's work, whatever has become of it.
        match copies.whole.into_keys().chain(copies.damaged).max() {
            None => Ok(()),
            Some(last) => Err(MirrorError::Holds {
                name: self.name.clone(),
                last,
            }),
        }
    }

    /// Refuses to go back to an earlier step than the last, where checkpoints after it are nowhere but here.
    pub fn check_known(&self, run: &Path) -> Result<(), MirrorError> {
        let (steps, here) = (self.steps()?, checkpoint::steps(run));
        let last = here.last().copied().unwrap_or_default();
        match steps.into_iter().rev().find(|step| *step > last) {
            None => Ok(()),
            Some(step) => Err(MirrorError::Newer {
                name: self.name.clone(),
                step,
                run: run.to_owned(),
            }),
        }
    }

    /// Copies here what the directory of `run` has and this place lacks: the checkpoint of `step`, those that could
    /// not be copied before, settings, provenance, metrics, and samples. Then removes the run's checkpoints that its
    /// directory no longer has.
    ///
    /// # Errors
    /// Where the store fails; what is here stays whole, and the next time goes on from it. Where checkpoints of
    /// another run are here: nothing is copied or removed.
    pub fn push(&self, directory: &Path, run: &str, step: u64) -> Result<(), MirrorError> {
        let (copies, here) = (self.copies()?.whole, checkpoint::steps(directory));
        self.check_run(&copies, run, directory)?;
        let missing = here
            .iter()
            .filter(|other| **other == step || !copies.contains_key(other));
        let copied_before = copies.keys().filter(|copied| **copied < step).max().copied();
        let copy = async {
            self.upload_record(directory, copied_before.unwrap_or_default())
                .await?;
            for step in missing {
                self.upload(directory, *step).await?;
            }
            for gone in copies.keys().filter(|step| !here.contains(step)) {
                self.remove(*gone).await?;
            }
            Ok(())
        };
        self.runtime.block_on(copy).map_err(|source| MirrorError::Copy {
            directory: directory.to_owned(),
            name: self.name.clone(),
            source: Box::new(source),
        })
    }

    /// Refuses to mix the checkpoints of two runs.
    fn check_run(
        &self,
        copies: &BTreeMap<u64, String>,
        run: &str,
        directory: &Path,
    ) -> Result<(), MirrorError> {
        match copies.iter().find(|(_, of)| *of != run) {
            None => Ok(()),
            Some((&step, _)) => Err(MirrorError::OtherRun {
                name: self.name.clone(),
                step,
                directory: directory.to_owned(),
            }),
        }
    }

    /// All but checkpoints; of samples those after `step`.
    async fn upload_record(&self, directory: &Path, step: u64) -> Result<(), TransferError> {
        let samples = record::sample_steps(directory).into_iter();
        let samples = samples
            .filter(|sample| *sample > step)
            .map(|step| [SAMPLES.to_owned(), record::sample_name(step)]);
        let files = [CONFIG, PROVENANCE, METRICS].map(|name| vec![name.to_owned()]);
        for parts in files.into_iter().chain(samples.map(Vec::from)) {
            let path = parts
                .iter()
                .fold(directory.to_owned(), |path, part| path.join(part));
            let place = parts
                .iter()
                .fold(self.root.clone(), |place, part| place.join(part.as_str()));
            if path.is_file() {
                store::upload_file(&path, self.store.as_ref(), &place).await?;
            }
        }
        Ok(())
    }

    async fn upload(&self, directory: &Path, step: u64) -> Result<(), TransferError> {
        let (from, to) = (checkpoint::folder(directory, step), self.folder(step));
        let mut names: Vec<String> = fs::read_dir(&from)
            .and_then(|entries| {
                let name =
                    |entry: io::Result<fs::DirEntry>| Ok(entry?.file_name().to_string_lossy().into_owned());
                entries.map(name).collect()
            })
            .map_err(FileError::cannot("read", &from))?;
        names.sort_by_key(|name| name == checkpoint::STATE);
        // Of a run that went back behind this step there may be another one.
        self.delete(&to.clone().join(checkpoint::STATE)).await?;
        for name in &names {
            let place = to.clone().join(name.as_str());
            store::upload_file(&from.join(name), self.store.as_ref(), &place).await?;
        }
        Ok(())
    }

    async fn remove(&self, step: u64) -> Result<(), TransferError> {
        let folder = self.folder(step);
        self.delete(&folder.clone().join(checkpoint::STATE)).await?;
        for object in self.store.list_with_delimiter(Some(&folder)).await?.objects {
            self.delete(&object.location).await?;
        }
        Ok(())
    }

    async fn delete(&self, place: &Place) -> Result<(), TransferError> {
        match self.store.delete(place).await {
            Ok(()) | Err(StoreError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Brings the latest checkpoint into the run's directory if it is newer than what is there, with the best one,
    /// metrics, provenance and samples; returns its step.
    ///
    /// # Errors
    /// Where the store fails, or holds checkpoints of another run than the directory.
    pub fn pull(&self, directory: &Path) -> Result<Option<u64>, MirrorError> {
        let copies = self.copies()?.whole;
        let last = checkpoint::steps(directory).last().copied();
        if let Some(last) = last {
            let state = checkpoint::read_state(&checkpoint::folder(directory, last))?;
            self.check_run(&copies, &state.run, directory)?;
        }
        let newest = copies.last_key_value().map(|(step, _)| *step);
        let Some(step) = newest.filter(|newest| last.is_none_or(|last| last < *newest)) else {
            return Ok(None);
        };
        let fetch = async {
            self.download_record(directory).await?;
            let state = self.state(&self.folder(step)).await?;
            let here = checkpoint::steps(directory);
            let best = state.best.map(|(_, best)| best);
            let best = best.filter(|best| copies.contains_key(best) && !here.contains(best) && *best != step);
            // The newest last: until it is there, the next time fetches what is missing.
            for step in best.into_iter().chain([step]) {
                self.download_checkpoint(directory, step).await?;
            }
            Ok(())
        };
        let fetched = self.runtime.block_on(fetch);
        fetched.map_err(|source| MirrorError::Fetch {
            step,
            name: self.name.clone(),
            source: Box::new(source),
        })?;
        Ok(Some(step))
    }

    async fn download_checkpoint(&self, directory: &Path, step: u64) -> Result<(), TransferError> {
        let draft = checkpoint::draft(directory, step);
        fs::create_dir_all(&draft).map_err(FileError::cannot("create", &draft))?;
        self.download_all(&self.folder(step), &draft).await?;
        checkpoint::verify(&draft)?;
        fs::rename(&draft, checkpoint::folder(directory, step))
            .map_err(FileError::cannot("rename", &draft))?;
        Ok(())
    }

    async fn download_record(&self, directory: &Path) -> Result<(), TransferError> {
        let samples = directory.join(SAMPLES);
        fs::create_dir_all(&samples).map_err(FileError::cannot("create", &samples))?;
        self.download_all(&self.root.clone().join(SAMPLES), &samples)
            .await?;
        for name in [METRICS, PROVENANCE] {
            // Whole or not at all: what is there may be all that there is.
            let partial = directory.join(format!("{name}.partial"));
            if self.download(&self.root.clone().join(name), &partial).await? {
                fs::rename(&partial, directory.join(name)).map_err(FileError::cannot("rename", &partial))?;
            }
        }
        Ok(())
    }

    async fn download_all(&self, from: &Place, to: &Path) -> Result<(), TransferError> {
        for object in self.store.list_with_delimiter(Some(from)).await?.objects {
            let name = object.location.filename().unwrap_or_default();
            self.download(&object.location, &to.join(name)).await?;
        }
        Ok(())
    }

    /// Whether there was something.
    async fn download(&self, place: &Place, to: &Path) -> Result<bool, TransferError> {
        let size = match self.store.head(place).await {
            Ok(object) => object.size,
            Err(StoreError::NotFound { .. }) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let mut file = File::create(to).map_err(FileError::cannot("create", to))?;
        let mut at = 0;
        while at < size {
            let end = size.min(at + (8 << 20));
            let part = self.store.get_range(place, at..end).await?;
            file.write_all(&part).map_err(FileError::cannot("write", to))?;
            at = end;
        }
        Ok(true)
    }
}

/// The store and the place in it that a folder or URL names.
fn open(place: &str) -> Result<(Box<dyn ObjectStore>, Place), String> {
    let url = if place.contains("://") {
        Url::parse(place).map_err(|error| error.to_string())?
    } else {
        let folder = std::path::absolute(place).map_err(|error| error.to_string())?;
        Url::from_directory_path(folder).map_err(|()| "it has no URL".to_owned())?
    };
    if url.scheme() != "file" {
        return denoised::store::open(&url, PATIENCE).map_err(|error| error.problem);
    }
    // Without, folders of removed checkpoints would stay, empty.
    let store = LocalFileSystem::new().with_automatic_cleanup(true);
    let root = Place::from_url_path(url.path()).map_err(|error| error.to_string())?;
    Ok((Box::new(store), root))
}
