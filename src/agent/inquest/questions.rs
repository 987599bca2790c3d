//! What is asked by ARP.

use std::net::{IpAddr, Ipv4Addr};

use super::tap::Asker;
use crate::dataplane::silence::Place;

/// What is asked by ARP: whether another machine has this host's address, and which card has each next
/// hop's that is on the link.
pub struct Questions {
    asker: Asker,
    local: Ipv4Addr,
    targets: Vec<Ipv4Addr>,
}

impl Questions {
    /// None where there is no ARP.
    pub fn new(place: &Place, hops: impl IntoIterator<Item = IpAddr>) -> Option<Self> {
        let IpAddr::V4(local) = place.local else { return None };
        let asker = Asker::open(&place.interface);
        let asker = asker.inspect_err(|error| tracing::debug!(%error, "it is not asked by ARP"));
        let targets = hops.into_iter().filter_map(|address| match address {
            IpAddr::V4(address) => Some(address),
            IpAddr::V6(_) => None,
        });
        let targets = [local].into_iter().chain(targets).collect();
        Some(Self { asker: asker.ok()?, local, targets })
    }

    pub fn ask(&self) {
        for target in &self.targets {
            if let Err(error) = self.asker.ask(self.local.octets(), target.octets()) {
                tracing::debug!(%error, %target, "it is not asked by ARP");
            }
        }
    }
}
