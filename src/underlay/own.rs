//! The addresses of this host.

use std::net::{IpAddr, SocketAddr};

use nix::ifaddrs::getifaddrs;

/// Whether a seed is an address of this host. False for a name that is not an address.
pub fn is_own_address(seed: &str) -> bool {
    let Ok(address) = seed.parse::<SocketAddr>() else { return false };
    let own = getifaddrs().into_iter().flatten().filter_map(|interface| interface.address);
    let ip = |own: nix::sys::socket::SockaddrStorage| -> Option<IpAddr> {
        let ipv4 = own.as_sockaddr_in().map(|own| own.ip().into());
        ipv4.or_else(|| own.as_sockaddr_in6().map(|own| own.ip().into()))
    };
    own.filter_map(ip).any(|own| own == address.ip())
}
