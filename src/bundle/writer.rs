//! Writes bundles so that nobody ever sees half of one.
//!
//! Files go to a hidden folder beside the final place, reach the disk, and are renamed there in one
//! step. Renaming does not replace a folder with something in it, so that of two writers to the same
//! place one is told that it came second.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process;

use sha2::{Digest, Sha256};

use super::{Bundle, BundleError, MANIFEST, Manifest, hexadecimal, io_error};

/// How names of folders begin that are not whole yet.
const PARTIAL: &str = ".partial-";
/// Tries for a folder name that nobody else has.
const TRIES: usize = 10_000;

/// A bundle under construction; dropped without [`commit`](Self::commit), it leaves nothing behind.
#[derive(Debug)]
pub struct BundleWriter {
    partial: PathBuf,
    committed: bool,
    hashes: BTreeMap<String, String>,
}

impl BundleWriter {
    /// Begins a bundle that will lie in the folder `parent`, which is created if need be.
    pub fn new(parent: &Path) -> Result<Self, BundleError> {
        fs::create_dir_all(parent).map_err(|e| io_error(parent, e))?;
        for number in 0..TRIES {
            let partial = parent.join(format!("{PARTIAL}{}-{number}", process::id()));
            match fs::create_dir(&partial) {
                Ok(()) => {
                    return Ok(Self {
                        partial,
                        committed: false,
                        hashes: BTreeMap::new(),
                    });
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(io_error(&partial, error)),
            }
        }
        let full = io::Error::new(io::ErrorKind::AlreadyExists, "holds too many partial bundles");
        Err(io_error(parent, full))
    }

    /// Begins the file `name`; it belongs to the bundle once it is [closed](Self::close).
    pub fn create(&self, name: &str) -> Result<BundleFile, BundleError> {
        let path = self.partial.join(name);
        let file = File::create_new(&path).map_err(|e| io_error(&path, e))?;
        Ok(BundleFile {
            name: name.to_owned(),
            path,
            file: BufWriter::with_capacity(1 << 18, file),
            hash: Sha256::new(),
            length: 0,
        })
    }

    /// Ends a file, which is on the disk then, and returns its sha256.
    pub fn close(&mut self, file: BundleFile) -> Result<String, BundleError> {
        let BundleFile {
            name,
            path,
            file,
            hash,
            ..
        } = file;
        let synced = file
            .into_inner()
            .map_err(io::IntoInnerError::into_error)
            .and_then(|file| file.sync_all());
        synced.map_err(|e| io_error(&path, e))?;
        let hash = hexadecimal(&hash.finalize());
        self.hashes.insert(name, hash.clone());
        Ok(hash)
    }

    /// Adds a file that is in memory.
    pub fn add(&mut self, name: &str, bytes: &[u8]) -> Result<String, BundleError> {
        let mut file = self.create(name)?;
        file.write_all(bytes).map_err(|e| io_error(&file.path, e))?;
        self.close(file)
    }

    /// Writes `manifest`, with the hashes of all files, and returns the bundle as it will be, so that it
    /// can be tried before anybody else sees it. The manifest may be written again.
    pub fn describe(&self, manifest: &mut Manifest) -> Result<Bundle, BundleError> {
        manifest.sha256.clone_from(&self.hashes);
        manifest.check().map_err(BundleError::Manifest)?;
        let json = serde_json::to_vec_pretty(manifest).map_err(|e| BundleError::Manifest(e.to_string()))?;
        self.write_manifest(&json)?;
        Bundle::of_files(&self.partial, manifest.clone())
    }

    /// Whether a folder is of a writer, at work or long gone.
    pub fn is_partial(folder: &Path) -> bool {
        let name = folder.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.starts_with(PARTIAL))
    }

    /// Writes a manifest as it is.
    pub fn write_manifest(&self, json: &[u8]) -> Result<(), BundleError> {
        let path = self.partial.join(MANIFEST);
        let written = File::create(&path).and_then(|mut file| {
            file.write_all(json)?;
            file.sync_all()
        });
        written.map_err(|e| io_error(&path, e))
    }

    /// Takes over `bundle`, which lies in the folder `from`, file by file; every hash is checked again on
    /// the way, since the folder may change meanwhile.
    pub fn copy(&mut self, bundle: &Bundle, from: &Path) -> Result<(), BundleError> {
        for (name, expected) in &bundle.manifest().sha256 {
            let path = from.join(name);
            let mut file = self.create(name)?;
            File::open(&path)
                .and_then(|mut from| io::copy(&mut from, &mut file))
                .map_err(|e| io_error(&path, e))?;
            let found = self.close(file)?;
            super::check_hash(name, expected, found)?;
        }
        let json =
            serde_json::to_vec_pretty(bundle.manifest()).map_err(|e| BundleError::Manifest(e.to_string()))?;
        self.write_manifest(&json)
    }

    /// Gives the bundle its place, the folder `directory` beside the partial one.
    ///
    /// # Errors
    /// [`io::ErrorKind::AlreadyExists`] if something is there; another place may be tried then.
    pub fn commit(&mut self, directory: &Path) -> Result<(), BundleError> {
        refuse_existing(directory)?;
        sync_directory(&self.partial)?;
        match fs::rename(&self.partial, directory) {
            Ok(()) => self.committed = true,
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {
                return Err(io_error(directory, exists()));
            }
            Err(error) => return Err(io_error(directory, error)),
        }
        directory.parent().map_or(Ok(()), sync_directory)
    }
}

impl Drop for BundleWriter {
    fn drop(&mut self) {
        // After a commit the name is free, and may be another writer's by now.
        if !self.committed {
            drop(fs::remove_dir_all(&self.partial));
        }
    }
}

/// An error if there is something at `directory`.
pub fn refuse_existing(directory: &Path) -> Result<(), BundleError> {
    if fs::symlink_metadata(directory).is_ok() {
        return Err(io_error(directory, exists()));
    }
    Ok(())
}

fn exists() -> io::Error {
    io::Error::new(io::ErrorKind::AlreadyExists, "exists already")
}

/// Makes the entries of a folder outlast a crash of the machine.
fn sync_directory(path: &Path) -> Result<(), BundleError> {
    if cfg!(unix) {
        let path = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        File::open(path)
            .and_then(|folder| folder.sync_all())
            .map_err(|e| io_error(path, e))?;
    }
    Ok(())
}

/// A file of a bundle under construction, hashed as it is written.
#[derive(Debug)]
pub struct BundleFile {
    name: String,
    path: PathBuf,
    file: BufWriter<File>,
    hash: Sha256,
    length: u64,
}

impl BundleFile {
    /// Its name in the bundle.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes written so far.
    pub fn length(&self) -> u64 {
        self.length
    }
}

impl Write for BundleFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.hash.update(&bytes[..written]);
        self.length += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::super::{MODEL, manifest};
    use super::*;

    #[test]
    fn what_is_dropped_leaves_nothing_behind() {
        let root = tempfile::tempdir().unwrap();
        let mut writer = BundleWriter::new(root.path()).unwrap();
        writer.add(MODEL, b"").unwrap();
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
        drop(writer);
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_writer_that_is_done_leaves_others_alone() {
        let root = tempfile::tempdir().unwrap();
        let mut first = BundleWriter::new(root.path()).unwrap();
        first.add(MODEL, b"").unwrap();
        first.commit(&root.path().join("1")).unwrap();
        let mut second = BundleWriter::new(root.path()).unwrap();
        assert_eq!(second.partial, first.partial, "names are used again");
        drop(first);
        second.add(MODEL, b"").unwrap();
        second.commit(&root.path().join("2")).unwrap();
    }

    #[test]
    fn the_second_to_take_a_place_is_told_and_may_take_another() {
        let root = tempfile::tempdir().unwrap();
        let [mut first, mut second] = [(), ()].map(|()| BundleWriter::new(root.path()).unwrap());
        for writer in [&mut first, &mut second] {
            writer.add(MODEL, b"").unwrap();
            writer.describe(&mut manifest::tests::tiny()).unwrap();
        }
        first.commit(&root.path().join("1")).unwrap();
        let refused = second.commit(&root.path().join("1")).unwrap_err();
        let BundleError::Io { source, .. } = refused else {
            unreachable!("{refused}")
        };
        assert_eq!(source.kind(), io::ErrorKind::AlreadyExists);
        second.commit(&root.path().join("2")).unwrap();
        drop((first, second));
        for version in ["1", "2"] {
            Bundle::open(&root.path().join(version)).unwrap();
        }
    }
}
