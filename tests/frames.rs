//! Frames: keyframes and deltas rebuild the canvas, policies are kept, results agree.

use denoised::proto::v1::{
    FramePolicy, GenerateRequest, GetModelRequest, ListModelsRequest, Sampling, frame, frame_policy,
};

use crate::support::{Answer, TestServer, closed_form, config, generate};

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
    let mut canvas: Vec<u32> = Vec::new();
    for (index, frame) in answer.frames.iter().enumerate() {
        let edge = index == 0 || index + 1 == answer.frames.len();
        match frame.content.as_ref().unwrap() {
            frame::Content::Keyframe(key) => {
                canvas.clone_from(&key.tokens);
                let masked: u32 = key.masked.iter().map(|byte| byte.count_ones()).sum();
                assert_eq!(masked, frame.masked);
            }
            frame::Content::Delta(delta) => {
                assert!(!edge, "the first and the last frame are keyframes");
                assert!(delta.positions.is_sorted());
                for (position, token) in delta.positions.iter().zip(&delta.tokens) {
                    canvas[*position as usize] = *token;
                }
            }
        }
        assert_eq!(canvas.iter().filter(|t| **t == 5).count() as u32, frame.masked);
    }
    assert_eq!(canvas, answer.results[0].tokens);
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
        min_interval_ms: 60_000,
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
    assert!(listed.contains(&model) && model.is_default && model.has_tokenizer);
    assert_eq!(model.mask_token, Some(model.vocab_size - 1));
    assert!(model.provenance_json.contains("bits"));
    let request = GenerateRequest {
        length: Some(32),
        ..request(FramePolicy::default())
    };
    let answer = generate(
        &mut server.client(),
        GenerateRequest {
            prompt: "In the beginning".into(),
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
