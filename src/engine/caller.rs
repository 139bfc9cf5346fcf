//! Who asks, and what that gives them beside others.

use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

/// A caller: a flow of its own in the queue, with a share of its own of what may wait.
///
/// Callers are told apart by name alone.
#[derive(Clone, Debug)]
pub struct Caller {
    name: Arc<str>,
    weight: u32,
    max_share: Option<f64>,
}

impl Caller {
    /// Largest weight.
    pub const MAX_WEIGHT: u32 = 1000;

    /// The caller of this name: a principal, or an address. Of weight 1.
    pub fn new(name: impl Into<Arc<str>>) -> Self {
        Self {
            name: name.into(),
            weight: 1,
            max_share: None,
        }
    }

    /// The same with `weight` times the turns of a caller of weight 1, from 1 to [`Self::MAX_WEIGHT`].
    #[must_use]
    pub fn with_weight(self, weight: u32) -> Self {
        let weight = weight.clamp(1, Self::MAX_WEIGHT);
        Self { weight, ..self }
    }

    /// The same with a share of its own of what may wait, in (0, 1].
    #[must_use]
    pub fn with_max_share(self, max_share: Option<f64>) -> Self {
        Self { max_share, ..self }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its turns for each of a caller of weight 1.
    pub(super) fn weight(&self) -> u32 {
        self.weight
    }

    /// Its share of what may wait, where it is not that of everybody.
    pub fn max_share(&self) -> Option<f64> {
        self.max_share
    }
}

impl PartialEq for Caller {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for Caller {}

impl Hash for Caller {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.name.hash(state);
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// Names a running request: ids belong to their callers.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct RequestName {
    pub(super) caller: Caller,
    pub(super) id: String,
}
