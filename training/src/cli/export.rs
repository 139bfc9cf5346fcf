//! `training export`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use denoised::bundle::{Bundle, Defaults, Manifest};
use denoised::diffusion::Token;
use training::config::RunConfig;
use training::data::TokenFile;
use training::export::{self, Measure, Options, Storage, TrainedModel};
use training::fit::checkpoint::Which;
use training::model::device::DeviceName;

use super::run::Run;
use super::target;

/// Writes the averaged weights of a checkpoint as a bundle.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The run's file.
    config: PathBuf,
    /// Which checkpoint: last, best (by its validation bound), or the steps done.
    #[arg(long, value_name = "WHICH", default_value = "last")]
    checkpoint: Which,
    /// Name to serve the model under.
    #[arg(long)]
    name: String,
    /// The bundle's folder, <repository>/<name>/<version>; must not exist.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// How to keep the weights: f16 halves the bundle, int8 is also faster on CPUs. What either costs is
    /// measured on held-out text and written into the manifest.
    #[arg(long, value_enum, default_value_t)]
    storage: Storage,
    /// How to sample where a request does not say, as JSON: any of sampler, steps, temperature, top_p, length, such as
    /// '{"sampler": "first-hitting", "temperature": 0.9}'.
    #[arg(long, value_name = "JSON", value_parser = defaults)]
    defaults: Option<Defaults>,
    /// Also bound the likelihood of the run's held-out text under the bundle, as `evaluate --baselines` does under the
    /// run, and write that into the manifest; with f16 and int8 beside the bound of the weights as they were.
    #[arg(long)]
    measure: bool,
    /// Where --measure runs the network: `cpu`, or `cuda:N`.
    #[arg(long, value_name = "DEVICE", default_value_t, requires = "measure")]
    device: DeviceName,
    /// Average the weights with those of another run (its file, directory or a checkpoint's folder), of a bundle or of a
    /// published checkpoint, each counting the same; may be given several times. Of networks that were trained on from
    /// each other the mean is often better than each ("model soups").
    #[arg(long, value_name = "PATH")]
    average_with: Vec<PathBuf>,
    /// What the model was trained on, for the bundle's provenance.
    #[arg(long, default_value = "")]
    corpus: String,
}

pub(crate) fn run(arguments: Arguments) -> Result<()> {
    let Arguments {
        config,
        checkpoint,
        name,
        out,
        storage,
        defaults,
        measure,
        device,
        average_with,
        corpus,
    } = arguments;
    target::check(&name, &out)?;
    let config = RunConfig::read(&config)?;
    let run = Run::open(&config, checkpoint)?
        .averaged_with(&average_with)?
        .on(device)?;
    let (_, tokenizer_json) = run.tokenizer_and_json()?;
    let text = match storage {
        Storage::F32 => Vec::new(),
        Storage::F16 | Storage::Int8 => held_out(&config, run.network.config().length)?,
    };
    let provenance = run.provenance(&corpus);
    let measures = |bundle: &Bundle| {
        run.measures(bundle, storage, device)
            .map_err(|error| format!("{error:#}"))
    };
    let options = Options {
        storage,
        defaults,
        text: &text,
        measure: measure.then_some(Measure(&measures)),
        ..Options::default()
    };
    let model = TrainedModel {
        name: &name,
        config: run.network.config(),
        weights: &run.network.state_dict(),
        graph: run.state.config.graph.kind,
        schedule: run.state.config.schedule,
        tokenizer: Some(&tokenizer_json),
        end_of_document: run.end_of_document()?,
        provenance,
    };
    let manifest = export::bundle_with(&out, model, &options)?;
    println!(
        "{}: {}, {} states, length {}, {storage}{}{}",
        out.display(),
        manifest.name,
        manifest.vocab_size,
        manifest.max_length,
        difference(&manifest),
        bound(&manifest)
    );
    Ok(())
}

fn defaults(json: &str) -> Result<Defaults, serde_json::Error> {
    serde_json::from_str(json)
}

/// A few sequences of the run's validation text, from all over it.
fn held_out(config: &RunConfig, length: usize) -> Result<Vec<Vec<Token>>> {
    const SEQUENCES: usize = 4;
    // Without it the cost is measured on random tokens, and said so.
    if !config.data.validation.exists() {
        return Ok(Vec::new());
    }
    Ok(TokenFile::open(&config.data.validation)?.spread(length, SEQUENCES))
}

/// What the storage costs, for people.
fn difference(manifest: &Manifest) -> String {
    let difference = &manifest.provenance["export"]["difference_from_f32"];
    let of = |key: &str| difference[key].as_f64();
    match (of("largest"), of("mean"), of("total_variation")) {
        (Some(largest), Some(mean), Some(variation)) => format!(
            "; log-scores differ from f32 by up to {largest:.2e}, {mean:.2e} on average, the law of a step by \
             {variation:.2e} (total variation)"
        ),
        _ => String::new(),
    }
}

/// How good the bundle is, for people.
fn bound(manifest: &Manifest) -> String {
    let validation = &manifest.provenance["validation"];
    let of = |key: &str| validation[key].as_f64();
    let (Some(bits), Some(error)) = (of("bound_bits_per_byte"), of("standard_error_bits_per_byte")) else {
        return String::new();
    };
    let float32 = of("bound_bits_per_byte_of_f32").map(|float32| {
        format!(
            ", {:+.3} % beside f32's {float32:.4}",
            100.0 * (bits / float32 - 1.0)
        )
    });
    format!(
        "; held-out text {bits:.4} ± {error:.4} bits per byte{}",
        float32.unwrap_or_default()
    )
}
