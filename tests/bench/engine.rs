//! Generations through the engine, without the server around it.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, bail};
use denoised::bundle::Bundle;
use denoised::diffusion::sampler::TimeGrid;
use denoised::diffusion::{SamplerKind, TokenChoice};
use denoised::engine::plan::Sampling;
use denoised::engine::{Caller, Engine, EngineOptions, Phase, Publish, Request, Resume};
use denoised::models::ServedModel;
use denoised::network::onnx::{Device, OnnxNetwork, OnnxOptions};

/// One worker on the CPU that takes whatever it is given.
pub(crate) fn options(threads: usize) -> EngineOptions {
    EngineOptions {
        devices: 1,
        workers: 1,
        threads,
        batch_tokens: 1024,
        output_bytes: 1 << 30,
        max_queue: Duration::from_secs(86_400),
        caller_share: 1.0,
        network_bytes: u64::MAX,
        max_running_requests: 8,
        max_pass: Duration::from_secs(300),
        last_chance: Duration::from_secs(5),
    }
}

pub(crate) struct Subject {
    engine: Engine,
    model: Arc<ServedModel>,
}

/// Seconds of one generation, and its evaluations.
pub(crate) struct Times {
    pub(crate) total: f64,
    pub(crate) network: f64,
    pub(crate) sampling: f64,
    pub(crate) nfe: u32,
}

impl Subject {
    pub(crate) fn load(directory: &Path, threads: usize) -> Result<Self> {
        let network = OnnxOptions {
            device: Device::Cpu,
            threads,
        };
        Self::load_with(directory, &network, options(threads))
    }

    pub(crate) fn load_with(directory: &Path, options: &OnnxOptions, engine: EngineOptions) -> Result<Self> {
        let bundle = Arc::new(Bundle::open(directory)?);
        let (source, options) = (Arc::clone(&bundle), *options);
        let network = Box::new(move || Ok(Box::new(OnnxNetwork::load(&source, &options)?) as Box<_>));
        let model = ServedModel::new(&bundle, 1, network)?;
        Ok(Self {
            engine: Engine::start(engine)?,
            model: Arc::new(model),
        })
    }

    pub(crate) fn generate(&self, length: usize, steps: u32, normalize: bool, seed: u64) -> Result<Times> {
        self.generate_many(length, steps, normalize, seed, 1)
    }

    /// Several canvases of one request; the times of the first, once all have ended.
    pub(crate) fn generate_many(
        &self,
        length: usize,
        steps: u32,
        normalize: bool,
        seed: u64,
        canvases: usize,
    ) -> Result<Times> {
        let mut generation = self.engine.admit(Request {
            id: format!("{seed}"),
            caller: Caller::new("bench"),
            model: Arc::clone(&self.model),
            template: vec![None; length].into(),
            sampling: Sampling {
                grid: TimeGrid::new(steps),
                sampler: SamplerKind::Tweedie,
                choice: TokenChoice::default(),
                normalize,
            },
            seed,
            canvases: canvases as u32,
            publish: Publish::Steps,
            deadline: None,
            priority: 0,
            resume: Resume::default(),
            allowed: None,
            draft: None,
        })?;
        let runtime = tokio::runtime::Builder::new_current_thread().build()?;
        let mut states = Vec::new();
        for canvas in &mut generation.canvases {
            states.push(runtime.block_on(async {
                let ended = canvas.wait_for(|state| !matches!(state.phase, Phase::Running));
                ended.await.map(|state| state.clone())
            })?);
        }
        let state = states.swap_remove(0);
        let Phase::Done(outcome) = state.phase else {
            bail!("the generation failed: {:?}", state.phase);
        };
        let seconds = |time: Duration| time.as_secs_f64();
        Ok(Times {
            total: seconds(outcome.timings.total),
            network: seconds(outcome.timings.network),
            sampling: seconds(outcome.timings.sampling),
            nfe: state.nfe,
        })
    }
}
