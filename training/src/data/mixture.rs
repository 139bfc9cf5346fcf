//! A mixture of token files, of which every one has its share of the sequences.

use denoised::diffusion::Token;
use rand_chacha::rand_core::Rng;

use super::batches::Batches;
use super::{DataError, TokenFile};
use crate::random::{Purpose, generator};

/// Sequences in which shares are kept: within one as near as whole numbers are, over many to their mean.
const PERIOD: usize = 1024;

/// Sequences of several token files in an order that depends on the seed alone: which file a sequence comes of, and
/// which one of that file it is. The sequences of a file come epoch by epoch, as if it were alone.
#[derive(Debug)]
pub struct Mixture {
    parts: Vec<Batches>,
    /// How many sequences of a period come of each file.
    quotas: Vec<usize>,
    seed: u64,
    /// For every place of a period, the file and the number of its sequence within the period.
    order: Option<(u64, Vec<(usize, usize)>)>,
}

impl Mixture {
    /// Over `first`, and `others` with the share of sequences that comes of each, in sequences of `length`.
    ///
    /// # Errors
    /// When a file is shorter than two sequences.
    pub fn new(
        first: TokenFile,
        others: Vec<(TokenFile, f64)>,
        length: usize,
        seed: u64,
    ) -> Result<Self, DataError> {
        let quotas = quotas(others.iter().map(|(_, share)| *share));
        let files = std::iter::once(first).chain(others.into_iter().map(|(file, _)| file));
        Ok(Self {
            parts: files
                .map(|file| Batches::new(file, length, seed))
                .collect::<Result<_, _>>()?,
            quotas,
            seed,
            order: None,
        })
    }

    /// The sequences of step `step` with `batch` sequences per step.
    pub fn batch(&mut self, step: u64, batch: usize) -> Vec<Vec<Token>> {
        let first = step * batch as u64;
        (first..first + batch as u64)
            .map(|index| self.sequence(index))
            .collect()
    }

    fn sequence(&mut self, index: u64) -> Vec<Token> {
        let (part, index) = self.place(index);
        self.parts[part].sequence(index)
    }

    /// The file of sequence `index`, and the number of the sequence there.
    fn place(&mut self, index: u64) -> (usize, u64) {
        let (period, place) = (index / PERIOD as u64, (index % PERIOD as u64) as usize);
        let (seed, quotas) = (self.seed, &self.quotas);
        let cached = self.order.take().filter(|(cached, _)| *cached == period);
        let (_, order) = self
            .order
            .insert(cached.unwrap_or_else(|| (period, order(quotas, seed, period))));
        let (part, within) = order[place];
        (part, period * self.quotas[part] as u64 + within as u64)
    }
}

/// How many sequences of a period each file gives, the first one what the `shares` of the others leave: rounded down,
/// so that it is left its own.
fn quotas(shares: impl Iterator<Item = f64>) -> Vec<usize> {
    // Whoever is asked for is there.
    let others: Vec<usize> = shares
        .map(|share| ((share * PERIOD as f64) as usize).max(1))
        .collect();
    let rest = PERIOD.saturating_sub(others.iter().sum());
    std::iter::once(rest).chain(others).collect()
}

/// The order of the files in a period, and the number of each sequence among those of its file.
fn order(quotas: &[usize], seed: u64, period: u64) -> Vec<(usize, usize)> {
    let mut files: Vec<usize> = quotas
        .iter()
        .enumerate()
        .flat_map(|(part, &quota)| std::iter::repeat_n(part, quota))
        .collect();
    let mut random = generator(seed, Purpose::Mixture, period);
    for last in (1..files.len()).rev() {
        files.swap(last, (random.next_u64() % (last as u64 + 1)) as usize);
    }
    let mut seen = vec![0; quotas.len()];
    files
        .into_iter()
        .map(|part| {
            seen[part] += 1;
            (part, seen[part] - 1)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_has_its_share_and_none_skips_a_sequence() {
        let quotas = quotas([0.25, 1e-5].into_iter());
        assert_eq!(quotas, [767, 256, 1]);
        let mut seen = [0_u64; 3];
        for period in 0..3 {
            let order = order(&quotas, 7, period);
            assert_eq!(order.len(), PERIOD);
            // Neither in blocks nor the same every time.
            assert!(order[..64].iter().any(|(part, _)| *part == 1));
            assert_ne!(order, super::order(&quotas, 7, period + 1));
            assert_ne!(order, super::order(&quotas, 8, period));
            for (part, within) in order {
                assert_eq!(period * quotas[part] as u64 + within as u64, seen[part]);
                seen[part] += 1;
            }
        }
        assert_eq!(seen, [3 * 767, 3 * 256, 3]);
    }

    #[test]
    fn one_file_alone_is_in_its_own_order() {
        let quotas = quotas(std::iter::empty());
        let places = order(&quotas, 1, 5);
        assert!(places.iter().enumerate().all(|(at, place)| *place == (0, at)));
    }
}
