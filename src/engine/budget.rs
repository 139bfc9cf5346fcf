//! How much fits into a pass: what is configured, or less while the device has no memory for it.

use crate::sync::Mutex;

/// Passes that have to go well before a lowered budget is raised by an eighth.
const PASSES: u32 = 64;

/// Tokens of one pass, canvases times length.
#[derive(Debug)]
pub(super) struct Budget {
    most: usize,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    tokens: usize,
    went_well: u32,
}

impl Budget {
    pub(super) fn new(most: usize) -> Self {
        Self {
            most,
            state: Mutex::new(State {
                tokens: most,
                went_well: 0,
            }),
        }
    }

    /// Tokens of the next pass, at most.
    pub(super) fn tokens(&self) -> usize {
        self.state.lock().tokens
    }

    /// A pass of `tokens` tokens was more than the memory allows: the next ones are half of it. Returns that.
    pub(super) fn lower(&self, tokens: usize) -> usize {
        let mut state = self.state.lock();
        // Passes that began before the budget was lowered say nothing new.
        state.tokens = state.tokens.min((tokens / 2).max(1));
        state.went_well = 0;
        state.tokens
    }

    /// A pass went well.
    pub(super) fn went_well(&self) {
        let mut state = self.state.lock();
        if state.tokens == self.most {
            return;
        }
        state.went_well += 1;
        if state.went_well == PASSES {
            state.went_well = 0;
            state.tokens = (state.tokens + state.tokens / 8 + 1).min(self.most);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_halved_at_once_and_regrows_slowly_to_what_is_configured() {
        let budget = Budget::new(512);
        assert_eq!((budget.lower(512), budget.lower(256)), (256, 128));
        assert_eq!(budget.lower(512), 128, "known already");
        for _ in 0..PASSES - 1 {
            budget.went_well();
        }
        assert_eq!(budget.tokens(), 128);
        budget.went_well();
        assert_eq!(budget.tokens(), 145);
        for _ in 0..100 * PASSES {
            budget.went_well();
        }
        assert_eq!(budget.tokens(), 512);
        assert_eq!(budget.lower(1), 1, "one canvas always fits");
    }
}
