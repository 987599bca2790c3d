//! Queries by ARP or neighbor discovery.

use std::net::IpAddr;

use crate::{agent::diagnosis::tap::Asker, dataplane::silence::Place, netlink::Netlink};

/// Limit of neighbors that are queried for comparison.
const MAX_NEIGHBORS: usize = 4;

/// Queries on the underlay's link: which hardware addresses answer for the next hops; and with IPv4, whether
/// another machine has this host's address. (With IPv6 the kernel checks that itself.)
pub struct NeighborQueries {
    sender: Asker,
    /// Address of this host.
    local: IpAddr,
    /// Addresses to query.
    targets: Vec<IpAddr>,
}

impl NeighborQueries {
    /// Returns `None` if there is nothing to query, or the interface is not Ethernet.
    pub fn new(place: &Place, hops: impl IntoIterator<Item = IpAddr>) -> Option<Self> {
        let local = place.local;
        let own = local.is_ipv4().then_some(local);
        let hops = hops.into_iter().filter(|hop| hop.is_ipv4() == local.is_ipv4());
        let targets: Vec<IpAddr> = own.into_iter().chain(hops).collect();
        if targets.is_empty() {
            return None;
        }
        let sender = Asker::open(&place.interface);
        let sender = sender.inspect_err(|error| tracing::debug!(%error, "next hops not queried"));
        Some(Self { sender: sender.ok()?, local, targets })
    }

    /// Sends one query for each address.
    pub fn send(&self) {
        for target in &self.targets {
            let sent = match (self.local, target) {
                (IpAddr::V4(local), IpAddr::V4(target)) => {
                    self.sender.ask(None, local.octets(), target.octets())
                }
                (IpAddr::V6(local), IpAddr::V6(target)) => {
                    self.sender.solicit(None, local, *target)
                }
                _ => continue,
            };
            if let Err(error) = sent {
                tracing::debug!(%error, %target, "address not queried");
            }
        }
    }
}

/// Returns addresses of some machines that the kernel has resolved on an interface.
pub fn neighbors(netlink: &mut Netlink, link: u32) -> Vec<IpAddr> {
    let known = netlink.neighbors().unwrap_or_default().into_iter();
    let resolved = known.filter(|known| known.link == link && known.is_resolved);
    resolved.map(|known| known.ip).filter(IpAddr::is_ipv4).take(MAX_NEIGHBORS).collect()
}
