//! How likely texts are, as callers ask it: `Score` and `Choose`.

use std::time::Duration;

use denoised::bundle::Manifest;
use denoised::diffusion::{Draws, Graph, GraphKind};
use denoised::network::closed_form::ClosedForm;
use denoised::proto::v1::diffusion_service_client::DiffusionServiceClient;
use denoised::proto::v1::likelihood::Likelihood as Kind;
use denoised::proto::v1::score_response::Event;
use denoised::proto::v1::text_or_tokens::Content;
use denoised::proto::v1::{
    Bound, CancelRequest, ChooseRequest, Exact, Likelihood, Order, PartToScore, ScoreAccepted, ScoreRequest,
    ScoreTotal, TextOrTokens, TextScore, TextToScore, TokenList,
};
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::support::{CLOSED_FORM_LENGTH, TestServer, closed_form, closed_form_manifest, config};

const LAW: [f64; 5] = [0.3, 0.25, 0.2, 0.15, 0.1];

fn text(text: &str) -> TextOrTokens {
    TextOrTokens {
        content: Some(Content::Text(text.to_owned())),
    }
}

fn ids(ids: &[u32]) -> TextOrTokens {
    TextOrTokens {
        content: Some(Content::Tokens(TokenList { ids: ids.to_vec() })),
    }
}

fn scored(content: TextOrTokens) -> PartToScore {
    PartToScore {
        content: Some(content),
        context: false,
    }
}

fn given(content: TextOrTokens) -> PartToScore {
    PartToScore {
        context: true,
        ..scored(content)
    }
}

pub(crate) fn whole(content: TextOrTokens) -> TextToScore {
    TextToScore {
        parts: vec![scored(content)],
    }
}

fn exact(order: Order) -> Likelihood {
    Likelihood {
        likelihood: Some(Kind::Exact(Exact { order: order.into() })),
    }
}

fn bound(draws: u32) -> Likelihood {
    Likelihood {
        likelihood: Some(Kind::Bound(Bound { draws: Some(draws) })),
    }
}

/// Everything one call answered.
struct Scores {
    accepted: ScoreAccepted,
    progress: Vec<u64>,
    texts: Vec<TextScore>,
    total: ScoreTotal,
}

async fn score(
    client: &mut DiffusionServiceClient<Channel>,
    request: impl tonic::IntoRequest<ScoreRequest>,
) -> Result<Scores, Status> {
    let mut stream = client.score(request).await?.into_inner();
    let Some(Event::Accepted(accepted)) = stream.message().await?.and_then(|first| first.event) else {
        panic!("accepted comes first");
    };
    let (mut progress, mut texts, mut total) = (Vec::new(), Vec::new(), None);
    while let Some(message) = stream.message().await? {
        assert!(total.is_none(), "the total comes last");
        match message.event.expect("every message holds an event") {
            Event::Accepted(_) => panic!("accepted comes once"),
            Event::Progress(now) => progress.push(now.done),
            Event::Score(score) => texts.push(score),
            Event::Total(all) => total = Some(all),
        }
    }
    texts.sort_by_key(|text: &TextScore| text.text);
    Ok(Scores {
        accepted,
        progress,
        texts,
        total: total.expect("a total comes at last"),
    })
}

/// Exact likelihoods of all texts of a small space are a law, in every order; context counts nothing.
#[tokio::test(flavor = "multi_thread")]
async fn exact_likelihoods_sum_to_one() {
    let server = TestServer::with_network(&config(), closed_form()).await;
    for order in [Order::LeftToRight, Order::SurestFirst] {
        let pairs: Vec<[u32; 2]> = (0..25).map(|n| [n / 5, n % 5]).collect();
        let request = ScoreRequest {
            texts: pairs
                .iter()
                .map(|pair| TextToScore {
                    parts: vec![given(ids(&[3, 3])), scored(ids(pair)), given(ids(&[1]))],
                })
                .collect(),
            likelihood: Some(exact(order)),
            ..ScoreRequest::default()
        };
        let scores = score(&mut server.client(), request).await.unwrap();
        assert_eq!((scores.accepted.total, scores.accepted.seed), (50, None));
        let mut sum = 0.0;
        for (pair, score) in pairs.iter().zip(&scores.texts) {
            let law = pair.map(|token| LAW[token as usize].ln());
            assert!(
                (score.nats + law[0] + law[1]).abs() < 1e-4,
                "{pair:?}: {}",
                score.nats
            );
            assert_eq!(score.log_probabilities.len(), 2);
            for (log_probability, law) in score.log_probabilities.iter().zip(law) {
                assert!((log_probability - law).abs() < 1e-4);
            }
            assert_eq!((score.tokens, score.nfe, score.bytes), (2, 2, None));
            sum += (-score.nats).exp();
        }
        assert!((sum - 1.0).abs() < 1e-4, "{sum}");
    }
    server.stop().await;
}

/// At exact scores the bound is tight: 95 % intervals cover what they are about in 90 to 99 of 100 repetitions. Of
/// documents of three sequences their own likelihood, of twenty documents together the entropy of their law. Seeds fixed.
#[tokio::test(flavor = "multi_thread")]
async fn intervals_cover_the_likelihood() {
    for kind in [GraphKind::Absorbing, GraphKind::Uniform] {
        let (graph, manifest) = match kind {
            GraphKind::Absorbing => (Graph::new(kind, 6), closed_form_manifest()),
            GraphKind::Uniform => (
                Graph::new(kind, 5),
                Manifest {
                    graph: kind,
                    vocab_size: 5,
                    mask_token: None,
                    schedule: denoised::diffusion::Schedule::Geometric {
                        sigma_min: 1e-4,
                        sigma_max: 9.0,
                    },
                    ..closed_form_manifest()
                },
            ),
        };
        // Pairs of words of two tokens: the second follows from the first but for one case.
        let words = [([0, 1], 0.4), ([2, 3], 0.3), ([4, 4], 0.2), ([0, 3], 0.1)];
        let mut law = Vec::new();
        for (first, p) in words {
            for (second, q) in words {
                law.push(([first, second].concat(), p * q));
            }
        }
        let network = law.clone();
        let mut config = config();
        config.engine.batch_tokens = 4 * 512;
        let server = TestServer::with_manifest(
            &config,
            Manifest {
                max_length: 4,
                ..manifest
            },
            Box::new(move || Ok(Box::new(ClosedForm::new(graph, network.clone())))),
        )
        .await;
        let entropy: f64 = law.iter().map(|(_, p)| -p * p.ln()).sum();
        let (mut own, mut together) = (0, 0);
        for repetition in 0..100 {
            let mut draws = Draws::new(repetition, 7);
            let mut documents = Vec::new();
            for document in 0..20 {
                let (mut tokens, mut nats) = (Vec::new(), 0.0);
                for sequence in 0..3 {
                    let mut u = draws.at(document, sequence).token;
                    let drawn = law.iter().find(|(_, p)| {
                        u -= p;
                        u < 0.0
                    });
                    let (sequence, p) = drawn.unwrap_or(&law[0]);
                    tokens.extend(sequence);
                    nats -= p.ln();
                }
                documents.push((tokens, nats));
            }
            let request = ScoreRequest {
                texts: documents.iter().map(|(tokens, _)| whole(ids(tokens))).collect(),
                seed: Some(repetition),
                ..ScoreRequest::default()
            };
            let scores = score(&mut server.client(), request).await.unwrap();
            let (first, expected) = (&scores.texts[0], documents[0].1);
            assert_eq!((first.sequences, first.tokens), (3, 12));
            own += usize::from((first.nats - expected).abs() <= 1.96 * first.standard_error);
            let off = (scores.total.nats_per_token - entropy / 4.0).abs();
            together += usize::from(off <= 1.96 * scores.total.standard_error);
        }
        assert!((90..=99).contains(&own), "{kind:?}: {own} of a document");
        assert!((90..=99).contains(&together), "{kind:?}: {together} of all");
        server.stop().await;
    }
}

/// Candidates of one token have the probabilities that the law gives them there; longer ones those of their texts.
#[tokio::test(flavor = "multi_thread")]
async fn choices_are_the_enumerated_conditional() {
    let law: Vec<(Vec<u32>, f64)> = [
        ([0, 1, 2], 0.3),
        ([0, 3, 2], 0.2),
        ([0, 1, 4], 0.1),
        ([2, 1, 2], 0.25),
        ([2, 0, 0], 0.15),
    ]
    .map(|(tokens, p)| (tokens.to_vec(), p))
    .to_vec();
    let network = law.clone();
    let graph = Graph::new(GraphKind::Absorbing, 6);
    let server = TestServer::with_network(
        &config(),
        Box::new(move || Ok(Box::new(ClosedForm::new(graph, network.clone())))),
    )
    .await;
    for (before, candidates, after) in [
        (vec![0], vec![vec![1], vec![3]], vec![2]),
        (vec![0], vec![vec![1], vec![3], vec![2]], vec![2]),
        (vec![], vec![vec![0], vec![2]], vec![1, 2]),
        (vec![0], vec![vec![1, 2], vec![3, 2], vec![1, 4]], vec![]),
    ] {
        let of = |candidate: &Vec<u32>| {
            let text = [before.clone(), candidate.clone(), after.clone()].concat();
            law.iter()
                .filter(|(tokens, _)| *tokens == text)
                .map(|(_, p)| p)
                .sum::<f64>()
        };
        let all: f64 = candidates.iter().map(of).sum();
        for order in [Order::Unspecified, Order::SurestFirst] {
            let request = ChooseRequest {
                before: Some(ids(&before)),
                candidates: candidates.iter().map(|candidate| ids(candidate)).collect(),
                after: Some(ids(&after)),
                likelihood: (order != Order::Unspecified).then(|| exact(order)),
                ..ChooseRequest::default()
            };
            let chosen = server.client().choose(request).await.unwrap().into_inner();
            for (candidate, found) in candidates.iter().zip(&chosen.candidates) {
                let expected = of(candidate) / all;
                assert!(
                    (found.probability - expected).abs() < 1e-4,
                    "{candidate:?}: {} is not {expected}",
                    found.probability
                );
                assert_eq!(found.tokens as usize, candidate.len());
            }
            let sum: f64 = chosen
                .candidates
                .iter()
                .map(|candidate| candidate.probability)
                .sum();
            assert!((sum - 1.0).abs() < 1e-12);
            assert_eq!(
                chosen.nfe as usize,
                candidates.iter().map(Vec::len).sum::<usize>()
            );
        }
    }
    server.stop().await;
}

/// The demo model, in text: English before shuffled words, scores that go with their tokens, the same for the same
/// seed, and how far it is in between.
#[tokio::test(flavor = "multi_thread")]
async fn text_is_scored_and_chosen() {
    let server = TestServer::demo().await;
    let english = "And the king said to his servants, Go up to the house of the Lord.";
    let shuffled = "Lord said house the up And to of the servants, the king Go to his.";
    for likelihood in [
        None,
        Some(exact(Order::LeftToRight)),
        Some(exact(Order::SurestFirst)),
    ] {
        let request = ScoreRequest {
            texts: vec![whole(text(english)), whole(text(shuffled))],
            likelihood,
            ..ScoreRequest::default()
        };
        let scores = score(&mut server.client(), request.clone()).await.unwrap();
        let [first, second] = [0, 1].map(|index: usize| scores.texts[index].clone());
        assert!(first.nats + 20.0 < second.nats, "{} {}", first.nats, second.nats);
        assert_eq!(first.bytes, Some(english.len() as u64));
        assert!((scores.total.nats - first.nats - second.nats).abs() < 1e-9);
        let bits = scores.total.bits_per_byte.unwrap();
        assert!((0.5..5.0).contains(&bits), "{bits}");
        let again = ScoreRequest {
            seed: scores.accepted.seed,
            likelihood: scores.accepted.likelihood,
            model: scores.accepted.model,
            ..request
        };
        let again = score(&mut server.client(), again).await.unwrap();
        for (one, other) in scores.texts.iter().zip(&again.texts) {
            assert!(
                (one.nats - other.nats).abs() < 1e-4,
                "{} {}",
                one.nats,
                other.nats
            );
        }
    }
    // A space that is left to the next part makes no difference to where it is written.
    let parts = |one: &str, two: &str| ScoreRequest {
        texts: vec![TextToScore {
            parts: vec![given(text(one)), scored(text(two))],
        }],
        likelihood: Some(exact(Order::LeftToRight)),
        ..ScoreRequest::default()
    };
    let before = score(
        &mut server.client(),
        parts("And the king said to", " his servants"),
    )
    .await;
    let behind = score(
        &mut server.client(),
        parts("And the king said to ", "his servants"),
    )
    .await;
    let [before, behind] = [before, behind].map(|scores| scores.unwrap().texts[0].clone());
    assert!((before.nats - behind.nats).abs() < 1e-4 && before.bytes == behind.bytes);

    let request = ChooseRequest {
        before: Some(text("And he went up to the ")),
        candidates: vec![text("house"), text("of"), text("said unto")],
        after: Some(text(" of the king.")),
        ..ChooseRequest::default()
    };
    let chosen = server.client().choose(request).await.unwrap().into_inner();
    assert!(chosen.candidates[0].probability > 0.9, "{:?}", chosen.candidates);

    // Long enough to be told how far it is.
    let long = ScoreRequest {
        texts: vec![whole(text(english)); 24],
        likelihood: Some(bound(64)),
        ..ScoreRequest::default()
    };
    let scores = score(&mut server.client(), long).await.unwrap();
    assert!(!scores.progress.is_empty() && scores.progress.is_sorted());
    assert_eq!(scores.texts.len(), 24);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn scoring_is_cancelled_and_has_deadlines() {
    let server = TestServer::demo().await;
    let long = || ScoreRequest {
        texts: vec![whole(text("In the beginning God created the heaven and the earth.")); 8],
        likelihood: Some(bound(256)),
        request_id: "long".to_owned(),
        ..ScoreRequest::default()
    };
    let mut client = server.client();
    let mut stream = client.score(long()).await.unwrap().into_inner();
    stream.message().await.unwrap();
    let id = CancelRequest {
        request_id: "long".to_owned(),
    };
    client.cancel(id).await.unwrap();
    let ended = loop {
        match stream.message().await {
            Ok(Some(_)) => {}
            ended => break ended,
        }
    };
    assert_eq!(ended.unwrap_err().code(), Code::Cancelled);
    // Measured by now: it cannot be met.
    let mut late = tonic::Request::new(long());
    late.set_timeout(Duration::from_millis(30));
    let Err(refused) = score(&mut client, late).await else {
        panic!("a deadline that cannot be met is refused");
    };
    assert_eq!(refused.code(), Code::DeadlineExceeded);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_scored_is_named() {
    let server = TestServer::with_network(&config(), closed_form()).await;
    let one = || vec![whole(ids(&[1, 2]))];
    let with = |likelihood, seed| ScoreRequest {
        texts: one(),
        likelihood,
        seed,
        ..ScoreRequest::default()
    };
    let of = |texts| ScoreRequest {
        texts,
        ..ScoreRequest::default()
    };
    let long = vec![0; CLOSED_FORM_LENGTH];
    for (request, field) in [
        (of(vec![]), "texts"),
        (of(vec![TextToScore { parts: vec![] }]), "texts[0].parts"),
        (of(vec![whole(ids(&[]))]), "texts[0].parts"),
        (
            of(vec![
                whole(ids(&[0])),
                TextToScore {
                    parts: vec![given(ids(&[1]))],
                },
            ]),
            "texts[1].parts",
        ),
        (
            of(vec![whole(ids(&[0, 5]))]),
            "texts[0].parts[0].content.tokens.ids[1]",
        ),
        (
            of(vec![TextToScore {
                parts: vec![given(ids(&[1])), scored(TextOrTokens { content: None })],
            }]),
            "texts[0].parts[1].content",
        ),
        (
            of(vec![TextToScore {
                parts: vec![given(ids(&[1])), scored(ids(&long))],
            }]),
            "texts[0].parts",
        ),
        (with(Some(bound(3)), None), "likelihood.bound.draws"),
        (with(Some(bound(5000)), None), "likelihood.bound.draws"),
        (with(Some(exact(Order::LeftToRight)), Some(1)), "seed"),
        (
            with(
                Some(Likelihood {
                    likelihood: Some(Kind::Exact(Exact { order: 9 })),
                }),
                None,
            ),
            "likelihood.exact.order",
        ),
        (
            ScoreRequest {
                request_id: "\u{e9}".to_owned(),
                ..of(one())
            },
            "request_id",
        ),
    ] {
        let Err(refused) = score(&mut server.client(), request).await else {
            panic!("{field} is refused");
        };
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        assert!(refused.message().starts_with(&format!("{field}: ")), "{refused}");
    }
    let among = |candidates: Vec<TextOrTokens>| ChooseRequest {
        candidates,
        ..ChooseRequest::default()
    };
    for (request, field) in [
        (among(vec![]), "candidates"),
        (among(vec![ids(&[1])]), "candidates"),
        (among(vec![ids(&[1]), ids(&[])]), "candidates[1]"),
        (among(vec![ids(&[1]), ids(&[2]), ids(&[1])]), "candidates[2]"),
        (among(vec![ids(&[1]), ids(&[9])]), "candidates[1].tokens.ids[0]"),
        (
            ChooseRequest {
                before: Some(ids(&long)),
                ..among(vec![ids(&[1]), ids(&[2])])
            },
            "candidates[0]",
        ),
        (
            ChooseRequest {
                after: Some(TextOrTokens { content: None }),
                ..among(vec![ids(&[1]), ids(&[2])])
            },
            "after",
        ),
    ] {
        let refused = server.client().choose(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
        assert!(refused.message().starts_with(&format!("{field}: ")), "{refused}");
    }
    let no_tokenizer = of(vec![whole(text("words"))]);
    let Err(refused) = score(&mut server.client(), no_tokenizer).await else {
        panic!("text needs a tokenizer");
    };
    assert_eq!(refused.code(), Code::FailedPrecondition);
    server.stop().await;

    let uniform = Manifest {
        graph: GraphKind::Uniform,
        vocab_size: 5,
        mask_token: None,
        ..closed_form_manifest()
    };
    let graph = Graph::new(GraphKind::Uniform, 5);
    let network = move || -> Result<Box<dyn denoised::network::ScoreNetwork>, _> {
        Ok(Box::new(ClosedForm::independent(graph, &LAW)))
    };
    let server = TestServer::with_manifest(&config(), uniform, Box::new(network)).await;
    let Err(refused) = score(&mut server.client(), with(Some(exact(Order::LeftToRight)), None)).await else {
        panic!("an order needs a mask");
    };
    assert!(refused.message().starts_with("likelihood.exact: "), "{refused}");
    // Which is why candidates are chosen by the bound there.
    let chosen = server.client().choose(among(vec![ids(&[0]), ids(&[4])])).await;
    let chosen = chosen.unwrap().into_inner();
    assert!(matches!(
        chosen.likelihood.unwrap().likelihood,
        Some(Kind::Bound(_))
    ));
    assert!(chosen.candidates[0].standard_error > 0.0);
    server.stop().await;
}
