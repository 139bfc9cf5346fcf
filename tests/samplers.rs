//! What the samplers promise of evaluations, and that each fills every gap.

use denoised::bundle::Manifest;
use denoised::diffusion::{Graph, GraphKind};
use denoised::models::{Models, ServedModel};
use denoised::network::closed_form::ClosedForm;
use denoised::proto::v1::{FramePolicy, GenerateRequest, GetModelRequest, Sampler, Sampling, frame_policy};
use denoised::server::Server;
use tonic::Code;

use crate::support::{TestServer, closed_form_manifest, config, generate};

fn request(prompt: &str, sampling: Sampling) -> GenerateRequest {
    GenerateRequest {
        prompt: prompt.to_owned(),
        length: Some(40),
        sampling: Some(Sampling {
            seed: Some(11),
            ..sampling
        }),
        frames: Some(FramePolicy {
            when: frame_policy::When::EverySteps.into(),
            ..FramePolicy::default()
        }),
        ..GenerateRequest::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_steps_of_the_demo_model_cost_one_evaluation_a_token_at_most() {
    let server = TestServer::demo().await;
    let sampling = Sampling {
        steps: Some(1024),
        normalize: true,
        ..Sampling::default()
    };
    let answer = generate(&mut server.client(), request("In the beginning", sampling))
        .await
        .unwrap();
    let (accepted, result) = (answer.accepted.unwrap(), &answer.results[0]);
    let gaps = result.committed_at.iter().filter(|&&step| step > 0).count();
    assert!(accepted.normalize && accepted.steps == 1024);
    assert!(
        (1..40).contains(&gaps) && result.nfe as usize <= gaps,
        "{} of {gaps}",
        result.nfe
    );
    assert!(result.text().starts_with("In the beginning"));
    let last = answer.frames.last().unwrap();
    assert_eq!((last.step, last.total, last.masked, last.t), (1025, 1025, 0, 0.0));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn first_hitting_fills_one_position_an_evaluation() {
    let server = TestServer::demo().await;
    let sampling = Sampling {
        sampler: Sampler::FirstHitting.into(),
        ..Sampling::default()
    };
    let answer = generate(&mut server.client(), request("", sampling))
        .await
        .unwrap();
    let (accepted, result) = (answer.accepted.unwrap(), &answer.results[0]);
    assert_eq!(accepted.sampler(), Sampler::FirstHitting);
    assert_eq!((accepted.normalize, accepted.steps, result.nfe), (true, 40, 40));
    let mut order = result.committed_at.clone();
    order.sort_unstable();
    assert_eq!(order, (1..=40).collect::<Vec<u32>>());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn every_sampler_fills_every_gap_within_its_evaluations() {
    let server = TestServer::demo().await;
    let model = server
        .models()
        .get_model(GetModelRequest::default())
        .await
        .unwrap();
    let mask = model.into_inner().model.unwrap().mask_token();
    for (sampler, steps, most) in [
        (Sampler::Tweedie, 12, 13),
        (Sampler::Euler, 12, 13),
        (Sampler::FirstHitting, 12, 40),
        (Sampler::Confidence, 12, 12),
        (Sampler::EntropyBounded, 12, 12),
        (Sampler::Remask, 12, 13),
        (Sampler::ThetaTrapezoidal, 12, 25),
    ] {
        let sampling = Sampling {
            sampler: sampler.into(),
            steps: Some(steps),
            remask_rate: (sampler == Sampler::Remask).then_some(0.3),
            ..Sampling::default()
        };
        let answer = generate(&mut server.client(), request("In the beginning", sampling))
            .await
            .unwrap();
        let (accepted, result) = (answer.accepted.unwrap(), &answer.results[0]);
        assert_eq!(accepted.sampler(), sampler);
        assert!((1..=most).contains(&result.nfe), "{sampler:?}: {}", result.nfe);
        assert!(result.tokens.iter().all(|&token| token < mask), "{sampler:?}");
        assert!(result.text().starts_with("In the beginning"));
        let masked: Vec<u32> = answer.frames.iter().map(|frame| frame.masked).collect();
        assert_eq!(masked.last(), Some(&0));
        // Only remasking takes tokens back.
        assert_eq!(
            masked.is_sorted_by(|a, b| a >= b),
            sampler != Sampler::Remask,
            "{masked:?}"
        );
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn uniform_graphs_have_no_hit_times() {
    let graph = Graph::new(GraphKind::Uniform, 5);
    let manifest = Manifest {
        graph: GraphKind::Uniform,
        vocab_size: 5,
        mask_token: None,
        ..closed_form_manifest()
    };
    let mut models = Models::default();
    let network = Box::new(move || Ok(Box::new(ClosedForm::independent(graph, &[0.2; 5])) as Box<_>));
    models.insert(ServedModel::without_bundle(manifest, 1, network));
    let server = TestServer::run(Server::with_models(&config(), models).await.unwrap()).await;
    for (field, sampling) in [
        (
            "sampling.normalize",
            Sampling {
                normalize: true,
                ..Sampling::default()
            },
        ),
        (
            "sampling.sampler",
            Sampling {
                sampler: Sampler::Remask.into(),
                ..Sampling::default()
            },
        ),
    ] {
        let request = GenerateRequest {
            sampling: Some(sampling),
            ..GenerateRequest::default()
        };
        let status = generate(&mut server.client(), request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().starts_with(field), "{}", status.message());
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sampler_that_takes_scores_as_they_are_is_not_asked_to_normalise_them() {
    let server = TestServer::demo().await;
    let sampling = Sampling {
        sampler: Sampler::ThetaTrapezoidal.into(),
        normalize: true,
        ..Sampling::default()
    };
    let status = generate(&mut server.client(), request("", sampling))
        .await
        .unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(
        status.message().starts_with("sampling.normalize"),
        "{}",
        status.message()
    );
    server.stop().await;
}
