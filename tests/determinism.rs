//! The same request and seed gives the same tokens, whatever else the server does.

use denoised::proto::v1::sampling::Sampler;
use denoised::proto::v1::{FramePolicy, GenerateRequest, InfillRequest, Sampling, Tweedie, frame_policy};
use denoised::server::sampler::ALL;
use futures_util::future::join_all;

use crate::support::{TestServer, closed_form, config, generate, infill};

fn request(number: u32, length: u32) -> GenerateRequest {
    // Every sampler in turn.
    let (name, sampler) = match ALL[number as usize % ALL.len()] {
        ("tweedie", _) => (
            "tweedie",
            Sampler::Tweedie(Tweedie {
                normalize: number % 2 == 1,
            }),
        ),
        other => other,
    };
    GenerateRequest {
        length: Some(length),
        sampling: Some(Sampling {
            steps: (name != "first_hitting").then_some(4 + number % 5),
            sampler: Some(sampler),
            seed: Some(1000 + u64::from(number)),
            temperature: Some(0.6 + 0.2 * f64::from(number % 3)),
            num_samples: Some(1 + number % 2),
            ..Sampling::default()
        }),
        frames: Some(FramePolicy {
            when: frame_policy::When::Never.into(),
            ..FramePolicy::default()
        }),
        ..GenerateRequest::default()
    }
}

/// Closed-form network: exact equality, alone, beside 15 others, with 1 and 3 workers.
#[tokio::test(flavor = "multi_thread")]
async fn company_and_workers_change_nothing() {
    let server = TestServer::with_network(&config(), closed_form()).await;
    let mut alone = Vec::new();
    for number in 0..16 {
        alone.push(
            generate(&mut server.client(), request(number, 12))
                .await
                .unwrap()
                .tokens(),
        );
    }
    server.stop().await;
    for workers in [1, 3] {
        let mut config = config();
        config.engine.workers = workers;
        let server = TestServer::with_network(&config, closed_form()).await;
        let together = join_all((0..16).map(|number| {
            let mut client = server.client();
            async move { generate(&mut client, request(number, 12)).await.unwrap().tokens() }
        }));
        assert_eq!(together.await, alone, "{workers} workers");
        server.stop().await;
    }
}

/// Demo model: exact equality at the same batch shape (one canvas a pass), whoever else is served and
/// on whichever worker. At other batch shapes ONNX Runtime may add up in another order.
#[tokio::test(flavor = "multi_thread")]
async fn demo_model_at_the_same_batch_shape() {
    let mut config = config();
    config.engine.batch_tokens = 1;
    let server = TestServer::demo_with(&config).await;
    let mut alone = Vec::new();
    for number in 0..16 {
        alone.push(
            generate(&mut server.client(), request(number, 24))
                .await
                .unwrap()
                .tokens(),
        );
    }
    server.stop().await;
    config.engine.workers = 3;
    let server = TestServer::demo_with(&config).await;
    let together = join_all((0..16).map(|number| {
        let mut client = server.client();
        async move { generate(&mut client, request(number, 24)).await.unwrap().tokens() }
    }));
    assert_eq!(together.await, alone);
    server.stop().await;
}

/// A server that draws the seed itself tells it, and the seed repeats the answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_drawn_seed_repeats_the_answer() {
    let server = TestServer::with_network(&config(), closed_form()).await;
    let first = generate(&mut server.client(), GenerateRequest::default())
        .await
        .unwrap();
    let accepted = first.accepted.clone().unwrap();
    assert_eq!(accepted.sampling.unwrap().seed(), first.results[0].seed);
    // What JSON and JavaScript can tell from its neighbours.
    assert!(first.results[0].seed < 1 << 53);
    let again = InfillRequest {
        model: accepted.model,
        sampling: accepted.sampling,
        template: accepted.template,
        ..InfillRequest::default()
    };
    assert_eq!(
        infill(&mut server.client(), again).await.unwrap().tokens(),
        first.tokens()
    );
    server.stop().await;
}
