//! A repository in a folder, as the server scans it.

use std::io;
use std::path::Path;

use denoised::bundle::{Bundle, BundleError, BundleWriter, repository};

use super::{PublishError, Published, TRIES};

/// Publishes `bundle`, which lies in the folder `from`, to the repository in the folder `root`.
///
/// The copy is made in a hidden folder beside the versions and renamed to the next one: the rename is
/// what decides between two who publish at once.
pub fn publish(bundle: &Bundle, from: &Path, root: &Path) -> Result<Published, PublishError> {
    let name = &bundle.manifest().name;
    let model = root.join(name);
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
