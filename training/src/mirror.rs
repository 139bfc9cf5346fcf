//! Copies of a run's checkpoints elsewhere, so that the run survives its machine.
//!
//! A folder or an object store holds `checkpoints/<step>/` as the run's directory does. Stores have no
//! rename, so that order does the work: `state.json` goes last and is deleted first, and a checkpoint
//! without it is not there. `metrics.jsonl` goes along, for curves that begin at the beginning.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result, anyhow};
use object_store::local::LocalFileSystem;
use object_store::path::Path as Place;
use object_store::{ObjectStore, ObjectStoreExt};
use tokio::runtime::Runtime;
use url::Url;

use crate::checkpoint;
use crate::journal::METRICS;
use crate::publish::object_store as store;

const CHECKPOINTS: &str = "checkpoints";

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
            denoised::store::open(&url, store::PATIENCE)
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
        let all = async {
            let root = self.root.clone().join(CHECKPOINTS);
            let folders = self.store.list_with_delimiter(Some(&root)).await?.common_prefixes;
            let mut steps = Vec::new();
            for folder in folders {
                let step = folder.filename().and_then(|name| name.parse().ok());
                if let Some(step) = step
                    && self.store.head(&folder.join(checkpoint::STATE)).await.is_ok()
                {
                    steps.push(step);
                }
            }
            steps.sort_unstable();
            anyhow::Ok(steps)
        };
        self.runtime
            .block_on(all)
            .with_context(|| format!("cannot list {}", self.name))
    }

    /// Copies the checkpoint of `step` from the run's directory here, with the metrics so far, and then
    /// removes those that the directory no longer has.
    pub fn push(&self, run: &Path, step: u64) -> Result<()> {
        let folder = checkpoint::folder(run, step);
        let mut names: Vec<String> = fs::read_dir(&folder)?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<Result<_>>()?;
        names.sort_by_key(|name| name == checkpoint::STATE);
        let copy = async {
            let metrics = run.join(METRICS);
            if metrics.is_file() {
                let place = self.root.clone().join(METRICS);
                store::upload_file(&metrics, self.store.as_ref(), &place).await?;
            }
            for name in &names {
                let place = self.folder(step).join(name.as_str());
                store::upload_file(&folder.join(name), self.store.as_ref(), &place).await?;
            }
            anyhow::Ok(())
        };
        self.runtime
            .block_on(copy)
            .with_context(|| format!("cannot copy {} to {}", folder.display(), self.name))?;
        let here = checkpoint::steps(run);
        for step in self.steps()?.into_iter().filter(|step| !here.contains(step)) {
            self.remove(step)
                .with_context(|| format!("cannot remove step {step} from {}", self.name))?;
        }
        Ok(())
    }

    fn remove(&self, step: u64) -> Result<()> {
        self.runtime.block_on(async {
            let folder = self.folder(step);
            self.store.delete(&folder.clone().join(checkpoint::STATE)).await?;
            for object in self.store.list_with_delimiter(Some(&folder)).await?.objects {
                self.store.delete(&object.location).await?;
            }
            Ok(())
        })
    }

    /// Brings the latest checkpoint into the run's directory if it is newer than what is there; returns
    /// its step.
    pub fn pull(&self, run: &Path) -> Result<Option<u64>> {
        let newest = self.steps()?.last().copied();
        let Some(step) =
            newest.filter(|newest| checkpoint::steps(run).last().is_none_or(|last| last < newest))
        else {
            return Ok(None);
        };
        let draft = checkpoint::draft(run, step);
        let fetch = || -> Result<()> {
            fs::create_dir_all(&draft)?;
            self.runtime.block_on(async {
                for object in self
                    .store
                    .list_with_delimiter(Some(&self.folder(step)))
                    .await?
                    .objects
                {
                    let name = object.location.filename().unwrap_or_default();
                    self.download(&object.location, &draft.join(name)).await?;
                }
                let metrics = self.root.clone().join(METRICS);
                if self.store.head(&metrics).await.is_ok() {
                    self.download(&metrics, &run.join(METRICS)).await?;
                }
                anyhow::Ok(())
            })?;
            checkpoint::verify(&draft)?;
            fs::rename(&draft, checkpoint::folder(run, step))?;
            Ok(())
        };
        fetch().with_context(|| format!("cannot fetch the checkpoint of step {step} from {}", self.name))?;
        Ok(Some(step))
    }

    async fn download(&self, place: &Place, to: &Path) -> Result<()> {
        let mut file = File::create(to).with_context(|| to.display().to_string())?;
        let size = self.store.head(place).await?.size;
        let mut at = 0;
        while at < size {
            let end = size.min(at + (8 << 20));
            file.write_all(&self.store.get_range(place, at..end).await?)
                .with_context(|| to.display().to_string())?;
            at = end;
        }
        Ok(())
    }
}
