//! A canvas as people are shown it: how each of its positions reads, and what is known of it.

use serde::{Deserialize, Serialize};

use super::pieces::Pieces;
use crate::proto::v1::Frame;
use crate::proto::v1::frame::Content;

/// A position.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Position {
    /// What its token adds to the text; nothing where it is masked.
    pub(super) text: String,
    pub(super) held: Held,
}

/// What a position holds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Held {
    /// The mask.
    Masked,
    /// A token that was there from the beginning.
    Given,
    /// A token that was drawn.
    Drawn {
        /// Steps after which it was there.
        step: u32,
        /// What the network gave it then, in nats.
        log_probability: f32,
    },
}

/// A canvas after one of its steps.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Snapshot {
    /// When it was seen, since the request was made.
    pub(super) seconds: f64,
    pub(super) canvas: u32,
    pub(super) step: u32,
    pub(super) total: u32,
    pub(super) nfe: u32,
    pub(super) positions: Vec<Position>,
}

impl Snapshot {
    /// What `frame` shows, which has a keyframe; nothing where it has none.
    pub(super) fn of(frame: &Frame, pieces: &Pieces, seconds: f64) -> Option<Self> {
        let Some(Content::Keyframe(key)) = &frame.content else {
            return None;
        };
        let bit = |bits: &[u8], at: usize| bits.get(at / 8).is_some_and(|byte| byte >> (at % 8) & 1 == 1);
        let position = |(at, &token): (usize, &u32)| {
            let step = key.committed_at.get(at).copied().unwrap_or(0);
            let held = if bit(&key.masked, at) {
                Held::Masked
            } else if step == 0 || bit(&key.clamped, at) {
                Held::Given
            } else {
                let log_probability = key.log_probabilities.get(at).copied().unwrap_or(0.0);
                Held::Drawn {
                    step,
                    log_probability,
                }
            };
            let text = if held == Held::Masked {
                String::new()
            } else {
                pieces.of(token)
            };
            Position { text, held }
        };
        Some(Self {
            seconds,
            canvas: frame.canvas,
            step: frame.step,
            total: frame.total,
            nfe: frame.nfe,
            positions: key.tokens.iter().enumerate().map(position).collect(),
        })
    }

    /// Positions that are masked.
    pub(super) fn masked(&self) -> usize {
        let masked = |position: &&Position| position.held == Held::Masked;
        self.positions.iter().filter(masked).count()
    }

    /// Positions whose tokens were drawn.
    pub(super) fn drawn(&self) -> usize {
        let drawn = |position: &&Position| matches!(position.held, Held::Drawn { .. });
        self.positions.iter().filter(drawn).count()
    }

    /// The text as it stands, each masked position as U+2591.
    pub(super) fn text(&self) -> String {
        let text = |position: &Position| match position.held {
            Held::Masked => crate::server::MASKED.to_string(),
            Held::Given | Held::Drawn { .. } => position.text.clone(),
        };
        self.positions.iter().map(text).collect()
    }
}
