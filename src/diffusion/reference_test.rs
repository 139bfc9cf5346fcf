//! Every number of `tests/fixtures/math.json`, which the paper authors' implementation produced in f64.
#![expect(clippy::unwrap_used, reason = "tests")]

use serde::Deserialize;

use super::sampler::Discretization;
use super::{Graph, GraphKind, RowLaw, Schedule, Token, score_entropy};

#[derive(Deserialize)]
struct Fixture {
    noise: Vec<Noise>,
    graph: Vec<Case>,
}

#[derive(Deserialize)]
struct Noise {
    schedule: String,
    params: serde_json::Value,
    t: Vec<f64>,
    total_noise: Vec<f64>,
    rate_noise: Vec<f64>,
}

#[derive(Deserialize)]
struct Case {
    graph: String,
    dim: usize,
    sigma: f64,
    dsigma: f64,
    x0: Vec<Token>,
    x: Vec<Token>,
    log_score: Vec<Vec<f64>>,
    transp_rate: Vec<Vec<f64>>,
    reverse_rate: Vec<Vec<f64>>,
    transp_transition_dsigma: Vec<Vec<f64>>,
    staggered_score_dsigma: Vec<Vec<f64>>,
    tweedie_step_weights: Vec<Vec<f64>>,
    score_entropy: Vec<f64>,
}

fn fixture() -> Fixture {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/math.json");
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// 1e-9 relative, absolute near 0.
#[track_caller]
fn close(ours: f64, theirs: f64) {
    let tolerance = 1e-9 * theirs.abs().max(1e-3);
    assert!((ours - theirs).abs() <= tolerance, "{ours} is not {theirs}");
}

#[track_caller]
fn rows_close(ours: &[f64], theirs: &[f64]) {
    assert_eq!(ours.len(), theirs.len());
    ours.iter().zip(theirs).for_each(|(a, b)| close(*a, *b));
}

#[test]
fn schedules_agree() {
    let noise = fixture().noise;
    assert_eq!(noise.len(), 3);
    for case in noise {
        let parameter = |name: &str| case.params[name].as_f64().unwrap();
        let schedule = match case.schedule.as_str() {
            "loglinear" => Schedule::LogLinear {
                eps: parameter("eps"),
            },
            _ => Schedule::Geometric {
                sigma_min: parameter("sigma_min"),
                sigma_max: parameter("sigma_max"),
            },
        };
        for (i, &t) in case.t.iter().enumerate() {
            close(schedule.total_noise(t), case.total_noise[i]);
            close(schedule.rate(t), case.rate_noise[i]);
        }
    }
}

#[test]
fn graphs_tweedie_weights_and_score_entropy_agree() {
    let cases = fixture().graph;
    assert_eq!(cases.len(), 40);
    for case in &cases {
        let kind = if case.graph == "absorb" {
            GraphKind::Absorbing
        } else {
            GraphKind::Uniform
        };
        let graph = Graph::new(kind, case.dim);
        let mut row = vec![0.0; case.dim];
        for (i, &x) in case.x.iter().enumerate() {
            let score: Vec<f64> = case.log_score[i].iter().map(|l| l.exp()).collect();
            graph.transp_rate(x, &mut row);
            rows_close(&row, &case.transp_rate[i]);
            graph.reverse_rate(x, &score, &mut row);
            rows_close(&row, &case.reverse_rate[i]);
            graph.transp_transition(x, case.dsigma, &mut row);
            rows_close(&row, &case.transp_transition_dsigma[i]);
            graph.staggered_score(&score, case.dsigma, &mut row);
            rows_close(&row, &case.staggered_score_dsigma[i]);
            rows_close(
                &tweedie_weights(&graph, x, &score, case.dsigma),
                &case.tweedie_step_weights[i],
            );
            close(
                score_entropy::denoising(&graph, &case.log_score[i], x, case.x0[i], case.sigma),
                case.score_entropy[i],
            );
        }
    }
}

/// The affine row law written out as a row; unmasked tokens of an absorbing graph stay.
fn tweedie_weights(graph: &Graph, x: Token, score: &[f64], dsigma: f64) -> Vec<f64> {
    let at = x as usize;
    if graph.mask().is_some_and(|mask| mask != x) {
        return (0..score.len()).map(|y| f64::from(u8::from(y == at))).collect();
    }
    let law = step_over(graph, dsigma);
    let total: f64 = score
        .iter()
        .enumerate()
        .filter(|&(y, _)| y != at)
        .map(|(_, s)| s)
        .sum();
    let mut weights: Vec<f64> = score.iter().map(|&s| law.move_weight(s, total)).collect();
    weights[at] = law.stay_weight(total);
    weights
}

/// A Tweedie step over exactly `dsigma`: from the time where the total noise is `dsigma` down to 0.
fn step_over(graph: &Graph, dsigma: f64) -> RowLaw {
    let schedule = Schedule::LogLinear { eps: 1e-9 };
    let t = schedule.time(dsigma);
    super::sampler::Tweedie.step(graph, &schedule, t, t)
}
