//! What two hundred requests give, recorded: tokens are a promise to whoever keeps a seed.
//!
//! All samplers, both graphs and both parameterizations, with temperatures, top-k, top-p, clamped tokens and
//! normalised scores. Results, steps of commitment and evaluations are hashed, request by request; a change
//! of any is a change of every user's samples and belongs into the changelog.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::fmt::Write;

use sha2::{Digest, Sha256};

use super::plan::Sampling;
use super::tests::{end, manifest, options, sentences};
use super::*;
use crate::bundle::Manifest;
use crate::diffusion::Parameterization;
use crate::diffusion::sampler::TimeGrid;
use crate::diffusion::{GraphKind, SamplerKind, Token, TokenChoice};
use crate::models::NetworkSource;
use crate::network::closed_form::ClosedForm;

const LENGTH: usize = 6;

fn models() -> [Arc<ServedModel>; 3] {
    [
        (GraphKind::Absorbing, Parameterization::Score),
        (GraphKind::Absorbing, Parameterization::Mean),
        (GraphKind::Uniform, Parameterization::Score),
    ]
    .map(|(graph, parameterization)| {
        let manifest = Manifest {
            parameterization,
            ..manifest(graph)
        };
        let noise = manifest.graph();
        let network: NetworkSource = Box::new(move || Ok(Box::new(ClosedForm::new(noise, sentences()))));
        Arc::new(ServedModel::without_bundle(manifest, 1, network))
    })
}

fn request(models: &[Arc<ServedModel>; 3], number: u32) -> Request {
    let model = &models[(number % 3) as usize];
    let absorbing = model.manifest().graph == GraphKind::Absorbing;
    let sampler = match (number / 3 % 6, absorbing) {
        (0, _) | (2 | 4, false) => SamplerKind::Tweedie,
        (1, _) | (3 | 5, false) => SamplerKind::Euler,
        (2, true) => SamplerKind::FirstHitting,
        (3, true) => SamplerKind::Confidence,
        (4, true) => SamplerKind::EntropyBounded {
            bound: f64::from(number % 5) * 0.3,
        },
        (_, _) => SamplerKind::Remask {
            rate: f64::from(number % 4) * 0.3,
        },
    };
    let clamped = |position: usize| number.is_multiple_of(5) && position % 3 == (number as usize / 5) % 3;
    Request {
        id: format!("pinned-{number}"),
        caller: Caller::new("pinned"),
        model: Arc::clone(model),
        template: (0..LENGTH)
            .map(|position| clamped(position).then_some(position as Token % 4))
            .collect(),
        sampling: Sampling {
            grid: TimeGrid::new(1 + number * 7 % 23),
            sampler,
            choice: TokenChoice {
                temperature: f64::from(number % 4) * 0.5,
                top_k: number.is_multiple_of(7).then_some(1 + number % 3),
                top_p: number.is_multiple_of(4).then_some(0.9),
            },
            normalize: absorbing && number / 18 % 2 == 1,
        },
        seed: u64::from(number) * 1_000_003,
        canvases: 1 + number % 3,
        publish: Publish::Steps,
        deadline: None,
        priority: 0,
        resume: Resume::default(),
        allowed: None,
        draft: None,
    }
}

/// The number of a request and the start of the hash of all that its canvases ended with.
fn recorded() -> String {
    let engine = Engine::start(options(2)).unwrap();
    let models = models();
    let mut record = String::new();
    for number in 0..200 {
        let mut generation = engine.admit(request(&models, number)).unwrap();
        let mut hash = Sha256::new();
        for receiver in &mut generation.canvases {
            let state = end(receiver);
            let Phase::Done(_) = &state.phase else {
                panic!("request {number}: {:?}", state.phase);
            };
            for value in state
                .tokens
                .iter()
                .chain(state.committed_at.iter())
                .chain([&state.nfe])
            {
                hash.update(value.to_le_bytes());
            }
        }
        let hash = hash.finalize();
        writeln!(
            record,
            "{number} {:02x}{:02x}{:02x}{:02x}",
            hash[0], hash[1], hash[2], hash[3]
        )
        .unwrap();
    }
    record
}

#[test]
fn two_hundred_requests_give_what_they_gave() {
    let record = recorded();
    let changed: Vec<&str> = record
        .lines()
        .zip(include_str!("pinned.txt").lines())
        .filter(|(now, before)| now != before)
        .map(|(now, _)| now)
        .collect();
    assert!(
        changed.is_empty() && record.lines().count() == include_str!("pinned.txt").lines().count(),
        "{} of the requests give other results: {changed:?}; all of them now:\n{record}",
        changed.len()
    );
}
