//! Words for address families in texts and commands, and names of sysctls that differ by family.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// Returns the name of an address family.
pub const fn family_name(ipv4: bool) -> &'static str {
    if ipv4 { "IPv4" } else { "IPv6" }
}

/// Returns the name of an address family in rules of nft. With `tables` after it, it is the program that
/// sets other rules.
pub const fn rule_family(ipv4: bool) -> &'static str {
    if ipv4 { "ip" } else { "ip6" }
}

/// Returns the `ip` command for an address family.
pub const fn ip_command(ipv4: bool) -> &'static str {
    if ipv4 { "ip" } else { "ip -6" }
}

/// Returns the protocol that resolves addresses of neighbors.
pub const fn resolution_name(ipv4: bool) -> &'static str {
    if ipv4 { "ARP" } else { "neighbor discovery" }
}

/// Returns the unspecified address of a family.
pub const fn unspecified(ipv4: bool) -> IpAddr {
    if ipv4 { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) }
}

/// Returns the sysctl that lets a host forward packets of a family, as a path below `/proc/sys`.
pub const fn forwarding_sysctl(ipv4: bool) -> &'static str {
    if ipv4 { "net/ipv4/ip_forward" } else { "net/ipv6/conf/all/forwarding" }
}

/// Returns the sysctl that lets a host forward packets of a family that an interface receives, as a path
/// below `/proc/sys`. The interface `default` is the one for new interfaces.
pub fn interface_forwarding_sysctl(ipv4: bool, interface: &str) -> String {
    format!("net/ipv{}/conf/{interface}/forwarding", if ipv4 { 4 } else { 6 })
}

/// Converts the path of a sysctl to the form of the `sysctl` program, which exchanges dots and slashes, or
/// back.
pub fn dotted(name: &str) -> String {
    let exchange = |c| match c {
        '/' => '.',
        '.' => '/',
        c => c,
    };
    name.chars().map(exchange).collect()
}
