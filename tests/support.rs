//! Servers for tests: in process on a free port, with the embedded demo model or a closed-form network.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use denoised::bundle::{self, BundleWriter, FORMAT, MODEL, Manifest};
use denoised::config::Config;
use denoised::diffusion::Parameterization;
use denoised::diffusion::{Graph, GraphKind, Schedule};
use denoised::models::{Models, NetworkSource, ServedModel};
use denoised::network::closed_form::ClosedForm;
use denoised::network::{Batch, NetworkError, ScoreNetwork, ScoreRows};
use denoised::proto::v1::diffusion_service_client::DiffusionServiceClient;
use denoised::proto::v1::event::Event;
use denoised::proto::v1::generate_request::PromptAs;
use denoised::proto::v1::model_service_client::ModelServiceClient;
use denoised::proto::v1::template_part::Part;
use denoised::proto::v1::{Accepted, CanvasResult, Frame, Gap, GenerateRequest, InfillRequest};
use denoised::server::Server;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::Status;
use tonic::client::GrpcService;
use tonic::codegen::{Body, Bytes, StdError};
use tonic::transport::Channel;

/// Says that something was not tried, past the test harness, which keeps to itself what passing tests print. With
/// `DENOISED_NO_SKIPPING` set the test fails instead.
pub fn skipped(why: impl std::fmt::Display) {
    assert!(std::env::var_os("DENOISED_NO_SKIPPING").is_none(), "{why}");
    // Nobody is left to tell that this cannot be told.
    drop(writeln!(std::io::stderr(), "SKIPPED: {why}"));
}

/// Whether a process may have mounts of its own here.
pub fn may_mount() -> bool {
    let status = std::process::Command::new("unshare")
        .args(["--mount", "true"])
        .status();
    status.is_ok_and(|status| status.success())
}

pub struct TestServer {
    pub channel: Channel,
    pub url: String,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<()>,
}

pub fn config() -> Config {
    let mut config = Config::default();
    config.server.listen = "127.0.0.1:0".parse().unwrap();
    config.engine.threads_per_worker = 1;
    config
}

impl TestServer {
    pub async fn demo() -> Self {
        Self::demo_with(&config()).await
    }

    pub async fn demo_with(config: &Config) -> Self {
        Self::run(Server::bind(config).await.expect("the demo model is served")).await
    }

    pub async fn with_network(config: &Config, network: NetworkSource) -> Self {
        Self::with_manifest(config, closed_form_manifest(), network).await
    }

    pub async fn with_manifest(config: &Config, manifest: Manifest, network: NetworkSource) -> Self {
        let mut models = Models::default();
        models.insert(ServedModel::without_bundle(manifest, 1, network));
        Self::run(Server::with_models(config, models).await.unwrap()).await
    }

    pub async fn run(server: Server) -> Self {
        let url = format!("http://{}", server.address());
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = tokio::spawn(async move {
            let shutdown = async {
                stopped.await.ok();
            };
            server.run(shutdown).await;
        });
        let channel = Channel::from_shared(url.clone())
            .unwrap()
            .connect()
            .await
            .unwrap();
        Self {
            channel,
            url,
            stop,
            serving,
        }
    }

    pub fn client(&self) -> DiffusionServiceClient<Channel> {
        DiffusionServiceClient::new(self.channel.clone())
    }

    pub fn models(&self) -> ModelServiceClient<Channel> {
        ModelServiceClient::new(self.channel.clone())
    }

    pub async fn stop(self) {
        drop(self.channel);
        self.stop.send(()).ok();
        tokio::time::timeout(Duration::from_secs(60), self.serving)
            .await
            .expect("the server stops")
            .unwrap();
    }
}

pub const CLOSED_FORM_LENGTH: usize = 12;

pub fn closed_form_manifest() -> Manifest {
    Manifest {
        format: FORMAT,
        name: "closed-form".to_owned(),
        graph: GraphKind::Absorbing,
        schedule: Schedule::LogLinear { eps: 1e-3 },
        parameterization: Parameterization::Score,
        sigma_offset: false,
        vocab_size: 6,
        mask_token: Some(5),
        excluded_tokens: Vec::new(),
        frame: bundle::Frame::default(),
        end_of_document: None,
        max_length: CLOSED_FORM_LENGTH,
        time_conditioned: true,
        two_stage: false,
        defaults: None,
        sha256: [(MODEL.to_owned(), String::new())].into(),
        provenance: serde_json::Value::Null,
    }
}

/// A network whose tokens are independent of each other.
pub fn closed_form() -> NetworkSource {
    let graph = Graph::new(GraphKind::Absorbing, 6);
    Box::new(move || {
        Ok(Box::new(ClosedForm::independent(
            graph,
            &[0.3, 0.25, 0.2, 0.15, 0.1],
        )))
    })
}

/// Everything one call answered.
#[derive(Debug, Default)]
pub struct Answer {
    pub accepted: Option<Accepted>,
    pub frames: Vec<Frame>,
    pub results: Vec<CanvasResult>,
}

impl Answer {
    fn take(&mut self, event: Option<denoised::proto::v1::Event>) {
        match event
            .and_then(|event| event.event)
            .expect("every message holds an event")
        {
            Event::Accepted(accepted) => {
                assert!(self.accepted.replace(accepted).is_none(), "accepted comes once");
                assert!(
                    self.frames.is_empty() && self.results.is_empty(),
                    "accepted comes first"
                );
            }
            Event::Frame(frame) => self.frames.push(frame),
            Event::Result(result) => self.results.push(result),
        }
    }

    pub fn tokens(&self) -> Vec<Vec<u32>> {
        let mut results = self.results.clone();
        results.sort_by_key(|result| result.canvas);
        results.into_iter().map(|result| result.tokens).collect()
    }
}

pub async fn generate<T>(
    client: &mut DiffusionServiceClient<T>,
    request: GenerateRequest,
) -> Result<Answer, Status>
where
    T: GrpcService<tonic::body::Body>,
    T::Error: Into<StdError>,
    T::ResponseBody: Body<Data = Bytes, Error: Into<StdError> + Send> + Send + 'static,
{
    let mut stream = client.generate(request).await?.into_inner();
    let mut answer = Answer::default();
    while let Some(message) = stream.message().await? {
        answer.take(message.event);
    }
    Ok(answer)
}

/// A prompt of text.
pub fn prompt(text: &str) -> PromptAs {
    PromptAs::Prompt(text.to_owned())
}

/// A gap of this many positions.
pub fn gap(positions: u32) -> Part {
    Part::Gap(Gap {
        positions,
        allowed: None,
    })
}

pub async fn infill<T>(
    client: &mut DiffusionServiceClient<T>,
    request: InfillRequest,
) -> Result<Answer, Status>
where
    T: GrpcService<tonic::body::Body>,
    T::Error: Into<StdError>,
    T::ResponseBody: Body<Data = Bytes, Error: Into<StdError> + Send> + Send + 'static,
{
    let mut stream = client.infill(request).await?.into_inner();
    let mut answer = Answer::default();
    while let Some(message) = stream.message().await? {
        answer.take(message.event);
    }
    Ok(answer)
}

/// A gate that networks wait at in every evaluation, until it is opened.
#[derive(Clone, Default)]
pub struct Gate(Arc<(parking_lot::Mutex<bool>, parking_lot::Condvar)>);

impl Gate {
    pub fn open(&self) {
        *self.0.0.lock() = true;
        self.0.1.notify_all();
    }

    pub fn wait(&self) {
        self.0.1.wait_while(&mut self.0.0.lock(), |open| !*open);
    }
}

/// Publishes `network`, of five states on the uniform graph, as a model and version of `repository`.
pub fn publish(repository: &Path, model: (&str, u64), network: &[u8], time_conditioned: bool) {
    publish_files(repository, model, &[(MODEL, network)], time_conditioned);
}

/// The same of a network that lies in several files.
pub fn publish_files(
    repository: &Path,
    (name, version): (&str, u64),
    files: &[(&str, &[u8])],
    time_conditioned: bool,
) {
    let mut manifest = Manifest {
        name: name.to_owned(),
        graph: GraphKind::Uniform,
        vocab_size: 5,
        mask_token: None,
        time_conditioned,
        sha256: BTreeMap::new(),
        ..closed_form_manifest()
    };
    let folder = repository.join(name);
    let mut writer = BundleWriter::new(&folder).unwrap();
    for (name, bytes) in files {
        writer.add(name, bytes).unwrap();
    }
    writer.describe(&mut manifest).unwrap();
    writer.commit(&folder.join(version.to_string())).unwrap();
}

/// The networks of `source`, each evaluation of which takes so many milliseconds.
pub fn slowly(ms: u64, source: NetworkSource) -> NetworkSource {
    Box::new(move || {
        let network = source()?;
        Ok(Box::new(Slow { ms, network }) as Box<dyn ScoreNetwork>)
    })
}

struct Slow {
    ms: u64,
    network: Box<dyn ScoreNetwork>,
}

impl ScoreNetwork for Slow {
    fn log_score(
        &mut self,
        batch: &Batch<'_>,
        read: &mut dyn FnMut(ScoreRows<'_>),
    ) -> Result<(), NetworkError> {
        std::thread::sleep(Duration::from_millis(self.ms));
        self.network.log_score(batch, read)
    }
}

/// The Python of the test tools' `environment`, if it has these modules; said loudly where it has not.
pub fn python(environment: &str, modules: &str) -> Option<PathBuf> {
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!(".tools/{environment}/bin/python"));
    let import = Command::new(&python)
        .args(["-c", &format!("import {modules}")])
        .output();
    if import.is_ok_and(|output| output.status.success()) {
        return Some(python);
    }
    skipped(format_args!(
        "{modules} not installed (make test-tools): their clients were not run"
    ));
    None
}

/// What the client `script` of the test tools prints, as JSON on its last line, of the server at `address`.
pub fn printed_by(python: &Path, script: &str, address: &str) -> serde_json::Value {
    let script = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/tools")
        .join(script);
    let output = Command::new(python).arg(script).arg(address).output().unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let printed = String::from_utf8(output.stdout).unwrap();
    serde_json::from_str(printed.lines().last().unwrap()).unwrap()
}
