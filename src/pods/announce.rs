//! Tells the pods of this host that an address has another MAC than before.
//!
//! A MAC follows from its address, as a rule, so that what neighbors remember is right. Docker makes MACs up,
//! and a pod can ask for one: then neighbors on the bridge keep the MAC of the address's last holder, and
//! reach its next one only when their kernels have asked in vain, up to a minute later.

use std::{collections::BTreeSet, io, net::IpAddr};

use socket2::Socket;

use super::bridge::{Tenant, mac_at};
use crate::{
    frames::{advertisement, arp, sender_at},
    model::{Addresses, Mac},
};

/// Announces pods on their bridge.
#[derive(Debug, Default)]
pub(super) struct Announcer {
    /// Addresses that neighbors may know with a MAC that does not follow from them, by the first of each pod.
    unusual: BTreeSet<IpAddr>,
    /// For the bridge with this index.
    socket: Option<(u32, Socket)>,
}

impl Announcer {
    /// Takes note of a pod that neighbors know.
    pub(super) fn note(&mut self, tenant: &Tenant) {
        if tenant.mac != Some(mac_at(tenant.addresses.first)) {
            self.unusual.insert(tenant.addresses.first);
        }
    }

    /// Tells all ports of a bridge which MAC the addresses of a pod have, if what they know may be wrong.
    ///
    /// The pod's own interface is not up yet: its kernel would warn of its own address in another's hands.
    pub(super) fn announce(&mut self, bridge: &str, index: u32, addresses: Addresses, mac: Mac) {
        let first = addresses.first;
        let is_unusual = mac != mac_at(first);
        let was_unusual =
            if is_unusual { !self.unusual.insert(first) } else { self.unusual.remove(&first) };
        if !is_unusual && !was_unusual {
            return;
        }
        if let Err(error) = self.send(bridge, index, addresses, mac) {
            tracing::warn!(address = %first, %mac, %error, "pods of this host not told of a new MAC");
        }
    }

    fn send(&mut self, bridge: &str, index: u32, addresses: Addresses, mac: Mac) -> io::Result<()> {
        if self.socket.as_ref().is_none_or(|(of, _)| *of != index) {
            self.socket = Some((index, sender_at(bridge)?.0));
        }
        let Some((_, socket)) = &self.socket else { return Ok(()) };
        addresses.iter().try_for_each(|address| {
            let frame = match address {
                IpAddr::V4(address) => arp(mac, None, address, address),
                IpAddr::V6(address) => advertisement(mac, address),
            };
            socket.send(&frame).map(drop)
        })
    }
}
