//! What is asked by ARP or neighbor discovery.

use std::net::IpAddr;

use crate::{agent::tap::Asker, dataplane::silence::Place};

/// What is asked on the link: which card has each next hop's address; and by ARP, whether another machine
/// has this host's. (With IPv6 the kernel looks for that itself.)
pub struct Questions {
    asker: Asker,
    local: IpAddr,
    targets: Vec<IpAddr>,
}

impl Questions {
    /// None where there is nothing to ask, or the interface is no Ethernet.
    pub fn new(place: &Place, hops: impl IntoIterator<Item = IpAddr>) -> Option<Self> {
        let local = place.local;
        let own = local.is_ipv4().then_some(local);
        let hops = hops.into_iter().filter(|hop| hop.is_ipv4() == local.is_ipv4());
        let targets: Vec<IpAddr> = own.into_iter().chain(hops).collect();
        if targets.is_empty() {
            return None;
        }
        let asker = Asker::open(&place.interface);
        let asker = asker.inspect_err(|error| tracing::debug!(%error, "next hops are not asked"));
        Some(Self { asker: asker.ok()?, local, targets })
    }

    pub fn ask(&self) {
        for target in &self.targets {
            let asked = match (self.local, target) {
                (IpAddr::V4(local), IpAddr::V4(target)) => {
                    self.asker.ask(None, local.octets(), target.octets())
                }
                (IpAddr::V6(local), IpAddr::V6(target)) => self.asker.solicit(None, local, *target),
                _ => continue,
            };
            if let Err(error) = asked {
                tracing::debug!(%error, %target, "it was not asked who has it");
            }
        }
    }
}
