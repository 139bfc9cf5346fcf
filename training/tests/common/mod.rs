//! A small text, its tokens, and runs on them.

pub(crate) mod numbers;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use tokenizers::AddedToken;
use training::config::RunConfig;
use training::data::tokenizer::END_OF_DOCUMENT;
use training::data::{Corpus, TokenFile, prepare};

fn corpus(folder: &Path) -> Corpus {
    let input = (0..30)
        .map(|i| {
            let path = folder.join(format!("{i}.txt"));
            let text =
                format!("The cat number {i} sat on the mat. The dog saw the cat and ran to the mat.\n")
                    .repeat(6);
            fs::write(&path, text).unwrap();
            path
        })
        .collect();
    Corpus {
        input,
        validation_fraction: 0.2,
        ..Corpus::default()
    }
}

/// Says that something was not tried, past the test harness, which keeps to itself what passing tests print. With
/// `DENOISED_NO_SKIPPING` set the test fails instead.
pub(crate) fn skipped(why: impl std::fmt::Display) {
    assert!(std::env::var_os("DENOISED_NO_SKIPPING").is_none(), "{why}");
    // Nobody is left to tell that this cannot be told.
    drop(writeln!(std::io::stderr(), "SKIPPED: {why}"));
}

/// The server's program; says so and gives `None` where it is not built.
pub(crate) fn denoised() -> Option<PathBuf> {
    let program = Path::new(env!("CARGO_BIN_EXE_training")).with_file_name("denoised");
    if program.is_file() {
        return Some(program);
    }
    skipped("what needs denoised, which is not built (cargo test --workspace)");
    None
}

/// A tokenizer and token files made of a small text; the tokenizer's path and the held-out tokens.
pub(crate) fn prepared(root: &Path) -> (PathBuf, TokenFile) {
    prepared_with(root, END_OF_DOCUMENT).unwrap()
}

/// The same with another token that ends documents.
pub(crate) fn prepared_with(root: &Path, end: &str) -> Result<(PathBuf, TokenFile), anyhow::Error> {
    let corpus = corpus(root);
    let path = root.join("tokenizer.json");
    let mut tokenizer = training::data::tokenizer::train(&corpus.sample(1 << 20)?, 280)?;
    // Others have such a token.
    if end != END_OF_DOCUMENT {
        tokenizer
            .add_special_tokens([AddedToken::from("</s>", true)])
            .unwrap();
    }
    tokenizer.save(&path, true).unwrap();
    let prepared = prepare(&corpus, &path, end, &root.join("data"))?;
    Ok((path, prepared.validation))
}

/// A run of `steps` steps in a directory of its own, on the token files in `folder`.
pub(crate) fn config(folder: &Path, run: &str, steps: u64) -> RunConfig {
    let path = config_file(folder, run, steps);
    RunConfig::read(&path).unwrap()
}

/// The file of such a run.
pub(crate) fn config_file(folder: &Path, run: &str, steps: u64) -> PathBuf {
    let path = folder.join(format!("{run}-{steps}.toml"));
    let root = folder.display();
    let text = format!(
        r#"
        [data]
        train = "{root}/data/train.tokens"
        validation = "{root}/data/validation.tokens"
        tokenizer = "{root}/tokenizer.json"
        [graph]
        kind = "absorbing"
        [schedule]
        type = "loglinear"
        eps = 1e-3
        [network]
        length = 16
        hidden_size = 32
        cond_dim = 16
        blocks = 2
        heads = 2
        scale_by_sigma = true
        initial_gate = 1.0
        [optimizer]
        lr = 3e-3
        betas = [0.9, 0.99]
        warmup_steps = 4
        gradient_clip_norm = 1.0
        ema_decay = 0.9
        time_power = 2.0
        [run]
        seed = 1
        batch_size = 8
        steps = {steps}
        checkpoint_every = 10
        validate_every = 1000
        threads = 2
        directory = "{root}/{run}"
        "#
    );
    fs::write(&path, text).unwrap();
    path
}
