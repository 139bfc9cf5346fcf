//! Calls that are spread over all servers behind one name, without a proxy: what a headless service of Kubernetes is for.

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tonic::transport::channel::Change;
use tonic::transport::{Channel, ClientTlsConfig, Endpoint, Uri};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use super::watched;

/// Between two looks at what a name stands for.
const LOOK: Duration = Duration::from_secs(5);
/// Before a server that does not answer is asked again: at first, and at most.
const PAUSES: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(5)];
/// Changes of servers that wait for calls to notice.
const CHANGES: usize = 64;

/// Why there is no such channel.
#[derive(Debug, thiserror::Error)]
pub enum BalancedError {
    /// Not a URL that names a host.
    #[error("{0:?} is no URL of a server, such as http://denoised-headless:50051")]
    Url(String),
    /// The system's authorities cannot be read, or the URL cannot be called.
    #[error(transparent)]
    Transport(#[from] tonic::transport::Error),
}

/// A channel to all addresses of the name in `url`, looked up again every few seconds, as [`over`] spreads calls. Must be
/// called within a runtime of tokio's.
///
/// # Errors
/// When `url` names no host, or the system's authorities cannot be read.
pub fn balanced(url: &str) -> Result<Channel, BalancedError> {
    balanced_with(url, ClientTlsConfig::new().with_enabled_roots())
}

/// The same with `tls`, for servers at `https://`.
///
/// # Errors
/// When `url` names no host, or `tls` cannot be used.
pub fn balanced_with(url: &str, tls: ClientTlsConfig) -> Result<Channel, BalancedError> {
    let wrong = || BalancedError::Url(url.to_owned());
    let uri: Uri = url.parse().map_err(|_| wrong())?;
    let is_secure = match uri.scheme_str() {
        Some("https") => true,
        Some("http") => false,
        Some(_) | None => return Err(wrong()),
    };
    let host = uri.host().ok_or_else(wrong)?.trim_matches(['[', ']']).to_owned();
    let port = uri.port_u16().unwrap_or(if is_secure { 443 } else { 80 });
    let tls = tls.domain_name(&host);
    let scheme = if is_secure { "https" } else { "http" };
    let to = move |address: SocketAddr| {
        // Called as the name, wherever it leads.
        let endpoint = Endpoint::from_shared(format!("{scheme}://{address}"))?.origin(uri.clone());
        let endpoint = if is_secure {
            endpoint.tls_config(tls.clone())?
        } else {
            endpoint
        };
        Ok::<_, tonic::transport::Error>(watched(endpoint))
    };
    // What is wrong with all of them is told now.
    to(SocketAddr::from(([127, 0, 0, 1], port)))?;
    let (tell, addresses) = watch::channel(Vec::new());
    tokio::spawn(async move {
        loop {
            // A name that cannot be looked up now stands for what it did.
            if let Ok(found) = tokio::net::lookup_host((host.as_str(), port)).await {
                let mut found: Vec<SocketAddr> = found.collect();
                found.sort_unstable();
                found.dedup();
                tell.send_if_modified(|known| {
                    let is_new = *known != found;
                    *known = found;
                    is_new
                });
            }
            tokio::select! {
                () = tokio::time::sleep(LOOK) => {}
                () = tell.closed() => return,
            }
        }
    });
    Ok(over(addresses, to))
}

/// A channel that spreads calls evenly over the servers at `addresses`, whatever they are at the time, as far as they say
/// that they serve: each is asked by `grpc.health.v1.Health/Watch` and left out while it shuts down, does not answer, or
/// cannot be called (`to` says how). Must be called within a runtime of tokio's. A call waits while nobody serves.
pub fn over<F>(mut addresses: watch::Receiver<Vec<SocketAddr>>, to: F) -> Channel
where
    F: Fn(SocketAddr) -> Result<Endpoint, tonic::transport::Error> + Send + Sync + 'static,
{
    let (channel, changes) = Channel::balance_channel(CHANGES);
    tokio::spawn(async move {
        let mut asked: HashMap<SocketAddr, JoinHandle<()>> = HashMap::new();
        loop {
            let now: HashSet<SocketAddr> = addresses.borrow_and_update().iter().copied().collect();
            for address in asked.keys().copied().collect::<Vec<_>>() {
                if !now.contains(&address) {
                    if let Some(task) = asked.remove(&address) {
                        task.abort();
                    }
                    if changes.send(Change::Remove(address)).await.is_err() {
                        return;
                    }
                }
            }
            for address in now {
                if !asked.contains_key(&address)
                    && let Ok(endpoint) = to(address)
                {
                    asked.insert(address, tokio::spawn(ask(address, endpoint, changes.clone())));
                }
            }
            let over = tokio::select! {
                changed = addresses.changed() => changed.is_err(),
                () = changes.closed() => true,
            };
            if over {
                break;
            }
        }
        // Who told the addresses is gone: they are the last. Who calls is gone: nobody is asked any more.
        changes.closed().await;
        for task in asked.into_values() {
            task.abort();
        }
    });
    channel
}

/// Tells `changes` whether the server at `address` serves, for as long as anybody wants to know.
async fn ask(address: SocketAddr, endpoint: Endpoint, changes: mpsc::Sender<Change<SocketAddr, Endpoint>>) {
    let [first, longest] = PAUSES;
    let (mut serves, mut pause) = (false, first);
    loop {
        let mut health = HealthClient::new(endpoint.connect_lazy());
        if let Ok(answer) = health.watch(HealthCheckRequest::default()).await {
            let mut states = answer.into_inner();
            while let Ok(Some(state)) = states.message().await {
                let now = state.status() == ServingStatus::Serving;
                if now != serves {
                    let change = if now {
                        Change::Insert(address, endpoint.clone())
                    } else {
                        Change::Remove(address)
                    };
                    if changes.send(change).await.is_err() {
                        return;
                    }
                    serves = now;
                }
                pause = first;
            }
        }
        if std::mem::take(&mut serves) && changes.send(Change::Remove(address)).await.is_err() {
            return;
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = changes.closed() => return,
        }
        pause = (2 * pause).min(longest);
    }
}
