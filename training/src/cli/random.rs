//! `training random`.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Args;
use denoised::diffusion::Parameterization;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use safetensors::Dtype;
use safetensors::tensor::{TensorView, serialize_to_file};
use serde_json::json;
use training::model::NetworkConfig;

/// Writes a checkpoint with random weights in the form of the reference implementation, for benchmarks.
///
/// `training import` makes a bundle of it. Without options it has the published small shape.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Where config.json and model.safetensors go; must not exist.
    #[arg(value_name = "DIR")]
    out: PathBuf,
    /// Tokens of the tokenizer, without the mask.
    #[arg(long, value_name = "N", default_value_t = 50_257)]
    vocab_size: usize,
    /// Longest sequence.
    #[arg(long, value_name = "N", default_value_t = 1024)]
    length: usize,
    /// Width of the residual stream.
    #[arg(long, value_name = "N", default_value_t = 768)]
    hidden_size: usize,
    /// Width of the noise condition.
    #[arg(long, value_name = "N", default_value_t = 128)]
    cond_dim: usize,
    /// Transformer blocks.
    #[arg(long, value_name = "N", default_value_t = 12)]
    blocks: usize,
    /// Attention heads per block.
    #[arg(long, value_name = "N", default_value_t = 12)]
    heads: usize,
    /// Seed of the weights.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

pub(crate) fn run(arguments: Arguments) -> Result<()> {
    let Arguments {
        out,
        vocab_size,
        length,
        hidden_size,
        cond_dim,
        blocks,
        heads,
        seed,
    } = arguments;
    ensure!(!out.exists(), "{} exists", out.display());
    let shape = NetworkConfig {
        states: vocab_size.checked_add(1).context("--vocab-size is too large")?,
        length,
        hidden_size,
        cond_dim,
        blocks,
        heads,
        dropout: 0.0,
        scale_by_sigma: true,
        parameterization: Parameterization::Score,
        time_conditioned: true,
        tie_embeddings: false,
    };
    shape.validate()?;
    let mut weights = shape.initial_weights(seed, 0.5);
    // A head of zeros would make all tokens equally likely.
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    generator.set_stream(1);
    for (name, tensor) in &mut weights.0 {
        if name.starts_with("output_layer.linear") {
            let bound = 2.0 / (hidden_size as f32).sqrt();
            for entry in &mut tensor.data {
                let unit = (generator.next_u32() >> 8) as f32 / (1_u32 << 24) as f32;
                *entry = bound * (2.0 * unit - 1.0);
            }
        }
    }
    let config = json!({
        "tokens": vocab_size,
        "graph": {"type": "absorb"},
        "noise": {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20},
        "model": {
            "hidden_size": hidden_size, "cond_dim": cond_dim, "length": length, "n_blocks": blocks, "n_heads": heads,
            "scale_by_sigma": true, "dropout": 0.0,
        },
    });
    fs::create_dir_all(&out).with_context(|| out.display().to_string())?;
    fs::write(out.join("config.json"), serde_json::to_vec_pretty(&config)?)?;
    let parameters = weights.parameters();
    let bytes: Vec<(String, Vec<usize>, Vec<u8>)> = weights
        .0
        .into_iter()
        .map(|(name, tensor)| {
            let bytes = tensor.data.iter().flat_map(|entry| entry.to_le_bytes()).collect();
            (name, tensor.shape, bytes)
        })
        .collect();
    let views = bytes
        .iter()
        .map(|(name, shape, bytes)| Ok((name.clone(), TensorView::new(Dtype::F32, shape.clone(), bytes)?)));
    let views: HashMap<_, _> = views.collect::<Result<_>>()?;
    serialize_to_file(views, None, &out.join("model.safetensors"))?;
    println!("{}: {parameters} parameters, random", out.display());
    Ok(())
}
