//! Settings: defaults, then a TOML file, then `DENOISED__SECTION__KEY` variables, then flags.
//!
//! `deploy/denoised.example.toml` documents every key; a test keeps it complete and true.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use config::builder::DefaultState;
use config::{ConfigBuilder, Environment, File, FileFormat, Map};
use serde::{Deserialize, Deserializer};

use crate::network::onnx::Device;

/// Everything that can be set.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// The socket and what it accepts.
    pub server: ServerConfig,
    /// What is served.
    pub models: ModelsConfig,
    /// Workers and their batches.
    pub engine: EngineConfig,
    /// What one request may ask for.
    pub limits: LimitsConfig,
    /// What is logged, and how.
    pub log: LogConfig,
}

/// The socket and what it accepts.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServerConfig {
    /// Address and port; port 0 takes a free one.
    pub listen: SocketAddr,
    /// Seconds that running requests get to finish after a shutdown signal.
    pub drain_grace_seconds: u64,
    /// Whether clients may ask for the proto files.
    pub reflection: bool,
    /// Calls that one connection may have open.
    pub max_concurrent_streams: u32,
    /// Largest message that is read, in bytes.
    pub max_message_bytes: usize,
}

impl Default for ServerConfig {
    fn default() -> Self {
        Self {
            listen: SocketAddr::from(([127, 0, 0, 1], 50051)),
            drain_grace_seconds: 20,
            reflection: true,
            max_concurrent_streams: 256,
            max_message_bytes: 4 << 20,
        }
    }
}

/// What is served.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ModelsConfig {
    /// Folder of `<model>/<version>` bundles; empty for none.
    #[serde(deserialize_with = "empty_is_none")]
    pub repository: Option<PathBuf>,
    /// `name` or `name@version` that requests get which name no model; empty for the first one.
    #[serde(deserialize_with = "empty_is_none")]
    pub default: Option<String>,
    /// Whether the demo model in the binary is served too.
    pub demo: bool,
}

impl Default for ModelsConfig {
    fn default() -> Self {
        Self {
            repository: None,
            default: None,
            demo: true,
        }
    }
}

/// Workers and their batches.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct EngineConfig {
    /// Worker threads, each with a network of its own.
    pub workers: usize,
    /// Threads of one forward pass; 0 shares all cores between the workers.
    pub threads_per_worker: usize,
    /// `cpu` or `cuda:N`.
    #[serde(deserialize_with = "device")]
    pub device: Device,
    /// Tokens of one forward pass: canvases times length.
    pub batch_tokens: usize,
    /// Evaluations (canvases times remaining steps) that may wait.
    pub max_queued_rows: u64,
}

impl Default for EngineConfig {
    fn default() -> Self {
        Self {
            workers: 1,
            threads_per_worker: 0,
            device: Device::Cpu,
            batch_tokens: 512,
            max_queued_rows: 65_536,
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
        (cores / self.workers.max(1)).max(1)
    }
}

/// What one request may ask for.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct LimitsConfig {
    /// Denoising steps.
    pub max_steps: u32,
    /// Canvases.
    pub max_samples: u32,
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
            max_template_parts: 1024,
            max_text_bytes: 1 << 20,
            max_running_requests: 1024,
        }
    }
}

/// What is logged, and how.
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

/// A setting that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read, a key is unknown or a value has the wrong type.
    #[error("configuration: {0}")]
    Read(#[from] config::ConfigError),
    /// A value is out of range.
    #[error("configuration: {key} is {value}, must be {wanted}")]
    Range {
        /// The key.
        key: &'static str,
        /// Its value.
        value: String,
        /// What would be right.
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
            builder = builder.add_source(File::from(path).format(FileFormat::Toml));
        }
        let variables = Environment::with_prefix("DENOISED")
            .prefix_separator("__")
            .separator("__")
            .try_parsing(true)
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
        let at_least_one: [(&'static str, u64); 9] = [
            (
                "server.max_concurrent_streams",
                self.server.max_concurrent_streams.into(),
            ),
            ("server.max_message_bytes", self.server.max_message_bytes as u64),
            ("engine.batch_tokens", self.engine.batch_tokens as u64),
            ("engine.max_queued_rows", self.engine.max_queued_rows),
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
        ] {
            if value > 1024 || (key == "engine.workers" && value == 0) {
                return Err(ConfigError::Range {
                    key,
                    value: value.to_string(),
                    wanted: "1 to 1024",
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

fn empty_is_none<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: From<String>,
{
    let text = String::deserialize(deserializer)?;
    Ok((!text.is_empty()).then(|| text.into()))
}

fn device<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Device, D::Error> {
    String::deserialize(deserializer)?
        .parse()
        .map_err(serde::de::Error::custom)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn load(toml: &str, environment: &[(&str, &str)], flags: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("denoised.toml");
        std::fs::write(&path, toml).unwrap();
        let environment = environment
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        let flags: Vec<_> = flags.iter().map(|(k, v)| (*k, (*v).to_owned())).collect();
        Config::load_from(Some(&path), Some(environment), &flags)
    }

    #[test]
    fn flags_beat_the_environment_beats_the_file_beats_defaults() {
        let file = "[engine]\nworkers = 2\nbatch_tokens = 7\n[server]\nlisten = \"127.0.0.1:1\"";
        let environment = [
            ("DENOISED__ENGINE__WORKERS", "3"),
            ("DENOISED__SERVER__LISTEN", "127.0.0.1:2"),
        ];
        let config = load(file, &environment, &[("server.listen", "127.0.0.1:3")]).unwrap();
        assert_eq!(config.engine.batch_tokens, 7);
        assert_eq!(config.engine.workers, 3);
        assert_eq!(config.server.listen.port(), 3);
        assert_eq!(config.limits, LimitsConfig::default());
    }

    #[test]
    fn mistakes_are_named() {
        for (toml, says) in [
            ("[engine]\nworker = 2", "worker"),
            ("[engine]\nworkers = 0", "engine.workers"),
            ("[engine]\nworkers = \"many\"", "workers"),
            ("[engine]\ndevice = \"tpu\"", "tpu"),
            ("[limits]\nmax_steps = 0", "limits.max_steps"),
            ("[server]\nlisten = \"everywhere\"", "listen"),
            ("[log]\nformat = \"xml\"", "xml"),
        ] {
            let error = load(toml, &[], &[]).unwrap_err().to_string();
            assert!(error.contains(says), "{toml}: {error}");
        }
    }

    const EXAMPLE: &str = include_str!("../deploy/denoised.example.toml");

    #[test]
    fn the_example_states_the_defaults() {
        assert_eq!(load(EXAMPLE, &[], &[]).unwrap(), Config::default());
    }

    /// Every field of the structs above appears in the example: Debug prints them all.
    #[test]
    fn the_example_documents_every_key() {
        let example: toml::Table = toml::from_str(EXAMPLE).unwrap();
        let documented: usize = example
            .values()
            .map(|section| section.as_table().unwrap().len())
            .sum();
        let fields = format!("{:?}", Config::default()).matches(": ").count() - example.len();
        assert_eq!(documented, fields);
        for (section, keys) in &example {
            for key in keys.as_table().unwrap().keys() {
                let variable = format!("DENOISED__{}__{}", section.to_uppercase(), key.to_uppercase());
                assert!(EXAMPLE.contains(&variable), "{variable} is not mentioned");
            }
        }
    }
}
