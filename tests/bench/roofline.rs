//! What an evaluation takes beside what the machine's own products and memory would need for it at least.

use std::hint::black_box;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use denoised::bundle::Bundle;
use denoised::network::onnx::{self, OnnxNetwork, OnnxOptions};
use denoised::network::{Batch, ScoreNetwork};
use ort::editor::{Graph, Model, Node, Opset};
use ort::session::Session;
use ort::value::{Outlet, Shape, SymbolicDimensions, Tensor, TensorElementType, ValueType};
use serde_json::{Value, json};

use crate::{quartiles, show};

/// Model, folder of its bundle and tokens of a canvas.
const SUBJECTS: [(&str, &str, usize); 6] = [
    ("demo-shape", "demo-shape", 128),
    ("demo-shape", "demo-shape-int8", 128),
    ("small-shape", "small-shape", 128),
    ("small-shape", "small-shape-int8", 128),
    ("small-shape", "small-shape", 1024),
    ("small-shape", "small-shape-int8", 1024),
];

/// The factors of the products that the machine's rates are taken from: large enough to be as fast as any.
const ROWS: usize = 1024;
const INNER: usize = 3072;
const COLUMNS: usize = 3072;
/// Bytes that each thread reads.
const READ: usize = 64 << 20;
/// How often each rate is measured in a turn.
const TRIES: usize = 3;
/// A turn takes seconds.
const LEAST_TURNS: usize = 9;

/// Products of the machine, and what they are measured with.
struct Machine {
    sgemm: Session,
    int8: Session,
    threads: usize,
}

/// An evaluation of one canvas, with the rows of all its positions.
struct Work {
    /// Operations of products with weights.
    weights: f64,
    /// Operations of products of activations with each other.
    attention: f64,
    /// Bytes of weights and log-scores.
    bytes: f64,
}

/// Measures the bundles `<models>/<folder>/1`, in turns with the machine: its rates change with what else runs on it.
pub(crate) fn run(models: &Path, threads: usize, turns: usize) -> Result<Value> {
    let mut machine = Machine {
        sgemm: product_session(threads, false)?,
        int8: product_session(threads, true)?,
        threads,
    };
    println!(
        "\nroofline, {threads} threads; beside ONNX Runtime's products of {ROWS} x {INNER} x {COLUMNS}, and reading {} MB",
        (threads * READ) >> 20
    );
    let mut numbers = Vec::new();
    for (name, folder, length) in SUBJECTS {
        let bundle = models.join(folder).join("1");
        if !bundle.is_dir() {
            eprintln!("SKIPPED: {} is not there (make bench)", bundle.display());
            continue;
        }
        let bundle = Bundle::open(&bundle)?;
        let work = work(&models.join(format!("{name}.checkpoint")), &bundle, length)?;
        numbers.push(subject(
            &mut machine,
            folder,
            &bundle,
            &work,
            length,
            turns.max(LEAST_TURNS),
        )?);
    }
    Ok(Value::Array(numbers))
}

/// One bundle at one length.
fn subject(
    machine: &mut Machine,
    folder: &str,
    bundle: &Bundle,
    work: &Work,
    length: usize,
    turns: usize,
) -> Result<Value> {
    let options = OnnxOptions {
        threads: machine.threads,
        ..OnnxOptions::default()
    };
    let mut network = OnnxNetwork::load(bundle, &options)?;
    let tokens: Vec<i64> = (0..length as i64).collect();
    let batch = Batch {
        tokens: &tokens,
        length,
        sigma: &[0.7],
        positions: &tokens,
    };
    let is_int8 = folder.ends_with("int8");
    let [mut seconds, mut shares, mut sgemm, mut int8, mut memory] = [const { Vec::new() }; 5];
    for turn in 0..=turns {
        let rates = [
            product(&mut machine.sgemm, false)?,
            product(&mut machine.int8, true)?,
            read(machine.threads),
        ];
        let started = Instant::now();
        network.log_score(&batch, &mut |_| {})?;
        let taken = started.elapsed().as_secs_f64();
        // The first warms up.
        if turn > 0 {
            let of_weights = if is_int8 { rates[1] } else { rates[0] };
            let products = work.weights / of_weights + work.attention / rates[0];
            shares.push(products.max(work.bytes / rates[2]) / taken);
            seconds.push(taken);
            sgemm.push(rates[0]);
            int8.push(rates[1]);
            memory.push(rates[2]);
        }
    }
    let (seconds, shares) = (quartiles(seconds), quartiles(shares));
    let [sgemm, int8, memory] = [sgemm, int8, memory].map(quartiles);
    let operations = work.weights + work.attention;
    println!(
        "  {folder}, {length} tokens, {:.1} GFLOP, {:.0} MB: {} ms, {:.0} GFLOP/s; the machine {:.0} GFLOP/s, {:.0} GOP/s in 8 bits, {:.1} GB/s; {} of what it gives",
        operations / 1e9,
        work.bytes / 1e6,
        show(seconds.map(|seconds| 1e3 * seconds)),
        operations / seconds[0] / 1e9,
        sgemm[0] / 1e9,
        int8[0] / 1e9,
        memory[0] / 1e9,
        show(shares)
    );
    Ok(json!({
        "model": folder, "length": length, "flop": operations, "bytes": work.bytes, "seconds": seconds,
        "sgemm_flop_per_second": sgemm, "int8_operations_per_second": int8, "memory_bytes_per_second": memory,
        "share": shares,
    }))
}

/// What the network of a checkpoint has to do, by its shape. Norms, activations and conditions are left out.
fn work(checkpoint: &Path, bundle: &Bundle, length: usize) -> Result<Work> {
    let config =
        std::fs::read(checkpoint.join("config.json")).with_context(|| checkpoint.display().to_string())?;
    let config: Value = serde_json::from_slice(&config)?;
    let of = |key: &str| config["model"][key].as_f64().with_context(|| key.to_owned());
    let (width, blocks) = (of("hidden_size")?, of("n_blocks")?);
    let (length, states) = (length as f64, bundle.manifest().vocab_size as f64);
    Ok(Work {
        weights: length * (blocks * 24.0 * width * width + 2.0 * width * states),
        attention: blocks * 4.0 * length * length * width,
        bytes: bundle.weight_bytes() as f64 + 4.0 * length * states,
    })
}

/// Operations a second of a large product, the fastest of some.
fn product(session: &mut Session, is_int8: bool) -> Result<f64> {
    let shape = [ROWS, INNER];
    let mut fastest = f64::INFINITY;
    for _ in 0..TRIES {
        let inputs = if is_int8 {
            ort::inputs!["left" => Tensor::from_array((shape, vec![3_u8; ROWS * INNER]))?]
        } else {
            ort::inputs!["left" => Tensor::from_array((shape, vec![0.5_f32; ROWS * INNER]))?]
        };
        let started = Instant::now();
        black_box(session.run(inputs)?);
        fastest = fastest.min(started.elapsed().as_secs_f64());
    }
    Ok((2 * ROWS * INNER * COLUMNS) as f64 / fastest)
}

/// A graph of one product with a constant matrix, as the networks' are.
fn product_session(threads: usize, is_int8: bool) -> Result<Session> {
    let outlet = |name: &str, ty: TensorElementType, shape: [usize; 2]| {
        let dimensions = shape.map(|dimension| dimension as i64);
        let shape = Shape::new(dimensions);
        let dimension_symbols = SymbolicDimensions::empty(2);
        Outlet::new(
            name,
            ValueType::Tensor {
                ty,
                shape,
                dimension_symbols,
            },
        )
    };
    let (operator, left, output) = if is_int8 {
        (
            "MatMulInteger",
            TensorElementType::Uint8,
            TensorElementType::Int32,
        )
    } else {
        ("MatMul", TensorElementType::Float32, TensorElementType::Float32)
    };
    let mut graph = Graph::new()?;
    graph.set_inputs([outlet("left", left, [ROWS, INNER])])?;
    graph.set_outputs([outlet("product", output, [ROWS, COLUMNS])])?;
    // Of the runtime's own memory, which the graph takes over.
    let right = (&ort::memory::Allocator::default(), [INNER, COLUMNS]);
    if is_int8 {
        let mut right = Tensor::<i8>::new(right.0, right.1)?;
        right.extract_tensor_mut().1.fill(5);
        graph.add_initializer("right", right, false)?;
    } else {
        let mut right = Tensor::<f32>::new(right.0, right.1)?;
        right.extract_tensor_mut().1.fill(0.25);
        graph.add_initializer("right", right, false)?;
    }
    graph.add_node(Node::new(
        operator,
        "",
        "product",
        ["left", "right"],
        ["product"],
        [],
    )?)?;
    let mut model = Model::new([Opset::new("", 17)?])?;
    model.set_graph(graph)?;
    let builder = Session::builder(onnx::runtime()?)?
        .with_intra_threads(threads)
        .map_err(|error| anyhow::anyhow!("{error}"))?;
    Ok(model.into_session(&builder)?)
}

/// Bytes a second that all threads together read, the fastest of some.
fn read(threads: usize) -> f64 {
    let data: Vec<Vec<u64>> = (0..threads)
        // Not zeros, which the kernel would have no pages for.
        .map(|seed| vec![seed as u64 + 1; READ / size_of::<u64>()])
        .collect();
    let mut fastest = f64::INFINITY;
    for _ in 0..TRIES {
        let started = Instant::now();
        std::thread::scope(|scope| {
            for part in &data {
                scope.spawn(|| black_box(part.iter().fold(0_u64, |sum, entry| sum.wrapping_add(*entry))));
            }
        });
        fastest = fastest.min(started.elapsed().as_secs_f64());
    }
    (threads * READ) as f64 / fastest
}
