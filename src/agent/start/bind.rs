//! The address on which gossip listens.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::StartFailure;
use crate::config::Config;

/// Returns the address on which gossip listens. Peers must be able to reach it at the underlay address.
pub(super) fn listen_address(
    config: &Config,
    underlay: IpAddr,
) -> Result<SocketAddr, StartFailure> {
    match config.listen {
        None if underlay.is_ipv4() => Ok((Ipv4Addr::UNSPECIFIED, config.port).into()),
        None => Ok((Ipv6Addr::UNSPECIFIED, config.port).into()),
        Some(listen) if config.advertise.is_none() && !is_reached_by(listen, underlay) => {
            Err(StartFailure::Listen { listen, underlay })
        }
        Some(listen) => Ok(listen),
    }
}

/// Returns whether packets to this host's underlay address arrive at this listening address.
fn is_reached_by(listen: SocketAddr, underlay: IpAddr) -> bool {
    let families = listen.is_ipv6() || underlay.is_ipv4();
    families && (!listen.ip().is_loopback() || underlay.is_loopback())
}
