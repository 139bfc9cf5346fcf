//! Templates on the command line: text with gaps such as `[[20]]`.
//!
//! `\[` stands for a bracket that opens no gap and `\\` for a backslash; every other backslash stands
//! for itself. So any text can be written, `[[` for instance as `\[[`.

use crate::proto::v1::template_part::Part;
use crate::proto::v1::{Gap, TemplatePart};

/// Characters of a malformed gap that an error quotes.
const QUOTED: usize = 20;

/// Splits a template into its parts.
///
/// # Errors
/// A line that says which gap cannot be read, and what would be right.
pub(super) fn parse(template: &str) -> Result<Vec<TemplatePart>, String> {
    let mut parts = Vec::new();
    let mut text = String::new();
    let mut rest = template;
    while let Some(next) = rest.chars().next() {
        let escaped = rest.strip_prefix('\\').filter(|r| r.starts_with(['[', '\\']));
        if let Some(escaped) = escaped {
            let (literal, after) = escaped.split_at(1);
            text.push_str(literal);
            rest = after;
        } else if let Some(opened) = rest.strip_prefix("[[") {
            let (positions, after) = gap(opened)?;
            if !text.is_empty() {
                parts.push(Part::Text(std::mem::take(&mut text)));
            }
            parts.push(Part::Gap(Gap {
                positions,
                allowed: None,
            }));
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
    Ok(parts.into_iter().map(part).collect())
}

/// Reads a gap whose `[[` is behind us: its positions, and what follows it.
fn gap(opened: &str) -> Result<(u32, &str), String> {
    let (inside, after) = opened.split_once("]]").ok_or_else(|| {
        let start: String = opened.chars().take(QUOTED).collect();
        format!(
            "the gap at {:?} is not closed; write [[N]], or \\[[ for brackets",
            format!("[[{start}")
        )
    })?;
    match inside.trim().parse() {
        Ok(positions) if positions > 0 => Ok((positions, after)),
        _ => Err(format!(
            "the gap [[{}]] must hold a number of tokens, 1 to {}; write \\[[ for brackets",
            inside.escape_debug(),
            u32::MAX
        )),
    }
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
        let parts = parse("Hi, my name is [[20]] and that's why I'm late.[[ 3 ]]").unwrap();
        let wanted = [
            text("Hi, my name is "),
            gap(20),
            text(" and that's why I'm late."),
            gap(3),
        ];
        assert_eq!(parts, wanted);
        assert_eq!(parse("[[1]][[2]]").unwrap(), [gap(1), gap(2)]);
        assert_eq!(parse("").unwrap(), []);
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
            assert_eq!(parse(template).unwrap(), parts, "{template}");
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
        let piece = ("[\\[\\]\\\\a0 \n\u{e9}]{0,6}", prop::option::of(1..=u32::MAX));
        prop::collection::vec(piece, 0..6).prop_map(|pieces| {
            let mut parts: Vec<TemplatePart> = Vec::new();
            for (words, positions) in pieces {
                let after_gap = !matches!(
                    parts.last(),
                    Some(TemplatePart {
                        part: Some(Part::Text(_))
                    })
                );
                parts.extend(Some(text(&words)).filter(|_| !words.is_empty() && after_gap));
                parts.extend(positions.map(gap));
            }
            parts
        })
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(parts in parts()) {
            prop_assert_eq!(parse(&written(&parts)).unwrap(), parts);
        }

        #[test]
        fn never_panics(text in ".*", brackets in "[\\[\\]\\\\5]*") {
            drop((parse(&text), parse(&brackets)));
        }
    }
}
