//! A repository in an object store: S3, Google Cloud Storage, Azure, or memory for tests.
//!
//! Stores have no rename, so that order does the work: a version belongs to whoever creates the object
//! `<model>/.versions/<version>` first, which stays there for good; then come its files, and last its
//! manifest, without which readers take the version for not yet there. A publisher that dies in between
//! leaves a version that nobody sees and no later one takes.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::time::Duration;

use denoised::bundle::{Bundle, BundleError, MANIFEST, hexadecimal, repository};
use denoised::store;
use object_store::path::Path as Place;
use object_store::{Error as StoreError, ObjectStore, ObjectStoreExt, PutMode, PutOptions, WriteMultipart};
use sha2::{Digest, Sha256};

use super::{PublishError, Published, Same, TRIES, is_of};

/// Files up to this size go in one request, larger ones in parts of it.
const PART: usize = 8 << 20;
/// Parts that are under way at the same time.
const PARTS: usize = 4;
/// How long a store that does not answer is asked again.
pub(crate) const PATIENCE: Duration = Duration::from_secs(180);
/// Where claims on versions lie: no version, so that readers pass it over.
const CLAIMS: &str = ".versions";

/// Publishes `bundle`, which lies in the folder `from`, to `repository`, such as `s3://bucket/models`; credentials and
/// settings come from the [environment](mod@denoised::store).
pub fn publish_to_url(
    bundle: &Bundle,
    from: &Path,
    repository: &str,
    same: Same,
) -> Result<Published, PublishError> {
    let place = |problem: String| PublishError::Place {
        place: repository.to_owned(),
        problem,
    };
    let opened = store::parse(repository).and_then(|url| store::open(&url, PATIENCE));
    let (store, root) = opened.map_err(|error| place(error.problem))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| place(e.to_string()))?;
    runtime.block_on(publish(bundle, from, store.as_ref(), &root, same))
}

/// Publishes `bundle`, which lies in the folder `from`, to the repository at `root` of `store`.
pub async fn publish(
    bundle: &Bundle,
    from: &Path,
    store: &dyn ObjectStore,
    root: &Place,
    same: Same,
) -> Result<Published, PublishError> {
    let name = &bundle.manifest().name;
    let model = root.clone().join(name.as_str());
    if same == Same::Enough
        && let Some((version, manifest)) = newest(store, &model).await?
        && is_of(&manifest, bundle)
    {
        return Ok(Published {
            name: name.clone(),
            version,
        });
    }
    let version = claim(store, &model, name).await?;
    let folder = model.join(version.to_string());
    let uploaded = upload(bundle, from, store, &folder).await;
    if uploaded.is_err() {
        // What is left of it is invisible without its manifest; tidied as far as the store lets us.
        for file in bundle.manifest().sha256.keys() {
            drop(store.delete(&folder.clone().join(file.as_str())).await);
        }
    }
    uploaded.map(|()| Published {
        name: name.clone(),
        version,
    })
}

/// The newest version that readers see, with its manifest.
async fn newest(store: &dyn ObjectStore, model: &Place) -> Result<Option<(u64, Vec<u8>)>, PublishError> {
    let listed = store.list_with_delimiter(Some(model)).await?;
    let folders = listed.common_prefixes.iter();
    let mut versions: Vec<u64> = folders
        .filter_map(|place| repository::parse_version(place.filename()?))
        .collect();
    versions.sort_unstable();
    for version in versions.into_iter().rev() {
        let place = model.clone().join(version.to_string()).join(MANIFEST);
        match store.get(&place).await {
            Ok(found) => return Ok(Some((version, found.bytes().await?.to_vec()))),
            // One that is being published, or never was to its end.
            Err(StoreError::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

/// The next version, which nobody else will be given.
async fn claim(store: &dyn ObjectStore, model: &Place, name: &str) -> Result<u64, PublishError> {
    let claims = model.clone().join(CLAIMS);
    let listed = store.list_with_delimiter(Some(model)).await?;
    let claimed = store.list_with_delimiter(Some(&claims)).await?;
    let folders = listed.common_prefixes.iter();
    let taken = folders.chain(claimed.objects.iter().map(|object| &object.location));
    let highest = taken
        .filter_map(|place| repository::parse_version(place.filename()?))
        .max()
        .unwrap_or(0);
    for version in (1..=TRIES as u64).map(|next| highest.saturating_add(next)) {
        let place = claims.clone().join(version.to_string());
        match store.put_opts(&place, Vec::new().into(), create()).await {
            Ok(_) => return Ok(version),
            Err(StoreError::AlreadyExists { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(PublishError::Crowded {
        name: name.to_owned(),
    })
}

async fn upload(
    bundle: &Bundle,
    from: &Path,
    store: &dyn ObjectStore,
    folder: &Place,
) -> Result<(), PublishError> {
    for (name, expected) in &bundle.manifest().sha256 {
        let found = upload_file(&from.join(name), store, &folder.clone().join(name.as_str())).await?;
        // The folder may have changed since it was opened.
        if found != *expected {
            return Err(PublishError::Bundle(BundleError::Hash {
                file: name.clone(),
                expected: expected.clone(),
                found,
            }));
        }
    }
    let json =
        serde_json::to_vec_pretty(bundle.manifest()).map_err(|e| BundleError::Manifest(e.to_string()))?;
    let place = folder.clone().join(MANIFEST);
    store.put_opts(&place, json.into(), create()).await?;
    Ok(())
}

/// Uploads a file part by part and returns its sha256.
pub(crate) async fn upload_file(
    path: &Path,
    store: &dyn ObjectStore,
    place: &Place,
) -> Result<String, PublishError> {
    let read = |source| PublishError::Read {
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(read)?;
    let mut hash = Sha256::new();
    let mut next = || {
        let mut part = Vec::with_capacity(PART.min(1 << 16));
        (&mut file)
            .take(PART as u64)
            .read_to_end(&mut part)
            .map_err(read)?;
        hash.update(&part);
        Ok::<_, PublishError>(part)
    };
    let first = next()?;
    if first.len() < PART {
        store.put(place, first.into()).await?;
    } else {
        let upload = store.put_multipart(place).await?;
        let mut upload = WriteMultipart::new_with_chunk_size(upload, PART);
        let mut part = first;
        loop {
            if part.is_empty() {
                upload.finish().await?;
                break;
            }
            upload.put(part.into());
            let ready = upload.wait_for_capacity(PARTS).await;
            match ready.map_err(PublishError::from).and_then(|()| next()) {
                Ok(read) => part = read,
                Err(error) => {
                    // Without, stores keep the parts, and bill for them.
                    drop(upload.abort().await);
                    return Err(error);
                }
            }
        }
    }
    Ok(hexadecimal(&hash.finalize()))
}

fn create() -> PutOptions {
    PutOptions {
        mode: PutMode::Create,
        ..PutOptions::default()
    }
}
