//! The training loop: data in order, steps, checkpoints, validation, progress.

use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use denoised::diffusion::Token;
use indicatif::{ProgressBar, ProgressStyle};
use rand_chacha::rand_core::Rng;

use crate::checkpoint::{self, State};
use crate::config::RunConfig;
use crate::data::TokenFile;
use crate::evaluate;
use crate::trainer::{Purpose, StepReport, Trainer, generator};

/// Held-out sequences that guide a run; `training evaluate` takes all.
const VALIDATION_SEQUENCES: usize = 128;
const VALIDATION_DRAWS: usize = 2;
/// Between two log lines where there is no terminal.
const LOG_EVERY: Duration = Duration::from_secs(20);

/// How to start and end a run.
#[derive(Debug, Clone, Copy, Default)]
pub struct FitOptions {
    /// Go on from the latest checkpoint.
    pub resume: bool,
    /// Complete the schedule within this wall-clock time, whatever the steps done by then.
    pub minutes: Option<f64>,
}

/// Sequences in an order that depends on (seed, epoch) alone: every epoch cuts the tokens at another
/// offset and visits the pieces in another order.
#[derive(Debug)]
pub struct Epochs {
    tokens: Vec<Token>,
    length: usize,
    seed: u64,
    order: Option<(u64, Vec<usize>)>,
}

impl Epochs {
    /// Over `tokens`, in sequences of `length`.
    pub fn new(tokens: Vec<Token>, length: usize, seed: u64) -> Result<Self> {
        ensure!(
            tokens.len() >= 2 * length,
            "the training data has {} tokens, at least two sequences of {length} are needed",
            tokens.len()
        );
        Ok(Self {
            tokens,
            length,
            seed,
            order: None,
        })
    }

    /// The sequences of step `step` with `batch` sequences per step.
    pub fn batch(&mut self, step: u64, batch: usize) -> Vec<Vec<Token>> {
        let first = step * batch as u64;
        (first..first + batch as u64)
            .map(|index| self.sequence(index))
            .collect()
    }

    fn sequence(&mut self, index: u64) -> Vec<Token> {
        // One piece less than fits, so that every offset leaves as many.
        let pieces = (self.tokens.len() / self.length - 1) as u64;
        let (epoch, place) = (index / pieces, (index % pieces) as usize);
        if self.order.as_ref().is_none_or(|(cached, _)| *cached != epoch) {
            let mut random = generator(self.seed, Purpose::Order, epoch);
            let offset = (random.next_u64() % self.length as u64) as usize;
            let mut starts: Vec<usize> = (0..pieces as usize)
                .map(|piece| offset + piece * self.length)
                .collect();
            for last in (1..starts.len()).rev() {
                starts.swap(last, (random.next_u64() % (last as u64 + 1)) as usize);
            }
            self.order = Some((epoch, starts));
        }
        let start = self.order.as_ref().map_or(0, |(_, starts)| starts[place]);
        self.tokens[start..start + self.length].to_vec()
    }
}

/// Trains as `config` says. Returns the state after the last step.
pub fn fit(config: RunConfig, options: FitOptions) -> Result<State> {
    let train = TokenFile::open(&config.data.train)?;
    let validation = TokenFile::open(&config.data.validation)?;
    ensure!(
        train.tokenizer_sha256() == validation.tokenizer_sha256(),
        "{} and {} were made with different tokenizers",
        config.data.train.display(),
        config.data.validation.display()
    );
    let shape = config.network_config(train.vocab_size());
    let held_out: Vec<Vec<Token>> = (0..validation.sequences(shape.length).min(VALIDATION_SEQUENCES))
        .map(|index| validation.sequence(index, shape.length))
        .collect();
    let mut epochs = Epochs::new(train.sequence(0, train.tokens()), shape.length, config.run.seed)?;

    let run = config.run.clone();
    let (mut trainer, mut state) = if options.resume {
        checkpoint::resume(&checkpoint::latest(&run.directory)?, config, &shape)?
    } else {
        ensure!(
            checkpoint::steps(&run.directory).is_empty(),
            "{} already holds checkpoints: --resume goes on from them, another run.directory starts afresh",
            run.directory.display()
        );
        let trainer = Trainer::new(config, &shape)?;
        let state = State::of(&trainer, train.tokenizer_sha256(), 0.0);
        (trainer, state)
    };
    ensure!(
        state.tokenizer_sha256 == train.tokenizer_sha256(),
        "the checkpoint was trained with another tokenizer than {}",
        run.directory.display()
    );
    state.minutes = options.minutes.or(state.minutes);

    let mut progress = Progress::new(&run, &trainer, shape.length);
    progress.note(&format!(
        "{} parameters, {} training tokens, {} states, steps {}..{}",
        trainer.averaged().state_dict().parameters(),
        train.tokens(),
        shape.states,
        trainer.step(),
        run.steps
    ));
    let (before, start) = (state.seconds, Instant::now());
    loop {
        let seconds = before + start.elapsed().as_secs_f64();
        let spent = state.minutes.map_or(0.0, |minutes| seconds / (60.0 * minutes));
        let share = (trainer.step() as f64 / run.steps as f64).max(spent);
        let over = share >= 1.0;
        let step = trainer.step();
        if step > 0 && (over || step.is_multiple_of(run.validate_every)) && !held_out.is_empty() {
            let (network, objective) = (trainer.averaged(), trainer.objective());
            let bound = evaluate::bound(
                network,
                objective,
                &held_out,
                VALIDATION_DRAWS,
                run.seed,
                run.threads,
            );
            progress.note(&format!("step {step}: validation bound {bound}"));
            if state.best.is_none_or(|(best, _)| bound.nats_per_token < best) {
                state.best = Some((bound.nats_per_token, step));
            }
        }
        if step > 0 && (over || step.is_multiple_of(run.checkpoint_every)) {
            state = State {
                minutes: state.minutes,
                best: state.best,
                ..State::of(&trainer, &state.tokenizer_sha256, seconds)
            };
            let folder = checkpoint::save(&trainer, &state)?;
            progress.note(&format!("step {step}: wrote {}", folder.display()));
        }
        if over {
            progress.finish();
            return Ok(state);
        }
        let report = trainer.learn(&epochs.batch(step, run.batch_size), share);
        ensure!(
            report.loss.is_finite() && report.gradient_norm.is_finite(),
            "step {step}: the loss is {} and its gradient's norm {}; a lower optimizer.lr may help",
            report.loss,
            report.gradient_norm
        );
        progress.step(&report, share);
    }
}

/// A bar on a terminal, lines elsewhere.
struct Progress {
    bar: ProgressBar,
    terminal: bool,
    tokens_per_step: f64,
    first: u64,
    step: u64,
    start: Instant,
    logged: Instant,
    loss: f64,
    /// Weight of the smoothed loss, which starts at 0 and must be divided out.
    weight: f64,
}

impl Progress {
    fn new(run: &crate::config::RunSection, trainer: &Trainer, length: usize) -> Self {
        let terminal = stderr().is_terminal();
        let bar = if terminal {
            ProgressBar::new(run.steps)
        } else {
            ProgressBar::hidden()
        };
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {elapsed} {msg}") {
            bar.set_style(style);
        }
        bar.set_position(trainer.step());
        let now = Instant::now();
        Self {
            bar,
            terminal,
            tokens_per_step: (run.batch_size * length) as f64,
            first: trainer.step(),
            step: trainer.step(),
            start: now,
            logged: now,
            loss: 0.0,
            weight: 0.0,
        }
    }

    fn note(&self, line: &str) {
        if self.terminal {
            self.bar.println(line);
        } else {
            eprintln!("{line}");
        }
    }

    fn step(&mut self, report: &StepReport, share: f64) {
        self.step += 1;
        self.loss = 0.98 * self.loss + 0.02 * report.loss;
        self.weight = 0.98 * self.weight + 0.02;
        let elapsed = self.start.elapsed().as_secs_f64();
        let speed = (self.step - self.first) as f64 * self.tokens_per_step / elapsed;
        let left = elapsed * (1.0 - share) / share.max(f64::MIN_POSITIVE);
        let line = format!(
            "loss {:.4} nats/token, {speed:.0} tokens/s, gradient {:.1}, lr {:.2e}, {:.1} min left",
            self.loss / self.weight,
            report.gradient_norm,
            report.learning_rate,
            left / 60.0
        );
        if self.terminal {
            self.bar.set_message(line);
            self.bar.set_position(self.step);
        } else if self.logged.elapsed() >= LOG_EVERY {
            self.logged = Instant::now();
            eprintln!("step {}: {line}", self.step);
        }
    }

    fn finish(&self) {
        self.bar.finish();
    }
}
