//! `manifest.json`: everything the server must know about a network that the network cannot tell.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::brief;
use crate::diffusion::sampler::choice::MAX_TEMPERATURE;
use crate::diffusion::{Graph, GraphKind, Parameterization, Process, SamplerKind, Schedule, Token};

/// The format this program writes and reads.
pub const FORMAT: u32 = 1;
/// Bounds that keep a malformed manifest from asking for absurd allocations.
const MAX_STATES: usize = 1 << 22;
const MAX_LENGTH: usize = 1 << 20;
const MAX_FRAME: usize = 64;

/// How a model is sampled where a request does not say; whatever is absent here is the server's to choose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Defaults {
    /// The sampler, with its option: `"tweedie"`, `{"remask": {"rate": 0.02}}`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sampler: Option<SamplerKind>,
    /// Denoising steps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub steps: Option<u32>,
    /// As in `TokenChoice`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f64>,
    /// As in `TokenChoice`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f64>,
    /// Positions of a canvas, prompt included.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub length: Option<usize>,
}

/// Tokens that stand clamped before and after every canvas, such as `[CLS]` and `[SEP]`. They are no part of it: the
/// network alone sees them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Frame {
    /// Before it.
    pub before: Vec<Token>,
    /// After it.
    pub after: Vec<Token>,
}

impl Frame {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.before.is_empty() && self.after.is_empty()
    }
}

impl Defaults {
    fn check(&self, manifest: &Manifest) -> Result<(), String> {
        let option_fits = self.sampler.is_none_or(SamplerKind::option_fits);
        let normalizes = self.sampler.is_some_and(SamplerKind::normalizes);
        if !option_fits || (normalizes && manifest.graph != GraphKind::Absorbing) {
            return Err(format!(
                "defaults.sampler is {:?}, which is not for this model",
                self.sampler
            ));
        }
        if self.steps == Some(0) {
            return Err("defaults.steps is 0, must be at least 1".to_owned());
        }
        if let Some(t) = self.temperature.filter(|t| !(0.0..=MAX_TEMPERATURE).contains(t)) {
            return Err(format!(
                "defaults.temperature is {t}, must be 0 to {MAX_TEMPERATURE}"
            ));
        }
        if let Some(p) = self.top_p.filter(|p| !(*p > 0.0 && *p <= 1.0)) {
            return Err(format!("defaults.top_p is {p}, must be above 0 and at most 1"));
        }
        if let Some(length) = self
            .length
            .filter(|length| !(1..=manifest.max_length).contains(length))
        {
            return Err(format!(
                "defaults.length is {length}, must be 1 to {} (max_length)",
                manifest.max_length
            ));
        }
        Ok(())
    }
}

/// A bundle's manifest. Unknown keys are ignored, unknown values refused.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: u32,
    /// Name of the model, `[a-z0-9._-]`, starting with a letter or digit.
    pub name: String,
    /// The noise process.
    pub graph: GraphKind,
    /// The noise schedule the network was trained with.
    pub schedule: Schedule,
    /// Meaning of the network's output.
    pub parameterization: Parameterization,
    /// Whether `-ln(e^sigma - 1) - ln(vocab_size - 1)` is to be added to the network's output.
    #[serde(default)]
    pub sigma_offset: bool,
    /// Number of states V, the mask included.
    pub vocab_size: usize,
    /// The mask, on absorbing graphs: any id below `vocab_size`, which is the last where the server's own trainer made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask_token: Option<Token>,
    /// Tokens that are never drawn, on absorbing graphs: padding, marks of a frame. Requests may clamp them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub excluded_tokens: Vec<Token>,
    /// Tokens that the network sees around every canvas.
    #[serde(default, skip_serializing_if = "Frame::is_empty")]
    pub frame: Frame,
    /// The token that ends a document; text after it is not part of an answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_of_document: Option<Token>,
    /// Longest canvas, in tokens; its frame comes on top.
    pub max_length: usize,
    /// Whether the network takes `sigma`.
    pub time_conditioned: bool,
    /// The network comes in two parts; not served yet, so `true` is refused.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub two_stage: bool,
    /// How to sample where a request does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub defaults: Option<Defaults>,
    /// sha256 of every file of the bundle but this one, in lower-case hexadecimal.
    pub sha256: BTreeMap<String, String>,
    /// Origin of the network: training, text and quality, for people.
    #[serde(default)]
    pub provenance: serde_json::Value,
}

impl Manifest {
    /// Reads and checks a manifest; the error says what is wrong.
    pub fn from_json(bytes: &[u8]) -> Result<Self, String> {
        let manifest: Self = serde_json::from_slice(bytes).map_err(brief)?;
        manifest.check().map_err(brief)?;
        Ok(manifest)
    }

    /// Says what is wrong with the values, if anything is.
    pub fn check(&self) -> Result<(), String> {
        let wrong = |message: String| -> Result<(), String> { Err(message) };
        if self.format != FORMAT {
            return wrong(format!("format is {}, this program reads {FORMAT}", self.format));
        }
        if !is_name(&self.name) {
            return wrong(format!(
                "name {:?} must be of a-z, 0-9, '.', '_' and '-'",
                self.name
            ));
        }
        self.schedule.check()?;
        if !(2..=MAX_STATES).contains(&self.vocab_size) {
            return wrong(format!(
                "vocab_size is {}, allowed are 2 to {MAX_STATES}",
                self.vocab_size
            ));
        }
        if !(1..=MAX_LENGTH).contains(&self.max_length) {
            return wrong(format!(
                "max_length is {}, allowed are 1 to {MAX_LENGTH}",
                self.max_length
            ));
        }
        self.check_tokens()?;
        if self
            .end_of_document
            .is_some_and(|token| token as usize >= self.vocab_size)
        {
            return wrong("end_of_document must be below vocab_size".to_owned());
        }
        if self.graph == GraphKind::Uniform && self.parameterization == Parameterization::Mean {
            return wrong("parameterization \"mean\" needs an absorbing graph".to_owned());
        }
        if self.graph == GraphKind::Uniform && self.sigma_offset {
            return wrong("sigma_offset needs an absorbing graph".to_owned());
        }
        if self.parameterization == Parameterization::Mean && self.sigma_offset {
            return wrong("sigma_offset belongs to parameterization \"score\"".to_owned());
        }
        self.check_defaults()?;
        if self.two_stage {
            return wrong("two_stage networks are not served by this version".to_owned());
        }
        if !self.sha256.contains_key(super::MODEL) {
            return wrong(format!("sha256 does not list {}", super::MODEL));
        }
        match self.sha256.keys().find(|file| !is_file_name(file)) {
            Some(file) => wrong(format!("sha256 lists {file:?}, which is not a plain file name")),
            None => Ok(()),
        }
    }

    fn check_tokens(&self) -> Result<(), String> {
        let states = self.vocab_size;
        match (self.graph, self.mask_token) {
            (GraphKind::Absorbing, None) => {
                return Err("mask_token is absent, an absorbing graph has one".to_owned());
            }
            (GraphKind::Absorbing, Some(mask)) if mask as usize >= states => {
                return Err(format!(
                    "mask_token is {mask}, must be below vocab_size ({states})"
                ));
            }
            (GraphKind::Uniform, Some(mask)) => {
                return Err(format!("mask_token is {mask}, a uniform graph has none"));
            }
            (GraphKind::Absorbing, Some(_)) | (GraphKind::Uniform, None) => {}
        }
        let excluded = &self.excluded_tokens;
        let is_ordinary = |token: &Token| (*token as usize) < states && Some(*token) != self.mask_token;
        if let Some(token) = excluded.iter().find(|token| !is_ordinary(token)) {
            return Err(format!(
                "excluded_tokens holds {token}, must be below vocab_size and not the mask"
            ));
        }
        let distinct: BTreeSet<Token> = excluded.iter().copied().collect();
        if distinct.len() != excluded.len() {
            return Err("excluded_tokens holds a token twice".to_owned());
        }
        if !excluded.is_empty() && self.graph == GraphKind::Uniform {
            return Err("excluded_tokens needs an absorbing graph".to_owned());
        }
        if distinct.len() + 1 >= states {
            return Err("excluded_tokens leaves no token to draw".to_owned());
        }
        let frame = || self.frame.before.iter().chain(&self.frame.after);
        if let Some(token) = frame().find(|token| !is_ordinary(token)) {
            return Err(format!(
                "frame holds {token}, must be below vocab_size and not the mask"
            ));
        }
        if frame().count() > MAX_FRAME {
            return Err(format!("frame has more than {MAX_FRAME} tokens"));
        }
        Ok(())
    }

    /// Says what is wrong with the defaults, if anything is.
    pub fn check_defaults(&self) -> Result<(), String> {
        self.defaults.map_or(Ok(()), |defaults| defaults.check(self))
    }

    /// The noise process over this vocabulary.
    pub fn graph(&self) -> Graph {
        let graph = Graph::new(self.graph, self.vocab_size);
        self.mask_token.map_or(graph, |mask| graph.with_mask(mask))
    }

    /// The noise process.
    pub fn process(&self) -> Process {
        Process {
            graph: self.graph(),
            schedule: self.schedule,
        }
    }
}

/// Whether `name` can name a model: safe in paths, URLs and metrics.
pub fn is_name(name: &str) -> bool {
    name.len() <= 128
        && name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "._-".contains(c))
}

/// A name without directories, so that no entry can point out of its bundle.
fn is_file_name(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with('.')
        && !name.contains(['/', '\\', '\0', ':'])
        && name != super::MANIFEST
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn tiny() -> Manifest {
        Manifest {
            format: FORMAT,
            name: "tiny".to_owned(),
            graph: GraphKind::Absorbing,
            schedule: Schedule::LogLinear { eps: 1e-3 },
            parameterization: Parameterization::Score,
            sigma_offset: true,
            vocab_size: 9,
            mask_token: Some(8),
            excluded_tokens: Vec::new(),
            frame: Frame::default(),
            end_of_document: None,
            max_length: 16,
            time_conditioned: true,
            two_stage: false,
            defaults: Some(Defaults {
                sampler: Some(SamplerKind::EntropyBounded { bound: 0.5 }),
                steps: Some(32),
                temperature: Some(0.8),
                top_p: Some(0.95),
                length: Some(12),
            }),
            sha256: BTreeMap::from([(super::super::MODEL.to_owned(), String::new())]),
            provenance: serde_json::Value::Null,
        }
    }

    #[test]
    fn round_trip_and_unknown_keys() {
        let mut json = serde_json::to_value(tiny()).unwrap();
        json["a_key_of_tomorrow"] = 1.into();
        assert_eq!(Manifest::from_json(json.to_string().as_bytes()).unwrap(), tiny());
    }

    #[test]
    fn unknown_and_impossible_values_are_refused() {
        for (key, value, names) in [
            ("format", serde_json::json!(2), "format"),
            ("graph", "cyclic".into(), "cyclic"),
            ("parameterization", "epsilon".into(), "epsilon"),
            ("schedule", serde_json::json!({"type": "cosine"}), "cosine"),
            (
                "schedule",
                serde_json::json!({"type": "loglinear", "eps": 2.0}),
                "eps",
            ),
            ("name", "../up".into(), "name"),
            ("vocab_size", 1.into(), "vocab_size"),
            ("max_length", 0.into(), "max_length"),
            ("mask_token", 9.into(), "mask_token"),
            ("mask_token", serde_json::Value::Null, "mask_token"),
            ("excluded_tokens", serde_json::json!([9]), "excluded_tokens"),
            ("excluded_tokens", serde_json::json!([8]), "excluded_tokens"),
            ("excluded_tokens", serde_json::json!([1, 2, 1]), "excluded_tokens"),
            (
                "excluded_tokens",
                serde_json::json!([0, 1, 2, 3, 4, 5, 6, 7]),
                "excluded_tokens",
            ),
            ("frame", serde_json::json!({"before": [9]}), "frame"),
            ("frame", serde_json::json!({"after": [8]}), "frame"),
            ("frame", serde_json::json!({"around": [1]}), "around"),
            ("frame", serde_json::json!({"after": vec![1; 65]}), "frame"),
            ("end_of_document", 9.into(), "end_of_document"),
            ("two_stage", true.into(), "two_stage"),
            ("defaults", serde_json::json!({"sampler": "guessing"}), "guessing"),
            (
                "defaults",
                serde_json::json!({"sampler": {"remask": {"rate": 2.0}}}),
                "defaults.sampler",
            ),
            ("defaults", serde_json::json!({"steps": 0}), "defaults.steps"),
            (
                "defaults",
                serde_json::json!({"temperature": -1.0}),
                "defaults.temperature",
            ),
            ("defaults", serde_json::json!({"top_p": 0.0}), "defaults.top_p"),
            ("defaults", serde_json::json!({"length": 17}), "defaults.length"),
            ("defaults", serde_json::json!({"step": 3}), "step"),
            ("sha256", serde_json::json!({}), "model.onnx"),
            (
                "sha256",
                serde_json::json!({"model.onnx": "", "../../etc/passwd": ""}),
                "plain file name",
            ),
        ] {
            let mut json = serde_json::to_value(tiny()).unwrap();
            json[key] = value;
            let error = Manifest::from_json(json.to_string().as_bytes()).unwrap_err();
            assert!(error.contains(names), "{key}: {error}");
        }
    }
}
