//! Who asks: the address that a call comes from.

use std::net::{IpAddr, Ipv6Addr};

use http::Extensions;
use tonic::Request;
use tonic::transport::server::TcpConnectInfo;

use crate::engine::Caller;

/// The caller of `request`, for fair order and shares.
///
/// IPv6 callers are told apart by their /64: one host has as many addresses of it as it likes.
pub(super) fn of<T>(request: &Request<T>) -> Caller {
    behind(request.extensions())
}

/// The caller of the request that has `extensions`.
pub(super) fn behind(extensions: &Extensions) -> Caller {
    match extensions
        .get::<TcpConnectInfo>()
        .and_then(TcpConnectInfo::remote_addr)
    {
        Some(address) => Caller::new(network(address.ip())),
        None => Caller::new("local"),
    }
}

fn network(address: IpAddr) -> String {
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
