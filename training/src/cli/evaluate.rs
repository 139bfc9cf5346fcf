//! `training evaluate`.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use clap::Args;
use denoised::bundle::{Bundle, TextTokenizer};
use serde_json::json;
use training::config::RunConfig;
use training::data::{Benchmark, Detokenizer};
use training::evaluate::bound::{Bound, Estimate, Served, Text};
use training::fit::checkpoint::Which;
use training::model::device::DeviceName;

use super::quality;
use super::run::Run;

/// Bounds the negative log-likelihood of text, of a run's held-out text unless other is given.
///
/// All numbers are upper bounds: the time integral of the score entropy, by Monte Carlo, plus what the
/// prior costs. The error is the standard error over documents where their ends are known, else over sequences.
///
/// With --samples, what the network writes is measured instead: how predictable a judge finds it, and how
/// varied it is. Predictable text of low entropy is collapsed, not good: read both beside held-out text's.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The run's file; its averaged weights are evaluated.
    #[arg(required_unless_present = "bundle", conflicts_with = "bundle")]
    config: Option<PathBuf>,
    /// Which checkpoint: last, best (by its validation bound), or the steps done.
    #[arg(long, value_name = "WHICH", default_value = "last", conflicts_with = "bundle")]
    checkpoint: Which,
    /// A bundle instead of a run, evaluated by ONNX Runtime as the server does.
    #[arg(long, value_name = "DIR")]
    bundle: Option<PathBuf>,
    /// Text files, a document each, instead of the run's held-out text.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    text: Vec<PathBuf>,
    /// Put the text of a benchmark, which has spaces around its signs, together again, as published bounds have it.
    #[arg(long, value_enum, value_name = "BENCHMARK", requires = "text")]
    detokenize: Option<Benchmark>,
    /// Times drawn for every sequence.
    #[arg(long, value_name = "N", default_value_t = 32)]
    draws: usize,
    #[command(flatten)]
    quality: quality::SampleArguments,
    /// Decides times and noise, and what is drawn.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Threads; no part of the result.
    #[arg(long, value_name = "N")]
    threads: Option<NonZeroUsize>,
    /// Where the bound is taken: `cpu`, or `cuda:N`.
    #[arg(long, value_name = "DEVICE", default_value_t, conflicts_with_all = ["samples", "written"])]
    device: DeviceName,
    /// Also measure a byte 4-gram and xz -9 on the same text, which `prepare` left beside the tokens.
    #[arg(long, conflicts_with_all = ["text", "bundle"])]
    baselines: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    ensure!(arguments.draws > 0, "--draws must be at least 1");
    let threads = arguments
        .threads
        .or_else(|| thread::available_parallelism().ok())
        .map_or(1, NonZeroUsize::get);
    // On a GPU one after the other: they would share it.
    let threads = if arguments.device == DeviceName::Cpu {
        threads
    } else {
        1
    };
    let (samples, written) = (arguments.quality.samples, arguments.quality.written.as_deref());
    if samples.is_some() || written.is_some() {
        let asked = quality::Asked {
            config: arguments.config.as_deref(),
            checkpoint: arguments.checkpoint,
            bundle: arguments.bundle.as_deref(),
            documents: match arguments.text.as_slice() {
                [] => None,
                _ => Some(arguments.documents()?),
            },
            seed: arguments.seed,
            threads,
            json: arguments.json,
        };
        return match (samples, written, arguments.bundle.as_deref()) {
            (_, Some(file), Some(bundle)) => quality::written(&arguments.quality, file, bundle, asked),
            (Some(count), _, _) => quality::run(&arguments.quality, count, &asked),
            _ => Err(anyhow!("--written needs --bundle")),
        };
    }
    let mut baselines = None;
    let (bound, bytes_per_token) = match (&arguments.config, &arguments.bundle) {
        (Some(config), _) => {
            let run = Run::open(&RunConfig::read(config)?, arguments.checkpoint)?.on(arguments.device)?;
            if arguments.baselines {
                baselines = Some(run.baselines()?);
            }
            let text = if arguments.text.is_empty() {
                run.held_out()?
            } else {
                run.encode(&arguments.documents()?)?
            };
            ensure!(!text.sequences.is_empty(), too_short(run.network.config().length));
            let estimate = Estimate {
                objective: run.objective(),
                draws: arguments.draws,
                seed: arguments.seed,
                threads,
                end_of_document: run.end_of_document()?,
            };
            let Ok(bound) = estimate.bound(&|| Ok(&run.network), &text.sequences);
            (bound, text.bytes_per_token)
        }
        (None, Some(bundle)) => of_bundle(bundle, arguments, threads)?,
        (None, None) => return Err(anyhow!("neither a run nor --bundle is given")),
    };
    print(arguments, bound, bytes_per_token, baselines)
}

fn of_bundle(directory: &Path, arguments: &Arguments, threads: usize) -> Result<(Bound, f64)> {
    ensure!(!arguments.text.is_empty(), "--bundle needs --text or --samples");
    let bundle = Bundle::open(directory)?;
    let manifest = bundle.manifest();
    let tokenizer = tokenizer_of(&bundle, directory)?;
    let text = encode(&bundle, &tokenizer, &arguments.documents()?)?;
    ensure!(!text.sequences.is_empty(), too_short(manifest.max_length));
    let estimate = Estimate {
        objective: Served::objective(manifest),
        draws: arguments.draws,
        seed: arguments.seed,
        threads,
        end_of_document: manifest.end_of_document,
    };
    let bound = estimate.bound(&|| Served::load_on(&bundle, arguments.device), &text.sequences)?;
    Ok((bound, text.bytes_per_token))
}

/// The tokenizer of `bundle`, which lies in `directory`.
pub(super) fn tokenizer_of(bundle: &Bundle, directory: &Path) -> Result<TextTokenizer> {
    bundle
        .tokenizer()?
        .with_context(|| format!("{} has no tokenizer.json", directory.display()))
}

/// `documents` as sequences of a bundle's length.
pub(super) fn encode(bundle: &Bundle, tokenizer: &TextTokenizer, documents: &[String]) -> Result<Text> {
    let manifest = bundle.manifest();
    let text = Text::encode(documents, manifest.max_length, manifest.end_of_document, |text| {
        tokenizer.encode(text)
    })?;
    Ok(text)
}

fn too_short(length: usize) -> String {
    format!("the text is shorter than one sequence of {length} tokens")
}

impl Arguments {
    /// What `--text` names.
    fn documents(&self) -> Result<Vec<String>> {
        let detokenizer = self.detokenize.map(Detokenizer::new).transpose()?;
        let read = |path: &PathBuf| -> Result<String> {
            let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
            Ok(match &detokenizer {
                Some(detokenizer) => detokenizer.apply(&text),
                None => text,
            })
        };
        self.text.iter().map(read).collect()
    }
}

fn print(
    arguments: &Arguments,
    bound: Bound,
    bytes_per_token: f64,
    baselines: Option<serde_json::Value>,
) -> Result<()> {
    let [bits, error] = bound.bits_per_byte(bytes_per_token);
    if arguments.json {
        let mut object = json!({
            "bound_nats_per_token": bound.nats_per_token,
            "standard_error_nats_per_token": bound.standard_error,
            "bound_bits_per_token": bound.bits_per_token(),
            "bound_bits_per_byte": bits,
            "standard_error_bits_per_byte": error,
            "perplexity": bound.perplexity(),
            "bytes_per_token": bytes_per_token,
            "sequences": bound.sequences,
            "draws": bound.draws,
        });
        if let Some(baselines) = baselines {
            object["baselines"] = baselines;
        }
        println!("{}", serde_json::to_string(&object)?);
        return Ok(());
    }
    println!(
        "{bound}; {bits:.4} ± {error:.4} bits per byte; perplexity {:.2} ({} sequences, {} times each)",
        bound.perplexity(),
        bound.sequences,
        bound.draws
    );
    if let Some(baselines) = baselines {
        println!("{}", serde_json::to_string(&baselines)?);
    }
    Ok(())
}

impl Run {
    /// `documents` under the run's tokenizer.
    pub(super) fn encode(&self, documents: &[String]) -> Result<Text> {
        let path = &self.config.data.tokenizer;
        let tokenizer = self.tokenizer()?;
        let end = self.end_of_document()?;
        Text::encode(documents, self.network.config().length, end, |text| {
            let encoding = tokenizer
                .encode_fast(text, false)
                .map_err(|e| anyhow!("{}: {e}", path.display()))?;
            Ok(encoding.get_ids().to_vec())
        })
    }
}
