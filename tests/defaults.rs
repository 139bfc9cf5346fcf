//! What a bundle says of how it is sampled holds for silent requests, and is told.

use denoised::bundle::{Defaults, Manifest};
use denoised::diffusion::SamplerKind;
use denoised::proto::v1::sampling::Sampler;
use denoised::proto::v1::{Euler, GenerateRequest, GetModelRequest, Remask, Sampling};

use crate::support::{TestServer, closed_form, closed_form_manifest, config, generate};

fn manifest() -> Manifest {
    Manifest {
        defaults: Some(Defaults {
            sampler: Some(SamplerKind::Remask { rate: 0.25 }),
            steps: Some(5),
            temperature: Some(0.5),
            top_p: Some(0.9),
            length: Some(8),
        }),
        ..closed_form_manifest()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_requests_get_the_models_defaults_and_accepted_repeats_them() {
    let server = TestServer::with_manifest(&config(), manifest(), closed_form()).await;
    let mut client = server.client();
    let first = generate(&mut client, GenerateRequest::default()).await.unwrap();
    let accepted = first.accepted.as_ref().unwrap();
    let sampling = accepted.sampling.unwrap();
    assert_eq!(
        sampling.sampler,
        Some(Sampler::Remask(Remask { rate: Some(0.25) }))
    );
    assert_eq!((sampling.steps, accepted.length), (Some(5), 8));
    assert_eq!((sampling.temperature, sampling.top_p), (Some(0.5), Some(0.9)));
    // Asked for in so many words, the same comes again.
    let again = GenerateRequest {
        length: Some(accepted.length),
        sampling: Some(sampling),
        ..GenerateRequest::default()
    };
    let again = generate(&mut client, again).await.unwrap();
    assert_eq!(again.tokens(), first.tokens());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_request_says_wins() {
    let server = TestServer::with_manifest(&config(), manifest(), closed_form()).await;
    let request = GenerateRequest {
        length: Some(12),
        sampling: Some(Sampling {
            sampler: Some(Sampler::Euler(Euler { normalize: false })),
            steps: Some(9),
            temperature: Some(1.0),
            top_p: Some(1.0),
            ..Sampling::default()
        }),
        ..GenerateRequest::default()
    };
    let answer = generate(&mut server.client(), request).await.unwrap();
    let accepted = answer.accepted.unwrap();
    let sampling = accepted.sampling.unwrap();
    assert_eq!(sampling.sampler, Some(Sampler::Euler(Euler { normalize: false })));
    assert_eq!((sampling.steps, accepted.length), (Some(9), 12));
    assert_eq!((sampling.temperature, sampling.top_p), (Some(1.0), Some(1.0)));
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn get_model_shows_them() {
    for (manifest, has) in [(manifest(), true), (closed_form_manifest(), false)] {
        let server = TestServer::with_manifest(&config(), manifest, closed_form()).await;
        let model = server
            .models()
            .get_model(GetModelRequest::default())
            .await
            .unwrap();
        let defaults = model.into_inner().model.unwrap().defaults;
        assert_eq!(defaults.is_some(), has);
        if let Some(defaults) = defaults {
            let sampling = defaults.sampling.unwrap();
            assert_eq!(
                sampling.sampler,
                Some(Sampler::Remask(Remask { rate: Some(0.25) }))
            );
            assert_eq!((sampling.steps, defaults.length), (Some(5), Some(8)));
        }
        server.stop().await;
    }
}
