//! How good samples are, in numbers to be read side by side.
//!
//! The bound on likelihood ([`crate::evaluate::bound`]) says how well a network describes text, not how well it
//! writes: steps, temperature and the sampler change samples and leave the bound alone. Here samples are
//! measured themselves:
//!
//! * **Bits per byte under a judge** ([`bits_per_byte`]): how predictable another language model, trained on
//!   much more text, finds them. Bytes, not the judge's tokens, so that judges and tokenizers compare. Text
//!   of the same kind that people wrote is the yardstick: samples near it are as fluent as the judge can tell.
//! * **Entropy of tokens** ([`token_entropy`]): of the distribution of tokens within a sample, on average.
//!   A judge alone is easily fooled: "the the the" is predictable, and so is what a network writes at a low
//!   temperature. Such text has a *better* score than people's, and betrays itself by an entropy below theirs.
//!   A gain under the judge counts only while the entropy stays where held-out text has it.
//! * **Distinct n-grams** ([`distinct`]) over all samples fall when samples resemble each other, and
//!   **repetition** ([`repetition`]) rises when one resembles itself.
//!
//! Entropies and shares depend on how long and how many the sequences are: compare equal ones.

use std::collections::{HashMap, HashSet};
use std::f64::consts::LN_2;
use std::fmt;

use denoised::diffusion::Token;
use serde::Serialize;

/// n-grams whose return within a sequence counts as repetition.
const REPEATED: usize = 4;

/// A mean with what is known of its error.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Measured {
    /// The mean.
    pub mean: f64,
    /// Its standard error, unless there is one value only.
    pub standard_error: Option<f64>,
}

impl Measured {
    /// The mean of `values`, which are independent; `None` without any.
    pub fn mean(values: &[f64]) -> Option<Self> {
        let pairs: Vec<(f64, f64)> = values.iter().map(|&value| (value, 1.0)).collect();
        Self::ratio(&pairs)
    }

    /// Sum of the first over sum of the second numbers of independent pairs, with the error of a ratio
    /// estimator; `None` when the second are all zero.
    pub fn ratio(pairs: &[(f64, f64)]) -> Option<Self> {
        let count = pairs.len() as f64;
        let over: f64 = pairs.iter().map(|(_, over)| over).sum();
        if over == 0.0 {
            return None;
        }
        let mean = pairs.iter().map(|(value, _)| value).sum::<f64>() / over;
        let squares: f64 = pairs
            .iter()
            .map(|(value, over)| (value - mean * over).powi(2))
            .sum();
        Some(Self {
            mean,
            standard_error: (pairs.len() > 1)
                .then(|| (squares / (count - 1.0) / count).sqrt() / (over / count)),
        })
    }
}

impl fmt::Display for Measured {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:.3}", self.mean)?;
        self.standard_error
            .map_or(Ok(()), |error| write!(formatter, " ± {error:.3}"))
    }
}

/// How varied sequences are, each by itself and together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Variety {
    /// Sequences.
    pub sequences: usize,
    /// Entropy of the tokens of a sequence, in nats.
    pub token_entropy_nats: Measured,
    /// Share of n-grams that are different, over all sequences: of tokens, pairs and triples. `None` where
    /// no sequence is long enough.
    pub distinct: [Option<f64>; 3],
    /// Share of the 4-grams of a sequence that stood in it before. `None` where all are shorter.
    pub repetition: Option<Measured>,
}

impl Variety {
    /// The variety of `sequences`; `None` without any.
    pub fn of(sequences: &[Vec<Token>]) -> Option<Self> {
        let entropies: Vec<f64> = sequences.iter().map(|tokens| token_entropy(tokens)).collect();
        let repeated: Vec<f64> = sequences
            .iter()
            .filter_map(|tokens| repetition(tokens, REPEATED))
            .collect();
        Some(Self {
            sequences: sequences.len(),
            token_entropy_nats: Measured::mean(&entropies)?,
            distinct: [1, 2, 3].map(|n| distinct(sequences, n)),
            repetition: Measured::mean(&repeated),
        })
    }
}

impl fmt::Display for Variety {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "token entropy {} nats", self.token_entropy_nats)?;
        for (n, share) in (1..).zip(self.distinct) {
            if let Some(share) = share {
                write!(formatter, ", distinct-{n} {share:.3}")?;
            }
        }
        match self.repetition {
            Some(repetition) => write!(formatter, ", repetition {repetition}"),
            None => Ok(()),
        }
    }
}

/// Entropy in nats of the distribution of tokens within one sequence: at most `ln` of its length.
pub fn token_entropy(tokens: &[Token]) -> f64 {
    let mut counts: HashMap<Token, usize> = HashMap::new();
    for token in tokens {
        *counts.entry(*token).or_default() += 1;
    }
    // In order of size, because a sum of floats depends on its order and a map has none.
    let mut counts: Vec<usize> = counts.into_values().collect();
    counts.sort_unstable();
    let total = tokens.len() as f64;
    counts
        .into_iter()
        .map(|count| count as f64 / total)
        .map(|share| -share * share.ln())
        .sum()
}

/// Share of the n-grams of all sequences that are different; `None` without n-grams.
pub fn distinct(sequences: &[Vec<Token>], n: usize) -> Option<f64> {
    let mut seen = HashSet::new();
    let mut all = 0_usize;
    for gram in sequences.iter().flat_map(|tokens| tokens.windows(n)) {
        all += 1;
        seen.insert(gram);
    }
    (all > 0).then(|| seen.len() as f64 / all as f64)
}

/// Share of the n-grams of a sequence that stood in it before; `None` without n-grams.
pub fn repetition(tokens: &[Token], n: usize) -> Option<f64> {
    let seen: HashSet<_> = tokens.windows(n).collect();
    let all = tokens.windows(n).len();
    (all > 0).then(|| 1.0 - seen.len() as f64 / all as f64)
}

/// What a judge makes of one text.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Verdict {
    /// `-ln p` of what was read.
    pub nats: f64,
    /// Bytes that were read.
    pub bytes: usize,
    /// The judge's tokens that they were.
    pub tokens: usize,
}

/// Bits per byte over all texts, with the error over texts; `None` when nothing was read.
pub fn bits_per_byte(verdicts: &[Verdict]) -> Option<Measured> {
    let pairs: Vec<(f64, f64)> = verdicts
        .iter()
        .map(|verdict| (verdict.nats / LN_2, verdict.bytes as f64))
        .collect();
    Measured::ratio(&pairs)
}

/// Generative perplexity, as papers have it: of a token of the judge's, over all texts. `None` when nothing was read.
/// [`bits_per_byte`] compares judges as well, this does not.
pub fn perplexity(verdicts: &[Verdict]) -> Option<f64> {
    let nats: f64 = verdicts.iter().map(|verdict| verdict.nats).sum();
    let tokens: usize = verdicts.iter().map(|verdict| verdict.tokens).sum();
    (tokens > 0).then(|| (nats / tokens as f64).exp())
}

/// `count` of `sequences`, or all when there are fewer, evenly from beginning to end.
pub fn spread(sequences: &[Vec<Token>], count: usize) -> Vec<Vec<Token>> {
    let count = count.min(sequences.len());
    (0..count)
        .map(|index| sequences[index * sequences.len() / count].clone())
        .collect()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn near(left: f64, right: f64) -> bool {
        (left - right).abs() < 1e-12
    }

    #[test]
    fn entropy_counts_how_evenly_tokens_are_used() {
        // Shares 1/2, 1/4, 1/4: 1.5 bits.
        assert!(near(token_entropy(&[7, 7, 3, 9]), 1.5 * LN_2));
        assert!(near(token_entropy(&[1, 2, 3, 4, 5]), 5.0_f64.ln()));
        assert!(near(token_entropy(&[4; 9]), 0.0));
        assert!(near(token_entropy(&[]), 0.0));
    }

    #[test]
    fn n_grams_do_not_cross_sequences() {
        let sequences = [vec![1, 2, 1, 2], vec![1, 2, 3]];
        // 1 2 1 2 | 1 2 3: three of seven tokens.
        assert_eq!(distinct(&sequences, 1), Some(3.0 / 7.0));
        // 12 21 12 | 12 23: three of five pairs.
        assert_eq!(distinct(&sequences, 2), Some(3.0 / 5.0));
        // 121 212 | 123: all different.
        assert_eq!(distinct(&sequences, 3), Some(1.0));
        assert_eq!(distinct(&sequences, 5), None);
    }

    #[test]
    fn repetition_is_within_a_sequence() {
        // 12 23 31 12 23: two of five stood there before.
        assert!(near(repetition(&[1, 2, 3, 1, 2, 3], 2).unwrap(), 0.4));
        assert_eq!(repetition(&[1, 2, 3], 4), None);
        let same = vec![vec![1, 2, 3, 4, 5]; 3];
        assert_eq!(Variety::of(&same).unwrap().repetition.unwrap().mean, 0.0);
    }

    #[test]
    fn collapse_shows_in_every_number() {
        let varied = Variety::of(&[(0..50).collect(), (50..100).collect()]).unwrap();
        let collapsed = Variety::of(&[[1, 2].repeat(25), [1, 2].repeat(25)]).unwrap();
        assert_eq!(varied.distinct, [Some(1.0); 3]);
        assert!(near(varied.token_entropy_nats.mean, 50.0_f64.ln()));
        assert!(near(collapsed.token_entropy_nats.mean, LN_2));
        // Two pairs, 12 and 21, among 98.
        assert_eq!(collapsed.distinct[1], Some(2.0 / 98.0));
        // Two 4-grams among 47.
        assert!(near(collapsed.repetition.unwrap().mean, 45.0 / 47.0));
    }

    #[test]
    fn a_mean_has_the_usual_standard_error() {
        // Variance 1 of three values.
        let measured = Measured::mean(&[1.0, 2.0, 3.0]).unwrap();
        assert!(near(measured.mean, 2.0));
        assert!(near(measured.standard_error.unwrap(), (1.0_f64 / 3.0).sqrt()));
        assert_eq!(Measured::mean(&[5.0]).unwrap().standard_error, None);
        assert_eq!(Measured::mean(&[]), None);
    }

    #[test]
    fn bits_per_byte_weighs_texts_by_their_bytes() {
        let verdict = |bits: f64, bytes| Verdict {
            nats: bits * LN_2,
            bytes,
            tokens: bytes / 5,
        };
        let measured = bits_per_byte(&[verdict(10.0, 10), verdict(60.0, 30), verdict(0.0, 0)]).unwrap();
        assert!(near(measured.mean, 70.0 / 40.0));
        // Residuals -7.5, 7.5, 0: variance 56.25 over three texts of 40 / 3 bytes on average.
        let expected = (56.25_f64 / 3.0).sqrt() / (40.0 / 3.0);
        assert!(near(measured.standard_error.unwrap(), expected));
        assert_eq!(bits_per_byte(&[verdict(0.0, 0)]), None);
        // 70 bits over 2 and 6 tokens.
        assert!(near(
            perplexity(&[verdict(10.0, 10), verdict(60.0, 30)])
                .unwrap()
                .log2(),
            70.0 / 8.0
        ));
        assert_eq!(perplexity(&[verdict(0.0, 0)]), None);
    }

    #[test]
    fn a_spread_reaches_over_the_whole() {
        let sequences: Vec<Vec<Token>> = (0..10).map(|token| vec![token]).collect();
        assert_eq!(spread(&sequences, 3), [vec![0], vec![3], vec![6]]);
        assert_eq!(spread(&sequences, 30).len(), 10);
        assert!(spread(&[], 3).is_empty());
    }
}
