//! `training import`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use serde_json::json;
use training::export::{self, Storage, TrainedModel};
use training::import::{self, Choice};

use super::target;

/// Turns a checkpoint of SEDD, RADD or MDLM into a bundle.
///
/// Reads what `save_pretrained` wrote (config.json with model.safetensors or pytorch_model.bin) and, of SEDD and RADD,
/// the folder of a training run (.hydra/config.yaml with checkpoints-meta/checkpoint.pth).
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The checkpoint's folder.
    #[arg(value_name = "DIR")]
    checkpoint: PathBuf,
    /// The bundle's folder, <repository>/<name>/<version>; must not exist.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Name to serve the model under; without, the name of the folder above the version.
    #[arg(long)]
    name: Option<String>,
    /// tokenizer.json; without, the one in the checkpoint's folder. Published models use GPT-2's:
    /// <https://huggingface.co/openai-community/gpt2/resolve/main/tokenizer.json>.
    #[arg(long, value_name = "FILE")]
    tokenizer: Option<PathBuf>,
    /// Which weights of a training run to take.
    #[arg(long, value_enum, default_value_t)]
    weights: Choice,
    /// How to keep the weights: f16 halves the bundle, int8 is also faster on CPUs. What either costs is
    /// measured on random tokens and written into the manifest.
    #[arg(long, value_enum, default_value_t)]
    storage: Storage,
}

pub(crate) fn run(arguments: Arguments) -> Result<()> {
    let Arguments {
        checkpoint: directory,
        out,
        name,
        tokenizer,
        weights,
        storage,
    } = arguments;
    let name = name.or_else(|| model_name(&out)).context("--name is missing")?;
    target::check(&name, &out)?;
    let checkpoint = import::read(&directory, weights)?;
    let tokenizer = tokenizer.or_else(|| {
        let beside = directory.join("tokenizer.json");
        beside.is_file().then_some(beside)
    });
    let tokenizer = tokenizer
        .map(|path| std::fs::read(&path).with_context(|| path.display().to_string()))
        .transpose()?;
    let model = TrainedModel {
        name: &name,
        config: &checkpoint.network,
        weights: &checkpoint.weights,
        graph: checkpoint.graph,
        schedule: checkpoint.schedule,
        tokenizer: tokenizer.as_deref(),
        end_of_document: None,
        provenance: json!({
            "imported_by": format!("denoised training {}", env!("CARGO_PKG_VERSION")),
            "model": checkpoint.name,
            "file": checkpoint.file.file_name().map(|name| name.to_string_lossy()),
            "sha256": import::sha256(&checkpoint.file)?,
        }),
    };
    let manifest = export::bundle(&out, model, storage)?;
    println!(
        "{}: {}, {} parameters, {} states, length {}{}",
        out.display(),
        manifest.name,
        checkpoint.weights.parameters(),
        manifest.vocab_size,
        manifest.max_length,
        if tokenizer.is_some() {
            ""
        } else {
            ", without tokenizer: served by token ids alone"
        }
    );
    Ok(())
}

/// `<name>` of `<repository>/<name>/<version>`.
fn model_name(out: &Path) -> Option<String> {
    Some(out.parent()?.file_name()?.to_str()?.to_owned())
}
