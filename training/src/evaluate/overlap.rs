//! What written text shares with the text that a network learned from: words, and runs of words.
//!
//! Words that the training text has not are mostly words that do not exist: a network that draws the parts of a
//! word independently of each other makes them up. Runs of [`RUN`] words that stand in the training text are
//! quotations: a network that only remembers writes nothing else. Held-out text is the yardstick for both.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};

use serde::Serialize;

/// Words of a run.
pub const RUN: usize = 8;

/// The words of a training text, and its runs, as hashes.
#[derive(Debug, Default)]
pub struct TrainingText {
    words: HashSet<String>,
    runs: HashSet<u64>,
}

/// What texts share with a training text, as shares of all their words and runs; `None` without any.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Overlap {
    /// Words that occur in it.
    pub known_words: Option<f64>,
    /// Runs of [`RUN`] words that stand in it.
    pub quoted_runs: Option<f64>,
}

impl TrainingText {
    /// Adds a document.
    pub fn add(&mut self, text: &str) {
        let words: Vec<String> = words(text).collect();
        self.runs.extend(words.windows(RUN).map(hash));
        self.words.extend(words);
    }

    /// What `texts` share with it. The first and the last word of each are left out: they may be cut.
    pub fn overlap<'a>(&self, texts: impl IntoIterator<Item = &'a str>) -> Overlap {
        let (mut known, mut quoted) = (Share::default(), Share::default());
        for text in texts {
            let words: Vec<String> = words(text).collect();
            let whole = words.get(1..words.len().saturating_sub(1)).unwrap_or_default();
            whole
                .iter()
                .for_each(|word| known.count(self.words.contains(word)));
            let runs = whole.windows(RUN).map(hash);
            runs.for_each(|run| quoted.count(self.runs.contains(&run)));
        }
        Overlap {
            known_words: known.share(),
            quoted_runs: quoted.share(),
        }
    }
}

/// Letters and digits that follow each other, in lower case; an apostrophe between them belongs to the word.
fn words(text: &str) -> impl Iterator<Item = String> + '_ {
    text.split(|c: char| !c.is_alphanumeric() && c != '\'')
        .map(|word| word.trim_matches('\''))
        .filter(|word| !word.is_empty())
        .map(str::to_lowercase)
}

fn hash(run: &[String]) -> u64 {
    let mut hasher = DefaultHasher::new();
    run.hash(&mut hasher);
    hasher.finish()
}

#[derive(Default)]
struct Share {
    of: usize,
    all: usize,
}

impl Share {
    fn count(&mut self, counts: bool) {
        self.of += usize::from(counts);
        self.all += 1;
    }

    fn share(&self) -> Option<f64> {
        (self.all > 0).then(|| self.of as f64 / self.all as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn training() -> TrainingText {
        let mut text = TrainingText::default();
        text.add("In the beginning God created the heavens, and the earth. It wasn't \"formless\".");
        text
    }

    #[test]
    fn words_are_known_whatever_their_case_and_marks() {
        let overlap = training().overlap(["cut THE 'heavens' and wasn't the begining cut"]);
        // the heavens and wasn't the | begining
        assert_eq!(overlap.known_words, Some(5.0 / 6.0));
        assert_eq!(overlap.quoted_runs, None, "six words have no run of eight");
    }

    #[test]
    fn runs_of_eight_words_are_quotations() {
        let quoting = "cut in the beginning God created the heavens and the moon cut";
        // Ten whole words have three runs of eight, of which two end before the moon.
        assert_eq!(training().overlap([quoting]).quoted_runs, Some(2.0 / 3.0));
    }

    #[test]
    fn nothing_has_no_share() {
        let none = Overlap {
            known_words: None,
            quoted_runs: None,
        };
        assert_eq!(training().overlap(["two words", ""]), none);
    }
}
