//! What a pod is given when it is connected, and why it is not.

use std::net::IpAddr;

use ipnet::IpNet;

use super::{Agent, pods::mac_of};
use crate::{
    api::{AttachRequest, PodError, PodErrorKind},
    model::{Attachment, Mac, Pod},
    pods::{
        NoAddress, PodRequest,
        bridge::{Bridge, is_address_mac, mac_at},
        last_addresses,
        standin::mate_mac,
        wiring::WiringError,
    },
};

impl Agent {
    pub(super) fn give_address(
        &mut self,
        request: &AttachRequest,
    ) -> Result<(Bridge, Pod), NotGiven> {
        let attachment =
            Attachment::new(&request.container, &request.interface).map_err(PodError::invalid)?;
        let netns = request.netns()?.display().to_string();
        let owner = request.owner()?.to_owned();
        let bridge = self.ready_bridge()?;
        if let Some(mac) = request.mac {
            self.expect_free_mac(mac, &attachment)?;
            let is_its = |ip: &IpAddr| bridge.subnets.first.contains(ip) && mac_at(*ip) == mac;
            if is_address_mac(mac) && !request.addresses.iter().any(is_its) {
                return Err(NoAddress::AddressMac(mac).into());
            }
        }
        let addresses = request.addresses.clone();
        let wish = PodRequest { attachment, owner, netns, addresses, mac: request.mac };
        let pod = self.pods.table.attach(self.clock.now(), bridge.subnets, wish)?.clone();
        Ok((bridge, pod))
    }

    /// Two pods on one bridge must not have the same.
    pub(super) fn expect_free_mac(
        &self,
        mac: Mac,
        attachment: &Attachment,
    ) -> Result<(), NoAddress> {
        if !mac.is_assignable() {
            return Err(NoAddress::GroupMac(mac));
        }
        // The trial of forwarding has it at the address that pods are given last.
        let view = self.kernel.wanted.as_ref();
        if view.is_some_and(|view| mate_mac(last_addresses(view.own.subnets)) == mac) {
            return Err(NoAddress::MacOfHost(mac));
        }
        let others = self.pods.table.iter().filter(|pod| pod.attachment != *attachment);
        if let Some(pod) = others.into_iter().find(|pod| mac_of(pod) == Some(mac)) {
            return Err(NoAddress::MacTaken { mac, holder: pod.attachment.clone() });
        }
        Ok(())
    }

    /// The same for a container of Docker's, whose MAC Docker may have made up: one of 16,384 begins as those
    /// do that follow from addresses, so only those of this node's own subnet are refused.
    pub(super) fn expect_free_docker_mac(
        &self,
        mac: Mac,
        attachment: &Attachment,
        address: Option<IpAddr>,
        subnet: IpNet,
    ) -> Result<(), NoAddress> {
        self.expect_free_mac(mac, attachment)?;
        let is_of_another = address.is_none_or(|ip| mac_at(ip) != mac);
        match is_of_another && follows_from(mac, subnet) {
            true => Err(NoAddress::AddressMac(mac)),
            false => Ok(()),
        }
    }
}

/// Whether an address of a subnet has this MAC, as a rule.
fn follows_from(mac: Mac, subnet: IpNet) -> bool {
    let [_, _, last @ ..] = *mac.as_bytes();
    let address = match subnet.network() {
        IpAddr::V4(_) => IpAddr::from(last),
        IpAddr::V6(network) => {
            let mut octets = network.octets();
            octets[12..].copy_from_slice(&last);
            octets.into()
        }
    };
    is_address_mac(mac) && subnet.contains(&address)
}

/// Why a pod has no address.
pub(super) enum NotGiven {
    Address(NoAddress),
    Other(PodError),
}

impl From<NoAddress> for NotGiven {
    fn from(error: NoAddress) -> Self {
        Self::Address(error)
    }
}

impl From<PodError> for NotGiven {
    fn from(error: PodError) -> Self {
        Self::Other(error)
    }
}

impl From<NotGiven> for PodError {
    fn from(error: NotGiven) -> Self {
        match error {
            NotGiven::Address(error) => error.into(),
            NotGiven::Other(error) => error,
        }
    }
}

impl From<NoAddress> for PodError {
    fn from(error: NoAddress) -> Self {
        let kind = match error {
            NoAddress::Attached { .. } => PodErrorKind::Invalid,
            NoAddress::Exhausted(_) => PodErrorKind::Exhausted,
            NoAddress::Outside { .. }
            | NoAddress::Gateway { .. }
            | NoAddress::Taken { .. }
            | NoAddress::GroupMac(_)
            | NoAddress::AddressMac(_)
            | NoAddress::MacOfHost(_)
            | NoAddress::MacTaken { .. }
            | NoAddress::TwoOfOneFamily { .. }
            | NoAddress::TwoPlaces { .. } => PodErrorKind::Address,
        };
        Self::new(kind, error)
    }
}

impl From<WiringError> for PodError {
    fn from(error: WiringError) -> Self {
        let kind = match error {
            WiringError::Kernel { .. } | WiringError::Incomplete(_) => PodErrorKind::Failed,
            _ => PodErrorKind::Invalid,
        };
        Self::new(kind, error)
    }
}
