//! Templates on the command line: text with gaps such as `[[20]]`.
//!
//! `\[[` stands for two brackets that open no gap.

use crate::proto::v1::TemplatePart;
use crate::proto::v1::template_part::Part;

/// Splits a template into its parts.
///
/// # Errors
/// A line that says which gap cannot be read, and what would be right.
pub(super) fn parse(template: &str) -> Result<Vec<TemplatePart>, String> {
    let mut parts = Vec::new();
    let mut text = String::new();
    let mut rest = template;
    while let Some(at) = rest.find("[[") {
        let (before, opened) = rest.split_at(at);
        if let Some(before) = before.strip_suffix('\\') {
            text.push_str(before);
            text.push_str("[[");
            rest = &opened[2..];
            continue;
        }
        text.push_str(before);
        let (inside, after) = opened[2..].split_once("]]").ok_or_else(|| {
            format!("the gap at {opened:.20?} is not closed; write [[N]], or \\[[ for brackets")
        })?;
        let positions: u32 = inside.trim().parse().ok().filter(|n| *n > 0).ok_or_else(|| {
            format!("the gap [[{inside}]] must hold a number of tokens, at least 1; write \\[[ for brackets")
        })?;
        if !text.is_empty() {
            parts.push(Part::Text(std::mem::take(&mut text)));
        }
        parts.push(Part::Gap(positions));
        rest = after;
    }
    text.push_str(rest);
    if !text.is_empty() {
        parts.push(Part::Text(text));
    }
    Ok(parts
        .into_iter()
        .map(|part| TemplatePart { part: Some(part) })
        .collect())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, clippy::panic, reason = "tests")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn written(parts: &[TemplatePart]) -> String {
        let write = |part: &TemplatePart| match part.part.clone() {
            Some(Part::Text(text)) => text.replace("[[", "\\[["),
            Some(Part::Gap(n)) => format!("[[{n}]]"),
            other => panic!("{other:?}"),
        };
        parts.iter().map(write).collect()
    }

    #[test]
    fn gaps_and_text_alternate() {
        let parts = parse("Hi, my name is [[20]] and that's why I'm late[[3]]").unwrap();
        let gaps: Vec<_> = parts
            .iter()
            .map(|p| matches!(p.part, Some(Part::Gap(_))))
            .collect();
        assert_eq!(gaps, [false, true, false, true]);
        assert_eq!(
            parse(r"a \[[ b").unwrap(),
            [TemplatePart {
                part: Some(Part::Text("a [[ b".into()))
            }]
        );
    }

    #[test]
    fn mistakes_are_named() {
        for bad in ["[[", "a [[x]] b", "[[0]]", "[[-1]]", "[[99999999999]]", "[[]]"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(pieces in prop::collection::vec(("[a-z \n\u{e9}]{1,8}", 1u32..999), 1..6)) {
            let text: String = pieces.iter().map(|(text, gap)| format!("{text}[[{gap}]]")).collect();
            prop_assert_eq!(written(&parse(&text).unwrap()), text);
        }

        #[test]
        fn never_panics(text in ".*") {
            drop(parse(&text));
        }
    }
}
