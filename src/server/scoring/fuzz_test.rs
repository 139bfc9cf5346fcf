//! Texts of strangers that are to be scored, read as far as the engine.

use prost::Message;

use super::super::fuzz_test::{WORDS, limits, model};
use super::read;
use crate::diffusion::likelihood::Likelihood;
use crate::mutants::{Target, fuzz};
use crate::proto::v1;

#[test]
fn texts_to_score() {
    let text = |text: &str| v1::TextOrTokens {
        content: Some(v1::text_or_tokens::Content::Text(text.to_owned())),
    };
    let part = |content, context| v1::PartToScore {
        content: Some(content),
        context,
    };
    let score = v1::ScoreRequest {
        texts: vec![v1::TextToScore {
            parts: vec![part(text("the"), true), part(text("sea was"), false)],
        }],
        likelihood: Some(v1::Likelihood {
            likelihood: Some(v1::likelihood::Likelihood::Bound(v1::Bound { draws: Some(8) })),
        }),
        ..v1::ScoreRequest::default()
    };
    let target = Target {
        name: "texts_to_score",
        sound: vec![score.encode_to_vec()],
        words: WORDS,
    };
    let (model, limits) = (model(), limits());
    let graph = model.manifest().graph;
    fuzz!(target, |input: &[u8]| {
        let Ok(asked) = v1::ScoreRequest::decode(input) else {
            return;
        };
        let default = super::default_bound(&limits);
        if let Ok(Likelihood::Bound { draws }) = read::likelihood(asked.likelihood, default, graph, &limits) {
            assert!(draws <= limits.max_steps);
        }
        let Ok(documents) = read::documents(asked.texts, &model, &limits) else {
            return;
        };
        let sequences = documents.iter().flat_map(|document| &document.sequences);
        let positions: usize = sequences
            .map(|text| {
                assert_eq!(text.tokens.len(), text.context.len());
                assert!(text.tokens.len() <= model.manifest().max_length);
                text.tokens.len()
            })
            .sum();
        assert!(positions <= limits.max_request_tokens);
    });
}
