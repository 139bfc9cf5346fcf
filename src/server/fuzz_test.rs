//! Messages of strangers, read as far as the engine.
#![expect(clippy::unwrap_used, reason = "tests")]

use prost::Message;

use super::resume::{self, Repeated};
use super::template::Template;
use super::token_sets::TokenSets;
use super::{request, tokens};
use crate::bundle::{self, Bundle, MODEL, TOKENIZER, manifest_tests, tokenizer_tests};
use crate::config::LimitsConfig;
use crate::models::ServedModel;
use crate::mutants::{Target, fuzz};
use crate::network::NetworkError;
use crate::proto::v1::template_part::Part;
use crate::proto::{bits, v1};

/// A model of four words and a mask.
pub(super) fn model() -> ServedModel {
    let folder = tempfile::tempdir().unwrap();
    let words = tokenizer_tests::words(&tokenizer_tests::SEA).to_string();
    let mut manifest = manifest_tests::tiny();
    let files = [(MODEL, &b""[..]), (TOKENIZER, words.as_bytes())];
    let place = folder.path().join("1");
    bundle::write(&place, &mut manifest, &files).unwrap();
    let none = || Err(NetworkError::Load("none is needed".to_owned()));
    ServedModel::new(&Bundle::open(&place).unwrap(), 1, Box::new(none)).unwrap()
}

pub(super) fn limits() -> LimitsConfig {
    LimitsConfig {
        max_request_tokens: 1000,
        ..LimitsConfig::default()
    }
}

fn part(part: Part) -> v1::TemplatePart {
    v1::TemplatePart { part: Some(part) }
}

fn gap(positions: u32, allowed: Option<&str>) -> v1::TemplatePart {
    let allowed = allowed.map(str::to_owned);
    part(Part::Gap(v1::Gap { positions, allowed }))
}

fn sampling() -> v1::Sampling {
    v1::Sampling {
        sampler: Some(v1::sampling::Sampler::Remask(v1::Remask { rate: Some(0.1) })),
        steps: Some(4),
        temperature: Some(0.7),
        top_k: Some(3),
        top_p: Some(0.9),
        num_samples: Some(2),
        seed: Some(7),
        start_time: None,
    }
}

fn infill() -> v1::InfillRequest {
    let draft = v1::draft::Content::Text("the sea".to_owned());
    v1::InfillRequest {
        model: Some(v1::ModelReference {
            name: "tiny".to_owned(),
            version: 1,
        }),
        template: vec![
            part(Part::Text("the sea".to_owned())),
            gap(2, Some("nouns")),
            part(Part::Tokens(v1::TokenList { ids: vec![2, 3] })),
            part(Part::Draft(v1::Draft { content: Some(draft) })),
            gap(1, None),
        ],
        sampling: Some(v1::Sampling {
            start_time: Some(0.5),
            ..sampling()
        }),
        frames: Some(v1::FramePolicy {
            when: v1::frame_policy::When::EverySteps.into(),
            every_steps: Some(2),
            ..v1::FramePolicy::default()
        }),
        request_id: "an-id".to_owned(),
        token_sets: vec![v1::TokenSet {
            name: "nouns".to_owned(),
            texts: vec!["sea".to_owned()],
            ids: vec![0],
        }],
        ..v1::InfillRequest::default()
    }
}

/// Bytes that mean something to protobuf: long lengths, groups, numbers that are none.
pub(super) const WORDS: &[&[u8]] = &[
    b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
    b"\xff\xff\xff\xff\x0f",
    b"\x00\x00\x00\x00\x00\x00\xf8\x7f",
    b"\x00\x00\x00\x00\x00\x00\xf0\xff",
    b"\x00\x00\xc0\x7f",
    b"\x0b",
    b"\x0a\x00",
    "\u{2581}\u{1f30a}\0".as_bytes(),
];

/// A template that is accepted has what its canvases need, and can be told again in the same words.
fn admitted(
    template: &Template,
    asked: Option<v1::Sampling>,
    sets: &TokenSets,
    model: &ServedModel,
    limits: &LimitsConfig,
) -> Option<request::Resolved> {
    let length = template.length();
    assert!(length >= 1 && length <= model.manifest().max_length);
    assert_eq!(template.canvas().len(), length);
    assert!(template.gaps() >= 1);
    let again = request::template(template.parts(), sets, model, limits).unwrap();
    assert_eq!(again.canvas(), template.canvas());
    sets.resolve(template).ok()?;
    let resolved = request::sampling(asked, template, model, limits).ok()?;
    assert!(resolved.samples as usize * length <= limits.max_request_tokens);
    assert!((1..=limits.max_steps).contains(&resolved.sampling.grid.steps));
    assert!(resolved.sampling.choice.temperature.is_finite());
    Some(resolved)
}

#[test]
fn requests() {
    let generate = |prompt| {
        v1::GenerateRequest {
            model: infill().model,
            prompt_as: Some(prompt),
            length: Some(9),
            sampling: Some(sampling()),
            allowed: Some("nouns".to_owned()),
            token_sets: infill().token_sets,
            frames: infill().frames,
            ..v1::GenerateRequest::default()
        }
        .encode_to_vec()
    };
    let target = Target {
        name: "requests",
        sound: vec![
            generate(v1::generate_request::PromptAs::Prompt("the sea was".to_owned())),
            generate(v1::generate_request::PromptAs::PromptTokens(v1::TokenList {
                ids: vec![0, 1],
            })),
        ],
        words: WORDS,
    };
    let (model, limits) = (model(), limits());
    fuzz!(target, |input: &[u8]| {
        let Ok(asked) = v1::GenerateRequest::decode(input) else {
            return;
        };
        let (_id, _frames) = (request::id(asked.request_id), request::frames(asked.frames));
        let Ok(sets) = TokenSets::read(asked.token_sets, &model, &limits) else {
            return;
        };
        let (prompt, length, allowed) = (asked.prompt_as, asked.length, asked.allowed);
        if let Ok(template) = request::prompt(prompt, length, allowed, &sets, &model, &limits) {
            admitted(&template, asked.sampling, &sets, &model, &limits);
        }
    });
}

#[test]
fn templates() {
    let target = Target {
        name: "templates",
        sound: vec![infill().encode_to_vec()],
        words: WORDS,
    };
    let (model, limits) = (model(), limits());
    fuzz!(target, |input: &[u8]| {
        let Ok(asked) = v1::InfillRequest::decode(input) else {
            return;
        };
        let Ok(sets) = TokenSets::read(asked.token_sets, &model, &limits) else {
            return;
        };
        if let Ok(template) = request::template(asked.template, &sets, &model, &limits) {
            admitted(&template, asked.sampling, &sets, &model, &limits);
        }
    });
}

#[test]
fn resumed_states() {
    let (model, limits) = (model(), limits());
    let mask = model.manifest().mask_token.unwrap();
    let key = v1::Keyframe {
        tokens: vec![0, 1, 2, mask, mask],
        committed_at: vec![0, 0, 0, 2, 2],
        log_probabilities: vec![0.0, 0.0, 0.0, -0.5, 0.0],
        masked: bits([false, false, false, true, true].into_iter()),
        clamped: bits([true, true, true, false, false].into_iter()),
    };
    let resume = v1::Resume {
        accepted: Some(v1::Accepted {
            request_id: "an-id".to_owned(),
            model: infill().model,
            sampling: Some(sampling()),
            template: vec![part(Part::Text("the sea was".to_owned())), gap(2, None)],
            length: 5,
            ..v1::Accepted::default()
        }),
        frames: vec![v1::Frame {
            canvas: 0,
            step: 2,
            nfe: 2,
            content: Some(v1::frame::Content::Keyframe(key)),
            ..v1::Frame::default()
        }],
        finished: vec![1],
    };
    let target = Target {
        name: "resumed_states",
        sound: vec![resume.encode_to_vec()],
        words: WORDS,
    };
    let sound = v1::Resume::decode(&*target.cook(&[])).unwrap();
    assert!(
        resumed(sound, &model, &limits).is_some(),
        "the one to begin with is sound"
    );
    fuzz!(target, |input: &[u8]| {
        if let Ok(asked) = v1::Resume::decode(input) {
            resumed(asked, &model, &limits);
        }
    });
}

fn resumed(asked: v1::Resume, model: &ServedModel, limits: &LimitsConfig) -> Option<()> {
    let Repeated {
        template,
        sampling,
        token_sets,
        states,
        ..
    } = resume::repeated(Some(asked), &[]).ok()??;
    let sets = TokenSets::read(token_sets, model, limits).ok()?;
    let template = request::template(template, &sets, model, limits).ok()?;
    let resolved = admitted(&template, Some(sampling), &sets, model, limits)?;
    let resume = states.check(&template, &resolved, model).ok()?;
    let canvases = resume.states.keys().chain(&resume.finished);
    assert!(canvases.clone().all(|canvas| *canvas < resolved.samples));
    Some(())
}

#[test]
fn files_of_tokens() {
    // Somebody may have put a token where its hash belongs.
    let secret = "0c0ffee".repeat(9) + "0";
    let sound = format!("[[token]]\nname = \"a\"\nsha256 = \"{secret}\"\nmax_share = 0.5\nweight = 3\n");
    let target = Target {
        name: "files_of_tokens",
        sound: vec![sound.into_bytes()],
        words: &[
            b"[[token]]\n",
            b"models = [\"a\"]\n",
            b"admin = true\n",
            b"nan",
            b"\"",
            b"=",
        ],
    };
    fuzz!(target, |input: &[u8]| {
        match tokens::read(input) {
            Ok(known) => assert!(!known.is_empty()),
            Err(problem) => assert!(!problem.contains("c0ffee0c0ffee"), "{problem}"),
        }
    });
}
