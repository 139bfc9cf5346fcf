//! A run's settings from its file, the environment and the command line.

use std::fs;
use std::path::{Component, Path, PathBuf};

use config::builder::DefaultState;
use config::{Config, ConfigBuilder, Environment, File, FileFormat, Map, ValueKind};

use super::RunConfig;
use super::error::{ConfigError, Invalid};

impl RunConfig {
    /// Reads and checks a run's file.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        Self::read_with(path, &[], None)
    }

    /// As [`RunConfig::read`], where `settings`, such as `optimizer.lr=1e-3`, replace what file and variables say.
    pub fn read_and_set(path: &Path, settings: &[String]) -> Result<Self, ConfigError> {
        Self::read_with(path, settings, None)
    }

    /// As [`RunConfig::read_and_set`], with `environment` in place of the process's variables.
    pub(super) fn read_with(
        path: &Path,
        settings: &[String],
        environment: Option<Map<String, String>>,
    ) -> Result<Self, ConfigError> {
        let settings = settings
            .iter()
            .map(|setting| toml_of(setting))
            .collect::<Result<Vec<_>, _>>()?;
        let unreadable = |path: &Path| {
            let path = path.to_owned();
            |source| ConfigError::Read { path, source }
        };
        let text = fs::read_to_string(path).map_err(unreadable(path))?;
        let folder = folder_of(path);
        let folder = fs::canonicalize(folder).map_err(unreadable(folder))?;
        // Values stay text until their key is known.
        let variables = Environment::with_prefix("TRAINING")
            .prefix_separator("__")
            .separator("__")
            .source(environment);
        let read = || -> Result<Self, Invalid> {
            let file = ConfigBuilder::<DefaultState>::default()
                .add_source(File::from_str(&text, FileFormat::Toml))
                .build()?;
            let paths = absolute_paths(&file, &folder)?;
            let config: Result<Self, config::ConfigError> = ConfigBuilder::<DefaultState>::default()
                .add_source(file)
                .add_source(paths)
                .add_source(variables)
                .add_source(
                    settings
                        .iter()
                        .map(|setting| File::from_str(setting, FileFormat::Toml))
                        .collect::<Vec<_>>(),
                )
                .build()?
                .try_deserialize();
            let config =
                config.map_err(|error| located(&text).map_or_else(|| error.into(), Invalid::Text))?;
            config.validate()?;
            Ok(config)
        };
        read().map_err(|source| ConfigError::NoRun {
            path: path.to_owned(),
            source: Box::new(source),
        })
    }
}

/// A setting, `section.key=value`, as a line of TOML. A value that is none of TOML's is text.
fn toml_of(setting: &str) -> Result<String, ConfigError> {
    let is_key =
        |key: &&str| key.contains('.') && key.chars().all(|c| c.is_ascii_alphanumeric() || "._".contains(c));
    let Some((key, value)) = setting.split_once('=').filter(|(key, _)| is_key(&key.trim())) else {
        return Err(ConfigError::Setting(setting.to_owned()));
    };
    let line = format!("{key} = {value}");
    Ok(match line.parse::<toml::Table>() {
        Ok(_) => line,
        Err(_) => format!("{key} = {}", toml::Value::from(value)),
    })
}

/// The folder that the file at `place` lies in.
fn folder_of(place: &Path) -> &Path {
    match place.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Where the relative paths of a `file` in `folder` lead.
fn absolute_paths(file: &Config, folder: &Path) -> Result<Config, config::ConfigError> {
    let mut paths = Config::builder();
    for key in [
        "data.train",
        "data.validation",
        "data.tokenizer",
        "run.directory",
        "run.mirror",
    ] {
        // What is missing or no text is told where it is read.
        let Ok(path) = file.get_string(key) else {
            continue;
        };
        if !path.contains("://") {
            let path = within(folder, Path::new(&path));
            // A name that is no UTF-8 stands as it was: only the working directory can have brought it in.
            if let Some(path) = path.to_str() {
                paths = paths.set_override(key, path)?;
            }
        }
    }
    if let Ok(mut parts) = file.get_array("data.mixture") {
        for part in &mut parts {
            if let ValueKind::Table(part) = &mut part.kind
                && let Some(tokens) = part.get_mut("tokens")
                && let ValueKind::String(path) = &mut tokens.kind
                && let Some(whole) = within(folder, Path::new(path)).to_str()
            {
                whole.clone_into(path);
            }
        }
        paths = paths.set_override("data.mixture", parts)?;
    }
    paths.build()
}

/// `path` from `folder` on, which leads through no link, without its dots.
pub(super) fn within(folder: &Path, path: &Path) -> PathBuf {
    let mut whole = PathBuf::new();
    for component in folder.join(path).components() {
        match component {
            Component::ParentDir => {
                whole.pop();
            }
            Component::CurDir => {}
            Component::Prefix(_) | Component::RootDir | Component::Normal(_) => whole.push(component),
        }
    }
    whole
}

/// What is wrong with a file's text, where it says what would be right; what it lacks, variables can have.
fn located(text: &str) -> Option<toml::de::Error> {
    let error = toml::from_str::<RunConfig>(text).err()?;
    (!error.message().starts_with("missing field")).then_some(error)
}
