//! Infill: any number of gaps anywhere, and clamped text comes back byte for byte.

use denoised::proto::v1::template_part::Part;
use denoised::proto::v1::{
    DetokenizeRequest, InfillRequest, Sampling, TemplatePart, TokenList, TokenizeRequest,
};

use crate::support::{TestServer, gap, infill};

fn parts(parts: impl IntoIterator<Item = Part>) -> Vec<TemplatePart> {
    parts
        .into_iter()
        .map(|part| TemplatePart { part: Some(part) })
        .collect()
}

fn request(template: Vec<TemplatePart>) -> InfillRequest {
    let sampling = Some(Sampling {
        steps: Some(8),
        seed: Some(3),
        ..Sampling::default()
    });
    InfillRequest {
        template,
        sampling,
        ..InfillRequest::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clamped_text_comes_back_byte_for_byte() {
    let server = TestServer::demo().await;
    let texts = [
        "  Caf\u{e9} \u{1F408}\u{200D}\u{2B1B} said,\r\n\t",
        "e\u{301} <|endoftext|> and \u{FFFD}",
        " the end.\0",
    ];
    let templates = [
        vec![Part::Text(texts[0].into()), gap(5)],
        vec![gap(4), Part::Text(texts[1].into())],
        vec![
            gap(2),
            Part::Text(texts[0].into()),
            gap(3),
            Part::Text(texts[1].into()),
            gap(1),
            Part::Text(texts[2].into()),
        ],
        vec![gap(3), gap(4)],
    ];
    for template in templates {
        let answer = infill(&mut server.client(), request(parts(template.clone())))
            .await
            .unwrap();
        let result = &answer.results[0];
        let mut rest = result.text.as_deref().unwrap();
        for part in &template {
            if let Part::Text(clamped) = part {
                let at = rest
                    .find(clamped.as_str())
                    .unwrap_or_else(|| panic!("{clamped:?} is not in {rest:?}"));
                rest = &rest[at + clamped.len()..];
            }
        }
        match &template[0] {
            Part::Text(clamped) => assert!(result.text.as_deref().unwrap().starts_with(clamped.as_str())),
            _ => assert!(result.committed_at[0] > 0),
        }
        if let Some(Part::Text(_)) = template.last() {
            assert_eq!(rest, "", "text ends with the last clamped part");
        }
        let gaps: u32 = template
            .iter()
            .map(|part| {
                if let Part::Gap(gap) = part {
                    gap.positions
                } else {
                    0
                }
            })
            .sum();
        assert_eq!(
            result.committed_at.iter().filter(|step| **step > 0).count() as u32,
            gaps
        );
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clamped_tokens_stay_where_they_are() {
    let server = TestServer::demo().await;
    let text = "And God said";
    let tokenized = server
        .client()
        .tokenize(TokenizeRequest {
            text: text.into(),
            model: None,
        })
        .await;
    let tokens = tokenized.unwrap().into_inner().tokens;
    let detokenized = server
        .client()
        .detokenize(DetokenizeRequest {
            tokens: tokens.clone(),
            pieces: true,
            model: None,
        })
        .await;
    let detokenized = detokenized.unwrap().into_inner();
    assert_eq!(detokenized.text, text);
    assert_eq!(detokenized.pieces.len(), tokens.len());
    assert_eq!(detokenized.pieces.concat(), text);
    let template = vec![gap(3), Part::Tokens(TokenList { ids: tokens.clone() }), gap(2)];
    let answer = infill(&mut server.client(), request(parts(template)))
        .await
        .unwrap();
    assert_eq!(answer.tokens()[0][3..3 + tokens.len()], tokens);
    assert!(answer.results[0].text.as_ref().unwrap().contains(text));
    server.stop().await;
}

/// The tokens of words begin with their space: one before a gap is left to the token that follows.
#[tokio::test(flavor = "multi_thread")]
async fn a_space_before_a_gap_changes_nothing_but_who_writes_it() {
    let server = TestServer::demo().await;
    let ask = async |before: &str, between: &str| {
        let template = [
            Part::Text(before.into()),
            gap(3),
            Part::Text(between.into()),
            gap(2),
        ];
        let answer = infill(&mut server.client(), request(parts(template)))
            .await
            .unwrap();
        answer.results[0].clone()
    };
    let closed = ask("He said to the king", ", and he went to the").await;
    let open = ask("He said to the king ", ", and he went to the ").await;
    assert_eq!(open.tokens, closed.tokens);
    let (open, closed) = (open.text.unwrap(), closed.text.unwrap());
    assert!(
        open.starts_with("He said to the king ") && !open.starts_with("He said to the king  "),
        "{open}"
    );
    if closed.starts_with("He said to the king ") && closed.contains(", and he went to the ") {
        assert_eq!(open, closed);
    }
    server.stop().await;
}
