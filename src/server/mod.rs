//! The gRPC server: translates between the wire and the engine, and nothing else.
//!
//! `request` checks what comes in, `stream` shapes what goes out, `status` alone knows gRPC codes.
//! A [`Server`] is a function of a configuration (or of models, in tests) and a shutdown future.

mod access;
mod authentication;
mod caller;
mod connections;
mod deadline;
mod diffusion_service;
#[cfg(test)]
mod documented_test;
mod following;
#[cfg(test)]
mod fuzz_test;
mod heard_out;
mod http;
mod metrics;
mod mirror;
mod model_service;
pub mod models;
mod notified;
mod open_inference;
mod openai;
mod pace;
mod page;
mod peers;
mod repository;
pub(crate) mod request;
mod resume;
pub mod sampler;
mod scoring;
mod server_service;
mod span;
mod status;
mod stream;
mod template;
mod text;
mod tls;
mod token_sets;
pub(crate) mod tokens;
mod watched;

pub use template::MASKED;

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};
use tonic::Status;
use tonic::service::Routes;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::config::{Config, LimitsConfig, Who};
use crate::engine::{Engine, EngineOptions};
use crate::models::{Catalogue, ModelState, Models, ServedModel};
use crate::network::NetworkError;
use crate::network::onnx::Device;
use crate::proto::inference::grpc_inference_service_server::{self, GrpcInferenceServiceServer};
use crate::proto::v1::diffusion_service_server::DiffusionServiceServer;
use crate::proto::v1::model_service_server::ModelServiceServer;
use crate::proto::v1::server_service_server::ServerServiceServer;
use crate::proto::{DESCRIPTORS, OPEN_INFERENCE_DESCRIPTORS, v1};
use caller::Principal;
use repository::Repository;
use tls::Tls;
use tokens::Tokens;

/// Why the server cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A bundle is not what it should be.
    #[error("model {model}: {source}")]
    Bundle {
        /// Name or place of the model.
        model: String,
        /// The problem.
        source: crate::bundle::BundleError,
    },
    /// A network cannot be loaded.
    #[error("{0}")]
    Network(#[from] NetworkError),
    /// There is nothing to serve, or the default model is not served.
    #[error("{0}")]
    Models(String),
    /// Networks cannot run where they should.
    #[error(
        "engine.devices has {0}, which this binary cannot use: it was built without the feature \"cuda\""
    )]
    Device(Device),
    /// There can be no TLS with the configured files.
    #[error("server.tls: {0}")]
    Tls(String),
    /// The configured file of tokens cannot be used.
    #[error("server.tokens: {0}")]
    Tokens(String),
    /// The socket or a thread cannot be had.
    #[error("{what}: {source}")]
    System {
        /// The step that failed.
        what: String,
        /// The system's error.
        source: std::io::Error,
    },
}

/// Models that are named to whoever asks for another, at most.
const TOLD_MODELS: usize = 8;

/// State of both services.
#[derive(Clone, Debug)]
struct Service {
    engine: Arc<Engine>,
    models: Arc<Catalogue>,
    limits: LimitsConfig,
    /// Threads that read what requests ask.
    text: text::TextThreads,
    /// Threads that write what streams tell: who asks much must not hold up who listens.
    frame_text: text::TextThreads,
    /// How long a stream may go unread.
    unread: Duration,
    /// What is told of the server.
    told: Arc<v1::GetServerResponse>,
    /// Whether requests are taken: health, for plain HTTP.
    ready: Arc<watch::Sender<bool>>,
    /// Whether the Open Inference Protocol is spoken.
    open_inference: bool,
    /// Where models are ordered to come and go; absent where nobody may.
    control: Option<following::Control>,
}

impl Service {
    /// The model that a request of `principal` names, or the default one. What they may not use does not exist for them.
    fn model(
        &self,
        principal: &Principal,
        asked: Option<v1::ModelReference>,
    ) -> Result<Arc<ServedModel>, Status> {
        let v1::ModelReference {
            name: asked_name,
            version,
        } = asked.unwrap_or_default();
        let version = (version > 0).then_some(version);
        if asked_name.is_empty() && version.is_some() {
            return Err(status::FieldError::new("model.name", "is empty, but a version is given").into());
        }
        let named = (!asked_name.is_empty()).then_some(asked_name.as_str());
        let models = self.models.now();
        let mut candidates = models.candidates(named, version);
        candidates.retain(|model| principal.may_use(model.name()));
        self.choose(&candidates)
            .or(candidates.first())
            .cloned()
            .ok_or_else(|| {
                let name = match version {
                    Some(version) => format!("{asked_name}@{version}"),
                    None => asked_name.clone(),
                };
                let own = models.iter().filter(|model| principal.may_use(model.name()));
                let served: Vec<String> = own.map(ToString::to_string).collect();
                let is_refused = principal.may_use(&asked_name)
                    && version.is_some_and(|version| models.refusal(&asked_name, version).is_some());
                let hint = if is_refused {
                    "it is refused, GetModel tells why".to_owned()
                } else if served.len() <= TOLD_MODELS {
                    format!("there are {}", served.join(", "))
                } else {
                    "ListModels tells what there is".to_owned()
                };
                status::not_found("model", &name, &hint)
            })
    }

    /// Of versions, newest first, the one that is served: the newest that has not failed. As long as that has never
    /// been ready, one that is ready stands in for it, so that a new version never makes requests wait.
    fn choose<'a>(&self, candidates: &'a [Arc<ServedModel>]) -> Option<&'a Arc<ServedModel>> {
        let newest = candidates.iter().find(|model| !self.engine.has_failed(model))?;
        if self.engine.was_ready(newest) {
            return Some(newest);
        }
        let ready = |model: &&Arc<ServedModel>| self.engine.state(model) == ModelState::Ready;
        match candidates.iter().find(ready) {
            Some(ready) => {
                self.engine.prepare(newest);
                Some(ready)
            }
            None => Some(newest),
        }
    }

    async fn set_health(&self, health: &HealthReporter, status: ServingStatus) {
        let own = [
            "",
            v1::diffusion_service_server::SERVICE_NAME,
            v1::model_service_server::SERVICE_NAME,
            v1::server_service_server::SERVICE_NAME,
        ];
        let open = self
            .open_inference
            .then_some(grpc_inference_service_server::SERVICE_NAME);
        for name in own.into_iter().chain(open) {
            health.set_service_status(name, status).await;
        }
    }

    /// Keeps health at what the models are: down only while none of them can be served.
    async fn report_health(&self, health: HealthReporter) {
        let mut changes = self.engine.changes();
        loop {
            let status = if self
                .models
                .now()
                .iter()
                .all(|model| self.engine.has_failed(model))
            {
                ServingStatus::NotServing
            } else {
                ServingStatus::Serving
            };
            self.ready.send_replace(status == ServingStatus::Serving);
            self.set_health(&health, status).await;
            if changes.changed().await.is_err() {
                return;
            }
        }
    }
}

/// A server that is bound and ready to run.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    service: Service,
    config: Config,
    tls: Option<Tls>,
    tokens: Option<Tokens>,
    /// Orders to load and unload models.
    orders: following::Orders,
    /// Where models come from, but for those of tests.
    repository: Option<Repository>,
}

impl Server {
    /// Finds the configured models, starts the workers and binds the socket. Networks are loaded when it runs.
    pub async fn bind(config: &Config) -> Result<Self, StartError> {
        // Reads files: not on the runtime's threads.
        let (wanted, runtime) = (config.clone(), Handle::current());
        let (repository, models) = tokio::task::spawn_blocking(move || Repository::open(&wanted, &runtime))
            .await
            .map_err(|e| StartError::Models(format!("loading the models failed: {e}")))??;
        let server = Self::with_models(config, models).await?;
        Ok(Self {
            repository: Some(repository),
            ..server
        })
    }

    /// Serves `models` instead of the configured ones.
    pub async fn with_models(config: &Config, models: Models) -> Result<Self, StartError> {
        let system = |what: String| move |source| StartError::System { what, source };
        if let Some(&device) = config.engine.devices.iter().find(|device| !device.is_usable()) {
            return Err(StartError::Device(device));
        }
        let tls = Tls::open(&config.server).map_err(|error| StartError::Tls(error.to_string()))?;
        let tokens = Tokens::open(config.server.tokens.as_ref());
        let tokens = tokens.map_err(|error| StartError::Tokens(error.to_string()))?;
        let listen = config.server.listen;
        if tokens.is_some() && tls.is_none() && !listen.ip().is_loopback() {
            tracing::warn!("tokens travel in plaintext: there is no server.tls_certificate");
        }
        let listener = TcpListener::bind(listen)
            .await
            .map_err(system(format!("cannot listen on {listen}")))?;
        let address = listener
            .local_addr()
            .map_err(system("the socket has no address".to_owned()))?;
        let engine = Engine::start(EngineOptions {
            devices: config.engine.devices.len(),
            workers: config.engine.workers,
            threads: config.engine.threads(),
            batch_tokens: config.engine.batch_tokens,
            output_bytes: config.engine.max_output_megabytes << 20,
            max_queue: Duration::from_secs(config.engine.max_queue_seconds),
            caller_share: config.engine.max_caller_share,
            network_bytes: match config.models.memory_megabytes {
                0 => u64::MAX,
                megabytes => megabytes << 20,
            },
            max_running_requests: config.limits.max_running_requests,
            max_pass: Duration::from_secs(config.engine.max_pass_seconds),
            last_chance: LAST_CHANCE,
        })
        .map_err(system("cannot start the workers".to_owned()))?;
        let (control, orders) = following::control();
        let service = Service {
            engine: Arc::new(engine),
            models: Arc::new(Catalogue::new(models)),
            limits: config.limits.clone(),
            text: text::TextThreads::new(),
            frame_text: text::TextThreads::new(),
            unread: Duration::from_secs(config.server.unread_seconds),
            told: Arc::new(server_service::server(config)),
            ready: Arc::new(watch::channel(true).0),
            open_inference: config.server.open_inference,
            control: (config.server.model_control != Who::Nobody).then_some(control),
        };
        Ok(Self {
            listener,
            address,
            service,
            config: config.clone(),
            tls,
            tokens,
            orders,
            repository: None,
        })
    }

    /// The bound address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where clients find it.
    pub fn url(&self) -> String {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// Models, workers, devices and where the page is, in one line.
    pub fn summary(&self) -> String {
        let models = self.service.models.now();
        let default = models.default_model();
        let names: Vec<String> = models
            .iter()
            .map(|model| {
                let mark = if default.as_ref().is_some_and(|d| Arc::ptr_eq(d, model)) {
                    " (default)"
                } else {
                    ""
                };
                format!("{model}{mark}")
            })
            .collect();
        let engine = &self.config.engine;
        let devices: Vec<String> = engine.devices.iter().map(ToString::to_string).collect();
        let page = if self.config.server.page {
            format!("; a page for browsers at {}/", self.url())
        } else {
            String::new()
        };
        format!(
            "models {}; {} worker(s) of {} thread(s) on {}{page}",
            names.join(", "),
            engine.workers * engine.devices.len(),
            engine.threads(),
            devices.join(", ")
        )
    }

    /// Serves until `shutdown`, then drains: health says NOT_SERVING, admission stops, running requests
    /// get the configured grace to finish.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send) {
        let (health, health_service) = tonic_health::server::health_reporter();
        if let Some(default) = self.service.models.now().default_model() {
            self.service.engine.prepare(&default);
        }
        let service = self.service.clone();
        let plain = http::Plain {
            ready: service.ready.subscribe(),
            metrics: Arc::new(metrics::Metrics::new(&service.engine, &service.models)),
            rules: authentication::Rules::of(&self.config.server),
            tokens: self.tokens.clone(),
            page: self.config.server.page,
            openai: (self.config.server.openai).then(|| openai::routes(service.clone(), &self.config.server)),
        };
        let grpc = self.routes().add_service(health_service);
        let routes = connections::ByProtocol {
            http1: plain.clone().http1(grpc.clone()),
            http2: plain.http2(grpc),
        };
        let engine = Arc::clone(&service.engine);
        let grace = Duration::from_secs(self.config.server.drain_grace_seconds);
        let poll = Duration::from_secs(self.config.models.poll_seconds);
        let (stop_accepting, stopped) = oneshot::channel::<()>();
        let serving = connections::serve(
            self.listener,
            routes,
            &self.config.server,
            self.tls.clone(),
            async {
                // An error means that the sender is gone, which is a reason to stop as well.
                let _gone = stopped.await.is_err();
            },
        );
        let draining = async {
            tokio::select! {
                () = shutdown => {}
                // Ends with the engine alone, which ends below.
                () = service.report_health(health.clone()) => {}
                // Ends never, nor does what follows.
                () = service.follow(self.repository, poll, self.orders) => {}
                () = watched::follow(self.tls) => {}
                () = watched::follow(self.tokens) => {}
            }
            tracing::info!(
                "draining: no new requests, {} s for running ones",
                grace.as_secs()
            );
            engine.drain();
            service.ready.send_replace(false);
            service.set_health(&health, ServingStatus::NotServing).await;
            if !engine.idle_within(grace).await {
                tracing::warn!("the grace period is over, ending what still runs");
            }
            let ending = Arc::clone(&engine);
            if tokio::task::spawn_blocking(move || ending.shut_down())
                .await
                .is_err()
            {
                tracing::error!("shutting the engine down failed");
            }
            // The receiver is gone only when serving has ended by itself.
            let _ended = stop_accepting.send(()).is_err();
            // Last results are on their way; a client that does not read them is not waited for.
            tokio::time::sleep(LAST_WORDS).await;
        };
        tokio::pin!(serving);
        tokio::select! {
            () = &mut serving => {}
            () = draining => {}
        }
    }

    fn routes(&self) -> Routes {
        let server = &self.config.server;
        let mut routes = Routes::new(
            DiffusionServiceServer::new(self.service.clone())
                .max_decoding_message_size(server.max_message_bytes),
        )
        .add_service(
            ModelServiceServer::new(self.service.clone()).max_decoding_message_size(server.max_message_bytes),
        )
        .add_service(
            ServerServiceServer::new(self.service.clone())
                .max_decoding_message_size(server.max_message_bytes),
        );
        if server.open_inference {
            let service = GrpcInferenceServiceServer::new(self.service.clone());
            routes = routes.add_service(service.max_decoding_message_size(server.max_message_bytes));
        }
        if server.reflection != Who::Nobody {
            let builder = || {
                let builder = tonic_reflection::server::Builder::configure();
                let builder = if server.open_inference {
                    builder.register_encoded_file_descriptor_set(OPEN_INFERENCE_DESCRIPTORS)
                } else {
                    builder
                };
                builder
                    .register_encoded_file_descriptor_set(DESCRIPTORS)
                    .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                    // Details of errors, so that clients without generated code can show them.
                    .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
            };
            match (builder().build_v1(), builder().build_v1alpha()) {
                (Ok(v1), Ok(v1alpha)) => routes = routes.add_service(v1).add_service(v1alpha),
                (Err(error), _) | (_, Err(error)) => tracing::error!(%error, "reflection is off"),
            }
        }
        routes
    }
}

/// How long a pass may go on after it was told to stop: ONNX Runtime stops between two operators.
const LAST_CHANCE: Duration = Duration::from_secs(5);

/// How long a request may take from choosing its model to being admitted: texts are read in between.
const LAST_CHOICE: Duration = Duration::from_secs(2);

/// How long connections get to deliver what is already finished.
const LAST_WORDS: Duration = Duration::from_secs(2);
