//! `denoised probe`: for those who watch a server by running a command.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use clap::Args;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use super::Failed;
use super::connect::Target;

/// Say whether a server takes requests: exit code 0 if it does, 69 if it does not. Without --server the one that the
/// settings of this machine are for (--config, variables).
#[derive(Debug, Args)]
pub(super) struct Probe {
    #[command(flatten)]
    target: Target,
    /// Be content with a server that answers, whether it takes requests or not.
    #[arg(long)]
    live: bool,
}

impl Probe {
    pub(super) async fn run(self) -> Result<(), Failed> {
        let target = self.target.or_own()?;
        let connection = target.connect().await?;
        let mut health = HealthClient::new(connection.server.clone());
        let asked = health.check(HealthCheckRequest::default()).await;
        drop(health);
        let answered = asked.map_err(Failed::from).and_then(|answer| {
            let status = answer.into_inner().status();
            if self.live || status == ServingStatus::Serving {
                Ok(())
            } else {
                Err(Failed::unavailable(format!(
                    "the server says {}",
                    status.as_str_name()
                )))
            }
        });
        answered.and(connection.close().await)
    }
}

/// The address at which a server that listens on `address` is reached from its own machine.
pub(super) fn from_here(address: SocketAddr) -> SocketAddr {
    let here = match address.ip() {
        ip if !ip.is_unspecified() => ip,
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
    };
    SocketAddr::new(here, address.port())
}
