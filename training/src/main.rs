//! The `training` binary: from text to a bundle that the server picks up.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use clap::{Args, Parser, Subcommand};
use serde_json::json;
use tokenizers::Tokenizer;
use training::config::RunConfig;
use training::data::{Corpus, TokenFile};
use training::evaluate::{Bound, bound};
use training::export::{self, Storage, TrainedModel};
use training::fit::{FitOptions, fit};
use training::{baseline, checkpoint, data, tokenizer, trainer};

/// Trains score-based discrete diffusion language models and exports them for the server.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Learns a byte-level BPE tokenizer from the documents to train on.
    Tokenizer {
        #[command(flatten)]
        corpus: CorpusArguments,
        /// Tokens to learn, the end of a document included; at least 257.
        #[arg(long, value_name = "N")]
        vocab_size: usize,
        /// Where to write tokenizer.json.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// Packs documents into train.tokens and validation.tokens.
    Prepare {
        #[command(flatten)]
        corpus: CorpusArguments,
        /// tokenizer.json.
        #[arg(long, value_name = "FILE")]
        tokenizer: PathBuf,
        /// Folder for the token files and the texts they encode.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
    },
    /// Trains a network as a run's TOML file says.
    Fit {
        /// The run's file, such as training/configs/demo.toml.
        config: PathBuf,
        /// Go on from the latest checkpoint in the run's directory.
        #[arg(long)]
        resume: bool,
        /// Complete the schedule within this wall-clock time, in fewer steps if need be.
        #[arg(long, value_name = "MINUTES")]
        until_minutes: Option<f64>,
    },
    /// Bounds the negative log-likelihood of the run's held-out text.
    Evaluate {
        /// The run's file.
        config: PathBuf,
        /// Times drawn for every sequence.
        #[arg(long, value_name = "N", default_value_t = 32)]
        draws: usize,
        /// Also measure a byte 4-gram and xz -9 on the same text, which `prepare` left beside the tokens.
        #[arg(long)]
        baselines: bool,
    },
    /// Writes the averaged weights of the latest checkpoint as a bundle.
    Export {
        /// The run's file.
        config: PathBuf,
        /// Name to serve the model under.
        #[arg(long)]
        name: String,
        /// The bundle's folder, <repository>/<name>/<version>; must not exist.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Keep matrices as float16: half the size, rounded to 11 bits.
        #[arg(long)]
        half: bool,
        /// What the model was trained on, for the bundle's provenance.
        #[arg(long, default_value = "")]
        corpus: String,
    },
}

/// Which documents there are, and which are held out. `tokenizer` and `prepare` must be given the same.
#[derive(Debug, Args)]
struct CorpusArguments {
    /// Text files.
    #[arg(required = true, value_name = "FILE")]
    input: Vec<PathBuf>,
    /// What separates documents within a file; without, a file is one document.
    #[arg(long, value_name = "TEXT")]
    separator: Option<String>,
    /// Share of the documents that is held out.
    #[arg(long, value_name = "X", default_value_t = 0.05)]
    validation_fraction: f64,
    /// Chooses which documents those are.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

impl From<CorpusArguments> for Corpus {
    fn from(arguments: CorpusArguments) -> Self {
        let CorpusArguments {
            input,
            separator,
            validation_fraction,
            seed,
        } = arguments;
        Self {
            input,
            separator,
            validation_fraction,
            seed,
        }
    }
}

fn main() -> Result<()> {
    match Arguments::parse().command {
        Command::Tokenizer {
            corpus,
            vocab_size,
            out,
        } => {
            let documents = Corpus::from(corpus).read()?;
            if let Some(folder) = out.parent() {
                std::fs::create_dir_all(folder).with_context(|| folder.display().to_string())?;
            }
            let tokenizer = tokenizer::train(&documents.train, vocab_size)?;
            tokenizer
                .save(&out, true)
                .map_err(|e| anyhow!("{}: {e}", out.display()))?;
            println!("{}: {} tokens", out.display(), tokenizer.get_vocab_size(true));
        }
        Command::Prepare {
            corpus,
            tokenizer,
            out,
        } => {
            let (train, validation) = data::prepare(&corpus.into(), &tokenizer, &out)?;
            for (name, file) in [("train", &train), ("validation", &validation)] {
                let ratio = file.bytes() as f64 / file.tokens().max(1) as f64;
                println!(
                    "{name}: {} tokens, {} bytes, {ratio:.3} bytes per token",
                    file.tokens(),
                    file.bytes()
                );
            }
        }
        Command::Fit {
            config,
            resume,
            until_minutes,
        } => {
            let state = fit(
                RunConfig::read(&config)?,
                FitOptions {
                    resume,
                    minutes: until_minutes,
                },
            )?;
            println!("{} steps in {:.1} minutes", state.step, state.seconds / 60.0);
        }
        Command::Evaluate {
            config,
            draws,
            baselines,
        } => {
            let run = Run::latest(&RunConfig::read(&config)?)?;
            let (bound, bytes_per_token) = run.evaluate(draws)?;
            let [bits, error] = bound.bits_per_byte(bytes_per_token);
            println!(
                "{bound}; {bits:.4} ± {error:.4} bits per byte ({} sequences, {draws} times each)",
                bound.sequences
            );
            if baselines {
                println!("{}", serde_json::to_string(&run.baselines()?)?);
            }
        }
        Command::Export {
            config,
            name,
            out,
            half,
            corpus,
        } => {
            let config = RunConfig::read(&config)?;
            let run = Run::latest(&config)?;
            let storage = if half { Storage::F16 } else { Storage::F32 };
            let tokenizer = std::fs::read(&config.data.tokenizer)
                .with_context(|| config.data.tokenizer.display().to_string())?;
            let model = TrainedModel {
                name: &name,
                config: run.network.config(),
                weights: &run.network.state_dict(),
                graph: config.graph.kind,
                schedule: config.schedule,
                tokenizer: Some(&tokenizer),
                provenance: run.provenance(&corpus)?,
            };
            let manifest = export::bundle(&out, model, storage)?;
            println!(
                "{}: {}, {} states, length {}",
                out.display(),
                manifest.name,
                manifest.vocab_size,
                manifest.max_length
            );
        }
    }
    Ok(())
}

/// The latest checkpoint of a run, with its averaged weights.
struct Run {
    config: RunConfig,
    network: training::network::Ddit,
    state: checkpoint::State,
}

impl Run {
    fn latest(config: &RunConfig) -> Result<Self> {
        let (network, state) = checkpoint::load_average(&checkpoint::latest(&config.run.directory)?)?;
        Ok(Self {
            config: config.clone(),
            network,
            state,
        })
    }

    /// The bound on held-out text, and the bytes of a token there.
    fn evaluate(&self, draws: usize) -> Result<(Bound, f64)> {
        let shape = self.network.config();
        let file = TokenFile::open(&self.config.data.validation)?;
        let tokenizer = Tokenizer::from_file(&self.config.data.tokenizer)
            .map_err(|e| anyhow!("{}: {e}", self.config.data.tokenizer.display()))?;
        let count = file.sequences(shape.length);
        let sequences: Vec<_> = (0..count)
            .map(|index| file.sequence(index, shape.length))
            .collect();
        let bytes = file.bytes_of_first(count * shape.length, &tokenizer)?;
        let objective = trainer::objective(&self.config, shape);
        let bound = bound(
            &self.network,
            &objective,
            &sequences,
            draws,
            self.config.run.seed,
            self.config.run.threads,
        );
        Ok((bound, bytes as f64 / (count * shape.length) as f64))
    }

    /// What simple models make of the same held-out text.
    fn baselines(&self) -> Result<serde_json::Value> {
        let text = |path: &Path| {
            let path = path.with_extension("txt");
            std::fs::read(&path).with_context(|| path.display().to_string())
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

    /// Where the weights come from and how good they are, for the bundle.
    fn provenance(&self, corpus: &str) -> Result<serde_json::Value> {
        let (bound, bytes_per_token) = self.evaluate(32)?;
        let [bits, error] = bound.bits_per_byte(bytes_per_token);
        let train = std::fs::read(&self.config.data.train)
            .with_context(|| self.config.data.train.display().to_string())?;
        Ok(json!({
            "trained_by": format!("denoised training {}", env!("CARGO_PKG_VERSION")),
            "corpus": corpus,
            "train_tokens_sha256": denoised::bundle::sha256(&train),
            "steps": self.state.step,
            "minutes": self.state.seconds / 60.0,
            "config": self.config,
            "validation": {
                "bound_nats_per_token": bound.nats_per_token,
                "standard_error_nats_per_token": bound.standard_error,
                "bound_bits_per_byte": bits,
                "standard_error_bits_per_byte": error,
                "sequences": bound.sequences,
                "baselines": self.baselines()?,
            },
        }))
    }
}
