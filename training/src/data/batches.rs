//! Which sequences a step learns from.

use denoised::diffusion::Token;
use rand_chacha::rand_core::Rng;

use crate::data::{DataError, TokenFile};
use crate::random::{Purpose, generator};

/// Sequences in an order that depends on (seed, epoch) alone: every epoch cuts the tokens at another
/// offset and visits the pieces in another order.
#[derive(Debug)]
pub struct Batches {
    tokens: TokenFile,
    length: usize,
    seed: u64,
    order: Option<(u64, Vec<usize>)>,
}

impl Batches {
    /// Over `tokens`, in sequences of `length`.
    pub fn new(tokens: TokenFile, length: usize, seed: u64) -> Result<Self, DataError> {
        if tokens.tokens() < 2 * length {
            return Err(DataError::Short {
                tokens: tokens.tokens(),
                length,
            });
        }
        Ok(Self {
            tokens,
            length,
            seed,
            order: None,
        })
    }

    /// Sequence number `index`, over all epochs.
    pub(super) fn sequence(&mut self, index: u64) -> Vec<Token> {
        // One piece less than fits, so that every offset leaves as many.
        let pieces = (self.tokens.sequences(self.length) - 1) as u64;
        let (epoch, place) = (index / pieces, (index % pieces) as usize);
        if self.order.as_ref().is_none_or(|(cached, _)| *cached != epoch) {
            let mut random = generator(self.seed, Purpose::Order, epoch);
            let offset = (random.next_u64() % self.length as u64) as usize;
            let mut starts: Vec<usize> = (0..pieces as usize)
                .map(|piece| offset + piece * self.length)
                .collect();
            for last in (1..starts.len()).rev() {
                starts.swap(last, (random.next_u64() % (last as u64 + 1)) as usize);
            }
            self.order = Some((epoch, starts));
        }
        let start = self.order.as_ref().map_or(0, |(_, starts)| starts[place]);
        self.tokens.range(start..start + self.length)
    }
}
