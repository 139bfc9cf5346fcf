//! `training sample`.

use std::path::PathBuf;

use anyhow::{Result, anyhow, ensure};
use clap::Args;
use denoised::diffusion::{Token, TokenChoice};
use training::config::RunConfig;
use training::evaluate::samples::{STEPS, Sampling};
use training::fit::checkpoint::Which;

use super::run::Run;

/// Lets a checkpoint of a run write, without a bundle or a server.
///
/// By Tweedie's steps, as the server does where it is asked for no other.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The run's file.
    config: PathBuf,
    /// Which checkpoint: last, best, or a number of steps.
    #[arg(long, value_name = "WHICH", default_value = "last")]
    checkpoint: Which,
    /// What each text begins with.
    #[arg(long, value_name = "TEXT", default_value = "")]
    prompt: String,
    /// Texts to write.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..))]
    count: u16,
    /// Tokens of a text, prompt included; the network's length otherwise.
    #[arg(long, value_name = "N")]
    length: Option<usize>,
    /// Denoising steps.
    #[arg(long, value_name = "N", default_value_t = STEPS, value_parser = clap::value_parser!(u32).range(1..=4096))]
    steps: u32,
    /// 0 takes the likeliest tokens, 1 follows the network.
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    temperature: f64,
    /// Choose among the likeliest tokens that hold this share of the probability.
    #[arg(long, value_name = "X")]
    top_p: Option<f64>,
    /// Decides noise and choices.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
}

pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let (temperature, top_p) = (arguments.temperature, arguments.top_p);
    ensure!(
        (0.0..=100.0).contains(&temperature),
        "--temperature is {temperature}, must be from 0 to 100"
    );
    if let Some(top_p) = top_p {
        ensure!(
            top_p > 0.0 && top_p <= 1.0,
            "--top-p is {top_p}, must be above 0 and at most 1"
        );
    }
    let run = Run::open(&RunConfig::read(&arguments.config)?, arguments.checkpoint)?;
    let tokenizer = run.tokenizer()?;
    let encoded = tokenizer
        .encode_fast(arguments.prompt.as_str(), false)
        .map_err(|error| anyhow!("--prompt: {error}"))?;
    let prompt: &[Token] = encoded.get_ids();
    let longest = run.network.config().length;
    let length = arguments.length.unwrap_or(longest);
    ensure!(
        length <= longest && length > prompt.len(),
        "--length is {length}, must be at most the network's {longest} and above the {} tokens of --prompt",
        prompt.len()
    );
    let sampling = Sampling {
        objective: run.objective(),
        prompt,
        length,
        count: arguments.count.into(),
        steps: arguments.steps,
        choice: TokenChoice {
            temperature,
            top_p,
            ..TokenChoice::default()
        },
        seed: arguments.seed,
        threads: run.config.run.threads,
    };
    let texts = sampling.draw(&|| Ok(&run.network))?;
    for (index, tokens) in texts.iter().enumerate() {
        let text = tokenizer
            .decode(tokens, true)
            .map_err(|error| anyhow!("cannot decode a text: {error}"))?;
        println!("--- {} of {} ---\n{text}", index + 1, texts.len());
    }
    Ok(())
}
