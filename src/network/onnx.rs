//! Networks of bundles, on ONNX Runtime.
//!
//! Inputs are found by name, so that foreign exporters need no agreement about order; the contract is
//! in the README. The runtime is a shared library that is loaded once per process ([`runtime`]).

#[cfg(feature = "serve")]
mod prepared;
mod runtime;

use std::sync::{Arc, mpsc};
use std::time::Duration;

use half::f16;
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ort::session::{RunOptions, Session};
use ort::value::{DynValue, TensorElementType, TensorRef, ValueType};

#[cfg(feature = "serve")]
pub use prepared::{Prepared, PreparedError};
pub use runtime::{disable_telemetry, runtime};

use super::{Batch, NetworkError, Output, ScoreNetwork, ScoreRows, Stop};
use crate::bundle::{Bundle, Manifest, ModelBytes};

/// Where an [`OnnxNetwork`] runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Device {
    /// ONNX Runtime's CPU provider.
    #[default]
    Cpu,
    /// The CUDA provider on this GPU; needs the feature `cuda` and the GPU build of the runtime.
    Cuda(i32),
}

impl Device {
    /// Whether this binary can run networks there at all.
    pub fn is_usable(self) -> bool {
        match self {
            Self::Cpu => true,
            Self::Cuda(_) => cfg!(feature = "cuda"),
        }
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(id) => write!(f, "cuda:{id}"),
        }
    }
}

impl std::str::FromStr for Device {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.split_once(':') {
            None if text == "cpu" => Ok(Self::Cpu),
            Some(("cuda", id)) => match id.parse() {
                Ok(id) if id >= 0 => Ok(Self::Cuda(id)),
                _ => Err(format!("device {text:?}: {id:?} is not a GPU number")),
            },
            _ => Err(format!("device {text:?} must be \"cpu\" or \"cuda:N\"")),
        }
    }
}

/// How to set up a session.
#[derive(Clone, Copy, Debug)]
pub struct OnnxOptions {
    /// Where to run.
    pub device: Device,
    /// Threads that one evaluation may use; at least 1.
    pub threads: usize,
}

impl Default for OnnxOptions {
    fn default() -> Self {
        Self {
            device: Device::Cpu,
            threads: 1,
        }
    }
}

/// The network of a bundle, with a session of its own.
#[derive(Debug)]
pub struct OnnxNetwork {
    session: Session,
    vocab: usize,
    takes_sigma: bool,
    takes_positions: bool,
    half: bool,
    weights: Weights,
    run: Run,
}

/// Where the weights of a session are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Weights {
    /// In memory of its own.
    Own,
    /// In a file that all sessions of the network map.
    #[cfg(feature = "serve")]
    Mapped,
}

/// How long the threads of a pass look for their next part before they sleep.
const SPIN_MICROSECONDS: &str = "30";
/// Positions of the canvas that a network is tried with when it is loaded.
const TRIAL: usize = 8;
/// How long that may take.
const TRIAL_TIME: Duration = Duration::from_secs(60);

/// The options of all runs of a session, through which another thread can end them.
#[derive(Clone)]
struct Run(Arc<RunOptions>);

impl std::fmt::Debug for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Run")
    }
}

impl Stop for Run {
    fn stop(&self) {
        // Where the runtime refuses there is nothing more to try: whoever waits gives up on the run.
        drop(self.0.terminate());
    }
}

impl OnnxNetwork {
    /// Loads the network of `bundle`, checks it against its manifest and evaluates it once: what cannot run is
    /// told now, and what the runtime sets up at first is not a request's to wait for.
    pub fn load(bundle: &Bundle, options: &OnnxOptions) -> Result<Self, NetworkError> {
        let network = Self::new(open_session(bundle, options)?, bundle.manifest())?;
        network.tried(bundle.manifest())
    }

    /// The same from a folder of prepared networks, whose weights are shared with all others that come from there. What
    /// is not there yet is prepared; where that cannot be, it is loaded as without.
    #[cfg(feature = "serve")]
    pub fn load_prepared(
        bundle: &Bundle,
        options: &OnnxOptions,
        prepared: &Prepared,
    ) -> Result<Self, NetworkError> {
        let manifest = bundle.manifest();
        match prepared.session(bundle, options) {
            Some(session) => {
                let mut network = Self::new(session, manifest)?;
                network.weights = Weights::Mapped;
                network.tried(manifest)
            }
            None => Self::load(bundle, options),
        }
    }

    fn tried(mut self, manifest: &Manifest) -> Result<Self, NetworkError> {
        let length = manifest.max_length.min(TRIAL);
        let token = manifest.mask_token.unwrap_or(0);
        let trial = Batch {
            tokens: &vec![i64::from(token); length],
            length,
            sigma: &[manifest.schedule.total_noise(0.5) as f32],
            positions: &[0],
        };
        let (over, timer) = mpsc::sync_channel::<()>(0);
        let run = self.run.clone();
        std::thread::spawn(move || {
            if timer.recv_timeout(TRIAL_TIME) == Err(mpsc::RecvTimeoutError::Timeout) {
                run.stop();
            }
        });
        let tried = self.log_score(&trial, &mut |_| {});
        drop(over);
        tried.map_err(|error| match error {
            NetworkError::Run(problem) => {
                NetworkError::Load(format!("its first evaluation failed: {problem}"))
            }
            error @ (NetworkError::Runtime(_)
            | NetworkError::Load(_)
            | NetworkError::Contract(_)
            | NetworkError::Room { .. }
            | NetworkError::Memory(_)) => error,
        })?;
        Ok(self)
    }

    fn new(session: Session, manifest: &Manifest) -> Result<Self, NetworkError> {
        let contract = |message: String| NetworkError::Contract(message);
        for input in session.inputs() {
            let wanted = match input.name() {
                "tokens" | "positions" => TensorElementType::Int64,
                "sigma" => TensorElementType::Float32,
                other => return Err(contract(format!("it has an unknown input {other:?}"))),
            };
            if element_type(input.dtype()) != Some(wanted) {
                return Err(contract(format!(
                    "input {:?} must be a tensor of {wanted:?}",
                    input.name()
                )));
            }
        }
        let has = |name: &str| session.inputs().iter().any(|input| input.name() == name);
        if !has("tokens") {
            return Err(contract("it has no input \"tokens\"".to_owned()));
        }
        if has("sigma") != manifest.time_conditioned {
            return Err(contract(format!(
                "the manifest says time_conditioned = {}, the network {} an input \"sigma\"",
                manifest.time_conditioned,
                if has("sigma") { "has" } else { "has not" }
            )));
        }
        let Some(output) = session
            .outputs()
            .iter()
            .find(|output| output.name() == "log_score")
        else {
            return Err(contract("it has no output \"log_score\"".to_owned()));
        };
        if let ValueType::Tensor { shape, .. } = output.dtype()
            && let Some(&columns) = shape.last()
            && columns >= 0
            && columns != manifest.vocab_size as i64
        {
            return Err(contract(format!(
                "output \"log_score\" has {columns} columns, the manifest says vocab_size = {}",
                manifest.vocab_size
            )));
        }
        let half = match element_type(output.dtype()) {
            Some(TensorElementType::Float32) => false,
            Some(TensorElementType::Float16) => true,
            other => {
                return Err(contract(format!(
                    "output \"log_score\" is {other:?}, must be float32 or float16"
                )));
            }
        };
        let (takes_sigma, takes_positions) = (has("sigma"), has("positions"));
        Ok(Self {
            session,
            vocab: manifest.vocab_size,
            takes_sigma,
            takes_positions,
            half,
            weights: Weights::Own,
            run: Run(Arc::new(
                RunOptions::new().map_err(|e| NetworkError::Load(e.to_string()))?,
            )),
        })
    }
}

impl ScoreNetwork for OnnxNetwork {
    fn log_score(
        &mut self,
        batch: &Batch<'_>,
        read: &mut dyn FnMut(ScoreRows<'_>),
    ) -> Result<(), NetworkError> {
        let run = |error: ort::Error| failed_run(&error);
        if batch.positions.is_empty() {
            // Not every operator of the runtime is at home with empty tensors.
            read(ScoreRows::packed(&[], self.vocab));
            return Ok(());
        }
        let count = batch.sigma.len();
        let tokens = TensorRef::from_array_view(([count, batch.length], batch.tokens)).map_err(run)?;
        let mut inputs = ort::inputs!["tokens" => tokens];
        if self.takes_sigma {
            let sigma = TensorRef::from_array_view(([count], batch.sigma)).map_err(run)?;
            inputs.push(("sigma".into(), sigma.into()));
        }
        if self.takes_positions {
            let positions =
                TensorRef::from_array_view(([batch.positions.len()], batch.positions)).map_err(run)?;
            inputs.push(("positions".into(), positions.into()));
        }
        let outputs = self.session.run_with_options(inputs, &self.run.0).map_err(run)?;
        let Some(output) = outputs.get("log_score") else {
            return Err(NetworkError::Run(
                "the output \"log_score\" is missing".to_owned(),
            ));
        };
        let (given, entries) = if self.half {
            let data = output.try_extract_tensor::<f16>().map_err(run)?.1;
            (ScoreRows::packed_half(data, self.vocab), data.len())
        } else {
            let data = output.try_extract_tensor::<f32>().map_err(run)?.1;
            (ScoreRows::packed(data, self.vocab), data.len())
        };
        let rows = if self.takes_positions {
            batch.positions.len()
        } else {
            count * batch.length
        };
        if entries != rows * self.vocab {
            let shape = shape_of(output);
            return Err(NetworkError::Contract(format!(
                "\"log_score\" has shape {shape}, expected {rows} rows of {} (vocab_size)",
                self.vocab
            )));
        }
        read(if self.takes_positions {
            given
        } else {
            given.gathered(batch.positions)
        });
        Ok(())
    }

    fn output(&self) -> Output {
        Output {
            all_rows: !self.takes_positions,
            entry_bytes: if self.half {
                size_of::<f16>()
            } else {
                size_of::<f32>()
            },
        }
    }

    fn shares_weights(&self) -> bool {
        self.weights != Weights::Own
    }

    fn stop_handle(&self) -> Option<Arc<dyn Stop>> {
        Some(Arc::new(self.run.clone()))
    }
}

/// Tells failed evaluations that a smaller batch may survive from others: ONNX Runtime has no code for them.
fn failed_run(error: &ort::Error) -> NetworkError {
    let problem = error.to_string();
    let lower = problem.to_lowercase();
    // Of its arenas, of CUDA, and of the C++ library.
    let signs = [
        "failed to allocate memory",
        "out of memory",
        "bad_alloc",
        "cuda_error_out_of_memory",
    ];
    if signs.iter().any(|sign| lower.contains(sign)) {
        NetworkError::Memory(problem)
    } else {
        NetworkError::Run(problem)
    }
}

fn shape_of(value: &DynValue) -> String {
    if let ValueType::Tensor { shape, .. } = value.dtype() {
        format!("{:?}", &shape[..])
    } else {
        "none".to_owned()
    }
}

fn element_type(value: &ValueType) -> Option<TensorElementType> {
    if let ValueType::Tensor { ty, .. } = value {
        Some(*ty)
    } else {
        None
    }
}

fn refused(error: impl std::fmt::Display) -> NetworkError {
    NetworkError::Load(error.to_string())
}

/// A session with a copy of the bundle's weights of its own.
fn open_session(bundle: &Bundle, options: &OnnxOptions) -> Result<Session, NetworkError> {
    let builder = session_builder(options)?
        .with_optimization_level(GraphOptimizationLevel::All)
        .map_err(refused)?;
    commit(builder, bundle)
}

/// What all sessions with these options have in common.
fn session_builder(options: &OnnxOptions) -> Result<SessionBuilder, NetworkError> {
    #[cfg_attr(not(feature = "cuda"), expect(unused_mut, reason = "a provider is added"))]
    let mut builder = Session::builder(runtime()?)
        .map_err(refused)?
        .with_intra_threads(options.threads)
        .map_err(refused)?
        // Products of 8-bit matrices: without, processors that lack VNNI saturate sums at 16 bits. On others they take
        // twice as long with it.
        .with_config_entry("session.x64quantprecision", if has_vnni() { "0" } else { "1" })
        .map_err(refused)?
        // Numbers of rows differ from step to step; a plan of memory for each would be kept for good.
        .with_memory_pattern(false)
        .map_err(refused)?
        // A small network is many short operations, and waking a thread for its part of one takes longer than the part:
        // a tenth to a fifth of a pass. Between passes they sleep at once, since other workers share the cores.
        .with_intra_op_spinning(true)
        .map_err(refused)?
        .with_config_entry("session.force_spinning_stop", "1")
        .map_err(refused)?
        // Long enough to gain all of that. Whoever spins for a millisecond, as is the default, keeps the others who want the
        // core from it: beside a busy program passes took twice as long.
        .with_config_entry("session.intra_op.spin_duration_us", SPIN_MICROSECONDS)
        .map_err(refused)?;
    match options.device {
        Device::Cpu => Ok(builder),
        #[cfg(feature = "cuda")]
        Device::Cuda(id) => {
            // ONNX Runtime would round the factors of products to TF32, ten bits: enough to change tokens.
            let provider = ort::ep::CUDA::default()
                .with_device_id(id)
                .with_tf32(false)
                .build()
                .error_on_failure();
            builder = builder.with_execution_providers([provider]).map_err(refused)?;
            Ok(builder)
        }
        #[cfg(not(feature = "cuda"))]
        Device::Cuda(_) => Err(refused("this binary was built without the feature \"cuda\"")),
    }
}

/// Makes the session of what the bundle holds.
fn commit(mut builder: SessionBuilder, bundle: &Bundle) -> Result<Session, NetworkError> {
    let ModelBytes { model, external } = bundle.model().map_err(refused)?;
    for (name, bytes) in external {
        builder = builder
            .with_external_initializer_file_in_memory(name, bytes)
            .map_err(refused)?;
    }
    builder.commit_from_memory(&model).map_err(refused)
}

/// Whether the processor sums products of 8-bit numbers in 32 bits.
#[cfg(target_arch = "x86_64")]
fn has_vnni() -> bool {
    is_x86_feature_detected!("avx512vnni") || is_x86_feature_detected!("avxvnni")
}

/// Other processors have no instructions that saturate.
#[cfg(not(target_arch = "x86_64"))]
const fn has_vnni() -> bool {
    true
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn devices_are_read_and_bad_ones_named() {
        assert_eq!("cpu".parse::<Device>().unwrap(), Device::Cpu);
        assert_eq!("cuda:1".parse::<Device>().unwrap(), Device::Cuda(1));
        for bad in ["gpu", "cuda", "cuda:x", "cuda:-1", ""] {
            assert!(bad.parse::<Device>().unwrap_err().contains(bad));
        }
    }
}
