//! What the samplers promise of evaluations, and that each fills every gap.

use denoised::bundle::Manifest;
use denoised::diffusion::{Graph, GraphKind};
use denoised::models::{Models, ServedModel};
use denoised::network::closed_form::ClosedForm;
use denoised::proto::v1::sampling::Sampler;
use denoised::proto::v1::{
    Euler, FirstHitting, FramePolicy, GenerateRequest, GetModelRequest, Remask, Sampling, Tweedie,
    frame_policy,
};
use denoised::server::Server;
use denoised::server::sampler::{self, ALL};
use tonic::Code;

use crate::support::{TestServer, closed_form_manifest, config, generate};

fn request(prompt: &str, sampling: Sampling) -> GenerateRequest {
    GenerateRequest {
        prompt_as: Some(crate::support::prompt(prompt)),
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
        sampler: Some(Sampler::Tweedie(Tweedie { normalize: true })),
        ..Sampling::default()
    };
    let answer = generate(&mut server.client(), request("In the beginning", sampling))
        .await
        .unwrap();
    let (accepted, result) = (answer.accepted.unwrap(), &answer.results[0]);
    let gaps = result.committed_at.iter().filter(|&&step| step > 0).count();
    let sampling = accepted.sampling.unwrap();
    assert_eq!(sampling.steps, Some(1024));
    assert_eq!(
        sampling.sampler,
        Some(Sampler::Tweedie(Tweedie { normalize: true }))
    );
    assert_eq!(accepted.total, 1025);
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
        sampler: Some(Sampler::FirstHitting(FirstHitting {})),
        ..Sampling::default()
    };
    let answer = generate(&mut server.client(), request("", sampling))
        .await
        .unwrap();
    let (accepted, result) = (answer.accepted.unwrap(), &answer.results[0]);
    let sampling = accepted.sampling.unwrap();
    assert_eq!(sampling.sampler, Some(Sampler::FirstHitting(FirstHitting {})));
    assert_eq!((sampling.steps, accepted.total, result.nfe), (None, 40, 40));
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
    let model = model.into_inner().model.unwrap();
    let mask = model.mask_token();
    assert_eq!(model.samplers, ALL.map(|(name, _)| name.to_owned()));
    for ((name, sampler), most) in ALL.into_iter().zip([13, 13, 40, 12, 12, 13, 25]) {
        let is_remask = matches!(sampler, Sampler::Remask(_));
        let sampling = Sampling {
            sampler: Some(if is_remask {
                Sampler::Remask(Remask { rate: Some(0.3) })
            } else {
                sampler
            }),
            steps: (name != "first_hitting").then_some(12),
            ..Sampling::default()
        };
        let answer = generate(&mut server.client(), request("In the beginning", sampling))
            .await
            .unwrap();
        let (accepted, result) = (answer.accepted.unwrap(), &answer.results[0]);
        assert_eq!(sampler::name(&accepted.sampling.unwrap().sampler.unwrap()), name);
        assert!((1..=most).contains(&result.nfe), "{sampler:?}: {}", result.nfe);
        assert!(result.tokens.iter().all(|&token| token < mask), "{sampler:?}");
        assert!(result.text().starts_with("In the beginning"));
        let masked: Vec<u32> = answer.frames.iter().map(|frame| frame.masked).collect();
        assert_eq!(masked.last(), Some(&0));
        // Only remasking takes tokens back.
        assert_eq!(masked.is_sorted_by(|a, b| a >= b), !is_remask, "{masked:?}");
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
            "sampling.euler.normalize",
            Sampling {
                sampler: Some(Sampler::Euler(Euler { normalize: true })),
                ..Sampling::default()
            },
        ),
        (
            "sampling.remask",
            Sampling {
                sampler: Some(Sampler::Remask(Remask { rate: None })),
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
