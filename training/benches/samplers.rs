//! The samplers on the demo model: evaluations against what a judge and the variety of the text say.
//!
//! `make judge && cargo build --release --workspace --features training/judge && cargo bench -p training --bench
//! samplers`. Draws from the server's own engine (`denoised generate`), measures with `training evaluate --written`,
//! and writes the table and the plot that the docs of `src/diffusion/sampler` show.
#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program")]

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use plotters::prelude::*;
use serde_json::Value;

#[derive(Parser)]
struct Arguments {
    /// Folder of the release build's programs.
    #[arg(long, default_value = concat!(env!("CARGO_TARGET_TMPDIR"), "/../release"))]
    programs: PathBuf,
    /// The judge, as GGUF.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../.tools/judge/SmolLM2-135M-Instruct.Q4_1.gguf"))]
    judge: PathBuf,
    /// Held-out text to stand beside.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../.corpus/demo/validation.txt"))]
    text: PathBuf,
    /// Samples of each setting.
    #[arg(long, default_value_t = 20)]
    samples: usize,
    /// Take what an earlier run has measured, and go on where it stopped.
    #[arg(long)]
    resume: bool,
    /// Where the table and the plot go.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../src/diffusion/sampler"))]
    out: PathBuf,
    /// `cargo bench` says so.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Options of `denoised generate` that make up one setting, under the sampler's name.
const SETTINGS: [(&str, &[&str]); 25] = [
    ("tweedie", &["--steps", "16"]),
    ("tweedie", &["--steps", "32"]),
    ("tweedie", &["--steps", "64"]),
    ("tweedie", &["--steps", "256"]),
    (
        "tweedie, normalised",
        &["--sampler", "tweedie", "--normalize", "--steps", "16"],
    ),
    (
        "tweedie, normalised",
        &["--sampler", "tweedie", "--normalize", "--steps", "32"],
    ),
    (
        "tweedie, normalised",
        &["--sampler", "tweedie", "--normalize", "--steps", "64"],
    ),
    (
        "tweedie, normalised",
        &["--sampler", "tweedie", "--normalize", "--steps", "1024"],
    ),
    ("euler", &["--sampler", "euler", "--steps", "64"]),
    ("first-hitting", &["--sampler", "first-hitting"]),
    (
        "theta-trapezoidal",
        &["--sampler", "theta-trapezoidal", "--steps", "32"],
    ),
    ("confidence", &["--sampler", "confidence", "--steps", "16"]),
    ("confidence", &["--sampler", "confidence", "--steps", "32"]),
    ("confidence", &["--sampler", "confidence", "--steps", "64"]),
    (
        "probability-margin",
        &["--sampler", "probability-margin", "--steps", "16"],
    ),
    (
        "probability-margin",
        &["--sampler", "probability-margin", "--steps", "32"],
    ),
    (
        "probability-margin",
        &["--sampler", "probability-margin", "--steps", "64"],
    ),
    (
        "entropy-bounded",
        &[
            "--sampler",
            "entropy-bounded",
            "--steps",
            "128",
            "--entropy-bound",
            "0.1",
        ],
    ),
    (
        "entropy-bounded",
        &[
            "--sampler",
            "entropy-bounded",
            "--steps",
            "128",
            "--entropy-bound",
            "0.5",
        ],
    ),
    (
        "entropy-bounded",
        &[
            "--sampler",
            "entropy-bounded",
            "--steps",
            "128",
            "--entropy-bound",
            "2",
        ],
    ),
    (
        "entropy-bounded",
        &[
            "--sampler",
            "entropy-bounded",
            "--steps",
            "128",
            "--entropy-bound",
            "8",
        ],
    ),
    (
        "remask",
        &["--sampler", "remask", "--steps", "64", "--remask-rate", "0.02"],
    ),
    (
        "remask",
        &["--sampler", "remask", "--steps", "256", "--remask-rate", "0.005"],
    ),
    (
        "remask",
        &["--sampler", "remask", "--steps", "256", "--remask-rate", "0.02"],
    ),
    (
        "remask",
        &["--sampler", "remask", "--steps", "256", "--remask-rate", "0.05"],
    ),
];

/// What one setting came to, or held-out text.
struct Row {
    sampler: String,
    options: String,
    nfe: Option<f64>,
    judged: [f64; 2],
    entropy: [f64; 2],
    distinct: [f64; 2],
}

impl Row {
    fn read(sampler: &str, options: &str, nfe: Option<f64>, measured: &Value) -> Result<Self> {
        let number = |value: &Value| value.as_f64().with_context(|| format!("no number in {measured}"));
        let pair = |of: &str| -> Result<[f64; 2]> {
            let value = &measured[of];
            Ok([
                number(&value["mean"])?,
                value["standard_error"].as_f64().unwrap_or(0.0),
            ])
        };
        Ok(Self {
            sampler: sampler.to_owned(),
            options: options.to_owned(),
            nfe,
            judged: pair("judge_bits_per_byte")?,
            entropy: pair("token_entropy_nats")?,
            distinct: [
                number(&measured["distinct"][1])?,
                number(&measured["distinct"][2])?,
            ],
        })
    }

    fn line(&self) -> String {
        let nfe = self.nfe.map_or_else(String::new, |nfe| format!("{nfe:.1}"));
        let Self {
            sampler,
            options,
            judged,
            entropy,
            distinct,
            ..
        } = self;
        format!(
            "| {sampler} | {options} | {nfe} | {:.3} ± {:.3} | {:.3} ± {:.3} | {:.2}, {:.2} |\n",
            judged[0], judged[1], entropy[0], entropy[1], distinct[0], distinct[1]
        )
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    for needed in [
        &arguments.judge,
        &arguments.text,
        &arguments.programs.join("denoised"),
    ] {
        if !needed.is_file() {
            eprintln!(
                "SKIPPED: {} is not there (see the top of this file)",
                needed.display()
            );
            return Ok(());
        }
    }
    let work = Path::new(env!("CARGO_TARGET_TMPDIR")).join("samplers");
    fs::create_dir_all(&work)?;
    let mut rows = Vec::new();
    for (index, (sampler, options)) in SETTINGS.into_iter().enumerate() {
        let written = work.join(format!("{index}.jsonl"));
        let shown = options
            .iter()
            .filter(|option| !option.starts_with("--sampler") && **option != sampler);
        let shown = shown.copied().collect::<Vec<_>>().join(" ");
        let (held_out, known) = (index == 0, work.join(format!("{index}.json")));
        let measured = if arguments.resume && known.is_file() {
            serde_json::from_slice(&fs::read(known)?)?
        } else {
            draw(&arguments, options, &written)?;
            let measured = measure(&arguments, &written, held_out)?;
            fs::write(known, measured.to_string())?;
            measured
        };
        if held_out {
            rows.push(Row::read("held-out text", "", None, &measured["held_out"])?);
        }
        rows.push(Row::read(
            sampler,
            &shown,
            measured["nfe"].as_f64(),
            &measured["samples"],
        )?);
        print!("{}", rows.last().map(Row::line).unwrap_or_default());
    }
    let mut table = format!(
        "Demo model, {} samples of 128 tokens each, at the model's own temperature and top-p, seed 1; errors are standard errors over samples. \
         Bits per byte are those of a language model that reads the text (SmolLM2-135M); lower is more predictable, \
         which is better only where entropy and distinct n-grams stay near held-out text's.\n\n\
         | sampler | options | evaluations | bits per byte | token entropy, nats | distinct pairs, triples |\n\
         |---|---|---|---|---|---|\n",
        arguments.samples
    );
    for row in &rows {
        write!(table, "{}", row.line())?;
    }
    fs::write(arguments.out.join("measured.md"), table)?;
    plot(&arguments.out.join("measured.svg"), &rows)
}

/// Has the server's engine draw into `file`.
fn draw(arguments: &Arguments, options: &[&str], file: &Path) -> Result<()> {
    let mut generate = Command::new(arguments.programs.join("denoised"));
    generate.args(["generate", "--seed", "1", "--json", "--num-samples"]);
    generate.arg(arguments.samples.to_string()).args(options);
    let status = generate.stdout(fs::File::create(file)?).status()?;
    ensure!(status.success(), "{options:?}: {status}");
    Ok(())
}

/// What `training evaluate --written` says of `file`.
fn measure(arguments: &Arguments, file: &Path, held_out: bool) -> Result<Value> {
    let mut evaluate = Command::new(arguments.programs.join("training"));
    evaluate.args(["evaluate", "--json", "--bundle"]);
    evaluate.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("demo/world-english/1"));
    evaluate
        .arg("--written")
        .arg(file)
        .arg("--judge")
        .arg(&arguments.judge);
    if held_out {
        evaluate.arg("--text").arg(&arguments.text);
    }
    let output = evaluate.output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {said}", file.display());
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// A number of a row, and its standard error.
type Quantity = fn(&Row) -> [f64; 2];

/// Evaluations against bits per byte and token entropy, one above the other, with standard errors.
fn plot(path: &Path, rows: &[Row]) -> Result<()> {
    let area = SVGBackend::new(path, (820, 760)).into_drawing_area();
    area.fill(&WHITE)?;
    let names: Vec<&str> = SETTINGS.iter().map(|(name, _)| *name).collect();
    let mut series: Vec<&str> = Vec::new();
    for name in names {
        if !series.contains(&name) {
            series.push(name);
        }
    }
    let parts = area.split_evenly((2, 1));
    let quantities: [(&str, Quantity); 2] = [
        ("judge, bits per byte", |row| row.judged),
        ("token entropy, nats", |row| row.entropy),
    ];
    for (part, (title, of)) in parts.iter().zip(quantities) {
        let ends = |row: &Row| [of(row)[0] - of(row)[1], of(row)[0] + of(row)[1]];
        let low = rows.iter().map(|row| ends(row)[0]).fold(f64::INFINITY, f64::min);
        let high = rows.iter().map(|row| ends(row)[1]).fold(0.0, f64::max);
        let margin = 0.08 * (high - low);
        let mut chart = ChartBuilder::on(part)
            .margin(12)
            .x_label_area_size(34)
            .y_label_area_size(52)
            .build_cartesian_2d((8.0..300.0_f64).log_scale(), low - margin..high + margin)?;
        chart
            .configure_mesh()
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .x_labels(6)
            .x_label_formatter(&|x| format!("{x:.0}"))
            .x_desc("evaluations of the network")
            .y_desc(title)
            .draw()?;
        for row in rows.iter().filter(|row| row.nfe.is_none()) {
            let level = of(row)[0];
            chart
                .draw_series(LineSeries::new([(8.0, level), (300.0, level)], BLACK.mix(0.5)))?
                .label(row.sampler.as_str())
                .legend(|(x, y)| PathElement::new([(x, y), (x + 16, y)], BLACK.mix(0.5)));
        }
        for (index, name) in series.iter().enumerate() {
            let color = Palette99::pick(index).mix(1.0);
            let points: Vec<(f64, [f64; 2])> = rows
                .iter()
                .filter(|row| row.sampler == *name)
                .filter_map(|row| Some((row.nfe?, of(row))))
                .collect();
            chart.draw_series(
                points
                    .iter()
                    .map(|&(x, [y, error])| PathElement::new([(x, y - error), (x, y + error)], color)),
            )?;
            if points.is_sorted_by(|a, b| a.0 < b.0) {
                let line = points.iter().map(|&(x, [y, _])| (x, y));
                chart.draw_series(LineSeries::new(line, color.mix(0.4)))?;
            }
            chart
                .draw_series(
                    points
                        .iter()
                        .map(|&(x, [y, _])| Circle::new((x, y), 4, color.filled())),
                )?
                .label(*name)
                .legend(move |(x, y)| Circle::new((x + 8, y), 4, color.filled()));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .background_style(WHITE.mix(0.9))
            .draw()?;
    }
    area.present()?;
    Ok(())
}
