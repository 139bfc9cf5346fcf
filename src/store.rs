//! Places in object stores, such as `s3://bucket/models`.
//!
//! Credentials and settings come from the environment, under the names that each store's own tools use
//! (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT`, `GOOGLE_APPLICATION_CREDENTIALS`, `AZURE_STORAGE_ACCOUNT_NAME`, ...).

use std::time::Duration;

use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreScheme};
use url::Url;

/// Why a place cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{place}: {problem}")]
pub struct PlaceError {
    /// The place as it was written.
    pub place: String,
    /// What is wrong with it.
    pub problem: String,
}

/// The URL of a place, where `text` is one.
///
/// # Errors
/// [`PlaceError`] where it is none, or none of a kind of store that is known.
pub fn parse(text: &str) -> Result<Url, PlaceError> {
    let error = |problem: String| PlaceError {
        place: text.to_owned(),
        problem,
    };
    let url = Url::parse(text).map_err(|e| error(e.to_string()))?;
    match ObjectStoreScheme::parse(&url) {
        Ok((
            ObjectStoreScheme::AmazonS3
            | ObjectStoreScheme::GoogleCloudStorage
            | ObjectStoreScheme::MicrosoftAzure
            | ObjectStoreScheme::Local,
            _,
        )) => Ok(url),
        Ok(_) | Err(_) => Err(error(
            "must be a folder, or a place that begins with s3://, gs://, az:// or file:///".to_owned(),
        )),
    }
}

/// The store that `url` names, and the place in it. A store that does not answer is asked again for as long as `patience`
/// says.
///
/// # Errors
/// [`PlaceError`] where a setting is missing, or this program cannot reach stores of its kind.
pub fn open(url: &Url, patience: Duration) -> Result<(Box<dyn ObjectStore>, Path), PlaceError> {
    opened(url, patience).map_err(|error| PlaceError {
        place: url.to_string(),
        problem: if cfg!(feature = "object-store") {
            error.to_string()
        } else {
            format!("{error}: this program was built without the feature \"object-store\"")
        },
    })
}

#[cfg(not(feature = "object-store"))]
fn opened(url: &Url, _patience: Duration) -> object_store::Result<(Box<dyn ObjectStore>, Path)> {
    object_store::parse_url(url)
}

/// As `object_store::parse_url_opts` does, which cannot be told for how long to ask again.
#[cfg(feature = "object-store")]
fn opened(url: &Url, patience: Duration) -> object_store::Result<(Box<dyn ObjectStore>, Path)> {
    use object_store::aws::AmazonS3Builder;
    use object_store::azure::MicrosoftAzureBuilder;
    use object_store::gcp::GoogleCloudStorageBuilder;

    // The library of ciphers that the rest of the program has; where somebody has chosen another, that one.
    let _installed = tokio_rustls::rustls::crypto::ring::default_provider()
        .install_default()
        .is_ok();
    let retry = object_store::RetryConfig {
        retry_timeout: patience,
        ..object_store::RetryConfig::default()
    };
    macro_rules! build {
        ($builder:ty) => {{
            let named = <$builder>::new().with_url(url.as_str()).with_retry(retry);
            let settings = std::env::vars().map(|(key, value)| (key.to_ascii_lowercase(), value));
            let set = settings.fold(named, |builder, (key, value)| match key.parse() {
                Ok(key) => builder.with_config(key, value),
                // Of something else.
                Err(_) => builder,
            });
            Box::new(set.build()?)
        }};
    }
    let (scheme, path) = ObjectStoreScheme::parse(url)?;
    let store: Box<dyn ObjectStore> = match scheme {
        ObjectStoreScheme::AmazonS3 => build!(AmazonS3Builder),
        ObjectStoreScheme::GoogleCloudStorage => build!(GoogleCloudStorageBuilder),
        ObjectStoreScheme::MicrosoftAzure => build!(MicrosoftAzureBuilder),
        ObjectStoreScheme::Local | ObjectStoreScheme::Memory | ObjectStoreScheme::Http | _ => {
            return object_store::parse_url(url);
        }
    };
    Ok((store, Path::parse(path)?))
}
