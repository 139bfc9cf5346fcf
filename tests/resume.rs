//! A request goes on from any frame, on any server, byte for byte; states that cannot be harm nobody.

use denoised::bundle::Manifest;
use denoised::diffusion::{Graph, GraphKind};
use denoised::models::NetworkSource;
use denoised::network::closed_form::ClosedForm;
use denoised::proto::v1::frame::Content;
use denoised::proto::v1::sampling::Sampler;
use denoised::proto::v1::template_part::Part;
use denoised::proto::v1::{
    Draft, Frame, FramePolicy, GenerateRequest, InfillRequest, Resume, Sampling, TemplatePart, TokenList,
    draft, frame_policy,
};
use denoised::server::sampler::ALL;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config as Runs, RngAlgorithm, TestRng, TestRunner};
use tonic::Code;

use crate::support::{
    Answer, TestServer, closed_form, closed_form_manifest, config, gap, generate, infill, prompt, slowly,
};

fn every_state() -> FramePolicy {
    FramePolicy {
        when: frame_policy::When::EverySteps.into(),
        keyframes_only: true,
        ..FramePolicy::default()
    }
}

/// Two canvases of twelve positions with clamps, drafts and, where these allow it, gaps.
fn request(graph: GraphKind, sampler: Sampler, name: &str) -> InfillRequest {
    let list = |ids: &[u32]| TokenList { ids: ids.to_vec() };
    let tokens = |ids: &[u32]| Part::Tokens(list(ids));
    let draft = |ids: &[u32]| {
        Part::Draft(Draft {
            content: Some(draft::Content::Tokens(list(ids))),
        })
    };
    let part = |part| TemplatePart { part: Some(part) };
    let template = match graph {
        GraphKind::Absorbing => vec![draft(&[0, 4]), gap(3), tokens(&[1, 2]), gap(4), tokens(&[3])],
        GraphKind::Uniform => vec![
            draft(&[0, 1, 2, 3, 4]),
            tokens(&[1, 2]),
            draft(&[4; 4]),
            tokens(&[3]),
        ],
    };
    InfillRequest {
        template: template.into_iter().map(part).collect(),
        sampling: Some(Sampling {
            sampler: Some(sampler),
            steps: (name != "first_hitting").then_some(9),
            num_samples: Some(2),
            seed: Some(77),
            temperature: Some(0.9),
            top_p: Some(0.95),
            start_time: Some(0.8),
            ..Sampling::default()
        }),
        frames: Some(every_state()),
        ..InfillRequest::default()
    }
}

fn resume(of: &Answer, frames: Vec<Frame>, finished: Vec<u32>) -> InfillRequest {
    InfillRequest {
        resume: Some(Resume {
            accepted: of.accepted.clone(),
            frames,
            finished,
        }),
        frames: Some(every_state()),
        ..InfillRequest::default()
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Canvas, tokens, steps and log-probabilities of their commits, evaluations and seed: all that may not depend on when and where it was made.
type Facts = (u32, Vec<u32>, Vec<u32>, u32, u64);

fn facts(answer: &Answer) -> Vec<Facts> {
    let mut facts: Vec<_> = answer
        .results
        .iter()
        .map(|result| {
            (
                result.canvas,
                result.tokens.clone(),
                [result.committed_at.clone(), bits(&result.log_probabilities)].concat(),
                result.nfe,
                result.seed,
            )
        })
        .collect();
    facts.sort();
    facts
}

async fn uniform(slow: bool) -> TestServer {
    let manifest = Manifest {
        graph: GraphKind::Uniform,
        vocab_size: 5,
        mask_token: None,
        ..closed_form_manifest()
    };
    let graph = Graph::new(GraphKind::Uniform, 5);
    let law = [0.3, 0.25, 0.2, 0.15, 0.1];
    let network: NetworkSource =
        Box::new(move || Ok(Box::new(ClosedForm::independent(graph, &law)) as Box<_>));
    let network = if slow { slowly(3, network) } else { network };
    TestServer::with_manifest(&config(), manifest, network).await
}

#[tokio::test(flavor = "multi_thread")]
async fn every_sampler_goes_on_from_every_frame() {
    for graph in [GraphKind::Absorbing, GraphKind::Uniform] {
        // What one server began another one ends.
        let (first, second) = match graph {
            GraphKind::Absorbing => (
                // Slow enough to see every state.
                TestServer::with_network(&config(), slowly(3, closed_form())).await,
                TestServer::with_network(&config(), closed_form()).await,
            ),
            GraphKind::Uniform => (uniform(true).await, uniform(false).await),
        };
        for (name, sampler) in ALL {
            let whole = infill(&mut first.client(), request(graph, sampler, name)).await;
            let whole = match whole {
                Ok(whole) => whole,
                Err(status) => {
                    let is_refused = graph == GraphKind::Uniform && status.message().contains("absorbing");
                    assert!(is_refused, "{name}: {status:?}");
                    continue;
                }
            };
            assert!(whole.frames.len() > 8, "{name}: {}", whole.frames.len());
            for frame in &whole.frames {
                // The other canvas begins anew.
                let again = infill(&mut second.client(), resume(&whole, vec![frame.clone()], vec![]))
                    .await
                    .unwrap();
                assert_eq!(facts(&again), facts(&whole), "{name} from step {}", frame.step);
                let (told, accepted) = (again.accepted.unwrap(), whole.accepted.clone().unwrap());
                assert_eq!(
                    (told.sampling, told.template),
                    (accepted.sampling, accepted.template)
                );
                let first = again.frames.iter().find(|first| first.canvas == frame.canvas);
                assert_eq!(first.unwrap().content, frame.content, "it begins where it was");
            }
            // The last states of both, and one that has finished.
            let last = |canvas| whole.frames.iter().rfind(|frame| frame.canvas == canvas).cloned();
            let frames = vec![last(0).unwrap(), last(1).unwrap()];
            let again = infill(&mut second.client(), resume(&whole, frames, vec![]))
                .await
                .unwrap();
            assert_eq!(facts(&again), facts(&whole), "{name} from its end");
            let rest = infill(&mut second.client(), resume(&whole, vec![], vec![0]))
                .await
                .unwrap();
            assert_eq!(facts(&rest), facts(&whole)[1..], "{name}");
        }
        first.stop().await;
        second.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn text_and_its_end_come_as_they_would_have() {
    let server = TestServer::demo().await;
    let request = GenerateRequest {
        prompt_as: Some(prompt("In the beginning ")),
        length: Some(40),
        sampling: Some(Sampling {
            steps: Some(10),
            ..Sampling::default()
        }),
        frames: Some(every_state()),
        ..GenerateRequest::default()
    };
    let whole = generate(&mut server.client(), request).await.unwrap();
    let again = GenerateRequest {
        resume: Some(Resume {
            accepted: whole.accepted.clone(),
            frames: vec![whole.frames[4].clone()],
            finished: vec![],
        }),
        ..GenerateRequest::default()
    };
    let again = generate(&mut server.client(), again).await.unwrap();
    assert_eq!(again.tokens(), whole.tokens());
    assert_eq!(again.results[0].text, whole.results[0].text);
    assert_eq!(
        again.accepted.unwrap().request_id,
        whole.accepted.unwrap().request_id
    );
    server.stop().await;
}

type Change = fn(&mut InfillRequest);

#[tokio::test(flavor = "multi_thread")]
async fn what_resume_decides_cannot_be_said_twice_and_what_it_lacks_is_named() {
    let server = TestServer::with_network(&config(), closed_form()).await;
    let (name, sampler) = ALL[0];
    let whole = infill(&mut server.client(), request(GraphKind::Absorbing, sampler, name))
        .await
        .unwrap();
    let good = resume(&whole, vec![whole.frames[3].clone()], vec![]);
    let changes: [(&str, Change); 12] = [
        ("template", |r| {
            r.template = vec![TemplatePart { part: Some(gap(3)) }];
        }),
        ("sampling", |r| r.sampling = Some(Sampling::default())),
        ("model", |r| {
            r.model = Some(denoised::proto::v1::ModelReference::default());
        }),
        ("resume.accepted", |r| r.resume.as_mut().unwrap().accepted = None),
        ("resume.accepted.model", |r| accepted(r).model = None),
        ("resume.accepted.sampling", |r| accepted(r).sampling = None),
        ("resume.accepted.sampling", |r| {
            accepted(r).sampling.as_mut().unwrap().seed = None;
        }),
        ("resume.accepted.length", |r| accepted(r).length += 1),
        ("resume.finished[1]", |r| {
            r.resume.as_mut().unwrap().finished = vec![0, 2];
        }),
        ("resume.frames[0].canvas", |r| frame(r).canvas = 2),
        ("resume.frames[0]", |r| frame(r).content = None),
        ("resume.frames", |r| frame(r).step = 1000),
    ];
    for (field, change) in changes {
        let mut bad = good.clone();
        change(&mut bad);
        let status = infill(&mut server.client(), bad).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{field}: {status:?}");
        assert!(
            status.message().starts_with(field),
            "{field}: {}",
            status.message()
        );
    }
    assert!(infill(&mut server.client(), good).await.is_ok());
    server.stop().await;
}

fn accepted(request: &mut InfillRequest) -> &mut denoised::proto::v1::Accepted {
    request.resume.as_mut().unwrap().accepted.as_mut().unwrap()
}

fn frame(request: &mut InfillRequest) -> &mut Frame {
    &mut request.resume.as_mut().unwrap().frames[0]
}

fn set(values: &mut [u32], at: usize, value: u32) {
    if let Some(old) = values.get_mut(at % 12) {
        *old = value;
    }
}

/// Some field of a resume state set to some other value.
fn mutate(request: &mut InfillRequest, (what, at, value): (u8, usize, u32)) {
    let frame = frame(request);
    let Some(Content::Keyframe(key)) = &mut frame.content else {
        panic!("a keyframe")
    };
    let small = value % 14;
    match what {
        0 => frame.step = small,
        1 => frame.step = value,
        2 => frame.nfe = small,
        3 => frame.nfe = value,
        4 => frame.canvas = value % 4,
        5 => frame.total = value,
        6 => set(&mut key.tokens, at, value % 7),
        7 => set(&mut key.tokens, at, value),
        8 => set(&mut key.committed_at, at, small),
        9 => set(&mut key.committed_at, at, value),
        10 => key.tokens.truncate(at % 13),
        11 => key.committed_at.extend(vec![value; at % 5]),
        12 => key.masked = value.to_le_bytes().to_vec(),
        14 => key
            .log_probabilities
            .iter_mut()
            .for_each(|old| *old = f32::from_bits(value)),
        13 => key.clamped = value.to_le_bytes().to_vec(),
        // Masks that agree with the tokens, so that what is beneath is reached.
        _ => {
            let bits = (0..12).fold(0u16, |bits, i| {
                bits | u16::from(key.tokens.get(i) == Some(&5)) << i
            });
            key.masked = bits.to_le_bytes().to_vec();
        }
    }
}

/// Every answer is a refusal or a result within all bounds, and the server is as it was.
#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_hostile_states_harm_nobody() {
    let server = TestServer::with_network(&config(), closed_form()).await;
    let mut client = server.client();
    let mut runner = TestRunner::new_with_rng(
        Runs::default(),
        TestRng::from_seed(RngAlgorithm::ChaCha, &[7; 32]),
    );
    let mutations = prop::collection::vec((0u8..18, any::<usize>(), any::<u32>()), 1..5);
    let (mut refused, mut ran) = (0, 0);
    for (name, sampler) in ALL {
        let whole = infill(&mut client, request(GraphKind::Absorbing, sampler, name))
            .await
            .unwrap();
        let most = 2 * whole.frames.iter().map(|frame| frame.total).max().unwrap();
        for number in 0..=(10_000 / ALL.len()) {
            let mut hostile = resume(
                &whole,
                vec![whole.frames[number % whole.frames.len()].clone()],
                vec![],
            );
            hostile.frames = None;
            for mutation in mutations.new_tree(&mut runner).unwrap().current() {
                mutate(&mut hostile, mutation);
            }
            let sent = frame(&mut hostile).clone();
            match infill(&mut client, hostile).await {
                Err(status) => {
                    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
                    assert!(
                        status.message().starts_with("resume.frames"),
                        "{}",
                        status.message()
                    );
                    refused += 1;
                }
                Ok(answer) => {
                    ran += 1;
                    for result in &answer.results {
                        let before = if result.canvas == sent.canvas { sent.nfe } else { 0 };
                        assert!(
                            result.nfe - before <= most,
                            "{name}: {} evaluations",
                            result.nfe - before
                        );
                        assert!(
                            result.tokens.iter().all(|&token| token < 5),
                            "{name}: {:?}",
                            result.tokens
                        );
                        assert_eq!(
                            (&result.tokens[5..7], result.tokens[11]),
                            (&[1, 2][..], 3),
                            "no clamp moves"
                        );
                    }
                }
            }
        }
        let again = infill(&mut client, request(GraphKind::Absorbing, sampler, name))
            .await
            .unwrap();
        assert_eq!(facts(&again), facts(&whole), "{name}");
    }
    assert!(refused > 1000 && ran > 1000, "{refused} refused, {ran} ran");
    server.stop().await;
}
