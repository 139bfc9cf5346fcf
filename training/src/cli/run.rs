//! What `fit` left behind, for the commands that come after it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use burn::module::Module;
use denoised::bundle::Bundle;
use denoised::diffusion::Token;
use serde_json::json;
use tokenizers::Tokenizer;
use training::config::RunConfig;
use training::data::TokenFile;
use training::data::tokenizer::END_OF_DOCUMENT;
use training::evaluate::baseline;
use training::evaluate::bound::{Estimate, Served, Text};
use training::export::{self, Storage};
use training::fit::checkpoint::{self, State, Which};
use training::fit::{record, step};
use training::loss::Objective;
use training::model::Ddit;
use training::model::device::{DeviceName, Devices};

use super::weights;

/// A checkpoint of a run, with its averaged weights.
pub(super) struct Run {
    pub(super) config: RunConfig,
    pub(super) network: Ddit,
    pub(super) state: State,
    /// How many others its weights are averaged with.
    averaged_with: usize,
}

impl Run {
    pub(super) fn open(config: &RunConfig, which: Which) -> Result<Self> {
        let folder = which.folder(&config.run.directory)?;
        let (network, state) = checkpoint::load_average(&folder)?;
        let mut differs = state.config.changes(config)?;
        differs.retain(|change| matters(change));
        ensure!(
            differs.is_empty(),
            "{} was trained otherwise than the run's file says now: {}",
            folder.display(),
            differs.join("; ")
        );
        Ok(Self {
            config: config.clone(),
            network,
            state,
            averaged_with: 0,
        })
    }

    /// The same with its network on `device`.
    pub(super) fn on(mut self, device: DeviceName) -> Result<Self> {
        if device != DeviceName::Cpu {
            let devices = Devices::open(&[device], 1)?;
            self.network = self.network.fork(&devices.inference());
            // One after the other: they would share the device.
            self.config.run.threads = 1;
        }
        Ok(self)
    }

    /// The same with the mean of its weights and those in other places, each counting the same.
    pub(super) fn averaged_with(mut self, places: &[PathBuf]) -> Result<Self> {
        if places.is_empty() {
            return Ok(self);
        }
        let shape = *self.network.config();
        let mut all = vec![self.network.state_dict()];
        for place in places {
            let other = weights::beginning(place, shape.cond_dim)?;
            other.check(&shape, &self.state.tokenizer_sha256)?;
            all.push(other.weights);
        }
        let mean = export::average::mean(&shape, &all.iter().collect::<Vec<_>>())?;
        self.network = self.network.load_state_dict(&mean)?;
        self.averaged_with = places.len();
        Ok(self)
    }

    /// What its weights were trained to bring down.
    pub(super) fn objective(&self) -> Objective {
        step::objective(&self.state.config, self.network.config())
    }

    /// Its tokenizer.
    pub(super) fn tokenizer(&self) -> Result<Tokenizer> {
        Ok(self.tokenizer_and_json()?.0)
    }

    pub(super) fn tokenizer_and_json(&self) -> Result<(Tokenizer, Vec<u8>)> {
        let path = &self.config.data.tokenizer;
        let json = std::fs::read(path).with_context(|| path.display().to_string())?;
        ensure!(
            denoised::bundle::sha256(&json) == self.state.tokenizer_sha256,
            "data.tokenizer {} is not the one that the run was trained with",
            path.display()
        );
        let tokenizer = Tokenizer::from_bytes(&json).map_err(|e| anyhow!("{}: {e}", path.display()))?;
        Ok((tokenizer, json))
    }

    /// The token that ends its documents, if any does.
    pub(super) fn end_of_document(&self) -> Result<Option<Token>> {
        match self.state.end_of_document {
            Some(end) => Ok(Some(end)),
            None => Ok(self.tokenizer()?.token_to_id(END_OF_DOCUMENT)),
        }
    }

    /// The held-out text.
    pub(super) fn held_out(&self) -> Result<Text> {
        let length = self.network.config().length;
        let file = TokenFile::open(&self.config.data.validation)?;
        let (tokenizer, json) = self.tokenizer_and_json()?;
        file.check_tokenizer(&self.config.data.tokenizer, &json)?;
        let count = file.sequences(length);
        let bytes = file.bytes_of_first(count * length, &tokenizer)?;
        Ok(Text {
            sequences: (0..count).map(|index| file.sequence(index, length)).collect(),
            bytes_per_token: bytes as f64 / (count * length) as f64,
        })
    }

    /// What simple models make of the same held-out text.
    pub(super) fn baselines(&self) -> Result<serde_json::Value> {
        let text = |tokens: &Path| -> Result<Vec<u8>> {
            let path = tokens.with_extension("txt");
            let text = std::fs::read(&path).with_context(|| path.display().to_string())?;
            ensure!(
                TokenFile::open(tokens)?.bytes() == text.len() as u64,
                "{} is not the text of {}; `training prepare` writes both",
                path.display(),
                tokens.display()
            );
            Ok(text)
        };
        let (train, validation) = (
            text(&self.config.data.train)?,
            text(&self.config.data.validation)?,
        );
        Ok(json!({
            "byte_4_gram_bits_per_byte": baseline::four_gram_bits_per_byte(&train, &validation),
            "xz_9_bits_per_byte": baseline::xz_bits_per_byte(&validation),
        }))
    }

    /// Where the weights come from, for the bundle; paths of this machine are nobody's business.
    pub(super) fn provenance(&self, corpus: &str) -> serde_json::Value {
        let mut config = self.state.config.clone();
        let (data, run) = (&mut config.data, &mut config.run);
        for path in [
            &mut data.train,
            &mut data.validation,
            &mut data.tokenizer,
            &mut run.directory,
        ]
        .into_iter()
        .chain(data.mixture.iter_mut().map(|part| &mut part.tokens))
        {
            *path = path.file_name().unwrap_or_default().into();
        }
        run.mirror = None;
        let made = record::read_provenance(&self.config.run.directory);
        json!({
            "trained_by": format!("denoised training {}", env!("CARGO_PKG_VERSION")),
            "corpus": corpus,
            "train_tokens_sha256": made.map(|made| made.train.sha256),
            "steps": self.state.step,
            "minutes": self.state.seconds / 60.0,
            "averaged_with": self.averaged_with,
            "config": config,
        })
    }

    /// How good a bundle of the weights is on held-out text, run by ONNX Runtime as the server does. Where its weights
    /// are kept in fewer bits, `bound_bits_per_byte_of_f32` is the bound of those here, with the same noise.
    pub(super) fn measures(
        &self,
        bundle: &Bundle,
        storage: Storage,
        device: DeviceName,
    ) -> Result<serde_json::Value> {
        let text = self.held_out()?;
        ensure!(
            !text.sequences.is_empty(),
            "{} has no whole sequence to measure on",
            self.config.data.validation.display()
        );
        let run = &self.config.run;
        let estimate = Estimate {
            objective: self.objective(),
            draws: 32,
            seed: run.seed,
            threads: run.threads,
            end_of_document: self.end_of_document()?,
        };
        let bound = estimate.bound(&|| Served::load_on(bundle, device), &text.sequences)?;
        let [bits, error] = bound.bits_per_byte(text.bytes_per_token);
        let mut measures = json!({
            "bound_nats_per_token": bound.nats_per_token,
            "standard_error_nats_per_token": bound.standard_error,
            "bound_bits_per_byte": bits,
            "standard_error_bits_per_byte": error,
            "sequences": bound.sequences,
            "baselines": self.baselines()?,
        });
        if storage != Storage::F32 {
            let Ok(bound) = estimate.bound(&|| Ok(&self.network), &text.sequences);
            measures["bound_bits_per_byte_of_f32"] = json!(bound.bits_per_byte(text.bytes_per_token)[0]);
        }
        Ok(measures)
    }
}

/// Whether a change of settings makes the weights another network's, or their scores another process's.
fn matters(change: &str) -> bool {
    let is_of = |section: &str| change.starts_with(section);
    ["graph", "schedule", "network"].into_iter().any(is_of)
        // Of the training alone.
        && !["network.dropout:", "network.initial_gate:"].into_iter().any(is_of)
}
