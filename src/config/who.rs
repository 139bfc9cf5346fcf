//! Who may ask for something beside requests.

use serde::Deserialize;

/// Who may, where there are tokens; without them everybody is an admin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Who {
    /// It is off.
    Nobody,
    /// Those whose token says so.
    Admins,
    /// Everybody with a token.
    Callers,
    /// Those without a token, too.
    Everybody,
}
