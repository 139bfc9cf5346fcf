//! Text that is told from left to right although it comes about in any order: as far as it is settled.

/// Follows the text of one choice.
#[derive(Debug)]
pub(super) struct InOrder {
    stops: Vec<String>,
    told: String,
    has_stopped: bool,
}

impl InOrder {
    /// Nothing is told yet; the text ends before the first of `stops`.
    pub(super) fn new(stops: Vec<String>) -> Self {
        Self {
            stops,
            told: String::new(),
            has_stopped: false,
        }
    }

    /// Whether a stop was found.
    pub(super) fn has_stopped(&self) -> bool {
        self.has_stopped
    }

    /// What is new in `settled`, the text from its beginning as far as it will stay.
    pub(super) fn more(&mut self, settled: &str) -> String {
        if let Some(at) = self.stop(settled) {
            self.has_stopped = true;
            return self.tell(&settled[..at]);
        }
        // Half a character that the next token completes.
        let whole = settled.trim_end_matches(char::REPLACEMENT_CHARACTER);
        let may_be_stop = |at: usize| self.stops.iter().any(|stop| stop.starts_with(&whole[at..]));
        let longest = self.stops.iter().map(String::len).max().unwrap_or(0);
        let near = whole.len().saturating_sub(longest);
        let held = whole
            .char_indices()
            .map(|(at, _)| at)
            .find(|at| *at >= near && may_be_stop(*at));
        self.tell(&whole[..held.unwrap_or(whole.len())])
    }

    /// What is new in `text`, after which nothing comes.
    pub(super) fn last(&mut self, text: &str) -> String {
        match self.stop(text) {
            Some(at) => {
                self.has_stopped = true;
                self.tell(&text[..at])
            }
            None => self.tell(text),
        }
    }

    /// Where the first stop begins.
    fn stop(&self, text: &str) -> Option<usize> {
        self.stops
            .iter()
            .filter_map(|stop| text.find(stop.as_str()))
            .min()
    }

    fn tell(&mut self, text: &str) -> String {
        // What was told cannot be taken back.
        let Some(new) = text.strip_prefix(self.told.as_str()) else {
            return String::new();
        };
        let new = new.to_owned();
        self.told.push_str(&new);
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_is_the_text_up_to_its_first_stop() {
        let whole = "one two STOP three STOPPED";
        for stops in [
            vec![],
            vec!["STOP"],
            vec!["three", "STOP"],
            vec!["four"],
            vec!["one"],
        ] {
            let expected = stops
                .iter()
                .filter_map(|stop| whole.find(stop))
                .min()
                .unwrap_or(whole.len());
            // However far it is settled from one time to the next.
            for pace in 1..=whole.len() {
                let mut order = InOrder::new(stops.iter().map(|stop| (*stop).to_owned()).collect());
                let mut told = String::new();
                for settled in (0..whole.len()).step_by(pace) {
                    told.push_str(&order.more(&whole[..settled]));
                    assert!(whole[..expected].starts_with(&told), "{stops:?}: {told:?}");
                }
                told.push_str(&order.last(whole));
                assert_eq!(told, whole[..expected], "{stops:?} by {pace}");
                assert_eq!(order.has_stopped(), expected < whole.len());
            }
        }
    }

    #[test]
    fn half_a_character_waits_for_its_other_half() {
        let mut order = InOrder::new(Vec::new());
        assert_eq!(order.more("caf\u{fffd}"), "caf");
        assert_eq!(order.more("café au"), "é au");
        assert_eq!(order.last("café au lait"), " lait");
    }

    #[test]
    fn all_but_what_may_be_a_stop_is_told_at_once() {
        let mut order = InOrder::new(vec!["\n\n".to_owned()]);
        assert_eq!(order.more("a line\n"), "a line");
        assert_eq!(order.more("a line\nand"), "\nand");
        assert_eq!(order.last("a line\nand another\n"), " another\n");
        assert!(!order.has_stopped());
    }
}
