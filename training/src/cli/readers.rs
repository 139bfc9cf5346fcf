//! Who reads samples, and what they make of them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use denoised::diffusion::Token;
use serde_json::Value;
use training::evaluate::overlap::{Overlap, TrainingText};
use training::evaluate::quality::{Measured, Variety, bits_per_byte, perplexity};

#[cfg(feature = "judge")]
use training::evaluate::judge::Judge;
#[cfg(not(feature = "judge"))]
use without::Judge;

/// Who reads what was written.
pub(super) struct Readers {
    judge: Option<Judge>,
    training: Option<TrainingText>,
}

impl Readers {
    /// Before the samples, which take longer than finding out that nobody can read them.
    pub(super) fn of(judge: Option<&Path>, training_text: &[PathBuf]) -> Result<Self> {
        let judge = judge.map(Judge::load).transpose()?;
        let mut training = (!training_text.is_empty()).then(TrainingText::default);
        for path in training_text {
            let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
            training.iter_mut().for_each(|training| training.add(&text));
        }
        Ok(Self { judge, training })
    }
}

/// Sequences with the text that they stand for.
pub(super) struct Written {
    pub(super) sequences: Vec<Vec<Token>>,
    texts: Vec<String>,
}

impl Written {
    pub(super) fn decode(
        sequences: Vec<Vec<Token>>,
        decode: impl Fn(&[Token]) -> Result<String>,
    ) -> Result<Self> {
        let texts = sequences
            .iter()
            .map(|tokens| decode(tokens))
            .collect::<Result<_>>()?;
        Ok(Self { sequences, texts })
    }
}

/// Numbers of one set of sequences.
pub(super) struct Quality {
    variety: Variety,
    /// Bits per byte and perplexity under the judge.
    judged: Option<(Measured, f64)>,
    overlap: Option<Overlap>,
}

impl Quality {
    pub(super) fn of(written: &Written, readers: &mut Readers) -> Result<Option<Self>> {
        let Some(variety) = Variety::of(&written.sequences) else {
            return Ok(None);
        };
        let judged = match &mut readers.judge {
            Some(judge) => {
                let verdicts: Vec<_> = written
                    .texts
                    .iter()
                    .map(|text| judge.read(text))
                    .collect::<Result<Vec<_>, _>>()?;
                bits_per_byte(&verdicts).zip(perplexity(&verdicts))
            }
            None => None,
        };
        let texts = || written.texts.iter().map(String::as_str);
        let overlap = readers
            .training
            .as_ref()
            .map(|training| training.overlap(texts()));
        Ok(Some(Self {
            variety,
            judged,
            overlap,
        }))
    }

    pub(super) fn json(&self) -> Result<Value> {
        let mut object = serde_json::to_value(&self.variety)?;
        if let Some((bits, perplexity)) = self.judged {
            object["judge_bits_per_byte"] = serde_json::to_value(bits)?;
            object["judge_perplexity"] = perplexity.into();
        }
        if let Some(overlap) = self.overlap {
            object["overlap"] = serde_json::to_value(overlap)?;
        }
        Ok(object)
    }

    pub(super) fn line(&self, of: &str) -> String {
        let judged = self
            .judged
            .map(|(bits, perplexity)| format!("judge {bits} bits per byte (perplexity {perplexity:.1}), "))
            .unwrap_or_default();
        let share =
            |share: Option<f64>| share.map_or("-".to_owned(), |share| format!("{:.2} %", 100.0 * share));
        let overlap = self
            .overlap
            .map(
                |Overlap {
                     known_words,
                     quoted_runs,
                 }| {
                    format!(
                        "{} of words known, {} of runs quoted, ",
                        share(known_words),
                        share(quoted_runs)
                    )
                },
            )
            .unwrap_or_default();
        let Self { variety, .. } = self;
        format!(
            "{of}: {judged}{overlap}{variety} ({} sequences)",
            variety.sequences
        )
    }
}

/// What stands where the judge is when it is not compiled in.
#[cfg(not(feature = "judge"))]
mod without {
    use std::path::Path;

    use training::evaluate::quality::Verdict;

    /// Why there is none.
    #[derive(Debug, thiserror::Error)]
    #[error("--judge needs the feature `judge`: cargo build --release -p training --features judge")]
    pub(super) struct NotBuilt;

    /// There is none.
    pub(super) enum Judge {}

    impl Judge {
        pub(super) fn load(_: &Path) -> Result<Self, NotBuilt> {
            Err(NotBuilt)
        }

        pub(super) fn read(&mut self, _: &str) -> Result<Verdict, NotBuilt> {
            match *self {}
        }
    }
}

#[cfg(all(test, not(feature = "judge")))]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn without_the_feature_one_line_says_which_to_build_with() {
        let error = Judge::load(Path::new("judge.gguf")).err().unwrap().to_string();
        assert!(
            error.contains("--features judge") && !error.contains('\n'),
            "{error}"
        );
    }
}
