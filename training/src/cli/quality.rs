//! `training evaluate --samples`: what a network writes, in numbers.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, ensure};
use clap::Args;
use denoised::bundle::{Bundle, Defaults, TextTokenizer};
use denoised::diffusion::{SamplerKind, Token, TokenChoice};
use serde::Deserialize;
use serde_json::{Value, json};
use training::config::RunConfig;
use training::evaluate::bound::Served;
use training::evaluate::quality::{Variety, spread};
use training::evaluate::samples::Sampling;
use training::fit::checkpoint::Which;
use training::loss::Objective;

use super::evaluate::{encode, tokenizer_of};
use super::readers::{Quality, Readers, Written};
use super::run::Run;

/// Samples at most, and steps of one: what is drawn and measured is held in memory.
const MAX_SAMPLES: usize = 10_000;
const MAX_STEPS: u32 = 100_000;
/// Temperatures at most, each of which takes as long as one.
const MAX_TEMPERATURES: usize = 20;

/// How samples are drawn and who reads them.
#[derive(Debug, Args)]
pub(crate) struct SampleArguments {
    /// Draw this many samples and measure these instead of the bound, next to as much held-out text.
    #[arg(long, value_name = "N", conflicts_with_all = ["draws", "baselines"])]
    pub(super) samples: Option<usize>,
    /// Measure what `denoised generate --json` printed instead of samples of one's own: a server's, with any sampler.
    #[arg(long, value_name = "FILE", requires = "bundle", conflicts_with_all = ["samples", "draws"])]
    pub(super) written: Option<PathBuf>,
    /// Steps of a sample.
    #[arg(long, value_name = "S", default_value = "64", requires = "samples")]
    steps: NonZeroU32,
    /// Temperature of samples; 0 takes the likeliest token. Several, with commas between, give a line each: how fluency
    /// is bought with variety.
    #[arg(
        long,
        value_name = "T",
        default_value = "1",
        value_delimiter = ',',
        requires = "samples"
    )]
    temperature: Vec<f64>,
    /// Keep the likeliest tokens until they hold this share of the probability.
    #[arg(long, value_name = "P", requires = "samples")]
    top_p: Option<f64>,
    /// Look for the temperature at which samples have the token entropy of the text, and say it as a bundle's
    /// defaults: less is collapse.
    #[arg(long, requires = "samples", conflicts_with = "temperature")]
    match_entropy: bool,
    /// A language model that reads the samples, as GGUF (`make judge` fetches SmolLM2; needs the feature `judge`).
    #[arg(long, value_name = "FILE")]
    judge: Option<PathBuf>,
    /// The text that the network learned from: also tell which share of the words occurs in it, and of the runs of
    /// eight words.
    #[arg(long, value_name = "FILE", num_args = 1..)]
    training_text: Vec<PathBuf>,
}

/// What is asked beside how samples are drawn.
pub(super) struct Asked<'a> {
    pub(super) config: Option<&'a Path>,
    pub(super) checkpoint: Which,
    pub(super) bundle: Option<&'a Path>,
    /// Text to compare with, instead of what the run held out.
    pub(super) documents: Option<Vec<String>>,
    pub(super) seed: u64,
    pub(super) threads: usize,
    pub(super) json: bool,
}

/// A line of `denoised generate --json`; other lines have no result.
#[derive(Deserialize)]
struct Line {
    result: Option<Finished>,
}

#[derive(Deserialize)]
struct Finished {
    tokens: Vec<Token>,
    nfe: u64,
}

/// The results in `file`.
fn finished(file: &Path) -> Result<Vec<Finished>> {
    let of = |line: &str| -> Result<Option<Finished>> { Ok(serde_json::from_str::<Line>(line)?.result) };
    let lines = BufReader::new(File::open(file).with_context(|| file.display().to_string())?).lines();
    let results = lines.zip(1..).filter_map(|(line, number)| {
        let result = line.map_err(Into::into).and_then(|line| of(&line));
        let result = result.with_context(|| format!("{}, line {number}", file.display()));
        result.transpose()
    });
    let results: Vec<Finished> = results.take(MAX_SAMPLES + 1).collect::<Result<_>>()?;
    ensure!(
        (1..=MAX_SAMPLES).contains(&results.len()),
        "{} holds {} results, must be 1 to {MAX_SAMPLES}",
        file.display(),
        results.len()
    );
    Ok(results)
}

/// Measures what a server wrote, next to as much text.
pub(super) fn written(
    arguments: &SampleArguments,
    file: &Path,
    bundle: &Path,
    asked: Asked<'_>,
) -> Result<()> {
    let mut readers = Readers::of(arguments.judge.as_deref(), &arguments.training_text)?;
    let results = finished(file)?;
    let count = results.len();
    let evaluations = results.iter().map(|result| result.nfe).sum::<u64>() as f64 / count as f64;
    let bundle_directory = bundle;
    let bundle = Bundle::open(bundle_directory)?;
    let tokenizer = tokenizer_of(&bundle, bundle_directory)?;
    let decode = |tokens: &[Token]| Ok(tokenizer.decode(tokens)?);
    let sequences = results.into_iter().map(|result| result.tokens).collect();
    let samples = Quality::of(&Written::decode(sequences, decode)?, &mut readers)?;
    let samples = samples.context("there are no samples")?;
    let held_out = match asked.documents {
        Some(documents) => {
            let text = encode(&bundle, &tokenizer, &documents)?;
            let text = Written::decode(spread(&text.sequences, count), decode)?;
            Quality::of(&text, &mut readers)?
        }
        None => None,
    };
    let settings = json!({"nfe": evaluations});
    if !asked.json {
        println!("{evaluations:.1} evaluations a sample");
    }
    print(&samples, held_out.as_ref(), settings, asked.json)
}

/// One JSON object with `settings`, or a line each.
fn print(samples: &Quality, held_out: Option<&Quality>, settings: Value, json: bool) -> Result<()> {
    if json {
        let mut object = settings;
        object["samples"] = samples.json()?;
        object["held_out"] = held_out.map(Quality::json).transpose()?.into();
        println!("{}", serde_json::to_string(&object)?);
        return Ok(());
    }
    println!("{}", samples.line("samples"));
    print_held_out(held_out);
    Ok(())
}

fn print_held_out(held_out: Option<&Quality>) {
    match held_out {
        Some(held_out) => println!("{}", held_out.line("held-out text")),
        None => println!("held-out text: none to compare with (--text)"),
    }
}

pub(super) fn run(arguments: &SampleArguments, count: usize, asked: &Asked<'_>) -> Result<()> {
    ensure!(
        (1..=MAX_SAMPLES).contains(&count),
        "--samples is {count}, must be 1 to {MAX_SAMPLES}"
    );
    let SampleArguments { steps, top_p, .. } = *arguments;
    let mut temperatures = arguments.temperature.clone();
    ensure!(
        (1..=MAX_TEMPERATURES).contains(&temperatures.len()),
        "--temperature names {} temperatures, must be 1 to {MAX_TEMPERATURES}",
        temperatures.len()
    );
    ensure!(
        steps.get() <= MAX_STEPS,
        "--steps is {steps}, must be at most {MAX_STEPS}"
    );
    for temperature in &temperatures {
        ensure!(
            temperature.is_finite() && *temperature >= 0.0,
            "--temperature is {temperature}, must be finite and not negative"
        );
    }
    ensure!(
        top_p.is_none_or(|p| p > 0.0 && p <= 1.0),
        "--top-p must be above 0 and at most 1"
    );
    let mut readers = Readers::of(arguments.judge.as_deref(), &arguments.training_text)?;
    let source = match (asked.config, asked.bundle) {
        (Some(config), _) => Source::of_run(Run::open(&RunConfig::read(config)?, asked.checkpoint)?)?,
        (None, Some(bundle)) => Source::of_bundle(bundle)?,
        (None, None) => return Err(anyhow!("neither a run nor --bundle is given")),
    };
    let held_out = source.held_out(asked.documents.as_deref(), count)?;
    let mut sampling = Sampling {
        objective: source.objective(),
        prompt: &[],
        length: source.length(),
        count,
        steps: steps.get(),
        choice: TokenChoice {
            top_p,
            ..TokenChoice::default()
        },
        seed: asked.seed,
        threads: asked.threads,
    };
    if arguments.match_entropy {
        let text = held_out.as_ref().and_then(|text| Variety::of(&text.sequences));
        let wanted = text.context("--match-entropy needs text to match (--text)")?;
        let entropy = |temperature| {
            sampling.choice.temperature = temperature;
            let samples = Variety::of(&source.draw(&sampling)?).context("there are no samples")?;
            if !asked.json {
                println!("temperature {temperature}: {samples}");
            }
            Ok(samples.token_entropy_nats.mean)
        };
        temperatures = vec![matching(wanted.token_entropy_nats.mean, entropy)?];
    }
    let held_out = match held_out {
        Some(written) => Quality::of(&written, &mut readers)?,
        None => None,
    };
    let mut measure = |temperature: f64| -> Result<Quality> {
        sampling.choice.temperature = temperature;
        let samples = source.decode(source.draw(&sampling)?)?;
        Quality::of(&samples, &mut readers)?.context("there are no samples")
    };
    let [temperature] = temperatures[..] else {
        let settings = json!({"steps": steps, "top_p": top_p, "seed": asked.seed});
        return frontier(&temperatures, measure, held_out.as_ref(), settings, asked.json);
    };
    let samples = measure(temperature)?;
    let defaults = Defaults {
        sampler: Some(SamplerKind::Tweedie),
        steps: Some(steps.get()),
        temperature: Some(temperature),
        top_p,
        length: None,
    };
    let settings = json!({
        "steps": steps, "temperature": temperature, "top_p": top_p,
        "seed": asked.seed, "defaults": defaults,
    });
    print(&samples, held_out.as_ref(), settings, asked.json)?;
    if arguments.match_entropy && !asked.json {
        println!(
            "as defaults: training export --defaults '{}'",
            serde_json::to_string(&defaults)?
        );
    }
    Ok(())
}

/// What `measure` finds at each of several temperatures, as soon as it does; one JSON object with `settings`, or a line each.
fn frontier(
    temperatures: &[f64],
    mut measure: impl FnMut(f64) -> Result<Quality>,
    held_out: Option<&Quality>,
    mut settings: Value,
    json: bool,
) -> Result<()> {
    let mut points = Vec::new();
    for &temperature in temperatures {
        let samples = measure(temperature)?;
        if json {
            points.push(json!({"temperature": temperature, "samples": samples.json()?}));
        } else {
            println!("{}", samples.line(&format!("temperature {temperature}")));
        }
    }
    if json {
        settings["frontier"] = points.into();
        settings["held_out"] = held_out.map(Quality::json).transpose()?.into();
        println!("{}", serde_json::to_string(&settings)?);
    } else {
        print_held_out(held_out);
    }
    Ok(())
}

/// Temperatures between which the one is looked for that gives samples the entropy of text.
const TEMPERATURES: [f64; 2] = [0.3, 1.5];
/// How near the entropies have to be to each other: the first temperature that is tried and near enough is taken.
const NEAR: f64 = 0.03;
/// Temperatures that are tried.
const TRIES: usize = 9;

/// The temperature at which `entropy` is `wanted`, which it rises towards.
fn matching(wanted: f64, mut entropy: impl FnMut(f64) -> Result<f64>) -> Result<f64> {
    let [mut low, mut high] = TEMPERATURES;
    let mut nearest: Option<(f64, f64)> = None;
    for _ in 0..TRIES {
        let temperature = (50.0 * (low + high)).round() / 100.0;
        let difference = entropy(temperature)? / wanted - 1.0;
        if nearest.is_none_or(|(least, _)| difference.abs() < least) {
            nearest = Some((difference.abs(), temperature));
        }
        if difference.abs() < NEAR || high - low < 0.02 {
            break;
        }
        if difference < 0.0 {
            low = temperature;
        } else {
            high = temperature;
        }
    }
    let (difference, temperature) = nearest.context("nothing was tried")?;
    ensure!(
        difference < NEAR,
        "no temperature from {low} to {high} gives the samples the entropy of the text: {temperature} is \
         {:.1} % off; more steps or another --top-p may help",
        100.0 * difference
    );
    Ok(temperature)
}

/// What is sampled.
enum Source {
    Run(Box<Run>, Box<tokenizers::Tokenizer>),
    Bundle(Box<Bundle>, Box<TextTokenizer>),
}

impl Source {
    fn of_run(run: Run) -> Result<Self> {
        let tokenizer = run.tokenizer()?;
        Ok(Self::Run(Box::new(run), Box::new(tokenizer)))
    }

    fn of_bundle(directory: &Path) -> Result<Self> {
        let bundle = Bundle::open(directory)?;
        let tokenizer = tokenizer_of(&bundle, directory)?;
        Ok(Self::Bundle(Box::new(bundle), Box::new(tokenizer)))
    }

    fn objective(&self) -> Objective {
        match self {
            Self::Run(run, _) => run.objective(),
            Self::Bundle(bundle, _) => Served::objective(bundle.manifest()),
        }
    }

    fn length(&self) -> usize {
        match self {
            Self::Run(run, _) => run.network.config().length,
            Self::Bundle(bundle, _) => bundle.manifest().max_length,
        }
    }

    fn draw(&self, sampling: &Sampling) -> Result<Vec<Vec<Token>>> {
        Ok(match self {
            Self::Run(run, _) => sampling.draw(&|| Ok(&run.network))?,
            Self::Bundle(bundle, _) => sampling.draw(&|| Served::load(bundle))?,
        })
    }

    fn decode(&self, sequences: Vec<Vec<Token>>) -> Result<Written> {
        Written::decode(sequences, |tokens| match self {
            Self::Run(_, tokenizer) => tokenizer
                .decode(tokens, true)
                .map_err(|error| anyhow!("cannot decode a sample: {error}")),
            Self::Bundle(_, tokenizer) => Ok(tokenizer.decode(tokens)?),
        })
    }

    /// `count` sequences of `documents`, or else of what the run held out.
    fn held_out(&self, documents: Option<&[String]>, count: usize) -> Result<Option<Written>> {
        let text = match (self, documents) {
            (Self::Run(run, _), Some(documents)) => run.encode(documents)?,
            (Self::Run(run, _), None) => run.held_out()?,
            (Self::Bundle(bundle, tokenizer), Some(documents)) => encode(bundle, tokenizer, documents)?,
            (Self::Bundle(..), None) => return Ok(None),
        };
        self.decode(spread(&text.sequences, count)).map(Some)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn the_temperature_is_found_at_which_entropies_agree() {
        let mut tried = Vec::new();
        let found = matching(4.0, |temperature| {
            tried.push(temperature);
            Ok(3.0 + temperature)
        });
        assert!(
            (found.unwrap() - 1.0).abs() < NEAR * 4.0 && tried.len() < TRIES,
            "{tried:?}"
        );
        // Samples of a network that only repeats itself have no temperature that helps.
        let error = matching(4.0, |_| Ok(2.0)).unwrap_err().to_string();
        assert!(error.contains("50.0 % off"), "{error}");
    }
}
