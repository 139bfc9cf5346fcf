//! Copies of a run's checkpoints elsewhere, so that the run survives its machine.
//!
//! A folder or an object store holds `checkpoints/<step>/` as the run's directory does. Stores have no
//! rename, so that order does the work: `state.json` goes last and is deleted first, and a checkpoint
//! without it is not there. Settings, provenance, metrics and samples go before it: whatever was copied last, the
//! newest checkpoint here finds its past beside it.
//!
//! A mirror belongs to one run, whose name is in every `state.json`: what another run wrote is neither
//! mixed with nor removed.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use object_store::local::LocalFileSystem;
use object_store::path::Path as Place;
use object_store::{Error as StoreError, ObjectStore, ObjectStoreExt};
use tokio::runtime::Runtime;
use url::Url;

use crate::fit::checkpoint::{self, State};
use crate::fit::record::{self, CONFIG, METRICS, PROVENANCE, SAMPLES};
use crate::publish::object_store as store;

const CHECKPOINTS: &str = "checkpoints";
/// How long a store that does not answer is asked again: the run waits meanwhile.
const PATIENCE: Duration = Duration::from_secs(15);

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
    pub fn open(place: &str) -> Result<Self> {
        let context = || format!("run.mirror {place:?} cannot be used");
        let url = if place.contains("://") {
            Url::parse(place).with_context(context)?
        } else {
            let folder = std::path::absolute(place).with_context(context)?;
            Url::from_directory_path(folder).map_err(|()| anyhow!(context()))?
        };
        let (store, root): (Box<dyn ObjectStore>, Place) = if url.scheme() == "file" {
            // Without, folders of removed checkpoints would stay, empty.
            let store = LocalFileSystem::new().with_automatic_cleanup(true);
            (
                Box::new(store),
                Place::from_url_path(url.path()).with_context(context)?,
            )
        } else {
            denoised::store::open(&url, PATIENCE)
                .map_err(|error| anyhow!("{}: {}", context(), error.problem))?
        };
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
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
    pub fn steps(&self) -> Result<Vec<u64>> {
        Ok(self.copies()?.into_keys().collect())
    }

    /// Steps whose checkpoints are complete here, each with the name of the run that wrote it.
    fn copies(&self) -> Result<BTreeMap<u64, String>> {
        let all = async {
            let root = self.root.clone().join(CHECKPOINTS);
            let folders = self.store.list_with_delimiter(Some(&root)).await?.common_prefixes;
            let mut copies = BTreeMap::new();
            for folder in folders {
                let Some(step) = folder.filename().and_then(|name| name.parse().ok()) else {
                    continue;
                };
                match self.store.get(&folder.join(checkpoint::STATE)).await {
                    Ok(state) => {
                        let state: State = serde_json::from_slice(&state.bytes().await?)?;
                        copies.insert(step, state.run);
                    }
                    Err(StoreError::NotFound { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
            }
            anyhow::Ok(copies)
        };
        self.runtime
            .block_on(all)
            .with_context(|| format!("cannot list run.mirror {}", self.name))
    }

    /// Refuses to begin a run here where there is one already.
    pub fn check_empty(&self) -> Result<()> {
        let newest = self.steps()?.last().copied();
        ensure!(
            newest.is_none(),
            "run.mirror {} already holds checkpoints, the last of step {}: --resume fetches it and goes on, \
             another run.mirror starts afresh",
            self.name,
            newest.unwrap_or_default()
        );
        Ok(())
    }

    /// Refuses to go back to an earlier step than the last, where checkpoints after it are nowhere but here.
    pub fn check_known(&self, run: &Path) -> Result<()> {
        let (steps, here) = (self.steps()?, checkpoint::steps(run));
        let last = here.last().copied().unwrap_or_default();
        let newer = steps.iter().rev().find(|step| **step > last);
        ensure!(
            newer.is_none(),
            "run.mirror {} holds a checkpoint of step {}, which is not in {}: --resume fetches it",
            self.name,
            newer.copied().unwrap_or_default(),
            run.display()
        );
        Ok(())
    }

    /// Copies here what the directory of `run` has and this place lacks: the checkpoint of `step`, those that could
    /// not be copied before, settings, provenance, metrics, and samples. Then removes the run's checkpoints that its
    /// directory no longer has.
    ///
    /// # Errors
    /// Where the store fails; what is here stays whole, and the next time goes on from it. Where checkpoints of
    /// another run are here: nothing is copied or removed.
    pub fn push(&self, directory: &Path, run: &str, step: u64) -> Result<()> {
        let (copies, here) = (self.copies()?, checkpoint::steps(directory));
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
            anyhow::Ok(())
        };
        self.runtime
            .block_on(copy)
            .with_context(|| format!("cannot copy {} to run.mirror {}", directory.display(), self.name))
    }

    /// Refuses to mix the checkpoints of two runs.
    fn check_run(&self, copies: &BTreeMap<u64, String>, run: &str, directory: &Path) -> Result<()> {
        let other = copies.iter().find(|(_, of)| *of != run);
        ensure!(
            other.is_none(),
            "run.mirror {} holds a checkpoint, of step {}, of another run than the one in {}",
            self.name,
            other.map_or(0, |(step, _)| *step),
            directory.display()
        );
        Ok(())
    }

    /// All but checkpoints; of samples those after `step`.
    async fn upload_record(&self, directory: &Path, step: u64) -> Result<()> {
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

    async fn upload(&self, directory: &Path, step: u64) -> Result<()> {
        let (from, to) = (checkpoint::folder(directory, step), self.folder(step));
        let mut names: Vec<String> = fs::read_dir(&from)?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<Result<_>>()?;
        names.sort_by_key(|name| name == checkpoint::STATE);
        // Of a run that went back behind this step there may be another one.
        self.delete(&to.clone().join(checkpoint::STATE)).await?;
        for name in &names {
            let place = to.clone().join(name.as_str());
            store::upload_file(&from.join(name), self.store.as_ref(), &place).await?;
        }
        Ok(())
    }

    async fn remove(&self, step: u64) -> Result<()> {
        let folder = self.folder(step);
        self.delete(&folder.clone().join(checkpoint::STATE)).await?;
        for object in self.store.list_with_delimiter(Some(&folder)).await?.objects {
            self.delete(&object.location).await?;
        }
        Ok(())
    }

    async fn delete(&self, place: &Place) -> Result<()> {
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
    pub fn pull(&self, directory: &Path) -> Result<Option<u64>> {
        let copies = self.copies()?;
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
            let place = self.folder(step).join(checkpoint::STATE);
            let state: State = serde_json::from_slice(&self.store.get(&place).await?.bytes().await?)?;
            let here = checkpoint::steps(directory);
            let best = state.best.map(|(_, best)| best);
            let best = best.filter(|best| copies.contains_key(best) && !here.contains(best) && *best != step);
            // The newest last: until it is there, the next time fetches what is missing.
            for step in best.into_iter().chain([step]) {
                self.download_checkpoint(directory, step).await?;
            }
            anyhow::Ok(())
        };
        self.runtime
            .block_on(fetch)
            .with_context(|| format!("cannot fetch the checkpoint of step {step} from {}", self.name))?;
        Ok(Some(step))
    }

    async fn download_checkpoint(&self, directory: &Path, step: u64) -> Result<()> {
        let draft = checkpoint::draft(directory, step);
        fs::create_dir_all(&draft)?;
        self.download_all(&self.folder(step), &draft).await?;
        checkpoint::verify(&draft)?;
        fs::rename(&draft, checkpoint::folder(directory, step))?;
        Ok(())
    }

    async fn download_record(&self, directory: &Path) -> Result<()> {
        let samples = directory.join(SAMPLES);
        fs::create_dir_all(&samples)?;
        self.download_all(&self.root.clone().join(SAMPLES), &samples)
            .await?;
        for name in [METRICS, PROVENANCE] {
            // Whole or not at all: what is there may be all that there is.
            let partial = directory.join(format!("{name}.partial"));
            if self.download(&self.root.clone().join(name), &partial).await? {
                fs::rename(&partial, directory.join(name))?;
            }
        }
        Ok(())
    }

    async fn download_all(&self, from: &Place, to: &Path) -> Result<()> {
        for object in self.store.list_with_delimiter(Some(from)).await?.objects {
            let name = object.location.filename().unwrap_or_default();
            self.download(&object.location, &to.join(name)).await?;
        }
        Ok(())
    }

    /// Whether there was something.
    async fn download(&self, place: &Place, to: &Path) -> Result<bool> {
        let size = match self.store.head(place).await {
            Ok(object) => object.size,
            Err(StoreError::NotFound { .. }) => return Ok(false),
            Err(error) => return Err(error.into()),
        };
        let mut file = File::create(to).with_context(|| to.display().to_string())?;
        let mut at = 0;
        while at < size {
            let end = size.min(at + (8 << 20));
            file.write_all(&self.store.get_range(place, at..end).await?)
                .with_context(|| to.display().to_string())?;
            at = end;
        }
        Ok(true)
    }
}
