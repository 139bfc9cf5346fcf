//! The training loop: data in order, steps, validation, samples, checkpoints, and a good end.
//!
//! Every step is measured before it is taken: a checkpoint that is due is written once the loss and
//! the gradient of the next batch are known to be sound, so that weights which a last step has ruined
//! are never saved. A loss that is not finite, or that has exploded (see [`watch`](crate::fit::divergence)), stops
//! the run. A request to stop is answered after the step at hand, with a checkpoint.

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use burn::module::Module;
use denoised::diffusion::Token;
use tokenizers::Tokenizer;

use super::beginning::Beginning;
use super::error::FitError;
use super::terminal::Progress;
use super::tokens::{learned_from, matching_tokenizer, mixed};
use crate::config::{RunConfig, RunSection};
use crate::data::TokenFile;
use crate::data::mixture::Mixture;
use crate::evaluate::bound;
use crate::evaluate::samples;
use crate::fit::checkpoint::{self, State};
use crate::fit::divergence::DivergenceWatch;
use crate::fit::mirror::{Mirror, MirrorError};
use crate::fit::record::{DataFile, Line, Lock, Provenance, Recorder, Session, StepRecord, ValidationRecord};
use crate::fit::step::{Gradient, Trainer};
use crate::model::device::{DeviceName, Devices};
use crate::say::say;

const VALIDATION_DRAWS: usize = 2;
/// Sequences per `samples/STEP.txt`.
const SAMPLES: usize = 4;
/// What the smoothed time of a step keeps of its past.
const PACE_MEMORY: f64 = 0.9;
/// How long a run that is complete waits for a mirror that is away, and between two tries.
const LAST_PATIENCE: Duration = Duration::from_secs(180);
const BETWEEN_TRIES: Duration = Duration::from_secs(5);

/// How to start and end a run.
#[derive(Debug, Clone, Default)]
pub struct FitOptions {
    /// Where to start.
    pub start: Start,
    /// Complete the schedule within this wall-clock time, whatever the steps done by then.
    pub minutes: Option<f64>,
    /// What shares every batch; none is the CPU.
    pub devices: Vec<DeviceName>,
    /// What a fresh run begins with, in place of random weights.
    pub beginning: Option<Beginning>,
    /// The folder of the run's file, for its provenance.
    pub folder: Option<PathBuf>,
    /// Set to stop after the step at hand.
    pub stop: Arc<AtomicBool>,
}

/// Where a run starts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Start {
    /// With fresh weights, in a directory without checkpoints.
    #[default]
    Fresh,
    /// At the latest checkpoint.
    Resume,
    /// At the latest checkpoint, or with fresh weights where there is none.
    ResumeIfAny,
    /// At the checkpoint after so many steps; later ones are put aside.
    ResumeFrom(u64),
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// All of its steps are done, or its time is over.
    Complete,
    /// It was asked to stop, and can go on.
    Interrupted,
}

/// Trains as `config` says. Returns the state after the last step, and why that was the last.
///
/// # Errors
/// Where the run does not begin, and, as [`FitError::Stopped`] or [`FitError::StoppedEarly`], where it ends before its
/// time.
pub fn fit(config: RunConfig, options: FitOptions) -> Result<(State, End), FitError> {
    let directory = config.run.directory.clone();
    let mut run = Run::start(config, options)?;
    run.train().map_err(|error| {
        let (step, source) = (run.trainer.step(), Box::new(error));
        match checkpoint::latest(&directory) {
            Ok(last) => FitError::Stopped { step, last, source },
            Err(_) => FitError::StoppedEarly { step, source },
        }
    })
}

/// A run under way.
struct Run {
    settings: RunSection,
    trainer: Trainer,
    state: State,
    sequences: Mixture,
    held_out: Vec<Vec<Token>>,
    tokenizer: Tokenizer,
    mirror: Option<Mirror>,
    /// Whether the mirror lacks the last checkpoint.
    is_mirror_behind: bool,
    /// A validation bound better than all before, of weights that are not saved yet.
    better: Option<(f64, u64)>,
    recorder: Recorder,
    progress: Progress,
    watch: DivergenceWatch,
    stop: Arc<AtomicBool>,
    /// Steps done before this session; what was due then was done then.
    first: u64,
    /// Seconds of the sessions before, and the start of this one.
    before: f64,
    started: Instant,
    saved: Instant,
    /// Smoothed seconds per step.
    pace: Option<f64>,
}

impl Run {
    fn start(config: RunConfig, options: FitOptions) -> Result<Self, FitError> {
        let train = TokenFile::open(&config.data.train)?;
        let validation = TokenFile::open(&config.data.validation)?;
        let tokenizer = matching_tokenizer(&config, &train, &validation)?;
        let shape = config.network_config(train.vocab_size());
        let held_out = validation.spread(shape.length, config.run.validation_sequences);
        let mixed = mixed(&config, &train)?;
        let mixture = mixed
            .iter()
            .zip(&config.data.mixture)
            .map(|(file, part)| DataFile::of(&part.tokens, file.tokens(), file.bytes()))
            .collect::<Result<_, _>>()?;
        let shares = config.data.mixture.iter().map(|part| part.share);
        let others = mixed.into_iter().zip(shares).collect();
        let sequences = Mixture::new(train.clone(), others, shape.length, config.run.seed)?;

        let settings = config.run.clone();
        let devices = Devices::open(&options.devices, settings.threads)?;
        let parts = devices.lanes().len() * settings.accumulate;
        if parts > settings.batch_size {
            return Err(FitError::Parts {
                devices: devices.lanes().len(),
                accumulate: settings.accumulate,
                batch_size: settings.batch_size,
            });
        }
        let directory = &settings.directory;
        let lock = Lock::acquire(directory)?;
        checkpoint::clear_drafts(directory)?;
        let mirror = settings.mirror.as_deref().map(Mirror::open).transpose()?;
        if let Some(mirror) = &mirror {
            match options.start {
                // What the directory holds is told first.
                Start::Fresh if checkpoint::steps(directory).is_empty() => mirror.check_empty()?,
                Start::Fresh => {}
                Start::Resume | Start::ResumeIfAny => {
                    if let Some(step) = mirror.pull(directory)? {
                        say(&format!("fetched the checkpoint of step {step} from run.mirror"));
                    }
                }
                Start::ResumeFrom(_) => mirror.check_known(directory)?,
            }
        }
        let folder = match options.start {
            Start::Fresh | Start::ResumeIfAny if checkpoint::steps(directory).is_empty() => None,
            Start::Fresh => return Err(FitError::Holds(directory.clone())),
            Start::Resume | Start::ResumeIfAny => Some(checkpoint::choose(directory, None)?),
            Start::ResumeFrom(step) => Some(checkpoint::choose(directory, Some(step))?),
        };
        let data = Provenance {
            train: DataFile::of(&config.data.train, train.tokens(), train.bytes())?,
            mixture,
            validation: DataFile::of(&config.data.validation, validation.tokens(), validation.bytes())?,
            tokenizer_sha256: train.tokenizer_sha256().to_owned(),
            ..Provenance::default()
        };
        let (trainer, mut state) = match &folder {
            None => {
                let mut trainer = Trainer::new(config.clone(), &shape, devices)?;
                if let Some(beginning) = &options.beginning {
                    beginning.give(&mut trainer, &shape, train.tokenizer_sha256())?;
                }
                let name = uuid::Uuid::new_v4().to_string();
                let state = State::of(&trainer, &name, train.tokenizer_sha256(), 0.0);
                (trainer, state)
            }
            Some(folder) => checkpoint::resume(folder, config.clone(), &shape, devices)?,
        };
        let other = |what| FitError::OtherTokens {
            directory: directory.clone(),
            what,
            train: config.data.train.clone(),
        };
        if state.tokenizer_sha256 != train.tokenizer_sha256() {
            return Err(other("tokenizer"));
        }
        let end = train.end_of_document();
        if *state.end_of_document.get_or_insert(end) != end {
            return Err(other("token at the end of documents"));
        }
        let changed = state.config.changes(&config)?;
        state.config = config;
        state.minutes = options.minutes.or(state.minutes);
        if let Start::ResumeFrom(step) = options.start {
            // For nothing later checkpoints are not put aside.
            if share(&settings, &state, step, state.seconds) >= 1.0 {
                let why = over(&settings, &state);
                return Err(FitError::NothingToDo { step, why });
            }
            checkpoint::abandon_after(directory, step)?;
        }

        let step = trainer.step();
        let parameters = trainer.averaged().num_params();
        let recorder = Recorder::open(lock, &state.config, step)?;
        let provenance = Provenance {
            parameters: parameters as u64,
            ..data
        };
        let learned = learned_from(&provenance);
        let earlier = recorder.provenance(provenance, Session::now(step, options.folder.as_deref()))?;

        let now = Instant::now();
        let share = share(&settings, &state, step, state.seconds);
        let run = Self {
            progress: Progress::new(settings.steps, step, share),
            watch: state.watch,
            first: step,
            before: state.seconds,
            started: now,
            saved: now,
            pace: None,
            stop: options.stop,
            settings,
            trainer,
            state,
            sequences,
            held_out,
            tokenizer,
            mirror,
            is_mirror_behind: false,
            better: None,
            recorder,
        };
        run.progress.note(&format!(
            "{parameters} parameters, {} training tokens, {} states, steps {step}..{}",
            train.tokens(),
            shape.states,
            run.settings.steps
        ));
        if run.held_out.is_empty() {
            run.progress.note(&format!(
                "{} holds no whole sequence: nothing is validated",
                run.state.config.data.validation.display()
            ));
        }
        for change in changed {
            run.progress
                .note(&format!("changed since the checkpoint: {change}"));
        }
        if earlier.is_some_and(|earlier| learned_from(&earlier) != learned) {
            run.progress
                .note("changed since the checkpoint: the tokens to train on");
        }
        Ok(run)
    }

    fn train(&mut self) -> Result<(State, End), FitError> {
        loop {
            let (step, share) = (self.trainer.step(), self.share());
            let over = share >= 1.0;
            if over && step == self.first {
                let why = self::over(&self.settings, &self.state);
                self.progress.note(&format!("there is nothing to do: {why}"));
                return Ok((self.state.clone(), End::Complete));
            }
            if over || self.is_due(self.settings.validate_every) {
                self.validate()?;
            }
            if let Some(every) = self.settings.sample_every
                && (over || self.is_due(every))
            {
                self.sample()?;
            }
            let gradient = if over { None } else { Some(self.next_gradient()?) };
            let watch = gradient.as_ref().map_or(self.watch, |gradient| {
                self.watch.observe(gradient.loss, &self.settings)
            });
            if watch.has_exploded(&self.settings) || over && watch.is_suspect() {
                return Err(FitError::Exploded {
                    loss: watch.smoothed(),
                    best: watch.best().unwrap_or_default(),
                    factor: self.settings.explosion_factor,
                });
            }
            let stop = self.stop.load(Ordering::Relaxed);
            let minutes = self.settings.checkpoint_minutes;
            let late = minutes.is_some_and(|minutes| self.saved.elapsed() >= seconds(60.0 * minutes));
            let is_better = self.better.is_some();
            if over || stop || self.is_due(self.settings.checkpoint_every) || late || is_better {
                self.save(watch)?;
            }
            let Some(gradient) = gradient else {
                self.finish(LAST_PATIENCE)?;
                return Ok((self.state.clone(), End::Complete));
            };
            if stop {
                // Whoever stops a machine does not wait.
                self.finish(Duration::ZERO)?;
                return Ok((self.state.clone(), End::Interrupted));
            }
            self.advance(gradient, watch, share)?;
        }
    }

    fn seconds(&self) -> f64 {
        self.before + self.started.elapsed().as_secs_f64()
    }

    /// How much of the run is over, in [0, 1].
    fn share(&self) -> f64 {
        share(&self.settings, &self.state, self.trainer.step(), self.seconds())
    }

    /// Whether something that happens `every` so many steps happens now.
    fn is_due(&self, every: u64) -> bool {
        let step = self.trainer.step();
        step > self.first && step.is_multiple_of(every)
    }

    /// The loss and gradient of the next step, which must be finite.
    fn next_gradient(&mut self) -> Result<Gradient, FitError> {
        let started = Instant::now();
        let batch = self
            .sequences
            .batch(self.trainer.step(), self.settings.batch_size);
        let gradient = self.trainer.gradient(&batch);
        self.pace_of(started.elapsed());
        let Gradient { loss, norm, .. } = gradient;
        if loss.is_finite() && norm.is_finite() {
            Ok(gradient)
        } else {
            Err(FitError::NotFinite { loss, norm })
        }
    }

    fn pace_of(&mut self, step: Duration) {
        let step = step.as_secs_f64();
        let pace = self
            .pace
            .map_or(step, |pace| PACE_MEMORY * pace + (1.0 - PACE_MEMORY) * step);
        self.pace = Some(pace);
    }

    /// Takes the step that `gradient` points to.
    fn advance(&mut self, gradient: Gradient, watch: DivergenceWatch, share: f64) -> Result<(), FitError> {
        let report = self.trainer.apply(gradient, share);
        self.watch = watch;
        let step_tokens = self.settings.batch_size * self.state.network.length;
        self.state.tokens += step_tokens as u64;
        let line = StepRecord {
            step: self.trainer.step(),
            tokens: self.state.tokens,
            seconds: self.seconds(),
            loss: report.loss,
            smoothed_loss: self.watch.smoothed(),
            gradient_norm: report.gradient_norm,
            learning_rate: report.learning_rate,
            tokens_per_second: step_tokens as f64 / self.pace.unwrap_or(1.0).max(1e-9),
        };
        if line.step.is_multiple_of(self.settings.log_every) {
            self.recorder.record(Line::Step(line))?;
        }
        let share = self.share();
        self.progress.step(&line, share);
        Ok(())
    }

    fn validate(&mut self) -> Result<(), FitError> {
        if self.held_out.is_empty() {
            return Ok(());
        }
        let step = self.trainer.step();
        let (network, objective) = (self.trainer.averaged(), self.trainer.objective());
        let RunSection { seed, threads, .. } = self.settings;
        let bound = bound::bound(
            network,
            objective,
            &self.held_out,
            VALIDATION_DRAWS,
            seed,
            threads,
        );
        if !bound.nats_per_token.is_finite() {
            return Err(FitError::BoundNotFinite(bound.nats_per_token));
        }
        self.progress
            .note(&format!("step {step}: validation bound {bound}"));
        if self
            .state
            .best
            .is_none_or(|(best, _)| bound.nats_per_token < best)
        {
            self.better = Some((bound.nats_per_token, step));
        }
        self.recorder.record(Line::Validation(ValidationRecord {
            step,
            tokens: self.state.tokens,
            seconds: self.seconds(),
            bound: bound.nats_per_token,
            standard_error: bound.standard_error,
            by_time: bound.by_time,
        }))?;
        Ok(())
    }

    fn sample(&mut self) -> Result<(), FitError> {
        let step = self.trainer.step();
        let (network, objective) = (self.trainer.averaged(), self.trainer.objective());
        let RunSection { seed, threads, .. } = self.settings;
        match samples::draw(network, objective, SAMPLES, seed, threads) {
            Ok(sequences) => {
                let texts: Vec<String> = sequences
                    .iter()
                    .map(|tokens| self.tokenizer.decode(tokens, true))
                    .collect::<Result<_, _>>()
                    .map_err(|error| FitError::Decode(error.to_string()))?;
                self.recorder.sample(step, &texts)?;
            }
            // A network that cannot be sampled from yet can still learn.
            Err(error) => {
                self.progress.note(&format!("step {step}: no samples: {error}"));
            }
        }
        Ok(())
    }

    /// Writes a checkpoint of the steps done, unless there is one or `next`, which knows the loss of
    /// these weights, finds it too high.
    fn save(&mut self, next: DivergenceWatch) -> Result<(), FitError> {
        let step = self.trainer.step();
        let better = self.better.take();
        let exists = checkpoint::folder(&self.settings.directory, step).exists();
        if exists || next.is_suspect() {
            if !exists {
                self.progress.note(&format!(
                    "step {step}: no checkpoint, since the loss is {:.4}",
                    next.smoothed()
                ));
            }
            return Ok(());
        }
        self.recorder.sync()?;
        self.state = State {
            tokens: self.state.tokens,
            minutes: self.state.minutes,
            best: better.or(self.state.best),
            watch: self.watch,
            end_of_document: self.state.end_of_document,
            ..State::of(
                &self.trainer,
                &self.state.run,
                &self.state.tokenizer_sha256,
                self.seconds(),
            )
        };
        let folder = checkpoint::save(&self.trainer, &self.state)?;
        self.saved = Instant::now();
        self.progress
            .note(&format!("step {step}: wrote {}", folder.display()));
        if let Err(error) = self.copy() {
            self.progress.note(&format!(
                "step {step}: no copy, the next checkpoint tries again: {}",
                in_one_line(&error)
            ));
        }
        Ok(())
    }

    /// Copies what the mirror lacks, if there is a mirror.
    fn copy(&mut self) -> Result<(), MirrorError> {
        if let Some(mirror) = &self.mirror {
            self.is_mirror_behind = true;
            mirror.push(&self.settings.directory, &self.state.run, self.state.step)?;
            self.is_mirror_behind = false;
        }
        Ok(())
    }

    /// Ends the run; a mirror that is behind is tried again for as long as `patience`.
    fn finish(&mut self, patience: Duration) -> Result<(), FitError> {
        self.progress.finish();
        let started = Instant::now();
        while self.is_mirror_behind
            && let Err(error) = self.copy()
        {
            if started.elapsed() >= patience {
                return Err(FitError::NotCopied(error));
            }
            thread::sleep(BETWEEN_TRIES);
        }
        Ok(())
    }
}

fn share(settings: &RunSection, state: &State, step: u64, seconds: f64) -> f64 {
    let spent = state.minutes.map_or(0.0, |minutes| seconds / (60.0 * minutes));
    (step as f64 / settings.steps as f64).max(spent)
}

/// Why a run that is over is over.
fn over(settings: &RunSection, state: &State) -> String {
    let (done, steps) = (state.step, settings.steps);
    match state.minutes {
        Some(minutes) if done < steps => {
            let spent = state.seconds / 60.0;
            format!("{spent:.1} of {minutes} minutes are over; a larger --until-minutes goes on")
        }
        _ => format!("{done} of {steps} steps are done; a larger run.steps goes on"),
    }
}

fn seconds(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
}

/// An error and what is behind it, on one line.
fn in_one_line(error: &dyn Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", in_one_line(source)),
        None => error.to_string(),
    }
}
