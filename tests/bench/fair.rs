//! What neighbours and a long queue cost: a short request beside long ones, and a step while very many wait.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use denoised::bundle::{FORMAT, MODEL, Manifest, demo};
use denoised::diffusion::sampler::TimeGrid;
use denoised::diffusion::{GraphKind, Parameterization, SamplerKind, Schedule, TokenChoice};
use denoised::engine::plan::Sampling;
use denoised::engine::{Caller, Engine, EngineOptions, Generation, Phase, Publish, Request, Resume};
use denoised::models::ServedModel;
use denoised::network::onnx::{Device, OnnxNetwork, OnnxOptions};
use denoised::network::{Batch, NetworkError, ScoreNetwork, ScoreRows};
use parking_lot::Mutex;
use serde_json::{Value, json};

use crate::quartiles;

/// Requests of the greedy caller, as long as the model allows.
const LONG: u32 = 32;
const LONG_STEPS: u32 = 2000;
const SHORT_LENGTH: usize = 16;
const SHORT_STEPS: u32 = 4;

fn options(threads: usize, batch_tokens: usize) -> EngineOptions {
    EngineOptions {
        devices: 1,
        workers: 1,
        threads,
        batch_tokens,
        output_bytes: 1 << 30,
        // Costs of a model are guessed at 5 ms until it is measured.
        max_queue: Duration::from_secs(100 * 86_400),
        caller_share: 1.0,
        network_bytes: u64::MAX,
        max_running_requests: usize::MAX,
        max_pass: Duration::from_secs(300),
        last_chance: Duration::from_secs(5),
    }
}

struct Bench {
    engine: Engine,
    model: Arc<ServedModel>,
    requests: u32,
}

impl Bench {
    fn ask(&mut self, caller: &str, (length, steps): (usize, u32), canvases: u32) -> Result<Generation> {
        self.requests += 1;
        let request = Request {
            id: self.requests.to_string(),
            caller: Caller::new(caller),
            model: Arc::clone(&self.model),
            template: vec![None; length].into(),
            sampling: Sampling {
                grid: TimeGrid::new(steps),
                sampler: SamplerKind::Tweedie,
                choice: TokenChoice::default(),
                normalize: false,
            },
            seed: self.requests.into(),
            canvases,
            publish: Publish::End,
            deadline: None,
            priority: 0,
            resume: Resume::default(),
            allowed: None,
            draft: None,
        };
        Ok(self.engine.admit(request)?)
    }

    /// Milliseconds of a short request.
    fn short(&mut self, caller: &str) -> Result<f64> {
        let started = Instant::now();
        let mut generation = self.ask(caller, (SHORT_LENGTH, SHORT_STEPS), 1)?;
        let runtime = tokio::runtime::Builder::new_current_thread().build()?;
        let ended = generation.canvases[0].wait_for(|state| !matches!(state.phase, Phase::Running));
        let state = runtime.block_on(ended)?.clone();
        if !matches!(state.phase, Phase::Done(_)) {
            bail!("the request failed: {:?}", state.phase);
        }
        Ok(1e3 * started.elapsed().as_secs_f64())
    }

    fn shorts(&mut self, caller: &str, turns: usize) -> Result<[f64; 3]> {
        Ok(quartiles(
            (0..turns).map(|_| self.short(caller)).collect::<Result<_>>()?,
        ))
    }
}

/// A short request of the demo model alone, and beside long ones of another caller and of its own.
pub(crate) fn neighbours(threads: usize, turns: usize) -> Result<Value> {
    let bundle = Arc::new(demo().context("this was built without the demo model")??);
    let source = Arc::clone(&bundle);
    let options_of = OnnxOptions {
        device: Device::Cpu,
        threads,
    };
    let network = Box::new(move || Ok(Box::new(OnnxNetwork::load(&source, &options_of)?) as Box<_>));
    let model = Arc::new(ServedModel::new(&bundle, 1, network)?);
    println!("\na request of {SHORT_LENGTH} tokens and {SHORT_STEPS} steps, ms: median (quartiles)");
    let mut rows = Vec::new();
    let mut one = 0.0;
    // As `engine.batch_tokens` is by default.
    for (caller, beside) in [("short", 0), ("short", LONG), ("long", LONG)] {
        let mut bench = Bench {
            engine: Engine::start(options(threads, 512))?,
            model: Arc::clone(&model),
            requests: 0,
        };
        bench.shorts(caller, 5)?;
        let length = bundle.manifest().max_length;
        let _long: Vec<Generation> = (0..beside)
            .map(|_| bench.ask("long", (length, LONG_STEPS), 1))
            .collect::<Result<_>>()?;
        std::thread::sleep(Duration::from_millis(500));
        let times = bench.shorts(caller, 4 * turns)?;
        let name = match (caller, beside) {
            (_, 0) => "alone",
            ("short", _) => "beside another caller's",
            _ => "beside its own caller's",
        };
        if beside == 0 {
            one = times[0];
        }
        println!(
            "  {name:25} {:8.1} ({:.1} to {:.1}), {:.1} times alone",
            times[0],
            times[1],
            times[2],
            times[0] / one
        );
        rows.push(json!({"beside": name, "ms": times, "of_alone": times[0] / one}));
    }
    Ok(Value::Array(rows))
}

/// Gives rows of zeros, and notes what passes between two evaluations.
struct Zeros {
    rows: Vec<f32>,
    between: Arc<Mutex<Vec<f64>>>,
    ended: Option<Instant>,
}

impl ScoreNetwork for Zeros {
    fn log_score(
        &mut self,
        batch: &Batch<'_>,
        read: &mut dyn FnMut(ScoreRows<'_>),
    ) -> Result<(), NetworkError> {
        if let Some(ended) = self.ended {
            self.between.lock().push(1e6 * ended.elapsed().as_secs_f64());
        }
        self.rows.resize(batch.positions.len() * 5, 0.0);
        read(ScoreRows::packed(&self.rows, 5));
        self.ended = Some(Instant::now());
        Ok(())
    }
}

/// What passes between two evaluations of one canvas of one token each, while more and more of them wait: telling,
/// putting back and taking the next.
pub(crate) fn waiting(turns: usize) -> Result<Value> {
    println!("\nbetween two evaluations, microseconds: median (quartiles)");
    let mut rows = Vec::new();
    for requests in [2, 160, 1600] {
        let between = Arc::new(Mutex::new(Vec::new()));
        let notes = Arc::clone(&between);
        let network = Box::new(move || {
            Ok(Box::new(Zeros {
                rows: Vec::new(),
                between: Arc::clone(&notes),
                ended: None,
            }) as Box<_>)
        });
        let manifest = Manifest {
            format: FORMAT,
            name: "zeros".to_owned(),
            graph: GraphKind::Uniform,
            schedule: Schedule::LogLinear { eps: 1e-3 },
            parameterization: Parameterization::Score,
            sigma_offset: false,
            vocab_size: 5,
            mask_token: None,
            excluded_tokens: Vec::new(),
            frame: denoised::bundle::Frame::default(),
            end_of_document: None,
            max_length: 1,
            time_conditioned: true,
            two_stage: false,
            defaults: None,
            sha256: [(MODEL.to_owned(), String::new())].into(),
            provenance: Value::Null,
        };
        let mut bench = Bench {
            engine: Engine::start(options(1, 1))?,
            model: Arc::new(ServedModel::without_bundle(manifest, 1, network)),
            requests: 0,
        };
        let generations: Vec<Generation> = (0..requests)
            .map(|number| bench.ask(&format!("{}", number % 16), (1, 1 << 16), 64))
            .collect::<Result<_>>()?;
        between.lock().clear();
        std::thread::sleep(Duration::from_secs(1) * turns.min(5) as u32);
        let times = quartiles(std::mem::take(&mut between.lock()));
        println!(
            "  {:7} canvases wait {:8.1} ({:.1} to {:.1})",
            64 * requests,
            times[0],
            times[1],
            times[2]
        );
        rows.push(json!({"waiting": 64 * requests, "microseconds": times}));
        drop(generations);
    }
    Ok(Value::Array(rows))
}
