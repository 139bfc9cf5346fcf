//! Gaps that may be filled with some tokens only, as requests say it.

use denoised::client::{Client, Event, Request, gap_of, text};
use denoised::network::{Batch, NetworkError, ScoreNetwork, ScoreRows};
use denoised::proto::v1::{
    FramePolicy, GenerateRequest, InfillRequest, Resume, Sampling, TemplatePart, TokenSet, frame_policy,
};
use tonic::Code;
use tonic_types::StatusExt;

use crate::support::{TestServer, closed_form, config, gap, generate, infill};

fn set(name: &str, ids: &[u32]) -> TokenSet {
    TokenSet {
        name: name.into(),
        ids: ids.to_vec(),
        texts: Vec::new(),
    }
}

fn one_gap(sets: Vec<TokenSet>, allowed: Option<&str>) -> GenerateRequest {
    GenerateRequest {
        token_sets: sets,
        allowed: allowed.map(str::to_owned),
        ..GenerateRequest::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn words_of_a_choice_fill_a_gap_of_the_demo_model() {
    let server = TestServer::demo().await;
    let client = Client::new([&server.url]).unwrap();
    for seed in 0..6 {
        let request = Request::filling([text("And the king said"), gap_of(1, "answer"), text(".")])
            .token_set("answer", [" yes", " no", " I"])
            .seed(seed);
        let mut events = client.run(request);
        let mut filled = None;
        while let Some(event) = events.next().await {
            match event.unwrap() {
                Event::Accepted(accepted) => assert_eq!(accepted.token_sets[0].ids.len(), 3),
                Event::Result(result) => filled = result.text,
                Event::Frame(_) => {}
                Event::Resumed(resumed) => panic!("{resumed:?}"),
            }
        }
        let filled = filled.unwrap();
        let wanted = [" yes", " no", " I"].map(|word| format!("And the king said{word}."));
        assert!(wanted.contains(&filled), "{filled}");
    }
    // A word that is several tokens is no token.
    let several = TokenSet {
        name: "names".into(),
        ids: Vec::new(),
        texts: vec![" yes".into(), " Nebuchadnezzar of Babylon".into()],
    };
    let status = generate(&mut server.client(), one_gap(vec![several], Some("names")))
        .await
        .unwrap_err();
    assert!(
        status.message().starts_with("token_sets[0].texts[1]"),
        "{}",
        status.message()
    );
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sets_are_told_and_go_on_with_the_request() {
    let server = TestServer::with_network(&config(), closed_form()).await;
    let part = |part| TemplatePart { part: Some(part) };
    let request = InfillRequest {
        template: vec![part(gap_of(3, "low")), part(gap(2)), part(gap_of(3, "high"))],
        token_sets: vec![set("low", &[1, 0, 1]), set("high", &[4])],
        sampling: Some(Sampling {
            steps: Some(6),
            ..Sampling::default()
        }),
        frames: Some(FramePolicy {
            when: frame_policy::When::EverySteps.into(),
            keyframes_only: true,
            ..FramePolicy::default()
        }),
        ..InfillRequest::default()
    };
    let whole = infill(&mut server.client(), request).await.unwrap();
    let tokens = &whole.results[0].tokens;
    assert!(
        tokens[..3].iter().all(|token| [0, 1].contains(token)),
        "{tokens:?}"
    );
    assert_eq!(tokens[5..], [4, 4, 4]);
    let accepted = whole.accepted.clone().unwrap();
    assert_eq!(accepted.token_sets, [set("low", &[0, 1]), set("high", &[4])]);
    let ask = |frames| InfillRequest {
        resume: Some(Resume {
            accepted: whole.accepted.clone(),
            frames,
            finished: Vec::new(),
        }),
        ..InfillRequest::default()
    };
    let again = infill(&mut server.client(), ask(vec![whole.frames[1].clone()]))
        .await
        .unwrap();
    assert_eq!(again.tokens(), whole.tokens());
    // A state with what is not allowed is none of this request's.
    let mut last = whole.frames.last().cloned().unwrap();
    if let Some(denoised::proto::v1::frame::Content::Keyframe(key)) = &mut last.content {
        key.tokens[0] = 3;
    }
    let status = infill(&mut server.client(), ask(vec![last])).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(
        status.message().contains("not allowed at position 0"),
        "{}",
        status.message()
    );
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sets_that_cannot_be_are_named() {
    let server = TestServer::with_network(&config(), closed_form()).await;
    let two = || vec![set("a", &[0]), set("b", &[1])];
    for (field, request) in [
        ("allowed", one_gap(vec![], Some("a"))),
        ("allowed", one_gap(two(), Some("c"))),
        ("token_sets[1]", one_gap(two(), Some("a"))),
        ("token_sets[0].name", one_gap(vec![set("", &[0])], None)),
        (
            "token_sets[1].name",
            one_gap(vec![set("a", &[0]), set("a", &[1])], Some("a")),
        ),
        ("token_sets[0]", one_gap(vec![set("a", &[])], Some("a"))),
        (
            "token_sets[0].ids[1]",
            one_gap(vec![set("a", &[0, 5])], Some("a")),
        ),
        ("token_sets", one_gap(vec![set("a", &[0]); 2000], Some("a"))),
    ] {
        let status = generate(&mut server.client(), request).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{field}: {status:?}");
        assert!(
            status.message().starts_with(field),
            "{field}: {}",
            status.message()
        );
    }
    let part = |part| TemplatePart { part: Some(part) };
    let unknown = InfillRequest {
        template: vec![part(gap(1)), part(gap_of(1, "nobody"))],
        ..InfillRequest::default()
    };
    let status = infill(&mut server.client(), unknown).await.unwrap_err();
    assert!(
        status.message().starts_with("template[1].gap.allowed"),
        "{}",
        status.message()
    );
    server.stop().await;
}

/// Gives token 3 no chance at all.
struct NeverThree(Box<dyn ScoreNetwork>);

impl ScoreNetwork for NeverThree {
    fn log_score(
        &mut self,
        batch: &Batch<'_>,
        read: &mut dyn FnMut(ScoreRows<'_>),
    ) -> Result<(), NetworkError> {
        self.0.log_score(batch, &mut |rows| {
            let mut data: Vec<f32> = (0..batch.positions.len())
                .flat_map(|row| rows.row(row).to_vec())
                .collect();
            data.chunks_mut(rows.vocab())
                .for_each(|row| row[3] = f32::NEG_INFINITY);
            read(ScoreRows::packed(&data, rows.vocab()));
        })
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_no_allowed_token_can_fill_is_told_as_such() {
    let source = closed_form();
    let network = move || Ok(Box::new(NeverThree(source()?)) as Box<dyn ScoreNetwork>);
    let server = TestServer::with_network(&config(), Box::new(network)).await;
    let status = generate(
        &mut server.client(),
        one_gap(vec![set("three", &[3])], Some("three")),
    )
    .await
    .unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    assert_eq!(status.get_details_error_info().unwrap().reason, "NOTHING_ALLOWED");
    // With another beside it, that one is taken.
    let both = one_gap(vec![set("both", &[2, 3])], Some("both"));
    assert_eq!(
        generate(&mut server.client(), both).await.unwrap().tokens(),
        [[2; 12]]
    );
    server.stop().await;
}
