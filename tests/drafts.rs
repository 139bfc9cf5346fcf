//! Drafts, as requests say them: text that is there at the start and may change.

use denoised::bundle::Manifest;
use denoised::client::{draft, gap, text};
use denoised::diffusion::{Graph, GraphKind};
use denoised::network::closed_form::ClosedForm;
use denoised::proto::v1::frame::Content;
use denoised::proto::v1::template_part::Part;
use denoised::proto::v1::{
    Draft, FramePolicy, GenerateRequest, InfillRequest, Sampling, TemplatePart, TokenList, frame_policy,
};
use tonic::Code;

use crate::support::{TestServer, closed_form, closed_form_manifest, config, generate, infill};

fn edit(parts: Vec<Part>, start_time: Option<f64>) -> InfillRequest {
    InfillRequest {
        template: parts
            .into_iter()
            .map(|part| TemplatePart { part: Some(part) })
            .collect(),
        sampling: Some(Sampling {
            start_time,
            seed: Some(3),
            ..Sampling::default()
        }),
        frames: Some(FramePolicy {
            when: frame_policy::When::EverySteps.into(),
            keyframes_only: true,
            ..FramePolicy::default()
        }),
        ..InfillRequest::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn text_is_edited_in_place() {
    const WORDS: &str = "went up to the house of the Lord and stood before the altar";
    let server = TestServer::demo().await;
    let parts = || vec![text("Then the king "), draft(WORDS), text(".")];
    let whole = format!("Then the king {WORDS}.");
    // Next to no noise changes nothing, and all of the draft's spaces are right.
    let kept = infill(&mut server.client(), edit(parts(), Some(2e-5)))
        .await
        .unwrap();
    assert_eq!(kept.results[0].text.as_deref(), Some(whole.as_str()));
    assert_eq!(kept.results[0].nfe, 0);

    let edited = infill(&mut server.client(), edit(parts(), None)).await.unwrap();
    let accepted = edited.accepted.clone().unwrap();
    assert_eq!(accepted.sampling.unwrap().start_time, Some(0.5));
    assert_eq!(accepted.template[1].part, Some(draft(WORDS)));
    // What is masked at first may change, everything else stays, and both are there.
    let Some(Content::Keyframe(first)) = &edited.frames[0].content else {
        panic!("the first frame is a keyframe");
    };
    let (tokens, before) = (edited.tokens()[0].clone(), &kept.tokens()[0]);
    let is_masked = |i: usize| first.masked[i / 8] >> (i % 8) & 1 == 1;
    let masked = (0..tokens.len()).filter(|&i| is_masked(i)).count();
    assert!(
        masked > 2 && masked < tokens.len() - 4,
        "{masked} of {}",
        tokens.len()
    );
    for i in (0..tokens.len()).filter(|&i| !is_masked(i)) {
        assert_eq!(tokens[i], before[i], "position {i}");
        assert_eq!(edited.results[0].committed_at[i], 0, "position {i}");
    }
    assert_ne!(&tokens, before);
    let result = edited.results[0].text.clone().unwrap();
    assert!(
        result.starts_with("Then the king ") && !result.contains("  "),
        "{result}"
    );

    // Byte for byte the same when the told request is made again.
    let again = InfillRequest {
        template: accepted.template,
        sampling: accepted.sampling,
        ..InfillRequest::default()
    };
    let again = infill(&mut server.client(), again).await.unwrap();
    assert_eq!(again.tokens(), edited.tokens());
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_a_draft_is_named() {
    let server = TestServer::with_network(&config(), closed_form()).await;
    let ids = |ids: &[u32]| {
        let content = denoised::proto::v1::draft::Content::Tokens(TokenList { ids: ids.to_vec() });
        Part::Draft(Draft {
            content: Some(content),
        })
    };
    for (parts, start_time, field) in [
        (vec![gap(4)], Some(0.5), "sampling.start_time"),
        (vec![ids(&[1, 2])], Some(0.0), "sampling.start_time"),
        (vec![ids(&[1, 2])], Some(1e-5), "sampling.start_time"),
        (vec![ids(&[1, 2])], Some(1.01), "sampling.start_time"),
        (vec![ids(&[1, 2])], Some(f64::NAN), "sampling.start_time"),
        (vec![ids(&[])], None, "template[0].draft.tokens.ids"),
        (vec![ids(&[1, 5])], None, "template[0].draft.tokens.ids"),
        (
            vec![Part::Draft(Draft { content: None })],
            None,
            "template[0].draft",
        ),
        (vec![ids(&[1; 100_000])], None, "template"),
    ] {
        let status = infill(&mut server.client(), edit(parts, start_time))
            .await
            .unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(
            status.message().starts_with(field),
            "{field}: {}",
            status.message()
        );
    }
    // A prompt is no draft.
    let request = GenerateRequest {
        sampling: edit(vec![], Some(0.5)).sampling,
        ..GenerateRequest::default()
    };
    let status = generate(&mut server.client(), request).await.unwrap_err();
    assert!(
        status.message().starts_with("sampling.start_time"),
        "{}",
        status.message()
    );
    server.stop().await;

    let graph = Graph::new(GraphKind::Uniform, 5);
    let uniform = Manifest {
        graph: GraphKind::Uniform,
        vocab_size: 5,
        mask_token: None,
        ..closed_form_manifest()
    };
    let law = [0.3, 0.25, 0.2, 0.15, 0.1];
    let network = Box::new(move || Ok(Box::new(ClosedForm::independent(graph, &law)) as Box<_>));
    let server = TestServer::with_manifest(&config(), uniform, network).await;
    // Nothing is known of a gap at a time between noise and text.
    let mixed = || vec![gap(2), ids(&[1, 2])];
    let status = infill(&mut server.client(), edit(mixed(), Some(0.5)))
        .await
        .unwrap_err();
    assert!(status.message().contains("uniform"), "{}", status.message());
    assert!(
        infill(&mut server.client(), edit(mixed(), Some(1.0)))
            .await
            .is_ok()
    );
    assert!(
        infill(&mut server.client(), edit(vec![ids(&[1, 2])], Some(0.5)))
            .await
            .is_ok()
    );
    server.stop().await;
}
