//! Networks as ONNX Runtime has prepared them for this machine: their graphs optimised, their matrices in the order in
//! which its products read them.
//!
//! They lie in files that sessions map into memory, so that a network is there at once, and all sessions of all workers
//! have one copy of its weights between them.

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, DirBuilder, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use ort::session::Session;
use ort::session::builder::GraphOptimizationLevel;
use parking_lot::Mutex;

use super::{Device, OnnxOptions, commit, has_vnni, refused, session_builder};
use crate::bundle::{self, Bundle};
use crate::network::NetworkError;

/// The folder in the given one that holds the networks, and nothing else.
const NETWORKS: &str = "networks";
/// The optimised graph.
const GRAPH: &str = "network.onnx";
/// Its weights, packed, and as they were where something else than a product reads them.
const WEIGHTS: &str = "network.onnx.data";
/// The hashes of both, by name. Its time tells when the network was last used.
const HASHES: &str = "sha256.json";
/// What is being prepared lies in a folder of such a name.
const PARTIAL: &str = ".new-";
/// After so long nobody works on it any more.
const ABANDONED: Duration = Duration::from_secs(3600);

/// Why a folder of prepared networks cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PreparedError {
    /// It cannot be made, or read.
    #[error("{path}: {source}")]
    Io {
        /// The folder.
        path: PathBuf,
        /// What is wrong.
        source: io::Error,
    },
    /// Whoever can change what is mapped changes what networks say, or brings the server down.
    #[error("{0} must belong to the user that the server runs as, and be writable by nobody else")]
    Shared(PathBuf),
}

/// Why a network is not prepared.
#[derive(Debug, thiserror::Error)]
enum Unprepared {
    #[error(transparent)]
    Network(#[from] NetworkError),
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Hashes(#[from] serde_json::Error),
    #[error("it takes {} MB, all together may take {} MB (models.prepared_megabytes)", .0.div_ceil(1 << 20), .1 >> 20)]
    Large(u64, u64),
}

/// A folder of prepared networks, which servers of one user may share.
#[derive(Debug)]
pub struct Prepared {
    folder: PathBuf,
    /// Bytes that all of them may take; those that were used longest ago make room.
    budget: u64,
    /// What tells this machine and runtime from others.
    machine: String,
    /// Networks whose hashes this process has checked.
    checked: Mutex<HashSet<String>>,
    /// Networks that it could not prepare, and does not try to again: that takes longer than loading them does.
    given_up: Mutex<HashSet<String>>,
    /// Networks that this process has begun to prepare.
    begun: AtomicU64,
}

impl Prepared {
    /// Uses `folder`, which is made if need be, for networks of at most `budget` bytes together.
    ///
    /// # Errors
    /// It cannot be made or read, or others may write there.
    pub fn open(folder: &Path, budget: u64) -> Result<Self, PreparedError> {
        let folder = folder.join(NETWORKS);
        let failed = |source| PreparedError::Io {
            path: folder.clone(),
            source,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .map_err(failed)?;
        let itself = fs::metadata("/proc/self").map_err(failed)?;
        let found = fs::symlink_metadata(&folder).map_err(failed)?;
        if !found.is_dir() || found.uid() != itself.uid() || found.mode() & 0o022 != 0 {
            return Err(PreparedError::Shared(folder));
        }
        for (path, age) in abandoned(&folder).map_err(failed)? {
            tracing::info!(path = %path.display(), hours = age.as_secs() / 3600, "removing what was never prepared");
            drop(fs::remove_dir_all(path));
        }
        Ok(Self {
            machine: machine().map_err(failed)?,
            folder,
            budget,
            checked: Mutex::default(),
            given_up: Mutex::default(),
            begun: AtomicU64::new(0),
        })
    }

    /// A session on the prepared network of `bundle`, which is prepared now if it is not there; `None` where that cannot
    /// be, which is logged.
    pub(super) fn session(&self, bundle: &Bundle, options: &OnnxOptions) -> Option<Session> {
        if options.device != Device::Cpu {
            return None;
        }
        let key = self.key(bundle);
        if let Some(session) = self.mapped(&key, options) {
            return Some(session);
        }
        if self.given_up.lock().contains(&key) {
            return None;
        }
        let name = bundle.manifest().name.as_str();
        match self.prepare(&key, bundle, options) {
            Ok(bytes) => tracing::info!(
                model = name,
                megabytes = bytes >> 20,
                "a network is prepared for this machine"
            ),
            Err(error) => {
                tracing::warn!(model = name, %error, "a network is not prepared: each worker gets a copy of its own");
                self.given_up.lock().insert(key);
                return None;
            }
        }
        self.mapped(&key, options)
    }

    /// What tells a prepared network from all others: the weights, and all that decides how they are packed.
    fn key(&self, bundle: &Bundle) -> String {
        let files = bundle.manifest().sha256.iter();
        let files = files.filter(|(name, _)| *name != bundle::TOKENIZER);
        let parts: Vec<String> = files.map(|(name, hash)| format!("{name} {hash}")).collect();
        bundle::sha256(format!("{}\n{}", self.machine, parts.join("\n")).as_bytes())
    }

    /// A session on the network `key`; `None` where it is not there, or not as it was made.
    fn mapped(&self, key: &str, options: &OnnxOptions) -> Option<Session> {
        let folder = self.folder.join(key);
        if !folder.is_dir() {
            return None;
        }
        let opened = self.check(key, &folder).and_then(|()| {
            let session = session_builder(options)?
                // It is.
                .with_optimization_level(GraphOptimizationLevel::Disable)
                .map_err(refused)?
                .commit_from_file(folder.join(GRAPH))
                .map_err(refused)?;
            Ok(session)
        });
        match opened {
            Ok(session) => Some(session),
            Err(error) => {
                tracing::warn!(path = %folder.display(), %error, "a prepared network is damaged and made again");
                self.checked.lock().remove(key);
                drop(fs::remove_dir_all(folder));
                None
            }
        }
    }

    /// Compares the files with their hashes, once per process.
    fn check(&self, key: &str, folder: &Path) -> Result<(), Unprepared> {
        let list = folder.join(HASHES);
        // So that it is not among those that were used longest ago.
        let used = File::options().append(true).open(&list);
        match used.and_then(|list| list.set_modified(SystemTime::now())) {
            // Where nobody writes, nobody makes room.
            Err(error) if error.kind() != io::ErrorKind::ReadOnlyFilesystem => return Err(error.into()),
            _ => {}
        }
        if self.checked.lock().contains(key) {
            return Ok(());
        }
        let hashes: BTreeMap<String, String> = serde_json::from_slice(&fs::read(&list)?)?;
        if hashes != hashes_of(folder)? {
            let error = io::Error::new(io::ErrorKind::InvalidData, "its hashes are others");
            return Err(error.into());
        }
        self.checked.lock().insert(key.to_owned());
        Ok(())
    }

    /// Has the network of `bundle` prepared as `key`. Its bytes.
    fn prepare(&self, key: &str, bundle: &Bundle, options: &OnnxOptions) -> Result<u64, Unprepared> {
        let partial = Partial::new(&self.folder, self.begun.fetch_add(1, Ordering::Relaxed))?;
        let builder = session_builder(options)?
            .with_optimization_level(GraphOptimizationLevel::All)
            .map_err(refused)?
            .with_optimized_model_path(partial.0.join(GRAPH))
            .map_err(refused)?
            .with_config_entry("session.optimized_model_external_initializers_file_name", WEIGHTS)
            .map_err(refused)?
            // Numbers of shapes stay in the graph, whose optimisers read them.
            .with_config_entry(
                "session.optimized_model_external_initializers_min_size_in_bytes",
                "1024",
            )
            .map_err(refused)?
            .with_config_entry("session.save_external_prepacked_constant_initializers", "1")
            .map_err(refused)?;
        drop(commit(builder, bundle)?);
        let hashes = hashes_of(&partial.0)?;
        fs::write(partial.0.join(HASHES), serde_json::to_vec(&hashes)?)?;
        let bytes = bytes_of(&partial.0)?;
        if bytes > self.budget {
            return Err(Unprepared::Large(bytes, self.budget));
        }
        match fs::rename(&partial.0, self.folder.join(key)) {
            Ok(()) => drop(self.checked.lock().insert(key.to_owned())),
            // Somebody else was faster.
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
            Err(error) => return Err(error.into()),
        }
        self.make_room(key)?;
        Ok(bytes)
    }

    /// Removes those that were used longest ago, but `newest`, until all have room. Sessions keep what they have mapped.
    fn make_room(&self, newest: &str) -> io::Result<()> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let path = entry?.path();
            let is_partial = path.file_name().is_none_or(|name| {
                let name = name.to_string_lossy();
                name.starts_with(PARTIAL)
            });
            if !is_partial {
                let used = fs::metadata(path.join(HASHES)).and_then(|list| list.modified());
                entries.push((
                    used.unwrap_or(SystemTime::UNIX_EPOCH),
                    bytes_of(&path).unwrap_or(0),
                    path,
                ));
            }
        }
        entries.sort();
        let mut taken: u64 = entries.iter().map(|(_, bytes, _)| bytes).sum();
        for (_, bytes, path) in entries {
            if taken <= self.budget {
                break;
            }
            if !path.ends_with(newest) {
                match fs::remove_dir_all(&path) {
                    // Another server was faster.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    removed => removed?,
                }
                taken = taken.saturating_sub(bytes);
            }
        }
        Ok(())
    }
}

/// A folder in which a network is being prepared; what is left of it goes when dropped.
struct Partial(PathBuf);

impl Partial {
    fn new(folder: &Path, number: u64) -> io::Result<Self> {
        let path = folder.join(format!("{PARTIAL}{}-{number}", std::process::id()));
        // Of a process that had the same number, in a container say.
        drop(fs::remove_dir_all(&path));
        fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.0));
    }
}

/// What nobody works on any more, and since when.
fn abandoned(folder: &Path) -> io::Result<Vec<(PathBuf, Duration)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(PARTIAL) {
            let age = entry.metadata()?.modified()?.elapsed().unwrap_or_default();
            if age > ABANDONED {
                found.push((entry.path(), age));
            }
        }
    }
    Ok(found)
}

fn hashes_of(folder: &Path) -> io::Result<BTreeMap<String, String>> {
    let mut hashes = BTreeMap::new();
    for name in [GRAPH, WEIGHTS] {
        match File::open(folder.join(name)) {
            Ok(file) => drop(hashes.insert(name.to_owned(), bundle::sha256_of(file)?)),
            // All weights are small.
            Err(error) if name == WEIGHTS && error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(hashes)
}

fn bytes_of(folder: &Path) -> io::Result<u64> {
    let files = fs::read_dir(folder)?.map(|entry| Ok(entry?.metadata()?.len()));
    files.sum()
}

/// The processor and the runtime, which decide how weights are packed.
fn machine() -> io::Result<String> {
    let processor = fs::read_to_string("/proc/cpuinfo")?;
    let of_first = processor.split("\n\n").next().unwrap_or_default();
    let kept = ["flags", "Features", "model name", "CPU implementer", "CPU part"];
    let lines = of_first.lines();
    let lines = lines.filter(|line| kept.iter().any(|key| line.starts_with(key)));
    let lines: Vec<&str> = lines.collect();
    Ok(format!(
        "{} {} {}\n{}",
        std::env::consts::ARCH,
        ort::info(),
        has_vnni(),
        lines.join("\n")
    ))
}
