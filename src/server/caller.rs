//! Who asks: the principal whose token came with a call, or else the address that it comes from.

use std::net::{IpAddr, Ipv6Addr};
use std::sync::Arc;

use http::Extensions;
use tonic::Request;
use tonic::transport::server::TcpConnectInfo;

use crate::engine::Caller;

/// A caller, and what they may do.
#[derive(Clone, Debug)]
pub(super) struct Principal {
    caller: Caller,
    /// The models that they may use, where not all.
    models: Option<Arc<[String]>>,
    is_admin: bool,
}

impl Principal {
    pub(super) fn known(caller: Caller, models: Option<Vec<String>>, is_admin: bool) -> Self {
        Self {
            caller,
            models: models.map(Into::into),
            is_admin,
        }
    }

    /// Of a server that asks for no tokens, anybody: told apart by address, and free to do everything.
    fn at_address(extensions: &Extensions) -> Self {
        let caller = match extensions
            .get::<TcpConnectInfo>()
            .and_then(TcpConnectInfo::remote_addr)
        {
            Some(address) => Caller::new(network(address.ip())),
            None => Caller::new("local"),
        };
        Self::known(caller, None, true)
    }

    /// Who sent the request that has `extensions`.
    pub(super) fn behind(extensions: &Extensions) -> Self {
        let known = extensions.get::<Self>().cloned();
        known.unwrap_or_else(|| Self::at_address(extensions))
    }

    /// Who sent `request`.
    pub(super) fn of<T>(request: &Request<T>) -> Self {
        Self::behind(request.extensions())
    }

    /// For fair order and shares.
    pub(super) fn caller(&self) -> &Caller {
        &self.caller
    }

    /// Whether they may use the model of this name, and know of it.
    pub(super) fn may_use(&self, model: &str) -> bool {
        let models = self.models.as_ref();
        models.is_none_or(|models| models.iter().any(|allowed| allowed == model))
    }

    /// Whether they may see what the server does for others.
    pub(super) fn is_admin(&self) -> bool {
        self.is_admin
    }
}

/// The address, or the network that stands for it: one host has as many addresses of an IPv6 /64 as it likes.
pub(super) fn network(address: IpAddr) -> String {
    match address.to_canonical() {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => {
            let [a, b, c, d, ..] = address.segments();
            format!("{}/64", Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_one_host_are_one_caller() {
        let of = |address: &str| network(address.parse().unwrap());
        assert_eq!(of("192.0.2.7"), "192.0.2.7");
        assert_eq!(of("::ffff:192.0.2.7"), "192.0.2.7");
        assert_eq!(of("2001:db8:1:2:3:4:5:6"), "2001:db8:1:2::/64");
        assert_eq!(of("2001:db8:1:2::9"), of("2001:db8:1:2:ffff::"));
        assert_ne!(of("2001:db8:1:2::9"), of("2001:db8:1:3::9"));
    }
}
