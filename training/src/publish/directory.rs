//! A repository in a folder, as the server scans it.

use std::io;
use std::path::Path;

use denoised::bundle::{Bundle, BundleError, BundleWriter, MANIFEST, repository};

use super::{PublishError, Published, Same, TRIES, is_of};

/// Publishes `bundle`, which lies in the folder `from`, to the repository in the folder `root`.
///
/// The copy is made in a hidden folder beside the versions and renamed to the next one: the rename is
/// what decides between two who publish at once.
pub fn publish(bundle: &Bundle, from: &Path, root: &Path, same: Same) -> Result<Published, PublishError> {
    let name = &bundle.manifest().name;
    let model = root.join(name);
    if same == Same::Enough
        && let Some(version) = newest(root, name)?
        && is_of(&read(&model.join(version.to_string()).join(MANIFEST))?, bundle)
    {
        return Ok(Published {
            name: name.clone(),
            version,
        });
    }
    let mut writer = BundleWriter::new(&model)?;
    writer.copy(bundle, from)?;
    for _ in 0..TRIES {
        let version = repository::next_version(&model)?;
        match writer.commit(&model.join(version.to_string())) {
            Ok(()) => {
                return Ok(Published {
                    name: name.clone(),
                    version,
                });
            }
            Err(BundleError::Io { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(PublishError::Crowded { name: name.clone() })
}

/// The newest version of the model `name`, if there is one.
fn newest(root: &Path, name: &str) -> Result<Option<u64>, PublishError> {
    if !root.is_dir() {
        return Ok(None);
    }
    let entries = repository::scan(root)?;
    let own = entries.iter().filter(|entry| entry.name == name);
    Ok(own.map(|entry| entry.version).max())
}

fn read(path: &Path) -> Result<Vec<u8>, PublishError> {
    std::fs::read(path).map_err(|source| PublishError::Read {
        path: path.to_owned(),
        source,
    })
}
