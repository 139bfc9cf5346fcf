//! A client for Rust programs: requests by a builder, answers as a stream of events that goes on by itself when a
//! server goes away.
//!
//! ```no_run
//! use denoised::client::{Client, Event, Request};
//!
//! # async fn run() -> Result<(), Box<dyn std::error::Error>> {
//! let client = Client::new(["http://127.0.0.1:50051"])?;
//! let mut events = client.run(Request::continuing("In the beginning").length(40).seed(7));
//! while let Some(event) = events.next().await {
//!     if let Event::Result(result) = event? {
//!         println!("{}", result.text());
//!     }
//! }
//! # Ok(())
//! # }
//! ```

mod balanced;
mod bearer;
mod events;
mod request;
mod scoring;
pub(crate) mod states;

use std::sync::Arc;
use std::time::Duration;

use tonic::metadata::errors::InvalidMetadataValue;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::{Channel, ClientTlsConfig, Endpoint};

pub use balanced::{BalancedError, balanced, balanced_with, over};
pub use bearer::Bearer;
pub use events::{Event, Events, Resumed};
pub use request::{Request, draft, gap, gap_of, text, tokens};
pub use scoring::{Candidate, Service};

/// How often a client goes on after a server has gone away, and how long it waits before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// Times in a row without anything new.
    pub times: u32,
    /// Before the first time; twice as long before each that follows.
    pub first: Duration,
    /// Before any of them, at most.
    pub longest: Duration,
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            times: 5,
            first: Duration::from_millis(100),
            longest: Duration::from_secs(5),
        }
    }
}

impl Retry {
    /// Never again.
    pub const NEVER: Self = Self {
        times: 0,
        first: Duration::ZERO,
        longest: Duration::ZERO,
    };

    /// The wait before going on for the `attempt`th time, from 1, where the server asks for at least `asked`.
    fn wait(&self, attempt: u32, asked: Option<Duration>) -> Duration {
        let doubled = self
            .first
            .saturating_mul(2u32.saturating_pow(attempt.saturating_sub(1)));
        doubled.max(asked.unwrap_or_default()).min(self.longest)
    }
}

/// How long a connection may take.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a server that is asked may say nothing before it has to show that it is there, and how long that may take.
const SILENCE: Duration = Duration::from_secs(5);

/// `endpoint` with limits on how long a server may be away: one that opens a socket and is never heard again, or that
/// vanishes during an answer without a word, counts as gone after ten seconds. One that is slow shows that it is there.
pub fn watched(endpoint: Endpoint) -> Endpoint {
    endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .http2_keep_alive_interval(SILENCE)
        .keep_alive_timeout(SILENCE)
}

/// A client of one server, or of several that serve the same models.
#[derive(Clone, Debug)]
pub struct Client {
    servers: Arc<[Channel]>,
    retry: Retry,
    bearer: Bearer,
}

impl Client {
    /// A client of the servers at these URLs, of which the first is asked, and the next when it has gone away.
    /// Connections are made when they are needed; those to `https://` trust the authorities that the system trusts. For
    /// others, or with a certificate of the client's, make channels (of [`watched`] endpoints) and use [`Self::of`].
    ///
    /// # Errors
    /// When a URL is none, or the system's authorities cannot be read.
    pub fn new<U: AsRef<str>>(urls: impl IntoIterator<Item = U>) -> Result<Self, tonic::transport::Error> {
        let channel = |url: U| {
            let endpoint = Endpoint::from_shared(url.as_ref().to_owned())?;
            let endpoint = if url.as_ref().starts_with("https://") {
                endpoint.tls_config(ClientTlsConfig::new().with_enabled_roots())?
            } else {
                endpoint
            };
            Ok(watched(endpoint).connect_lazy())
        };
        let servers: Vec<Channel> = urls.into_iter().map(channel).collect::<Result<_, _>>()?;
        Ok(Self::of(servers))
    }

    /// A client of these connections.
    pub fn of(servers: impl Into<Arc<[Channel]>>) -> Self {
        Self {
            servers: servers.into(),
            retry: Retry::default(),
            bearer: Bearer::default(),
        }
    }

    /// The same for servers that ask for a token. To `http://` it travels in plaintext.
    ///
    /// # Errors
    /// When the token has characters that no header can have.
    pub fn with_token(self, token: &str) -> Result<Self, InvalidMetadataValue> {
        Ok(self.with_bearer(Bearer::new(token)?))
    }

    /// The same with this token.
    #[must_use]
    pub fn with_bearer(self, bearer: Bearer) -> Self {
        Self { bearer, ..self }
    }

    /// The same with other waits.
    #[must_use]
    pub fn with_retry(self, retry: Retry) -> Self {
        Self { retry, ..self }
    }

    /// Asks for `request`. The events begin with what the server made of it; what it refuses is the first of them.
    ///
    /// Dropping them ends the request.
    pub fn run(&self, request: Request) -> Events {
        Events::new(self.clone(), request)
    }

    /// The server that is asked for the `turn`th time.
    fn server(&self, turn: usize) -> Option<InterceptedService<Channel, Bearer>> {
        let server = self.servers.get(turn % self.servers.len().max(1))?;
        Some(InterceptedService::new(server.clone(), self.bearer.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest_and_the_server_is_heard() {
        let retry = Retry {
            times: 9,
            first: Duration::from_millis(100),
            longest: Duration::from_secs(1),
        };
        let wait = |attempt, asked| retry.wait(attempt, asked).as_millis();
        let waits = [1, 2, 3, 4, 5, 99].map(|attempt| wait(attempt, None));
        assert_eq!(waits, [100, 200, 400, 800, 1000, 1000]);
        assert_eq!(wait(1, Some(Duration::from_millis(300))), 300);
        assert_eq!(wait(1, Some(Duration::from_secs(60))), 1000);
    }
}
