//! Templates on the command line: text with gaps such as `[[20]]`, `[[1| yes| no]]` and drafts such as `[[~as it was]]`.
//!
//! `\[` stands for a bracket that opens no gap and `\\` for a backslash; inside of `[[` and `]]`, `\]` and `\|` stand
//! for themselves. Every other backslash stands for itself. So any text can be written, `[[` for instance as `\[[`.

use crate::proto::v1::template_part::Part;
use crate::proto::v1::{Draft, Gap, TemplatePart, TokenSet, draft};

/// Characters of a malformed gap that an error quotes.
const QUOTED: usize = 20;

/// A template as a request has it.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Template {
    pub(super) parts: Vec<TemplatePart>,
    /// What its gaps may be filled with, where they say so.
    pub(super) token_sets: Vec<TokenSet>,
}

/// Splits a template into its parts.
///
/// # Errors
/// A line that says which gap cannot be read, and what would be right.
pub(super) fn parse(template: &str) -> Result<Template, String> {
    let (mut parts, mut token_sets) = (Vec::new(), Vec::new());
    let mut text = String::new();
    let mut rest = template;
    while let Some(next) = rest.chars().next() {
        let escaped = rest.strip_prefix('\\').filter(|r| r.starts_with(['[', '\\']));
        if let Some(escaped) = escaped {
            let (literal, after) = escaped.split_at(1);
            text.push_str(literal);
            rest = after;
        } else if let Some(opened) = rest.strip_prefix("[[") {
            let (part, after) = open(opened, &mut token_sets)?;
            if !text.is_empty() {
                parts.push(Part::Text(std::mem::take(&mut text)));
            }
            parts.push(part);
            rest = after;
        } else {
            text.push(next);
            rest = &rest[next.len_utf8()..];
        }
    }
    if !text.is_empty() {
        parts.push(Part::Text(text));
    }
    let part = |part| TemplatePart { part: Some(part) };
    Ok(Template {
        parts: parts.into_iter().map(part).collect(),
        token_sets,
    })
}

/// Reads a gap or draft whose `[[` is behind us: what it is, and what follows it.
fn open<'a>(opened: &'a str, token_sets: &mut Vec<TokenSet>) -> Result<(Part, &'a str), String> {
    let (fields, after) = fields(opened).ok_or_else(|| {
        let start: String = opened.chars().take(QUOTED).collect();
        format!(
            "the gap at {:?} is not closed; write [[N]], or \\[[ for brackets",
            format!("[[{start}")
        )
    })?;
    let (first, texts) = fields
        .split_first()
        .map_or(("", &[][..]), |(f, t)| (f.as_str(), t));
    if let Some(text) = first.strip_prefix('~') {
        let text = [&[text.to_owned()], texts].concat().join("|");
        let content = Some(draft::Content::Text(text));
        return Ok((Part::Draft(Draft { content }), after));
    }
    let positions = first.trim().parse().ok().filter(|positions| *positions > 0);
    let positions = positions.ok_or_else(|| {
        format!(
            "the gap [[{}]] must hold a number of tokens, 1 to {}, or ~ and a text to begin with; write \\[[ for brackets",
            first.escape_debug(),
            u32::MAX
        )
    })?;
    let allowed = (!texts.is_empty()).then(|| set_of(texts, token_sets));
    Ok((Part::Gap(Gap { positions, allowed }), after))
}

/// What stands before `]]`, split where `|` does, and what comes after.
fn fields(opened: &str) -> Option<(Vec<String>, &str)> {
    let (mut fields, mut rest) = (vec![String::new()], opened);
    loop {
        let next = rest.chars().next()?;
        let field = fields.last_mut()?;
        if let Some(after) = rest.strip_prefix("]]") {
            return Some((fields, after));
        }
        if let Some(escaped) = rest
            .strip_prefix('\\')
            .filter(|r| r.starts_with([']', '|', '\\']))
        {
            let (literal, after) = escaped.split_at(1);
            field.push_str(literal);
            rest = after;
            continue;
        }
        if next == '|' {
            fields.push(String::new());
        } else {
            field.push(next);
        }
        rest = &rest[next.len_utf8()..];
    }
}

/// The name of the set of these texts; the same texts are one set.
fn set_of(texts: &[String], token_sets: &mut Vec<TokenSet>) -> String {
    if let Some(known) = token_sets.iter().find(|set| set.texts == texts) {
        return known.name.clone();
    }
    let name = (token_sets.len() + 1).to_string();
    token_sets.push(TokenSet {
        name: name.clone(),
        ids: Vec::new(),
        texts: texts.to_vec(),
    });
    name
}

#[cfg(test)]
#[expect(clippy::unwrap_used, clippy::panic, reason = "tests")]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The inverse of [`parse`].
    fn written(parts: &[TemplatePart]) -> String {
        let write = |part: &TemplatePart| match part.part.clone() {
            Some(Part::Text(text)) => text.replace('\\', r"\\").replace('[', r"\["),
            Some(Part::Draft(Draft {
                content: Some(draft::Content::Text(text)),
            })) => format!("[[~{}]]", text.replace('\\', r"\\").replace(']', r"\]")),
            Some(Part::Gap(Gap {
                positions,
                allowed: None,
            })) => format!("[[{positions}]]"),
            other => panic!("{other:?}"),
        };
        parts.iter().map(write).collect()
    }

    fn text(text: &str) -> TemplatePart {
        TemplatePart {
            part: Some(Part::Text(text.to_owned())),
        }
    }

    fn draft(text: &str) -> TemplatePart {
        let content = Some(draft::Content::Text(text.to_owned()));
        TemplatePart {
            part: Some(Part::Draft(Draft { content })),
        }
    }

    fn gap(positions: u32) -> TemplatePart {
        TemplatePart {
            part: Some(Part::Gap(Gap {
                positions,
                allowed: None,
            })),
        }
    }

    #[test]
    fn gaps_and_text_alternate() {
        let parts = parse("Hi, my name is [[20]] and that's why I'm late.[[ 3 ]]")
            .unwrap()
            .parts;
        let wanted = [
            text("Hi, my name is "),
            gap(20),
            text(" and that's why I'm late."),
            gap(3),
        ];
        assert_eq!(parts, wanted);
        assert_eq!(parse("[[1]][[2]]").unwrap().parts, [gap(1), gap(2)]);
        assert_eq!(parse("").unwrap(), Template::default());
    }

    #[test]
    fn gaps_say_what_they_may_be_filled_with() {
        let Template { parts, token_sets } =
            parse(r"It is [[1| true| fa\|lse]], [[2|\]]][[3| true| fa\|lse]]").unwrap();
        let of = |positions, set: &str| TemplatePart {
            part: Some(Part::Gap(Gap {
                positions,
                allowed: Some(set.to_owned()),
            })),
        };
        let wanted = [text("It is "), of(1, "1"), text(", "), of(2, "2"), of(3, "1")];
        assert_eq!(parts, wanted);
        let texts: Vec<_> = token_sets.iter().map(|set| set.texts.clone()).collect();
        assert_eq!(texts, [vec![" true", " fa|lse"], vec!["]"]]);
    }

    #[test]
    fn drafts_begin_with_a_tilde() {
        let parts = parse(r"The king [[~went|up to \]] the]] house").unwrap().parts;
        assert_eq!(
            parts,
            [text("The king "), draft("went|up to ]] the"), text(" house")]
        );
    }

    #[test]
    fn brackets_and_backslashes_can_be_written() {
        for (template, parts) in [
            (r"a \[[ b", vec![text("a [[ b")]),
            (r"\[[20]]", vec![text("[[20]]")]),
            (r"\[[[20]]", vec![text("["), gap(20)]),
            (r"\\[[20]]", vec![text(r"\"), gap(20)]),
            (r"a[1] ]] C:\dir\", vec![text(r"a[1] ]] C:\dir\")]),
        ] {
            assert_eq!(parse(template).unwrap().parts, parts, "{template}");
        }
    }

    #[test]
    fn mistakes_are_named() {
        for (bad, says) in [
            ("[[", "not closed"),
            ("a [[x]] b", "[[x]]"),
            ("[[0]]", "[[0]]"),
            ("[[-1]]", "[[-1]]"),
            ("[[99999999999]]", "4294967295"),
            ("[[]]", "[[]]"),
            ("[[[5]]", "[[[5]]"),
            ("[[1\n2]]", "[[1\\n2]]"),
        ] {
            let error = parse(bad).unwrap_err();
            assert!(error.contains(says) && error.contains(r"\[["), "{bad}: {error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
    }

    /// Any answer of [`parse`]: no empty text, and no two texts side by side.
    fn parts() -> impl Strategy<Value = Vec<TemplatePart>> {
        let gaps = prop_oneof![
            (1..=u32::MAX).prop_map(gap),
            "[\\[\\]\\\\|a0 \n\u{e9}]{0,6}".prop_map(|text| draft(&text)),
        ];
        let piece = ("[\\[\\]\\\\a0 \n\u{e9}]{0,6}", prop::option::of(gaps));
        prop::collection::vec(piece, 0..6).prop_map(|pieces| {
            let mut parts: Vec<TemplatePart> = Vec::new();
            for (words, gap) in pieces {
                let after_gap = !matches!(
                    parts.last(),
                    Some(TemplatePart {
                        part: Some(Part::Text(_))
                    })
                );
                parts.extend(Some(text(&words)).filter(|_| !words.is_empty() && after_gap));
                parts.extend(gap);
            }
            parts
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(parts in parts()) {
            prop_assert_eq!(parse(&written(&parts)).unwrap().parts, parts);
        }

        #[test]
        fn never_panics(text in ".*", brackets in "[\\[\\]\\\\5]*") {
            drop((parse(&text), parse(&brackets)));
        }
    }
}
