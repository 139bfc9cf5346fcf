//! A channel to the server that was given, or to one started within this process.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

use super::probe::from_here;
use super::{Failed, UNAVAILABLE};
use crate::client::{Bearer, Client, balanced_with, watched};
use crate::config::{Config, LogConfig};
use crate::server::Server;
use crate::telemetry::{self, Log};

/// Log filter of a server that lives for one command: not that it is ended, for that is how it should be.
const QUIET: &str = "warn,denoised::server=error,denoised::server::repository=warn";

/// Where the server is.
#[derive(Debug, Args)]
pub(super) struct Target {
    /// URL of a running server, such as http://127.0.0.1:50051; several, with commas between, are asked in turn when
    /// one goes away. Without, one is started for this command.
    #[arg(long, value_name = "URL", env = "DENOISED_SERVER", value_delimiter = ',')]
    server: Vec<String>,
    /// Spread calls over all addresses that the name in --server has, as far as the servers there say that they serve.
    #[arg(long, requires = "server")]
    balance: bool,
    /// Seconds that a server may take to answer at all, 1 to 3600.
    #[arg(long, value_name = "SECONDS", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=3600))]
    connect_timeout: u64,
    /// Authorities, as a PEM file, whose certificates servers at https:// may show; without, those that the system trusts.
    #[arg(long, value_name = "FILE", env = "DENOISED_CA_CERTIFICATE")]
    ca_certificate: Option<PathBuf>,
    /// Certificate of this client, as a PEM file, for servers at https:// that ask for one.
    #[arg(
        long,
        value_name = "FILE",
        env = "DENOISED_CLIENT_CERTIFICATE",
        requires = "client_key"
    )]
    client_certificate: Option<PathBuf>,
    /// Key of that certificate, as a PEM file.
    #[arg(
        long,
        value_name = "FILE",
        env = "DENOISED_CLIENT_KEY",
        requires = "client_certificate"
    )]
    client_key: Option<PathBuf>,
    /// Token for servers that ask for one; better kept in the variable, since others can see a command line.
    #[arg(long, value_name = "TOKEN", env = "DENOISED_TOKEN", hide_env_values = true)]
    token: Option<String>,
    /// TOML file with settings for the server that this command starts; not read with --server.
    #[arg(long, value_name = "FILE", env = "DENOISED_CONFIG")]
    config: Option<PathBuf>,
    /// Folder of <model>/<version> bundles for the server that this command starts.
    #[arg(long, value_name = "DIR", conflicts_with = "server")]
    repository: Option<String>,
}

/// A server that answers, as this client calls it.
pub(super) type Answering = InterceptedService<Channel, Bearer>;

/// A connection, and the server behind it if it is ours.
#[derive(Debug)]
pub(super) struct Connection {
    /// The first server that answers.
    pub(super) server: Answering,
    /// A client of all of them, beginning with that one.
    pub(super) client: Client,
    own: Option<Own>,
}

#[derive(Debug)]
struct Own {
    stop: oneshot::Sender<()>,
    serving: JoinHandle<()>,
    _log: Log,
}

impl Target {
    /// This target, or the server that this machine's settings are for.
    pub(super) fn or_own(mut self) -> Result<Self, Failed> {
        if self.repository.is_some() {
            return Err(Failed::usage("--repository: is for commands that start a server"));
        }
        if self.server.is_empty() {
            let config = Config::load(self.config.as_deref(), &[]).map_err(Failed::usage)?;
            let scheme = if config.server.tls_certificate.is_some() {
                "https"
            } else {
                "http"
            };
            self.server = vec![format!("{scheme}://{}", from_here(config.server.listen))];
        }
        Ok(self)
    }

    pub(super) async fn connect(&self) -> Result<Connection, Failed> {
        let (urls, own) = if self.server.is_empty() {
            let (url, own) = self.start().await?;
            (vec![url], Some(own))
        } else {
            (self.server.clone(), None)
        };
        let mut endpoints = Vec::with_capacity(urls.len());
        for url in urls {
            let is_secure = url.starts_with("https://");
            if !is_secure && !url.starts_with("http://") {
                // Anything else would be spoken in plaintext all the same.
                let problem = format!("--server {url}: must begin with http:// or https://");
                return Err(Failed::usage(problem));
            }
            if !is_secure && (self.ca_certificate.is_some() || self.client_certificate.is_some()) {
                let problem = format!("--server {url}: certificates are for https://");
                return Err(Failed::usage(problem));
            }
            let wrong =
                |e: tonic::transport::Error| Failed::usage(format!("--server {url}: {}", root_cause(&e)));
            let mut endpoint = Endpoint::from_shared(url.clone()).map_err(wrong)?;
            if is_secure {
                endpoint = endpoint.tls_config(self.tls()?).map_err(wrong)?;
            }
            let endpoint = watched(endpoint).connect_timeout(Duration::from_secs(self.connect_timeout));
            endpoints.push((url, endpoint));
        }
        let bearer = self.token.as_deref().map(Bearer::new).transpose();
        let bearer = bearer.map_err(|_| Failed::usage("--token: has characters that no token has"))?;
        let bearer = bearer.unwrap_or_default();
        if self.balance {
            let [url] = self.server.as_slice() else {
                return Err(Failed::usage(
                    "--balance: is for one --server, whose name has several addresses",
                ));
            };
            let channel = balanced_with(url, self.tls()?);
            let channel = channel.map_err(|error| Failed::usage(format!("--server {url}: {error}")))?;
            let greeted = self.greets(channel.clone()).await;
            greeted
                .map_err(|problem| Failed::unavailable(format!("no server answers at {url}: {problem}")))?;
            return Ok(Connection {
                server: InterceptedService::new(channel.clone(), bearer.clone()),
                client: Client::of([channel]).with_bearer(bearer),
                own,
            });
        }
        let mut nobody = Vec::new();
        for index in 0..endpoints.len() {
            let (url, endpoint) = &endpoints[index];
            match self.greeted(endpoint).await {
                Ok(channel) => {
                    let others = endpoints.iter().cycle().skip(index + 1).take(endpoints.len() - 1);
                    let others = others.map(|(_, other)| other.connect_lazy());
                    let servers: Vec<Channel> = std::iter::once(channel.clone()).chain(others).collect();
                    let client = Client::of(servers);
                    return Ok(Connection {
                        server: InterceptedService::new(channel, bearer.clone()),
                        client: client.with_bearer(bearer),
                        own,
                    });
                }
                Err(problem) => nobody.push(format!("no server answers at {url}: {problem}")),
            }
        }
        Err(Failed::unavailable(nobody.join("; ")))
    }

    /// A connection whose server has answered: a socket that opens says nothing of what is behind it, and calls to what
    /// is none wait for ever, once in some hundred times.
    async fn greeted(&self, endpoint: &Endpoint) -> Result<Channel, String> {
        let channel = endpoint.connect().await.map_err(|error| root_cause(&error))?;
        self.greets(channel).await
    }

    /// `channel`, when what is behind it has answered.
    async fn greets(&self, channel: Channel) -> Result<Channel, String> {
        let mut health = HealthClient::new(channel.clone());
        let answer = health.check(HealthCheckRequest::default());
        let answered = tokio::time::timeout(Duration::from_secs(self.connect_timeout), answer).await;
        match answered {
            Err(_) => Err(format!(
                "what is there says nothing for {} s, or speaks no gRPC",
                self.connect_timeout
            )),
            // Whatever it thinks of its health, or of being asked, it answers.
            Ok(Ok(_)) => Ok(channel),
            Ok(Err(status)) => match Failed::from(status) {
                Failed {
                    code: UNAVAILABLE,
                    message,
                } => Err(message),
                Failed { .. } => Ok(channel),
            },
        }
    }

    /// How this client shows itself, and whom it trusts.
    fn tls(&self) -> Result<ClientTlsConfig, Failed> {
        let read = |option: &str, file: &Path| {
            std::fs::read(file)
                .map_err(|error| Failed::usage(format!("{option} {}: {error}", file.display())))
        };
        let mut tls = ClientTlsConfig::new();
        tls = match &self.ca_certificate {
            Some(file) => tls.ca_certificate(Certificate::from_pem(read("--ca-certificate", file)?)),
            None => tls.with_enabled_roots(),
        };
        if let (Some(certificate), Some(key)) = (&self.client_certificate, &self.client_key) {
            tls = tls.identity(Identity::from_pem(
                read("--client-certificate", certificate)?,
                read("--client-key", key)?,
            ));
        }
        Ok(tls)
    }

    async fn start(&self) -> Result<(String, Own), Failed> {
        let mut flags = vec![
            ("server.listen", "127.0.0.1:0".to_owned()),
            ("server.drain_grace_seconds", "0".to_owned()),
            // Nobody else can reach it.
            ("server.tls_certificate", String::new()),
            ("server.tls_key", String::new()),
            ("server.tls_client_ca", String::new()),
            ("server.tokens", String::new()),
        ];
        flags.extend(
            self.repository
                .iter()
                .map(|path| ("models.repository", path.clone())),
        );
        let config = Config::load(self.config.as_deref(), &flags).map_err(Failed::usage)?;
        let quiet = LogConfig {
            filter: QUIET.to_owned(),
            ..config.log.clone()
        };
        let log = telemetry::init(&quiet).map_err(Failed::software)?;
        let server = Server::bind(&config).await?;
        let url = server.url();
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = tokio::spawn(server.run(async {
            let _gone = stopped.await.is_err();
        }));
        Ok((
            url,
            Own {
                stop,
                serving,
                _log: log,
            },
        ))
    }
}

impl Connection {
    /// Whether the server is one of our own.
    pub(super) fn is_own(&self) -> bool {
        self.own.is_some()
    }

    /// Ends our own server, if there is one, and waits for it.
    pub(super) async fn close(self) -> Result<(), Failed> {
        drop((self.server, self.client));
        let Some(own) = self.own else { return Ok(()) };
        let _already_over = own.stop.send(()).is_err();
        own.serving.await.map_err(Failed::software)
    }
}

/// The innermost error: tonic's outer ones all say "transport error".
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
