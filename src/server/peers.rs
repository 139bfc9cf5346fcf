//! How many connections each address has.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

use parking_lot::Mutex;

use super::caller::network;

/// Connections that are open, by the network of their peer.
#[derive(Clone, Debug, Default)]
pub(super) struct Peers(Arc<Mutex<HashMap<String, usize>>>);

/// The place of one connection among those of its peer; free again when dropped.
#[derive(Debug)]
pub(super) struct Place {
    peers: Peers,
    network: String,
}

impl Peers {
    /// A place for a connection from `address`, unless there are `limit` already.
    pub(super) fn enter(&self, address: IpAddr, limit: usize) -> Option<Place> {
        let network = network(address);
        let mut open = self.0.lock();
        let connections = open.entry(network.clone()).or_default();
        // An entry is never of none: where this is refused there are others.
        if *connections >= limit.max(1) {
            return None;
        }
        *connections += 1;
        Some(Place {
            peers: self.clone(),
            network,
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut open = self.peers.0.lock();
        if let Some(connections) = open.get_mut(&self.network) {
            *connections -= 1;
            if *connections == 0 {
                open.remove(&self.network);
            }
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn places_are_counted_by_network_and_forgotten_when_free() {
        let peers = Peers::default();
        let address = |text: &str| text.parse().unwrap();
        let first = peers.enter(address("2001:db8::1"), 2).unwrap();
        let second = peers.enter(address("2001:db8::2"), 2).unwrap();
        assert!(peers.enter(address("2001:db8::3"), 2).is_none(), "the same /64");
        let other = peers.enter(address("192.0.2.1"), 2).unwrap();
        drop(first);
        let third = peers.enter(address("2001:db8::3"), 2).unwrap();
        drop((second, third, other));
        assert!(peers.0.lock().is_empty());
    }
}
