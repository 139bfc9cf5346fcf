//! TLS: who is let in, and certificates that change while calls go on.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use denoised::proto::v1::model_service_client::ModelServiceClient;
use denoised::proto::v1::{GenerateRequest, ListModelsRequest};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto::ring};
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Identity};

use crate::binary::{Serving, denoised};
use crate::support::generate;

pub(crate) fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/tls")
        .join(name)
}

fn text(name: &str) -> String {
    std::fs::read_to_string(fixture(name)).unwrap()
}

/// The demo model behind TLS, with files of its own in `folder`.
pub(crate) fn serve(folder: &Path, settings: &[(&str, &Path)]) -> Serving {
    std::fs::copy(fixture("first.pem"), folder.join("tls.pem")).unwrap();
    std::fs::copy(fixture("first.key"), folder.join("tls.key")).unwrap();
    let mut command = denoised();
    command
        .env("DENOISED__SERVER__TLS_CERTIFICATE", folder.join("tls.pem"))
        .env("DENOISED__SERVER__TLS_KEY", folder.join("tls.key"));
    for (key, value) in settings {
        command.env(key, value);
    }
    Serving::start_with(&mut command)
}

pub(crate) fn trusting() -> ClientTlsConfig {
    ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(text("authority.pem")))
        .domain_name("localhost")
}

pub(crate) async fn connect(
    server: &Serving,
    tls: ClientTlsConfig,
) -> Result<Channel, tonic::transport::Error> {
    let url = format!("https://{}", server.address);
    Channel::from_shared(url)
        .unwrap()
        .tls_config(tls)?
        .connect()
        .await
}

pub(crate) async fn lists(channel: Channel) -> Result<usize, tonic::Status> {
    let answer = ModelServiceClient::new(channel)
        .list_models(ListModelsRequest {})
        .await?;
    Ok(answer.into_inner().models.len())
}

/// A connection of raw TLS, which speaks HTTP/1, and the certificate that the server showed.
async fn shown(
    server: &Serving,
) -> (
    tokio_rustls::client::TlsStream<TcpStream>,
    CertificateDer<'static>,
) {
    let mut roots = RootCertStore::empty();
    roots
        .add(CertificateDer::from_pem_file(fixture("authority.pem")).unwrap())
        .unwrap();
    let settings = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let socket = TcpStream::connect(&server.address).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let stream = TlsConnector::from(Arc::new(settings))
        .connect(name, socket)
        .await
        .unwrap();
    let certificate = stream.get_ref().1.peer_certificates().unwrap()[0]
        .clone()
        .into_owned();
    (stream, certificate)
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_and_plain_requests_go_through_tls_and_through_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let server = serve(folder.path(), &[]);
    let channel = connect(&server, trusting()).await.unwrap();
    assert_eq!(lists(channel.clone()).await.unwrap(), 1);
    let mut client = denoised::proto::v1::diffusion_service_client::DiffusionServiceClient::new(channel);
    let request = GenerateRequest {
        length: Some(8),
        ..GenerateRequest::default()
    };
    assert_eq!(generate(&mut client, request).await.unwrap().results.len(), 1);

    let (mut plain, _) = shown(&server).await;
    plain
        .write_all(b"GET /readyz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        .await
        .unwrap();
    let mut answer = String::new();
    plain.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");

    // An authority that the client does not know, and a client that speaks without TLS.
    let stranger = ClientTlsConfig::new()
        .ca_certificate(Certificate::from_pem(text("first.pem")))
        .domain_name("localhost");
    assert!(connect(&server, stranger).await.is_err());
    let plaintext = Channel::from_shared(format!("http://{}", server.address)).unwrap();
    if let Ok(channel) = plaintext.connect().await {
        assert!(lists(channel).await.is_err());
    }
    let (code, _) = server.stop();
    assert_eq!(code, Some(0));
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_without_a_certificate_of_the_authority_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let authority = fixture("authority.pem");
    let server = serve(folder.path(), &[("DENOISED__SERVER__TLS_CLIENT_CA", &authority)]);
    let identity = Identity::from_pem(text("client.pem"), text("client.key"));
    let channel = connect(&server, trusting().identity(identity)).await.unwrap();
    assert_eq!(lists(channel).await.unwrap(), 1);
    // TLS 1.3 tells a client of it only after the handshake.
    if let Ok(channel) = connect(&server, trusting()).await {
        assert!(lists(channel).await.is_err());
    }
    // One that is for servers does not do.
    let wrong = Identity::from_pem(text("second.pem"), text("second.key"));
    if let Ok(channel) = connect(&server, trusting().identity(wrong)).await {
        assert!(lists(channel).await.is_err());
    }
    let url = format!("https://localhost:{}", server.address.rsplit_once(':').unwrap().1);
    let list = |options: &[(&str, &str)]| {
        let mut command = denoised();
        command.args(["models", "--server", &url]);
        for (option, file) in options {
            command.arg(option).arg(fixture(file));
        }
        command.output().unwrap()
    };
    let output = list(&[
        ("--ca-certificate", "authority.pem"),
        ("--client-certificate", "client.pem"),
        ("--client-key", "client.key"),
    ]);
    assert!(output.status.success(), "{output:?}");
    let output = list(&[("--ca-certificate", "authority.pem")]);
    assert_eq!(output.status.code(), Some(69), "{output:?}");
}

/// Calls go on, none fails, while the certificate changes; one that is broken changes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn certificates_change_under_load() {
    let folder = tempfile::tempdir().unwrap();
    let server = Arc::new(serve(folder.path(), &[]));
    let over = Arc::new(AtomicBool::new(false));
    let load: Vec<_> = (0..4)
        .map(|index| {
            let (server, over) = (Arc::clone(&server), Arc::clone(&over));
            tokio::spawn(async move {
                let mut channel = connect(&server, trusting()).await.unwrap();
                let mut calls = 0;
                while !over.load(Ordering::Acquire) {
                    // Some keep their connection, some make one a call.
                    if index % 2 == 0 {
                        channel = connect(&server, trusting()).await.unwrap();
                    }
                    lists(channel.clone()).await.unwrap();
                    calls += 1;
                }
                calls
            })
        })
        .collect();
    let certificate = |name: &str| CertificateDer::from_pem_file(fixture(name)).unwrap();
    let becomes = async |wanted: CertificateDer<'static>| {
        let waiting = async { while shown(&server).await.1 != wanted {} };
        tokio::time::timeout(Duration::from_secs(60), waiting)
            .await
            .unwrap();
    };
    assert_eq!(shown(&server).await.1, certificate("first.pem"));
    for name in ["second", "first", "second"] {
        // In two steps, as files are written: between them they do not belong together.
        std::fs::copy(fixture(&format!("{name}.key")), folder.path().join("tls.key")).unwrap();
        std::fs::copy(fixture(&format!("{name}.pem")), folder.path().join("tls.pem")).unwrap();
        becomes(certificate(&format!("{name}.pem"))).await;
    }
    // What cannot be used changes nothing; the next that can is seen.
    std::fs::write(folder.path().join("tls.pem"), "no certificate").unwrap();
    std::fs::remove_file(folder.path().join("tls.key")).unwrap();
    // For longer than between two looks of the server: it has seen them.
    let broken = std::time::Instant::now();
    while broken.elapsed() < Duration::from_secs(5) {
        assert_eq!(shown(&server).await.1, certificate("second.pem"));
    }
    std::fs::copy(fixture("first.key"), folder.path().join("tls.key")).unwrap();
    std::fs::copy(fixture("first.pem"), folder.path().join("tls.pem")).unwrap();
    becomes(certificate("first.pem")).await;
    over.store(true, Ordering::Release);
    for task in load {
        assert!(task.await.unwrap() > 0);
    }
}

#[test]
fn files_that_do_not_fit_are_named_at_the_start() {
    let run = |certificate: &str, key: &str| {
        let output = denoised()
            .args(["serve", "--listen", "127.0.0.1:0"])
            .env("DENOISED__SERVER__TLS_CERTIFICATE", fixture(certificate))
            .env("DENOISED__SERVER__TLS_KEY", fixture(key))
            .output()
            .unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(64), "{error}");
        assert_eq!(error.trim().lines().count(), 1, "{error}");
        assert!(!error.contains("PRIVATE"), "{error}");
        error
    };
    assert!(run("first.pem", "second.key").contains("first.pem"));
    assert!(run("first.key", "first.key").contains("first.key"));
    assert!(run("first.pem", "first.pem").contains("first.pem"));
    assert!(run("nowhere.pem", "first.key").contains("nowhere.pem"));
}
