//! Fine schedules beside the strongest loop that others have for them: MDLM's `ddpm_cache`, which evaluates its network
//! only after steps in which a token changed, in float32, 8 bits and bfloat16.

use std::path::Path;

use anyhow::Result;
use serde_json::{Value, json};

use crate::engine::Subject;
use crate::pytorch::Loop;
use crate::{HIT_TIME_STEPS, quartiles, show};

const LENGTH: usize = 128;
/// Steps of the reference loop that are run: each costs the same, and all of them would take minutes.
const REFERENCE_STEPS: u32 = 8;
const MODELS: [&str; 2] = ["demo-shape", "small-shape"];
/// How PyTorch runs the network.
const MODES: [&str; 3] = ["float32", "int8", "bfloat16"];

/// Measures the bundles `<models>/<name>/1` and `<models>/<name>-int8/1`, in turns with PyTorch.
pub(crate) fn run(models: &Path, python: Option<&Path>, threads: usize, turns: usize) -> Result<Value> {
    println!("\n{HIT_TIME_STEPS} steps, {LENGTH} tokens, {threads} threads, seconds");
    let mut numbers = Vec::new();
    for name in MODELS {
        let bundles = [("float32", name.to_owned()), ("int8", format!("{name}-int8"))];
        let mut ours = Vec::new();
        for (storage, folder) in bundles {
            let bundle = models.join(folder).join("1");
            if bundle.is_dir() {
                ours.push((storage, Subject::load(&bundle, threads)?, Vec::new()));
            } else {
                eprintln!("SKIPPED: {} is not there (make bench)", bundle.display());
            }
        }
        let checkpoint = models.join(format!("{name}.checkpoint"));
        let mut theirs = Vec::new();
        for mode in python.map_or(&[][..], |_| &MODES) {
            if let Some(python) = python {
                let torch = Loop::start_as(python, &checkpoint, threads, "cpu", mode)?;
                theirs.push((*mode, torch, Vec::new()));
            }
        }
        let mut reference = Vec::new();
        // The first turn warms up.
        for turn in 0..=turns as u64 {
            for (_, subject, times) in &mut ours {
                let time = subject.generate(LENGTH, HIT_TIME_STEPS, true, turn)?;
                times.push((time.total, time.nfe));
            }
            for (mode, torch, times) in &mut theirs {
                if *mode == "float32" {
                    let seconds = torch.generate(LENGTH, REFERENCE_STEPS)?;
                    reference.push(seconds * f64::from(HIT_TIME_STEPS + 1) / f64::from(REFERENCE_STEPS + 1));
                }
                times.push(torch.generate_cached(LENGTH, if turn == 0 { 4 } else { HIT_TIME_STEPS })?);
            }
        }
        let of_turns = |times: &[(f64, u32)]| {
            let seconds = quartiles(times[1..].iter().map(|(seconds, _)| *seconds).collect());
            let nfe = quartiles(times[1..].iter().map(|(_, nfe)| f64::from(*nfe)).collect());
            (seconds, nfe[0])
        };
        println!("  {name}");
        let mut row = json!({"model": name, "length": LENGTH, "steps": HIT_TIME_STEPS});
        for (storage, _, times) in &ours {
            let (seconds, nfe) = of_turns(times);
            println!("    {storage}: {}, {nfe:.0} evaluations", show(seconds));
            row["ours"][storage] = json!({"seconds": seconds, "nfe": nfe});
        }
        // Of the same turn.
        let ratios = |theirs: &[f64], ours: &[(f64, u32)]| {
            quartiles(
                theirs
                    .iter()
                    .zip(ours)
                    .skip(1)
                    .map(|(theirs, ours)| theirs / ours.0)
                    .collect(),
            )
        };
        let mut compare = |what: &str, seconds: &[f64], nfe: f64| {
            println!(
                "    PyTorch, {what}: {}, {nfe:.0} evaluations",
                show(quartiles(seconds[1..].to_vec()))
            );
            for (storage, _, times) in &ours {
                let ratios = ratios(seconds, times);
                println!("      {} times as long as {storage} here", show(ratios));
                row["pytorch"][what][storage] = json!({"times_as_long": ratios, "nfe": nfe});
            }
        };
        if !reference.is_empty() {
            let what = format!("the reference loop, by its time for {REFERENCE_STEPS} steps");
            compare(&what, &reference, f64::from(HIT_TIME_STEPS + 1));
        }
        for (mode, _, times) in &theirs {
            let seconds: Vec<f64> = times.iter().map(|(seconds, _)| *seconds).collect();
            compare(&format!("ddpm_cache, {mode}"), &seconds, of_turns(times).1);
        }
        numbers.push(row);
    }
    Ok(Value::Array(numbers))
}
