//! Benchmarks that come as tokens with spaces between them, as the plain text that published numbers are of.
//!
//! WikiText, PTB and LM1B were split into words and signs long ago (` @-@ `, ` n't`, ` , `), and LAMBADA has quotation
//! marks of its own. Zero-shot bounds in the literature are of text that was put together again; the rules are those
//! of the SEDD authors' `data.py`, in their order, but for one that can match nothing that the benchmarks hold (it
//! looks for a digit between slashes).

use regex::{Captures, Regex};

/// A benchmark, by how its text was taken apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Benchmark {
    /// WikiText-2 and WikiText-103.
    Wikitext,
    /// Penn Treebank.
    Ptb,
    /// One Billion Words.
    Lm1b,
    /// LAMBADA.
    Lambada,
}

/// One step on the way back to text.
#[derive(Clone, Debug)]
enum Rule {
    /// Everywhere the second in place of the first.
    Text(&'static str, &'static str),
    /// Without what was matched around the groups.
    Groups(Regex),
    /// Only what is between the white space at both ends, after a new line.
    Line,
}

/// Puts the text of a benchmark together again.
#[derive(Clone, Debug)]
pub struct Detokenizer(Vec<Rule>);

impl Detokenizer {
    /// For the text of a benchmark.
    ///
    /// # Errors
    /// None, as long as the patterns are sound.
    pub fn new(benchmark: Benchmark) -> Result<Self, regex::Error> {
        let text = |rules: &[(&'static str, &'static str)]| -> Vec<Rule> {
            rules.iter().map(|(from, to)| Rule::Text(from, to)).collect()
        };
        let groups = |patterns: &[&str]| -> Result<Vec<Rule>, regex::Error> {
            let rule = |pattern: &&str| Ok(Rule::Groups(Regex::new(pattern)?));
            patterns.iter().map(rule).collect()
        };
        let rules = match benchmark {
            Benchmark::Wikitext => [
                text(&[("s '", "s'"), (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")]),
                text(&SPACED_SIGNS),
                groups(&[
                    r"(\()\s*([^)]*?)\s*(\))",
                    r"(\[)\s*([^\]]*?)\s*(\])",
                    r"(\{)\s*([^}]*?)\s*(\})",
                    r#"(")\s*([^"]*?)\s*(")"#,
                    r"(')\s*([^']*?)\s*(')",
                ])?,
                text(&[
                    ("= = = =", "===="),
                    ("= = =", "==="),
                    ("= =", "=="),
                    (" ° ", "°"),
                    (" \n", "\n"),
                    ("\n ", "\n"),
                    (" N ", " 1 "),
                    (" 's", "'s"),
                ]),
            ]
            .concat(),
            Benchmark::Ptb => [
                text(&[
                    (" 's", "'s"),
                    ("s ' ", "s' "),
                    (" n't", "n't"),
                    (" \n ", "\n"),
                    ("\\/", "/"),
                ]),
                // Twice: in ` N N ` the second has no space of its own at first.
                text(&[(" N ", " 1 "), (" N ", " 1 ")]),
                text(&[("$ 1", "$1"), ("# 1", "#1"), ("<unk>", "?")]),
            ]
            .concat(),
            Benchmark::Lm1b => [
                text(&[("http : / / ", "http://"), ("https : / / ", "https://")]),
                groups(&[r" ('\w+)", r"( \w+) (\. )", r"( \w+) (\.\n?)\z"])?,
                text(&[(" ? ", "? ")]),
                groups(&[r" (\?\n?)\z"])?,
                text(&[(" ! ", "! ")]),
                groups(&[r" (!\n?)\z"])?,
                text(&[(" , ", ", "), (" : ", ": "), (" ; ", "; "), (" / ", "/")]),
                groups(&[
                    r#"(") ([^"]+) (")"#,
                    r"(') ([^']+) (')",
                    r"(\() ([^()]+) (\))",
                    r"(\[) ([^\[\]]+) (\])",
                ])?,
                text(&[("$ ", "$"), ("£ ", "£")]),
            ]
            .concat(),
            Benchmark::Lambada => {
                let mut rules = text(&[("“", "\""), ("”", "\"")]);
                rules.push(Rule::Line);
                rules
            }
        };
        Ok(Self(rules))
    }

    /// The text.
    pub fn apply(&self, text: &str) -> String {
        self.0.iter().fold(text.to_owned(), |text, rule| match rule {
            Rule::Text(from, to) => text.replace(from, to),
            Rule::Groups(pattern) => {
                let groups = |captures: &Captures<'_>| -> String {
                    captures
                        .iter()
                        .skip(1)
                        .flatten()
                        .map(|group| group.as_str())
                        .collect()
                };
                pattern.replace_all(&text, groups).into_owned()
            }
            Rule::Line => format!("\n{}", text.trim()),
        })
    }
}

/// Signs that stand between two spaces.
const SPACED_SIGNS: [(&str, &str); 6] = [
    (" : ", ": "),
    (" ; ", "; "),
    (" . ", ". "),
    (" ! ", "! "),
    (" ? ", "? "),
    (" , ", ", "),
];

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    /// What the authors' functions make of the same.
    #[test]
    fn text_is_put_together_as_the_authors_do() {
        for (benchmark, text, is) in [
            (
                Benchmark::Wikitext,
                " = Robert Boulter = \n Robert Boulter is an English film , television and theatre actor . He had a \
                 guest @-@ starring role ( 2000 – 2005 ) on \" Herons \" ; 1 @,@ 200 people 's 20 ° C . \n",
                " = Robert Boulter =\nRobert Boulter is an English film, television and theatre actor. He had a \
                 guest-starring role (2000 – 2005) on \"Herons\"; 1,200 people's 20°C.\n",
            ),
            (
                Benchmark::Ptb,
                "the company 's N N rise does n't hurt traders ' $ N million <unk> 1\\/2",
                "the company's 1 1 rise doesn't hurt traders' $1 million ? 1/2",
            ),
            (
                Benchmark::Lm1b,
                "He said , \" It 's 5 / 6 done ( nearly ) . \" Is it ? See http : / / example . Yes .",
                "He said, \"It's 5/6 done (nearly) .\" Is it? See http://example . Yes.",
            ),
            (Benchmark::Lm1b, "It cost £ 5 . Why ?\n", "It cost £5. Why?\n"),
            (
                Benchmark::Lambada,
                " “ I see , ” he said \n",
                "\n\" I see , \" he said",
            ),
        ] {
            assert_eq!(Detokenizer::new(benchmark).unwrap().apply(text), is);
        }
    }
}
