//! Frames: keyframes and deltas rebuild the canvas, policies are kept, results agree.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use denoised::bundle::Manifest;
use denoised::diffusion::{Graph, GraphKind};
use denoised::network::closed_form::ClosedForm;
use denoised::network::{Batch, NetworkError, ScoreNetwork, ScoreRows};
use denoised::proto::v1::event::Event;
use denoised::proto::v1::{
    FramePolicy, GenerateRequest, GetModelRequest, InfillRequest, ListModelsRequest, Model, Sampling,
    TemplatePart, TokenList, frame, frame_policy, template_part,
};

use crate::support::{
    Answer, TestServer, closed_form, closed_form_manifest, config, gap, generate, infill, prompt,
};

fn request(frames: FramePolicy) -> GenerateRequest {
    GenerateRequest {
        sampling: Some(Sampling {
            steps: Some(24),
            seed: Some(5),
            ..Sampling::default()
        }),
        frames: Some(frames),
        ..GenerateRequest::default()
    }
}

/// Applies all frames; the last state must be the result's.
fn replay(answer: &Answer) {
    let (mut canvas, mut committed_at) = (Vec::new(), Vec::new());
    for (index, frame) in answer.frames.iter().enumerate() {
        let edge = index == 0 || index + 1 == answer.frames.len();
        match frame.content.as_ref().unwrap() {
            frame::Content::Keyframe(key) => {
                canvas.clone_from(&key.tokens);
                committed_at.clone_from(&key.committed_at);
                let masked: u32 = key.masked.iter().map(|byte| byte.count_ones()).sum();
                assert_eq!(masked, frame.masked);
            }
            frame::Content::Delta(delta) => {
                assert!(!edge, "the first and the last frame are keyframes");
                assert!(delta.positions.is_sorted());
                for (index, position) in delta.positions.iter().enumerate() {
                    canvas[*position as usize] = delta.tokens[index];
                    committed_at[*position as usize] = delta.committed_at[index];
                }
            }
        }
        assert_eq!(canvas.iter().filter(|t| **t == 5).count() as u32, frame.masked);
    }
    assert_eq!(canvas, answer.results[0].tokens);
    assert_eq!(committed_at, answer.results[0].committed_at);
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_rebuild_the_canvas() {
    let server = TestServer::with_network(&config(), closed_form()).await;
    let answer = generate(&mut server.client(), request(FramePolicy::default()))
        .await
        .unwrap();
    replay(&answer);
    let (first, last) = (&answer.frames[0], answer.frames.last().unwrap());
    assert_eq!((first.step, first.masked, first.t), (0, 12, 1.0));
    assert_eq!(
        (last.step, last.masked, last.t, last.sigma),
        (last.total, 0, 0.0, 0.0)
    );
    assert!(answer.frames.is_sorted_by_key(|frame| frame.step));
    let result = &answer.results[0];
    assert_eq!(result.committed_at.len(), 12);
    assert!(result.committed_at.iter().all(|step| (1..=25).contains(step)));
    assert_eq!(
        result.nfe,
        *result.committed_at.iter().max().unwrap(),
        "no evaluation after the last move"
    );
    let timings = result.timings.unwrap();
    assert!(timings.total_ms > 0.0 && timings.network_ms + timings.queue_ms <= timings.total_ms);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn policies_are_kept() {
    let server = TestServer::with_network(&config(), closed_form()).await;
    let never = FramePolicy {
        when: frame_policy::When::Never.into(),
        ..FramePolicy::default()
    };
    let silent = generate(&mut server.client(), request(never)).await.unwrap();
    assert!(silent.frames.is_empty());
    let keyframes = FramePolicy {
        keyframes_only: true,
        ..FramePolicy::default()
    };
    let whole = generate(&mut server.client(), request(keyframes)).await.unwrap();
    assert!(
        whole
            .frames
            .iter()
            .all(|f| matches!(f.content, Some(frame::Content::Keyframe(_))))
    );
    let every = FramePolicy {
        when: frame_policy::When::EverySteps.into(),
        every_steps: Some(6),
        ..FramePolicy::default()
    };
    let sparse = generate(&mut server.client(), request(every)).await.unwrap();
    replay(&sparse);
    let steps: Vec<u32> = sparse.frames.iter().map(|f| f.step).collect();
    assert!(
        steps[..steps.len() - 1]
            .windows(2)
            .all(|pair| pair[1] - pair[0] >= 6),
        "{steps:?}"
    );
    let slow = FramePolicy {
        min_interval_ms: Some(60_000),
        ..FramePolicy::default()
    };
    let conflated = generate(&mut server.client(), request(slow)).await.unwrap();
    assert_eq!(
        conflated.frames.len(),
        2,
        "the first and the last; the end is not held back"
    );
    assert_eq!(conflated.tokens(), silent.tokens());
    server.stop().await;
}

/// Takes its time for every evaluation, and counts them.
struct Slow {
    network: ClosedForm,
    evaluations: Arc<AtomicU32>,
}

impl ScoreNetwork for Slow {
    fn log_score(
        &mut self,
        batch: &Batch<'_>,
        read: &mut dyn FnMut(ScoreRows<'_>),
    ) -> Result<(), NetworkError> {
        std::thread::sleep(Duration::from_millis(6));
        self.evaluations.fetch_add(1, Ordering::AcqRel);
        self.network.log_score(batch, read)
    }
}

/// A client that takes 0.1 s for a frame, of a run of 300 steps in 2 s, with tonic's own windows: it is shown few
/// frames, each of them of the last second, and has its result after no more frames than a second holds.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_client_is_shown_the_present_and_gets_its_result_at_once() {
    const STEPS: u32 = 300;
    let evaluations = Arc::new(AtomicU32::new(0));
    let count = Arc::clone(&evaluations);
    let network = move || {
        let graph = Graph::new(GraphKind::Uniform, 5);
        Ok(Box::new(Slow {
            network: ClosedForm::independent(graph, &[0.2; 5]),
            evaluations: Arc::clone(&count),
        }) as Box<dyn ScoreNetwork>)
    };
    let manifest = Manifest {
        graph: GraphKind::Uniform,
        vocab_size: 5,
        mask_token: None,
        ..closed_form_manifest()
    };
    let server = TestServer::with_manifest(&config(), manifest, Box::new(network)).await;
    let request = GenerateRequest {
        sampling: Some(Sampling {
            steps: Some(STEPS),
            ..Sampling::default()
        }),
        ..GenerateRequest::default()
    };
    let mut stream = server.client().generate(request).await.unwrap().into_inner();
    let (mut frames, mut late, mut oldest) = (0, 0, 0);
    while let Some(message) = stream.message().await.unwrap() {
        if let Some(Event::Frame(frame)) = message.event.and_then(|event| event.event) {
            frames += 1;
            let now = evaluations.load(Ordering::Acquire);
            oldest = oldest.max(now - frame.nfe);
            late += u32::from(now > STEPS);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
    // A busy machine oversleeps; frames that queue would be more than a hundred, all of them late.
    assert!((10..=40).contains(&frames), "{frames} frames");
    // Half of the steps take a second.
    assert!(oldest <= STEPS / 2, "a frame was {oldest} evaluations old");
    assert!(late <= 15, "{late} frames were read after the end");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn text_travels_with_tokens_and_models_tell_their_limits() {
    let server = TestServer::demo().await;
    let listed = server
        .models()
        .list_models(ListModelsRequest {})
        .await
        .unwrap()
        .into_inner()
        .models;
    let model = server
        .models()
        .get_model(GetModelRequest::default())
        .await
        .unwrap()
        .into_inner()
        .model
        .unwrap();
    let same = |other: &Model| {
        // It may have been loaded in between.
        let state = model.state;
        Model {
            state,
            ..other.clone()
        } == model
    };
    assert!(listed.iter().any(same) && model.is_default && model.has_tokenizer);
    assert_eq!(model.mask_token, Some(model.vocab_size - 1));
    assert!(model.provenance_json.contains("bits"));
    let request = GenerateRequest {
        length: Some(32),
        ..request(FramePolicy::default())
    };
    let answer = generate(
        &mut server.client(),
        GenerateRequest {
            prompt_as: Some(prompt("In the beginning")),
            ..request
        },
    )
    .await
    .unwrap();
    for frame in &answer.frames {
        let text = frame.text.as_ref().unwrap();
        assert!(text.starts_with("In the beginning"));
        assert_eq!(text.matches('\u{2591}').count() as u32, frame.masked);
    }
    let first = &answer.frames[0];
    assert!(first.masked > 0 && first.masked < 32, "the prompt is clamped");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bits_tell_position_by_position_what_is_masked_and_clamped() {
    let server = TestServer::with_network(&config(), closed_form()).await;
    let part = |part| TemplatePart { part: Some(part) };
    let tokens = |ids: &[u32]| part(template_part::Part::Tokens(TokenList { ids: ids.to_vec() }));
    let answer = infill(
        &mut server.client(),
        InfillRequest {
            template: vec![tokens(&[1, 2]), part(gap(8)), tokens(&[3])],
            frames: Some(FramePolicy {
                keyframes_only: true,
                ..FramePolicy::default()
            }),
            ..InfillRequest::default()
        },
    )
    .await
    .unwrap();
    for frame in &answer.frames {
        let Some(frame::Content::Keyframe(key)) = &frame.content else {
            panic!("{frame:?}");
        };
        let bit = |bytes: &[u8], position: usize| bytes[position / 8] >> (position % 8) & 1 == 1;
        for (position, token) in key.tokens.iter().enumerate() {
            assert_eq!(
                bit(&key.clamped, position),
                !(2..10).contains(&position),
                "{key:?}"
            );
            assert_eq!(bit(&key.masked, position), *token == 5, "{key:?}");
        }
        assert_eq!(
            (key.tokens.len(), key.masked.len(), key.clamped.len()),
            (11, 2, 2)
        );
        assert_eq!((&key.tokens[..2], key.tokens[10]), (&[1, 2][..], 3));
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn text_can_be_left_out_of_frames_but_never_of_results() {
    let server = TestServer::demo().await;
    for (text, of_deltas, of_keyframes) in [
        (frame_policy::Text::Unspecified, true, true),
        (frame_policy::Text::AllFrames, true, true),
        (frame_policy::Text::Keyframes, false, true),
        (frame_policy::Text::None, false, false),
    ] {
        let policy = FramePolicy {
            text: text.into(),
            ..FramePolicy::default()
        };
        let answer = generate(&mut server.client(), request(policy)).await.unwrap();
        assert!(answer.frames.len() > 2);
        for frame in &answer.frames {
            let wanted = match frame.content {
                Some(frame::Content::Keyframe(_)) => of_keyframes,
                _ => of_deltas,
            };
            assert_eq!(frame.text.is_some(), wanted, "{text:?}");
        }
        assert!(!answer.results[0].text().is_empty());
    }
    server.stop().await;
}

/// Positions of the closed form are independent: a token's log-probability is that of the law, whenever it came.
#[tokio::test(flavor = "multi_thread")]
async fn log_probabilities_are_those_of_the_network() {
    let server = TestServer::with_network(&config(), closed_form()).await;
    let part = |part| TemplatePart { part: Some(part) };
    let tokens = part(template_part::Part::Tokens(TokenList { ids: vec![4, 4] }));
    for (name, sampler) in denoised::server::sampler::ALL {
        let request = InfillRequest {
            template: vec![tokens.clone(), part(gap(10))],
            sampling: Some(Sampling {
                sampler: Some(sampler),
                // They change the choice, not what is told of it.
                temperature: Some(2.0),
                top_k: Some(4),
                ..Sampling::default()
            }),
            ..InfillRequest::default()
        };
        let answer = infill(&mut server.client(), request).await.unwrap();
        let result = &answer.results[0];
        for (position, &told) in result.log_probabilities.iter().enumerate() {
            let token = result.tokens[position] as usize;
            let law = [0.3f64, 0.25, 0.2, 0.15, 0.1][token].ln();
            let wanted = if position < 2 { 0.0 } else { law };
            assert!(
                (f64::from(told) - wanted).abs() < 1e-3,
                "{name} at {position}: {told}, not {wanted}"
            );
        }
        let last = answer.frames.last().unwrap();
        let Some(frame::Content::Keyframe(key)) = &last.content else {
            panic!("{last:?}")
        };
        assert_eq!(key.log_probabilities, result.log_probabilities, "{name}");
    }
    server.stop().await;
}
