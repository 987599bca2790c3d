//! Announces to the pods of this host that an address has another MAC than before.
//!
//! A MAC usually follows from its address, so the neighbor entries of other pods stay valid. Docker chooses
//! random MACs, and a pod can request one. Then the neighbors on the bridge keep the MAC of the address's
//! previous owner, and reach the new owner only after their kernels' probes have failed, up to a minute
//! later.

use std::{collections::BTreeSet, io, net::IpAddr};

use socket2::Socket;

use super::{desired::Tenant, mac_at};
use crate::{
    frames::{advertisement, arp, sender_at},
    model::{Addresses, Mac},
};

/// Announces pods on their bridge.
#[derive(Debug, Default)]
pub(super) struct Announcer {
    /// The first address of each pod whose neighbors may know a MAC that does not follow from the address.
    custom: BTreeSet<IpAddr>,
    /// Index of a bridge, and a socket that sends on it.
    socket: Option<(u32, Socket)>,
}

impl Announcer {
    /// Records a pod that neighbors know.
    pub(super) fn note(&mut self, tenant: &Tenant) {
        if tenant.mac != Some(mac_at(tenant.addresses.first)) {
            self.custom.insert(tenant.addresses.first);
        }
    }

    /// Announces the MAC of a pod's addresses to all ports of a bridge, if neighbors may know another one.
    ///
    /// Call it before the pod's own interface is up. Otherwise its kernel reports an address conflict.
    pub(super) fn announce(&mut self, bridge: &str, index: u32, addresses: Addresses, mac: Mac) {
        let first = addresses.first;
        let is_custom = mac != mac_at(first);
        let was_custom =
            if is_custom { !self.custom.insert(first) } else { self.custom.remove(&first) };
        if !is_custom && !was_custom {
            return;
        }
        if let Err(error) = self.send(bridge, index, addresses, mac) {
            tracing::warn!(address = %first, %mac, %error, "new MAC not announced to pods of this host");
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
