//! TLS: certificate, key and the authority of clients from files, which are read again when they change.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arc_swap::ArcSwap;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

use super::watched::{FileError, Watched, contents};
use crate::config;

/// Where it is written what the server shows and whom it trusts.
#[derive(Clone, Debug)]
struct Files {
    certificate: PathBuf,
    key: PathBuf,
    client_ca: Option<PathBuf>,
}

/// What stood in the files.
#[derive(Clone, PartialEq, Eq)]
struct Written {
    certificate: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
}

/// What new connections are accepted with.
#[derive(Clone)]
pub(super) struct Tls {
    files: Files,
    now: Arc<ArcSwap<ServerConfig>>,
    written: Written,
}

impl std::fmt::Debug for Tls {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The key is nobody's to read.
        f.debug_struct("Tls")
            .field("files", &self.files)
            .finish_non_exhaustive()
    }
}

impl Tls {
    /// TLS as configured, if it is.
    pub(super) fn open(config: &config::ServerConfig) -> Result<Option<Self>, FileError> {
        let (Some(certificate), Some(key)) = (&config.tls_certificate, &config.tls_key) else {
            return Ok(None);
        };
        let files = Files {
            certificate: certificate.clone(),
            key: key.clone(),
            client_ca: config.tls_client_ca.clone(),
        };
        let written = files.read()?;
        let now = files.settings(&written)?;
        Ok(Some(Self {
            files,
            now: Arc::new(ArcSwap::from_pointee(now)),
            written,
        }))
    }

    /// Accepts a connection as the files say now.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.now.load_full())
    }
}

impl Watched for Tls {
    const NAME: &'static str = "certificate";

    // Connections that are open stay as they are.
    fn look(&mut self) -> Result<(), FileError> {
        let written = self.files.read()?;
        if written != self.written {
            let settings = self.files.settings(&written)?;
            self.now.store(Arc::new(settings));
            self.written = written;
            tracing::info!(certificate = %self.files.certificate.display(), "the certificate has changed");
        }
        Ok(())
    }
}

impl Files {
    fn read(&self) -> Result<Written, FileError> {
        Ok(Written {
            certificate: contents(&self.certificate)?,
            key: contents(&self.key)?,
            client_ca: self.client_ca.as_deref().map(contents).transpose()?,
        })
    }

    fn settings(&self, written: &Written) -> Result<ServerConfig, FileError> {
        let provider = Arc::new(ring::default_provider());
        let versions = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(|error| FileError::new(&self.certificate, error))?;
        let clients = match (&self.client_ca, &written.client_ca) {
            (Some(file), Some(pem)) => {
                let mut roots = RootCertStore::empty();
                for authority in certificates(file, pem)? {
                    roots
                        .add(authority)
                        .map_err(|error| FileError::new(file, error))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                    .build()
                    .map_err(|error| FileError::new(file, error))?;
                versions.with_client_cert_verifier(verifier)
            }
            _ => versions.with_no_client_auth(),
        };
        let chain = certificates(&self.certificate, &written.certificate)?;
        let key =
            PrivateKeyDer::from_pem_slice(&written.key).map_err(|error| FileError::new(&self.key, error))?;
        let mut settings = clients
            .with_single_cert(chain, key)
            .map_err(|error| FileError::new(&self.certificate, error))?;
        settings.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(settings)
    }
}

fn certificates(file: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, FileError> {
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let all = all.map_err(|error| FileError::new(file, error))?;
    if all.is_empty() {
        return Err(FileError::new(file, "has no certificate"));
    }
    Ok(all)
}
