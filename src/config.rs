//! Settings: defaults, then a TOML file, then `DENOISED__SECTION__KEY` variables, then flags.
//!
//! `deploy/denoised.example.toml` documents every key; a test keeps it complete and true.

mod place;
mod who;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use config::builder::DefaultState;
use config::{ConfigBuilder, Environment, File, FileFormat, Map};
use serde::{Deserialize, Deserializer};

use crate::network::onnx::Device;
use place::place_or_none;

pub use place::RepositoryPlace;
pub use who::Who;

/// Everything that can be set.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The socket and what it accepts.
    pub server: ServerConfig,
    /// Models that are served.
    pub models: ModelsConfig,
    /// Workers and their batches.
    pub engine: EngineConfig,
    /// Limits of one request.
    pub limits: LimitsConfig,
    /// The log.
    pub log: LogConfig,
    /// Spans for a collector.
    pub traces: TracesConfig,
}

/// The socket and what it accepts.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServerConfig {
    /// Address and port; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Seconds that running requests get to finish after a shutdown signal.
    pub drain_grace_seconds: u64,
    /// Who may ask for the proto files.
    pub reflection: Who,
    /// Who may load and unload models.
    pub model_control: Who,
    /// Whether the Open Inference Protocol of KServe and Triton is spoken, beside the server's own.
    pub open_inference: bool,
    /// Whether OpenAI's API of completions is spoken, over plain HTTP.
    pub openai: bool,
    /// Whether there is a page for browsers, and gRPC-Web, which it speaks.
    pub page: bool,
    /// Who may ask `/metrics` for numbers for Prometheus.
    pub metrics: Who,
    /// The server's certificate and those between it and its authority, in PEM; empty for no TLS.
    #[serde(deserialize_with = "empty_is_none")]
    pub tls_certificate: Option<PathBuf>,
    /// The key of the certificate, in PEM.
    #[serde(deserialize_with = "empty_is_none")]
    pub tls_key: Option<PathBuf>,
    /// Authorities of the certificates that clients must show, in PEM; empty where they need none.
    #[serde(deserialize_with = "empty_is_none")]
    pub tls_client_ca: Option<PathBuf>,
    /// Tokens of those who may call, as a TOML file of their hashes; empty where everybody may.
    #[serde(deserialize_with = "empty_is_none")]
    pub tokens: Option<PathBuf>,
    /// Connections that may be open.
    pub max_connections: usize,
    /// Of these, those of one address.
    pub max_connections_per_peer: usize,
    /// Seconds that a new connection has to say that it speaks HTTP/2.
    pub handshake_seconds: u64,
    /// Calls that one connection may have open.
    pub max_concurrent_streams: u32,
    /// Largest message that is read, in bytes.
    pub max_message_bytes: usize,
    /// Seconds that a client may leave a stream unread before its request is ended.
    pub unread_seconds: u64,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 50051)),
            drain_grace_seconds: 20,
            reflection: Who::Callers,
            model_control: Who::Nobody,
            open_inference: false,
            openai: true,
            page: true,
            metrics: Who::Admins,
            tls_certificate: None,
            tls_key: None,
            tls_client_ca: None,
            tokens: None,
            max_connections: 1024,
            max_connections_per_peer: 256,
            handshake_seconds: 10,
            max_concurrent_streams: 256,
            max_message_bytes: 4 << 20,
            unread_seconds: 60,
        }
    }
}

/// Models that are served.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelsConfig {
    /// Folder of `<model>/<version>` bundles, or a place in an object store that holds the same; empty for none.
    #[serde(deserialize_with = "place_or_none")]
    pub repository: Option<RepositoryPlace>,
    /// Folder that a repository in an object store is fetched to.
    #[serde(deserialize_with = "empty_is_none")]
    pub cache: Option<PathBuf>,
    /// Megabytes of versions that are kept there.
    pub cache_megabytes: u64,
    /// Folder in which networks are kept as ONNX Runtime has prepared them for this machine; empty for none.
    #[serde(deserialize_with = "empty_is_none")]
    pub prepared: Option<PathBuf>,
    /// Megabytes of networks that are kept there.
    pub prepared_megabytes: u64,
    /// `name` or `name@version` that requests get which name no model; empty for the first one.
    #[serde(deserialize_with = "empty_is_none")]
    pub default: Option<String>,
    /// Versions, as `name@version`, that requests get which name that model and no version: where to go back to.
    #[serde(deserialize_with = "names")]
    pub pin: Vec<String>,
    /// Whether the demo model in the binary is served too.
    pub demo: bool,
    /// Seconds after which the repository is looked at again for versions that came or went; 0 for never, also when its
    /// folder changes.
    pub poll_seconds: u64,
    /// Megabytes of memory that the networks of all models together may take; 0 for no limit.
    pub memory_megabytes: u64,
}

impl Default for ModelsConfig {
    fn default() -> Self {
        Self {
            repository: None,
            cache: None,
            cache_megabytes: 20_480,
            prepared: None,
            prepared_megabytes: 20_480,
            default: None,
            pin: Vec::new(),
            demo: true,
            poll_seconds: 10,
            memory_megabytes: 0,
        }
    }
}

impl ModelsConfig {
    fn check(&self) -> Result<(), ConfigError> {
        for (key, value, wanted) in [
            ("models.memory_megabytes", self.memory_megabytes, "0 to 1048576"),
            ("models.cache_megabytes", self.cache_megabytes, "1 to 1048576"),
            (
                "models.prepared_megabytes",
                self.prepared_megabytes,
                "1 to 1048576",
            ),
        ] {
            if value > 1 << 20 {
                return Err(ConfigError::Range {
                    key,
                    value: value.to_string(),
                    wanted,
                });
            }
        }
        let is_in_store = matches!(self.repository, Some(RepositoryPlace::Store(_)));
        if self.cache.is_some() != is_in_store {
            let value = self.cache.as_ref().map(|folder| folder.display().to_string());
            return Err(ConfigError::Range {
                key: "models.cache",
                value: value.unwrap_or_else(|| "empty".to_owned()),
                wanted: "set where models.repository is in an object store, and only there",
            });
        }
        Ok(())
    }
}

/// Workers and their batches.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EngineConfig {
    /// Worker threads of each device, each with a network of its own.
    pub workers: usize,
    /// Threads of one forward pass; 0 shares all cores between the workers.
    pub threads_per_worker: usize,
    /// `cpu` or `cuda:N`, one or several; the same one twice is as good as twice as many workers.
    #[serde(alias = "device", deserialize_with = "devices")]
    pub devices: Vec<Device>,
    /// Tokens of one forward pass: canvases times length.
    pub batch_tokens: usize,
    /// Megabytes of log-scores that one forward pass gives. One canvas always fits.
    pub max_output_megabytes: usize,
    /// Seconds that the workers are predicted to need for all that may wait.
    pub max_queue_seconds: u64,
    /// Share of `max_queue_seconds` that one caller may use, above 0 and at most 1.
    pub max_caller_share: f64,
    /// Seconds after which a forward pass is stopped, and its canvases are tried again one by one.
    pub max_pass_seconds: u64,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            workers: 1,
            threads_per_worker: 0,
            devices: vec![Device::Cpu],
            batch_tokens: 512,
            max_output_megabytes: 1024,
            max_queue_seconds: 3600,
            max_caller_share: 0.5,
            max_pass_seconds: 300,
        }
    }
}

impl EngineConfig {
    /// Threads of one forward pass, resolved.
    pub fn threads(&self) -> usize {
        if self.threads_per_worker > 0 {
            return self.threads_per_worker;
        }
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        (cores / (self.workers * self.devices.len()).max(1)).max(1)
    }
}

/// Limits of one request.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// Denoising steps.
    pub max_steps: u32,
    /// Canvases.
    pub max_samples: u32,
    /// Positions of all its canvases together.
    pub max_request_tokens: usize,
    /// Parts of a template.
    pub max_template_parts: usize,
    /// Bytes of text.
    pub max_text_bytes: usize,
    /// Requests that run at once, of all callers together.
    pub max_running_requests: usize,
}

impl Default for LimitsConfig {
    fn default() -> Self {
        Self {
            max_steps: 4096,
            max_samples: 64,
            max_request_tokens: 1 << 18,
            max_template_parts: 1024,
            max_text_bytes: 1 << 20,
            max_running_requests: 1024,
        }
    }
}

/// The log.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LogConfig {
    /// Lines for people or JSON for machines.
    pub format: LogFormat,
    /// Directives of `tracing-subscriber`, such as `info` or `warn,denoised=debug`.
    pub filter: String,
}

impl Default for LogConfig {
    fn default() -> Self {
        Self {
            format: LogFormat::Text,
            filter: "info".to_owned(),
        }
    }
}

/// Spans for a collector.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TracesConfig {
    /// URL of a collector that takes OTLP over gRPC; empty for none.
    #[serde(deserialize_with = "empty_is_none")]
    pub endpoint: Option<String>,
    /// Share of the calls that are told of whose callers do not say, from 0 to 1.
    pub share: f64,
}

impl Default for TracesConfig {
    fn default() -> Self {
        Self {
            endpoint: None,
            share: 1.0,
        }
    }
}

impl TracesConfig {
    fn check(&self) -> Result<(), ConfigError> {
        let endpoint = self.endpoint.as_deref().unwrap_or("http://");
        let (key, value, wanted) = if !(endpoint.starts_with("http://") || endpoint.starts_with("https://")) {
            (
                "traces.endpoint",
                endpoint.to_owned(),
                "empty, or begin with http:// or https://",
            )
        } else if !(0.0..=1.0).contains(&self.share) {
            ("traces.share", self.share.to_string(), "0 to 1")
        } else {
            return Ok(());
        };
        Err(ConfigError::Range { key, value, wanted })
    }
}

/// How a line is logged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// For machines.
    Json,
}

/// Most devices of one server.
const MAX_DEVICES: usize = 64;
/// Longest time that can be set: a day, in seconds.
const MAX_SECONDS: u64 = 86_400;

/// A setting that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("configuration {}: {source}", file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The file is not TOML, has an unknown key or a value of the wrong type.
    #[error("configuration {}: {problem}", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// The line, and what is wrong with it.
        problem: String,
    },
    /// A variable or a flag names an unknown key or has a value of the wrong type.
    #[error("configuration from the environment or the command line: {0}")]
    Override(#[from] config::ConfigError),
    /// A value is out of range.
    #[error("configuration: {key} is {value}, must be {wanted}")]
    Range {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// Values that are allowed.
        wanted: &'static str,
    },
}

impl Config {
    /// Loads `file`, then the process's environment, then `flags` (dotted keys with values).
    pub fn load(file: Option<&Path>, flags: &[(&str, String)]) -> Result<Self, ConfigError> {
        Self::load_from(file, None, flags)
    }

    /// [`Self::load`] with an environment of one's own.
    fn load_from(
        file: Option<&Path>,
        environment: Option<Map<String, String>>,
        flags: &[(&str, String)],
    ) -> Result<Self, ConfigError> {
        let mut builder = ConfigBuilder::<DefaultState>::default();
        if let Some(path) = file {
            builder = builder.add_source(File::from_str(&read(path)?, FileFormat::Toml));
        }
        // Values stay text until their key is known: a model may be called 007.
        let variables = Environment::with_prefix("DENOISED")
            .prefix_separator("__")
            .separator("__")
            .source(environment);
        builder = builder.add_source(variables);
        for (key, value) in flags {
            builder = builder.set_override(*key, value.as_str())?;
        }
        let config: Self = builder.build()?.try_deserialize()?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let at_least_one: [(&'static str, u64); 15] = [
            ("models.cache_megabytes", self.models.cache_megabytes),
            ("models.prepared_megabytes", self.models.prepared_megabytes),
            (
                "server.max_concurrent_streams",
                self.server.max_concurrent_streams.into(),
            ),
            ("server.max_message_bytes", self.server.max_message_bytes as u64),
            ("engine.batch_tokens", self.engine.batch_tokens as u64),
            ("engine.max_queue_seconds", self.engine.max_queue_seconds),
            ("engine.max_pass_seconds", self.engine.max_pass_seconds),
            ("server.unread_seconds", self.server.unread_seconds),
            ("server.handshake_seconds", self.server.handshake_seconds),
            ("limits.max_request_tokens", self.limits.max_request_tokens as u64),
            ("limits.max_steps", self.limits.max_steps.into()),
            ("limits.max_samples", self.limits.max_samples.into()),
            ("limits.max_template_parts", self.limits.max_template_parts as u64),
            ("limits.max_text_bytes", self.limits.max_text_bytes as u64),
            (
                "limits.max_running_requests",
                self.limits.max_running_requests as u64,
            ),
        ];
        if let Some((key, value)) = at_least_one.into_iter().find(|(_, value)| *value == 0) {
            return Err(ConfigError::Range {
                key,
                value: value.to_string(),
                wanted: "at least 1",
            });
        }
        for (key, value) in [
            ("engine.workers", self.engine.workers),
            ("engine.threads_per_worker", self.engine.threads_per_worker),
            ("engine.max_output_megabytes", self.engine.max_output_megabytes),
            ("server.max_connections", self.server.max_connections),
            (
                "server.max_connections_per_peer",
                self.server.max_connections_per_peer,
            ),
        ] {
            let (range, wanted) = match key {
                "engine.workers" => (1..=1024, "1 to 1024"),
                "engine.threads_per_worker" => (0..=1024, "0 to 1024"),
                _ => (1..=1 << 20, "1 to 1048576"),
            };
            if !range.contains(&value) {
                return Err(ConfigError::Range {
                    key,
                    value: value.to_string(),
                    wanted,
                });
            }
        }
        if !(1..=MAX_DEVICES).contains(&self.engine.devices.len()) {
            return Err(ConfigError::Range {
                key: "engine.devices",
                value: format!("a list of {}", self.engine.devices.len()),
                wanted: "a list of 1 to 64",
            });
        }
        if self.server.model_control == Who::Everybody {
            return Err(ConfigError::Range {
                key: "server.model_control",
                value: "everybody".to_owned(),
                wanted: "nobody, admins or callers",
            });
        }
        self.models.check()?;
        self.traces.check()?;
        let server = &self.server;
        let has_certificate = server.tls_certificate.is_some();
        for (key, value, is_needed, is_wrong) in [
            (
                "server.tls_key",
                &server.tls_key,
                "set where server.tls_certificate is, and only there",
                server.tls_key.is_some() != has_certificate,
            ),
            (
                "server.tls_client_ca",
                &server.tls_client_ca,
                "empty without server.tls_certificate",
                server.tls_client_ca.is_some() && !has_certificate,
            ),
        ] {
            if is_wrong {
                let value = value.as_ref().map(|file| file.display().to_string());
                return Err(ConfigError::Range {
                    key,
                    value: value.unwrap_or_else(|| "empty".to_owned()),
                    wanted: is_needed,
                });
            }
        }
        let share = self.engine.max_caller_share;
        if !(share > 0.0 && share <= 1.0) {
            return Err(ConfigError::Range {
                key: "engine.max_caller_share",
                value: share.to_string(),
                wanted: "above 0 and at most 1",
            });
        }
        for (key, value) in [
            ("server.drain_grace_seconds", self.server.drain_grace_seconds),
            ("models.poll_seconds", self.models.poll_seconds),
            ("server.handshake_seconds", self.server.handshake_seconds),
            ("engine.max_queue_seconds", self.engine.max_queue_seconds),
            ("engine.max_pass_seconds", self.engine.max_pass_seconds),
            ("server.unread_seconds", self.server.unread_seconds),
        ] {
            if value > MAX_SECONDS {
                return Err(ConfigError::Range {
                    key,
                    value: value.to_string(),
                    wanted: "at most 86400, a day",
                });
            }
        }
        if self.limits.max_steps > 1 << 20 {
            let value = self.limits.max_steps.to_string();
            return Err(ConfigError::Range {
                key: "limits.max_steps",
                value,
                wanted: "at most 1048576",
            });
        }
        Ok(())
    }
}

/// The text of a file whose keys and types are right.
///
/// Checked here and not after merging, because the merged values convert into each other: a fraction
/// would be rounded, a word taken for a number.
fn read(file: &Path) -> Result<String, ConfigError> {
    let text = std::fs::read_to_string(file).map_err(|source| ConfigError::Unreadable {
        file: file.to_owned(),
        source,
    })?;
    match toml::from_str::<Config>(&text) {
        Ok(_) => Ok(text),
        Err(error) => Err(ConfigError::File {
            file: file.to_owned(),
            problem: problem(&error, &text),
        }),
    }
}

/// The error in one line, with the line of the file that it is about.
fn problem(error: &toml::de::Error, text: &str) -> String {
    let mut message = error.message().replace('\n', "; ");
    // Names of Rust's types, at the end of a message.
    for integer in ["expected usize", "expected u64", "expected u32"] {
        message = message.replace(integer, "expected a whole number, 0 or more");
    }
    let Some(before) = error.span().and_then(|span| text.get(..span.start)) else {
        return message;
    };
    let number = before.matches('\n').count();
    let line = text.lines().nth(number).unwrap_or_default().trim();
    format!("line {} ({line}): {message}", number + 1)
}

fn empty_is_none<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: From<String>,
{
    let text = String::deserialize(deserializer)?;
    Ok((!text.is_empty()).then(|| text.into()))
}

fn devices<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Device>, D::Error> {
    let names = names(deserializer)?;
    let devices = names.iter().map(|name| name.parse());
    devices
        .collect::<Result<_, _>>()
        .map_err(serde::de::Error::custom)
}

/// A list, or the same in one line with commas, as variables and flags have it.
fn names<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Names {
        Line(String),
        List(Vec<String>),
    }
    Ok(match Names::deserialize(deserializer)? {
        Names::Line(line) if line.trim().is_empty() => Vec::new(),
        Names::Line(line) => line.split(',').map(|name| name.trim().to_owned()).collect(),
        Names::List(names) => names,
    })
}

#[cfg(test)]
mod fuzz_test;
#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests;
